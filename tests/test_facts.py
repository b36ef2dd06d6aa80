"""The world is fixed, training states all of it, and validation asks in words not seen with it."""

import doctest
import hashlib
import itertools
import json
import math
import re
from collections import Counter

import numpy as np
import pytest

from data import datasets, facts

SMALL = {"facts": 400, "seed": 3}
GOLDEN = "d0e29b869cccac6ed48a05506be1164dab8e5b604a1684f438562dba564fdcd1"


def parse(text, world):
    """Every (fact, wording) list that reads as text: independent of how facts.py builds it."""
    found = []
    for attribute, (words, wordings) in enumerate(facts.ATTRIBUTES):
        for wording, parts in enumerate(wordings):
            slots = [re.escape(part) for part in parts]
            match = re.match(rf"{slots[0]}([a-z]+){slots[1]}({'|'.join(words)}){slots[2]}", text)
            if match and match[1] in world.names:
                fact = 4 * world.names.index(match[1]) + attribute
                rest, said = text[match.end() :], (fact, wording, match[2])
                later = [[]] if not rest else parse(rest[1:], world) if rest[0] == " " else []
                found += [[said, *others] for others in later]
    return found


@pytest.fixture(scope="module")
def world():
    return facts.draw_world(**SMALL)


@pytest.fixture(scope="module")
def splits(world):
    """What training and validation say: a list of documents, each a list of statements."""
    train = list(itertools.islice(facts.texts(**SMALL), 20 * 400 // facts.STATEMENTS))
    val = [facts.document(index, **SMALL).text for index in range(300)]
    parsed = [[parse(text, world) for text in texts] for texts in (train, val)]
    assert all(len(readings) == 1 for split in parsed for readings in split)  # one derivation
    return [[readings[0] for readings in split] for split in parsed]


def test_the_world_is_a_function_of_the_seed(world):
    facts.draw_world.cache_clear()
    assert facts.draw_world(**SMALL) == world
    assert facts.draw_world(facts=400, seed=4) != world
    assert len(set(world.names)) == 100 and len(world.words) == len(world.held) == 400
    full = facts.draw_world()
    assert len(set(full.names)) == 3000
    for attribute, (words, wordings) in enumerate(facts.ATTRIBUTES):
        assert len(set(words)) == 32 and len(wordings) == facts.WORDINGS
        counts = Counter(full.words[attribute::4])
        chi2 = sum((counts[word] - 3000 / 32) ** 2 / (3000 / 32) for word in words)
        assert chi2 < 31 + 5 * math.sqrt(2 * 31)
        held = Counter(full.held[attribute::4])
        assert all(abs(held[wording] - 500) < 100 for wording in range(6))
    assert len({word for words, _ in facts.ATTRIBUTES for word in words}) == 4 * 32
    for wrong in (0, 6, 40_000):
        with pytest.raises(ValueError, match="multiple of 4"):
            facts.draw_world(facts=wrong)


def test_statements_are_true_and_every_fact_is_stated_equally_often(world, splits):
    for split in splits:
        for document in split:
            assert len(document) == facts.STATEMENTS
            assert all(world.words[fact] == word for fact, _, word in document)
    counts = Counter(fact for document in splits[0] for fact, _, _ in document)
    assert set(counts) == set(range(400)) and set(counts.values()) == {20}


def test_validation_asks_known_facts_in_the_one_wording_training_never_used(world, splits):
    train, val = (
        Counter((fact, wording) for document in split for fact, wording, _ in document)
        for split in splits
    )
    assert not train.keys() & val.keys()
    assert all(world.held[fact] == wording for fact, wording in val)
    wordings = {(fact % 4, wording) for fact, wording in train}
    assert wordings == {(fact % 4, wording) for fact, wording in val} and len(wordings) == 24
    for fact in range(400):  # 20 times among 5 wordings
        assert sum((fact, wording) in train for wording in range(6)) >= 3
    asked = Counter(fact % 4 for document in splits[1] for fact, _, _ in document)
    assert all(abs(count - 375) < 5 * math.sqrt(1500 * 3 / 16) for count in asked.values())


def test_floor_is_that_of_an_independent_reading_and_facts_cost_nothing(world, splits):
    total = 0
    for index, said in enumerate(splits[1]):
        text, genre, bits, spans = facts.document(index, **SMALL)
        # 100 creatures, 4 attributes and 6 wordings, each as likely as the others
        assert bits == pytest.approx(len(said) * math.log2(100 * 4 * 6))
        assert bits == pytest.approx(sum(span.bits for span in spans))
        assert [span.start for span in spans] == [0] + [span.end for span in spans][:-1]
        assert spans[-1].end == len(text)
        recalled = [text[span.start : span.end] for span in spans if span.kind == "recall"]
        assert recalled == [" " + word for _, _, word in said]
        assert all((span.kind == "choice") == (span.bits > 0) for span in spans)
        total += len(text)
    assert total / 300 < 300


def test_wordings_are_told_apart_before_the_fact():
    """Otherwise the word of a fact would carry bits of the choice of a wording."""
    wordings = [wording for _, wordings in facts.ATTRIBUTES for wording in wordings]
    for (head, middle, _), (other_head, other_middle, _) in itertools.permutations(wordings, 2):
        assert head != other_head or not other_middle.startswith(middle)
        assert middle.endswith(" ") and head.endswith(" ")
    words = {word for wording in wordings for word in re.findall(r"\w+", " ".join(wording))}
    words |= {word for words, _ in facts.ATTRIBUTES for word in words}
    names = ["".join(syllables) for syllables in itertools.product(*facts.SYLLABLES)]
    assert len(set(names)) == len(names) == 8000 and not words & set(names)


def test_bytes_are_the_same_on_every_platform():
    train = "".join(itertools.islice(facts.texts(), 1000))
    val = "".join(facts.document(index).text for index in range(100))
    assert hashlib.sha256((train + val).encode()).hexdigest() == GOLDEN


def test_written_corpus_is_the_drawn_one_and_is_read_with_its_floor(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "CACHE", tmp_path)
    small = {"train_bytes": 100_000, "val_bytes": 10_000, **SMALL}
    paths = facts.write(tmp_path, **small)
    assert 100_000 <= paths.train.stat().st_size < 100_400
    before = {path: path.stat().st_mtime_ns for path in paths}
    assert facts.write(tmp_path, **small) == paths and sorted(tmp_path.iterdir()) == sorted(paths)
    assert before == {path: path.stat().st_mtime_ns for path in paths}
    assert facts.write(tmp_path, **{**small, "facts": 800}) != paths
    with pytest.raises(ValueError, match="may not state all facts; try 32000"):
        facts.write(tmp_path, train_bytes=1000, facts=400)

    monkeypatch.setattr(facts, "write", lambda folder: paths)
    corpus = datasets.read("facts")
    assert list(corpus.train) == list(itertools.islice(facts.texts(**SMALL), len(corpus.train)))
    floor = json.loads(paths.floor.read_text())
    assert len(floor) == len(corpus.val)
    assert corpus.floor_bits.tolist() == [0, pytest.approx(sum(bits for _, bits, _ in floor)), 0]
    starts = np.diff((corpus.kind_of_byte == datasets.KINDS.index("recall")).astype(int)) == 1
    assert np.count_nonzero(starts) == facts.STATEMENTS * len(corpus.val)


def test_worked_example_holds():
    assert doctest.testmod(facts).failed == 0
