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
import dataclasses
import errno
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from importlib import import_module
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401 - once, not in each child
from bench_bpe import fuzz_text  # noqa: E402
from tiny_run import TINY, call, make_text  # noqa: E402

import bpe  # noqa: E402
import lamoe  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from data import datasets, exchange  # noqa: E402
from data.run import checkpoint  # noqa: E402

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
        end |= {
            f"{name}{path}": value for path, value in leaves(checkpoint.read(folder / "run" / name))
        }
        del end[f"{name}/done/seconds"]
    for name in ("log.csv", "load.csv"):
        with open(folder / "run" / name, newline="") as file:
            rows = [{**row, **dict.fromkeys(CLOCKS)} for row in csv.DictReader(file)]
        end[name] = rows
    end["leftovers"] = sorted(path.name for path in folder.rglob("*.tmp"))
    return end


def complain(folder: Path, what: str) -> str:
    said = (folder / "output.txt").read_text(errors="replace")
    return f"{what}; it said: ... {said[-300:]}"


def check_end(folder: Path, straight: dict, what: str) -> None:
    end = end_of(folder)
    differing = [
        path for path in straight.keys() | end.keys() if straight.get(path) != end.get(path)
    ]
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
            kills, patience = kills + 1, 1.03 * patience  # on a slow machine, too, it ends
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
    code = finish(start(folder, flags))
    assert code == 0, complain(folder, f"after a kill at event {n}: exit code {code}")
    check_end(folder, straight, f"after a kill at event {n}")


def fail_at(root: Path, n: int, number: int, straight: dict, flags=FLAGS) -> bool:
    """The same with an error of the disk: one line, no traceback. False if that didn't matter."""
    folder = workplace(root)

    def act(count, what, path):
        return number if count == n else None

    code = finish(start(folder, flags, lambda: Disk(act)))
    said = (folder / "output.txt").read_text()
    assert code in (0, 2) and "Traceback" not in said, complain(folder, f"event {n}: {code}")
    if code == 2:
        check_one_line(said)
        again = finish(start(folder, flags))
        assert again == 0, complain(folder, f"after an error at event {n}: exit code {again}")
    check_end(folder, straight, f"after an error at event {n}")
    return code == 2


def kills(root: Path, n: int, every: int) -> None:
    rng, done, runs = random.Random(0), 0, 0
    kinds = ["", "--router deepseek --top_k 1", "--tokenizer bpe --vocab_size 300", "--dtype bf16"]
    while done < n:
        flags = [
            "--steps 40 --log_every 2 --eval_every 10 --save_every 4",
            kinds[runs % len(kinds)],
        ]
        straight = straight_run(root / f"straight-{runs}", flags)
        done += random_kills(root / f"killed-{runs}", straight, flags, rng, 0.5)
        runs += 1
    print(f"kills: {done} at random moments of {runs} runs, all survived, bit-equal")
    flags = [*FLAGS, "--tokenizer bpe --vocab_size 300"]
    straight = straight_run(root / "straight", flags)
    happened = events(root / "events", flags)
    moments = range(1, len(happened) + 1, every)
    for at in moments:
        kill_at(root / f"kill-{at}", at, straight, flags)
        shutil.rmtree(root / f"kill-{at}")
    print(
        f"kills: {len(moments)} more, each before one of the {len(happened)} writes, flushes, "
        "renames and removals of a run"
    )


# ----------------------------------------------------------------------------------------------
# 3. Power cuts: what was flushed is there, and of the rest nothing or anything
# ----------------------------------------------------------------------------------------------


class Platter:
    """What of a folder would be left if the power went now; an `act` for Disk.

    Before each event it keeps two folders. `least`: of files only what was flushed, and of entries
    (new names, renames) only those of folders that were flushed after them. `most`: all entries,
    but zeros where data was not flushed, which is what a rename without a flush can leave. Their
    names end in the step of the last checkpoint whose saving had come back by then: the promise.
    """

    def __init__(self, folder: Path, crashes: Path):
        self.folder, self.crashes, self.content = folder.resolve(), crashes.resolve(), {}
        self.held = {}
        for path in (folder, *folder.rglob("*")):
            if path.is_file():
                self.content[path.stat().st_ino] = path.read_bytes()
        self.entries, self.seen, self.promised = self.list(self.folder), [], 0

    def list(self, folder: Path) -> dict[Path, int]:
        return {path: path.stat().st_ino for path in folder.iterdir()}

    def __call__(self, n: int, what: str, path) -> None:
        self.hold()
        for name, state in (("least", self.least()), ("most", self.most())):
            if (state, self.promised) not in self.seen:
                self.seen.append((state, self.promised))
                self.write(self.crashes / f"{n:04}-{name}-{self.promised}", state)
        if what == "fsync":
            self.flush(Path(os.readlink(f"/proc/self/fd/{path}")))

    def hold(self) -> None:
        """Opens each new file: one that is removed keeps its inode, or the next could be given it.

        The next would then be believed to hold what was flushed of the first.
        """
        for path in self.folder.rglob("*"):
            if path.is_file() and (inode := path.stat().st_ino) not in self.held:
                self.held[inode] = open_raw(path, "rb")

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


@contextlib.contextmanager
def promising(platter: Platter):
    """In it, the platter knows which checkpoints are said to be safe; it looks once more after."""

    def save(path, parts, save=checkpoint.save):
        save(path, parts)
        if Path(path).name == "last.pt":
            platter.promised = parts["done"]["step"]

    checkpoint.save = save
    with Disk(platter):
        yield
    platter(9999, "end", None)


def power_cuts(root: Path, flags=FLAGS) -> list[Path]:
    """Folders, in order of time, in which the power went."""
    folder, crashes = workplace(root), root.with_name(f"{root.name}-crashes")
    crashes.mkdir()
    code = finish(start(folder, flags, lambda: promising(Platter(Path(), crashes)), resume=False))
    assert code == 0, complain(folder, f"exit code {code}")
    return sorted(crashes.iterdir())


def check_cut(folder: Path, straight: dict, flags=FLAGS) -> int:
    """What was promised is there, and a run goes on from it to the right end; the step promised."""
    for name in ("last.pt", "best.pt"):
        if (folder / "run" / name).exists():
            checkpoint.read(folder / "run" / name)  # whole, or it would not be there
    step, promised = 0, int(folder.name.split("-")[-1])
    if (folder / "run" / "last.pt").exists():
        step = checkpoint.read(folder / "run" / "last.pt")["done"]["step"]
    assert step >= promised, f"{folder.name}: step {promised} was saved and {step} is there"
    code = finish(start(folder, flags))
    assert code == 0, complain(folder, f"{folder.name}: exit code {code}")
    check_end(folder, straight, folder.name)
    return promised


def power(root: Path, n: int, every: int) -> None:
    flags = [*FLAGS, "--tokenizer bpe --vocab_size 300"]
    straight, cuts = straight_run(root / "straight", flags), power_cuts(root / "cut", flags)
    promised = {check_cut(cut, straight, flags) for cut in cuts[::every]}
    assert promised == {0, 3, 6, 9, 12} or every > 1, promised
    print(f"power: {len(cuts[::every])} different states of a disk, all went on to the same end")


# ----------------------------------------------------------------------------------------------
# 4. Damaged and hostile files
# ----------------------------------------------------------------------------------------------


def verdict(read, path, seconds=20) -> str | None:
    """What read(path) complained of, in one line; None if it took it. All else is an error."""

    def too_long(number, frame):
        raise AssertionError(f"{path}: still at it after {seconds} seconds")

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    try:
        read(path)
    except (ValueError, OSError) as error:
        message = str(error)
        assert 10 < len(message) < 600 and "\n" not in message, f"{path}: {message!r}"
        return message
    finally:
        signal.alarm(0)
    return None


def flipped(content: bytes, rng, bits: int = 1) -> bytes:
    changed = bytearray(content)
    for _ in range(bits):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def damages(content: bytes, flips: int, rng):
    """Yields the content cut at every 4 KiB and with flipped bits."""
    for size in range(0, len(content), 4096):
        yield content[:size]
    for _ in range(flips):
        yield flipped(content, rng)


def damage_checkpoint(path: Path, flips: int, rng) -> tuple[int, int]:
    """Each damaged copy of a checkpoint is as the whole one, or refused: (all, refused)."""
    whole, content, copy = (
        dict(leaves(checkpoint.read(path))),
        path.read_bytes(),
        path.with_name("copy"),
    )
    n = refused = 0

    def read(copy):
        assert dict(leaves(checkpoint.read(copy))) == whole, "other values than were saved"
        exchange.load(copy)

    for n, damaged in enumerate(damages(content, flips, rng), 1):
        copy.write_bytes(damaged)
        refused += verdict(read, copy) is not None
    return n, refused


def damage_others(folder: Path, flips: int, rng) -> tuple[int, int]:
    """The same for what has no checksum: no traceback, no hang, one line."""
    exchange.export(*exchange.load(folder / "good.pt"), folder / "hf")
    with zipfile.ZipFile(folder / "texts.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in "abc":
            archive.writestr(f"{name}.txt", make_text(300))
    (folder / "table.csv").write_text("page,text\n" + "a,some text\n" * 50)
    (folder / "lines.jsonl").write_text('{"text": "some text"}\n' * 50)
    tokenizer = bpe.Tokenizer.train([make_text()], 280)
    tokenizer.save(folder / "tokenizer.bpe")
    readers = {path: lambda _: exchange.load(folder / "hf") for path in (folder / "hf").iterdir()}
    for name in ("texts.zip", "table.csv", "lines.jsonl"):
        readers[folder / name] = read_all
    readers[folder / "tokenizer.bpe"] = lambda path: bpe.Tokenizer.load(path).encode("some text")
    n = refused = 0
    for path, read in readers.items():
        content = path.read_bytes()
        for damaged in damages(content, flips, rng):
            path.write_bytes(damaged)
            n, refused = n + 1, refused + (verdict(read, path) is not None)
        path.write_bytes(content)
    return n, refused


def read_all(path) -> None:
    corpus = datasets.read(str(path))
    for side in (corpus.train, corpus.val):
        list(side)


class Runs:
    """What a pickle could run: it would leave a file."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def forged(path: Path, parts, change) -> Path:
    """A checkpoint whose pickle was changed by change(bytes) -> bytes."""
    torch.save(parts, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, change(content) if name.endswith("data.pkl") else content)
    return path


def long(number: int) -> bytes:
    """As a pickle writes it."""
    return b"\x8a\x08" + number.to_bytes(8, "little", signed=True)


def hostile_checkpoints(folder: Path):
    """Yields (what it is, path)."""
    good = checkpoint.read(folder / "good.pt")
    config, model = good["config"], good["model"]
    name, weight = next(iter(model.items()))
    marker = str(folder / "marker")

    def save(what: str, checkpoint) -> tuple[str, Path]:
        path = folder / "hostile.pt"
        torch.save(checkpoint, path)
        return what, path

    for what, run in {
        "os.system": Runs(os.system, f"touch {marker}"),
        "open": Runs(open, marker, "w"),
        "eval": Runs(eval, f"open({marker!r}, 'w')"),
        "exec": Runs(exec, f"open({marker!r}, 'w')"),
        "os.mkdir": Runs(os.mkdir, marker),
        "torch.load": Runs(torch.load, marker),
    }.items():
        yield save(f"a pickle that calls {what}", {**good, "model": run})
        yield save(f"one that calls {what} as a key", {**good, "config": {**config, "dim": run}})
    torch.save(good, folder / "hostile.pt", _use_new_zipfile_serialization=False)
    yield "an old file without checksums", folder / "hostile.pt"
    (folder / "hostile.pt").write_bytes(pickle.dumps(Runs(os.system, f"touch {marker}")))
    yield "a bare pickle", folder / "hostile.pt"

    one = weight.new_zeros(1)
    yield save("10^12 elements from one", {**good, "model": {**model, name: one.expand(10**12)}})
    vast = {**config, "vocab_size": 10**6, "dim": 10**6}
    yield save("the same, and config", {**vast_model(good, vast, one)})
    meta = torch.empty(10**12, device="meta")
    yield save("10^12 elements on no device", {**good, "model": {**model, name: meta}})
    for numel, size, stride in ((10**12, 10**12, 1), (10**6, 10**6, 1), (4, 10**12, 0)):

        def change(pickled, numel=numel, size=size, stride=stride):
            pickled = pickled.replace(b"K\x04tq", long(numel) + b"tq", 1)
            shape = b"K\x00" + long(size) + b"\x85q\x0c" + long(stride) + b"\x85"
            return pickled.replace(b"K\x00K\x04\x85q\x0cK\x01\x85", shape, 1)

        small = {"config": {}, "model": {"a": torch.arange(4.0)}}
        yield f"{numel} numbers claimed", forged(folder / "hostile.pt", small, change)
    with zipfile.ZipFile(folder / "hostile.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"0" * 10**8)
    yield "a zip bomb", folder / "hostile.pt"

    nested = itself = []
    for _ in range(64):
        nested = [nested, nested]
    itself.append(itself)
    yield save("2^64 lists in 64", {**good, "more": nested})
    yield save("a list that holds itself", {**good, "more": itself})
    deep = []
    for _ in range(300):
        deep = [deep]
    yield save("lists 300 deep as a number", {**good, "config": {**config, "dim": deep}})

    for field, values in {
        "dim": (10**9, 10**30, -16, 0, 16.0, "16", True, None, [16]),
        "n_layers": (10**9, -1, 0, 2.5, 3),
        "vocab_size": (10**12, -5, 256),
        "seq_len": (10**12, 10**8, -1),
        "n_experts": (10**12, 10**6, -1, 5),
        "n_heads": (10**9, -2, 3),
        "head_dim": (10**9, -2),
        "hidden_dim": (10**12, -1),
        "rope_theta": (float("nan"), float("inf"), -1.0, "big"),
        "norm_eps": (float("nan"), -1.0),
        "router": ("magic", 3, None, ["topk"]),
        "top_k": (10**9, -1, 0),
        "n_groups": (10**9, 0),
        "wings": (2,),
    }.items():
        for value in values:
            changed = {**good, "config": {**config, field: value}}
            yield save(f"config {field}={value!r:.20}", changed)
    for what, value in {
        "nan": torch.full_like(weight, float("nan")),
        "one nan": torch.cat([weight.flatten()[1:], one * float("nan")]).view_as(weight),
        "infinities": torch.full_like(weight, float("-inf")),
        "another shape": weight.T.contiguous(),
        "no tensor": 3.0,
        "text": "weights",
        "sparse": weight.to_sparse(),
        "an empty tensor": weight.new_zeros(0),
    }.items():
        yield save(f"weights: {what}", {**good, "model": {**model, name: value}})
    yield save("no weights", {**good, "model": {}})
    yield save("weights in a list", {**good, "model": list(model.values())})
    yield save("a config in a list", {**good, "config": [1, 2]})
    yield save("more weights", {**good, "model": {**model, "more": weight}})
    for what, tokenizer in {
        "other merges": {**good["tokenizer"], "merges": [[97, 98]]},
        "merges of nothing": {**good["tokenizer"], "merges": [[900, 901]]},
        "merges of text": {**good["tokenizer"], "merges": ["ab"]},
        "no merges": {"pattern": "x"},
        "a list": [1, 2],
        "a number": 7,
        "a tensor": weight,
        "another pattern": {**good["tokenizer"], "pattern": "."},
        "a foreign one that is none": {"tokenizer.json": "{}", "vocab_size": 257, "eot": 256},
        "a foreign one without sizes": {"tokenizer.json": "{}"},
    }.items():
        yield save(f"tokenizer: {what}", {**good, "tokenizer": tokenizer})


def vast_model(good: dict, config: dict, one) -> dict:
    """Weights of a config too large for any memory, each of one stored number."""
    with torch.device("meta"):
        shapes = {
            name: w.shape for name, w in lamoe.LaMoE(lamoe.Config(**config)).state_dict().items()
        }
    return {**good, "config": config, "model": {name: one.expand(s) for name, s in shapes.items()}}


def attack(folder: Path) -> int:
    """How many hostile checkpoints were refused: all, without running or allocating anything."""
    n = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for n, (what, path) in enumerate(hostile_checkpoints(folder), 1):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        said = verdict(exchange.load, path)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        assert said, f"{what} was taken"
        assert not (folder / "marker").exists(), f"{what} ran"
        assert grown < 100, f"{what} took {grown:.0f} MB"
    return n


def make_good(folder: Path) -> Path:
    """A checkpoint of a tiny model that sampling reads, and one that a run goes on from."""
    workplace(folder)
    code = finish(start(folder, resume=False))
    assert code == 0, complain(folder, f"exit code {code}")
    shutil.copy(folder / "run" / "best.pt", folder / "good.pt")
    return folder


def confined(action, gigabytes: float = 1.0):
    """action() in a child that may reserve so much more memory; what it returned."""
    reader, writer = os.pipe()
    if not (pid := os.fork()):
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            most = used + int(gigabytes * 2**30)
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            os.write(writer, json.dumps(action()).encode())
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(70)
    code = finish(pid)
    os.close(writer)
    with open(reader) as file:
        assert code == 0, f"the child ended with {code}"
        return json.loads(file.read())


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int):
    """A disk of that size at a folder: for root only."""
    folder.mkdir(parents=True)
    how = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    subprocess.run(how, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def full_disk(root: Path, kilobytes: int, straight: dict, flags=FLAGS) -> bool:
    """A run on a small disk ends, or stops with one line and goes on once there is room."""
    with small_disk(root, kilobytes):
        folder = workplace(root / "in")
        code = finish(start(folder, flags))
        said = (folder / "output.txt").read_text()
        assert code in (0, 2) and "Traceback" not in said, complain(folder, f"{kilobytes} KB")
        if code == 2:
            check_one_line(said)
            for name in ("last.pt", "best.pt"):
                if (folder / "run" / name).exists():
                    checkpoint.read(folder / "run" / name)
            subprocess.run(["mount", "-o", "remount,size=50m", str(root)], check=True)
            again = finish(start(folder, flags))
            assert again == 0, complain(folder, f"{kilobytes} KB, then 50 MB: exit code {again}")
        check_end(folder, straight, f"{kilobytes} KB")
    return code == 2


def check_one_line(said: str) -> None:
    error = said[said.index("error: ") :].rstrip()
    assert "\n" not in error and "; " in error, f"not one line with a remedy: {error}"


def disks(root: Path, every: int) -> None:
    straight, stopped = straight_run(root / "straight"), 0
    happened = events(root / "events")
    moments = range(1, len(happened) + 1, every)
    for at in moments:
        for number in (errno.ENOSPC, errno.EIO):
            stopped += fail_at(root / f"{at}-{number}", at, number, straight)
            shutil.rmtree(root / f"{at}-{number}")
    print(f"files: {2 * len(moments)} full and failing disks; {stopped} stopped a run, none lost")
    if os.geteuid() == 0 and every == 1:  # only root may mount
        sizes = range(16, 420, 4)
        stopped = sum(full_disk(root / f"{size}", size, straight) for size in sizes)
        print(f"files: {len(sizes)} real disks of 16 to 416 KB; {stopped} were full, none lost")


def files(root: Path, n: int, every: int) -> None:
    folder, rng = make_good(root / "good"), random.Random(0)
    datasets.CACHE = root / "cache"
    print(f"files: {confined(lambda: attack(folder))} hostile checkpoints refused")
    tried, refused = confined(lambda: damage_checkpoint(folder / "run" / "last.pt", n, rng))
    print(f"files: {tried} cuts and flips of a checkpoint: {refused} refused, the rest as saved")
    tried, refused = confined(lambda: damage_others(folder, n // 10, rng))
    print(
        f"files: {tried} of config.json, safetensors, tokenizers, zips, tables: {refused} refused"
    )
    disks(root / "disks", every)


# ----------------------------------------------------------------------------------------------
# 5. Fuzzing
# ----------------------------------------------------------------------------------------------


def fuzz_strings(n: int, rng) -> int:
    """Each string comes back from its ids, from a tokenizer of each size; characters tried."""
    texts = [fuzz_text(rng) for _ in range(2000)]
    tokenizers, size = [bpe.Tokenizer.train(texts, v) for v in (257, 400, 2000)], 0
    for i in range(n):
        text, tokenizer = fuzz_text(rng), tokenizers[i % 3]
        assert tokenizer.decode(tokenizer.encode(text)) == text, repr(text)
        size += len(text)
    return size


VALUES = (
    "0 1 -1 2 3 7 16 1000000000000 1e400 nan inf -inf 0.5 1e-9 '' x ../x / . ~ NUL %s {} é 😀 -- -"
)
VALUES = [*VALUES.split(), "", " ", "a\nb", "\0", "x" * 5000, "nowhere.txt", "text.txt", "run"]
BESIDES = {  # flags that argparse has beside the fields
    "train.py": "--resume --plot --help --no-qk_norm --qk_norm",
    "sample.py": "Hello --model --dtype --max_new_tokens --temperature --top_k --top_p --min_p "
    "--repetition_penalty --stop --seed -n --device --show_experts --text --layer --html --help",
    "bpe.py": "text.txt --vocab_size --out --help",
    "export.py": "good.pt hf2 run hf.gguf",
    "datasets.py": "stories nothing --limit --help",
}


def command_line(rng) -> tuple[str, list[str]]:
    """A program and arguments, most of them nonsense."""
    program = rng.choice(
        ["train.py"] * 4 + ["sample.py"] * 3 + ["bpe.py", "export.py", "datasets.py"]
    )
    words, known = [], BESIDES[program].split()
    if program == "train.py":
        fields = [*dataclasses.fields(train.TrainConfig), *dataclasses.fields(lamoe.Config)]
        known += [f"--{field.name}" for field in fields]
        words = ["--data", "text.txt", *TINY, "--steps", "1"] * (rng.random() < 0.8)
    if program == "sample.py" and rng.random() < 0.8:
        words = ["Hello", "--model", "good.pt", "--max_new_tokens", "3"]
    for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 6))):
        words.append(rng.choice(known) if rng.random() < 0.9 else rng.choice(VALUES))
        if rng.random() < 0.7:
            words.append(rng.choice(VALUES))
    return program, words


def fuzz_commands(folder: Path, n: int, rng, seconds: int = 60) -> dict[int, int]:
    """Exit codes of n command lines, run in a good folder: 0, 2 or 130 and never a traceback.

    Whatever training begins is stopped after its first step.
    """

    def too_long(number, frame):
        raise AssertionError(f"still at it after {seconds} seconds")

    def stopped_training(run, stop, training=train.train):
        stop.append(signal.SIGINT)
        training(run, stop)

    train.train = stopped_training
    signal.signal(signal.SIGALRM, too_long)
    programs = {"train.py": train, "sample.py": sample, "bpe.py": bpe, "datasets.py": datasets}
    programs["export.py"], codes = import_module("data.exchange.export"), Counter()
    os.chdir(folder)
    sys.modules["mlflow"] = sys.modules["matplotlib"] = None  # both slow, and both optional
    for _ in range(n):
        program, words = command_line(rng)
        out, error = io.StringIO(), io.StringIO()
        sys.stdin = io.StringIO("a prompt\n\nexit\n")
        signal.alarm(seconds)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
                code = call(programs[program], *words)
            signal.alarm(0)
        except BaseException as problem:
            raise AssertionError(f"{program} {words}: {problem!r:.300}") from problem
        said = error.getvalue()
        assert code in (0, 2, 130), f"{program} {words}: {code}"
        if code == 2:
            assert said.count("\n") == 1 and ": " in said, f"{program} {words}: {said!r}"
        codes[code] += 1
        for run in Path("runs").glob("*"):
            shutil.rmtree(run)
    return dict(codes)


def some_config(rng) -> dict:
    """Values for some fields of Config, right and wrong ones."""
    numbers = [-1, 0, 1, 1, 2, 2, 3, 4, 5, 8, 12, 16, 64, 1.0, 0.5, True, None, "8", float("nan")]
    others = [1e-5, 0.01, 10_000.0, 1e30, -0.5, *lamoe.ROUTERS, "magic", 10**25]
    small = {"vocab_size": 23, "dim": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1}
    small |= {"hidden_dim": 12, "seq_len": 8, "router": rng.choice([*lamoe.ROUTERS])}
    fields = [field.name for field in dataclasses.fields(lamoe.Config)]
    for field in rng.sample(fields, rng.choice((1, 1, 2, 3, 5))):
        small[field] = rng.choice(numbers if rng.random() < 0.8 else others)
    return small


def fuzz_configs(n: int, rng) -> int:
    """Each makes a model that trains and writes, or a ValueError that names a field."""
    working = 0
    for _ in range(n):
        values = some_config(rng)
        try:
            config = lamoe.Config(**values)
        except ValueError as error:
            named = [name for name in values if name in str(error)]
            assert named and "\n" not in str(error), f"{values}: {error}"
            continue
        model = lamoe.LaMoE(config).train()
        length = min(config.seq_len, 4)
        ids = torch.randint(config.vocab_size, (2, length))
        out = model(ids, ids)
        (out.loss + out.aux).backward()
        assert out.loss.isfinite(), values
        if config.eval_capacity_factor is None and config.seq_len > 1:
            new = list(model.eval().generate(ids[:, :1], config.seq_len - 1))
            assert len(new) == config.seq_len - 1, values
        working += 1
    return working


def fuzz_routers(n: int, rng) -> int:
    """Logits as extreme as fp32 has: chosen experts exist and differ, weights are finite."""
    scales = (0.0, 1e-30, 1.0, 50.0, 1e4, 1e10, 1e18)
    for i in range(n):
        name, k = rng.choice(sorted(lamoe.ROUTERS)), rng.choice((1, 2, 3))
        c = lamoe.Config(vocab_size=9, dim=8, n_heads=2, n_experts=4, top_k=k, router=name)
        router = lamoe.ROUTERS[name](c).train(rng.random() < 0.5)
        with torch.no_grad():
            for weight in router.parameters():
                weight.normal_(std=rng.choice(scales))
        x_1TD = torch.randn(1, rng.choice((1, 2, 17)), 8) * rng.choice(scales)
        if rng.random() < 0.2:
            x_1TD[:, 0] = x_1TD[:, -1]
        ids_1T = torch.zeros(x_1TD.shape[:2], dtype=torch.long)
        routing, what = router(x_1TD, ids_1T), f"{name}, top {k}, {i}"
        chosen, weights = routing.experts_NA.tolist(), routing.weights_NA
        assert all(len({*row}) == len(row) and {*row} <= {0, 1, 2, 3} for row in chosen), what
        assert weights.isfinite().all() and 0 <= weights.min() and weights.max() <= 1, what
        assert router.load(routing.experts_NA).sum().sub(1).abs() < 1e-5, what
        assert not torch.as_tensor(routing.balance + routing.z).isnan(), what
    return n


def fuzz(root: Path, n: int, every: int) -> None:
    rng = random.Random(0)
    print(f"fuzz: {fuzz_routers(n // 100, rng)} router inputs of up to 10^36")
    working = fuzz_configs(n // 500, rng)
    print(f"fuzz: {n // 500} configs: {working} models that work, the rest name their mistake")
    folder, datasets.CACHE = make_good(root / "good"), root / "cache"
    print(f"fuzz: {n // 1000} command lines, by exit code: {fuzz_commands(folder, n // 1000, rng)}")
    print(f"fuzz: {n} strings of {fuzz_strings(n, rng)} characters came back from their ids")


CAMPAIGNS = {
    "kills": (kills, 300),
    "power": (power, 0),
    "files": (files, 10_000),
    "fuzz": (fuzz, 10**6),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("campaign", choices=CAMPAIGNS)
    parser.add_argument("--n", type=int, help="how many random kills, damaged files or strings")
    parser.add_argument("--every", type=int, default=1, help="of all moments each N-th: faster")
    args = parser.parse_args()
    torch.set_num_threads(1)
    campaign, n = CAMPAIGNS[args.campaign]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        campaign(Path(folder), args.n or n, args.every)
    print(f"{args.campaign}: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
