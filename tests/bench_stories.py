"""Counts how many of 50 completions are complete stories of the grammar, and how many are copied.

python tests/bench_stories.py [--model runs/stories/best.pt] [--n 50] [--prompt "Once, upon a time"]

Completion number i is what `python sample.py PROMPT --seed i` writes. The parser of tests/parser.py
accepts a text only if it is a story of the grammar from its first to its last character.
"""

import argparse
import contextlib
import io
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from parser import parse  # noqa: E402

import sample  # noqa: E402
from data import datasets  # noqa: E402
from data.exchange import load  # noqa: E402


def complete(model, tokenizer, prompt: str, seed: int) -> str:
    """What sample.py prints, without the end of the line."""
    args = sample.parse(["--device", "cpu"])
    generator, printed = torch.Generator().manual_seed(seed), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        sample.answer(model, tokenizer, prompt, args, generator)
    return printed.getvalue().removesuffix("\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--n", type=int, default=50)
    parser.add_argument("--prompt", default="Once, upon a time")
    parser.add_argument("--draw_mb", type=int, default=0, help="as in train.py")
    args = parser.parse_args()
    model, tokenizer = load(args.model or sample.newest_model())
    corpus = datasets.read("stories", train_bytes=args.draw_mb * 10**6)
    training, n_complete, n_copied = set(corpus.train), 0, 0
    for seed in range(args.n):
        text = complete(model, tokenizer, args.prompt, seed)
        is_complete = bool(parse(text))
        n_complete, n_copied = n_complete + is_complete, n_copied + (text in training)
        print(f"{'complete' if is_complete else 'broken  '} {text}")
    print(f"{n_complete} of {args.n} are complete, {n_copied} are training documents")


if __name__ == "__main__":
    main()
