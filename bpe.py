"""A byte-level BPE tokenizer from scratch: train, encode, decode, save, in pure Python.

Byte-pair encoding starts from the 256 bytes and, again and again, gives the most frequent pair of
neighbouring tokens an id of its own. The list of those merges *is* the tokenizer: to encode new
text, replay them in the order in which they were learned. Notable features:
- any str survives encode and decode exactly: there is no unknown token, and nothing is normalised
- training streams its documents; only distinct words and their counts are kept in memory
- merges equal rustbpe's, ids equal tiktoken's and Hugging Face's (tests/test_bpe.py)
- chunks of text seen before are looked up (section 3): 1.4x tiktoken's speed then, 0.4x if not
- one very long word costs O(n log n), so a megabyte of "aaaa..." takes seconds, not days

    python bpe.py FILE --vocab_size 4096 --out tokenizer.json

References:
[1] Gage 1994, "A new algorithm for data compression", The C Users Journal 12(2)
[2] Sennrich, Haddow, Birch 2016, "Neural machine translation of rare words ...", arXiv 1508.07909
[3] Radford et al. 2019, GPT-2, section 2.2: bytes as the alphabet, words split before merging
[4] OpenAI's tiktoken, `cl100k_base` in tiktoken_ext/openai_public.py: the split pattern of GPT-4
"""

import argparse
import heapq
import json
import operator
import os
import re
import sys
from array import array
from collections import Counter
from functools import partial
from itertools import chain, islice, pairwise

import numpy as np
import regex

SPECIAL = "<|endoftext|>"  # written between documents; as part of a text it is ordinary text
MAX_TOKEN_BYTES = 1024  # GPT-4's longest token has 128 bytes. See `token_bytes` for why a bound
CACHE_SIZE = 1 << 19  # texts remembered while encoding, some 100 MB when full [entries]
CACHE_CHARS = 128  # longer chunks are rarely seen twice: not remembered [characters]
BLOCK = 1 << 14  # text is split this much at a time, to stay in the CPU's cache [characters]

# --- 1. Splitting text into words: merges never cross the border of a word ("pre-token") ----------

# GPT-4's pattern [4], one alternative a line. Without a split, "dog." "dog!" "dog?" would each
# become a token. A space belongs to the word after it: " dog", whose first letter is then free to
# be merged with it. Its alternatives cover every character, so the words joined are the text.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)"  # English contractions: 's 't 'll
    r"|[^\r\n\p{L}\p{N}]?+\p{L}+"  # letters, with the one space or sign before them
    r"|\p{N}{1,3}"  # numbers in groups of three digits at most
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*"  # punctuation and the line breaks after it
    r"|\s*[\r\n]|\s+(?!\S)|\s+"  # white space, leaving the last space to the next word
)
split_words = regex.compile(PATTERN).findall

# The pattern is slow (10 MB/s: Unicode classes, seven alternatives), so text is first cut into
# coarser chunks with a cheap one (60 MB/s), and the real one runs only on chunks that are new. Most
# cuts would change words: by the lookahead "a  b" splits differently from "a " and " b", and "!"
# takes the line breaks after it. As the pattern never looks behind, two cuts are safe:
#   before a space after a non-space: every alternative that can end in a non-space stops at a
#       space, and none looks beyond it (the lookahead only ever follows white space);
#   after a line break before a non-space: no alternative has a line break anywhere but in its
#       tail, and the white space that ends there is taken up to its last line break.
# A chunk is white space and non-spaces up to the next such cut; fewer cuts are as safe. `re` counts
# \x1c-\x1f as white space and `regex` does not: for it cuts are only rarer, as both sides must pass
# the stricter test.
split_chunks = re.compile(r"\s*\S+(?:[^\S ]\s*(?:(?<![\r\n])\S+)?)*|\s+").findall
find_cut = re.compile(r"(?<=\S)(?= )|(?<=[\r\n])(?=\S)").search


def blocks(text):
    """Yields `text` in pieces of about BLOCK characters, cut only where no word changes.

    >>> split_words("It's 2024,  isn't it?")
    ['It', "'s", ' ', '202', '4', ',', ' ', ' isn', "'t", ' it', '?']
    >>> split_chunks("It's 2024,  isn't it?")
    ["It's", ' 2024,', "  isn't", ' it?']
    """
    start = 0
    while len(text) - start > BLOCK and (cut := find_cut(text, start + BLOCK)):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:] if start else text


def count_words(documents, progress=None):
    """Returns {word: count} over all documents, holding one block of text at a time."""
    words, chunks, n_chars = Counter(), Counter(), 0

    def split_counted_chunks():  # each distinct chunk is split into its words only once
        for chunk, count in chunks.items():
            for word in split_words(chunk):
                words[word] += count
        chunks.clear()

    for document in documents:
        for block in blocks(document):
            chunks.update(split_chunks(block))
            n_chars += len(block)
            if len(chunks) > 1 << 20:  # bounds the memory (some 200 MB) on any size of corpus
                split_counted_chunks()
            if progress and n_chars >> 20 > (n_chars - len(block)) >> 20:
                progress(f"{n_chars / 1e6:.0f} million characters read")
    split_counted_chunks()
    return words


def utf8(text):
    """Returns the bytes of `text`; lone surrogates, which UTF-8 cannot express, are refused."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        bad = f"a lone surrogate U+{ord(text[error.start]):04X}, which UTF-8 cannot express"
        remedy = 'clean it with text.encode("utf-8", "replace").decode()'
        raise ValueError(f"text has {bad}; {remedy}") from None


# --- 2. Training: count pairs, merge the most frequent one, repeat --------------------------------


def learn_merges(word_counts, n_merges, progress=None):
    """Returns up to `n_merges` pairs (a, b) of ids, in the order in which they were merged.

    Recounting all pairs after each merge would cost merges x corpus. Here all distinct words lie
    end to end in one linked list of numpy arrays, and each pair knows the positions `where` it
    occurs, so that a merge costs a few array operations on those positions alone. A heap finds the
    best pair: highest count, then smallest (a, b), so that the order of documents never matters.

    Merging "ab" in "xaby" also ends a pair (x, a) and a pair (b, y), whose counts in the heap are
    then too high. They are not looked up: a pair gets all its occurrences when it is entered and
    only loses some later, so no count is ever too low, and it is enough to recount the pair on top
    of the heap and to push it back if it had lost some.

    >>> learn_merges({"aaab": 2, "ab": 3}, 3)  # ab: 5 against aa: 4; then a|a|ab is left
    [(97, 98), (97, 97), (257, 256)]
    """
    words = [utf8(word) for word in word_counts]
    # 0xFF never occurs in UTF-8: it keeps the words apart, and becomes -1, as do merged-away bytes.
    ids = np.frombuffer(b"\xff".join([b"", *words, b""]), np.uint8).astype(np.int64)
    ids[ids == 0xFF] = -1
    spans = [1] + [len(word) + 1 for word in words]
    weight = np.repeat(np.array([0, *word_counts.values()], np.int64), spans)
    after, before = np.arange(1, len(ids) + 1), np.arange(-1, len(ids) - 1)
    where, heap, merges, lengths = {}, [], [], [1] * 256

    def add_pairs(at):  # enter the pairs that start at positions `at`, grouped by an integer key
        keys = ids[at] << 32 | ids[after[at]]  # ordered like the tuples (a, b)
        order = np.argsort(keys, kind="stable")  # stable: positions stay in the order of the text
        at, keys = at[order], keys[order]
        starts = np.flatnonzero(np.diff(keys, prepend=-1))
        totals = np.add.reduceat(weight[at], starts).tolist() if len(at) else []
        spans = pairwise([*starts.tolist(), len(at)])
        for key, total, span in zip(keys[starts].tolist(), totals, spans, strict=True):
            where[key] = at[slice(*span)]
            heapq.heappush(heap, (-total, key))

    add_pairs(np.flatnonzero((ids[:-1] >= 0) & (ids[1:] >= 0)))
    while heap and len(merges) < n_merges:
        total, key = heapq.heappop(heap)
        a, b = key >> 32, key & 0xFFFFFFFF
        at = where.pop(key)
        if lengths[a] + lengths[b] > MAX_TOKEN_BYTES:
            continue
        at = at[(ids[at] == a) & (ids[after[at]] == b)]
        count = int(weight[at].sum())
        if count != -total:
            if count:
                where[key] = at
                heapq.heappush(heap, (-count, key))
            continue
        if a == b:  # "aaaa": at 0, 1, 2, merged at 0 and 2, every second one of a run
            index = np.arange(len(at))
            in_run = np.append(False, after[at[:-1]] == at[1:])
            at = at[(index - np.maximum.accumulate(np.where(in_run, 0, index))) % 2 == 0]
        new_id = 256 + len(merges)
        merges.append((a, b))
        lengths.append(lengths[a] + lengths[b])
        second = after[at]
        ids[at], ids[second] = new_id, -1
        after[at] = after[second]
        before[after[at]] = at
        left = before[at]  # in "abab" (ab, ab) is on both sides: it counts once, on the right
        left = left[(ids[left] >= 0) & (ids[left] != new_id)]
        add_pairs(np.concatenate([left, at[ids[after[at]] >= 0]]))
        if progress and len(merges) % 256 == 0:
            progress(f"{len(merges)} of {n_merges} pairs merged")
    return merges


# --- 3. Encoding: replay the merges, and never do it twice for the same chunk ---------------------


def merge_word(ids, ranks):
    """Returns the ids of one word, given as its bytes; `ranks` is {(a, b): id of the merged pair}.

    The earliest merge goes first, wherever it is: taking pairs from left to right instead would
    give other ids than training saw. An id of `ranks` is also its rank. O(n^2), but n is small.

    >>> merge_word(b"abab", {(97, 98): 256, (256, 256): 257})
    [257]
    """
    ids, never = list(ids), 1 << 32
    if len(ids) > 200:
        return merge_long_word(ids, ranks)
    found = [ranks.get(pair, never) for pair in pairwise(ids)]
    while found and (best := min(found)) != never:
        i = found.index(best)  # the leftmost
        ids[i : i + 2] = [best]
        del found[i]
        if i < len(found):
            found[i] = ranks.get((best, ids[i + 1]), never)
        if i:
            found[i - 1] = ranks.get((ids[i - 1], best), never)
    return ids


def merge_long_word(ids, ranks):
    """Returns the same in O(n log n): a heap of (rank, position) over a linked list.

    Each of at most n - 1 merges takes one entry off the heap and puts two on it at most.
    """
    after, before = list(range(1, len(ids) + 2)), list(range(-1, len(ids)))
    heap = [(ranks[pair], i) for i, pair in enumerate(pairwise(ids)) if pair in ranks]
    heapq.heapify(heap)
    ids.append(-1)  # stands for "nothing" on both sides, as ids[-1] is the last one; so do holes
    while heap:
        new_id, i = heapq.heappop(heap)
        j = after[i]
        if ranks.get((ids[i], ids[j])) != new_id:
            continue  # out of date: another merge took one of the two
        ids[i], ids[j] = new_id, -1
        after[i] = after[j]
        before[after[i]] = i
        for left, right in ((before[i], i), (i, after[i])):
            rank = ranks.get((ids[left], ids[right]))
            if rank is not None:
                heapq.heappush(heap, (rank, left))
    return [i for i in ids if i >= 0]


class PackedIds(dict):
    """{text: its ids as raw bytes}, filled in when asked for text not seen before.

    Raw uint16 or uint32 because joining bytes is the fastest way to string ids together. Keys are
    chunks and also the words of new chunks (a word, alone, splits into itself), so a new chunk is
    mostly old words. Text repeats itself: four chunks in five are hits even in unseen text.
    """

    def __init__(self, ranks, typecode):
        self.ranks, self.typecode = ranks, typecode

    def __missing__(self, text):
        words = split_words(text)
        if len(words) > 1:
            packed = b"".join(map(self.__getitem__, words))
        else:
            packed = array(self.typecode, merge_word(utf8(text), self.ranks)).tobytes()
        if len(text) <= CACHE_CHARS:
            if len(self) >= CACHE_SIZE:
                self.clear()  # simpler than counting uses, and refilled within a second
            self[text] = packed
        return packed


# --- 4. The tokenizer -----------------------------------------------------------------------------


def token_bytes(merges):
    """Returns the bytes of ids 0, 1, 2, ...; refuses merges that no training could have made.

    Merges may come from a file of a stranger. Each can double the length of a token, so that forty
    of them would ask for a terabyte: hence MAX_TOKEN_BYTES, which training keeps to as well. Two
    tokens of the same bytes never come out of training either: encoding is deterministic.
    """
    ids = {bytes([i]): i for i in range(256)}
    tokens = list(ids)
    for i, pair in enumerate(merges):
        try:
            a, b = map(operator.index, pair)
        except (TypeError, ValueError):
            raise ValueError(f"merge {i} is {pair!r:.40}, not a pair of ids") from None
        if not (0 <= a < len(tokens) and 0 <= b < len(tokens)):
            raise ValueError(f"merge {i} is ({a}, {b}), but only ids 0..{255 + i} exist by then")
        token = tokens[a] + tokens[b]
        if len(token) > MAX_TOKEN_BYTES:
            raise ValueError(f"merge {i} makes a token longer than {MAX_TOKEN_BYTES} bytes")
        if ids.setdefault(token, 256 + i) != 256 + i:
            raise ValueError(f"merge {i} is ({a}, {b}), a duplicate of token {ids[token]}")
        tokens.append(token)
    return tokens


class Tokenizer:
    """Ids 0..255 are the bytes, 256 + i is merge i, and the last id, `eot`, is <|endoftext|>.

    >>> tok = Tokenizer.train(["low lower lowest"], vocab_size=260)
    >>> [tok.decode([i]) for i in tok.encode("lowest")]
    ['low', 'e', 's', 't']
    """

    def __init__(self, merges):
        tokens = token_bytes(merges)
        self.merges = [(int(a), int(b)) for a, b in merges]
        self.eot = len(tokens)  # Tokenizer([]) is the byte tokenizer: 257 ids
        self.vocab_size = self.eot + 1
        self.start = [self.eot]  # what stands before a text
        self._tokens = np.array([*tokens, SPECIAL.encode()], dtype=object)
        self.byte_lengths = np.array([len(token) for token in self._tokens])
        self._typecode = "H" if self.vocab_size <= 1 << 16 else "I"
        ranks = {pair: 256 + i for i, pair in enumerate(self.merges)}
        self._packed = PackedIds(ranks, self._typecode)

    def __reduce__(self):  # pickled (for a worker process, say) without its cache
        return Tokenizer, (self.merges,)

    @classmethod
    def train(cls, documents, vocab_size, progress=None):
        """Returns a tokenizer of at most `vocab_size` ids, fewer if the text runs out of pairs.

        documents: any iterable of str, read once; progress: called with a line of text.
        """
        if vocab_size < 257:
            remedy = f"the 256 bytes and {SPECIAL}; use 257 or more"
            raise ValueError(f"vocab_size={vocab_size} is too small for {remedy}")
        word_counts = count_words(check_documents(documents), progress)
        return cls(learn_merges(word_counts, vocab_size - 257, progress))

    def encode(self, text, allow_special=False):
        """Returns the ids of `text`, as a list; <|endoftext|> in it is text unless allowed."""
        if allow_special and SPECIAL in text:
            first, *rest = map(self.encode, text.split(SPECIAL))
            return first + [i for ids in rest for i in (self.eot, *ids)]
        return memoryview(self._pack(text)).cast(self._typecode).tolist()

    def encode_array(self, documents):
        """Returns one flat array of uint16 (uint32 above 65,536 ids): each document, then eot."""
        eot = array(self._typecode, [self.eot]).tobytes()
        packed = bytearray().join(self._pack(text) + eot for text in check_documents(documents))
        return np.frombuffer(packed, self._typecode)

    def _pack(self, text):
        ids_of = self._packed.__getitem__  # map and join run in C: no Python code on a hit
        return b"".join([b"".join(map(ids_of, split_chunks(block))) for block in blocks(text)])

    def decode(self, ids):
        """Returns the text; bytes that are no UTF-8, as in half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids):
        """Returns the exact bytes, what to use for the pieces of a character that was cut."""
        ids = np.asarray(ids if hasattr(ids, "__array__") else list(ids))
        if not ids.size:
            return b""
        if ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= self.vocab_size:
            raise ValueError(f"ids must be integers from 0 to {self.vocab_size - 1}")
        return b"".join(self._tokens[ids.ravel()])

    def state(self):
        """Returns plain types, to embed in a checkpoint."""
        return {"pattern": PATTERN, "merges": [list(pair) for pair in self.merges]}

    @classmethod
    def from_state(cls, state):
        if isinstance(state, dict) and "tokenizer.json" in state:
            files = {name: state[name] for name in HF_FILES}
            return ForeignTokenizer(files, state["vocab_size"], state["eot"])
        if not isinstance(state, dict) or not isinstance(state.get("merges"), list):
            raise ValueError("no list of merges in it")
        if state.get("pattern") != PATTERN:
            raise ValueError("it splits words by another pattern than this bpe.py")
        return cls(state["merges"])

    def save(self, path):
        write_text(path, json.dumps(self.state()))

    @classmethod
    def load(cls, path):
        try:
            with open(path, encoding="utf-8") as file:
                return cls.from_state(json.load(file))
        except (OSError, ValueError, RecursionError) as error:
            remedy = "train it again with: python bpe.py FILE --out PATH"
            raise ValueError(f"cannot load a tokenizer from {path}: {error}; {remedy}") from None

    def to_tiktoken(self):
        """Returns the same tokenizer as a tiktoken.Encoding (it merges by bytes, not by pairs).

        Its `encode_ordinary` is our `encode`; with allowed_special="all", `allow_special`.
        """
        try:
            import tiktoken
        except ImportError:
            raise ImportError("to_tiktoken needs tiktoken: pip install tiktoken") from None
        ranks = {token: i for i, token in enumerate(self._tokens[: self.eot])}
        return tiktoken.Encoding(
            "lamoe", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={SPECIAL: self.eot}
        )

    def save_hf(self, folder):
        """Writes the two files by which transformers.AutoTokenizer gives the same ids."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL,
            "eos_token": SPECIAL,
            "add_bos_token": False,
            "split_special_tokens": True,  # <|endoftext|> inside a text is text, as in `encode`
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        }
        for name, content in zip(HF_FILES, (self._hf_json(), config), strict=True):
            write_text(os.path.join(folder, name), json.dumps(content))

    def _hf_json(self):
        """Returns the content of tokenizer.json: our words and merges, in visible letters."""
        names = ["".join(VISIBLE[byte] for byte in token) for token in self._tokens[: self.eot]]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        byte_level["use_regex"] = False  # the words are split already
        split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated"}
        split["invert"] = False
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        return {
            "version": "1.0",
            "added_tokens": [{"id": self.eot, "content": SPECIAL, "special": True, **flags}],
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "vocab": {name: i for i, name in enumerate(names)},
                "merges": [f"{names[a]} {names[b]}" for a, b in self.merges],
            },
        }


def check_documents(documents):
    """Returns `documents`, unless it is one str, which would be read as documents of a letter."""
    if isinstance(documents, str):
        raise TypeError("documents is a single str; pass a list: [text]")
    return documents


# --- 5. Tokenizers of others: a tokenizer.json behind the same interface --------------------------

# GPT-2's alphabet, in which tokenizer.json writes bytes: those that print stand for themselves,
# the others are moved up to the letters from 256 on.
_prints = {*range(33, 127), *range(161, 173), *range(174, 256)}
_moved = {byte: 256 + n for n, byte in enumerate(sorted({*range(256)} - _prints))}
VISIBLE = [chr(_moved.get(byte, byte)) for byte in range(256)]
BYTE_OF = {letter: byte for byte, letter in enumerate(VISIBLE)}
HF_FILES = ("tokenizer.json", "tokenizer_config.json")


class ForeignTokenizer:
    """A tokenizer.json through the `tokenizers` package, used like Tokenizer.

    Two alphabets are known: bytes as visible letters (GPT-2, Llama 3, Qwen) and sentencepiece's
    (Llama 2, Mixtral), where U+2581 is a space and <0x0A> a byte. Its end-of-text token, whatever
    its name, stands for <|endoftext|> here: it separates documents, and counts as those 13 bytes.
    """

    def __init__(self, files, vocab_size, eot=None):
        """files: {name: text} of HF_FILES; eot: an id, in case that they name no eos_token.

        vocab_size is the model's, often rounded up.
        """
        try:
            import tokenizers
        except ImportError:
            raise ValueError("this model has its own tokenizer: pip install tokenizers") from None
        self.files, self.vocab_size = files, vocab_size
        try:
            content, config = (json.loads(files[name]) for name in HF_FILES)
            self._theirs = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
            self._theirs.no_truncation()
            self._theirs.no_padding()
            self._tokens = self._token_bytes(content)
            self.eot, self.start = self._ends(config, eot)
        except Exception as error:  # the package raises bare Exceptions
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ValueError(f"tokenizer.json can't be used ({reason})") from None
        # Sentencepiece begins a text with a space that isn't there. Decoded in pieces it must
        # stay, so the end-of-text token counts a byte less: the bytes of a document are exact.
        extra = len(self.decode_bytes(self.encode("a"))) - 1
        self._tokens[self.eot] = SPECIAL.encode()
        self._tokens[[i for i in self.start if i != self.eot]] = b""
        self.byte_lengths = np.array([len(token) for token in self._tokens])
        self.byte_lengths[self.eot] -= extra

    def _token_bytes(self, content):
        decoder = content.get("decoder") or {}
        types = {part.get("type") for part in [decoder, *decoder.get("decoders", [])]}
        if not types & {"ByteLevel", "ByteFallback", "Metaspace"}:
            raise ValueError(f"decoder {types} is neither byte-level nor sentencepiece")
        added = {token["id"] for token in content.get("added_tokens", [])}
        tokens = np.full(self.vocab_size, b"", dtype=object)
        for token, i in self._theirs.get_vocab(with_added_tokens=True).items():
            if i >= self.vocab_size:
                raise ValueError(f"token {i} is outside the model's {self.vocab_size}")
            if "ByteLevel" in types and i not in added:
                tokens[i] = bytes(BYTE_OF[letter] for letter in token)
            elif (byte := re.fullmatch("<0x([0-9A-F]{2})>", token)) and i not in added:
                tokens[i] = bytes.fromhex(byte[1])
            else:
                tokens[i] = token.replace("\u2581", " ").encode()
        return tokens

    def _ends(self, config, eot):
        """Returns the end-of-text id and the ids that stand before a text."""
        names = (config.get("eos_token"), config.get("bos_token"))
        names = (name["content"] if isinstance(name, dict) else name for name in names)
        eos, bos = (name and self._theirs.token_to_id(name) for name in names)
        eot = eot if eos is None else eos
        if type(eot) is not int or not 0 <= eot < self.vocab_size:
            raise ValueError("no end-of-text token: eos_token in tokenizer_config.json names none")
        start = [i for i in self._theirs.encode("").ids if i != eot or i == bos]
        if type(config.get("add_bos_token")) is bool:
            start = [bos] if config["add_bos_token"] and bos is not None else []
        return eot, start

    def encode(self, text, allow_special=False):
        """Returns the ids of `text`; special tokens in it are text unless allowed."""
        utf8(text)  # refuses what the package would refuse in worse words
        self._theirs.encode_special_tokens = not allow_special
        return self._theirs.encode(text, add_special_tokens=False).ids

    def encode_array(self, documents):
        """Returns one flat array of uint16 or uint32: each document as encoded, then eot."""
        dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        whole = ((*self.start, *self.encode(text), self.eot) for text in check_documents(documents))
        return np.fromiter(chain.from_iterable(whole), dtype)

    decode, decode_bytes = Tokenizer.decode, Tokenizer.decode_bytes

    def state(self):
        """Returns plain types, to embed in a checkpoint."""
        return {**self.files, "vocab_size": self.vocab_size, "eot": self.eot}

    def save_hf(self, folder):
        """Writes its files as they came."""
        for name, text in self.files.items():
            write_text(os.path.join(folder, name), text)


def load_hf(folder, vocab_size, eot=None):
    """Returns the tokenizer in a Hugging Face folder, None if there is none.

    A Tokenizer where the file is one that Tokenizer.save_hf writes, else a ForeignTokenizer.
    """
    there = [name for name in HF_FILES if os.path.exists(os.path.join(folder, name))]
    if "tokenizer.json" not in there:
        return None
    files = dict.fromkeys(HF_FILES, "{}")
    try:
        for name in there:
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                files[name] = file.read()
        ours = own_tokenizer(files["tokenizer.json"])
        is_ours = ours and ours.vocab_size == vocab_size
        return ours if is_ours else ForeignTokenizer(files, vocab_size, eot)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def own_tokenizer(text):
    """Returns the Tokenizer that wrote this tokenizer.json, or None."""
    try:
        content = json.loads(text)
        ids, merges = content["model"]["vocab"], content["model"]["merges"]
        ours = Tokenizer([[ids[name] for name in pair.split()] for pair in merges])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # another file, or none at all
    return ours if ours._hf_json() == content else None


def write_text(path, text):
    """All or nothing: the file gets its name once it is whole and on the disk."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    if os.name == "posix":  # the folder's entry, too: a power cut could undo the rename
        folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


# --- 6. Command line ------------------------------------------------------------------------------


def read_documents(path):
    """Yields the documents of a UTF-8 file, which lines that are exactly <|endoftext|> separate.

    A document beyond a megabyte comes in pieces, cut where no word changes (section 1).
    """
    parts, size, at_line_start = [], 0, True
    with open(path, encoding="utf-8", newline="\n") as file:
        try:
            while line := file.readline(1 << 20):
                if at_line_start and line.rstrip("\r\n") == SPECIAL:
                    yield "".join(parts)
                    parts, size = [], 0
                else:
                    parts.append(line)
                    size += len(line)
                at_line_start = line.endswith("\n")
                if size > 1 << 20:
                    *whole, rest = blocks("".join(parts))
                    yield from whole
                    parts, size = [rest], len(rest)
        except UnicodeDecodeError as error:  # error.object: the bytes read last
            offset = file.buffer.tell() - len(error.object) + error.start
            remedy = "convert it with: iconv -f latin1 -t utf8"
            raise ValueError(f"{path} is not UTF-8 at byte {offset}; {remedy}") from None
    yield "".join(parts)


def fail(message):
    message = " ".join(str(message).split())  # one line, whatever the arguments hold
    print(f"bpe.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def main():
    parser = argparse.ArgumentParser(description="Train a byte-level BPE tokenizer on a text file.")
    parser.add_argument("file", metavar="FILE", help="UTF-8 text; <|endoftext|> lines split it")
    parser.add_argument("--vocab_size", type=int, default=4096, help="ids in all (default 4096)")
    parser.add_argument("--out", metavar="PATH", help="where to save the tokenizer (JSON)")
    parser.error = fail  # one line, instead of the usage and then the error
    args = parser.parse_args()
    folder = os.path.dirname(args.out or "") or "."
    if args.out and (os.path.isdir(args.out) or not os.access(folder, os.W_OK)):
        fail(f"--out {args.out}: cannot write there; name a file in an existing folder of yours")
    try:
        documents, show = read_documents(args.file), partial(print, end="   \r", flush=True)
        tok = Tokenizer.train(documents, args.vocab_size, progress=show)
        ids = tok.encode_array(islice(read_documents(args.file), 64))  # 64 documents or blocks
        n_bytes, n_ids = tok.byte_lengths[ids[ids != tok.eot]].sum(), np.sum(ids != tok.eot)
        if not n_ids:
            fail(f"{args.file} is empty; give a file with some text")
        if args.out:
            tok.save(args.out)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}; give the path of a UTF-8 text file")
    except ValueError as error:
        fail(error)
    few = "" if tok.vocab_size == args.vocab_size else ": the text has no more pairs to merge"
    print(f"{f'{tok.vocab_size} ids{few}':40}")
    sentence = "Once, upon a time, 2 small dragons weren't asleep."  # ASCII, for any console
    print("|".join(tok.decode([i]) for i in tok.encode(sentence)))
    print(f"{n_bytes / n_ids:.2f} bytes per token at the start of {args.file}")
    if args.out:
        print(f"saved as {args.out}")


if __name__ == "__main__":
    main()
