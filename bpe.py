"""A byte-level BPE tokenizer from scratch: train, encode, decode, save, in pure Python.

Byte-pair encoding (BPE) [1, 2] starts with 256 ids, one per byte [3]. Again and again, it gives the
most frequent pair of neighbours an id of its own. The list of these merges *is* the tokenizer: to
encode new text, replay the merges in the order in which they were learned. Notable features:
- section 1 is the whole algorithm; the rest gives the same results, fast, and streams its documents
- any str survives encode and decode exactly: there is no unknown token and no normalisation
- merges equal rustbpe's, ids equal tiktoken's and Hugging Face's (tests/test_bpe.py)

References:
[1] Gage 1994, "A new algorithm for data compression", The C Users Journal 12(2)
[2] Sennrich, Haddow, Birch 2016, "Neural machine translation of rare words ...", arXiv 1508.07909
[3] Radford et al. 2019, GPT-2, section 2.2: bytes as the alphabet, words split before merging
[4] OpenAI's tiktoken, `cl100k_base` in tiktoken_ext/openai_public.py: the split pattern of GPT-4
"""

import argparse
import heapq
import json
import os
import re
import sys
from array import array
from collections import Counter
from functools import partial
from itertools import chain, islice, pairwise, repeat

import numpy as np
import regex

SPECIAL = "<|endoftext|>"  # written between documents; as part of a text it is ordinary text
MAX_TOKEN_BYTES = 1024  # longer tokens are not made; GPT-4's longest one has 128
BLOCK = 1 << 14  # text is read this much at a time, to stay in the CPU's cache [characters]
CACHE_SIZE = 1 << 19  # texts remembered while encoding, some 100 MB when full [entries]

# --- 1. Byte-pair encoding, plainly: count pairs, merge the most frequent one, repeat -------------


def learn_plainly(texts, n_merges):
    """Returns up to `n_merges` pairs (a, b) in the order of merging; merge i makes the id 256 + i.

    A list of ids is a str here, of chr(id), as latin-1 does it for bytes: to merge a pair is to
    replace it, from the left. Of equally frequent pairs the smallest wins, in any order of texts.

    >>> learn_plainly([b"banana", b"bandana"], 3)  # a|n, b|an, an|a
    [(97, 110), (98, 256), (256, 97)]
    """
    texts, merges = [text.decode("latin-1") for text in texts], []
    while len(merges) < n_merges:
        counts = Counter(pair for text in texts for pair in pairwise(text))
        if not counts:
            break
        a, b = min(counts, key=lambda pair: (-counts[pair], pair))
        texts = [text.replace(a + b, chr(256 + len(merges))) for text in texts]
        merges.append((ord(a), ord(b)))
    return merges


def encode_plainly(text, merges):
    """Returns the ids of a text, given as bytes: the merges replayed in their order.

    Why in order? Training did exactly these replacements, in this order, to its own texts: a new
    text gets the ids that it would have as one of them, and these are what a model learns from. If
    "bc" was merged before "ab", training made "abc" into a|bc; to merge from the left gives ab|c.

    >>> encode_plainly(b"bananas", [(97, 110), (98, 256), (256, 97)])  # ban|ana|s
    [257, 258, 115]
    """
    text = text.decode("latin-1")
    for i, (a, b) in enumerate(merges):
        if chr(a) in text and chr(b) in text:  # most are not, and this is the faster search
            text = text.replace(chr(a) + chr(b), chr(256 + i))
    return [ord(character) for character in text]


# --- 2. Words: no merge crosses the border of a word ("pre-token") --------------------------------

# Otherwise "dog." "dog!" "dog?" would each become a token. So each word is a text of its own for
# section 1. This is GPT-4's pattern [4], an alternative per line; it covers every character.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)"  # English contractions: 's 't 'll
    r"|[^\r\n\p{L}\p{N}]?+\p{L}+"  # letters, and a space or sign before them; ?+ ++ never backtrack
    r"|\p{N}{1,3}"  # numbers in groups of three digits at most
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*"  # punctuation and the line breaks after it
    r"|\s*[\r\n]|\s+(?!\S)|\s+"  # white space, leaving the last space to the next word
)
UNICODE = 14 + len(regex.findall(r"\p{L}", "\U00011f04\u1c89\ua7ce\u208f"))  # letters new in 15-18

# `re` finds the same, thrice as fast, if told which characters are letters. It looks them up in a
# table that ends at U+FFFF: text with an emoji is for `regex`. The commonest words stand first.
low = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x10000)]))
runs = (regex.findall(kind, low) for kind in (r"\p{L}+", r"\p{N}+", r"\s+"))
L, N, S = ("".join(f"{run[0]}-{run[-1]}" for run in found) for found in runs)  # a-z...
find_low_words = re.compile(
    rf" [{L}]+|[{L}]+|'(?i:[sdmt]|ll|ve|re)|[^\r\n{L}{N}][{L}]+|[{N}]{{1,3}}"
    rf"| ?[^{S}{L}{N}]+[\r\n]*|[{S}]*[\r\n]|[{S}]+(?![^{S}])|[{S}]+"
).findall


def split_words(text):
    is_low = text.isascii() or not re.search("[\U00010000-\U0010ffff]", text)
    return find_low_words(text) if is_low else regex.findall(PATTERN, text)


# Blocks, and chunks (a few words, which texts repeat), are cut where no word goes on: between a
# non-space and a space (in a word only white space stands before a space), and between a line break
# and a non-space (in a word only white space follows one). Nor does the pattern look beyond a cut:
# its lookahead only follows spaces without line breaks. `re` cuts less: \x1c-\x1f are space to it.
split_chunks = re.compile(r"\s*\S+(?:[^\S ]\s*(?:(?<![\r\n])\S+)?)*|\s+").findall
find_cut = re.compile(r"(?<=\S)(?= )|(?<=[\r\n])(?=\S)").search


def blocks(text):
    """Yields `text` in pieces of about BLOCK characters, cut only where no word changes.

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
    words, n_chars = Counter(), 0
    for block in chain.from_iterable(map(blocks, documents)):
        words.update(split_words(block))
        n_chars += len(block)
        if progress and n_chars >> 20 > (n_chars - len(block)) >> 20:
            progress(f"{n_chars / 1e6:.0f} million characters read")
    return words


def utf8(text):
    """Returns the bytes of `text`; refuses lone surrogates, which UTF-8 cannot express."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        remedy = 'clean the text with text.encode("utf-8", "replace").decode()'
        raise ValueError(f"a lone surrogate U+{ord(text[error.start]):04X}; {remedy}") from None


# --- 3. Training fast: the merges of learn_plainly, without counting everything anew --------------


def learn_merges(word_counts, n_merges, progress=None):
    """Returns what learn_plainly returns for these words, each as often as it is counted.

    All distinct words lie end to end in a linked list of numpy arrays. Each pair in the heap has
    the positions where it occurs, so a merge is a few array operations on these. Merging "ab" in
    "xaby" also takes away an "xa" and a "by": so the pair on top is counted again, and pushed back
    if it lost some. None gains any: a merge makes only pairs with its new id, and enters them all.

    >>> learn_merges({"aaab": 2, "ab": 3}, 3)  # ab: 5 against aa: 4; then a|a|ab is left
    [(97, 98), (97, 97), (257, 256)]
    """
    words = [utf8(word) for word in word_counts]
    # 0xFF never occurs in UTF-8: it keeps the words apart, and becomes -1, as do merged-away bytes.
    ids = np.frombuffer(b"\xff".join([b"", *words, b""]), np.uint8).astype(np.int32)
    ids[ids == 0xFF] = -1
    weight = np.repeat([0, *word_counts.values()], [1, *(len(word) + 1 for word in words)])
    after, before = (np.arange(i, len(ids) + i, dtype=np.int32) for i in (1, -1))  # neighbours
    heap, merges, lengths = [], [], [1] * 256  # heap of (-count, pair as a number, its positions)

    def add_pairs(at):  # enter the pairs that start at positions `at`, grouped by an integer key
        keys = ids[at].astype(np.int64) << 32 | ids[after[at]]  # ordered like the tuples (a, b)
        order = np.argsort(keys, kind="stable")  # stable: positions stay in the order of the text
        at, keys = at[order], keys[order]
        starts = np.flatnonzero(np.diff(keys, prepend=-1))
        totals = np.add.reduceat(weight[at], starts).tolist() if len(at) else []
        spans = pairwise([*starts.tolist(), len(at)])
        for key, total, span in zip(keys[starts].tolist(), totals, spans, strict=True):
            heapq.heappush(heap, (-total, key, at[slice(*span)]))

    add_pairs(np.flatnonzero((ids[:-1] >= 0) & (ids[1:] >= 0)))  # all pairs of bytes
    while heap and len(merges) < n_merges:
        total, key, at = heapq.heappop(heap)
        a, b = key >> 32, key & 0xFFFFFFFF
        if lengths[a] + lengths[b] > MAX_TOKEN_BYTES:
            continue
        at = at[(ids[at] == a) & (ids[after[at]] == b)]  # where the pair still is
        count = int(weight[at].sum())
        if count != -total:
            if count:
                heapq.heappush(heap, (-count, key, at))
            continue
        if a == b:  # "aaaa": at 0, 1, 2, merged at 0 and 2, every second one of a run
            index = np.arange(len(at))
            in_run = np.append(False, after[at[:-1]] == at[1:])
            at = at[(index - np.maximum.accumulate(np.where(in_run, 0, index))) % 2 == 0]
        new_id = 256 + len(merges)
        merges.append((a, b))
        lengths.append(lengths[a] + lengths[b])
        ids[at], ids[after[at]] = new_id, -1  # b leaves the list
        after[at] = after[after[at]]
        before[after[at]] = at
        left = before[at]  # in "abab" (ab, ab) is on both sides: it counts once, on the right
        left = left[(ids[left] >= 0) & (ids[left] != new_id)]
        add_pairs(np.concatenate([left, at[ids[after[at]] >= 0]]))
        if progress and len(merges) % 256 == 0:
            progress(f"{len(merges)} of {n_merges} pairs merged")
    return merges


# --- 4. Encoding fast: the ids of encode_plainly, and never twice for the same chunk --------------


def merge_word(word, ranks):
    """Returns the ids of a word's bytes; `ranks` is {(a, b): id of the merged pair}, in order.

    It merges the pair with the smallest id, the leftmost first, until there is none. That is the
    replay without merges that don't occur: a merge only makes pairs with a larger id than its own.

    >>> merge_word(b"abab", {(97, 98): 256, (256, 256): 257})
    [257]
    """
    if not 0 < len(word) <= 400:  # what follows takes O(n^2)
        return encode_plainly(word, ranks)
    ids, get, never = [*word, -1], ranks.get, 1 << 32  # -1: an end that merges with nothing
    found = list(map(get, pairwise(ids), repeat(never)))
    while (best := min(found)) != never:
        i = found.index(best)
        ids[i] = best
        del ids[i + 1], found[i]
        found[i] = get((best, ids[i + 1]), never)
        if i:
            found[i - 1] = get((ids[i - 1], best), never)
    return ids[:-1]


class PackedIds(dict):
    """{text: its ids as raw bytes, which are joined fastest}; what is not there yet is made."""

    def __init__(self, split, make):
        self.split, self.make = split, make

    def of(self, text):  # map and join run in C: no Python code for what is known
        return b"".join(map(self.__getitem__, self.split(text)))

    def __missing__(self, text):
        packed = self.make(text)
        if len(text) <= 128:  # a longer one is rarely seen twice
            if len(self) >= CACHE_SIZE:
                self.clear()  # simpler than counting uses, and refilled within a second
            self[text] = packed
        return packed


# --- 5. The tokenizer -----------------------------------------------------------------------------


class Tokenizer:
    """Ids 0..255 are the bytes, 256 + i is merge i, and the last id, `eot`, is <|endoftext|>.

    >>> tok = Tokenizer.train(["low lower lowest"], vocab_size=260)
    >>> [tok.decode([i]) for i in tok.encode("lowest")]
    ['low', 'e', 's', 't']
    """

    def __init__(self, merges):
        """Refuses merges that no training makes: without bounds, forty could ask for a terabyte."""
        id_of = {bytes([i]): i for i in range(256)}
        tokens = list(id_of)
        for i, pair in enumerate(merges):
            if not isinstance(pair, (list, tuple)) or [type(part) for part in pair] != [int, int]:
                raise ValueError(f"merge {i} is {pair!r:.40}, not a pair of ids")
            if not 0 <= min(pair) <= max(pair) < len(tokens):
                raise ValueError(f"merge {i} is {pair}, but only ids 0..{255 + i} exist by then")
            token = tokens[pair[0]] + tokens[pair[1]]
            if len(token) > MAX_TOKEN_BYTES:
                raise ValueError(f"merge {i} makes a token longer than {MAX_TOKEN_BYTES} bytes")
            if id_of.setdefault(token, 256 + i) != 256 + i:
                raise ValueError(f"merge {i} is {pair}, a duplicate of token {id_of[token]}")
            tokens.append(token)
        self.merges = [tuple(pair) for pair in merges]
        self.eot, self.vocab_size = len(tokens), len(tokens) + 1  # Tokenizer([]): bytes, 257 ids
        self.start = self.stops = [self.eot]  # what stands before a text, and what ends one
        self.tokens = np.array([*tokens, SPECIAL.encode()], dtype=object)
        self.byte_lengths = np.array([len(token) for token in self.tokens])
        self._typecode = "H" if self.vocab_size <= 1 << 16 else "I"
        self._ranks = {pair: 256 + i for i, pair in enumerate(self.merges)}
        self._words = PackedIds(split_words, self._pack_word)
        self._chunks, self._is_familiar = PackedIds(split_chunks, self._words.of), False

    @classmethod
    def train(cls, documents, vocab_size, progress=None):
        """Returns a tokenizer of at most `vocab_size` ids; documents: an iterable, read once."""
        if isinstance(documents, str):
            raise TypeError("documents is a single str; pass a list: [text]")
        if vocab_size < 257:
            raise ValueError(f"vocab_size={vocab_size} is too small for all bytes; use 257 or more")
        return cls(learn_merges(count_words(documents, progress), vocab_size - 257, progress))

    def encode(self, text, allow_special=False):
        """Returns the ids of `text`, as a list; <|endoftext|> in it is text unless allowed."""
        if allow_special and SPECIAL in text:
            first, *rest = map(self.encode, text.split(SPECIAL))
            return first + [i for ids in rest for i in (self.eot, *ids)]
        return memoryview(self._pack(text)).cast(self._typecode).tolist()

    def encode_array(self, documents):
        """Returns one flat array of uint16 (uint32 above 65,536 ids): each document, then eot."""
        if isinstance(documents, str):
            raise TypeError("documents is a single str; pass a list: [text]")
        eot = array(self._typecode, [self.eot]).tobytes()
        packed = bytearray().join(self._pack(text) + eot for text in documents)
        return np.frombuffer(packed, self._typecode)

    def _pack(self, text):
        packed = []
        for block in blocks(text):  # by words, then, where few are new, by chunks: half the time
            n_words = len(self._words)
            packed.append((self._chunks if self._is_familiar else self._words).of(block))
            self._is_familiar = 48 * (len(self._words) - n_words) < len(block)
        return b"".join(packed)

    def _pack_word(self, word):
        return array(self._typecode, merge_word(utf8(word), self._ranks)).tobytes()

    def decode(self, ids):
        """Returns the text; bytes that are no UTF-8, as in half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids):
        """Returns the exact bytes, what to use for the pieces of a character that was cut."""
        n, ids = self.vocab_size, np.asarray(ids if hasattr(ids, "__array__") else list(ids))
        if ids.size and not (ids.dtype.kind in "iu" and 0 <= ids.min() <= ids.max() < n):
            raise ValueError(f"ids must be integers from 0 to {n - 1}")
        return b"".join(self.tokens[ids.ravel().astype(int)])

    def state(self):
        """Returns plain types, to embed in a checkpoint."""
        return {"pattern": PATTERN, "unicode": UNICODE, "merges": [[*p] for p in self.merges]}

    @classmethod
    def from_state(cls, state):
        if not isinstance(state, dict) or not isinstance(state.get("merges"), list):
            raise ValueError("no list of merges in it")
        if state.get("pattern") != PATTERN:
            raise ValueError("it splits words by another pattern than this bpe.py")
        return cls(state["merges"])

    def save(self, path):
        """Writes the state as JSON; the file gets its name only when all of it is on the disk."""
        temporary = f"{path}.{os.getpid()}.tmp"
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump(self.state(), file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            if os.path.exists(temporary):
                os.remove(temporary)

    @classmethod
    def load(cls, path):
        try:
            with open(path, encoding="utf-8") as file:
                return cls.from_state(json.load(file))
        except (OSError, ValueError, RecursionError) as error:
            remedy = "train it again with: python bpe.py FILE --out PATH"
            raise ValueError(f"cannot load a tokenizer from {path}: {error}; {remedy}") from None


# --- 6. Command line ------------------------------------------------------------------------------


def read_documents(path):
    """Yields the documents of a file, between lines that are <|endoftext|>; huge ones in pieces."""
    separator, rest = re.compile(rf"^{re.escape(SPECIAL)}(?:\n|\Z)", re.M), ""
    with open(path, encoding="utf-8-sig") as file:  # line ends of any system become \n
        try:
            while lines := file.readlines(1 << 20):
                *documents, rest = separator.split(rest + "".join(lines))
                if "\0" in rest:
                    raise ValueError(f"{path} has zero bytes: if text, then iconv -f utf-16 ...")
                yield from documents
                if len(rest) > 1 << 20:
                    *pieces, rest = blocks(rest)
                    yield from pieces
        except UnicodeDecodeError as error:  # error.object: the bytes read last
            offset = file.buffer.tell() - len(error.object) + error.start
            kind = "utf-16" if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "cp1252"
            remedy = f"convert it: iconv -f {kind} -t utf-8 {path} > utf8.txt"
            raise ValueError(f"{path} is not UTF-8 at byte {offset}; {remedy}") from None
    yield rest


def fail(message):
    print("bpe.py:", *str(message).split(), file=sys.stderr)  # one line, whatever it holds
    raise SystemExit(2)


def main():
    parser = argparse.ArgumentParser(description="Train a byte-level BPE tokenizer on a text file.")
    parser.add_argument("file", metavar="FILE", help="UTF-8 text; <|endoftext|> lines split it")
    parser.add_argument("--vocab_size", type=int, default=4096, help="ids in all (default 4096)")
    parser.add_argument("--out", metavar="PATH", help="where to save the tokenizer (JSON)")
    parser.error = fail  # one line, instead of the usage and then the error
    args = parser.parse_args()
    folder, out = os.path.dirname(args.out or "") or ".", os.path.realpath(args.out or "")
    is_taken = out == os.path.realpath(args.file) or os.path.exists(out) and not os.path.isfile(out)
    if args.out and (is_taken or not os.access(folder, os.W_OK)):
        fail(f"--out {args.out}: cannot write there; name a file in an existing folder of yours")
    try:
        documents = read_documents(args.file)
        tok = Tokenizer.train(documents, args.vocab_size, partial(print, end="   \r", flush=True))
        few = "" if tok.vocab_size == args.vocab_size else ": the text has no more pairs to merge"
        ids = tok.encode_array(islice(read_documents(args.file), 64))  # 64 documents or blocks
        if not len(ids := ids[ids != tok.eot]):
            fail(f"{args.file} is empty; give a file with some text")
        print(f"{f'{tok.vocab_size} ids{few}':40}")
        sentence = "Once, upon a time, 2 small dragons weren't asleep."  # ASCII, for any console
        print("|".join(tok.decode([i]) for i in tok.encode(sentence)))
        print(f"{tok.byte_lengths[ids].mean():.2f} bytes per token at the start of {args.file}")
        if args.out:
            tok.save(args.out)
            print(f"saved as {args.out}")
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}; give the path of a UTF-8 text file")
    except ValueError as error:
        fail(error)


if __name__ == "__main__":
    main()
