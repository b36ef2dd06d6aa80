"""Exercise 4: a queue in the order of time, so that no token depends on the future.

Task. Fill in `queue`. From the expert that each token was sent to, (B, T), it returns the position
of the token in the queue of that expert, (B, T), counted from 1. Tokens queue up in the order of
time: all rows at time 0, row 0 first, then all rows at time 1, and so on. An expert of capacity C
takes the first C of its queue; the others are dropped.

Why. Some code flattens (B, T) and counts row by row, or takes the highest scores first. Then a
later token can push out an earlier one. Training sees that, and generation, where the future does
not exist yet, can't: the two compute different models, and the loss reported is not the real one.

Tests. An example; that changing one choice changes no earlier position; a slow loop.

Hint. One-hot the experts and cumsum along the queue: cumsum counts how many came so far. Before
flattening, put the dimensions in the order of the queue.

Run:    pytest tests/exercises/test_4_capacity.py
Answer: lamoe.py, section 5, `Switch.queue`.
"""

import torch
from hypothesis import given
from hypothesis import strategies as st


def queue(experts_BT, n_experts):
    """(B, T), integers from 1."""
    raise NotImplementedError("fill in queue: the task stands at the top of this file")


def random_choice(B, T, E, seed):
    return torch.randint(E, (B, T), generator=torch.Generator().manual_seed(seed))


shapes = st.tuples(*[st.integers(1, 5)] * 3)
seeds = st.integers(0, 2**16)


def test_two_rows_and_three_times():
    queue_BT = queue(torch.tensor([[0, 0, 1], [0, 1, 1]]), 2)
    assert queue_BT.tolist() == [[1, 3, 2], [2, 1, 3]]  # expert 0: both at time 0, then row 0


@given(shapes, seeds, st.data())
def test_what_comes_later_changes_nothing(BTE, seed, data):
    (B, T, E), experts_BT = BTE, random_choice(*BTE, seed)
    b, t = data.draw(st.integers(0, B - 1)), data.draw(st.integers(0, T - 1))
    changed_BT = experts_BT.clone()
    changed_BT[b, t] = (experts_BT[b, t] + 1) % E
    before_BT, after_BT = queue(experts_BT, E), queue(changed_BT, E)
    same = torch.equal(before_BT[:, :t], after_BT[:, :t])
    assert same, f"a token at time {t} moved one at an earlier time: that one saw the future"
    assert torch.equal(before_BT[:b, t], after_BT[:b, t]), "at one time, lower rows go first"


@given(shapes, seeds)
def test_it_equals_a_loop(BTE, seed):
    (B, T, E), experts_BT = BTE, random_choice(*BTE, seed)
    length, queue_BT = [0] * E, torch.zeros_like(experts_BT)
    for t in range(T):
        for b in range(B):
            length[experts_BT[b, t]] += 1
            queue_BT[b, t] = length[experts_BT[b, t]]
    assert torch.equal(queue(experts_BT, E), queue_BT)
