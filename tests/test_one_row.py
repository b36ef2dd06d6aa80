"""The step written out for one row has the logits and the text of lamoe.py, for half the work."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import Doubled, random_ids, random_model, small_config, with_biases, written
from torch.utils._python_dispatch import TorchDispatchMode

import lamoe
from data import gpu_step, one_row
from data.exchange import export, load
from data.run.routers import router_name

ROUTERS = sorted(lamoe.ROUTERS)
OWN = sorted((Path(__file__).parent / "routers").glob("*.py"))
PLAIN = one_row.RowStep.__base__


def begun(model, B=1, length=9):
    """A step that has read a prompt."""
    step = one_row.RowStep(model, B, length, (0.0,), 1.0, None)
    with torch.no_grad():
        step.read(torch.tensor([[1, 2, 3]] * B))
    return step


def assert_writes_the_same(config, **options):
    model = with_biases(random_model(config), "bias")
    ids_BT = random_ids(config, 1, 3)
    options = {"temperature": 0.0, **options}
    ids, logits = written(one_row.RowStep, model, ids_BT, 12, **options)
    plain_ids, plain_logits = written(PLAIN, model, ids_BT, 12, **options)
    assert torch.equal(ids, plain_ids)
    assert (logits - plain_logits).abs().max() < 1e-4
    assert not torch.equal(logits[1:], plain_logits[1:]), "the plain code has run twice"


SHAPES = {
    "as it is": {},
    "qk_norm": {"qk_norm": True},
    "tied": {"tie_embeddings": True},
    "a key for each query": {"n_kv_heads": 4},
    "shared experts": {"n_shared_experts": 2, "n_groups": 2, "top_groups": 1, "n_experts": 8},
    "dense layers": {"n_dense_layers": 1, "norm_eps": 0.1},
    "nothing even": {"vocab_size": 23, "dim": 15, "head_dim": 6, "hidden_dim": 7, "n_experts": 5},
    "stretched positions": {"rope_factor": 8.0, "rope_theta": 100.0},
    "several threads": {"dim": 256, "qk_norm": True},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("router", ROUTERS)
def test_one_row_has_the_logits_and_the_text_of_the_plain_step(router, shape):
    assert_writes_the_same(small_config(router=router, **SHAPES[shape]))


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"temperature": 0.9, "top_k": 9, "min_p": 0.05},
        {"stop": 5},
    ],
)
def test_one_row_draws_as_the_plain_step_does(options):
    model = random_model(small_config(qk_norm=True))
    texts = []
    for step in (PLAIN, one_row.RowStep):
        generator = torch.Generator().manual_seed(3)
        ids, _ = written(
            step, model, random_ids(model.config, 1, 3), 12, generator=generator, **options
        )
        texts.append(ids.tolist())
    assert texts[0] == texts[1]


def test_a_dense_model_without_experts():
    assert_writes_the_same(small_config(n_experts=1))


@pytest.mark.parametrize("file", OWN, ids=lambda path: path.stem)
def test_a_router_from_a_file(file, monkeypatch):
    monkeypatch.setattr(lamoe, "ROUTERS", dict(lamoe.ROUTERS))
    assert_writes_the_same(small_config(router=router_name(str(file)), n_experts=6, top_k=3))


def test_a_router_that_inherits_from_topk_is_asked_itself(monkeypatch):
    class Last(lamoe.TopK):
        def forward(self, x_BTD, ids_BT=None):
            return lamoe.Routing(torch.tensor([[3, 2]]), torch.tensor([[0.75, 0.0]]))

    monkeypatch.setitem(lamoe.ROUTERS, "last", Last)
    step = begun(random_model(small_config(router="last")))
    h_11D = torch.randn(1, 1, 16)
    assert step.layers[0].chosen(h_11D, step.ids_B1) == [(step.layers[0].experts[3], 0.75)]


@pytest.mark.parametrize("why", ["batch", "bf16", "autocast"])
def test_all_else_is_written_by_the_plain_step(why):
    model = random_model(small_config(dim=256))
    model = model.bfloat16() if why == "bf16" else model
    context = torch.autocast("cpu", torch.bfloat16) if why == "autocast" else nullcontext()
    with context:
        step = begun(model, 1 + (why == "batch"))
    assert step.next == step.run


def add_bias(model):
    layer = model.blocks[0].attn.q_proj
    layer.bias = torch.nn.Parameter(torch.ones(len(layer.weight)))


class NegatedNorm(lamoe.RMSNorm):
    def forward(self, x):
        return -super().forward(x)


def put_on(path):
    """A function that doubles a part's output by a hook."""
    return lambda model: model.get_submodule(path).register_forward_hook(lambda *a: 2 * a[2])


CHANGES = {
    "hook": put_on("blocks.0.attn"),
    "hook in the head": put_on("head"),
    "hook before": lambda model: model.norm.register_forward_pre_hook(lambda m, a: (-a[0],)),
    "hook in a router": lambda model: model.blocks[1].ffn.router.register_forward_hook(
        lambda m, a, routing: routing._replace(weights_NA=routing.weights_NA.flip(1))
    ),
    "adapter": lambda model: setattr(
        model.blocks[0].attn, "v_proj", torch.nn.Sequential(model.blocks[0].attn.v_proj, Doubled())
    ),
    "subclass": lambda model: setattr(model.norm, "__class__", NegatedNorm),
    "parametrization": lambda model: torch.nn.utils.parametrize.register_parametrization(
        model.blocks[0].ffn.experts, "down_proj", Doubled()
    ),
    "forward": lambda model: setattr(model.blocks[1].ffn.shared, "forward", torch.zeros_like),
    "bias": add_bias,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_put_on_a_model_counts_when_it_writes(change):
    """What is written out knows weights alone, so such a model is for the plain step."""
    model = random_model(small_config(n_shared_experts=1))
    ids_BT, before = random_ids(model.config, 1, 3), model(torch.tensor([[1, 2, 3]])).logits
    CHANGES[change](model)
    assert not torch.allclose(model(torch.tensor([[1, 2, 3]])).logits, before), "it changes nothing"
    ids, logits = written(one_row.RowStep, model, ids_BT, 9, temperature=0.0)
    all_BT = torch.cat((ids_BT, ids.T), dim=1)[:, :-1]
    with torch.no_grad():
        assert (logits[:, 0] - model(all_BT).logits[0, 2:]).abs().max() < 1e-4
    step = one_row.RowStep(model, 1, 9, (0.0,), 1.0, None)
    step.position = SimpleNamespace(is_cuda=True, device=torch.device("cuda"))
    kernels = mock.patch.multiple(gpu_step, covers=lambda step: True, FewKernels=lambda step: None)
    with kernels, mock.patch.object(one_row, "has_compiler", lambda device: False):
        step.compile()
    assert step.next == step.run


def changed(function, change=lambda y: 0.5 * y):
    return lambda *args, **kwargs: change(function(*args, **kwargs))


def other_logits(out):
    return out._replace(logits=3 * out.logits.tanh())


SOURCE = {  # what somebody changes in lamoe.py itself
    "activation": ("swiglu", lambda gate_up: gate_up.chunk(2, -1)[0].relu().square()),
    "norm": ("RMSNorm.forward", changed(lamoe.RMSNorm.forward, lambda y: y - y.mean(-1, True))),
    "rotation": ("apply_rope", lambda x, cos, sin: x),
    "attention": ("Attention.forward", changed(lamoe.Attention.forward)),
    "block": ("Block.forward", changed(lamoe.Block.forward, lambda out: (out[0] / 2, out[1]))),
    "router": (
        "TopK.forward",
        changed(lamoe.TopK.forward, lambda r: r._replace(weights_NA=r.weights_NA.sigmoid())),
    ),
    "model": ("LaMoE.forward", changed(lamoe.LaMoE.forward, other_logits)),
    "a subclass of the model": None,
}


@pytest.mark.parametrize("change", SOURCE)
def test_another_lamoe_py_counts_when_it_writes(change, tmp_path, monkeypatch):
    """... and is exported by none, as no family computes it."""
    model = random_model(small_config())
    assert one_row.way_to_write(model) == "row"
    ids_BT, before = random_ids(model.config, 1, 3), model(torch.tensor([[1, 2, 3]])).logits
    if SOURCE[change]:
        path, new = SOURCE[change]
        monkeypatch.setattr(f"lamoe.{path}", new)
        if path.endswith(".forward"):  # as if that had stood in the file
            monkeypatch.setattr(one_row, "FORWARDS", one_row.FORWARDS | {new})
    else:
        forward = changed(lamoe.LaMoE.forward, other_logits)
        model.__class__ = type("Capped", (lamoe.LaMoE,), {"forward": forward})
    assert not torch.allclose(model(torch.tensor([[1, 2, 3]])).logits, before), "it changes nothing"
    ids, logits = written(one_row.RowStep, model, ids_BT, 9, temperature=0.0)
    all_BT = torch.cat((ids_BT, ids.T), dim=1)[:, :-1]
    with torch.no_grad():
        assert (logits[:, 0] - model(all_BT).logits[0, 2:]).abs().max() < 1e-4
    with pytest.raises(ValueError, match="was changed|adapter"):
        export(model, None, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_whether_the_code_is_as_made_is_asked_once_and_draws_no_random_number():
    model, before = random_model(small_config(n_layers=3)), torch.get_rng_state()
    with mock.patch.object(one_row, "tried", wraps=one_row.tried) as tried:
        for _ in range(2):
            assert one_row.way_to_write(model) == "row"
    assert tried.call_count == 2 and torch.equal(torch.get_rng_state(), before)


def test_no_weight_is_copied_but_those_of_q_k_and_v():
    model = random_model(small_config(n_shared_experts=1, n_dense_layers=1))
    step = begun(model)
    weights = {w.untyped_storage().data_ptr() for w in model.parameters()}
    for layer in step.layers:
        matrices = [layer.o, *(m for pair in layer.experts for m in pair)]
        matrices += [m for pair, _ in layer.always for m in pair]
        matrices += [layer.topk] if layer.router else []
        assert {m.untyped_storage().data_ptr() for m in matrices} <= weights
    assert step.head.untyped_storage().data_ptr() in weights


class Count(TorchDispatchMode):
    """Counts operators, but not those that only make another view of the same numbers."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returned = [value.alias_info for value in function._schema.returns]
        self.n += any(alias is None or alias.is_write for alias in returned)
        return function(*args, **(kwargs or {}))


def test_a_token_takes_half_the_operators():
    model = random_model(lamoe.Config(2048, n_layers=3, qk_norm=True))
    counts = []
    for step_class in (PLAIN, one_row.RowStep):
        step = step_class(model, 1, 256, (0.0,), 1.0, None)
        with torch.no_grad():
            step.read(torch.tensor([[1, 2, 3]]))
            with Count() as count:
                step.next()
        counts.append(count.n)
    assert counts[1] < 0.5 * counts[0], counts


def test_products_get_x_with_the_strides_of_a_transposed_row():
    """Others give the same numbers at a tenth of the speed."""
    with mock.patch.object(torch, "bmm") as bmm, mock.patch.object(torch, "baddbmm") as baddbmm:
        W_2ND = one_row.halves(torch.zeros(6, 5))
        one_row.times_row(W_2ND, torch.zeros(5, 1))
        one_row.times_row(W_2ND, torch.zeros(1, 5), plus=torch.zeros(1, 6))
    for x in (bmm.call_args.args[1], baddbmm.call_args.args[2]):
        assert x.shape == (2, 5, 1) and x.stride() == (0, 1, 5)


@pytest.mark.parametrize("way", ["row", "bf16", "compiled"])
@pytest.mark.parametrize("dim", [16, 256])
def test_a_step_takes_one_thread_and_gives_the_others_back(way, dim):
    """Those of a larger model that is not written out keep theirs."""
    model, seen, before = random_model(small_config(dim=dim)), [], torch.get_num_threads()
    model = model.bfloat16() if way == "bf16" else model
    step = one_row.RowStep(model, 1, 9, (0.0,), 1.0, None)
    if way == "compiled":
        step.next = lambda: step.pick()
    try:
        torch.set_num_threads(2)
        with torch.no_grad():
            step.read(torch.tensor([[1, 2, 3]]))
            step.pick = lambda *args: seen.append(torch.get_num_threads())
            step.next()
        assert seen == [1 if way == "row" or dim == 16 else 2] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_only_a_large_matrix_is_multiplied_by_all_threads():
    seen, bmm, before = [], torch.bmm, torch.get_num_threads()
    with mock.patch.object(
        torch, "bmm", lambda *a: seen.append(torch.get_num_threads()) or bmm(*a)
    ):
        try:
            torch.set_num_threads(1)
            for n in (one_row.LARGE // 64, one_row.LARGE // 64 + 2):
                W, x = torch.randn(n, 64), torch.randn(1, 64)
                y = one_row.times_row(one_row.halves(W), x, threads=2)
                assert (y.flatten() - W @ x[0]).abs().max() < 1e-4
            assert seen == [1, 2] and torch.get_num_threads() == 1
        finally:
            torch.set_num_threads(before)


def test_a_loaded_model_writes_with_it(tmp_path):
    with mock.patch.object(lamoe, "Step", PLAIN):
        with pytest.raises(ValueError):
            load(tmp_path / "nothing")
        assert lamoe.Step is one_row.RowStep
