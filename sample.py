"""Write text with a trained LaMoE: one prompt, or a conversation; and see its experts at work.

    python sample.py "Once, upon a time"                 with the newest run's best model
    python sample.py "Once, upon a time" -n 3 --seed 7   three continuations, the same every time
    python sample.py                                     no prompt: User: / Model: until exit
    python sample.py "Once, upon a time" --show_experts  and which expert each token went to
    python sample.py --text book.txt --html book.html    the same of a text, and as a page
    python sample.py "Once" --model FOLDER --dtype bf16  a Hugging Face folder: Llama, Mixtral, ...

Text appears as it is drawn, a character only once all its bytes are there. The same seed and flags
give the same text.
"""

import argparse
import codecs
import json
import math
import os
import random
import shutil
import string
import sys
import time
import unicodedata
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import bpe
import lamoe

# --- 1. Flags -------------------------------------------------------------------------------------

LONG = 20_000  # tokens: from there on compiling takes less time than it saves


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    class Parser(lamoe.OneLineParser):
        def error(self, message):
            # A prompt such as -x is taken for a flag: say how to give it.
            dashed = any(a[:1] == "-" and a[1:2].isalpha() and a != "-n" for a in sys.argv[1:])
            after = '; a prompt that begins with a dash goes last, after --: -- "-x"' * dashed
            super().error(message, after)

    parser = Parser("sample.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    count = number(int, lambda n: n > 0, "above 0")
    share = number(float, lambda p: 0 < p <= 1, "above 0 and at most 1")
    add = parser.add_argument
    add("prompt", nargs="?", help="the text to continue; without it, a conversation")
    add("--model", metavar="PATH", help="a checkpoint, or a Hugging Face folder; default: newest")
    add("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 on a GPU")
    add("--max_new_tokens", type=count, default=200)
    add("--temperature", type=number(float, lambda t: t >= 0, "0 or more"), default=0.8)
    add("--top_k", type=count, help="draw from the k likeliest tokens")
    add("--top_p", type=share, help="draw from the fewest tokens that together reach this share")
    add("--min_p", type=number(float, lambda p: 0 <= p <= 1, "from 0 to 1"), default=0.02)
    add("--repetition_penalty", type=number(float, lambda r: r > 0, "above 0"), default=1.0)
    stop = "end where this text appears, besides <|endoftext|>; may be given several times"
    some = number(str, bool, "at least one character")
    add("--stop", metavar="TEXT", action="append", default=[], type=some, help=stop)
    add("--seed", type=number(int, lambda s: 0 <= s < 2**63, "from 0 to 2^63 - 1"))
    few = number(int, lambda n: 0 < n <= 1024, "above 0 and at most 1024")
    add("-n", type=few, default=1, help="how many continuations, drawn as one batch")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    pays = "on a GPU: half a minute before the first text, then three times the speed"
    add("--compile", action="store_true", help=f"{pays}; by itself from {LONG:,} tokens on")
    add("--show_experts", action="store_true", help="which expert each token went to")
    text = "show the experts of this UTF-8 text, write nothing; several are compared"
    add("--text", metavar="FILE", action="append", default=[], help=text)
    layer = number(int, lambda n: n >= 0, "0 or more")
    add("--layer", metavar="N", type=layer, help="show this layer only; the first is 0")
    add("--html", metavar="FILE", help="show the experts as a page for a browser, too")
    args = parser.parse_args(arguments)
    args.show_experts |= bool(args.text or args.html or args.layer is not None)
    if args.text and args.prompt is not None:
        parser.error("a prompt is continued and --text is only read: give one of the two")
    return args


def number(kind, fits, must: str):
    """An argparse type: a number of this kind that fits, or a line that says what it must be."""

    def check(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__}") from None
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text} must be {must}")
        return value

    return check


def newest_model() -> Path:
    models = Path("runs").glob("*/best.pt")
    newest = max(models, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        raise ValueError("no model in runs/ yet; make one (minutes): python train.py")
    return newest


# --- 2. Writing text ------------------------------------------------------------------------------


class Continuation:
    """One text being written. Never half a character in it, and nothing of a stop text: what may be
    the beginning of one is held back until it turns out to be none.
    """

    def __init__(self, tokenizer, stops: list[str]):
        self.tokenizer, self.stops = tokenizer, stops
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.ids, self.held, self.text, self.ended = [], "", "", False

    def add(self, i: int) -> str:
        """The piece of text that token i brings; "" after the end."""
        if self.ended:
            return ""
        self.ids.append(i)
        if i == self.tokenizer.eot:
            return self.finish()
        held = self.held + self.decoder.decode(self.tokenizer.decode_bytes([i]))
        found = [(at + len(stop), at) for stop in self.stops if (at := held.find(stop)) >= 0]
        if found:  # the first to be complete, and of two that end together the longer
            self.held = held[: min(found)[1]]
            return self.finish()
        begun = (k for stop in self.stops for k in range(1, len(stop)) if held.endswith(stop[:k]))
        cut = len(held) - max(begun, default=0)
        self.text, self.held = self.text + held[:cut], held[cut:]
        return held[:cut]

    def finish(self, note: str = "") -> str:
        piece, self.held, self.ended = self.held + note, "", True
        self.text += piece
        return piece


def answer(model, tokenizer, prompt: str, args, generator: torch.Generator) -> list[list[int]]:
    """Prints args.n continuations of the prompt, drawn as one batch; returns all ids of each.

    A single one is printed as it comes, several when they are there: whole, one after the other.
    """
    ids = [*tokenizer.start, *tokenizer.encode(prompt)] or [tokenizer.eot]
    seq_len = model.config.seq_len
    if len(ids) >= seq_len:
        start = len(tokenizer.start)
        most = f"the model reads {seq_len} at most; shorten it to {seq_len - 1 - start}"
        raise ValueError(f"the prompt has {len(ids) - start} tokens and {most}")
    how = (args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty)
    batch_BT = torch.tensor([ids] * args.n, device=args.device)
    texts = [Continuation(tokenizer, args.stop) for _ in range(args.n)]
    stream = partial(print, end="", flush=True) if args.n == 1 else lambda piece: None
    started = time.perf_counter()
    stream(prompt)
    n_new = min(args.max_new_tokens, seq_len - len(ids))
    compiled = args.compile or args.n == 1 and n_new >= LONG
    try:
        for ids_B in model.generate(
            batch_BT, args.max_new_tokens, *how, tokenizer.eot, generator, compile=compiled
        ):
            for text, i in zip(texts, ids_B.tolist(), strict=True):
                stream(text.add(i))
            if all(text.ended for text in texts):
                break
        for text in texts:
            is_full = not text.ended and len(ids) + len(text.ids) >= seq_len
            stream(text.finish(f" [the context of {seq_len} tokens is full]" * is_full))
    finally:  # after Ctrl-C, too: what was drawn is shown
        stream("\n")
        for k, text in enumerate(texts if args.n > 1 else [], 1):
            print(f"--- {k} of {args.n}\n{prompt}{text.text}")
    n, seconds = sum(len(text.ids) for text in texts), time.perf_counter() - started
    print(f"[{n} tokens, {n / seconds:,.0f} a second]", file=sys.stderr)
    return [ids + text.ids for text in texts]


def converse(respond) -> None:
    """Goes on after a mistake, and after Ctrl-C in an answer; Ctrl-C at the prompt ends."""
    print('Type the beginning of a text; "exit" ends, Ctrl-C stops an answer.')
    while True:
        try:
            prompt = input("User: ")
        except EOFError:
            return print()
        if prompt.strip() == "exit":
            return
        try:
            print("Model: ", end="", flush=True)
            respond(prompt)
        except (ValueError, RuntimeError) as error:  # a prompt that is too long: say so, and go on
            print(f"[{lamoe.first_line(error)}]")
        except KeyboardInterrupt:
            print("[stopped]")


# --- 3. Seeing experts ----------------------------------------------------------------------------


class Look(NamedTuple):
    """Where the model sent each token of a text; the first expert is the one the router prefers."""

    source: str
    ids: list[int]
    pieces: list[str]  # the text of each token; a character of several comes with the last of them
    experts_LTA: Tensor  # L counts the layers that have experts
    weights_LTA: Tensor


@torch.inference_mode()
def look(model, tokenizer, source: str, ids: list[int]) -> Look:
    """Reads a text longer than the context window by window, each without the one before it."""
    experts, weights, decoder = [], [], codecs.getincrementaldecoder("utf-8")("replace")
    ids_1T = torch.tensor([ids], device=model.embed.weight.device)
    for window_1T in ids_1T.split(model.config.seq_len, dim=1):
        out = model(window_1T, return_experts=True)
        experts.append(out.experts[:, 0].cpu())
        weights.append(out.expert_weights[:, 0].cpu())
    pieces = [decoder.decode(tokenizer.decode_bytes([i])) for i in ids]
    pieces[-1] += decoder.decode(b"", final=True)
    return Look(source, ids, pieces, torch.cat(experts, 1), torch.cat(weights, 1))


def read_ids(path: str, tokenizer, most: int = 100_000) -> list[int]:
    """Ids of the documents of a UTF-8 file, <|endoftext|> before each; of a long file the first."""
    if not Path(path).is_file():
        raise ValueError(f"--text {path}: no such file; name a UTF-8 text file")
    ids = []
    for document in bpe.read_documents(path):
        ids += [tokenizer.eot, *tokenizer.encode(document.strip("\n\ufeff"))]
        if len(ids) > most:
            print(f"[{path}: the first {most:,} tokens]", file=sys.stderr)
            break
    if set(ids) <= {tokenizer.eot}:
        raise ValueError(f"{path} is empty; name a file with text in it")
    return ids[:most]


def kind_of(token: str) -> str:
    """By its first character that is no space; half a character and <|endoftext|> are `other`.

    >>> [kind_of(token) for token in (" the", "\\n", "7", ", ", "\\ufffd")]
    ['letter', 'space', 'digit', 'punctuation', 'other']
    """
    first = token.strip()[:1]
    if not first:
        return "space"
    if first.isalnum():
        return "letter" if first.isalpha() else "digit"
    is_mark = unicodedata.category(first)[0] == "P" or first in string.punctuation
    return "punctuation" if is_mark and token != bpe.SPECIAL else "other"


def entropy(symbols) -> float:
    """-sum p log2 p [bits] of the counted shares p, and (K - 1) / 2N nats.

    A sample of N looks more regular than its source of K symbols, by that much (Miller 1955).
    """
    counts = Counter(symbols).values()
    n = sum(counts)
    bits = -sum(count / n * math.log2(count / n) for count in counts)
    return bits + (len(counts) - 1) / (2 * n * math.log(2))


def mutual_information(xs, ys) -> float:
    """H(X) + H(Y) - H(X, Y): how many bits of x one knows from y.

    >>> x, same, independent = "aabb" * 1000, "ccdd" * 1000, "cdcd" * 1000
    >>> f"{mutual_information(x, same):.2f} {mutual_information(x, independent):.2f}"
    '1.00 -0.00'
    """
    return entropy(xs) + entropy(ys) - entropy(zip(xs, ys, strict=True))


def print_tables(looks: list[Look], config, tokenizer, rows: list[int]) -> None:
    """Which expert comes first for what, and how many bits of that choice each thing tells."""
    n_experts, seq_len = config.n_experts, config.seq_len
    kinds = {i: kind_of(tokenizer.decode([i])) for x in looks for i in x.ids}
    quarters = [f"quarter {4 * t // seq_len + 1}" for t in range(seq_len)]
    places = ["first position", *quarters[1:]]
    known = {
        "token": [i for x in looks for i in x.ids],
        "kind": [kinds[i] for x in looks for i in x.ids],
        "position": [places[t % len(places)] for x in looks for t in range(len(x.ids))],
    }
    if len(looks) > 1:
        known["source"] = [x.source for x in looks for _ in x.ids]
    everything, summary, chance = ["all"] * len(known["token"]), [], random.Random(0)
    for row in rows:
        layer = f"layer {config.n_dense_layers + row}"
        firsts = [e for x in looks for e in x.experts_LTA[row, :, 0].tolist()]
        busiest = sorted(e for e, _ in Counter([*range(n_experts), *firsts]).most_common(12))
        some = f" (the 12 busiest of {n_experts})" if n_experts > 12 else ""
        print(f"\n{layer:20}  tokens   % with this first expert{some}")
        print(f"{'':28}" + "".join(f"{e:6}" for e in busiest))
        for labels in (everything, *list(known.values())[1:]):
            counts, totals = Counter(zip(labels, firsts, strict=True)), Counter(labels)
            for label in sorted(totals):
                shares = "".join(f"{100 * counts[label, e] / totals[label]:6.1f}" for e in busiest)
                print(f"{label[-20:]:20}{totals[label]:8,}{shares}")
        summary.append(f"{layer:10}{entropy(firsts):8.2f}")
        shuffled = chance.sample(firsts, len(firsts))
        for labels in known.values():
            told = (mutual_information(es, labels) for es in (firsts, shuffled))
            bits, by_chance = (round(bits, 2) + 0.0 for bits in told)  # + 0.0: no "-0.00"
            summary[-1] += f"{bits:9.2f} ({by_chance:5.2f})"
    print("\nbits of the first expert: all, and those told by (in brackets: the same, shuffled)")
    print(f"{'all':>18}" + "".join(f"{name:>17}" for name in known), *summary, sep="\n")


# Nine colours that colour-blind eyes tell apart, for dark text (Paul Tol, scheme "light"), and the
# nearest of a terminal's 256. The tenth expert begins again, with its number or a line to tell.
PALETTE = "#77aadd #ee8866 #eedd88 #44bb99 #ffaabb #99ddff #bbcc33 #aaaa00 #dddddd".split()
TERMINAL = (110, 209, 222, 72, 217, 117, 149, 142, 253)


def dye(text: str, expert: int) -> str:
    """Black on the expert's colour, to be read on dark and on light terminals."""
    return f"\x1b[38;5;16;48;5;{TERMINAL[expert % len(TERMINAL)]}m{text}\x1b[0m"


def paint(pieces: list[str], experts: list[int], n_experts: int, colours: bool, width: int) -> str:
    """The text in lines, each token on its expert's colour, or with its expert's number below it.

    >>> print(paint(["Once", ",", " upon"], [3, 0, 12], 16, False, 80))  # numbers read downwards
    Once, upon
    0   01
    3   02
    """
    digits = len(str(n_experts - 1)) if not colours or n_experts > len(PALETTE) else 0
    lines, column = [""] * (1 + digits), 0  # the last lines: text, and a line a digit
    for piece, e in zip(pieces, experts, strict=True):
        shown = "".join(c if c.isprintable() else " " for c in piece)  # no escape codes of its own
        cells = sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in shown)
        if column and column + cells > width:
            lines, column = lines + [""] * (1 + digits), 0
        lines[-1 - digits] += dye(shown, e) if colours else shown
        for d in range(digits if cells else 0):
            lines[d - digits] += f"{e:0{digits}}"[d].ljust(cells)
        column += width if "\n" in piece else cells
    return "\n".join(line.rstrip() for line in lines)


def print_text(x: Look, config, rows: list[int], most: int = 500) -> None:
    """Coloured where the terminal has colours (https://no-color.org), with numbers elsewhere."""
    if os.name == "nt":
        os.system("")  # makes older Windows consoles obey colour codes
    colours = sys.stdout.isatty() and not os.getenv("NO_COLOR") and os.getenv("TERM") != "dumb"
    width = min(100, shutil.get_terminal_size().columns)
    some = f", the first {most} of {len(x.ids):,} tokens" if len(x.ids) > most else ""
    for row in rows:
        print(f"\nlayer {config.n_dense_layers + row}: {x.source}{some}")
        experts = x.experts_LTA[row, :most, 0].tolist()
        print(paint(x.pieces[:most], experts, config.n_experts, colours, width))
    legend = [dye(f" {e} ", e) for e in range(config.n_experts)] if colours else ["see below it"]
    print("\nfirst expert of a token:", *legend)


# --- 4. The same as a page ------------------------------------------------------------------------

PAGE = Path(__file__).parent / "data/experts.html"  # DATA in it stands for the JSON of make_page


def check_page(path: str) -> None:
    """Only a page of ours is written over: a slip of the finger must not cost anybody a file."""
    target, opening = Path(path), b"".join(PAGE.read_bytes().splitlines(True)[:2])  # its author
    if not target.parent.is_dir():
        raise ValueError(f"--html {path}: there is no folder {target.parent}; make it first")
    is_ours = False
    if target.is_file():
        with target.open("rb") as file:
            is_ours = file.read(len(opening)) == opening
    if target.exists() and not is_ours:
        raise ValueError(f"--html {path} is there and is no page of sample.py; give another name")


def make_page(looks: list[Look], config, start: int, most: int = 10_000) -> str:
    """HTML in ASCII: all layers, that of row `start` first."""
    names, texts = ("text", "id", "position", "experts", "weights"), []
    for x in looks:
        experts_TLA = x.experts_LTA[:, :most].transpose(0, 1).tolist()
        weights_TLA = x.weights_LTA[:, :most].double().round(decimals=3).transpose(0, 1).tolist()
        positions = [t % config.seq_len for t in range(len(experts_TLA))]
        columns = zip(x.pieces, x.ids, positions, experts_TLA, weights_TLA, strict=False)
        some = f", the first {most:,} of {len(x.ids):,} tokens" if len(x.ids) > most else ""
        tokens = [dict(zip(names, column, strict=True)) for column in columns]
        texts.append({"source": x.source + some, "tokens": tokens})
    layers = list(range(config.n_dense_layers, config.n_layers))
    data = {"n_experts": config.n_experts, "palette": PALETTE, "layers": layers, "start": start}
    safe = json.dumps({**data, "texts": texts}).replace("<", "\\u003c")  # can't end its script
    return PAGE.read_text(encoding="ascii").replace("DATA", safe)


# --- 5. What runs ---------------------------------------------------------------------------------


def layers_to_show(config, layer: int | None) -> list[int]:
    """Rows of `Output.experts`: of all layers with experts, or of one."""
    first, end = config.n_dense_layers, config.n_layers
    if config.n_experts == 1 or first >= end:
        raise ValueError("this model is dense, without experts; python train.py makes one with")
    if layer is not None and not first <= layer < end:
        raise ValueError(f"--layer {layer} has no experts; give one from {first} to {end - 1}")
    return list(range(end - first)) if layer is None else [layer - first]


def show_experts(looks: list[Look], config, tokenizer, args) -> None:
    rows = layers_to_show(config, args.layer)
    for x in looks:
        print_text(x, config, rows)
    print_tables(looks, config, tokenizer, rows)
    if args.html:
        bpe.write_text(args.html, make_page(looks, config, rows[0]))
        print(f"[{args.html}: open it in a browser]", file=sys.stderr)


def respond(model, tokenizer, args, generator, prompt: str) -> None:
    drawn = answer(model, tokenizer, prompt, args, generator)
    if args.show_experts:
        looks = [look(model, tokenizer, f"text {k}", ids) for k, ids in enumerate(drawn, 1)]
        show_experts(looks, model.config, tokenizer, args)


def run(args) -> None:
    args.device, path = lamoe.pick_device(args.device), args.model or newest_model()
    auto = torch.bfloat16 if args.device == "cuda" else None  # as it was trained; half to read
    dtype = {"auto": auto, "fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model, tokenizer = lamoe.load(path, args.device, dtype)
    if tokenizer is None:
        remedy = "make a model with one (python train.py), or put the model's tokenizer.json there"
        raise ValueError(f"{path} has no tokenizer; {remedy}")
    if args.show_experts:
        layers_to_show(model.config, args.layer)
    if args.html:
        check_page(args.html)
    generator = torch.Generator(args.device)
    generator.manual_seed(args.seed) if args.seed is not None else generator.seed()
    if args.text:
        looks = [look(model, tokenizer, path, read_ids(path, tokenizer)) for path in args.text]
        show_experts(looks, model.config, tokenizer, args)
    elif args.prompt is not None:
        respond(model, tokenizer, args, generator, args.prompt)
    else:
        converse(partial(respond, model, tokenizer, args, generator))


def main() -> None:
    args = parse()
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a character that the terminal can't show or send
    try:
        run(args)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {lamoe.first_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
