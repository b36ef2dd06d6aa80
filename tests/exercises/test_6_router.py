"""Exercise 6: a fifth router, which asks more experts where it is less sure.

Task. Fill in `TopP` (Huang et al. 2024, arXiv:2403.07652). Go through the experts of a token, the
most probable first, and keep them until the probabilities kept reach P, or top_k are kept. Their
weights are their probabilities, made to sum to 1. Each row has top_k slots; those not kept have
weight 0. load_E is the share of the *kept* choices that each expert got.

Why. Not every token is equally hard. And a router can break the whole model: one that compares
tokens ("expert choice": each expert takes the tokens it scores highest) trains well and is no
language model, because what a token gets then depends on later ones.

Tests. Three tokens by hand; a small model learns; later tokens change no earlier logit.

Hint. lamoe.choose sorts for you. A slot is kept if the sum *before* it has not reached P:
cumsum minus itself. self.load counts choices; one of expert -1 is no expert's. The loss may stay 0.

Run:    pytest tests/exercises/test_6_router.py
Answer: tests/routers/top_p.py, beside two other kinds of router; `python train.py --router FILE.py`
trains with such a file. Its nearest relative is `TopK` in lamoe.py, section 5.
"""

from unittest.mock import patch

import torch

import lamoe

P = 0.7


class TopP(lamoe.Router):
    def forward(self, x_BTD, ids_BT):
        """lamoe.Routing(experts_NA, weights_NA, load_E=...), where A is self.config.top_k"""
        raise NotImplementedError("fill in TopP.forward: the task stands at the top of this file")


def built(kind, dim):
    """A model (or a router) of a config that names your router."""
    torch.manual_seed(0)
    with patch.dict(lamoe.ROUTERS, topp=TopP):  # all it takes to be one of lamoe's
        shape = dict(vocab_size=8, n_layers=1, hidden_dim=16, n_experts=4, top_k=3, seq_len=16)
        return kind(lamoe.Config(dim=dim, router="topp", **shape))


def test_it_keeps_experts_until_p_is_reached():
    router = built(TopP, dim=4)
    router.weight.data = torch.eye(4)  # now the softmax of a token's logits is its row here
    sure, unsure, even = [0.1, 0.75, 0.1, 0.05], [0.05, 0.3, 0.5, 0.15], [0.251, 0.25, 0.25, 0.249]
    x_BTD, ids_BT = torch.tensor([[sure, unsure, even]]).log(), torch.zeros(1, 3, dtype=torch.long)
    routing = router(x_BTD, ids_BT)
    experts_NA, weights_NA, load_E = routing.experts_NA, routing.weights_NA, routing.load_E
    assert experts_NA[:, 0].tolist() == [1, 2, 0] and experts_NA[1, 1] == 1, "most probable first"
    expected_NA = torch.tensor([[1, 0, 0], [0.625, 0.375, 0], [1 / 3, 1 / 3, 1 / 3]])
    torch.testing.assert_close(weights_NA, expected_NA, atol=1e-2, rtol=0)
    torch.testing.assert_close(load_E, torch.tensor([1, 3, 2, 0]) / 6)  # of six choices kept


def test_a_small_model_learns_with_it():
    model, ids_BT, losses = built(lamoe.LaMoE, dim=16), torch.randint(8, (1, 17)), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        out = model(ids_BT[:, :-1], ids_BT[:, 1:])
        losses.append(out.loss.item())
        optimizer.zero_grad()
        (out.loss + out.aux).backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 4, (
        f"the loss only went from {losses[0]:.2f} to {losses[-1]:.2f}"
    )
    assert abs(out.load.sum() - 1) < 1e-6, "shares sum to 1"
    grad_ED = model.blocks[0].ffn.router.weight.grad
    assert grad_ED is not None and grad_ED.any(), "the task does not reach the router"


def test_later_tokens_change_no_earlier_logit():
    model, ids_BT = built(lamoe.LaMoE, dim=16).eval(), torch.arange(16)[None] % 8
    for weight in model.parameters():
        torch.nn.init.normal_(weight)  # a new model's zeros would hide the router
    changed_BT = ids_BT.clone()
    changed_BT[:, 8:] = 3
    before_BTV, after_BTV = model(ids_BT).logits, model(changed_BT).logits
    same = torch.allclose(before_BTV[:, :8], after_BTV[:, :8], atol=1e-3)
    assert same, "a token's experts must depend on that token alone; this router compares tokens"
