"""Exercise 4: places in time order, so that no token learns of the future.

Task. Fill in `place`. From the expert that each token was sent to, (B, T), it returns where the
token stands in the queue of that expert, (B, T), counted from 1: all rows at time 0 from row 0 on,
then all rows at time 1, and so on. With a capacity C, tokens whose place is above C are dropped.

Why. Some code flattens (B, T) and counts row by row, or lets the highest scores in first. Then a
later token can take an earlier one's place. Training sees it and generation, where the future does
not exist yet, can't: the two compute different models, and the loss reported is not the real one.

Tests. An example; that changing one choice changes no place before it; a slow loop.

Hint. One-hot the experts and cumsum along the queue: cumsum counts how many came so far. Before
flattening, put the dimensions in the order in which places are given.

Run:    pytest tests/exercises/test_4_capacity.py
Answer: lamoe.py, section 5, `Switch.place`.
"""

import torch
from hypothesis import given
from hypothesis import strategies as st


def place(experts_BT, n_experts):
    """(B, T), integers from 1."""
    raise NotImplementedError("fill in place: the task stands at the top of this file")


def random_choice(B, T, E, seed):
    return torch.randint(E, (B, T), generator=torch.Generator().manual_seed(seed))


shapes = st.tuples(*[st.integers(1, 5)] * 3)
seeds = st.integers(0, 2**16)


def test_two_rows_and_three_times():
    places_BT = place(torch.tensor([[0, 0, 1], [0, 1, 1]]), 2)
    assert places_BT.tolist() == [[1, 3, 2], [2, 1, 3]]  # expert 0: both at time 0, then row 0


@given(shapes, seeds, st.data())
def test_what_comes_later_changes_nothing(BTE, seed, data):
    (B, T, E), experts_BT = BTE, random_choice(*BTE, seed)
    b, t = data.draw(st.integers(0, B - 1)), data.draw(st.integers(0, T - 1))
    changed_BT = experts_BT.clone()
    changed_BT[b, t] = (experts_BT[b, t] + 1) % E
    before_BT, after_BT = place(experts_BT, E), place(changed_BT, E)
    same = torch.equal(before_BT[:, :t], after_BT[:, :t])
    assert same, f"a token at time {t} moved one at an earlier time: that one saw the future"
    assert torch.equal(before_BT[:b, t], after_BT[:b, t]), "at one time, lower rows go first"


@given(shapes, seeds)
def test_it_equals_a_loop(BTE, seed):
    (B, T, E), experts_BT = BTE, random_choice(*BTE, seed)
    taken, places_BT = [0] * E, torch.zeros_like(experts_BT)
    for t in range(T):
        for b in range(B):
            taken[experts_BT[b, t]] += 1
            places_BT[b, t] = taken[experts_BT[b, t]]
    assert torch.equal(place(experts_BT, E), places_BT)
