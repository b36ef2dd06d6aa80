"""Routers of your own: a Python file that adds a class to lamoe.ROUTERS, named on a command line.

    python train.py --router my_router.py
    python sample.py --router my_router.py "Once, upon a time"

A checkpoint keeps the router's name and no code: who opens it says where the code is.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import lamoe
from data.run.flags import first_line

BUILT_IN = frozenset(lamoe.ROUTERS)


def router_name(text: str) -> str:
    """An argparse type: the name of a router, where `text` may also be the file that adds it."""
    if not text.endswith(".py"):
        return text
    before = dict(lamoe.ROUTERS)
    try:
        spec = importlib.util.spec_from_file_location(f"router_file_{Path(text).stem}", text)
        sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)  # compiling looks
        spec.loader.exec_module(module)
        new = [name for name, router in lamoe.ROUTERS.items() if before.get(name) is not router]
        if len(new) != 1:
            raise ValueError('it must end with one line such as lamoe.ROUTERS["mine"] = MyRouter')
        if new[0] in BUILT_IN:
            raise ValueError(f"{new[0]!r} is a router of lamoe.py; give yours another name")
    except Exception as error:  # it is a program: anything may go wrong in it
        lamoe.ROUTERS.update({name: before[name] for name in BUILT_IN})
        trace, at = error.__traceback__, ""
        while trace:  # the last line of the file that was reached
            if trace.tb_frame.f_code.co_filename == str(Path(text).absolute()):
                at = f", line {trace.tb_lineno}"
            trace = trace.tb_next
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise argparse.ArgumentTypeError(f"{text}{at}: {reason}") from None
    return new[0]


class UnknownRouter(ValueError):
    """Raised for a checkpoint whose router is not in lamoe.ROUTERS (yet)."""


def check_router(config, path) -> None:
    """UnknownRouter unless the router that a checkpoint's config names is there."""
    name = config.get("router", "topk") if isinstance(config, dict) else "topk"
    if isinstance(name, str) and name not in lamoe.ROUTERS:
        raise UnknownRouter(
            f"{path}: its router {name!r:.40} is not one of lamoe.py; if it is one of your own, "
            f"name its file: --router FILE.py"
        )
