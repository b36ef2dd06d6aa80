"""Exercise 3: bring tokens to their experts without a loop over tokens.

Task. Fill in `dispatch`. It returns, for each token n, the sum over a of
    weights_NA[n, a] * experts[experts_NA[n, a]](x_ND[n])
as `by_loop` below does, but calls each expert at most once, with all its rows in one (S, D) tensor.

Why. One row times a matrix reads the whole matrix for one row of work; many rows read it once.
Sorting the N*A pairs (token, expert) by expert makes each expert's rows neighbours: E
products do the work of N*A. The loop is right too, and far slower.

Tests. Equal to the loop, in values and in the gradients of x and weights; at most one call per
expert, also where an expert gets all tokens or none.

Hint. Pair s of experts_NA.flatten() belongs to token s // A. After argsort you know the token of
each row; split the rows by expert, and add each result back to its token (Tensor.index_add).

Run:    pytest tests/exercises/test_3_dispatch.py
Answer: lamoe.py, section 3, `plain_moe`; `sorted_moe` in section 4 does without the loop over
experts, too.
"""

from functools import partial

import torch
from hypothesis import given
from hypothesis import strategies as st


def dispatch(experts, x_ND, experts_NA, weights_NA):
    """(N, D). experts: a list of E functions from (S, D) to (S, D)."""
    raise NotImplementedError("fill in dispatch: the task stands at the top of this file")


def by_loop(experts, x_ND, experts_NA, weights_NA):
    y_ND = torch.zeros_like(x_ND)
    for n in range(len(x_ND)):
        for e, weight in zip(experts_NA[n].tolist(), weights_NA[n], strict=True):
            y_ND[n] += weight * experts[e](x_ND[n : n + 1])[0]
    return y_ND


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**16), st.data())
def test_it_equals_the_loop(N, E, D, seed, data):
    A, random = data.draw(st.integers(1, E)), torch.Generator().manual_seed(seed)
    experts = [partial(torch.matmul, other=m) for m in torch.randn(E, D, D, generator=random)]
    x_ND = torch.randn(N, D, generator=random, requires_grad=True)
    weights_NA = torch.rand(N, A, generator=random, requires_grad=True)
    experts_NA = torch.rand(N, E, generator=random).argsort(-1)[:, :A]
    results = []
    for way in (dispatch, by_loop):
        y_ND = way(experts, x_ND, experts_NA, weights_NA)
        results.append([y_ND, *torch.autograd.grad(y_ND.square().sum(), [x_ND, weights_NA])])
    for name, yours, loops in zip(
        ["y", "gradient of x", "gradient of weights"], *results, strict=True
    ):
        assert torch.allclose(yours, loops, atol=1e-5), f"{name} is not the loop's"


def test_each_expert_is_called_at_most_once():
    calls = []
    experts = [lambda x_SD, e=e: calls.append(e) or x_SD for e in range(4)]
    experts_NA = torch.tensor([[0, 1], [1, 0], [1, 3]])  # no token chose expert 2
    y_ND = dispatch(experts, torch.ones(3, 2), experts_NA, torch.full((3, 2), 0.5))
    torch.testing.assert_close(y_ND, torch.ones(3, 2))
    assert len(calls) == len(set(calls)), f"calls went to {calls}: gather an expert's rows first"
