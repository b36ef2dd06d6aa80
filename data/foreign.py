"""Other people's tokenizers: a tokenizer.json that is used like bpe.Tokenizer, and ours as one.

A Hugging Face folder holds its tokenizer in two files, `FILES`. `load_tokenizer` reads them and
`tokenizer_files` writes them; `tokenizer_from_state` reads what `state` of either kind returned.
"""

import json
import os
import re
from array import array

import numpy as np

from bpe import PATTERN, SPECIAL, Tokenizer, utf8

FILES = ("tokenizer.json", "tokenizer_config.json")

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
    its name, stands for <|endoftext|> here: it separates documents, and counts as those 13 bytes.
    """

    decode, decode_bytes = Tokenizer.decode, Tokenizer.decode_bytes
    encode_array = Tokenizer.encode_array  # before each document stand the ids of `start`

    def __init__(self, files, vocab_size, eot=None):
        """files: {name: text} of FILES; eot: an id, in case that they name no eos_token.

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
            self.eot, self.start = self._ends(config, eot)
        except Exception as error:  # the package raises bare Exceptions
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ValueError(f"tokenizer.json can't be used ({reason})") from None
        # Sentencepiece begins a text with a space that isn't there. Pieces of a text are decoded
        # with it. So the end-of-text token counts one byte less: a document has its exact bytes.
        extra = len(self.decode_bytes(self.encode("a"))) - 1
        self.tokens[self.eot] = SPECIAL.encode()
        self.tokens[[i for i in self.start if i != self.eot]] = b""
        self.byte_lengths = np.array([len(token) for token in self.tokens])
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

    def _pack(self, text):  # for encode_array
        return array(self._typecode, [*self.start, *self.encode(text)]).tobytes()

    def state(self):
        """Returns plain types, to embed in a checkpoint."""
        return {**self.files, "vocab_size": self.vocab_size, "eot": self.eot}


def tokenizer_from_state(state):
    """Returns the tokenizer, ours or a foreign one, whose `state` this is."""
    if isinstance(state, dict) and "tokenizer.json" in state:
        files = {name: state[name] for name in FILES}
        return ForeignTokenizer(files, state["vocab_size"], state["eot"])
    return Tokenizer.from_state(state)


def tokenizer_json(tokenizer):
    """Returns the content of tokenizer.json for a bpe.Tokenizer: its words and merges."""
    tokens = tokenizer.tokens[: tokenizer.eot]
    names = ["".join(VISIBLE[byte] for byte in token) for token in tokens]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level["use_regex"] = False  # the words are split already
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated"}
    split["invert"] = False
    special = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special |= {"id": tokenizer.eot, "content": SPECIAL, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [special],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": [f"{names[a]} {names[b]}" for a, b in tokenizer.merges],
        },
    }


def tokenizer_files(tokenizer):
    """Returns {name: text} of the files by which transformers.AutoTokenizer gives the same ids.

    Of a foreign tokenizer: its own files, as they came.
    """
    if isinstance(tokenizer, ForeignTokenizer):
        return tokenizer.files
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL,
        "eos_token": SPECIAL,
        "add_bos_token": False,
        "split_special_tokens": True,  # <|endoftext|> inside a text is text, as in `encode`
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    contents = (tokenizer_json(tokenizer), config)
    return dict(zip(FILES, map(json.dumps, contents), strict=True))


def own_tokenizer(text):
    """Returns the bpe.Tokenizer that wrote this tokenizer.json, or None."""
    try:
        content = json.loads(text)
        ids, merges = content["model"]["vocab"], content["model"]["merges"]
        ours = Tokenizer([[ids[name] for name in pair.split()] for pair in merges])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # somebody else's, or damaged
    return ours if tokenizer_json(ours) == content else None


def load_tokenizer(folder, vocab_size, eot=None):
    """Returns the tokenizer in a Hugging Face folder, None if there is none.

    A bpe.Tokenizer where `tokenizer_files` wrote it, else a ForeignTokenizer.
    """
    present = [name for name in FILES if os.path.exists(os.path.join(folder, name))]
    if "tokenizer.json" not in present:
        return None
    files = dict.fromkeys(FILES, "{}")
    try:
        for name in present:
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                files[name] = file.read()
        ours = own_tokenizer(files["tokenizer.json"])
        is_ours = ours and ours.vocab_size == vocab_size
        return ours if is_ours else ForeignTokenizer(files, vocab_size, eot)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def to_tiktoken(tokenizer):
    """Returns a bpe.Tokenizer as a tiktoken.Encoding (it merges by bytes, not by pairs).

    Its `encode_ordinary` is our `encode`; with allowed_special="all", `allow_special`.
    """
    try:
        import tiktoken
    except ImportError:
        raise ImportError("to_tiktoken needs tiktoken: pip install tiktoken") from None
    ranks = {token: i for i, token in enumerate(tokenizer.tokens[: tokenizer.eot])}
    special = {SPECIAL: tokenizer.eot}
    return tiktoken.Encoding(
        "lamoe", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special
    )
