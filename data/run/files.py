"""Files that survive a crash: atomic writes, locks, and folders whose entries are on the disk.

After a kill, a power cut or a full disk, a file written here is the old one or the new, complete.
"""

import contextlib
import itertools
import os
import shutil
from pathlib import Path


@contextlib.contextmanager
def replacing(path):
    """A binary file that takes the place of `path` once all of it is on the disk.

        with replacing("config.json") as file:
            file.write(b"{}")

    Its temporary file is locked while it is written: one without a lock is a dead process's.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open_locked(temporary) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def open_locked(path: Path):
    """An empty binary file that this process has locked."""
    while True:
        file = open(path, "wb")  # noqa: SIM115 - the caller closes it
        lock(file, wait=True)
        if path.exists():
            return file
        file.close()  # another process took it for a leftover just before it was locked


def write_text(path, text: str) -> None:
    """Writes a text as UTF-8: all of it or nothing."""
    with replacing(path) as file:
        file.write(text.encode())


def lock(file, wait: bool) -> None:
    """Locks an open file until it is closed; without waiting, OSError if another process has it.

    Windows needs none here: an open file can't be removed there. Some network file systems have no
    locks: a writer goes on without one, and nobody deletes what others may be writing.
    """
    if os.name == "posix":
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            if not wait:
                raise


def lock_folder(folder):
    """An open file that holds the folder of a run for this process; the lock dies with the process.

    ValueError if another process holds it. On a file system without locks nothing is held.
    """
    file = open(Path(folder) / "lock", "w")  # noqa: SIM115 - it stays open as long as the run
    try:
        lock(file, wait=False)
        if os.name != "posix":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if os.name != "posix" or isinstance(error, BlockingIOError):
            raise ValueError(
                f"{folder} is in use by another training run; wait for it, or choose another --out"
            ) from None
    return file


def flush_folder(folder) -> None:
    """Flushes a folder's entries to the disk: until then a power cut may undo a rename in it."""
    if os.name == "posix":
        entries = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(entries)
        finally:
            os.close(entries)


def make_folder(folder) -> None:
    """Makes a folder and its parents, each entry flushed, so that a power cut does not undo it."""
    folder = Path(folder).absolute()
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        flush_folder(folder.parent)


def first_free(path) -> Path:
    """`path`, or the first of path-2, path-3, ... that does not exist yet."""
    names = itertools.chain([f"{path}"], (f"{path}-{i}" for i in itertools.count(2)))
    return next(Path(name) for name in names if not Path(name).exists())


def remove_leftovers(folder, *names: str) -> None:
    """Deletes temporary files that killed processes left; names are patterns, such as `*.ids`.

    A file that another process is writing stays: it is locked, and on Windows it is open.
    """
    for left in [left for name in names for left in Path(folder).glob(f"{name}.*.tmp")]:
        with contextlib.suppress(OSError):  # somebody is writing it
            if os.name == "posix":
                with open(left, "rb+") as file:
                    lock(file, wait=False)
                    left.unlink()
            else:
                left.unlink()


def check_space(path, needed: int, advice: str) -> None:
    """ValueError if a file takes more bytes than the disk has left."""
    free = shutil.disk_usage(Path(path).parent).free
    if needed > free:
        raise ValueError(
            f"{path} needs {needed / 1e6:,.1f} MB more and its disk has {free / 1e6:,.1f} MB left; "
            f"make room, or {advice}"
        )
