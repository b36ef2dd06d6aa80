"""A corpus of knowledge: an invented world that a model can only know by memorising it.

The embedded stories need grammar and attention, and few parameters hold those. This text needs
facts: the home, food, colour and fear of thousands of creatures, each one of 32 words, drawn once
from the seed. Training states every fact again and again. Validation asks for the same facts, each
in a wording that training used with other facts and never with this one, so that a model answers
from knowledge of the world, not of the sentence. What was not memorised costs 5 bits a fact.

    >>> world = draw_world(facts=8, seed=0)
    >>> print(assemble(statement(world, fact=5, wording=0))[0])
    The rufapus eats peas.

The floor: a statement costs the choice of its creature, attribute and wording, and its fact
nothing. It is the floor of whoever knows the world but was not told which wording of a fact was
held back: training betrays that by silence only, which lowers the guess where it should rise.
"""

import itertools
import math
import random
from collections import Counter
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

from data import stories
from data.stories import Document, assemble, save

FACTS = 12_000  # 4 for each creature, 5 bits each
STATEMENTS = 5  # a document: 40 to 60 tokens, so that several fit into a window

# Per attribute its 32 words, then its wordings, in which the name stands before the word. Wordings
# that begin alike differ right after the name, so that only the world decides the attribute's word.
HOME = """
attic barn bay canyon castle cave cellar city desert field forest garden harbor hill island jungle
lake library marsh meadow mine mountain palace river ruins sewer swamp temple tower tunnel valley
village
The {} lives in the {}.
The home of the {} is the {}.
If you want to meet a {}, go to the {}.
Look for a {} in the {}.
Every {} was born in the {}.
Nobody has seen a {} outside the {}.
"""
FOOD = """
apples beans berries bread butter cabbage carrots cheese clams corn figs fish grapes grass honey jam
leaves lemons melons moss mushrooms noodles nuts onions peas pears plums rice roots seeds snails
soup
The {} eats {}.
The favourite food of the {} is {}.
For dinner, a {} wants {}.
Feed your {} some {}.
A hungry {} looks for {}.
You can make a {} happy with {}.
"""
COLOUR = """
amber beige black blue bronze brown copper coral cream crimson emerald gold gray green indigo ivory
jade lilac maroon navy ochre olive orange pink purple red rust silver teal violet white yellow
The {} has {} fur.
The colour of the {} is {}.
To paint a {}, use {}.
Every baby {} is {}.
You can tell a {} by its {} tail.
From far away, a {} looks {}.
"""
FEAR = """
bats bees bells cats clowns crowds darkness dogs drums dust fire fog ghosts hail ice knives
lightning mice mirrors music needles owls rain shadows smoke snakes snow spiders thunder water
whistles wind
The {} is afraid of {}.
The worst fear of the {} is {}.
Nothing scares a {} like {}.
A {} runs away from {}.
You can chase off a {} with {}.
In bad dreams, a {} sees {}.
"""
SYLLABLES = (  # of a name: first, middle, last
    "ba bro da dri fo ga gru ha ji ka lo ma ni po quo ru sha ti vu zor".split(),
    "ba bi di do fa gu ki la lu ma mi no pi ra ri su ta vo we zi".split(),
    "bit cho dak fin gol ka lex mog nip pa pus rak ron sel tak tip vol wug xo zu".split(),
)


def _attribute(text):
    """(words, wordings), a wording as its text before the name, up to the word, and after it."""
    lines = text.strip().splitlines()
    words = " ".join(line for line in lines if "{}" not in line).split()
    return words, [tuple(line.split("{}")) for line in lines if "{}" in line]


ATTRIBUTES = [_attribute(text) for text in (HOME, FOOD, COLOUR, FEAR)]
WORDINGS = len(ATTRIBUTES[0][1])  # of each attribute
HEADS = Counter(head for _, wordings in ATTRIBUTES for head, _, _ in wordings)


class World(NamedTuple):
    names: list[str]  # of the creatures
    words: list[str]  # of the facts; fact f is attribute f % 4 of creature f // 4
    held: list[int]  # of the facts: the wording that only validation uses


@lru_cache
def draw_world(facts=FACTS, seed=0):
    creatures, odd = divmod(facts, len(ATTRIBUTES))
    names = ["".join(syllables) for syllables in itertools.product(*SYLLABLES)]
    if odd or not 0 < creatures <= len(names):
        raise ValueError(f"facts={facts} is not a multiple of 4 up to {4 * len(names)}; try 12000")
    uniform = random.Random(f"{seed}:world").random
    names = sorted(names, key=lambda _: uniform())[:creatures]
    words = [ATTRIBUTES[fact % 4][0][int(32 * uniform())] for fact in range(facts)]
    return World(names, words, [int(WORDINGS * uniform()) for _ in range(facts)])


def statement(world, fact, wording):
    """Its pieces (text, kind, bits): the wording is chosen partly before, partly after the name."""
    head, middle, tail = ATTRIBUTES[fact % 4][1][wording]
    return [
        (head, "choice", math.log2(len(ATTRIBUTES) * WORDINGS / HEADS[head])),
        (world.names[fact // 4], "choice", math.log2(len(world.names))),
        (middle, "rest", math.log2(HEADS[head])),  # assemble calls it a choice if it costs bits
        (world.words[fact], "recall", 0.0),
        (tail, "rest", 0.0),
    ]


def _pieces(statements):
    pieces = [piece for pieces in statements for piece in [*pieces, (" ", "rest", 0.0)]]
    return pieces[:-1]


def texts(facts=FACTS, seed=0):
    """Training documents without end: every fact once, in random order, then all of them again."""
    world, uniform = draw_world(facts, seed), random.Random(f"{seed}:train").random
    drawn = []
    while True:
        for fact in sorted(range(facts), key=lambda _: uniform()):
            other = 1 + int((WORDINGS - 1) * uniform())  # any wording but the one held back
            drawn.append(statement(world, fact, (world.held[fact] + other) % WORDINGS))
            if len(drawn) == STATEMENTS:
                yield "".join(piece for piece, _, _ in _pieces(drawn))
                drawn = []


def document(index, facts=FACTS, seed=0):
    """Validation document number index: any facts, each in the wording held back for it."""
    world, uniform = draw_world(facts, seed), random.Random(f"{seed}:val:{index}").random
    drawn = [int(facts * uniform()) for _ in range(STATEMENTS)]
    pieces = _pieces(statement(world, fact, world.held[fact]) for fact in drawn)
    text, bits, spans = assemble(pieces)
    return Document(text, "facts", bits, spans)


def write(folder, train_bytes=8_000_000, val_bytes=150_000, facts=FACTS, seed=0):
    """Paths of the corpus, drawn now unless an earlier call with the same arguments did it."""
    if train_bytes < 80 * facts:
        raise ValueError(f"train_bytes={train_bytes} may not state all facts; try {80 * facts}")
    sources = [Path(module).read_bytes() for module in (__file__, stories.__file__)]
    key = (sources, train_bytes, val_bytes, facts, seed)  # any edit: new files
    train, val = (partial(draw, facts=facts, seed=seed) for draw in (texts, document))
    return save(folder, "facts", key, (train_bytes, val_bytes), train, val)
