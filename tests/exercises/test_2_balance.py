"""Exercise 2: the loss that keeps experts busy.

Task. Fill in `balance`: E * sum over e of f_e P_e. Here f_e is the share of all N*A choices that
went to expert e, and P_e the mean over tokens of its probability.

Why. An expert that is chosen more learns more, and is then chosen still more: without this loss a
few experts take everything. f says which are too busy, but a count has no gradient: moving a logit
a little changes no choice. P has one. So f only measures, and P is pushed down, most where f is
large.

Tests. Two cases (1 when routing is uniform, E when one expert takes all), the gradient, and
equality with lamoe.balance_loss on random choices. E * sum P^2 passes the two cases, too, and is
wrong.

Hint. A token counts A times: over all experts f sums to 1.

Run:    pytest tests/exercises/test_2_balance.py
Answer: lamoe.py, section 5, `balance_loss` and `Router.load`.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lamoe


def balance(probs_NE, experts_NA):
    """A tensor with one number."""
    raise NotImplementedError("fill in balance: the task stands at the top of this file")


def test_even_use_costs_1():
    loss = balance(torch.full((6, 4), 0.25), torch.tensor([[0, 1], [2, 3]]).repeat(3, 1))
    assert loss.item() == pytest.approx(1), "E * sum of 1/E * 1/E over E experts"


def test_collapse_costs_as_much_as_there_are_experts():
    probs_NE = torch.tensor([1.0, 0, 0, 0]).repeat(6, 1)
    assert balance(probs_NE, torch.zeros(6, 1, dtype=torch.long)).item() == pytest.approx(4)


def test_each_probability_is_pushed_by_how_busy_its_expert_is():
    probs_NE = torch.tensor([[0.5, 0.4, 0.1], [0.6, 0.1, 0.3]], requires_grad=True)
    balance(probs_NE, torch.tensor([[0, 1], [0, 2]])).backward()
    f_E, (N, E) = torch.tensor([0.5, 0.25, 0.25]), (2, 3)
    torch.testing.assert_close(
        probs_NE.grad,
        (E * f_E / N).expand(N, E),
        msg=lambda why: (
            f"{why}\nEach gradient must be E * f_e / N: f comes from the choices alone."
        ),
    )


@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 2**16), st.data())
def test_it_equals_lamoe(N, E, seed, data):
    A = data.draw(st.integers(1, E))
    logits_NE = torch.randn(N, E, generator=torch.Generator().manual_seed(seed))
    probs_NE, experts_NA = logits_NE.softmax(-1), lamoe.choose(logits_NE, A)
    load_E = experts_NA.flatten().bincount(minlength=E) / experts_NA.numel()
    theirs = lamoe.balance_loss(probs_NE, load_E)
    torch.testing.assert_close(balance(probs_NE, experts_NA), theirs)
