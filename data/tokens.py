"""Documents to one flat array of ids on disk, memory-mapped: <|endoftext|>, then each document and
another <|endoftext|>. If a foreign tokenizer begins texts with another token, that stands before
each document, and no <|endoftext|> before the first.

The array is made once and kept under a name that says which text and which tokenizer it is of. It
grows under a temporary name and is renamed when all of it is on the disk, so that an array that was
cut off is never taken for a complete one. Memory holds one batch of text at a time.
"""

import contextlib
import ctypes
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
from data import datasets, workers
from data.run.files import check_space, remove_leftovers, replacing, write_text
from data.run.log import print_in_place, print_line

BATCH = 1 << 19  # encoded at a time [characters]
EVERY = 0.2  # seconds between two lines of progress
SAMPLE = 100_000_000  # bytes: a tokenizer learns nothing new from more
WORDS = 1 << 23  # bytes of different words that it may learn; each takes 75 bytes of memory


class Progress:
    """A line with how much is done and how long the rest takes, from the first second on."""

    def __init__(self, what: str, total: int):
        self.what, self.total, self.done = what, max(1, total), 0
        self.started, self.told = time.perf_counter(), -math.inf
        self.tell(0)

    @property
    def share(self) -> float:
        return min(1.0, self.done / self.total)

    def tell(self, more: int) -> None:
        """Counts `more` bytes as done."""
        self.done += more
        now = time.perf_counter()
        if now - self.told < EVERY and self.share < 1:
            return
        self.told = now
        line = f"{self.what:10} {100 * self.share:.0f}% of {self.total / 1e6:,.0f} MB"
        if self.done:
            left = (now - self.started) * (1 / self.share - 1)
            line += f", {left:.0f} s left"
        print_in_place(line)

    def through(self, texts):
        """Yields these texts, each counted when the next is asked for."""
        for text in texts:
            yield text
            self.tell(len(text.encode()))


def make_tokenizer(kind: str, vocab_size: int, corpus):
    """A tokenizer of `bytes`, or one that learned from the training text, now or earlier: `bpe`, or
    `chars`, which has an id for each character, the most frequent first where vocab_size ends it.
    """
    if kind == "bytes":
        return bpe.Tokenizer([])
    code = hashlib.sha256(Path(bpe.__file__).read_bytes()).hexdigest()[:8]  # an edit: learn anew
    path = datasets.CACHE / f"{corpus.key}-{vocab_size}-{bpe.UNICODE}-{code}.{kind}"
    with contextlib.suppress(ValueError):  # none is there, or it was damaged since
        return bpe.Tokenizer.load(path)
    bpe.Tokenizer.train([], vocab_size)  # of no text: refuses a size before words are counted
    most = SAMPLE if kind == "chars" else sample_size(corpus.train)
    every = max(1, math.ceil(corpus.train.n_bytes / most))
    if every > 1:
        print_line(f"tokenizer  learns from one document in {every}, {most / 1e6:.0f} MB in all")
    sample = itertools.islice(corpus.train, 0, None, every)
    if kind == "chars":
        tokenizer = learn_characters(sample, vocab_size)
    else:
        words = count_words(sample, corpus.train.n_bytes // every)
        tokenizer = bpe.Tokenizer(bpe.learn_merges(words, vocab_size - 257, print_in_place))
        del words
    return_freed_memory()
    write_text(path, json.dumps(tokenizer.state()))
    return tokenizer


def sample_size(documents) -> int:
    """How many bytes to learn words from: SAMPLE, or fewer where words are nearly all different.

    So they are in Chinese, where no space ends them. The new ones of each megabyte get fewer as a
    text goes on, by a power of its length (Heaps' law), which its first megabytes tell.
    """
    words, n, seen = set(), 0, []
    for text in documents:
        words.update(bpe.count_words([text]))
        n += len(text.encode())
        if n >= (len(seen) + 1) << 21:
            seen.append((n, sum(len(word.encode()) for word in words)))
        if len(seen) == 2:
            break
    else:
        return SAMPLE
    (n_1, words_1), (n_2, words_2) = seen
    power = math.log(words_2 / words_1) / math.log(n_2 / n_1)
    return min(SAMPLE, int(n_2 * (WORDS / words_2) ** (1 / max(0.1, power))))


def learn_characters(documents, vocab_size: int) -> bpe.Tokenizer:
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


def count_words(texts, n_bytes: int) -> Counter:
    """bpe.count_words of texts of about so many bytes, by all cores if they are many.

    Where different words take more than WORDS bytes, the most frequent.
    """
    n, progress, total = workers.how_many(n_bytes), Progress("counting", n_bytes), Counter()
    if not n:
        for text in progress.through(texts):
            workers.add_words(total, [text])
    else:
        todo = batches(((text, True) for text in texts), join=False)
        with contextlib.closing(workers.results("count", None, todo, n)) as done:
            for words, size in done:
                total.update(words)
                progress.tell(size)
    if sum(len(word.encode()) for word in total) > WORDS:
        size = 0
        for word in sorted(total, key=lambda word: (-total[word], word)):
            size += len(word.encode())
            if size > WORDS:
                del total[word]
    return total


def return_freed_memory() -> None:
    """Lets the system have what counting and merging took, 200 MB; glibc would keep it."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no such function: no glibc
        ctypes.CDLL(None).malloc_trim(0)


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
    """The ids of a datasets.Documents, mapped; made if not there, or not whole."""
    remove_leftovers(path.parent, "*")
    if not is_whole(path, tokenizer):
        with replacing(path) as file:
            write_ids(file, documents.pieces(), documents.n_bytes, tokenizer)
    return np.memmap(path, tokenizer.encode_array([]).dtype, "r")


def is_whole(path: Path, tokenizer) -> bool:
    """Whether a file of ids is there and ends where a text does, as a part of it hardly would."""
    kind, size = tokenizer.encode_array([]).dtype, path.stat().st_size if path.exists() else 0
    if not size or size % kind.itemsize:
        return False
    return np.fromfile(path, kind, offset=size - kind.itemsize)[0] == tokenizer.eot


def write_ids(file, pieces, n_bytes: int, tokenizer) -> None:
    """Writes the ids of (text, ends) pieces batch by batch; a disk too small is seen at once.

    Large texts are encoded by all cores; the bytes on the disk are the same.
    """
    is_ours = isinstance(tokenizer, bpe.Tokenizer)
    todo = batches(pieces, join=not is_ours)
    progress = Progress("encoding", n_bytes)
    if n := workers.how_many(n_bytes, workers.MOST if is_ours else 4):  # others' take more memory
        done = workers.results("encode", tokenizer.state(), todo, n)
    else:
        done = (workers.ids_of(tokenizer, *batch) for batch in todo)
    if first_id(tokenizer) == tokenizer.eot:
        file.write(tokenizer.encode_array([""])[-1:].tobytes())
    with contextlib.closing(done):
        for ids, size in done:
            file.write(ids)
            first = not progress.done
            progress.tell(size)
            if first:
                needed = file.tell() / progress.share - file.tell()
                check_space(file.name, needed, "train on less text")


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


def document_starts(ids: np.ndarray, first: int, block: int = 1 << 22) -> np.ndarray:
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
    return np.frombuffer(found, np.int64)


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
