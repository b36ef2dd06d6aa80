"""Weights in bf16 with fp32 masters: what a recorded step trains is what autocast alone trains.

On a CPU, uncompiled. A GPU differs from it in its kernels alone.
"""

import shutil
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import random_ids, random_model, small_config
from tiny_run import TINY, at_training_step, call, press_ctrl_c

import lamoe
import train
from data import kernels
from data.run import checkpoint, machine, ranks
from data.run.masters import Masters

SIZES = {"dim": 16, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "hidden_dim": 8}
SETTINGS = train.TrainConfig(device="cpu", dtype="bf16", muon_ffn=True, muon_lr=0.02)
GROUPED = (lamoe.fused_attention, lamoe.sorted_moe)


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def pair(**changes):
    """(model, optimizers) twice: as it is, and with masters."""
    both = []
    for has_masters in (False, True):
        model = random_model(small_config(**SIZES, **changes)).train()
        optimizers = train.make_optimizers(model, SETTINGS)
        if has_masters:
            Masters(model, optimizers[0])
        both.append((model, optimizers))
    return both


def backward(model, ids_BT):
    with machine.autocast(SETTINGS):
        out = model(ids_BT[:, :-1], ids_BT[:, 1:])
    (out.loss + out.aux).backward()
    return out.loss


def trained(model, optimizers, rounding=False):
    """The state after some steps as train.py does them; rounding: of momenta, by hand."""
    for step in range(5):
        backward(model, random_ids(model.config, 3, 9, seed=step))
        ranks.clip_gradients(model, 1.0, optimizers[0])  # so that it acts
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for state in optimizers[0].state.values() if rounding else ():
            state["momentum"].copy_(state["momentum"].bfloat16())
    return model.state_dict()


@pytest.mark.parametrize(
    "n_experts, run", [(1, None), (4, None), (4, kernels.GroupedExperts.apply)]
)
def test_loss_and_gradients_are_bit_for_bit_those_of_autocast(n_experts, run, monkeypatch):
    """Only their dtype differs: those of a weight in bf16 were cast from bf16 before."""
    if run:
        monkeypatch.setattr(lamoe, "pick_kernels", lambda x, c: GROUPED)
        monkeypatch.setattr(lamoe, "run_grouped", run)
    (plain, _), (ours, _) = pair(n_experts=n_experts, n_shared_experts=int(n_experts > 1))
    ids_BT = random_ids(plain.config, 3, 9)
    assert torch.equal(backward(plain, ids_BT), backward(ours, ids_BT))
    for (name, a), b in zip(plain.named_parameters(), ours.parameters(), strict=True):
        in_bf16 = ".attn." in name or ".ffn." in name and ".router." not in name
        assert b.grad.dtype == b.dtype == (torch.bfloat16 if in_bf16 and b.dim() > 1 else a.dtype)
        assert torch.equal(a.grad, b.grad.float()), name


def test_steps_move_the_masters_bit_for_bit_as_they_would_the_weights(monkeypatch):
    """But momenta are rounded. What the model holds is the masters, rounded."""
    # Else both would add up squares in another order.
    monkeypatch.setattr(ranks, "total_norm", lambda grads: torch.tensor(2.0))
    plain, (ours, optimizers) = pair()
    expected, state = trained(*plain, rounding=True), trained(ours, optimizers)
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
    for name, weight in ours.named_parameters():
        assert torch.equal(weight, state[name].to(weight.dtype))
    momenta = [values["momentum"] for values in optimizers[0].state.values()]
    assert all(momentum.dtype == torch.bfloat16 for momentum in momenta)


def test_the_norm_of_gradients_in_bf16_is_in_fp32():
    grads = [torch.randn(99, 7), torch.randn(50, 50).bfloat16(), torch.randn(3)]
    exact = torch.cat([grad.double().flatten() for grad in grads]).norm()
    assert abs(ranks.total_norm(grads) - exact) < 1e-6 * exact
    assert torch.equal(ranks.total_norm(grads[::2]), torch.nn.utils.get_total_norm(grads[::2]))


def with_masters(on=True):
    """Runs begin as they do where a step is recorded, if `on`."""
    make = Masters if on else lambda *_: None
    return mock.patch.object(
        machine, "compile_model", lambda run: bool(make(run.model, run.optimizers[0])) and False
    )


def leaves(tree):
    if isinstance(tree, dict | list | tuple):
        values = tree.values() if isinstance(tree, dict) else tree
        return [leaf for value in values for leaf in leaves(value)]
    return [tree]


def test_a_resume_is_bit_exact_and_a_run_without_masters_goes_on_with_them(workplace):
    flags = ["--data", "text.txt", *TINY, "--dtype", "bf16", "--steps", "12", "--muon_ffn"]
    for name, on in (("run", True), ("plain", False)):
        with with_masters(on), at_training_step(6, press_ctrl_c):
            assert call(train, *flags, "--out", name) == 130
        shutil.copytree(name, f"{name} elsewhere")
    half = checkpoint.read("run/last.pt")
    assert {weight.dtype for weight in half["model"].values()} == {torch.float32}
    states = [state["momentum"] for state in half["optimizers"][0]["state"].values()]
    assert {momentum.dtype for momentum in states} == {torch.bfloat16}
    with with_masters():
        assert call(train, *flags, "--out", "straight") == 0
        assert call(train, "--resume", "--out", "run") == 0
        assert call(train, "--resume", "--out", "plain elsewhere") == 0
    with with_masters(False):
        assert call(train, "--resume", "--out", "run elsewhere") == 0
    straight, resumed = (checkpoint.read(f"{name}/last.pt") for name in ("straight", "run"))
    for part in ("model", "optimizers", "meter"):
        for a, b in zip(leaves(straight[part]), leaves(resumed[part]), strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_masters_are_kept_where_a_step_is_recorded_and_nowhere_else(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setitem(lamoe.ROUTERS, "own", lamoe.TopK)  # which may not compile
    changes = [{}, {"device": "cpu"}, {"dtype": "fp32"}, {"grad_accum": 2}, {"router": "own"}]
    for change in changes:
        model = random_model(small_config(**SIZES, router=change.pop("router", "topk")))
        values = {"device": "cuda", "dtype": "bf16", **change}
        settings = train.TrainConfig(**values, muon_ffn=True)
        optimizers = train.make_optimizers(model, settings)
        machine.keep_masters(SimpleNamespace(model=model, optimizers=optimizers, settings=settings))
        in_bf16 = {weight.dtype for weight in model.parameters()} == {torch.float32, torch.bfloat16}
        assert in_bf16 == (not change and model.config.router == "topk")
