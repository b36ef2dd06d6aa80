"""A run on disk: its folder, what last.pt and best.pt hold of it, and how it goes on from there."""

import dataclasses
import errno
import math
import os
import re
from pathlib import Path

import torch
from torch import Tensor

import lamoe
from data.run import checkpoint, ranks
from data.run.files import first_free, lock_folder, make_folder, remove_leftovers
from data.run.flags import first_line, quoted
from data.run.log import print_line
from data.run.presets import PLACES
from data.run.routers import RouterNeeded, run_and_router

RUN_FILES = ("last.pt", "best.pt", "plateau.pt", "log.csv", "load.csv", "config.json")
NOTHING_DONE = {"step": 0, "seconds": 0.0, "best": math.inf, "best_step": 0}
WHERE = PLACES - {"data"}  # flags that tell nothing of what a new run would be
ADDED = {"suffix": "", "decay": 1.0, "freeze_router": False}  # settings that older runs lack
TYPES = {"given": dict, "train_config": dict, "tokenizer": dict, "text": str, "done": dict}
TYPES |= {"optimizers": list, "meter": list, "rng": Tensor}  # of the parts of last.pt


def find_run(flags: dict, resuming: bool, train_config) -> tuple:
    """(folder, its lock if it is there already, what last.pt holds if the run goes on from it).

    A run without a usable last.pt starts over. Its flags were in that file, and the default ones
    might be those of another run: ValueError if they are not given.
    """
    find = folder_to_resume if resuming else new_folder
    folder = ranks.same_on_all(lambda: find(flags))
    if not ranks.same_on_all(lambda: resuming and folder.is_dir()):
        return folder, None, None
    lock = lock_folder(folder) if ranks.RANK == 0 else None
    saved = read_run(folder / "last.pt", train_config)
    if saved and flags.get("steps", 0) > saved["train_config"]["steps"]:
        saved = before_decay(folder, saved, train_config)
    if not saved:
        if not flags.keys() - WHERE - {"steps", "router"}:  # with these, runs go on
            again = f"python train.py --resume --out {quoted(folder)} --data stories"
            raise ValueError(
                f"{folder} has no usable checkpoint, and without one its flags are not known; "
                f"repeat them, at least --data: {again}"
            )
        kept = "; what is there gets .old" if holds_a_run(folder) else ""
        print_line(f"           no usable checkpoint in {folder}: starting over{kept}")
    return folder, lock, saved


def new_folder(flags: dict) -> Path:
    """The folder of a new run, not made yet: never one in which a run already is."""
    if flags.get("out"):
        folder = Path(flags["out"])
    else:
        folder = first_free(Path("runs") / Path(flags.get("data", "stories")).resolve().stem[:60])
    if holds_a_run(folder):
        raise ValueError(
            f"{folder} already holds a run; go on: python train.py --resume --out "
            f"{run_and_router(folder, flags.get('router', ''))}; or choose another --out"
        )
    existing = next(f for f in (folder, *folder.absolute().parents) if f.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"{folder}: {existing} is no folder to write in; choose another --out")
    return folder


def holds_a_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in RUN_FILES)


def folder_to_resume(flags: dict) -> Path:
    """--out, or the newest run; with the flags of a new run, a new folder if there is none.

    So a command with --resume always goes on or begins, even if it was killed before its folder
    was made.
    """
    runs = sorted(Path("runs").glob("*/log.csv"), key=lambda path: path.stat().st_mtime)
    if "out" not in flags and runs:
        return runs[-1].parent
    folder = Path(flags.get("out") or "runs")
    if flags.get("out") and folder.is_dir():
        return folder
    if flags.keys() - WHERE and not folder.is_file():
        return new_folder(flags)
    if flags.get("out"):
        raise ValueError(
            f"{folder}: no such run to resume; start one: python train.py --out {quoted(folder)}"
        )
    raise ValueError("no run in runs/ to resume; start one: python train.py")


def claim(folder: Path, lock, keep_files: bool):
    """Makes, locks and cleans the folder; returns the lock, or the one that there was already.

    Files of an earlier run are kept or renamed: a fresh start overwrites nothing of theirs.
    """
    make_folder(folder)
    lock = lock or lock_folder(folder)
    remove_leftovers(folder, *RUN_FILES)
    for path in (folder / name for name in RUN_FILES if not keep_files):
        if path.exists():
            os.rename(path, first_free(f"{path}.old"))
    return lock


def save_run(run, name: str) -> None:
    """last.pt: all that a run goes on from; plateau.pt: the same, of when its rates began to fall;
    best.pt: what sampling needs. Rank 0 writes.
    """
    parts = {
        "config": dataclasses.asdict(run.model.config),
        "train_config": dataclasses.asdict(run.settings),
        "given": {k: v for k, v in run.flags.items() if k not in PLACES},
        "tokenizer": run.data.tokenizer.state(),
        "text": run.data.corpus.key,  # what it trains on: a resume notices another text
        "floor": run.data.corpus.floor,  # of the loss, for pictures
        "model": ranks.full_state(run.model.state_dict()),
        "done": run.done,
    }
    if name != "best.pt":
        parts["optimizers"] = [ranks.full_state(o.state_dict()) for o in run.optimizers]
        parts["meter"] = [lamoe.global_mean(run.meter.scalars), run.meter.load]
        parts["rng"] = torch.get_rng_state()
        if run.settings.device == "cuda":
            parts["cuda_rng"] = torch.cuda.get_rng_state()
    if ranks.RANK == 0:
        checkpoint.save(run.folder / name, parts)


def before_decay(folder: Path, saved: dict, train_config) -> dict:
    """Where a run that gets more steps goes on: before its rates fell, if plateau.pt is of then.

    They need not rise again, and the steps with low ones were not in vain: best.pt stays.
    """
    plateau = read_run(folder / "plateau.pt", train_config)
    if not plateau or plateau["train_config"]["steps"] != saved["train_config"]["steps"]:
        return saved  # plateau.pt is of the decay before this one
    best = min(saved["done"], plateau["done"], key=lambda done: done["best"])
    best = {name: best[name] for name in ("best", "best_step")}
    return {**plateau, "done": {**plateau["done"], **best}}


def read_run(path: Path, train_config) -> dict | None:
    """What last.pt holds, its tokenizer built; None, and why, if a run can't go on from it.

    If it can't be read at all, that is an OSError: it may be as good as ever.
    """
    if not path.exists():
        return None
    try:
        saved = checkpoint.read(path)
        wrong = [name for name, kind in TYPES.items() if not isinstance(saved.get(name), kind)]
        if wrong := wrong or sorted(NOTHING_DONE.keys() - saved["done"].keys()):
            raise ValueError(f"{path} lacks {wrong}")
        _, tokenizer = checkpoint.build(saved, path)
        settings = {**ADDED, **saved["train_config"]}
        if settings.keys() != {f.name for f in dataclasses.fields(train_config)}:
            raise ValueError(f"{path} is from another version of train.py")
        train_config(**settings)
        return {**saved, "train_config": settings, "tokenizer": tokenizer}
    except RouterNeeded:
        raise
    except (ValueError, TypeError) as error:
        print_line(f"resume     {error}")
        return None


def check_text(saved: dict, corpus, name: str) -> None:
    """ValueError unless a run's text is the one it began with.

    The key of an embedded corpus was once a hash of the code that writes it: 12 digits. Such a run
    goes on, because the text itself has not changed since.
    """
    old_key = rf"{re.escape(corpus.name)}-[0-9a-f]{{12}}"
    if saved["text"] != corpus.key and not (corpus.floor and re.fullmatch(old_key, saved["text"])):
        raise ValueError(
            f"the text of {name} is not the one this run began with; bring that back, or "
            f"start a new run with another --out"
        )


def restore(saved: dict, run) -> None:
    """Optimizers, meter and random numbers as they were, and how far the run is.

    The weights are in the model already, and batches need no state: the step says which is next.
    """
    try:
        for optimizer, state in zip(run.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
            for weight, values in optimizer.state.items():
                for name, value in values.items():
                    if value.shape not in ((), weight.shape):
                        raise ValueError(f"{name} of shape {[*value.shape]}")
                    values[name] = ranks.shard_like(weight, value)
        run.meter.scalars[: len(saved["meter"][0])].copy_(saved["meter"][0])  # an old one has five
        run.meter.load.copy_(saved["meter"][1])
        torch.set_rng_state(saved["rng"])
        if "cuda_rng" in saved and torch.cuda.is_available():
            torch.cuda.set_rng_state(saved["cuda_rng"])
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        path = run.folder / "last.pt"
        raise ValueError(
            f"{path} does not fit this version of train.py ({first_line(error)}); start a new run "
            f"from its weights: --init {quoted(path)}"
        ) from None
    run.done = saved["done"]
    print_line(f"resume     {run.folder} at step {run.done['step']} of {run.settings.steps}")


GO_ON = "then the same command goes on, with --resume once it has trained"
REMEDIES = {  # an error of the disk, and what to do
    errno.ENOSPC: f"; make room, {GO_ON}",
    errno.EDQUOT: f"; make room, {GO_ON}",
    errno.EFBIG: f"; ulimit -f or the disk's format forbids it: lift that, {GO_ON}, "
    "or choose another --out",
    errno.EROFS: f"; make it writable, {GO_ON}, or choose another --out",
    errno.EACCES: f"; close it elsewhere and see that it can be read and written, {GO_ON}",
    errno.ENOENT: "; was it taken away? start again, or choose another --out",
    errno.EIO: "; the disk fails: copy what is there, and choose another --out",
}


def remedy(error: Exception) -> str:
    """What to add to the line of an error."""
    if type(error).__module__.startswith("torch._dynamo"):  # a router of one's own, of many shapes
        return "; try --no-compile"
    return REMEDIES.get(getattr(error, "errno", None), "")
