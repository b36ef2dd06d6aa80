"""Attacks that take minutes, on what must never lose, run or believe anything. Not collected.

    python tests/torture.py kills --n 300      kill -9 at random moments, then before every write,
                                               flush, rename and removal that a run does
    python tests/torture.py power              the same moments, but what was not flushed is gone
    python tests/torture.py files --n 10000    checkpoints cut and with flipped bits, hostile ones,
                                               full disks
    python tests/torture.py fuzz --n 1000000   strings, command lines, configs, router inputs

Each prints a line with its figures. tests/test_safety.py does a little of each. Linux.
"""

import argparse
import builtins
import contextlib
import csv
import errno
import os
import random
import shutil
import signal
import stat
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401 - once, not in each child
from tiny_run import TINY, call, make_text  # noqa: E402

import lamoe  # noqa: E402
import train  # noqa: E402
from data import datasets  # noqa: E402

open_raw = open
FLAGS = ["--steps 12 --log_every 2 --eval_every 4 --save_every 3"]
CLOCKS = ("tokens_per_s", "seconds")

# ----------------------------------------------------------------------------------------------
# 1. A run in a child process, and whether it came to the right end
# ----------------------------------------------------------------------------------------------


def workplace(folder: Path) -> Path:
    """The folder, new, with a text in it."""
    folder.mkdir(parents=True)
    (folder / "text.txt").write_text(make_text(2000), encoding="utf-8")
    return folder


def start(folder: Path, flags=FLAGS, disk=contextlib.nullcontext, resume=True) -> int:
    """Forks a child that trains in the folder, in a context of disk(); returns its id.

    Always the same command: --resume begins the run if there is none.
    """
    pid = os.fork()
    if pid:
        return pid
    try:
        os.chdir(folder)
        log = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        datasets.CACHE, sys.modules["matplotlib"] = Path("cache"), None
        words = " ".join(["--data text.txt --out run", *TINY, *flags]).split()
        with disk():
            code = call(train, *words, *["--resume"] * resume)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(70)


def finish(pid: int) -> int:
    """The exit code of a child; -9 if it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def finish_within(pid: int, seconds: float) -> int | None:
    """The same, or None if it still runs after so many seconds."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        if (ended := os.waitpid(pid, os.WNOHANG))[0]:
            return os.waitstatus_to_exitcode(ended[1])
        time.sleep(0.001)
    return None


def leaves(tree, path=""):
    """(path, value) of everything in a checkpoint, tensors as bytes."""
    if isinstance(tree, (dict, list, tuple)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{path}/{key}")
    elif isinstance(tree, torch.Tensor):
        yield path, (tree.dtype, tree.shape, tree.contiguous().numpy().tobytes())
    else:
        yield path, tree


def end_of(folder: Path) -> dict:
    """All that a run leaves but its clocks: checkpoints and logs."""
    end = {}
    for name in ("last.pt", "best.pt"):
        end |= {f"{name}{path}": value for path, value in leaves(lamoe.read(folder / "run" / name))}
        del end[f"{name}/done/seconds"]
    for name in ("log.csv", "load.csv"):
        with open(folder / "run" / name, newline="") as file:
            rows = [{**row, **dict.fromkeys(CLOCKS)} for row in csv.DictReader(file)]
        end[name] = rows
    end["leftovers"] = sorted(path.name for path in folder.rglob("*.tmp"))
    return end


def complain(folder: Path, what: str) -> str:
    return f"{what}: {(folder / 'output.txt').read_text()[-600:]}"


def check_end(folder: Path, straight: dict, what: str) -> None:
    end = end_of(folder)
    differing = [path for path in straight.keys() | end.keys() if straight.get(path) != end.get(path)]
    assert not differing, complain(folder, f"{what}: {sorted(differing)[:5]} differ")


def straight_run(root: Path, flags=FLAGS) -> dict:
    """What the run leaves that nobody disturbs."""
    folder = workplace(root)
    code = finish(start(folder, flags, resume=False))
    assert code == 0, complain(folder, f"exit code {code}")
    return end_of(folder)


# ----------------------------------------------------------------------------------------------
# 2. Kill -9
# ----------------------------------------------------------------------------------------------


def random_kills(root: Path, straight: dict, flags, rng, patience: float) -> int:
    """Kills a run and starts it again until it comes to its end; returns how often."""
    folder, kills = workplace(root), 0
    while True:
        pid = start(folder, flags)
        code = finish_within(pid, rng.uniform(0, patience))
        if code is None:
            os.kill(pid, signal.SIGKILL)
            finish(pid)
            kills += 1
            continue
        assert code == 0, complain(folder, f"exit code {code} after {kills} kills")
        check_end(folder, straight, f"after {kills} kills")
        return kills


class Disk:
    """A context that counts what this process does to the disk, and calls act(n, what, path).

    Events are writes to files (of many in a row the 1st, 2nd, 4th, ...), flushes, renames, removals
    and new folders; act is called before each. An errno that it returns is raised.
    """

    NAMES = ("replace", "rename", "fsync", "remove", "unlink", "mkdir", "rmdir")

    def __init__(self, act):
        self.act, self.n, self.writes, self.acting = act, 0, 0, False

    def __enter__(self):
        self.originals = {name: getattr(os, name) for name in self.NAMES}
        self.open = open
        for name in self.NAMES:
            setattr(os, name, self.counted(name))
        builtins.open = self.opened

    def __exit__(self, *error):
        for name, original in self.originals.items():
            setattr(os, name, original)
        builtins.open = self.open

    def event(self, what: str, path) -> int | None:
        if self.acting:
            return None
        self.writes = self.writes + 1 if what == "write" else 0
        if self.writes & (self.writes - 1):
            return None
        self.n, self.acting = self.n + 1, True
        number = self.act(self.n, what, path)
        self.acting = False
        return number

    def counted(self, name: str):
        def function(*arguments, **named):
            if number := self.event(name, arguments[0]):
                raise OSError(number, os.strerror(number), str(arguments[0]))
            return self.originals[name](*arguments, **named)

        return function

    def opened(self, path, mode="r", *arguments, **named):
        file = self.open(path, mode, *arguments, **named)
        return File(file, self) if set(mode) & set("wa+") and not isinstance(path, int) else file


class File:
    """An open file whose writes are events: half of the data is on the disk when one comes."""

    def __init__(self, file, disk: Disk):
        self.file, self.disk = file, disk

    def write(self, data):
        data = data if isinstance(data, str) else bytes(data)
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        if number := self.disk.event("write", self.file.name):
            raise OSError(number, os.strerror(number), str(self.file.name))
        self.file.write(data[len(data) // 2 :])
        return len(data)

    def writelines(self, lines):
        for line in lines:
            self.write(line)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __iter__(self):
        return iter(self.file)

    def __getattr__(self, name):
        return getattr(self.file, name)


def events(root: Path, flags=FLAGS) -> list[tuple[str, str]]:
    """(what, path) of all that a run does to the disk."""
    folder = workplace(root)

    def note(n, what, path):
        os.write(3, f"{what} {path}\n".encode())

    def disk():
        os.dup2(os.open("events.txt", os.O_WRONLY | os.O_CREAT), 3)
        return Disk(note)

    code = finish(start(folder, flags, disk))
    assert code == 0, complain(folder, f"exit code {code}")
    return [tuple(line.split(" ", 1)) for line in (folder / "events.txt").read_text().splitlines()]


def kill_at(root: Path, n: int, straight: dict, flags=FLAGS) -> None:
    """Kills a run before its n-th event; started again, it must come to the same end."""
    folder = workplace(root)

    def act(count, what, path):
        if count == n:
            os.kill(os.getpid(), signal.SIGKILL)

    code = finish(start(folder, flags, lambda: Disk(act)))
    assert code == -signal.SIGKILL, complain(folder, f"event {n}: exit code {code}")
    age_leftovers(folder)
    code = finish(start(folder, flags))
    assert code == 0, complain(folder, f"after a kill at event {n}: exit code {code}")
    check_end(folder, straight, f"after a kill at event {n}")


def age_leftovers(folder: Path) -> None:
    """As if some seconds had gone by: those of the cache are removed only then."""
    for left in folder.rglob("*.tmp"):
        os.utime(left, (1, 1))


def fail_at(root: Path, n: int, number: int, straight: dict, flags=FLAGS) -> bool:
    """The same with an error of the disk: one line, no traceback. False if that didn't matter."""
    folder = workplace(root)

    def act(count, what, path):
        return number if count == n else None

    code = finish(start(folder, flags, lambda: Disk(act)))
    said = (folder / "output.txt").read_text()
    assert code in (0, 2) and "Traceback" not in said, complain(folder, f"event {n}: {code}")
    if code == 2:
        assert said.count("error: ") == 1 and said.rstrip().count("\n", said.index("error: ")) == 0
        code = finish(start(folder, flags))
        assert code == 0, complain(folder, f"after an error at event {n}: exit code {code}")
    check_end(folder, straight, f"after an error at event {n}")
    return code == 2


def kills(root: Path, n: int) -> None:
    rng, done, runs = random.Random(0), 0, 0
    kinds = ["", "--router deepseek --top_k 1", "--tokenizer bpe --vocab_size 300", "--dtype bf16"]
    while done < n:
        flags = ["--steps 40 --log_every 2 --eval_every 10 --save_every 4", kinds[runs % len(kinds)]]
        straight = straight_run(root / f"straight-{runs}", flags)
        done += random_kills(root / f"killed-{runs}", straight, flags, rng, 0.5)
        runs += 1
    print(f"kills: {done} at random moments of {runs} runs, all survived, bit-equal")
    flags = [*FLAGS, "--tokenizer bpe --vocab_size 300"]
    straight = straight_run(root / "straight", flags)
    happened = events(root / "events", flags)
    for at in range(1, len(happened) + 1):
        kill_at(root / f"kill-{at}", at, straight, flags)
        shutil.rmtree(root / f"kill-{at}")
    print(f"kills: {len(happened)} more, before every write, flush, rename and removal of a run")


# ----------------------------------------------------------------------------------------------
# 3. Power cuts: what was flushed is there, and of the rest nothing or anything
# ----------------------------------------------------------------------------------------------


class Platter:
    """What of a folder would be left if the power went now; an `act` for Disk.

    Before each event it keeps two folders. `least`: of files only what was flushed, and of entries
    (new names, renames) only those of folders that were flushed after them. `most`: all entries,
    but zeros where data was not flushed, which is what a rename without a flush can leave.
    """

    def __init__(self, folder: Path, crashes: Path):
        self.folder, self.crashes, self.content = folder.resolve(), crashes.resolve(), {}
        for path in (folder, *folder.rglob("*")):
            if path.is_file():
                self.content[path.stat().st_ino] = path.read_bytes()
        self.entries, self.seen = self.list(self.folder), []

    def list(self, folder: Path) -> dict[Path, int]:
        return {path: path.stat().st_ino for path in folder.iterdir()}

    def __call__(self, n: int, what: str, path) -> None:
        for name, state in (("least", self.least()), ("most", self.most())):
            if state not in self.seen:
                self.seen.append(state)
                self.write(self.crashes / f"{n:04}-{name}", state)
        if what == "fsync":
            self.flush(Path(os.readlink(f"/proc/self/fd/{path}")))

    def flush(self, path: Path) -> None:
        if path.is_dir():
            kept = {p: inode for p, inode in self.entries.items() if p.parent != path}
            self.entries = kept | self.list(path)
        else:
            self.content[path.stat().st_ino] = read_raw(path)

    def least(self) -> dict[Path, bytes | None]:
        """{path: content, None of a folder}."""
        state = {}
        for path, inode in sorted(self.entries.items()):
            if path.parent in (self.folder, *state):
                state[path] = self.content.get(inode, None if path.is_dir() else b"")
        return state

    def most(self) -> dict[Path, bytes | None]:
        state = {}
        for path in sorted(self.folder.rglob("*")):
            status = path.stat()
            known = self.content.get(status.st_ino, b"")[: status.st_size]
            state[path] = None if path.is_dir() else known.ljust(status.st_size, b"\0")
        return state

    def write(self, crash: Path, state: dict[Path, bytes | None]) -> None:
        for path, content in {self.folder: None, **state}.items():
            to = crash / path.relative_to(self.folder)
            if content is None:
                os.makedirs(to)
            else:
                write_raw(to, content)
                if path.exists():
                    shutil.copystat(path, to)  # the time of a text is part of its name in the cache


def read_raw(path: Path) -> bytes:
    """Read and written beside `open`, which counts."""
    with open_raw(path, "rb") as file:
        return file.read()


def write_raw(path: Path, content: bytes) -> None:
    with open_raw(path, "wb") as file:
        file.write(content)


def power_cuts(root: Path, flags=FLAGS) -> list[Path]:
    """Folders, in order of time, in which the power went."""
    folder, crashes = workplace(root), root.with_name(f"{root.name}-crashes")
    crashes.mkdir()
    code = finish(start(folder, flags, lambda: Disk(Platter(Path(), crashes)), resume=False))
    assert code == 0, complain(folder, f"exit code {code}")
    return sorted(crashes.iterdir())


def check_cut(folder: Path, straight: dict, saved: int, flags=FLAGS) -> int:
    """A run goes on in it to the right end; nothing saved is lost. Returns the step saved there."""
    for name in ("last.pt", "best.pt"):
        if (folder / "run" / name).exists():
            lamoe.read(folder / "run" / name)  # whole, or it would not be there
    step = 0
    if (folder / "run" / "last.pt").exists():
        step = lamoe.read(folder / "run" / "last.pt")["done"]["step"]
    assert step >= saved, f"{folder.name}: step {saved} was saved and {step} is there"
    age_leftovers(folder)
    code = finish(start(folder, flags))
    assert code == 0, complain(folder, f"{folder.name}: exit code {code}")
    check_end(folder, straight, folder.name)
    return step


def power(root: Path, n: int) -> None:
    flags = [*FLAGS, "--tokenizer bpe --vocab_size 300"]
    straight, cuts, saved = straight_run(root / "straight", flags), power_cuts(root / "cut", flags), 0
    for cut in cuts:
        step = check_cut(cut, straight, saved if cut.name.endswith("least") else 0, flags)
        saved = step if cut.name.endswith("least") else saved
    print(f"power: {len(cuts)} different remains of a run, all went on to the same end")


CAMPAIGNS = {"kills": (kills, 300), "power": (power, 0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("campaign", choices=CAMPAIGNS)
    parser.add_argument("--n", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    campaign, n = CAMPAIGNS[args.campaign]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        campaign(Path(folder), args.n or n)
    print(f"{args.campaign}: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
