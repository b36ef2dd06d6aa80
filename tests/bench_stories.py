"""Counts how many of 50 completions are whole stories of the grammar, and none copied.

python tests/bench_stories.py [--model runs/stories/best.pt] [--n 50] [--prompt "Once, upon a time"]

Each is drawn as `python sample.py PROMPT --seed i` draws it. The parser of tests/parser.py accepts
a text only whole, from its first to its last character.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from parser import parse  # noqa: E402

import lamoe  # noqa: E402
import sample  # noqa: E402
from data import datasets  # noqa: E402


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--model")
    arguments.add_argument("--n", type=int, default=50)
    arguments.add_argument("--prompt", default="Once, upon a time")
    asked = arguments.parse_args()
    defaults = sample.parse([])
    defaults.device = "cpu"
    model, tokenizer = lamoe.load(asked.model or sample.newest_model())
    training, accepted, copied = set(datasets.read("stories").train), 0, 0
    for seed in range(asked.n):
        generator = torch.Generator().manual_seed(seed)
        pieces = sample.stream(model, tokenizer, asked.prompt, defaults, generator)
        text = asked.prompt + "".join(piece for piece, _ in pieces)
        whole = bool(parse(text))
        accepted, copied = accepted + whole, copied + (text in training)
        print(f"{'whole ' if whole else 'broken'} {text}")
    print(f"{accepted} of {asked.n} are whole, {copied} are training documents")


if __name__ == "__main__":
    main()
