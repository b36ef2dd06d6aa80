"""Documents to one flat array of ids on disk, memory-mapped: <|endoftext|>, then each document and
another <|endoftext|>.

The array is made once and kept under a name that says which text and which tokenizer it is of. It
grows under a temporary name and is renamed when all of it is on the disk, so that an array that was
cut off is never taken for a whole one. Memory holds one batch of text at a time.
"""

import contextlib
import os
import shutil
import time
from pathlib import Path

import numpy as np

BATCH = 1 << 22  # encoded at a time [characters]


def encode(documents, tokenizer, path: Path, progress=None) -> np.ndarray:
    """The ids of a datasets.Documents, mapped; made if not there."""
    remove_leftovers(path.parent)
    if not path.exists():
        with replacing(path) as file:
            write_ids(file, documents.pieces(), documents.n_bytes, tokenizer, progress)
    return np.memmap(path, tokenizer.encode_array([]).dtype, "r")


def write_ids(file, pieces, n_bytes: int, tokenizer, progress=None) -> None:
    """Writes the ids of (text, ends) pieces batch by batch; a disk too small is seen at once."""
    started, read = time.perf_counter(), 0
    file.write(tokenizer.encode_array([""]).tobytes())  # the <|endoftext|> before the first
    for texts, ends in batches(pieces):
        ids = tokenizer.encode_array(texts)
        file.write(memoryview(ids if ends else ids[:-1]))
        first, read = not read, read + sum(len(text.encode()) for text in texts)
        share = min(1.0, read / max(1, n_bytes))
        expected, free = file.tell() / share, shutil.disk_usage(file.name).free
        if first and expected - file.tell() > free:
            raise ValueError(
                f"the ids of this text take about {expected / 1e9:.1f} GB and {file.name} is on a "
                f"disk with {free / 1e9:.1f} GB left; make room, or train on less text"
            )
        if progress:
            left = (time.perf_counter() - started) * (1 - share) / share
            progress(f"encoding   {100 * share:.0f}% of {n_bytes / 1e6:,.0f} MB, {left:.0f} s left")


def batches(pieces):
    """Yields (texts, ends): about BATCH characters at a time; `ends` is of the last text."""
    texts, size = [], 0
    for text, ends in pieces:
        texts.append(text)
        size += len(text)
        if size >= BATCH or not ends:  # encode_array ends each of its texts but the last as we like
            yield texts, ends
            texts, size = [], 0
    if texts:
        yield texts, True


class replacing:
    """A binary file that takes its place only when all of it is written: with replacing(p) as f.

    Its temporary one is locked as long as it is written: one without a lock is a dead process's.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            self.file = open(self.temporary, "wb")  # noqa: SIM115 - closed in __exit__
            lock(self.file, wait=True)
            if self.temporary.exists():
                return self.file
            self.file.close()  # taken for a leftover just before it was locked

    def __exit__(self, error, *rest):
        try:
            with self.file:
                if not error:
                    self.file.flush()
                    os.fsync(self.file.fileno())
            if not error:
                os.replace(self.temporary, self.path)
                flush_folder(self.path.parent)
        finally:
            if self.temporary.exists():
                self.temporary.unlink()


def lock(file, wait: bool) -> None:
    """Locks an open file until it is closed; without waiting, OSError if another process has.

    Windows needs none here: an open file can't be removed there. On a file system without locks a
    writer goes on without one, and nobody takes away what others may be writing.
    """
    if os.name == "posix":
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            if not wait:
                raise


def remove_leftovers(cache: Path) -> None:
    """The temporary files of processes that were killed. Windows keeps them: they are open here."""
    for left in [left for kind in ("ids", "npz", "bpe") for left in cache.glob(f"*.{kind}.*.tmp")]:
        with contextlib.suppress(OSError), open(left, "rb+") as file:
            lock(file, wait=False)  # OSError if somebody writes it now
            left.unlink()


def flush_folder(folder: Path) -> None:
    """Flushes a folder's entries to the disk: until then a power cut may undo a rename in it."""
    if os.name == "posix":
        entries = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(entries)
        finally:
            os.close(entries)
