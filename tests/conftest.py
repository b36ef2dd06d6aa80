"""What several test files share: settings, the oracle rule, small models, readable references.

An oracle is another implementation that must agree with ours (Hugging Face, tiktoken, ...). Its
tests carry `@pytest.mark.oracle`. Without the package they are skipped with one line that says how
to install it; with LAMOE_REQUIRE_ORACLES=1 (as in .ci/run) a missing oracle is a failure.
"""

import contextlib
import importlib
import os
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from tiny_run import make_text

import lamoe
from data import datasets
from data.run import routers

collect_ignore = ["routers"]  # each adds itself to lamoe.ROUTERS; test_own_routers.py loads them
torch.set_num_threads(1)  # same sums in the same order everywhere, and no quarrel over the cores
settings.register_profile(
    "lamoe", deadline=None, derandomize=True, database=None, max_examples=50, print_blob=False
)
settings.load_profile("lamoe")

# ---------------------------------------------------------------------------------------------
# Oracles: skipped when missing, failed when required
# ---------------------------------------------------------------------------------------------

INSTALL = 'pip install -e ".[oracle]"'


def import_oracle(name):
    """The module `name`; without it, the test that asks is skipped."""
    try:
        return importlib.import_module(name)
    except ImportError:
        pytest.skip(f"{name} is missing; {INSTALL}")


def fail_if_skipped(report):
    """Under LAMOE_REQUIRE_ORACLES=1 a skip becomes a failure with the same reason."""
    if os.environ.get("LAMOE_REQUIRE_ORACLES") == "1" and report.outcome == "skipped":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"a required oracle was not run: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    is_oracle = item.get_closest_marker("oracle") and not hasattr(report, "wasxfail")
    return fail_if_skipped(report) if is_oracle else report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():  # importorskip at the top of a file skips before any mark is read
    return fail_if_skipped((yield))


# ---------------------------------------------------------------------------------------------
# Exercises: they fail until a reader solves them, so they run only when asked for by name
# ---------------------------------------------------------------------------------------------

EXERCISES = Path(__file__).resolve().parent / "exercises"


def pytest_collection_modifyitems(config, items):
    """Skips an exercise unless its file, or the folder of all, was named on the command line."""
    named = {Path(argument.split("::")[0]).resolve() for argument in config.args}
    for item in items:
        path = item.path.resolve()
        if path.parent == EXERCISES and not named & {path, EXERCISES}:
            command = f"pytest tests/exercises/{path.name}"
            item.add_marker(pytest.mark.skip(reason=f"an exercise, run by: {command}"))


# ---------------------------------------------------------------------------------------------
# What a run leaves: in a folder that goes away
# ---------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache of its own for each test: none finds what another left."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets, "CACHE", folder)
    return folder


class Doubled(torch.nn.Module):
    """Put on a part or a weight, as adapters are."""

    def forward(self, x):
        return 2 * x


def written(step, model, ids_BT, *args, **options):
    """(ids, logits of each step), written with this class of Step."""
    logits = []

    class Noted(step):
        def pick(self, logits_BV, ids_BT):
            logits.append(logits_BV.clone())
            super().pick(logits_BV, ids_BT)

    with mock.patch.object(lamoe, "Step", Noted):
        return torch.stack(list(model.generate(ids_BT, *args, **options))), torch.stack(logits)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder with a text in it; no matplotlib, which takes longer than the training."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    Path("text.txt").write_text(make_text(), encoding="utf-8")
    return tmp_path


@contextlib.contextmanager
def no_router_stays():
    """What the file of a router of one's own leaves behind is gone afterwards."""
    with contextlib.ExitStack() as stack:
        for known in (lamoe.ROUTERS, routers.FILES, routers.OWN_CODE):
            stack.enter_context(mock.patch.dict(known))
        stack.enter_context(mock.patch.object(sys, "path", [*sys.path]))
        yield


@pytest.fixture(autouse=True)
def no_router_of_another_test():
    with no_router_stays():
        yield


MATPLOTLIB = []  # imported once: its parts must not meet those of a second import


@pytest.fixture
def pyplot(monkeypatch):
    """matplotlib's pyplot, also in a file whose tests hide matplotlib because it is slow."""
    monkeypatch.delitem(sys.modules, "matplotlib", raising=False)
    if MATPLOTLIB:
        monkeypatch.setitem(sys.modules, "matplotlib", MATPLOTLIB[0])
    module = pytest.importorskip("matplotlib.pyplot")
    MATPLOTLIB[:] = [sys.modules["matplotlib"]]
    return module


# ---------------------------------------------------------------------------------------------
# Small models with nothing left at zero
# ---------------------------------------------------------------------------------------------

ROUTERS = sorted(lamoe.ROUTERS)
seeds = st.integers(0, 2**16)


def small_config(**changes):
    small = dict(vocab_size=23, dim=16, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=12)
    return lamoe.Config(**{**small, "seq_len": 16, **changes})


def randomise(module, seed=0):
    """Every parameter drawn so that each matters: a fresh model's zeros would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            is_norm = weight.dim() == 1
            weight.copy_(1 + 0.3 * noise if is_norm else noise * max(1, weight.shape[-1]) ** -0.5)
    return module


def random_model(config, seed=0):
    return randomise(lamoe.LaMoE(config), seed).eval()


def with_biases(model, name):
    """Biases of deepseek's routers as training leaves them: they decide, and are no parameters."""
    for i, (path, buffer) in enumerate(model.named_buffers()):
        if path.endswith(f".{name}"):
            buffer += torch.randn(buffer.shape, generator=torch.Generator().manual_seed(i))
    return model


def random_ids(config, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, shape, generator=generator)


@st.composite
def attention_shapes(draw):
    """(B, T, H, G, K, cached positions): H a multiple of G, K even."""
    G = draw(st.integers(1, 3))
    H, K = G * draw(st.integers(1, 3)), 2 * draw(st.integers(1, 5))
    return draw(st.integers(1, 3)), draw(st.integers(1, 9)), H, G, K, draw(st.integers(0, 7))


# ---------------------------------------------------------------------------------------------
# References: the definitions, written to be read
# ---------------------------------------------------------------------------------------------


def explicit_attention(q_BHTK, k_BGSK, v_BGSK):
    """Each query position against every key, heads repeated, the future masked one by one."""
    H, T, K = q_BHTK.shape[1:]
    G, S = k_BGSK.shape[1:3]
    k_BHSK, v_BHSK = (x.repeat_interleave(H // G, dim=1) for x in (k_BGSK, v_BGSK))
    rows = []
    for t in range(T):
        seen = S - T + t + 1
        scores = (q_BHTK[:, :, t, None] * k_BHSK[:, :, :seen]).sum(-1) / K**0.5
        rows.append((scores.softmax(-1)[..., None] * v_BHSK[:, :, :seen]).sum(2))
    return torch.stack(rows, dim=2)


def explicit_swiglu(x, gate_up, down):
    hidden = len(gate_up) // 2
    gate, up = gate_up[:hidden], gate_up[hidden:]
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def loop_over_experts(x_ND, experts_NA, weights_NA, gate_up_proj, down_proj):
    """sum_a weights[n, a] * expert[experts[n, a]](x[n]), one pair at a time."""
    rows = []
    for x, chosen, weights in zip(x_ND, experts_NA.tolist(), weights_NA, strict=True):
        pairs = zip(chosen, weights, strict=True)
        rows.append(sum(w * explicit_swiglu(x, gate_up_proj[e], down_proj[e]) for e, w in pairs))
    return torch.stack(rows)


def assert_close(ours, reference, tolerance):
    """Largest difference at most `tolerance` times the reference's largest value (or 1)."""
    assert ours.shape == reference.shape
    ours, reference = ours.double(), reference.double()
    error = (ours - reference).abs().max() / reference.abs().max().clamp(min=1.0)
    assert error <= tolerance, f"differs by {error:.2e}, allowed {tolerance:.0e}"


def encode(tokenizer, documents):
    """What data/tokens.py keeps on the disk: <|endoftext|>, then each document and another one."""
    ids = [tokenizer.eot]
    for document in documents:
        ids += [*tokenizer.encode(document), tokenizer.eot]
    return np.array(ids)
