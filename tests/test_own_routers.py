"""A router of any kind is one class and one line in a file of its own: three from the literature.

`tests/routers/` holds them: by token id, as many experts as reach a probability, and expert choice,
which sees the future and is caught at it.
"""

import ast
from importlib import import_module
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import assert_close, loop_over_experts, random_ids, random_model, small_config
from test_gpu_paths import SIZES, as_on_a_gpu, assert_all_close, masked_grouped_mm, results
from test_train import log_of, state_of, timeless
from tiny_run import TINY, at_training_step, call, press_ctrl_c

import lamoe
import sample
import train
from data.run import routers
from data.run.machine import compile_blocks

FOLDER = Path(__file__).parent / "routers"
FILES = {path.stem: path for path in FOLDER.glob("*.py")}
on_a_gpu = as_on_a_gpu  # the fixture
NAMES = {"hash_router": "hash", "top_p": "top_p", "expert_choice": "expert_choice"}
CAUSAL = ["hash_router", "top_p"]


pytestmark = pytest.mark.usefixtures("workplace")


def model_of(file, seed=0, **changes):
    config = small_config(router=routers.router_name(f"{FILES[file]}"), n_experts=8, **changes)
    return random_model(config, seed)


def routing_of(file, N=40, **changes):
    router = model_of(file, **changes).blocks[0].ffn.router
    generator = torch.Generator().manual_seed(0)
    return router(torch.randn(1, N, 16, generator=generator), torch.arange(N)[None])


def test_each_is_at_most_15_lines():
    assert FILES.keys() == NAMES.keys()
    for path in FILES.values():
        classes = [node for node in ast.parse(path.read_text()).body if hasattr(node, "bases")]
        assert [node.end_lineno - node.lineno < 15 for node in classes] == [True], path


# ---------------------------------------------------------------------------------------------
# What each paper says
# ---------------------------------------------------------------------------------------------


def test_hash_depends_on_the_id_alone_and_spreads_ids_evenly():
    router = model_of("hash_router", top_k=2).blocks[0].ffn.router
    ids_BT = torch.arange(4000).view(2, -1)
    first, again = (router(torch.randn(2, 2000, 16), ids_BT) for _ in range(2))
    assert torch.equal(first.experts_NA, again.experts_NA)
    assert (first.experts_NA[:, 0] != first.experts_NA[:, 1]).all()
    counts_E = first.experts_NA[:, 0].bincount(minlength=8)
    assert 0.8 < counts_E.min() / 500 and counts_E.max() / 500 < 1.2
    assert first.weights_NA.unique().tolist() == [0.5]


def test_top_p_keeps_the_fewest_experts_that_reach_p():
    routing = routing_of("top_p", top_k=5)
    numbers = set()
    for experts, weights, probs in zip(*routing[:3], strict=True):
        order = probs.argsort(descending=True).tolist()
        n = next((n for n in range(1, 5) if probs[order[:n]].sum() >= 0.7), 5)
        numbers.add(n)
        assert experts[:n].tolist() == order[:n] and weights[n:].count_nonzero() == 0
        assert_close(weights[:n], probs[order[:n]] / probs[order[:n]].sum(), 1e-6)
    assert len(numbers) > 2  # tokens do differ
    kept = routing.experts_NA[routing.weights_NA > 0]
    assert_close(routing.load_E, kept.bincount(minlength=8) / len(kept), 1e-6)


def test_in_expert_choice_each_expert_takes_the_tokens_it_scores_best():
    routing = routing_of("expert_choice", top_k=2)  # 40 tokens x 2 / 8 experts: ten each
    for e in range(8):
        taken_NE = (routing.experts_NA == e) & (routing.weights_NA > 0)
        best = routing.probs_NE[:, e].topk(10)
        assert sorted(taken_NE.any(1).nonzero().flatten().tolist()) == sorted(best.indices.tolist())
        assert_close(routing.weights_NA[taken_NE].sort().values, best.values.sort().values, 1e-6)


# ---------------------------------------------------------------------------------------------
# The model around them
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("moe", [lamoe.plain_moe, lamoe.sorted_moe])
def test_the_layer_is_a_loop_over_pairs(file, moe):
    layer = model_of(file, top_k=3).blocks[0].ffn
    x_BTD, ids_BT = torch.randn(2, 9, 16), torch.arange(18).view(2, 9)
    y_BTD, routing = layer(x_BTD, ids_BT, moe)
    choices = (routing.experts_NA, routing.weights_NA)
    y_ND = loop_over_experts(x_BTD.flatten(0, 1), *choices, *layer.experts.parameters())
    assert_close(y_BTD.flatten(0, 1), y_ND, 1e-5)


@pytest.mark.parametrize("file", CAUSAL)
def test_generation_with_a_cache_equals_the_full_pass(file):
    model = model_of(file, top_k=3)
    ids_BT = random_ids(model.config, 1, 12)
    cache, steps = lamoe.Cache(model.config, 1, 16), ids_BT.split([4] + [1] * 8, dim=1)
    cached = torch.cat([model(part, cache=cache).logits for part in steps], 1)
    assert_close(cached, model(ids_BT).logits, 1e-5)
    # and the step that generates, which is written for one token
    written = [ids_B.item() for ids_B in model.generate(ids_BT[:, :4], 12, temperature=0)]
    for n, token in enumerate(written):
        seen = torch.cat([ids_BT[:, :4], torch.tensor([written[:n]]).long()], 1)
        assert model(seen).logits[0, -1].argmax() == token


@pytest.mark.parametrize("file", FILES)
def test_future_tokens_never_change_past_logits_but_in_expert_choice(file):
    model = model_of(file)
    ids_BT = random_ids(model.config, 2, 12)
    other_BT = ids_BT.clone()
    other_BT[:, 6:] = (other_BT[:, 6:] + 1) % model.config.vocab_size
    change = (model(ids_BT).logits - model(other_BT).logits)[:, :6].abs().max()
    assert change < 1e-5 if file in CAUSAL else change > 1e-2  # it leaks, as its file says


@pytest.mark.parametrize("file", FILES)
def test_it_compiles_as_for_a_gpu(file, on_a_gpu):
    """Without a break in the graph, so without waiting for the GPU."""
    name = routers.router_name(f"{FILES[file]}")
    model = random_model(small_config(**SIZES, router=name)).train()
    ids_BT = random_ids(model.config, 3, 9)
    with mock.patch.object(torch.nn.functional, "grouped_mm", masked_grouped_mm):
        eager = results(model, ids_BT)
        compile_blocks(model)
        torch._dynamo.utils.counters.clear()
        assert_all_close(results(model, ids_BT), eager)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # one block, one loss


def test_active_parameters_are_those_that_a_token_meets():
    for file in FILES:
        model = model_of(file, top_k=3)
        counted = lamoe.count_parameters(model)
        c = model.config
        expert = 3 * c.dim * c.hidden_dim * c.n_layers
        assert counted["experts"] == (8 * expert, 3 * expert)
        router = 0 if file == "hash_router" else 8 * c.dim * c.n_layers
        assert counted.get("router", (0, 0)) == (router, router)


# ---------------------------------------------------------------------------------------------
# On the command line
# ---------------------------------------------------------------------------------------------

RUN = "--data text.txt --steps 6 --log_every 2 --save_every 3 --eval_every 3".split()


@pytest.mark.parametrize("file", FILES)
def test_it_trains_and_a_stopped_run_resumes_bit_for_bit(file, capsys):
    own = ["--router", FILES[file]]
    assert call(train, *TINY, *RUN, *own, "--out", "straight") == 0
    with at_training_step(4, press_ctrl_c):
        assert call(train, *TINY, *RUN, *own, "--out", "resumed") == 130
    lamoe.ROUTERS.pop(NAMES[file])  # as in another process
    assert call(train, "--resume", "--out", "resumed") == 2
    assert "error: resumed/last.pt: its router" in capsys.readouterr().err
    assert call(train, "--resume", "--out", "resumed", *own) == 0
    straight, resumed = state_of("straight/last.pt"), state_of("resumed/last.pt")
    assert [path for path in straight if straight[path] != resumed[path]] == []
    assert timeless(log_of("straight")) == timeless(log_of("resumed"))
    losses = [float(row["train_loss"]) for row in log_of("straight")]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("file", FILES)
def test_it_writes_text_and_shows_its_experts_and_no_export_takes_it(file, capsys):
    own, name = ["--router", FILES[file]], "run/best.pt"
    assert call(train, *TINY, *RUN, *own, "--out", "run") == 0
    lamoe.ROUTERS.pop(NAMES[file])
    assert call(sample, "a cat", "--model", name, "--max_new_tokens", 5) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and "--router FILE.py" in told[0]
    shown = ["--max_new_tokens", 5, "--show_experts"]
    assert call(sample, "a cat", "--model", name, *own, *shown) == 0
    lamoe.ROUTERS.pop(NAMES[file])
    export = import_module("data.exchange.export")
    capsys.readouterr()
    for out in ("folder", "file.gguf"):
        assert call(export, name, out, *own) == 2
        told = capsys.readouterr().err.splitlines()
        assert len(told) == 1 and f"no family routes like router={NAMES[file]!r}" in told[0]


@pytest.mark.parametrize(
    "code, told",
    [
        ("import lamoe\nlamoe.Rooter\n", "mine.py, line 2: AttributeError: module 'lamoe'"),
        ("def f(:\n", "mine.py: SyntaxError: invalid syntax"),
        ("import lamoe\n", 'ValueError: it must end with one line such as lamoe.ROUTERS["mine"]'),
        (
            'import lamoe\nlamoe.ROUTERS["topk"] = lamoe.Noisy\n',
            "'topk' is a router of lamoe.py; give yours another name",
        ),
        (None, "mine.py: FileNotFoundError"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(code, told, capsys):
    if code:
        Path("mine.py").write_text(code)
    topk = lamoe.ROUTERS["topk"]
    assert call(train, "--router", "mine.py") == 2
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1 and told in printed[0]
    assert lamoe.ROUTERS["topk"] is topk
