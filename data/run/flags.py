"""Command lines: flags made from dataclasses, and mistakes told in one line."""

import argparse
import contextlib
import dataclasses
import inspect
import os
import re
import shlex
import sys
import typing


class OneLineParser(argparse.ArgumentParser):
    """Tells a mistake in one line, whatever the arguments hold."""

    def error(self, message: str, after: str = ""):
        message = " ".join(message.split())
        self.exit(2, f"error: {message}; see python {self.prog} --help{after}\n")


def number(kind, fits, must: str):
    """An argparse type: a value of this kind that fits, or a line that says what it must be."""

    def check(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__}") from None
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text} must be {must}")
        return value

    return check


def typed(text: str) -> str:
    """An argparse type: a text as its bytes are in UTF-8; others become U+FFFD.

    Python makes lone surrogates of bytes that the locale can't read, and no tokenizer takes these.
    """
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return os.fsencode(text).decode(errors="replace")


def add_flags(parser, cls, defaults: dict, choices: dict, types: dict) -> None:
    """A flag for each field of a dataclass; one that is not given is absent from the result.

    The comment behind a field is the help of its flag, without references such as [2]. Two dicts
    are for the help: the default that a run really has, and the names that a field may have. types:
    what reads the text of a flag, where the type of its field does not.
    """
    group = parser.add_argument_group(cls.__name__)
    comments = dict(re.findall(r"^    (\w+):.*?#\s*(.*)$", inspect.getsource(cls), re.M))
    for field in dataclasses.fields(cls):
        text = re.sub(r"\s*\[\d[^\]]*\]", "", comments[field.name])
        if field.name in choices:
            text = f"one of {', '.join(choices[field.name])}"
        if (default := defaults.get(field.name, field.default)) != "":
            text += f" (default: {default})"
        options = {"default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:  # of `int | None` the int
            kind = (*typing.get_args(field.type), field.type)[0]
            options["type"] = types.get(field.name, kind)
        group.add_argument(f"--{field.name}", **options)


def check_fields(settings, ranges: dict, choices: dict) -> None:
    """ValueError unless a dataclass's fields are in their ranges, ends included, or choices."""
    for name, (least, most) in ranges.items():
        if not least <= (value := getattr(settings, name)) <= most:
            raise ValueError(f"{name}={value} must be from {least} to {most}")
    for name, known in choices.items():
        if (value := getattr(settings, name)) not in known:
            raise ValueError(f"{name}={value!r} is unknown; try one of {known}")


def pick_device(name: str) -> str:
    """`auto`: the best device there is; any other name: itself, or ValueError."""
    import torch  # here, so that programs without a model start at once

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    available = [device for device, is_there in there.items() if is_there] + ["cpu"]
    if name != "auto" and name not in available:
        raise ValueError(f"device {name!r} is not available here; try --device {available[0]}")
    return available[0] if name == "auto" else name


def first_line(error: BaseException) -> str:
    """What a person is told of an error."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def quoted(path) -> str:
    """A path as a command line needs it, of Windows too: shlex.quote's ' are none there.

    >>> print(*map(quoted, ("runs/a-1", "my book", "book(1).txt", "5 $")))
    runs/a-1 "my book" "book(1).txt" '5 $'
    """
    text, is_windows = f"{path}", os.name == "nt"
    if re.fullmatch(r"[\w./:+,@%=-]*", text.replace("\\", "/") if is_windows else text):
        return text
    return f'"{text}"' if is_windows or not re.search(r'[$`"\\!]', text) else shlex.quote(text)


OWN_CODE: dict[str, str] = {}  # files of a router of one's own: absolute -> as it was named


def place_in_own_code(error: BaseException) -> str:
    """The last line of OWN_CODE that led to an error: "mine.py, line 7: ", or ""."""
    trace, place = error.__traceback__, ""
    while trace:
        if file := OWN_CODE.get(trace.tb_frame.f_code.co_filename):
            place = f"{file}, line {trace.tb_lineno}: "
        trace = trace.tb_next
    return place


def kind_and_reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


@contextlib.contextmanager
def one_line_errors(
    stopped="stopped", hint=lambda error: "", quiet=False, errors=(ValueError, OSError)
):
    """A block of main(): what goes wrong in it ends the program with one line, not a traceback.

    That is `errors`, and any other where there is code of one's own, whose file is then named. Exit
    code 2 for a mistake or a file that can't be read or written, 130 for Ctrl-C. `hint` may add a
    remedy to an error's line; quiet: another process prints it.
    """
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a character that the terminal can't show or send
    try:
        yield
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        place, is_told = place_in_own_code(error), isinstance(error, errors)
        if not (is_told or OWN_CODE):
            raise
        place = place if place or is_told else f"{[*OWN_CODE.values()][-1]}: "  # in backward, say
        # A ValueError whole: the name of a file may have line breaks.
        whole = " ".join(f"{error}".split()) if isinstance(error, ValueError) else ""
        reason = kind_and_reason(error) if place else whole or first_line(error)
        if not quiet:
            print(f"error: {place}{reason}{hint(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if stopped:
            print(f"\n{stopped}", file=sys.stderr)
        sys.exit(130)
