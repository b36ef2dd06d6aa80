"""The code that only a GPU runs, held against the plain code, on a CPU.

What asks for a GPU is told that there is one, and what would be compiled to kernels is traced and
run as it is (backend "aot_eager"): the same Python, the same graph, without a compiler.
"""

from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import random_ids, random_model, seeds, small_config
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import call, rows_of

import lamoe
import train
from data import kernels
from data.run.machine import compile_blocks, has_compiler

ROUTERS = sorted(lamoe.ROUTERS)
SIZES = {"dim": 16, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "hidden_dim": 8, "n_experts": 4}


def masked_grouped_mm(x_SD, w_EDF, offs):
    """F.grouped_mm by masks: what is compiled needs it in fp32, which torch refuses to trace."""
    row_S1 = torch.arange(len(x_SD))[:, None]
    begins = [torch.zeros_like(offs[0]), *offs.unbind()]
    parts = zip(begins, offs.unbind(), w_EDF.unbind(), strict=False)  # a begin more than ends
    return sum(((row_S1 >= a) & (row_S1 < b)) * (x_SD @ w_DF) for a, b, w_DF in parts)


GPU_KERNELS = (lamoe.fused_attention, lamoe.sorted_moe)


@pytest.fixture
def as_on_a_gpu():
    """The kernels of a GPU, and a compiler that only traces."""
    torch._dynamo.reset()
    with (
        mock.patch.object(lamoe, "pick_kernels", lambda x, c: GPU_KERNELS),
        mock.patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")),
    ):
        yield
    torch._dynamo.reset()


def results(model, ids_BT):
    """Loss, aux, load and all gradients; noise is the same each time."""
    torch.manual_seed(0)
    out = model(ids_BT[:, :-1], ids_BT[:, 1:])
    grads = torch.autograd.grad(out.loss + out.aux, list(model.parameters()))
    return [out.loss, out.aux, out.load, out.dropped, out.logits, *grads]


def assert_all_close(ours, theirs, tolerance=1e-5):
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= tolerance * (1 + b.abs().max())


@pytest.mark.parametrize("router", ROUTERS)
def test_kernels_of_a_gpu_equal_the_plain_ones(router, as_on_a_gpu):
    model = random_model(small_config(**SIZES, router=router)).train()
    ids_BT = random_ids(model.config, 3, 9)
    grouped = results(model, ids_BT)
    plain = (lamoe.plain_attention, lamoe.plain_moe)
    with mock.patch.object(lamoe, "pick_kernels", lambda x, c: plain):
        assert_all_close(grouped, results(model, ids_BT))


@pytest.mark.parametrize("router", ROUTERS)
def test_compiled_training_equals_eager(router, as_on_a_gpu):
    """Each block is one graph without a break: a break would wait for the GPU."""
    config = small_config(**SIZES, router=router, n_layers=3, jitter=0.0, qk_norm=True)
    model = random_model(config).train()
    ids_BT = random_ids(config, 3, 9)
    with (
        mock.patch.object(F, "grouped_mm", masked_grouped_mm),
        mock.patch.object(torch, "randn_like", lambda x: 0 * x),  # else in another order
    ):
        eager = results(model, ids_BT)
        compile_blocks(model)
        torch._dynamo.utils.counters.clear()
        assert_all_close(results(model, ids_BT), eager)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # one block, one loss


@pytest.mark.parametrize(
    "router, n_experts, temperature", [("topk", 1, 0.9), ("topk", 4, 0.0), ("deepseek", 4, 0.9)]
)
def test_a_step_of_fixed_shapes_generates_the_same(router, n_experts, temperature, as_on_a_gpu):
    """What a CUDA graph captures: all S positions and a mask, and nothing asked back."""
    sizes = {**SIZES, "n_experts": n_experts, "n_layers": 2, "seq_len": 24}
    model = random_model(small_config(**sizes, router=router, qk_norm=True))
    ids_BT = random_ids(model.config, 1, 3)
    expected = [
        int(ids_B)
        for ids_B in model.generate(
            ids_BT, 12, temperature, min_p=0.05, generator=torch.Generator().manual_seed(1)
        )
    ]
    step = lamoe.Step(model, 1, 20, (temperature, None, None, 0.05), 1.0, None)
    step.static, step.fuses, generator = True, True, torch.Generator().manual_seed(1)
    compiled = torch.compile(step.run, fullgraph=True, dynamic=False)
    found = []
    with torch.inference_mode():
        for n in range(12):
            if temperature:
                step.noise_BV.exponential_(generator=generator)
            step.read(ids_BT) if n == 0 else compiled()
            found.append(int(step.ids_B1))
    assert found == expected


@given(shape=st.tuples(st.integers(1, 5), st.integers(2, 9)), seed=seeds, data=st.data())
def test_rounds_of_argmax_choose_what_topk_chooses(shape, seed, data):
    k = data.draw(st.integers(1, shape[1]))
    scores_NE = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(lamoe.choose(scores_NE, k), scores_NE.topk(k).indices)


@pytest.mark.parametrize("changes", [{}, {"n_experts": 1}, {"router": "deepseek", "qk_norm": True}])
def test_a_step_compiled_on_a_cpu_writes_what_eager_does(changes):
    """By the real compiler where there is one, else traced: sample.py then goes on without."""
    model = random_model(small_config(**{**SIZES, **changes, "seq_len": 64}))
    ids_BT = random_ids(model.config, 1, 5)
    backend = "inductor" if has_compiler("cpu") else "aot_eager"
    with mock.patch.object(torch, "compile", partial(torch.compile, backend=backend)):
        texts = [list(model.generate(ids_BT, 30, 0.0, compile=way)) for way in (False, True)]
    assert torch.equal(*map(torch.stack, texts))
    batch_BT = ids_BT.repeat(2, 1)  # a loop over experts can't be compiled: it runs as it is
    texts = [list(model.generate(batch_BT, 9, 0.0, compile=way)) for way in (False, True)]
    assert torch.equal(*map(torch.stack, texts))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card")
@pytest.mark.parametrize("batch, compile", [(1, False), (3, False), (1, True)])
def test_a_cuda_graph_generates_what_eager_does(batch, compile):
    """Greedy, in bf16; compiled products round differently, so there only the beginning."""
    model = random_model(small_config(**{**SIZES, "dim": 64, "seq_len": 128})).cuda().bfloat16()
    ids_BT = random_ids(model.config, batch, 5).cuda()
    eager = torch.stack(list(model.generate(ids_BT, 80, 0.0, graph=False)))
    graph = torch.stack(list(model.generate(ids_BT, 80, 0.0, graph=True, compile=compile)))
    same = 5 if compile else 80
    assert torch.equal(graph[:same], eager[:same])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card")
def test_a_router_of_ones_own_may_ask_the_gpu(monkeypatch):
    """Which a CUDA graph forbids: so its texts are written without one."""

    class Asks(lamoe.TopK):
        def forward(self, *args):
            assert (out := super().forward(*args)).weights_NA.sum().item() > 0
            return out

    monkeypatch.setitem(lamoe.ROUTERS, "asks", Asks)
    model = random_model(small_config(**SIZES, router="asks", seq_len=128)).cuda().bfloat16()
    assert len(list(model.generate(random_ids(model.config, 1, 5).cuda(), 80))) == 80


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card")
@pytest.mark.parametrize("router", ROUTERS)
def test_a_recorded_training_step_does_what_the_step_does(router, tmp_path):
    """Rates, batches, noise and the balancing bias reach a CUDA graph, the same way each time."""
    flags = "--data stories --draw_mb 1 --steps 24 --log_every 1 --save_every 12 --muon_ffn"
    flags += f" --router {router}"
    losses = []
    for name, compiles in (
        ("graph", "--compile"),
        ("again", "--compile"),
        ("plain", "--no-compile"),
    ):
        command = ["--out", str(tmp_path / name), "--device", "cuda", compiles, *flags.split()]
        assert call(train, *command) == 0
        losses.append([float(row["train_loss"]) for row in rows_of(tmp_path / name / "log.csv")])
    assert losses[0] == losses[1]
    noisy = router in ("noisy", "switch")  # whose noise a compiled kernel draws in another order
    assert losses[0][:8] == pytest.approx(losses[2][:8], rel=0.05 if noisy else 0.01)


def test_on_a_cpu_nothing_changes_where_there_is_a_card_too(monkeypatch):
    for where, name in ((lamoe, "run_grouped"), (lamoe.Router, "logits")):
        monkeypatch.setattr(where, name, getattr(where, name))  # undone at the end
    monkeypatch.setattr(kernels, "can_run", True)
    args = [torch.randn(6, 8), torch.rand(6, 1), torch.randn(2, 8, 8), torch.randn(2, 8, 4)]
    args.append(torch.tensor([2, 6], dtype=torch.int32))
    plain = lamoe.run_grouped(*args)
    assert kernels.use()
    monkeypatch.setattr(kernels, "GroupedExperts", None)
    assert torch.equal(lamoe.run_grouped(*args), plain)


@pytest.mark.parametrize("part", ["swiglu", "run_grouped", "logits"])
def test_a_changed_expert_or_router_is_not_trained_by_kernels_of_the_old(part, monkeypatch):
    """The written-out backward of another activation would be silently wrong."""
    monkeypatch.setattr(kernels, "can_run", True)
    of_old, plain = kernels.plain_run_grouped, lamoe.run_grouped
    assert kernels.is_as_written()
    where, name = {
        "swiglu": (lamoe, "swiglu"),
        "run_grouped": (kernels, "plain_run_grouped"),
        "logits": (kernels, "plain_logits"),
    }[part]
    old = getattr(where, name)
    monkeypatch.setattr(where, name, lambda *args: 2 * old(*args).tanh())
    assert not kernels.use() and lamoe.run_grouped is plain is of_old


@pytest.mark.skipif(not kernels.can_run, reason="needs an NVIDIA card")
@pytest.mark.parametrize("P, F", [(1000, 384), (77, 192), (8, 520)])
def test_the_kernel_of_swiglus_backward_equals_the_plain_one(P, F):
    args = [torch.randn(P, F), torch.randn(P, 2 * F), torch.rand(P, 1)]
    args = [x.cuda().bfloat16() for x in args]
    exact = kernels.swiglu_grad(*(x.double() for x in args))
    for ours, theirs in zip(kernels.swiglu_grad_on_gpu(*args), exact, strict=True):
        assert (ours.double() - theirs).norm() < 3e-3 * theirs.norm()
