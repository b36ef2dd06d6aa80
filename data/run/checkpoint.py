"""Checkpoints: written atomically, and read as data that may be damaged or hostile.

A checkpoint is a dict that torch.save wrote. Every one has "config" (fields of lamoe.Config),
"model" (the state dict) and "tokenizer" (its state, or None).
"""

import contextlib
import os
import re
import sys
import zipfile
from pathlib import Path
from types import NoneType

import torch
from torch import Tensor

import bpe
import lamoe
from data.foreign import tokenizer_from_state
from data.run.files import replacing
from data.run.flags import first_line
from data.run.routers import BUILT_IN, FILES, RouterNeeded, check_router, with_built_in

WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+|_orig_mod\.")  # in names, of DDP and torch.compile


def save(path, checkpoint: dict) -> None:
    """Writes a dict of tensors and plain types; `path` is always complete, the old or the new."""
    with replacing(path) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # torch hides an error of the disk behind one of its own
            raise error.__context__ or error from None


def read(path) -> dict:
    """The dict that `save` wrote. weights_only: a checkpoint is data and can't run code."""
    try:
        check_archive(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        check_parts(checkpoint, os.path.getsize(path))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; make one with: python train.py") from None
    except OSError as error:  # the file may be fine: nobody can tell
        raise OSError(f"{path} can't be read: {error.strerror or error}") from None
    except Exception as error:  # zip, pickle and unpickling errors have no common class
        reason = first_line(error)[:120]
        if held := re.search(r"Unsupported global: GLOBAL ([\w.]+)", str(error)):
            reason = (
                f"it holds a {held[1]:.80}, not only tensors and plain types, as those of asdict"
            )
        wrong = f"{path} is not a readable checkpoint ({reason})"
        raise ValueError(f"{wrong}; {what_instead(Path(path))}") from None
    if not isinstance(checkpoint, dict) or not {"config", "model"} <= checkpoint.keys():
        raise ValueError(f"{path} is not a LaMoE checkpoint; make one with: python train.py")
    return checkpoint


def what_instead(path: Path) -> str:
    """What to do where this file is no checkpoint."""
    for other in (path.parent / "best.pt", path.parent / "last.pt"):
        if other.exists() and other != path:
            return f"try {other}"
    if (path.parent / "config.json").exists():  # a file of a Hugging Face folder
        return f"name its folder, {path.parent}"
    if path.suffix.lower() == ".gguf":
        return "name what it was made of: GGUF files are only written here"
    return "use another, or train again"


def check_archive(path) -> None:
    """ValueError unless each record of a torch file is as it was written.

    The file is a zip with a CRC-32 of every record, which torch.load itself does not look at: one
    flipped bit would be a wrong weight. Compressed records, as torch never writes them, could
    unpack to any size.
    """
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("it is compressed")
        if sum(record.file_size for record in records) > os.path.getsize(path):
            raise ValueError("its records are larger than the file")
        if damaged := archive.testzip():
            raise ValueError(f"damaged: {damaged} differs from its checksum")


def check_parts(checkpoint, size: int) -> None:
    """ValueError unless a checkpoint is of tensors and plain types that a file of `size` can hold.

    A tensor may claim 10^12 elements by repeating one, and a list may hold itself: code that copies
    the one or walks through the other must not meet them. (Tied weights are stored once and held
    twice.)
    """
    waiting, n, claimed = [checkpoint], 1, 0
    while waiting:
        part = waiting.pop()
        if isinstance(part, Tensor):
            claimed += part.nbytes
        elif isinstance(part, (dict, list, tuple)):
            n += len(part)
            waiting += part.values() if isinstance(part, dict) else part
        elif not isinstance(part, (str, bytes, int, float, NoneType)):
            raise ValueError(f"it holds a {type(part).__name__}")
        if claimed > 2 * size or n > size:
            raise ValueError("it claims to hold more than the file is large")


def build(checkpoint: dict, path):
    """(model, tokenizer or None) from what `read` returned; path is for the messages."""
    router = check_router(checkpoint["config"], path)
    try:
        config = lamoe.Config(**checkpoint["config"])
        weights = {WRAPPERS.sub("", name): w for name, w in checkpoint["model"].items()}
        check_shapes(config, weights)
        with Unfilled() if router in BUILT_IN else contextlib.nullcontext():
            model = lamoe.LaMoE(config)
        model.load_state_dict(weights)
    except (TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        if router in FILES:  # perhaps it is another one's file
            remedy = "name the file that it was trained with"
            raise RouterNeeded(f"{path} does not fit {FILES[router]}, {remedy}: {reason}") from None
        raise ValueError(f"{path} does not fit this version of LaMoE: {reason}") from None
    state = checkpoint.get("tokenizer")
    try:
        tokenizer = None if state is None else tokenizer_from_state(state)
        if tokenizer and (made := state.get("unicode", bpe.UNICODE)) != bpe.UNICODE:
            print(
                f"{path}: its tokenizer has the letters of Unicode {made!r:.9}, here are those of "
                f"{bpe.UNICODE}: new ones get other ids; regex>=2025.10.22,<2026.9.29 has 17",
                file=sys.stderr,
            )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: its tokenizer is unusable: {reason}; train again") from None
    if tokenizer and tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"{path}: its tokenizer has {tokenizer.vocab_size} tokens, "
            f"its model {model.config.vocab_size}; they are not from one training run"
        )
    check_finite(model, path)
    return model, tokenizer


class Unfilled(torch.overrides.TorchFunctionMode):
    """Inside, torch.nn.init leaves tensors as they are."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", "") == "torch.nn.init":
            return (*args, *kwargs.values())[0]
        return function(*args, **kwargs)


@contextlib.contextmanager
def shapes_only():
    """Models made inside have shapes, no memory, and are not filled: random numbers of no memory
    would make torch import its compiler, which takes longer than all else of a start.
    """
    with torch.device("meta"), Unfilled():
        yield


def check_shapes(config: lamoe.Config, weights: dict) -> None:
    """ValueError unless the weights fit the config; nothing of the size it claims is allocated."""
    if config.n_layers > len(weights):
        raise ValueError(f"{config.n_layers} layers are not in its {len(weights)} tensors")
    if config.seq_len * config.head_size > 1 << 26:  # RoPE's tables: no weight has their size
        raise ValueError(f"seq_len={config.seq_len} is more than a checkpoint may ask for")
    with shapes_only():
        model = lamoe.LaMoE(with_built_in(config))
        if config.router not in BUILT_IN:  # what it holds is known when its code has run
            others = {name: w for name, w in weights.items() if ".ffn.router." not in name}
            routers = {name: w for name, w in model.state_dict().items() if ".ffn.router." in name}
            weights = others | routers
        model.load_state_dict(weights, assign=True)


def check_finite(model: lamoe.LaMoE, path) -> None:
    """ValueError if a weight is infinite or NaN. A sum shows both, and takes no memory.

    A router of one's own may keep what it likes in its buffers: a mask of infinities, say.
    """
    is_own = model.config.router not in BUILT_IN
    for name, weight in (*model.named_parameters(), *(() if is_own else model.named_buffers())):
        if not weight.sum().isfinite():
            raise ValueError(
                f"{path}: {name} holds numbers that are not finite, so it can only write nonsense; "
                f"use an earlier checkpoint, or train again with a lower --lr"
            )
