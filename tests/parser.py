"""An exhaustive parser for the grammar of data/stories.py: every derivation of a text, with its
bits. It shares the grammar's data with the generator and none of its code."""

import math

from data import stories


def parse(text, node=stories.GRAMMAR):
    """The bits (-log2 of the probability) of each derivation of the whole text; [] if none.

    >>> rules = stories.read("x = a | ab\\ny = {x}{x}[|b]")
    >>> sorted(parse("aab", rules["y"]))          # a ab, and a a b
    [3.0, 3.0]
    """
    return [bits for end, _, bits in _match(node, text, 0, ()) if end == len(text)]


def _match(node, text, at, known):
    """Every (end, variables, bits) with which node matches text[at:end]."""
    if isinstance(node, str):
        if text.startswith(node, at):
            yield at + len(node), known, 0.0
    elif isinstance(node, stories.Sequence):
        states = [(at, known, 0.0)]
        for part in node.parts:
            states = [
                (end, names, bits + more)
                for here, before, bits in states
                for end, names, more in _match(part, text, here, before)
            ]
            if not states:
                return
        yield from states
    elif isinstance(node, stories.Choice):
        for share, option in _shares(node):
            for end, names, bits in _match(option, text, at, known):
                yield end, names, bits - math.log2(share)
    elif isinstance(node, stories.Again):
        word = dict(known)[node.variable]
        if text.startswith(word, at):
            yield at + len(word), known, 0.0
    else:
        taken = dict(known).get(node.other)
        free = [word for word in node.words if word != taken]
        for word in free:
            if text.startswith(word, at):
                yield at + len(word), (*known, (node.variable, word)), math.log2(len(free))


def _shares(node):
    total = sum(weight for weight, _ in node.options)
    return [(weight / total, option) for weight, option in node.options]
