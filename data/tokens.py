"""Documents to one flat array of ids on disk, memory-mapped: <|endoftext|>, then each document and
another <|endoftext|>. If a foreign tokenizer begins texts with another token, that stands before
each document, and no <|endoftext|> before the first.

The array is made once and kept under a name that says which text and which tokenizer it is of. It
grows under a temporary name and is renamed when all of it is on the disk, so that an array that was
cut off is never taken for a complete one. Memory holds one batch of text at a time.
"""

import hashlib
import itertools
import json
import math
import time
from array import array
from collections import Counter
from pathlib import Path

import numpy as np

import bpe
from data import datasets
from data.run.files import check_space, remove_leftovers, replacing, write_text
from data.run.log import print_in_place, print_line

BATCH = 1 << 22  # encoded at a time [characters]
SAMPLE = 100_000_000  # bytes: a tokenizer learns nothing new from more


def make_tokenizer(kind: str, vocab_size: int, corpus):
    """A tokenizer of `bytes`, or one that learned from the training text, now or earlier: `bpe`, or
    `chars`, which has an id for each character, the most frequent first where vocab_size ends it.
    """
    if kind == "bytes":
        return bpe.Tokenizer([])
    code = hashlib.sha256(Path(bpe.__file__).read_bytes()).hexdigest()[:8]  # an edit: learn anew
    path = datasets.CACHE / f"{corpus.key}-{vocab_size}-{bpe.UNICODE}-{code}.{kind}"
    if path.exists():
        return bpe.Tokenizer.load(path)
    every = max(1, math.ceil(corpus.train.n_bytes / SAMPLE))
    if every > 1:
        print_line(f"tokenizer  learns from one document in {every}, {SAMPLE / 1e6:.0f} MB in all")
    sample = itertools.islice(corpus.train, 0, None, every)
    learn = bpe.Tokenizer.train if kind == "bpe" else learn_characters
    tokenizer = learn(sample, vocab_size, print_in_place)
    write_text(path, json.dumps(tokenizer.state()))
    return tokenizer


def learn_characters(documents, vocab_size: int, progress=None) -> bpe.Tokenizer:
    """A tokenizer whose merges put together the bytes of a character, and nothing longer.

    What is not in vocab_size, or was never seen, is still text: several ids of bytes.

    >>> learn_characters(["déjà vu"], 300).encode("déjà")
    [100, 257, 106, 256]
    """
    counts = Counter()
    for text in documents:
        counts.update(text)
    ids, merges = {bytes([i]): i for i in range(256)}, []
    for character in sorted(counts, key=lambda c: (-counts[c], c)):
        data = bpe.utf8(character)
        new = [data[:n] for n in range(2, len(data) + 1) if data[:n] not in ids]
        if len(merges) + len(new) > vocab_size - 257:
            break
        for part in new:
            merges.append((ids[part[:-1]], part[-1]))
            ids[part] = 255 + len(merges)
    return bpe.Tokenizer(merges)


def encode_corpus(corpus, tokenizer, length: int, asked: str) -> tuple[np.ndarray, np.ndarray]:
    """The ids of both sides, mapped; ValueError if one does not fill a window of this length.

    asked: the name of the text on the command line.
    """
    name = hashlib.sha256(json.dumps(tokenizer.state()).encode()).hexdigest()[:12]
    train, val = (
        encode(documents, tokenizer, datasets.CACHE / f"{corpus.key}-{name}-{side}.ids")
        for side, documents in (("train", corpus.train), ("val", corpus.val))
    )
    shorter = min(len(train), len(val))
    if shorter < length + 2:
        raise ValueError(
            f"{asked} is too short: {len(train)} tokens to train on and {len(val)} "
            f"to validate do not fill a context of {length}; give more text, or a --seq_len of "
            f"{max(1, shorter - 2)} or less"
        )
    n_bytes = corpus.val.n_bytes + len(bpe.SPECIAL) * len(corpus.val)
    if (known := last_bytes(val, tokenizer)[-1] + 1) != n_bytes:
        print_line(
            f"           its tokenizer reads {n_bytes:,} bytes of validation text as {known:,}: it "
            f"changes some characters, and bits/byte are of what it reads"
        )
    return train, val


def encode(documents, tokenizer, path: Path) -> np.ndarray:
    """The ids of a datasets.Documents, mapped; made if not there."""
    remove_leftovers(path.parent, "*")
    if not path.exists():
        with replacing(path) as file:
            write_ids(file, documents.pieces(), documents.n_bytes, tokenizer)
    return np.memmap(path, tokenizer.encode_array([]).dtype, "r")


def write_ids(file, pieces, n_bytes: int, tokenizer) -> None:
    """Writes the ids of (text, ends) pieces batch by batch; a disk too small is seen at once."""
    started, read = time.perf_counter(), 0
    if first_id(tokenizer) == tokenizer.eot:
        file.write(tokenizer.encode_array([""])[-1:].tobytes())
    for texts, ends in batches(pieces, join=not isinstance(tokenizer, bpe.Tokenizer)):
        ids = tokenizer.encode_array(texts)
        file.write(memoryview(ids if ends else ids[:-1]))
        first, read = not read, read + sum(len(text.encode()) for text in texts)
        share = min(1.0, read / max(1, n_bytes))
        if first:
            check_space(file.name, file.tell() / share - file.tell(), "train on less text")
        left = (time.perf_counter() - started) * (1 - share) / share
        print_in_place(
            f"encoding   {100 * share:.0f}% of {n_bytes / 1e6:,.0f} MB, {left:.0f} s left"
        )


def batches(pieces, join: bool):
    """Yields (texts, ends): about BATCH characters at a time; `ends` is of the last text.

    join: the pieces of a document, which are cut where bpe.py's words end, and not another's.
    """
    texts, parts, size = [], [], 0
    for text, ends in pieces:
        if join:
            parts.append(text)
            if not ends:
                continue
            text, parts = "".join(parts), []
        texts.append(text)
        size += len(text)
        if size >= BATCH or not ends:  # encode_array ends each of its texts but the last as we like
            yield texts, ends
            texts, size = [], 0
    if texts:
        yield texts, True


def first_id(tokenizer) -> int:
    """What a document begins with: what stands before a text, or ends the one before."""
    return [*tokenizer.start, tokenizer.eot][0]


def document_starts(ids: np.ndarray, first: int, block: int = 1 << 22) -> array:
    """Positions of the id that documents begin with: the text itself starts behind it.

    Of a mapped file, blocks are read beside the mapping: pages that it touched would stay.
    """
    found = array("q")
    for at in range(0, len(ids), block):
        part = ids[at : at + block]
        if isinstance(ids, np.memmap):
            place = ids.offset + at * ids.itemsize
            part = np.fromfile(ids.filename, ids.dtype, len(part), offset=place)
        found.frombytes((np.flatnonzero(part == first) + at).astype(np.int64).tobytes())
    return found


def last_bytes(ids: np.ndarray, tokenizer) -> np.ndarray:
    """Where the last byte of each token but the first is in the text, separators included."""
    space = len(bpe.SPECIAL) - tokenizer.byte_lengths[tokenizer.eot]  # see ForeignTokenizer
    till = np.cumsum(tokenizer.byte_lengths[ids[1:]])
    return till - 1 - space * (ids[1:] != tokenizer.eot)


def source_of_byte(val_ids: np.ndarray, tokenizer, corpus) -> np.ndarray | None:
    """For each byte of the validation text, separators included, its index in corpus.sources."""
    if len(corpus.sources) == 1:
        return None  # nothing to tell apart
    bytes_till = last_bytes(val_ids, tokenizer)[val_ids[1:] == tokenizer.eot] + 1
    return np.repeat(corpus.val.sources, np.diff(bytes_till, prepend=0))
