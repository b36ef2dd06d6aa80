"""Other people's tokenizers: a tokenizer.json that is used like bpe.Tokenizer, and ours as one.

A Hugging Face folder holds its tokenizer in two files, `FILES`, and beside them what one needs to
talk with the model, `KEPT`. `load_tokenizer` reads all of these and `tokenizer_files` writes them;
`tokenizer_from_state` reads what `state` of either kind returned.
"""

import json
import re
from array import array
from pathlib import Path

import numpy as np

from bpe import PATTERN, SPECIAL, Tokenizer, utf8

FILES = ("tokenizer.json", "tokenizer_config.json")
GENERATION = "generation_config.json"
KEPT = ("chat_template.jinja", GENERATION, "special_tokens_map.json")  # not used here, nor lost
BLOCK = 1 << 20  # of a longer text, so much is encoded at a time [characters]
find_gap = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])").search  # one space between two words

# GPT-2's alphabet, in which tokenizer.json writes bytes: those that print stand for themselves,
# the others are moved up to the letters from 256 on.
_prints = {*range(33, 127), *range(161, 173), *range(174, 256)}
_moved = {byte: 256 + n for n, byte in enumerate(sorted({*range(256)} - _prints))}
VISIBLE = [chr(_moved.get(byte, byte)) for byte in range(256)]
BYTE_OF = {letter: byte for byte, letter in enumerate(VISIBLE)}


class ForeignTokenizer:
    """A tokenizer.json through the `tokenizers` package, used like Tokenizer.

    Two alphabets are known: bytes as visible letters (GPT-2, Llama 3, Qwen) and sentencepiece's
    (Llama 2, Mixtral), where U+2581 is a space and <0x0A> a byte. Its end-of-text token, whatever
    its name, stands for <|endoftext|> here: it ends a document, and counts as those 13 bytes.
    """

    decode, decode_bytes = Tokenizer.decode, Tokenizer.decode_bytes
    encode_array = Tokenizer.encode_array  # before each document stand the ids of `start`

    def __init__(self, files, vocab_size, eot=None):
        """files: {name: text} of FILES and KEPT; eot: the id, or ids, that the model's config calls
        the end; the first is end-of-text if tokenizer_config.json names none.

        vocab_size is the model's, often rounded up. ValueError if the files can't be used.
        """
        try:
            import tokenizers
        except ImportError:
            raise ValueError("this model has its own tokenizer: pip install tokenizers") from None
        self.files, self.vocab_size = files, vocab_size
        self._typecode = "H" if vocab_size <= 1 << 16 else "I"
        try:
            content, config = (json.loads(files[name]) for name in FILES)
            self._theirs = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
            self._theirs.no_truncation()
            self._theirs.no_padding()
            self.tokens = self._token_bytes(content)
            # Where no token reaches from one word into the next, a text may be cut between them.
            self._can_cut = not any(re.search(rb"\S \S", token) for token in self.tokens)
            self.eot, self.stops = self._ends(config, eot)
            self.start = self._begin(config)
            # They never come from a text, whatever tokenizer.json says.
            names = {self._theirs.id_to_token(i) for i in (self.eot, *self.start)} - {None}
            self._theirs.add_special_tokens([*names])
            self.tokens[self.start] = b""
            self.tokens[self.eot] = SPECIAL.encode()
        except Exception as error:  # the package raises bare Exceptions
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ValueError(f"tokenizer.json can't be used ({reason})") from None
        # Sentencepiece begins a text with a space that isn't there. Pieces of a text are decoded
        # with it. So the end-of-text token counts one byte less: a document has its exact bytes.
        self._adds_space = self.decode_bytes(self.encode("a")) == b" a"
        self.byte_lengths = np.array([len(token) for token in self.tokens])
        self.byte_lengths[self.eot] -= self._adds_space

    def _token_bytes(self, content):
        decoder = content.get("decoder") or {}
        types = {part.get("type") for part in [decoder, *decoder.get("decoders", [])]}
        if not types & {"ByteLevel", "ByteFallback", "Metaspace"}:
            raise ValueError(f"decoder {types} is neither byte-level nor sentencepiece")
        added = {token["id"] for token in content.get("added_tokens", [])}
        tokens = np.full(self.vocab_size, b"", dtype=object)
        for token, i in self._theirs.get_vocab(with_added_tokens=True).items():
            if i >= self.vocab_size and i not in added:
                raise ValueError(f"token {i} is outside the model's {self.vocab_size}")
            if i >= self.vocab_size:
                continue  # the model can't write it, and `encode` refuses it
            if "ByteLevel" in types and i not in added:
                tokens[i] = bytes(BYTE_OF[letter] for letter in token)
            elif (byte := re.fullmatch("<0x([0-9A-F]{2})>", token)) and i not in added:
                tokens[i] = bytes.fromhex(byte[1])
            else:
                tokens[i] = token.replace("\u2581", " ").encode()
        return tokens

    def _ends(self, config, eot):
        """Returns the end-of-text id, and all ids that end a text."""
        ends = eot if isinstance(eot, list) else [eot]
        ends = [i for i in ends if type(i) is int and 0 <= i < self.vocab_size]
        eos = self._theirs.token_to_id(name_of(config, "eos_token"))
        eot = eos if eos is not None else next(iter(ends), None)
        if eot is None:
            raise ValueError("no end-of-text token: eos_token in tokenizer_config.json names none")
        if eot >= self.vocab_size:
            raise ValueError(f"eos_token, {eot}, is outside the model's {self.vocab_size}")
        return eot, list(dict.fromkeys([*ends, eot]))

    def _begin(self, config):
        """Returns the ids that stand before a text."""
        if ours := own_tokenizer(self.files[FILES[0]]):
            return [ours.eot]
        bos = self._theirs.token_to_id(name_of(config, "bos_token"))
        if type(add_bos := config.get("add_bos_token")) is bool:
            return [bos] if add_bos and bos is not None else []
        ids, alone = (
            self._theirs.encode("a").ids,
            self._theirs.encode("a", add_special_tokens=False),
        )
        return ids[: ids.index(alone.ids[0])]

    def encode(self, text, allow_special=False):
        """Returns the ids of `text`; special tokens in it are text unless allowed."""
        utf8(text)  # refuses what the package would refuse in worse words
        self._theirs.encode_special_tokens = not allow_special
        encode, ids, start = self._theirs.encode, [], 0
        # The package takes 200 bytes of memory per character: so a long text is cut in parts.
        size = BLOCK if self._can_cut else len(text)
        while len(text) - start > size and (gap := find_gap(text, start + size)):
            ids += encode(text[start : gap.start()], add_special_tokens=False).ids
            start = gap.start() + self._adds_space
        ids += encode(text[start:], add_special_tokens=False).ids
        if max(ids, default=0) >= self.vocab_size:
            token = self._theirs.id_to_token(max(ids))
            raise ValueError(f"the text holds {token}, a token that the model lacks; take it out")
        if not allow_special and (found := {self.eot, *self.start}.intersection(ids)):
            token = self._theirs.id_to_token(min(found))  # a Unigram knows no other way to write it
            raise ValueError(
                f"the text holds {token}, which this tokenizer can't spell; take it out"
            )
        return ids

    def _pack(self, text):  # for encode_array, which puts end-of-text between documents
        start = self.start[1:] if self.start[:1] == [self.eot] else self.start
        return array(self._typecode, [*start, *self.encode(text)]).tobytes()

    def state(self):
        """Returns plain types, to embed in a checkpoint."""
        return {**self.files, "vocab_size": self.vocab_size, "eot": self.eot, "stops": self.stops}


def tokenizer_from_state(state):
    """Returns the tokenizer, ours or a foreign one, whose `state` this is."""
    if isinstance(state, dict) and "tokenizer.json" in state:
        files = {name: state[name] for name in (*FILES, *KEPT) if type(state.get(name)) is str}
        return ForeignTokenizer(files, state["vocab_size"], state.get("stops", state["eot"]))
    return Tokenizer.from_state(state)


PAD = "<|pad|>"
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
BYTES["use_regex"] = False  # the words are split already
SPLIT = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
WORDS = {"type": "Sequence", "pretokenizers": [SPLIT, BYTES]}


def tokenizer_json(tokenizer, pads=False):
    """Returns the content of tokenizer.json for a bpe.Tokenizer: its words and merges.

    pads: byte 255, which is in no UTF-8 text, is a token to fill batches with.
    """
    tokens = tokenizer.tokens[: tokenizer.eot]
    names = ["".join(VISIBLE[byte] for byte in token) for token in tokens]
    names[255] = PAD if pads else names[255]
    special = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = {tokenizer.eot: SPECIAL, **({255: PAD} if pads else {})}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": name, **special, "special": True} for i, name in added.items()
        ],
        "pre_tokenizer": WORDS,
        "decoder": BYTES,
        "model": {
            "type": "BPE",
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": [f"{names[a]} {names[b]}" for a, b in tokenizer.merges],
        },
    }


def tokenizer_files(tokenizer, add_bos=False):
    """Returns {name: text} of the files by which transformers.AutoTokenizer gives the same ids.

    Of a foreign tokenizer: its own files, and what is KEPT, as they came. add_bos: a text's ids
    begin there with <|endoftext|>, as a prompt's do here.
    """
    if isinstance(tokenizer, ForeignTokenizer):
        return tokenizer.files
    content = tokenizer_json(tokenizer, pads=True)
    if add_bos:
        begin, text = {"SpecialToken": {"id": SPECIAL}}, {"Sequence": {"id": "A"}}
        single = [{kind: {**part[kind], "type_id": 0}} for part in (begin, text) for kind in part]
        other = {"Sequence": {"id": "B", "type_id": 1}}
        known = {SPECIAL: {"id": SPECIAL, "ids": [tokenizer.eot], "tokens": [SPECIAL]}}
        template = {"type": "TemplateProcessing", "single": single, "pair": [*single, other]}
        content["post_processor"] = {**template, "special_tokens": known}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL,
        "eos_token": SPECIAL,
        "pad_token": PAD,
        "add_bos_token": add_bos,
        "split_special_tokens": True,  # <|endoftext|> inside a text is text, as in `encode`
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    contents = (content, config)
    return dict(zip(FILES, map(json.dumps, contents), strict=True))


def name_of(config, key):
    """Returns the text of a token named in tokenizer_config.json, "" if it names none."""
    name = config.get(key) or ""
    return name["content"] if isinstance(name, dict) else name


def own_tokenizer(text):
    """Returns the bpe.Tokenizer that this tokenizer.json is of, or None.

    Another program may have written it anew, and added tokens. What ids depend on must be ours.
    """
    try:
        content = json.loads(text)
        model = {key: value for key, value in content["model"].items() if value}  # without nulls
        if content["pre_tokenizer"] != WORDS or content.get("normalizer"):
            return None  # somebody else's
        pairs = model.get("merges", [])  # "a b", or as transformers 5 writes it, ["a", "b"]
        pairs = [pair.split() if isinstance(pair, str) else pair for pair in pairs]
        ours = Tokenizer([[model["vocab"][name] for name in pair] for pair in pairs])
        expected = tokenizer_json(ours, pads=PAD in model["vocab"])
        same = (
            model["vocab"] == expected["model"]["vocab"]
            and model.keys() <= expected["model"].keys()
        )
        return ours if same and expected["added_tokens"][0] in content["added_tokens"] else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # damaged


def is_all(ours, files, vocab_size, eot):
    """Returns whether a bpe.Tokenizer says all that these files of a folder do."""
    content, config, generation = (json.loads(files.get(k, "{}")) for k in (*FILES, GENERATION))
    usual = {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"}
    return (
        (ours.vocab_size == vocab_size and eot in (None, ours.eot, [ours.eot]))
        and name_of(config, "eos_token") in ("", SPECIAL)
        and all(token["special"] for token in content["added_tokens"])
        and not any("chat_template" in name for name in (*files, *config))
        and generation.keys() <= usual | {"_from_model_config"}
    )


def load_tokenizer(folder, vocab_size, eot=None):
    """Returns the tokenizer in a Hugging Face folder, None if there is none.

    A bpe.Tokenizer where `tokenizer_files` wrote it, else a ForeignTokenizer.
    """
    paths = [path for path in (Path(folder, name) for name in (*FILES, *KEPT)) if path.exists()]
    if not paths or paths[0].name != FILES[0]:
        return None
    try:
        files = dict.fromkeys(FILES, "{}")
        for path in paths:
            with open(path, encoding="utf-8", newline="") as file:
                files[path.name] = file.read()
        eot = json.loads(files.get(GENERATION, "{}")).get("eos_token_id", eot)
        ours = own_tokenizer(files[FILES[0]])
        is_ours = ours and is_all(ours, files, vocab_size, eot)
        return ours if is_ours else ForeignTokenizer(files, vocab_size, eot)
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder}: {error}") from None


def to_tiktoken(tokenizer):
    """Returns a bpe.Tokenizer as a tiktoken.Encoding (it merges by bytes, not by pairs).

    Its `encode_ordinary` is our `encode`; with allowed_special="all", `allow_special`.
    """
    import tiktoken

    ranks = {token: i for i, token in enumerate(tokenizer.tokens[: tokenizer.eot])}
    special = {SPECIAL: tokenizer.eot}
    return tiktoken.Encoding(
        "lamoe", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special
    )
