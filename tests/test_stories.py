"""The embedded corpus costs what it says it costs, and is the same everywhere."""

import doctest
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from parser import parse

from data import stories

GENRES = ("stories", "news", "recipes", "science", "plays")
GOLDEN = "9e515203ead9faf4943a5d6578551eb9251e78cb0b7cd02afbb8ba2681c8d7eb"


@pytest.fixture(scope="module")
def documents():
    return [stories.document(index) for index in range(4000)]


def entropy(node):
    """(mean, least) bits of a node, straight from the definition of entropy."""
    if isinstance(node, str) or isinstance(node, stories.Again):
        return 0.0, 0.0
    if isinstance(node, stories.Sequence):
        return tuple(map(sum, zip(*(entropy(part) for part in node.parts), strict=True)))
    if isinstance(node, stories.First):
        bits = math.log2(len(node.words) - (node.other is not None))
        return bits, bits
    total = sum(weight for weight, _ in node.options)
    mean, least = 0.0, math.inf
    for weight, option in node.options:
        inside, inside_least = entropy(option)
        surprise = -math.log2(weight / total)
        mean += weight / total * (surprise + inside)
        least = min(least, surprise + inside_least)
    return mean, least


def enumerate_all(node, known):
    """Every (text, probability, variables) a node can give."""
    if isinstance(node, str):
        yield node, 1.0, known
    elif isinstance(node, stories.Sequence):
        if not node.parts:
            yield "", 1.0, known
            return
        for head, p, names in enumerate_all(node.parts[0], known):
            for tail, q, last in enumerate_all(stories.Sequence(node.parts[1:]), names):
                yield head + tail, p * q, last
    elif isinstance(node, stories.Choice):
        total = sum(weight for weight, _ in node.options)
        for weight, option in node.options:
            for text, p, names in enumerate_all(option, known):
                yield text, p * weight / total, names
    elif isinstance(node, stories.Again):
        yield known[node.variable], 1.0, known
    else:
        words = [word for word in node.words if word != known.get(node.other)]
        for word in words:
            yield word, 1 / len(words), {**known, node.variable: word}


def test_a_small_grammar_enumerated_completely_has_the_entropy_of_its_bits():
    rules = stories.read(
        "name = Al | Bo | Cy\nadj = 2*red | blue\nmood = 3*glad | so sad\n"
        "top = {a=name} met {b=name!a}. [2*$a was {mood}|$b had {adj}, {adj} hats]. $a left."
    )
    bits = defaultdict(float)
    for text, p, _ in enumerate_all(rules["top"], {}):
        assert text not in bits
        bits[text] = -math.log2(p)
    assert math.isclose(sum(2**-b for b in bits.values()), 1)
    mean = sum(2**-b * b for b in bits.values())
    assert math.isclose(mean, entropy(rules["top"])[0])
    for text, expected in bits.items():
        assert parse(text, rules["top"]) == [pytest.approx(expected)]
    # and the generator draws each text as often as that
    counts, pieces = defaultdict(int), stories.random.Random(0).random
    for _ in range(20_000):
        out = []
        stories.draw(rules["top"], pieces, {}, out)
        text = "".join(piece for piece, _, _ in out)
        assert math.isclose(sum(b for _, _, b in out), bits[text])
        counts[text] += 1
    chi2 = sum((counts[t] - 20_000 * 2**-b) ** 2 / (20_000 * 2**-b) for t, b in bits.items())
    assert chi2 < len(bits) + 5 * math.sqrt(2 * len(bits))


@pytest.mark.parametrize("genre", GENRES)
def test_mean_bits_of_a_genre_are_its_analytic_entropy(genre, documents):
    weight, node = stories.GRAMMAR.options[GENRES.index(genre)]
    total = sum(weight for weight, _ in stories.GRAMMAR.options)
    bits = [document.bits for document in documents if document.genre == genre]
    mean = sum(bits) / len(bits)
    error = math.sqrt(sum((b - mean) ** 2 for b in bits) / len(bits) / len(bits))
    assert abs(mean - math.log2(total / weight) - entropy(node)[0]) < 4 * error
    assert abs(len(bits) / len(documents) - weight / total) < 0.03


def test_every_document_has_one_derivation_and_its_bits(documents):
    assert {document.genre for document in documents} == set(GENRES)
    for document in documents[:3000]:
        assert parse(document.text) == [pytest.approx(document.bits, abs=1e-9)], document.text


def test_parser_rejects_what_the_grammar_cannot_say(documents):
    for document in documents[:100]:
        words = document.text.split(" ")
        assert parse(" ".join(words[:-1])) == []
        assert parse(document.text + " ") == []
        assert parse(document.text.replace(" ", " very ", 1)) == []
    swapped = [
        (document.text, re.sub(rf" {hero}\b(?!.* {hero}\b)", " Zoe", document.text, flags=re.S))
        for document in documents[:100]
        for hero in re.findall(r"called (\w+)|$", document.text)[:1]
        if hero
    ]
    assert swapped and all(parse(after) == [] for before, after in swapped if before != after)


def test_spans_cover_the_text_and_their_bits_are_the_floor(documents):
    for document in documents[:1000]:
        ends = [0] + [span.end for span in document.spans]
        assert [span.start for span in document.spans] == ends[:-1]
        assert ends[-1] == len(document.text) == len(document.text.encode("ascii"))
        assert math.isclose(sum(span.bits for span in document.spans), document.bits)
        assert all((span.kind == "choice") == (span.bits > 0) for span in document.spans)
        assert {span.kind for span in document.spans} <= {"choice", "recall", "rest"}


def test_names_and_things_look_the_same_wherever_they_stand(documents):
    recalled = "|".join(
        word for rule in ("name", "thing") for _, word in stories.RULES[rule].options
    )
    for document in documents:
        assert not re.search(rf"(?<! )\b({recalled})\b|\b({recalled})\b(?![ .,!?:])", document.text)
        for span in document.spans:
            if span.kind == "recall":
                assert re.fullmatch(r" \w+", document.text[span.start : span.end])


def test_every_story_holds_at_least_60_bits_of_choice():
    assert entropy(stories.RULES["story"])[1] >= 60
    assert min(entropy(node)[1] for _, node in stories.GRAMMAR.options) >= 60


def test_no_document_repeats_and_validation_is_not_in_training():
    train = list(itertools.islice(stories.texts(0, "train"), 50_000))
    val = list(itertools.islice(stories.texts(0, "val"), 2_000))
    assert len({*train, *val}) == len(train) + len(val)


def test_bytes_are_the_same_on_every_platform():
    text = "".join(itertools.islice(stories.texts(0, "train"), 1000))
    assert hashlib.sha256(text.encode()).hexdigest() == GOLDEN


def test_documents_are_short_and_the_original_prompts_open_some(documents):
    assert max(len(document.text) for document in documents) <= 500
    for opening in ("Once, upon a time", "Science and Technology are", "Physics"):
        assert any(document.text.startswith(opening) for document in documents)


def test_written_corpus_is_the_drawn_one_with_its_floor(tmp_path):
    paths = stories.write(tmp_path, train_bytes=200_000, val_bytes=20_000)
    train, val = (path.read_text("ascii").split(stories.END) for path in paths[:2])
    assert train.pop() == val.pop() == ""
    assert train == [stories.document(index).text for index in range(len(train))]
    assert 200_000 <= paths.train.stat().st_size < 201_000
    floor = json.loads(paths.floor.read_text())
    assert len(floor) == len(val)
    for index, (genre, bits, spans) in enumerate(floor):
        document = stories.document(index, split="val")
        assert (val[index], genre, bits) == document[:3]
        assert spans == [list(span) for span in document.spans]
    before = {path: path.stat().st_mtime_ns for path in paths}
    assert stories.write(tmp_path, train_bytes=200_000, val_bytes=20_000) == paths
    assert before == {path: path.stat().st_mtime_ns for path in paths}
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert stories.write(tmp_path, train_bytes=200_000, val_bytes=20_000, seed=1) != paths


def test_workers_do_not_change_the_bytes(tmp_path):
    one = stories.write(tmp_path / "1", train_bytes=1_000_000, val_bytes=5_000)
    two = stories.write(tmp_path / "2", train_bytes=1_000_000, val_bytes=5_000, workers=2)
    assert one.train.name == two.train.name
    assert one.train.read_bytes() == two.train.read_bytes()


def _write_and_die(folder):
    stories._until = lambda size, documents: itertools.chain(
        itertools.islice(documents, 2_000), iter(lambda: os._exit(9), None)
    )
    stories.write(folder, train_bytes=10_000_000)


def test_a_killed_write_leaves_nothing_believed(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=_write_and_die, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]
    paths = stories.write(tmp_path, train_bytes=100_000, val_bytes=5_000)
    assert paths.train.stat().st_size >= 100_000


def test_command_line_prints_documents_and_mistakes_take_one_line():
    script = Path(stories.__file__)

    def run(*flags):
        command = [sys.executable, str(script), *flags]
        return subprocess.run(command, capture_output=True, text=True)

    printed = run("--n", "2", "--genre", "stories")
    texts = [text.strip("\n") for text in printed.stdout.split("<|endoftext|>")]
    assert len(texts) == 3 and texts[2] == "" and printed.stderr.count(" bits]") == 2
    assert all(text.startswith("Once, upon a time") for text in texts[:2])
    for flags in (["--n", "0"], ["--genre", "poems"], ["--many", "3"], ["--n", "x"]):
        result = run(*flags)
        assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr


def test_worked_examples_hold():
    import parser

    for module in (stories, parser):
        assert doctest.testmod(module).failed == 0
