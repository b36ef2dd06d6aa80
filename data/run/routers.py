"""Routers of your own: a Python file that adds a class to lamoe.ROUTERS, named on a command line.

    python train.py --router my_router.py
    python sample.py --router my_router.py "Once, upon a time"

A checkpoint keeps the router's name and no code: who opens it says where the code is.
"""

import argparse
import dataclasses
import functools
import importlib.util
import inspect
import math
import sys
from pathlib import Path

import torch

import lamoe
from data.run.flags import OWN_CODE, kind_and_reason, place_in_own_code, quoted

BUILT_IN = frozenset(lamoe.ROUTERS)
FILES: dict[str, str] = {}  # name of a router -> its file, as it was given


def router_name(text: str) -> str:
    """An argparse type: the name of a router, where `text` may also be the file that adds it."""
    if not text.endswith(".py"):
        return text
    before, path = dict(lamoe.ROUTERS), Path(text).absolute()
    OWN_CODE[f"{path}"] = text
    if f"{path.parent}" not in sys.path:
        sys.path.append(f"{path.parent}")  # it may import what is beside it, last of all
    try:
        spec = importlib.util.spec_from_file_location(f"router_file_{path.stem}", path)
        sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)  # compiling looks
        spec.loader.exec_module(module)
        new = [name for name, router in lamoe.ROUTERS.items() if before.get(name) is not router]
        if len(new) != 1:
            raise ValueError('it must end with one line such as lamoe.ROUTERS["mine"] = MyRouter')
        if new[0] in BUILT_IN:
            raise ValueError(f"{new[0]!r} is a router of lamoe.py; give yours another name")
        check_class(lamoe.ROUTERS[new[0]])
    except (Exception, SystemExit) as error:  # it is a program: anything may go wrong in it
        lamoe.ROUTERS.clear()
        lamoe.ROUTERS.update(before)
        place = place_in_own_code(error) or f"{text}: "
        raise argparse.ArgumentTypeError(f"{place}{kind_and_reason(error)}") from None
    router = lamoe.ROUTERS[new[0]]
    router.forward, FILES[new[0]] = checked(router.forward, text), text
    return new[0]


def check_class(router) -> None:
    """TypeError unless lamoe.py can make and call it."""
    if not (isinstance(router, type) and issubclass(router, lamoe.Router)):
        what = getattr(router, "__name__", repr(router))
        raise TypeError(f"{what:.60} is no class derived from lamoe.Router")
    for function, arguments in (
        (router, "c"),
        (router.n_active, "c"),
        (router.forward, "self, x_BTD, ids_BT"),
    ):
        try:
            inspect.signature(function).bind(*arguments.split(", "))
        except TypeError as error:
            name = getattr(function, "__qualname__", f"n_active = {function!r:.40}")
            raise TypeError(f"{name} can't be called with ({arguments}): {error}") from None


def checked(forward, file: str):
    """A router's forward that checks its first result in training, and the first in evaluation.

    What is wrong with it would show far from here, or on a GPU alone, as rubbish.
    """
    seen = set()

    @functools.wraps(forward)
    def check(self, x_BTD, ids_BT=None):
        routing = forward(self, x_BTD, ids_BT)
        if not torch.compiler.is_compiling() and self.training not in seen:
            seen.add(self.training)
            if wrong := mistake_in(routing, x_BTD[..., 0].numel(), self.config.n_experts):
                raise ValueError(f"{file}: {wrong}")
        return routing

    return check


def mistake_in(routing, N: int, E: int) -> str:
    """What keeps a result of a router from being a lamoe.Routing of N tokens; "" if nothing."""
    if not isinstance(routing, lamoe.Routing):
        return f"forward returns a {type(routing).__name__} and not a lamoe.Routing"
    right = {"experts_NA": None, "weights_NA": None, "probs_NE": [N, E], "load_E": [E]}
    for name, value in routing._asdict().items():
        if isinstance(value, (int, float)) and name not in right:
            value = torch.tensor(value)
        if value is None and right.get(name):
            continue
        if not isinstance(value, torch.Tensor):
            return f"{name} is a {type(value).__name__} and not a tensor"
        shape, wanted = [*value.shape], right.get(name, [])
        if wanted is None and (len(shape) != 2 or shape[0] != N or not shape[1]):
            return f"{name} has the shape {shape} and not (N, A): {N} tokens, experts of each"
        if wanted is not None and shape != wanted:
            return f"{name} has the shape {shape} and not {wanted}"
        if not value.isfinite().all():
            return f"{name} has numbers that are not finite (vectors begin at 0: see init_weights)"
    experts_NA, weights_NA = routing[:2]
    if experts_NA.shape != weights_NA.shape:
        return f"weights_NA {[*weights_NA.shape]} is not of the shape of experts_NA"
    if experts_NA.is_floating_point() or not 0 <= experts_NA.min() <= experts_NA.max() < E:
        some = f"{experts_NA.min()} to {experts_NA.max()}, {experts_NA.dtype}"
        return f"experts_NA has {some}, and not whole numbers from 0 to {E - 1}"
    return ""


def with_built_in(c: lamoe.Config) -> lamoe.Config:
    """The same with a router of lamoe.py, where shapes alone are wanted: without memory one's own
    may fail, or keep its first parameters for all layers, which should be real ones.
    """
    if c.router in BUILT_IN or c.n_experts == 1:
        return c
    k = min(math.ceil(c.n_active), c.n_experts)
    return dataclasses.replace(c, router="topk", top_k=k, n_groups=1, top_groups=1)


def run_and_router(path, name: str) -> str:
    """A run's folder or checkpoint as commands name it, with --router if that is one's own."""
    return quoted(path) + (f" --router {quoted(FILES[name])}" if name in FILES else "")


class RouterNeeded(ValueError):
    """Raised for a checkpoint whose router is another than those of lamoe.ROUTERS (yet)."""


def check_router(config, path) -> str:
    """The router that a checkpoint's config names; RouterNeeded unless it is there."""
    name = config.get("router", "topk") if isinstance(config, dict) else "topk"
    if isinstance(name, str) and name not in lamoe.ROUTERS:
        raise RouterNeeded(
            f"{path}: its router {name!r:.40} is not one of lamoe.py; if it is one of your own, "
            f"name its file: --router FILE.py"
        )
    return f"{name}"
