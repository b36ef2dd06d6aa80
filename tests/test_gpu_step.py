"""The step in few kernels has the logits and the text of lamoe.py's.

Anywhere with what each kernel says that it does, in torch; with the kernels themselves on an NVIDIA
card, or slowly on a CPU where Triton is: TRITON_INTERPRET=1 pytest tests/test_gpu_step.py
"""

import math
import os
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import random_ids, random_model, small_config, with_biases, written

import lamoe
from data import gpu_step, one_row
from data.run.routers import router_name

ROUTERS = sorted(lamoe.ROUTERS)
OWN = sorted((Path(__file__).parent / "routers").glob("*.py"))
PLAIN = one_row.RowStep.__base__
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
can_run = gpu_step.triton and (DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")
needs_kernels = pytest.mark.skipif(not can_run, reason="needs an NVIDIA card, or see above")
needs_card = pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA card")
WAYS = ["in torch", pytest.param("kernels", marks=needs_kernels)]


def rms_norm(x, weight, eps):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def product(x, norm, W, y, N, eps, **_):
    y.copy_(rms_norm(x, norm, eps) @ W.T)


def attend(qkv, q_norm, k_norm, cos, sin, keys, values, position, y, lse, S, eps, scale, **sizes):
    H, G, K, at = sizes["H"], sizes["G"], sizes["K"], int(position)
    q, k, v = qkv.view(len(keys), -1, K).split((H, G, G), dim=1)
    if sizes["NORM"]:
        q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
    keys[:, :, at], values[:, :, at] = lamoe.apply_rope(k, cos[at], sin[at]), v
    seen = keys[:, :, : at + 1], values[:, :, : at + 1]
    q = lamoe.apply_rope(q, cos[at], sin[at])[:, :, None]
    y[0] = lamoe.plain_attention(q, *seen).flatten(1)
    y[1:] = torch.nan
    y.nan_to_num_(7.0)  # must not count
    lse.fill_(-1e30)[0] = 0


def output(y, lse, W, x, N, C, H, **_):
    share = lse.softmax(0).repeat_interleave(C // H, -1)
    x += (share * y).sum(0) @ W.T


def add_and_route(x, added, norm, h, W, experts, weights, N, eps, A, ADDED, **_):
    x += added[:ADDED].sum(0)
    h.copy_(rms_norm(x, norm, eps))
    if A:
        logits = h @ W.T
        experts.copy_(logits.topk(A).indices)
        weights.zero_().scatter_(1, experts, logits.topk(A).values.softmax(-1))


def gate_up(h, W, experts, weights, u, F, **_):
    for a, e in enumerate(experts.flatten().tolist()):
        u[a * F : (a + 1) * F] = weights[0, e] * lamoe.swiglu(h[0] @ W[e].T)


def down(u, W, experts, x, N, F, **_):
    for a, e in enumerate(experts.flatten().tolist()):
        x += u[a * F : (a + 1) * F] @ W[e].T


def swiglu(gate_up, weights, u, F, **_):
    u.copy_(weights[..., None] * lamoe.swiglu(gate_up.view(*weights.shape, 2 * F)))


def draw(logits, noise, ids, V, temperature, log_min_p, **_):
    ids.copy_(lamoe.sample(logits, noise, temperature, None, None, math.exp(log_min_p)))


@pytest.fixture
def way(request, monkeypatch):
    """The kernels, or in their place the functions above."""
    if request.param == "in torch":
        monkeypatch.setattr(gpu_step, "triton", "there")
        for function in (product, attend, output, add_and_route, gate_up, down, swiglu, draw):
            launcher = mock.MagicMock(**{"__getitem__.return_value": function})
            monkeypatch.setattr(gpu_step, f"{function.__name__}_kernel", launcher, raising=False)
    return request.param


class FewKernels(PLAIN):
    """A step that is always in few kernels."""

    def __init__(self, *args):
        super().__init__(*args)
        assert gpu_step.covers(self)
        self.next = gpu_step.FewKernels(self)


def assert_writes_the_same(config, way, batch):
    device = "cpu" if way == "in torch" else DEVICE
    model = with_biases(random_model(config), "bias").to(device)
    ids_BT = random_ids(config, batch, 3).to(device)
    ids, logits = written(FewKernels, model, ids_BT, 6, 0.0, graph=False)
    plain_ids, plain_logits = written(PLAIN, model, ids_BT, 6, 0.0, graph=False)
    assert torch.equal(ids, plain_ids)
    assert (logits - plain_logits).abs().max() < 1e-4
    assert not torch.equal(logits[1:], plain_logits[1:]), "the plain code has run twice"


SHAPES = {
    "as it is": {},
    "qk_norm": {"qk_norm": True, "norm_eps": 0.1},
    "tied": {"tie_embeddings": True, "n_kv_heads": 4},
    "dense layers": {"n_dense_layers": 1, "n_shared_experts": 2},
    "dense": {"n_experts": 1},
    "nothing even": {"vocab_size": 23, "dim": 15, "head_dim": 6, "hidden_dim": 7, "n_experts": 5},
    "stretched positions": {"rope_factor": 8.0, "rope_theta": 100.0},
}
BATCHES = pytest.mark.parametrize("batch", [1, 5])
IN_WAYS = pytest.mark.parametrize("way", WAYS, indirect=True)


@IN_WAYS
@BATCHES
@pytest.mark.parametrize("shape", SHAPES)
def test_few_kernels_have_the_logits_and_the_text_of_the_plain_step(shape, batch, way):
    assert_writes_the_same(small_config(**SHAPES[shape]), way, batch)


@IN_WAYS
@BATCHES
@pytest.mark.parametrize("router", ROUTERS)
def test_each_router(router, batch, way):
    sizes = {"n_experts": 8, "n_groups": 2, "n_shared_experts": 1}
    assert_writes_the_same(small_config(**sizes, router=router), way, batch)


@IN_WAYS
@BATCHES
@pytest.mark.parametrize("file", OWN, ids=lambda path: path.stem)
def test_a_router_from_a_file(file, batch, way, monkeypatch):
    monkeypatch.setattr(lamoe, "ROUTERS", dict(lamoe.ROUTERS))
    config = small_config(router=router_name(str(file)), n_experts=6, top_k=3)
    assert_writes_the_same(config, way, batch)


@IN_WAYS
@BATCHES
@pytest.mark.parametrize(
    "options", [{}, {"min_p": 0.1}, {"top_k": 9, "stop": 5}, {"repetition_penalty": 1.7}]
)
def test_draws_are_those_of_the_plain_step(options, batch, way):
    device = "cpu" if way == "in torch" else DEVICE
    model, texts = random_model(small_config()).to(device), []
    for step in (PLAIN, FewKernels):
        generator = torch.Generator(device).manual_seed(3)
        ids_BT = random_ids(model.config, batch, 3).to(device)
        options = {"temperature": 0.9, "graph": False, **options}
        ids, _ = written(step, model, ids_BT, 12, generator=generator, **options)
        texts.append(ids.tolist())
    assert texts[0] == texts[1]


@needs_kernels
def test_matrices_larger_than_a_block_and_positions_in_splits(monkeypatch):
    for sizes in (gpu_step.PRODUCT, gpu_step.OUTPUT, gpu_step.GATE_UP, gpu_step.DOWN):
        monkeypatch.setitem(sizes, "ROWS", 2)
        monkeypatch.setitem(sizes, "COLUMNS", 4)
    monkeypatch.setitem(gpu_step.ATTEND, "BLOCK", 2)
    assert_writes_the_same(small_config(qk_norm=True), "kernels", 1)


@needs_card
@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("changes", [{}, {"router": "deepseek", "n_shared_experts": 1}])
def test_in_a_cuda_graph_the_same_seed_writes_the_same_text(batch, changes):
    """In bf16; and what kernels that begin early wrote is what is written one after the other."""
    sizes = {"dim": 512, "hidden_dim": 704, "n_experts": 8, "vocab_size": 999, "seq_len": 512}
    model = random_model(small_config(**{**sizes, **changes})).cuda().bfloat16()
    for block in model.blocks:  # as load reads it
        block.ffn.router.weight.data = block.ffn.router.weight.float()
    ids_BT, texts = random_ids(model.config, batch, 5).cuda(), []
    for graph in (True, True, False):
        generator = torch.Generator("cuda").manual_seed(1)
        with mock.patch.object(lamoe, "Step", one_row.RowStep if graph else FewKernels):
            ids = model.generate(ids_BT, 400, 0.9, generator=generator, graph=graph, compile=graph)
            texts.append(torch.stack(list(ids)))
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])


def of(B=1, dtype=torch.float32, **changes):
    model = random_model(small_config(**changes)).to(dtype)
    for block in model.blocks:  # as load reads it
        block.ffn.router.weight.data = block.ffn.router.weight.float()
    return PLAIN(model, B, 9, (0.0,), 1.0, None)


def test_what_is_left_to_the_compiler(monkeypatch):
    monkeypatch.setattr(gpu_step, "triton", None)
    assert not gpu_step.covers(of())
    monkeypatch.setattr(gpu_step, "works", lambda device: True)
    assert gpu_step.covers(of()) and gpu_step.covers(of(dtype=torch.bfloat16))
    sizes = {"n_experts": 64, "top_k": 2, "dim": 8}
    assert gpu_step.covers(of(16, **sizes)) and gpu_step.covers(of(1, **sizes))
    assert not gpu_step.covers(of(15, **sizes)), "most experts would be read for nothing"
    assert not gpu_step.covers(of(257)), "with many rows sorting is less work"
    with torch.autocast("cpu", torch.bfloat16):
        assert not gpu_step.covers(of())


def test_triton_that_can_not_compile_is_none(monkeypatch):
    launcher = mock.MagicMock(**{"__getitem__.return_value": draw})
    monkeypatch.setattr(gpu_step, "triton", "there")
    monkeypatch.setattr(gpu_step, "draw_kernel", launcher, raising=False)
    assert gpu_step.works("cpu")
    launcher.__getitem__.return_value = mock.Mock(side_effect=RuntimeError("no C compiler"))
    assert not gpu_step.works("cpu")


@pytest.mark.parametrize("is_cuda", [True, False])
@pytest.mark.parametrize("is_covered", [True, False])
@pytest.mark.parametrize("has_compiler", [True, False])
def test_what_compiling_means(is_cuda, is_covered, has_compiler, monkeypatch):
    step = object.__new__(one_row.RowStep)
    step.position = SimpleNamespace(is_cuda=is_cuda, device=torch.device("cpu"))
    step.next, step.model = "as it is", random_model(small_config())
    monkeypatch.setattr(gpu_step, "covers", lambda step: is_covered)
    monkeypatch.setattr(gpu_step, "FewKernels", lambda step: "few kernels")
    monkeypatch.setattr(one_row, "has_compiler", lambda device: has_compiler)
    monkeypatch.setattr(PLAIN, "compile", lambda self: setattr(self, "next", "compiled"))
    step.compile()
    otherwise = "compiled" if has_compiler else "as it is"
    assert step.next == ("few kernels" if is_cuda and is_covered else otherwise)


def test_no_weight_is_copied_but_those_of_q_k_and_v():
    model = random_model(small_config(n_shared_experts=1, n_dense_layers=1))
    weights = {w.untyped_storage().data_ptr() for w in model.parameters()}
    for block in model.blocks:
        layer = gpu_step.Layer(block, model.config)
        parts = [*layer.norms, *layer.qk_norms, layer.o, *layer.always, *(layer.experts or ())]
        assert {w.untyped_storage().data_ptr() for w in parts} <= weights
