"""Readers: a name, a file or a folder becomes documents to train on and documents to check with.

corpus = read("stories")         # the embedded corpus, drawn on first use
corpus = read("facts")           # another: an invented world to memorise
corpus = read("book.txt")        # any UTF-8 text file
corpus = read("my_folder")       # every .txt below it, one document each
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import facts, stories

CACHE = Path(__file__).parent / "cache"  # generated text; git ignores it
SEPARATOR = stories.END.strip()  # <|endoftext|>: a line of its own in files, a token for the model
KINDS = ("rest", "choice", "recall")  # what a byte of a drawn corpus is
DRAWN = {"stories": stories, "facts": facts}  # corpora we write ourselves, with an exact floor


class Corpus(NamedTuple):
    name: str
    train: list[str]  # documents
    val: list[str]  # documents that are not in train
    how: str  # what was read and how it was split, in a line
    kind_of_byte: np.ndarray | None = None  # of the validation text: an index into KINDS
    floor_bits: np.ndarray | None = None  # exact entropy of the validation text, by the same kinds


def read(name: str) -> Corpus:
    """The corpus called `name`. ValueError names the cause and a remedy."""
    if name in DRAWN:
        return read_drawn(name)
    path = Path(name)
    if path.is_dir():
        files = sorted(path.rglob("*.txt"))
        if not files:
            raise ValueError(f"{name} holds no .txt file; put text there, or name another folder")
        documents = [document for file in files for document in split_documents(read_text(file))]
    elif path.is_file():
        documents = split_documents(read_text(path))
    else:
        raise ValueError(f"{name}: no such file, folder or data set; try --data stories, or a path")
    return split(path.stem or path.resolve().name, documents)


def read_text(path: Path) -> str:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")  # a byte-order mark is no text
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start} is 0x{content[error.start]:02x}); "
            f"convert it: iconv -f cp1252 -t utf-8 {path} > utf8.txt"
        ) from None
    if "\0" in text:
        raise ValueError(f"{path} is not text (it has a zero byte); name a plain text file")
    return text.replace("\r\n", "\n")


def split_documents(text: str) -> list[str]:
    """The parts between lines that hold nothing but the separator; empty ones are left out."""
    if SEPARATOR not in text:
        return [text] if text.strip() else []
    parts, lines = [], []
    for line in text.split("\n"):
        if line.strip() == SEPARATOR:
            parts.append("\n".join(lines))
            lines = []
        else:
            lines.append(line)
    parts.append("\n".join(lines))
    return [part.strip("\n") for part in parts if part.strip()]


def split(name: str, documents: list[str]) -> Corpus:
    """One document in ten for validation, chosen by its content; a few long ones by position.

    By content: adding documents later moves none from one side to the other, and two copies of a
    document always land on the same side.
    """
    size = sum(map(len, documents))
    if not size:
        raise ValueError(f"{name} is empty; name a file with text in it")
    if len(documents) >= 20:
        held_out = [hashlib.sha256(d.encode()).digest()[0] % 10 == 0 for d in documents]
        train = [d for d, held in zip(documents, held_out, strict=True) if not held]
        val = [d for d, held in zip(documents, held_out, strict=True) if held]
        if train and val:
            how = f"{len(documents):,} documents, {len(val):,} of them for validation"
            return Corpus(name, train, val, how)
    left, train, val = int(0.9 * size), [], []
    for document in documents:
        train += [document[:left]] if left > 0 else []
        val += [document[left:]] if len(document) > left else []
        left = max(0, left - len(document))
    return Corpus(name, train, val, f"{size:,} characters, the last 10% for validation")


def read_drawn(name: str) -> Corpus:
    """A drawn corpus with its exact floor, and what each byte of the validation text is."""
    paths = DRAWN[name].write(CACHE)
    train, val = (split_documents(path.read_text()) for path in (paths.train, paths.val))
    kinds, bits = [], np.zeros(len(KINDS))
    for document, (_, _, spans) in zip(val, json.loads(paths.floor.read_text()), strict=True):
        kind = np.full(len(document) + len(SEPARATOR), KINDS.index("rest"), np.uint8)
        for start, end, of, cost in spans:
            kind[start:end] = KINDS.index(of)
            bits[KINDS.index(of)] += cost
        kinds.append(kind)
    how = f"{len(train):,} documents drawn by data/{name}.py, {len(val):,} others for validation"
    return Corpus(name, train, val, how, np.concatenate(kinds), bits)
