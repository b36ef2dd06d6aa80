"""Several processes train as one does: the same losses, one checkpoint, whatever their number.

gloo and two processes on a CPU. "One" is a single process with the same flags: --batch_size is that
of all ranks together.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import no_router_stays
from tiny_run import TINY, at_training_step, call, make_text, press_ctrl_c, rows_of

import train
from data import exchange
from data.run import checkpoint, ranks

ROOT = Path(__file__).parents[1]
CASES = {  # flags beyond the common ones
    "topk": "",
    "topk-fsdp": "--fsdp",
    "deepseek": "--router deepseek --bias_rate 0.01",
    "deepseek-fsdp": "--router deepseek --bias_rate 0.01 --fsdp",
    "accumulated": "--grad_accum 2",
    "accumulated-fsdp": "--grad_accum 2 --fsdp",
    "muon-fsdp": "--muon_ffn --n_shared_experts 1 --n_dense_layers 1 --fsdp",
    "adamw-fsdp": "--no-muon_ffn --n_shared_experts 1 --n_dense_layers 1 --fsdp",
    "dense": "--n_experts 1",
    "frozen": "--freeze_router",
    "frozen-fsdp": "--freeze_router --router deepseek --fsdp",
    "own": "--router own.py",
    "own-fsdp": "--router own.py --fsdp",
}
OWN = """
import lamoe

class Own(lamoe.TopK):  # self.weight is not used, and stays without a gradient
    def __init__(self, c):
        super().__init__(c)
        self.line = lamoe.nn.Linear(c.dim, c.n_experts)

    def logits(self, x_BTD):
        return self.line(x_BTD.flatten(0, -2))

lamoe.ROUTERS["own"] = Own
"""
COMMON = "--data text.txt --steps 20 --log_every 1 --eval_every 10 --save_every 100 --n_layers 2"
COMMON = [*TINY, *COMMON.split()]


def torchrun(folder, *command, check=True):
    base = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*base, *command], cwd=folder, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def log_of(run):
    return rows_of(run / "log.csv")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder in which all runs were made, by two ranks and by one."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "text.txt").write_text(make_text())
    (folder / "own.py").write_text(OWN)
    lines = [f"0 {' '.join(COMMON)} {flags} --out {name}-2" for name, flags in CASES.items()]
    for name in ("topk", "topk-fsdp"):  # to be resumed by one process
        lines.append(f"8 {' '.join(COMMON)} {CASES[name]} --out {name}-then-1")
    with pytest.MonkeyPatch.context() as patch, no_router_stays():
        patch.chdir(folder)
        patch.setitem(sys.modules, "matplotlib", None)  # no pictures
        for name, flags in CASES.items():
            flags = flags.replace("--fsdp", "").split()
            assert call(train, *COMMON, *flags, "--out", f"{name}-1") == 0
        with at_training_step(8, press_ctrl_c):  # to be resumed by two
            assert call(train, *COMMON, "--out", "topk-then-2") == 130
        lines.append("0 --resume --fsdp --device cpu --out topk-then-2")
        lines.append(f"2 {' '.join(COMMON)} --decay 0.9 --warmup 0 --log_every 3 --out plateau")
        (folder / "runs.txt").write_text("\n".join(lines))
        torchrun(folder, str(ROOT / "tests" / "ranks.py"))
        for name in ("topk", "topk-fsdp"):
            assert call(train, "--resume", "--out", f"{name}-then-1") == 0
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_have_the_losses_of_one(runs, name):
    """First loss to rounding; then rounding grows with the steps, slowly."""
    one, two = log_of(runs / f"{name}-1"), log_of(runs / f"{name}-2")
    assert len(one) == len(two) == 20
    for column, first, later in (("train_loss", 1e-6, 1e-3), ("aux", 1e-5, 1e-2)):
        a, b = ([float(row[column]) for row in rows] for rows in (one, two))
        assert a[0] == pytest.approx(b[0], rel=first), column
        assert a == pytest.approx(b, rel=later), column
    assert float(one[0]["grad_norm"]) == pytest.approx(float(two[0]["grad_norm"]), rel=1e-4)
    scores = [float(rows[9]["val_bits_per_byte"]) for rows in (one, two)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)


@pytest.mark.parametrize("name", ["topk", "deepseek"])
def test_balance_is_that_of_all_ranks(runs, name):
    """The load in the first row, before weights differ by rounding, is exactly the same."""
    one, two = log_of(runs / f"{name}-1"), log_of(runs / f"{name}-2")
    assert one[0]["load_max_over_mean"] == two[0]["load_max_over_mean"]


def test_the_bias_moves_with_the_load_of_all_ranks(runs):
    """Each rank sees half of the tokens; a bias of its own half would soon differ."""
    models = [checkpoint.read(runs / f"deepseek-{n}" / "last.pt")["model"] for n in (1, 2)]
    biases = [{k: v for k, v in model.items() if k.endswith("bias")} for model in models]
    assert biases[0].keys() == biases[1].keys() and len(biases[0]) == 2
    for name, bias in biases[0].items():
        assert bias.any() and (bias - biases[1][name]).abs().max() < 0.021  # two steps of 20


@pytest.mark.parametrize("name", ["topk", "topk-fsdp"])
def test_shards_are_saved_whole(runs, name):
    one, two = (checkpoint.read(runs / run / "last.pt") for run in ("topk-1", f"{name}-2"))
    assert one["model"].keys() == two["model"].keys()
    for key, weight in one["model"].items():
        assert type(two["model"][key]) is torch.Tensor and two["model"][key].shape == weight.shape
        assert (two["model"][key] - weight).abs().mean() < 0.2 * weight.abs().mean(), key
    for mine, theirs in zip(one["optimizers"], two["optimizers"], strict=True):
        assert mine["state"].keys() == theirs["state"].keys()
        for i, state in mine["state"].items():
            shapes = [{k: v.shape for k, v in s.items()} for s in (state, theirs["state"][i])]
            assert shapes[0] == shapes[1]
    exchange.load(runs / f"{name}-2" / "best.pt")


def test_an_unfinished_row_is_saved_as_the_mean_over_ranks(runs):
    """A run killed after it goes on with it; plateau.pt is of step 2 here, the row of step 3."""
    n, loss, *_ = checkpoint.read(runs / "plateau" / "plateau.pt")["meter"][0].tolist()
    whole = sum(float(row["train_loss"]) for row in log_of(runs / "topk-2")[:2])
    assert n == 2 and loss == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("name", ["topk-then-1", "topk-fsdp-then-1", "topk-then-2"])
def test_a_checkpoint_of_n_ranks_resumes_on_m(runs, name):
    whole, resumed = log_of(runs / "topk-1"), log_of(runs / name)
    assert [row["step"] for row in resumed] == [row["step"] for row in whole]
    for a, b in zip(whole, resumed, strict=True):
        assert float(a["train_loss"]) == pytest.approx(float(b["train_loss"]), rel=1e-3)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--batch_size 3", "batch_size=3 is not divisible by 2 processes; try --batch_size 4"),
        ("--out text.txt", "text.txt: text.txt is no folder to write in; choose another --out"),
    ],
)
def test_a_mistake_is_one_line_from_rank_0(flags, message, tmp_path):
    (tmp_path / "text.txt").write_text(make_text())
    command = [str(ROOT / "train.py"), *COMMON, *flags.split()]
    done = torchrun(tmp_path, *command, check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: {message}"]


def test_a_dead_rank_ends_the_run_with_a_clear_line(tmp_path):
    (tmp_path / "text.txt").write_text(make_text())
    (tmp_path / "die.py").write_text(
        f"import sys, os; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import train, tiny_run, signal\n"
        "with tiny_run.at_training_step(5, lambda: train.ranks.RANK and os._exit(9)):\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # let the other find out by itself\n"
        "    train.main()\n"
    )
    done = torchrun(tmp_path, "die.py", *COMMON, "--out", "run", check=False)
    assert done.returncode != 0
    assert "go on: add --resume" in done.stderr


@pytest.mark.parametrize("shapes", [[(8, 8), (8, 8), (4, 8)], [(12, 4), (4, 12), (12, 4)]])
def test_batched_muon_equals_torchs(shapes, monkeypatch):
    """Also tall and wide matrices, several of one shape, one without a gradient. Each is given the
    same way to make a matrix orthogonal, an exact one, on which torch's five steps don't act.
    """
    torch.manual_seed(0)

    def exact(x, *_):
        u, _, v = torch.linalg.svd(x.float(), full_matrices=False)
        return u @ v

    monkeypatch.setattr(train, "orthogonal", exact)
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", exact)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in (*shapes, (3, 3))]
    theirs = [torch.nn.Parameter(weight.detach().clone()) for weight in ours]
    mine = train.Muon(ours, lr=0.02, weight_decay=0.1)
    oracle = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1)
    for _ in range(5):
        for a, b in zip(ours[:-1], theirs[:-1], strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step()
        oracle.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_muon_takes_each_expert_of_a_stack_as_a_matrix_of_its_own():
    torch.manual_seed(0)
    stack = torch.nn.Parameter(torch.randn(3, 8, 4))
    alone = [torch.nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    stack.grad = torch.randn(3, 8, 4)
    for matrix, grad in zip(alone, stack.grad, strict=True):
        matrix.grad = grad.clone()
    train.Muon([stack], lr=0.02, weight_decay=0.1).step()
    train.Muon(alone, lr=0.02, weight_decay=0.1).step()
    assert torch.allclose(stack, torch.stack(alone), atol=1e-6)


@pytest.mark.parametrize("most", [0.5, 100.0])
def test_clipping_that_muon_does_itself_equals_torchs(most):
    """Muon's weights, and the gradients of the others, after a clipping that acts and one that
    doesn't."""
    torch.manual_seed(0)
    models = [torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    muons = [train.Muon([layer.weight for layer in model], 0.02, 0.1) for model in models]
    for _ in range(3):
        grads = [torch.randn_like(p) for p in models[0].parameters()]
        for model in models:
            for p, grad in zip(model.parameters(), grads, strict=True):
                p.grad = grad.clone()
        norm = ranks.clip_gradients(models[0], most, muons[0])
        expected = torch.nn.utils.clip_grad_norm_(models[1].parameters(), most)
        assert torch.allclose(norm, expected)
        for muon in muons:
            muon.step()
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert torch.allclose(models[0][0].bias.grad, models[1][0].bias.grad, atol=1e-7)


@pytest.mark.parametrize("shape", [(3, 16, 24), (3, 24, 16), (1, 64, 64)])
@pytest.mark.parametrize("size", [1e-16, 1e-13, 1.0, 1e4, 1e16])
@pytest.mark.parametrize("steps", ["FIVE", "THREE"])
def test_orthogonal_turns_nothing_and_brings_singular_values_together(
    shape, size, steps, monkeypatch
):
    monkeypatch.setattr(train, "FIVE", getattr(train, steps))  # those of a CPU
    x = size * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, before, v = torch.linalg.svd(x, full_matrices=False)
    core = u.mT @ train.orthogonal(x) @ v.mT  # diagonal if the directions are kept
    values = core.diagonal(dim1=-2, dim2=-1)
    assert torch.allclose(core, torch.diag_embed(values), atol=1e-4)
    values = values[before > 0.02 * before.amax(-1, keepdim=True)]
    assert values.min() > 0.3 and values.max() < 1.2 and 0.6 < values.median() < 1.1
    in_bf16 = torch.linalg.svdvals(train.orthogonal(x.bfloat16()).float())
    assert in_bf16.max() < 1.25
    assert not train.orthogonal(torch.zeros(shape)).any()  # experts whose gradient is still zero
    assert train.orthogonal(x / size * 1e-30).isfinite().all()  # or as good as zero
