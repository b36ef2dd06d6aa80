"""Routers as strangers write them: what works does so everywhere, a mistake is one line.

A file of one's own may hold any program. Each case here is the smallest of its kind.
"""

from importlib import import_module
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import random_ids, random_model, small_config
from test_gpu_paths import SIZES, as_on_a_gpu, assert_all_close, masked_grouped_mm, results
from test_train import state_of
from tiny_run import TINY, at_training_step, call, press_ctrl_c

import lamoe
import sample
import train
from data.exchange import load
from data.run import machine, routers

RUN = "--data text.txt --steps 4 --log_every 2 --save_every 2 --eval_every 2".split()
on_a_gpu = as_on_a_gpu  # the fixture


pytestmark = pytest.mark.usefixtures("workplace")


HEAD = "import torch\nfrom torch import nn\nimport lamoe\n\n\n"
TOPK = """
    def forward(self, x_BTD, ids_BT):
        probs = self.logits(x_BTD).softmax(-1)
        weights, experts = probs.topk(self.config.top_k)
        return lamoe.Routing({})
"""
TOP2 = TOPK.format("experts, weights, probs")


def written(body, file="mine.py", head=HEAD):
    """A file with a router of these methods."""
    code = f"{head}class Mine(lamoe.Router):\n{body}\n\nlamoe.ROUTERS['mine'] = Mine\n"
    Path(file).write_text(code, encoding="utf-8")


def init(*lines):
    body = "".join(f"        {line}\n" for line in ("super().__init__(c)", *lines))
    return f"    def __init__(self, c):\n{body}"


UNUSED = "a parameter that is not used"
KINDS = {
    "int32 experts in an order of their own": TOPK.format(
        "experts.int().T.contiguous().T, weights.T.contiguous().T, probs"
    ),
    "weights in half": TOPK.format("experts, weights.half()"),
    "weights of zero": TOPK.format("experts, 0 * weights"),
    "one expert twice": TOPK.format("0 * experts, weights"),
    "losses that are plain numbers": TOPK.format("experts, weights, probs, None, 1, 0.5"),
    "parameters in bf16": init(
        "self.weight = nn.Parameter(torch.empty(c.n_experts, c.dim, dtype=torch.bfloat16))"
    )
    + TOP2,
    UNUSED: init("self.line = nn.Linear(c.dim, c.n_experts)")
    + TOP2.replace("self.logits(x_BTD)", "self.line(x_BTD).flatten(0, 1)"),
    "buffers that change, and one of infinities": init(
        "self.register_buffer('n', torch.zeros((), dtype=torch.long))",
        "self.register_buffer('mean', torch.zeros(c.n_experts))",
        "self.register_buffer('mask', torch.full((3,), -torch.inf))",
    )
    + TOP2.replace(
        "        weights,",
        "        if self.training:\n"
        "            self.n += 1\n"
        "            self.mean = 0.9 * self.mean + 0.1 * probs.detach().mean(0)\n"
        "        probs = probs - 0.1 * self.mean\n"
        "        weights,",
    ),
    "one parameter in all layers": "    shared = None\n"
    + init(
        "Mine.shared = self.weight if Mine.shared is None else Mine.shared",
        "self.weight = Mine.shared",
    )
    + TOP2,
    "a constructor that reads numbers": init("self.table = torch.randperm(c.vocab_size).tolist()")
    + TOP2,
    "as many experts as the batch needs": TOP2.replace("x_BTD)", "20 * x_BTD)").replace(
        "        return lamoe.Routing(experts, weights,",
        "        kept = weights.cumsum(-1) - weights < 0.5\n"
        "        most = int(kept.sum(-1).max())\n"
        "        return lamoe.Routing(experts[:, :most], (weights * kept)[:, :most],",
    ),
    "all experts, in no order": "    @staticmethod\n    def n_active(c):\n"
    "        return c.n_experts\n"
    + TOPK.format("torch.arange(probs.shape[1]).expand_as(probs), probs, probs"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_resumes_bit_for_bit_writes_shows_and_is_not_exported(kind, capsys):
    written(KINDS[kind])
    own = ["--router", "mine.py"]
    command = [*TINY, *RUN, "--n_layers", 2, *own]
    assert call(train, *command, "--out", "straight") == 0
    with at_training_step(3, press_ctrl_c):
        assert call(train, *command, "--out", "resumed") == 130
    assert call(train, "--resume", "--out", "resumed", *own) == 0
    straight, resumed = state_of("straight/last.pt"), state_of("resumed/last.pt")
    assert [path for path in straight if straight[path] != resumed[path]] == []
    best = ["--model", "straight/best.pt", *own]
    assert call(sample, "a cat", *best, "--max_new_tokens", 5, "--show_experts") == 0
    assert call(sample, "--text", "text.txt", *best) == 0
    capsys.readouterr()
    assert call(import_module("data.exchange.export"), "straight/best.pt", "folder", *own) == 2
    assert "no family routes like router='mine'" in capsys.readouterr().err
    model, _ = load("straight/best.pt")
    ids = [97, 98, 99]
    for token in [int(t) for t in model.generate(torch.tensor([ids]), 8, temperature=0)]:
        assert model(torch.tensor([ids])).logits[0, -1].argmax() == token
        ids.append(token)
    parts = lamoe.count_parameters(model)
    c = model.config
    assert parts["experts"][1] == round(parts["experts"][0] * c.n_active / c.n_experts)


def test_what_comes_first_is_the_expert_that_counts_most(capsys):
    written(KINDS["all experts, in no order"])
    own = ["--router", "mine.py"]
    assert call(train, *TINY, *RUN, *own, "--out", "run") == 0
    assert call(sample, "--text", "text.txt", "--model", "run/best.pt", *own) == 0
    shares = capsys.readouterr().out.split("% with this first expert")[1].splitlines()[2]
    assert max(float(share) for share in shares.split()[2:]) < 90


MISTAKES = {
    "no tensor": (
        TOPK.format("experts.tolist(), weights"),
        "mine.py: experts_NA is a list and not",
    ),
    "no whole numbers": (TOPK.format("experts.float(), weights"), "experts_NA has 0.0 to 2.0"),
    "no such expert": (TOPK.format("experts + 9, weights"), "whole numbers from 0 to 2"),
    "-1 for none": (TOPK.format("experts - 1, weights"), "experts_NA has -1 to 1, torch.int64"),
    "shapes": (TOPK.format("experts, probs"), "weights_NA [2048, 3] is not of the shape of"),
    "one dimension": (TOPK.format("experts, weights[:, 0]"), "weights_NA has the shape [2048] and"),
    "no experts": (
        TOPK.format("experts[:, :0], weights[:, :0]"),
        "has the shape [2048, 0] and not",
    ),
    "load": (
        TOPK.format("experts, weights, probs, probs"),
        "load_E has the shape [2048, 3] and not",
    ),
    "probabilities": (TOPK.format("experts, weights, weights"), "probs_NE has the shape [2048, 2]"),
    "a loss for each": (TOPK.format("experts, weights, balance=probs[0]"), "balance has the shape"),
    "NaN": (TOPK.format("experts, weights, z=probs.mean() / 0 * 0"), "z has numbers that are not"),
    "a scale of zero": (
        init("self.scale = nn.Parameter(torch.ones(1))")
        + TOP2.replace("x_BTD)", "x_BTD / self.scale)"),
        "weights_NA has numbers that are not finite (vectors begin at 0: see init_weights)",
    ),
    "a tuple": (TOPK.format("").replace("lamoe.Routing()", "experts, weights"), "returns a tuple"),
    "without forward": ("    pass", "mine.py: NotImplementedError: Module [Mine] is missing the"),
    "arguments": (
        "    def forward(self, x):\n        pass",
        "Mine.forward can't be called with (self",
    ),
    "more arguments": (
        "    def __init__(self, c, p):\n        pass",
        "Mine can't be called with (c)",
    ),
    "n_active": ("    n_active = 2" + TOP2, "n_active = 2 can't be called with (c)"),
    "in forward": (
        "    def forward(self, x, ids):\n        [][0]",
        "mine.py, line 8: IndexError: ",
    ),
    "in init_weights": (
        "    def init_weights(self):\n        1 / 0" + TOP2,
        "line 8: ZeroDivision",
    ),
    "in backward": (
        init("self.register_buffer('mean', torch.zeros(c.n_experts))")
        + TOP2.replace(
            "        weights,", "        self.mean = self.mean + probs.mean(0)\n        weights,"
        ).replace("experts, weights, probs", "experts, weights * self.mean.sum()"),
        "error: mine.py: RuntimeError: Trying to backward through the graph a second time",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_router_is_one_line_that_names_the_file(mistake, capsys):
    body, told = MISTAKES[mistake]
    written(body)
    assert call(train, *TINY, *RUN, "--router", "mine.py", "--out", "run") == 2
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1 and told in printed[0] and "mine.py" in printed[0]
    assert not Path("run/last.pt").exists()


@pytest.mark.parametrize(
    "line, told",
    [
        ("raise SystemExit", "mine.py, line 2: SystemExit"),
        ("import sys; sys.exit(0)", "mine.py, line 2: SystemExit"),
        ("lamoe.ROUTERS['mine'] = 7", "7 is no class derived from lamoe.Router"),
        ("lamoe.ROUTERS['mine'] = lambda c: None", "is no class derived from lamoe.Router"),
        ("lamoe.ROUTERS['mine'] = lamoe.MoE", "is no class derived from lamoe.Router"),
    ],
)
def test_a_file_that_brings_no_router_is_one_line_and_leaves_none(line, told, capsys):
    Path("mine.py").write_text(f"import lamoe\n{line}\n")
    before = dict(lamoe.ROUTERS)
    assert call(train, "--router", "mine.py") == 2
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1 and told in printed[0]
    assert before == lamoe.ROUTERS


def test_it_may_import_what_is_beside_it_and_printed_commands_name_its_file(capsys):
    Path("my routers").mkdir()
    Path("my routers/beside_it.py").write_text("K = 2\n")
    written(
        TOP2.replace("self.config.top_k", "K"),
        "my routers/mine.py",
        "from beside_it import K\n" + HEAD,
    )
    own = ["--router", "my routers/mine.py"]
    with at_training_step(3, press_ctrl_c):
        assert call(train, *TINY, *RUN, *own, "--out", "my run") == 130
    told = '--out "my run" --router "my routers/mine.py"'
    assert f"python train.py --resume {told}" in capsys.readouterr().out
    assert call(train, *TINY, *RUN, *own, "--out", "my run") == 2
    assert f"python train.py --resume {told};" in capsys.readouterr().err
    assert call(train, "--resume", "--out", "my run", *own) == 0
    again = '--model "my run/best.pt" --router "my routers/mine.py"'
    assert f"next       python sample.py {again}" in capsys.readouterr().out
    assert call(train, "--resume", "--out", "my run", *own) == 0
    assert f"python train.py --resume {told} --steps 8" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------
# Where a GPU runs other code
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != UNUSED])  # it has no gradient
def test_sorting_takes_what_the_loop_takes(kind, on_a_gpu):
    written(KINDS[kind])
    name, found = routers.router_name("mine.py"), []
    plain = (lamoe.plain_attention, lamoe.plain_moe)
    for kernels in (lamoe.pick_kernels(None, None), plain):
        model = random_model(small_config(**SIZES, router=name)).train()
        with mock.patch.object(lamoe, "pick_kernels", lambda x, c, kernels=kernels: kernels):
            found.append(results(model, random_ids(model.config, 3, 9)))
    assert_all_close(*found)


@pytest.fixture
def compiling(on_a_gpu, monkeypatch):
    """Flags of a run that is compiled, as on a GPU."""
    monkeypatch.setattr(machine, "has_compiler", lambda device: True)
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", masked_grouped_mm)
    return [*TINY, *RUN, "--router", "mine.py", "--compile"]


def test_one_that_asks_for_numbers_is_not_compiled_and_trains(compiling, capsys):
    written(KINDS["as many experts as the batch needs"])
    assert call(train, *compiling, "--out", "run") == 0
    printed = capsys.readouterr().out
    assert "your router can't be compiled: " in printed and "; going on without" in printed
    assert call(train, *compiling[:-1], "--out", "plain") == 0
    compiled, plain = (torch.load(f"{run}/last.pt")["model"] for run in ("run", "plain"))
    assert all(torch.equal(compiled[name], plain[name]) for name in plain)


def test_compiling_leaves_no_trace_in_a_routers_buffers(compiling):
    written(KINDS["buffers that change, and one of infinities"])
    assert call(train, *compiling, "--out", "run") == 0
    assert torch.load("run/last.pt")["model"]["blocks.0.ffn.router.n"] == 4


def test_one_of_too_many_shapes_ends_in_a_remedy(compiling, capsys):
    written("    n = 0\n" + TOP2.replace("        probs", "        self.n += 1\n        probs", 1))
    assert call(train, *compiling, "--steps", 20, "--out", "run") == 2
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1 and printed[0].endswith("; try --no-compile")


def test_a_run_does_not_start_over_because_another_routers_file_was_named(capsys):
    written(TOP2)
    written(KINDS[UNUSED].replace("self.line", "self.other"), "other.py")
    assert call(train, *TINY, *RUN, "--router", "mine.py", "--out", "run") == 0
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    capsys.readouterr()
    again = ["--resume", "--out", "run", "--steps", 9]
    assert call(train, *again, "--router", "other.py") == 2
    printed = capsys.readouterr().err
    assert "error: run/last.pt does not fit other.py, " in printed and "other.weight" in printed
    assert before == {path: path.read_bytes() for path in Path("run").iterdir()}
    assert call(train, *again, "--router", "mine.py") == 0
