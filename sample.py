"""Write text with a trained LaMoE: one prompt, or a conversation; and see its experts at work.

    python sample.py "Once, upon a time"                 with the newest run's best model
    python sample.py "Once, upon a time" -n 3 --seed 7   three continuations, the same every time
    python sample.py                                     no prompt: User: / Model: until exit
    python sample.py "Once, upon a time" --show_experts  and which expert each token went to
    python sample.py --text book.txt --html book.html    the same of a text, and as a page
    python sample.py --score book.txt                    bits per byte: how well it is predicted
    python sample.py "Once" --model FOLDER --dtype bf16  a Hugging Face folder: Llama, Mixtral, ...

Text appears as it is generated, whole characters only; the same for the same seed and flags.
"""

import argparse
import codecs
import sys
import time
from functools import partial
from pathlib import Path

from data.exchange import experts, load  # isort: skip (before torch: see data/__init__.py)
import torch

import train
from data.run.flags import OneLineParser, first_line, number, one_line_errors, pick_device, typed
from data.run.routers import router_name
from data.run.scoring import score

# --- 1. Flags -------------------------------------------------------------------------------------

LONG = {"cpu": 100_000, "mps": 100_000, "cuda": 2_000}  # tokens: from there on compiled unasked


class Parser(OneLineParser):
    def error(self, message: str):
        # A prompt such as -x is taken for a flag: say how to give it.
        dashed = any(a[:1] == "-" and a[1:2].isalpha() and a != "-n" for a in sys.argv[1:])
        after = '; a prompt that begins with a dash goes last, after --: -- "-x"' * dashed
        super().error(message, after)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("sample.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    count = number(int, lambda n: n > 0, "above 0")
    share, add = number(float, lambda p: 0 < p <= 1, "above 0 and at most 1"), parser.add_argument
    add("prompt", nargs="?", type=typed, help="the text to continue; without it, a conversation")
    add("--model", metavar="PATH", help="a checkpoint, or a Hugging Face folder; default: newest")
    add("--router", metavar="FILE.py", type=router_name, help="the model's router, if your own")
    add("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 on a GPU")
    add("--max_new_tokens", type=count, default=200)
    add("--temperature", type=number(float, lambda t: t >= 0, "0 or more"), default=0.8)
    add("--top_k", type=count, help="choose among the k likeliest tokens")
    part = number(float, lambda p: 0 <= p <= 1, "from 0 to 1")
    add("--top_p", type=share, help="among the fewest tokens that together reach this share")
    add("--min_p", type=part, default=0.02, help="at least this share of the likeliest")
    factor = number(float, lambda r: 0.01 <= r <= 100, "from 0.01 to 100")
    add("--repetition_penalty", type=factor, default=1.0)
    some = number(typed, bool, "at least one character")
    add("--stop", metavar="TEXT", action="append", default=[], type=some, help="one more end")
    add("--seed", type=number(int, lambda s: 0 <= s < 2**63, "from 0 to 2^63 - 1"))
    few = number(int, lambda n: 0 < n <= 1024, "above 0 and at most 1024")
    add("-n", type=few, default=1, help="how many continuations, generated as one batch")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--compile", action="store_true", help="write code for it first; unasked for long texts")
    add("--show_experts", action="store_true", help="which expert each token went to")
    add("--text", metavar="FILE", action="append", default=[], help="only show a text's experts")
    layer = number(int, lambda n: n >= 0, "0 or more")
    add("--layer", metavar="N", type=layer, help="show this layer only; the first is 0")
    add("--html", metavar="FILE", help="show the experts as a page for a browser, too")
    add("--score", metavar="FILE", help="how well this text is predicted, as evaluation has it")
    args = parser.parse_args(arguments)
    args.show_experts |= bool(args.text or args.html or args.layer is not None)
    if (args.prompt is not None) + bool(args.text) + (args.score is not None) > 1:
        parser.error("a prompt is continued, --text and --score are only read: give one of these")
    return args


def newest_model() -> Path:
    newest = max(Path("runs").glob("*/best.pt"), key=lambda p: p.stat().st_mtime, default=None)
    if newest is None:
        raise ValueError("no model in runs/ yet; make one (minutes): python train.py")
    return newest


# --- 2. Writing text ------------------------------------------------------------------------------


class Continuation:
    """One text being written. Never half a character in it, and nothing of a stop text: what may be
    the beginning of one is held back until it turns out to be none.
    """

    def __init__(self, tokenizer, stops: list[str], ends: list[int] = ()):
        self.tokenizer, self.stops, self.ends = tokenizer, stops, [*ends, tokenizer.eot]
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.ids, self.held, self.text, self.ended = [], "", "", False

    def add(self, i: int) -> str:
        """The piece of text that token i brings; "" after the end."""
        if self.ended:
            return ""
        self.ids.append(i)
        if i in self.ends:
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
        """The last piece: what was held back, and a note behind it."""
        piece, self.held, self.ended = self.held + note, "", True
        self.text += piece
        return piece


def answer(model, tokenizer, prompt: str, args, generator: torch.Generator) -> list[list[int]]:
    """Prints args.n continuations of the prompt, generated as one batch; returns all ids of each.

    A single one is printed as it comes; several, one after the other, when all are there.
    """
    ids = [*tokenizer.start, *tokenizer.encode(prompt)] or [tokenizer.eot]
    seq_len = model.config.seq_len
    if len(ids) >= seq_len:
        start = len(tokenizer.start)
        most = f"the model reads {seq_len} at most; shorten it to {max(0, seq_len - 1 - start)}"
        raise ValueError(f"the prompt has {len(ids) - start} tokens and {most}")
    filters = (args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty)
    batch_BT = torch.tensor([ids] * args.n, device=args.device)
    texts = [Continuation(tokenizer, args.stop, tokenizer.stops) for _ in range(args.n)]
    show = partial(print, end="", flush=True) if args.n == 1 else lambda piece: None
    is_long = args.n == 1 and min(args.max_new_tokens, seq_len - len(ids)) >= LONG[args.device]
    compiled = args.compile or is_long
    started = time.perf_counter()
    show(prompt)
    try:
        for ids_B in model.generate(
            batch_BT, args.max_new_tokens, *filters, tokenizer.eot, generator, compile=compiled
        ):
            for text, i in zip(texts, ids_B.tolist(), strict=True):
                show(text.add(i))
            if all(text.ended for text in texts):
                break
        for text in texts:
            is_full = not text.ended and len(ids) + len(text.ids) >= seq_len
            show(text.finish(f" [the context of {seq_len} tokens is full]" * is_full))
    finally:  # after Ctrl-C, too: what was generated is shown
        show("\n")
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
            prompt = input("User: ").rstrip("\r")  # a file of Windows, through a pipe
        except EOFError:
            return print()
        if prompt.strip() == "exit":
            return
        try:
            print("Model: ", end="", flush=True)
            respond(prompt)
        except (ValueError, RuntimeError) as error:  # a prompt that is too long: say so, and go on
            print(f"[{first_line(error)}]")
        except KeyboardInterrupt:
            print("[stopped]")


# --- 3. What runs ---------------------------------------------------------------------------------


def respond(model, tokenizer, args, generator, prompt: str) -> None:
    texts = enumerate(answer(model, tokenizer, prompt, args, generator), 1)
    if args.show_experts:
        named = [(f"text {k}", ids) for k, ids in texts]
        n_prompt = len([*tokenizer.start, *tokenizer.encode(prompt)]) or 1
        experts.show(named, model, tokenizer, args, n_prompt)


def run(args) -> None:
    args.device, args.model = pick_device(args.device), args.model or newest_model()
    auto = None if args.score or args.device != "cuda" else torch.bfloat16  # half to read
    dtype = {"auto": auto, "fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model, tokenizer = load(args.model, args.device, dtype)
    if tokenizer is None:
        remedy = "make a model with one (python train.py), or put the model's tokenizer.json there"
        raise ValueError(f"{args.model} has no tokenizer; {remedy}")
    if args.score is not None:
        return print(score(args.score, model, tokenizer, args, train))
    if args.show_experts:
        experts.check(model, args)  # raises before text is written for nothing
    generator = torch.Generator(args.device)
    generator.manual_seed(args.seed) if args.seed is not None else generator.seed()
    if args.text:
        named = [(file, experts.read_ids(file, tokenizer)) for file in args.text]
        experts.show(named, model, tokenizer, args)
    elif args.prompt is not None:
        respond(model, tokenizer, args, generator, args.prompt)
    else:
        converse(partial(respond, model, tokenizer, args, generator))


def main() -> None:
    with one_line_errors(stopped="", errors=(ValueError, OSError, RuntimeError)):
        run(parse())


if __name__ == "__main__":
    main()
