"""Exercise 1: a router that sends each token to one expert, and that can learn.

Task. Fill in `top1`. From the router's logits, (N, E), it returns the best expert of each token and
the weight of that expert in the output, (N, 1) each.

Why. Choosing has no gradient. All that the task's loss can tell a router goes through the weight.
Mixtral's weight, a softmax over the chosen logits, is 1 when one is chosen: e^l / e^l, whatever l
is. A constant has gradient 0, so the task would teach that router nothing, and no loss curve says
why.

Tests. The choice, the weight, and whether every token's logits get a gradient from a task.

Hint. Let the weight still depend on the logits of the experts that were not chosen.

Run:    pytest tests/exercises/test_1_top1.py
Answer: lamoe.py, section 5, `Switch.forward`; the docstring of `TopK` names the trap.
"""

import pytest
import torch


def top1(logits_NE):
    """(experts_N1, weights_N1)"""
    raise NotImplementedError("fill in top1: the task stands at the top of this file")


def some_logits():
    return torch.randn(50, 4, generator=torch.Generator().manual_seed(0))


def test_each_token_goes_to_its_best_expert():
    logits_NE = some_logits()
    experts_N1, weights_N1 = top1(logits_NE)
    assert experts_N1.shape == weights_N1.shape == (50, 1), "one column: one expert per token"
    assert torch.equal(experts_N1[:, 0], logits_NE.argmax(-1))


def test_the_weight_is_the_probability_among_all_experts():
    logits_NE = torch.tensor([[0.3, 0.6, 0.1]]).log()
    weight = top1(logits_NE)[1].item()
    assert weight != 1, "that is a softmax over the one chosen: always 1, so it can't be learned"
    assert weight == pytest.approx(0.6), "the softmax over all experts gives the chosen one 0.6"


def test_the_task_teaches_the_router():
    logits_NE = some_logits().requires_grad_()
    experts_N1, weights_N1 = top1(logits_NE)
    assert weights_N1.requires_grad, "the weights are cut off from the logits"
    answers_E = torch.tensor([-1.0, 2.0, 0.5, 3.0])  # what each expert says; 1 would be right
    (weights_N1 * answers_E[experts_N1] - 1).square().sum().backward()
    slope_N = logits_NE.grad.abs().amax(-1)
    assert (slope_N > 1e-4).all(), "these tokens can't tell the router that it chose badly"
