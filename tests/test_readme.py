"""What a README says is so: its commands run (shortened by flags, on a small text, where nothing
else is), so does its Python, and what it names is there."""

import math
import re
import shlex
import subprocess
import sys
from code import InteractiveConsole
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny_run import TINY, call, make_text

import bpe
import lamoe
import sample
import train
from data import datasets, exchange, stories
from data.exchange import load
from data.run import presets
from data.run.files import first_free

export = import_module("data.exchange.export")
ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = ("data", "data/run", "data/exchange", "tests", "tests/exercises")
OTHERS = [(ROOT / folder / "README.md").read_text(encoding="utf-8") for folder in FOLDERS]
PYTHON = "^```python\n(.*?)^```\n"
TEXT = re.sub(PYTHON, "", "\n".join([README, *OTHERS]), flags=re.M | re.S)
PROGRAMS = ("python", "torchrun", "pip", "conda", "pytest")


def commands() -> list[str]:
    """Those in blocks of code and those in backticks; T in an experiment is what it stands for."""
    blocks, inline = re.findall(r"^```\n(.*?)^```", TEXT, re.M | re.S), []
    blocks += re.findall(r"^    (.*)", TEXT, re.M)
    for span in re.findall(r"`([^`]+)`", re.sub(r"^```\n.*?^```", "", TEXT, flags=re.M | re.S)):
        inline.append(" ".join(span.split()))
    prefix = next(span for span in inline if span.startswith("python train.py --data tiny"))
    inline = [re.sub(r"^T ", f"{prefix} ", span) for span in inline]
    lines = [line.split("#")[0] for block in blocks for line in block.splitlines()] + inline
    found = [part.strip() for line in lines for part in line.split("&&")]
    return sorted({command for command in found if command.split(" ")[0] in PROGRAMS})


COMMANDS = commands()


def test_the_readme_holds_all_that_can_be_done():
    programs = ("train.py", "sample.py", "data/exchange/export.py", "bpe.py", "data/datasets.py")
    for program in programs:
        assert any(f"python {program}" in command for command in COMMANDS), program
    assert len(COMMANDS) > 40 and any(command.startswith("pytest") for command in COMMANDS)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A folder with texts and finished runs under the README's names."""
    folder = tmp_path_factory.mktemp("library")
    for i, name in enumerate(("book.txt", "my_folder/a/b.md", "news.txt", "plays.txt")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(make_text(2000, i))
    (folder / "my_project").mkdir()
    (folder / "my_project" / "a.py").write_text(make_text(2000, 5))
    rows = "".join(f"{i},{make_text(40, i)!r}\n".replace("\n'", "'") for i in range(90))
    (folder / "rows.csv").write_text("id,body\n" + rows)
    for name in ("bbc", "physics", "tinyshakespeare", "tinystories"):
        (folder / "sets" / name).mkdir(parents=True)
        (folder / "sets" / name / f"{name}.txt").write_text(make_text(2000, len(name)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(datasets, "CACHE", folder / "cache")
        patch.setitem(sys.modules, "matplotlib", None)  # it takes longer than the training
        for run in ("runs/stories", "runs/A", "runs/B"):
            flags = [*TINY, "--seq_len", 64, "--steps", 2]
            assert call(train, "--data", "book.txt", "--out", run, *flags) == 0
    return folder


@pytest.fixture(autouse=True)
def workplace(library, cache, monkeypatch):
    monkeypatch.chdir(library)
    monkeypatch.setattr(datasets, "CACHE", library / "cache")  # a text is drawn once for all
    monkeypatch.setattr(datasets, "SETS", library / "sets")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    return library


SHORT = [*TINY, "--steps", "2", "--draw_mb", "1", "--log_every", "1", "--grad_accum", "1"]


def shortened(arguments: list[str]) -> list[str]:
    """The same flags and then ours, which win, but for those that the command itself is about."""
    asked = ["3" if word == "S" else word for word in arguments]
    short = [*asked, *SHORT]
    kept = ["--n_experts"] if {"--n_experts", "--top_k"} & {*asked} else []
    for flag in [*kept, *({"--top_k", "--tokenizer"} & {*asked})]:
        at = len(asked) + short[len(asked) :].index(flag)
        del short[at : at + 2]
    return short


def run(program, arguments, monkeypatch, request):
    if program is train and "--plot" in arguments:
        request.getfixturevalue("pyplot")
    elif program is train and "--resume" in arguments:
        arguments = ["--resume", "--out", "runs/stories"]
    elif program is train and "--init" in arguments:
        pytest.importorskip("safetensors")
        arguments = [*arguments, "--steps", "1", "--device", "cpu", "--dtype", "fp32"]
    elif program is train:
        arguments = [*shortened(arguments), "--out", str(first_free("runs/one"))]
    if program is sample:
        monkeypatch.setattr("builtins.input", lambda *a: "exit")
        arguments = [*arguments, "--device", "cpu", "--max_new_tokens", "4"]
        if "--model" not in arguments:
            arguments += ["--model", "runs/stories/best.pt"]
    assert call(program, *arguments) == 0


@pytest.fixture
def exported(workplace):
    """A Hugging Face folder."""
    pytest.importorskip("safetensors")
    folder = workplace / "exported"
    if not folder.exists():
        assert call(export, "runs/stories/best.pt", folder) == 0
    return folder


@pytest.fixture
def dense(workplace):
    """The same of a model without experts."""
    pytest.importorskip("safetensors")
    if not Path("dense").exists():
        model = lamoe.LaMoE(lamoe.Config(257, dim=16, n_layers=1, hidden_dim=8, n_experts=1))
        exchange.export(model, bpe.Tokenizer([]), "dense")
    return "dense"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_readme_command_runs(command, workplace, monkeypatch, request):
    words = shlex.split(command)
    for i, (flag, word) in enumerate(pairwise(words), 1):
        if flag == "--router" and word.endswith(".py"):  # from any folder
            words[i] = str(ROOT / "tests/routers/top_p.py")
    monkeypatch.setattr(lamoe, "ROUTERS", dict(lamoe.ROUTERS))
    if words[0] == "torchrun":  # by two ranks: tests/test_ranks.py; here: the flags are known
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        assert words[1] == "--nproc_per_node" and (ROOT / words[script]).is_file()
        if words[script] == "train.py":
            presets.parse("", train.TrainConfig, words[script + 1 :])
    elif words[0] in ("pip", "conda"):  # .ci/run does; here: the extras exist
        extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M)
        named = re.findall(r"\[([\w,]+)\]", command)
        assert all(extra in extras for names in named for extra in names.split(","))
        assert words[1] in ("install", "create", "activate")
    elif words[0] == "pytest":  # alone, it is what runs this
        collect = [sys.executable, "-m", "pytest", "--collect-only", "-q", *words[1:]]
        assert not words[1:] or subprocess.run(collect, cwd=ROOT).returncode == 0
    elif words[1] == "data/stories.py":
        target = words.index(">") if ">" in words else len(words)
        options = ["2" if words[i - 1] == "--n" else word for i, word in enumerate(words)]
        stories.main(options[2:target])
    elif words[1] == "data/datasets.py":
        names = [word for word in words[2:] if not word.startswith("--")][:1]
        assert all(name in datasets.download.SETS for name in names if name != "NAME")
        assert names or datasets.main([]) in (None, 0)
    elif words[1].startswith("tests/"):  # test_benches.py starts them with their smallest size
        script = Path(words[1]).name
        assert (ROOT / words[1]).is_file()
        assert f'"{script}"' in (ROOT / "tests/test_benches.py").read_text()
    elif words[1] == "data/exchange/export.py":
        request.getfixturevalue("exported")
        names = {"CHECKPOINT": "runs/stories/best.pt", "FOLDER": str(first_free("new"))}
        if "model.gguf" in words:
            pytest.importorskip("gguf")
            names["model.gguf"] = str(first_free("model.gguf"))
        assert call(export, *(names.get(word, word) for word in words[2:])) == 0
    else:
        program = {"train.py": train, "sample.py": sample, "bpe.py": bpe}[words[1]]
        if "DENSE" in words:
            words[words.index("DENSE")] = request.getfixturevalue("dense")
        if "FOLDER" in words:
            folder = request.getfixturevalue("exported")
            words = [str(folder) if word == "FOLDER" else word for word in words]
        run(program, words[2:], monkeypatch, request)


def test_the_lines_of_python_run(workplace, monkeypatch, capsys):
    """With a tenth of their steps. What they save is a model, and each token has two experts."""
    monkeypatch.chdir(workplace)
    (code,) = re.findall(PYTHON, README, re.M | re.S)
    assert len([line for line in code.splitlines() if line.strip()]) < 30
    names = {}
    exec(code.replace("range(200)", "range(20)"), names)
    assert names["step"] == 19 and names["out"].loss < 6 < math.log(1024)
    model, tokenizer = load("tiny.pt")
    assert model.config == names["model"].config and tokenizer.vocab_size == 1024
    rows = capsys.readouterr().out.splitlines()[-len(names["sentence"]) :]
    pairs = r"\[[0-3], [0-3]\]"
    assert all(re.fullmatch(rf"'.*' \[{pairs}, {pairs}\]", row) for row in rows)


def test_the_lines_of_python_may_be_pasted_into_pythons_shell(monkeypatch):
    """There a loop ends at an empty line, and what follows without one is a SyntaxError."""
    parts, shell = [], InteractiveConsole()
    monkeypatch.setattr(shell, "runcode", parts.append)
    monkeypatch.setattr(shell, "showsyntaxerror", lambda *a, **k: pytest.fail(shell.buffer[-1]))
    (code,) = re.findall(PYTHON, README, re.M | re.S)
    assert [shell.push(line) for line in f"{code}\n".split("\n")][-1] is False and len(parts) > 15


def test_the_sparse_layer_fits_a_model_of_vectors():
    (line,) = re.findall(r"`(y, routing = .*)`", README)
    names = {**vars(lamoe), "x": torch.randn(2, 9, 64)}
    exec(line, names)
    y, routing = names["y"], names["routing"]
    assert y.shape == (2, 9, 64) and routing.balance + routing.z > 0


@pytest.mark.parametrize("file", ["lamoe.py", "bpe.py", "train.py", "sample.py"])
def test_the_map_has_the_sections_of_the_file(file):
    (row,) = re.findall(rf"^\| `{file}` \| (.*) \|$", README, re.M)
    banners = re.findall(r"^# --- (\d+)\. ", (ROOT / file).read_text(encoding="utf-8"), re.M)
    assert re.findall(r"\b(\d) ", row) == banners


def test_every_file_named_in_a_readme_is_there_and_every_test_file_is_explained():
    for text in (README.split("## Credits")[0], *OTHERS):  # the credits name another project's
        for name in re.findall(r"`([\w/.]+\.(?:py|md))`", text):
            places = [ROOT / folder / name for folder in ("", *FOLDERS)]
            assert any(place.is_file() for place in places), name
    explained = set(re.findall(r"^\| `(test_\w+\.py)` \|", OTHERS[FOLDERS.index("tests")], re.M))
    assert explained == {path.name for path in (ROOT / "tests").glob("test_*.py")}
