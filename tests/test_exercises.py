"""The exercises can be solved, and their tests tell a solution from a stub and from a mistake.

Each check fills a fresh copy of the file, so all this holds whatever a reader wrote into it.
"""

import importlib.util
import inspect
import os
import re
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from conftest import EXERCISES, pytest_collection_modifyitems
from hypothesis import Phase, is_hypothesis_test, settings

import lamoe


def load(exercise):
    spec = importlib.util.spec_from_file_location(exercise, EXERCISES / f"{exercise}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------------------------------------
# Solutions: lamoe's and bpe's own functions, where they fit
# ---------------------------------------------------------------------------------------------


def top1(logits_NE):
    weights_N1, experts_N1 = logits_NE.softmax(-1).max(-1, keepdim=True)
    return experts_N1, weights_N1


def balance(probs_NE, experts_NA):
    load_E = experts_NA.flatten().bincount(minlength=probs_NE.shape[1]) / experts_NA.numel()
    return lamoe.balance_loss(probs_NE, load_E)


def dispatch(experts, x_ND, experts_NA, weights_NA):
    order_S = experts_NA.flatten().argsort(stable=True)
    token_S = order_S // experts_NA.shape[1]
    counts = experts_NA.flatten().bincount(minlength=len(experts)).tolist()
    rows = zip(experts, x_ND[token_S].split(counts), strict=True)
    y_SD = torch.cat([expert(x_SD) for expert, x_SD in rows if len(x_SD)])
    y_SD = y_SD * weights_NA.flatten()[order_S, None]
    return torch.zeros_like(x_ND).index_add(0, token_S, y_SD)


def merge(ids, pair, new_id):
    merged = []
    for i in ids:
        if merged and (merged[-1], i) == pair:
            merged[-1] = new_id
        else:
            merged.append(i)
    return merged


def learn(words, n_merges, best=lambda counts: min(counts, key=lambda p: (-counts[p], p))):
    words, merges = [(list(word), count) for word, count in words.items()], []
    for new_id in range(256, 256 + n_merges):
        counts = Counter()
        for ids, count in words:
            for pair in pairwise(ids):
                counts[pair] += count
        if not counts:
            break
        merges.append(best(counts))
        words = [(merge(ids, merges[-1], new_id), count) for ids, count in words]
    return merges


TOP_P = (EXERCISES.parent / "routers" / "top_p.py").read_text(encoding="utf-8")


def top_p(old="", new=""):
    """The class of tests/routers/top_p.py, with a mistake put into it."""
    assert old in TOP_P
    with patch.dict(lamoe.ROUTERS):
        exec(compile(TOP_P.replace(old, new) if old else TOP_P, "top_p.py", "exec"), names := {})
    return names["TopP"]


SOLUTIONS = {
    "test_1_top1": {"top1": top1},
    "test_2_balance": {"balance": balance},
    "test_3_dispatch": {"dispatch": dispatch},
    "test_4_capacity": {"queue": lamoe.Switch.queue},
    "test_5_bpe": {"merge": merge, "learn": learn},
    "test_6_router": {"TopP": top_p()},
}

# ---------------------------------------------------------------------------------------------
# Classic mistakes, and what the reader is told
# ---------------------------------------------------------------------------------------------


def softmax_over_the_chosen(logits_NE):
    chosen_N1, experts_N1 = logits_NE.max(-1, keepdim=True)
    return experts_N1, chosen_N1.softmax(-1)


def squared_probabilities(probs_NE, experts_NA):
    return probs_NE.shape[1] * probs_NE.mean(0).square().sum()


def by_row(experts_BT, n_experts):
    return lamoe.Switch.queue(experts_BT.reshape(1, -1), n_experts).view_as(experts_BT)


def first_of_equals(words, n_merges):
    return learn(words, n_merges, best=lambda counts: max(counts, key=counts.get))


compares_tokens = top_p("self.logits(x_BTD).softmax(-1)", "self.logits(x_BTD).softmax(0)")
stops_before_p = top_p(
    "probs_NA.cumsum(-1) - probs_NA < P",
    "(experts_NA == experts_NA[:, :1]) | (probs_NA.cumsum(-1) < P)",  # one is always kept
)


MISTAKES = [
    ("test_1_top1", "top1", softmax_over_the_chosen, "chose badly.*always 1"),
    ("test_2_balance", "balance", squared_probabilities, r"E \* f_e / N"),
    (
        "test_3_dispatch",
        "dispatch",
        load("test_3_dispatch").by_loop,
        "gather an expert's rows first",
    ),
    ("test_4_capacity", "queue", by_row, "saw the future"),
    ("test_5_bpe", "learn", first_of_equals, "once each"),
    ("test_6_router", "TopP", compares_tokens, "compares tokens"),
    ("test_6_router", "TopP", stops_before_p, "not close"),
]

# ---------------------------------------------------------------------------------------------
# The checks
# ---------------------------------------------------------------------------------------------


def failures(exercise, **answers):
    """{test: the error, or None} of an exercise where these answers are filled in."""
    module, found = load(exercise), {}
    vars(module).update(answers)
    for name, test in inspect.getmembers(module, inspect.isfunction):
        if name.startswith("test_"):
            if is_hypothesis_test(test):  # a failure needs no smallest example here
                test = settings(max_examples=25, phases=[Phase.generate])(test)
            try:
                found[name] = test()
            except Exception as error:
                found[name] = error
    return found


def unsolved(*args):
    raise NotImplementedError


class UnsolvedRouter(lamoe.Router):
    forward = unsolved


def test_every_exercise_has_a_solution():
    assert sorted(SOLUTIONS) == sorted(path.stem for path in EXERCISES.glob("*.py"))


@pytest.mark.parametrize("exercise", SOLUTIONS)
def test_the_solution_passes(exercise):
    assert set(failures(exercise, **SOLUTIONS[exercise]).values()) == {None}


@pytest.mark.parametrize("exercise", SOLUTIONS)
def test_every_test_fails_until_solved(exercise):
    stubs = {
        name: UnsolvedRouter if isinstance(answer, type) else unsolved
        for name, answer in SOLUTIONS[exercise].items()
    }
    found = failures(exercise, **stubs)
    assert {type(error) for error in found.values()} == {NotImplementedError}


@pytest.mark.parametrize(
    "exercise, name, mistake, told",
    MISTAKES,
    ids=[f"{name}-{i}" for i, (_, name, _, _) in enumerate(MISTAKES)],
)
def test_a_classic_mistake_is_told_why(exercise, name, mistake, told):
    found = failures(exercise, **{**SOLUTIONS[exercise], name: mistake})
    assert re.search(told, " ".join(map(str, found.values())), re.DOTALL)


@pytest.mark.skipif(
    os.environ.get("LAMOE_REQUIRE_ORACLES") != "1", reason="a reader may have solved some"
)
def test_all_are_left_to_the_reader():
    for exercise, answers in SOLUTIONS.items():
        text = (EXERCISES / f"{exercise}.py").read_text()
        assert text.count("raise NotImplementedError") == len(answers), exercise


@pytest.mark.parametrize(
    "named, runs",
    [("tests", False), ("", True), ("test_5_bpe.py::test_one_merge", True), ("test_1.py", False)],
)
def test_an_exercise_runs_only_when_its_file_or_folder_is_named(named, runs):
    named = named if named == "tests" else str(EXERCISES / named)
    marks = []
    item = SimpleNamespace(path=EXERCISES / "test_5_bpe.py", add_marker=marks.append)
    pytest_collection_modifyitems(SimpleNamespace(args=[named]), [item])
    assert runs == (not marks)
    assert runs or "pytest tests/exercises/test_5_bpe.py" in marks[0].kwargs["reason"]
