"""A training run that takes a fraction of a second, and the programs called as from a shell."""

import csv
import os
import random
import signal
import sys
from contextlib import contextmanager
from unittest import mock

import lamoe

SHAPE = "--dim 16 --n_layers 1 --n_heads 2 --n_kv_heads 1 --hidden_dim 8 --n_experts 3 --top_k 2"
TINY = f"{SHAPE} --seq_len 16 --batch_size 4 --tokenizer bytes --dtype fp32 --device cpu".split()
WORDS = ["the", "a", "red", "old", "cat", "dog", "bird", "saw", "ate", "7", "été", "😀", ".", "\n"]


def make_text(n_words=900, seed=0):
    """Words in a random order: a few thousand bytes, some of them beyond ASCII."""
    return " ".join(random.Random(seed).choices(WORDS, k=n_words))


def call(program, *arguments):
    """The exit code of `python program.py arguments`, run in this process."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        with mock.patch.object(sys, "argv", [f"{program.__name__}.py", *map(str, arguments)]):
            program.main()
    except SystemExit as end:
        return end.code or 0
    finally:
        signal.signal(signal.SIGINT, handler)
    return 0


def all_rows_of(path):
    """Of a log.csv or load.csv."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def rows_of(path):
    """Those of training: all but that of step 0."""
    return [row for row in all_rows_of(path) if row["step"] != "0"]


@contextmanager
def at_training_step(step, act):
    """Calls act() while the model computes training step 1, 2, ... (counted from here)."""
    forward, count = lamoe.LaMoE.forward, 0

    def counted(self, *args, **kwargs):
        nonlocal count
        count += self.training
        if self.training and count == step:
            act()
        return forward(self, *args, **kwargs)

    with mock.patch.object(lamoe.LaMoE, "forward", counted):
        yield


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)
