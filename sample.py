"""Write text with a trained LaMoE: one prompt, or a conversation.

    python sample.py "Once, upon a time"                 with the newest run's best model
    python sample.py "Once, upon a time" -n 3 --seed 7   three continuations, the same every time
    python sample.py                                     no prompt: User: / Model: until exit
    python sample.py "Once" --model FOLDER --dtype bf16  a Hugging Face folder: Llama, Mixtral, ...

Text appears as it is drawn, a character only once all its bytes are there. The same seed and flags
give the same text.
"""

import argparse
import codecs
import sys
import time
from pathlib import Path

import torch

import lamoe


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    class OneLine(argparse.ArgumentParser):
        def error(self, message):
            self.exit(2, f"error: {message}; see python sample.py --help\n")

    parser = OneLine("sample.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    count = number(int, lambda n: n > 0, "above 0")
    share = number(float, lambda p: 0 < p <= 1, "above 0 and at most 1")
    add = parser.add_argument
    add("prompt", nargs="?", help="the text to continue; without it, a conversation")
    add("--model", metavar="PATH", help="a checkpoint, or a Hugging Face folder; default: newest")
    add("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="auto: as it is stored")
    add("--max_new_tokens", type=count, default=200)
    add("--temperature", type=number(float, lambda t: t >= 0, "0 or more"), default=0.8)
    add("--top_k", type=count, help="draw from the k likeliest tokens")
    add("--top_p", type=share, help="draw from the fewest tokens that together reach this share")
    add("--min_p", type=number(float, lambda p: 0 <= p <= 1, "from 0 to 1"), default=0.02)
    add("--repetition_penalty", type=number(float, lambda r: r > 0, "above 0"), default=1.0)
    add("--stop", metavar="TEXT", help="end where this text appears, besides <|endoftext|>")
    add("--seed", type=number(int, lambda s: 0 <= s < 2**63, "from 0 to 2^63 - 1"))
    add("-n", type=count, default=1, help="how many continuations")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    return parser.parse_args(arguments)


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
    models = sorted(Path("runs").glob("*/best.pt"), key=lambda path: path.stat().st_mtime)
    if not models:
        raise ValueError("no model in runs/ yet; make one (minutes): python train.py")
    return models[-1]


def stream(model, tokenizer, prompt: str, args, generator: torch.Generator):
    """Yields pieces of the continuation as they come; never half a character.

    With a stop text, its possible beginnings are held back until they turn out to be none.
    """
    ids = [*tokenizer.start, *tokenizer.encode(prompt)] or [tokenizer.eot]
    if len(ids) >= model.config.seq_len:
        raise ValueError(
            f"the prompt has {len(ids) - 1} tokens and the model reads {model.config.seq_len} at "
            f"most; shorten it to {model.config.seq_len - 2}"
        )
    decoder, held, n = codecs.getincrementaldecoder("utf-8")("replace"), "", 0
    for ids_B in model.generate(
        torch.tensor([ids], device=args.device),
        args.max_new_tokens,
        args.temperature,
        args.top_k,
        args.top_p,
        args.min_p,
        args.repetition_penalty,
        tokenizer.eot,
        generator,
    ):
        n += 1
        if ids_B.item() == tokenizer.eot:
            break
        held += decoder.decode(tokenizer.decode_bytes(ids_B))
        if args.stop and args.stop in held:
            yield held[: held.index(args.stop)], n
            return
        keep = 0  # characters at the end that may be the beginning of the stop text
        if args.stop:
            keep = next(
                (k for k in range(len(args.stop) - 1, 0, -1) if held.endswith(args.stop[:k])), 0
            )
        yield held[: len(held) - keep], n
        held = held[len(held) - keep :]
    else:
        if len(ids) + n >= model.config.seq_len:
            held += f" [the context of {model.config.seq_len} tokens is full]"
    yield held, n


def answer(model, tokenizer, prompt: str, args, generator: torch.Generator) -> None:
    started, n = time.perf_counter(), 0
    for piece, n in stream(model, tokenizer, prompt, args, generator):
        print(piece, end="", flush=True)
    seconds = time.perf_counter() - started
    print()
    print(f"[{n} tokens, {n / seconds:,.0f} a second]", file=sys.stderr)


def converse(model, tokenizer, args, generator: torch.Generator) -> None:
    print('Type the beginning of a text; "exit" ends.')
    while True:
        try:
            prompt = input("User: ")
        except EOFError:
            return print()
        if prompt.strip() == "exit":
            return
        print(f"Model: {prompt}", end="")
        try:
            answer(model, tokenizer, prompt, args, generator)
        except ValueError as error:  # a prompt that is too long: say so, and go on
            print(f"\n[{error}]")


def main() -> None:
    args = parse()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a character the terminal can't show
    try:
        args.device, path = lamoe.pick_device(args.device), args.model or newest_model()
        dtype = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
        model, tokenizer = lamoe.load(path, args.device, dtype)
        if tokenizer is None:
            raise ValueError(
                f"{path} has no tokenizer; make a model with one (python train.py), or put the "
                f"model's tokenizer.json there"
            )
        generator = torch.Generator(args.device)
        generator.manual_seed(args.seed) if args.seed is not None else generator.seed()
        if args.prompt is None:
            return converse(model, tokenizer, args, generator)
        for i in range(args.n):
            if args.n > 1:
                print(f"--- {i + 1} of {args.n}")
            print(args.prompt, end="", flush=True)
            answer(model, tokenizer, args.prompt, args, generator)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print()
        sys.exit(130)


if __name__ == "__main__":
    main()
