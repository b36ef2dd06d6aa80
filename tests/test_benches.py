"""Every measurement script is started as a person starts it, with its smallest size."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import results
from conftest import random_model, small_config
from tiny_run import call, make_text

from bpe import Tokenizer
from data.run import checkpoint

TESTS = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
# `python tests/SCRIPT arguments`, but what it draws goes into the cache of this test.
START = """
import runpy, sys
from pathlib import Path
cache, script, *arguments = sys.argv[1:]
sys.path[:0] = [str(Path(script).parent), str(Path(script).parents[1])]
from data import datasets
datasets.CACHE, sys.argv = Path(cache), [script, *arguments]
runpy.run_path(script, run_name="__main__")
"""
# results.py starts train.py many times: here in one process, with little to draw and to score.
HERE = """
import functools, subprocess, types
from data import facts, stories
for corpus in (facts, stories):
    corpus.write = functools.partial(corpus.write, val_bytes=2_000)
start = subprocess.Popen
def here(command, *more, **options):
    if not command[1].endswith("train.py"):
        return start(command, *more, **options)
    arguments, sys.argv, sys.modules["matplotlib"] = sys.argv, command[1:], None
    runpy.run_path(command[1], run_name="__main__")
    del sys.modules["matplotlib"]
    sys.argv = arguments
    return types.SimpleNamespace(wait=lambda: 0)
subprocess.Popen = here
"""


@pytest.fixture
def printed(cache, tmp_path):
    """A function that starts a script in a folder with a text, and returns what it prints."""
    (tmp_path / "book.txt").write_text(make_text(20_000), encoding="utf-8")

    def start(script, *arguments, code=0):
        program = START
        if script == "results.py":
            program = START.replace("runpy.run_path", HERE + "runpy.run_path")
        command = [sys.executable, "-c", program, cache, TESTS / script, *map(str, arguments)]
        result = subprocess.run(
            command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
        )
        assert result.returncode == code, result.stderr
        return result.stderr if code else result.stdout

    return start


def test_bench_runs_on_this_machine_and_prints_no_nan(printed):
    text = printed("bench.py", "--smallest", "train", "routers", "layer", "generate")
    for words in ("matrix product", "64 experts, top 8", "of topk k=1", "of peak", "small"):
        assert words in text, words
    assert "nan" not in text


@pytest.mark.oracle
def test_bench_writing_compares_with_hugging_face_and_llama_cpp(printed):
    for module in ("transformers", "safetensors", "gguf", "xllamacpp"):
        pytest.importorskip(module)
    text = printed("bench_writing.py", "--smallest")
    for way in ("LaMoE", "lamoe.py alone", "Hugging Face", "llama.cpp"):
        assert text.count(f"threads  {way}  ") == 2, text
    assert "other ids" not in text


@pytest.mark.oracle
def test_bench_compares_with_hugging_face(printed):
    pytest.importorskip("transformers")
    assert "LaMoE over it" in printed("bench.py", "--smallest", "peers")


def test_bench_runs_on_several_ranks(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [TESTS / "bench.py", "--smallest", "scaling", "largest"]
    result = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for words in ("alone", "DDP", "FSDP2", "largest"):
        assert words in result.stdout and "nan" not in result.stdout, words


def test_bench_stories_counts_stories(printed, tmp_path):
    model, tokenizer = random_model(small_config(vocab_size=257, seq_len=64)), Tokenizer([])
    parts = {"config": dataclasses.asdict(model.config), "model": model.state_dict()}
    checkpoint.save(tmp_path / "model.pt", {**parts, "tokenizer": tokenizer.state()})
    text = printed("bench_stories.py", "--model", "model.pt", "--n", 1, "--draw_mb", 1)
    assert "broken   Once, upon a time" in text
    assert "0 of 1 are complete, 0 are training documents" in text


def test_bench_tokens_compares_with_encode_array(printed):
    text = printed("bench_tokens.py", "book.txt", "--vocab_size", 300, "--rounds", 1)
    assert "to disk:" in text and "ratio" in text


def test_bench_cores_compares_two_workers_with_one_process(printed):
    text = printed("bench_cores.py", "book.txt", "--rounds", 1)
    assert "count:" in text and "encode:" in text and "same bytes: True" in text


@pytest.mark.oracle
def test_bench_bpe_compares_with_rustbpe_and_tiktoken(printed):
    for module in ("rustbpe", "tiktoken"):
        pytest.importorskip(module)
    text = printed("bench_bpe.py", "book.txt", "--vocab_size", 300, "--rounds", 1)
    assert "merges equal: True" in text and "x the speed" in text


@pytest.mark.oracle
def test_bench_bpe_compares_the_ids_of_random_strings(printed):
    for module in ("transformers", "tiktoken"):
        pytest.importorskip(module)
    text = printed("bench_bpe.py", "book.txt", "--vocab_size", 300, "--fuzz", 100)
    assert text.startswith("100 of 100 strings"), text


@pytest.mark.oracle
def test_bench_trainer_trains_there_and_measures_here(printed, tmp_path):
    for module in ("transformers", "safetensors", "accelerate"):
        pytest.importorskip(module)
    model, tokenizer = random_model(small_config(vocab_size=257, qk_norm=True)), Tokenizer([])
    parts = {"config": dataclasses.asdict(model.config), "model": model.state_dict()}
    checkpoint.save(tmp_path / "model.pt", {**parts, "tokenizer": tokenizer.state()})
    (tmp_path / "book.txt").write_text(make_text(900), encoding="utf-8")
    text = printed("bench_trainer.py", "model.pt", "book.txt", "--steps", 2)
    assert "Qwen3MoeForCausalLM" in text and text.count("times the mean") == 3
    rows = [line.split(",")[0] for line in text.splitlines() if "times the mean" in line]
    assert len({row.split()[-2] for row in rows}) == 3, rows  # it was trained, in two ways


@pytest.mark.skipif(sys.platform != "linux", reason="forks, /proc and signals of Linux")
@pytest.mark.parametrize("campaign, n", [("kills", 1), ("power", 1), ("files", 1), ("fuzz", 1000)])
def test_each_campaign_of_torture_comes_to_its_end(campaign, n, printed):
    text = printed("torture.py", campaign, "--n", n, "--every", 1000)
    assert text.splitlines()[-1].startswith(f"{campaign}: "), text


# A model of a hundredth of a second; of two equal flags the last one wins.
TINY = "--dim 16 --n_heads 1 --n_kv_heads 1 --n_layers 1 --seq_len 32 --batch_size 2 --draw_mb 1"
TINY += " --vocab_size 300 --device cpu"
TIMED = f"--minutes 0.003 --speed_steps 10 --sparse=--hidden_dim=8 {TINY}".split()


def test_results_compares_models_at_equal_time(printed):
    minutes = ["--seeds", 1, "--sparse_minutes", 0.003, 0.002]
    text = printed("results.py", "sparse", *TIMED, "--data", "book.txt", *minutes)
    rows = [line.split() for line in text.split("seconds  ")[1].splitlines()[1:4]]
    names = [["dense,", "0.003"], ["sparse,", "0.003"], ["sparse,", "0.002"]]
    assert [row[:2] for row in rows] == names
    assert all(0 < float(seconds) and 0.1 < float(bits) < 8 for *_, seconds, bits in rows)
    assert text.count("seeds reach dense's") == 2 and "\npicture " in text


def test_results_of_a_series_are_made_by_several_processes_and_nothing_twice(printed, tmp_path):
    for flags in (["--only", 1], ["--seeds", 2]):
        text = printed("results.py", "facts", *TIMED, *flags)
        assert text.count("$ python train.py") == 4
    means = re.findall(r"minutes .* ([\d.]+) \(([\d.]+) to ([\d.]+)\)\n", text)
    assert len(means) == 2 and all(low < mean < high for mean, low, high in means)
    for run in (tmp_path / "runs/facts").glob("dense-*-minutes-*/log.csv"):
        last = run.read_text().splitlines()[-1].split(",")
        assert any(float(last[-1]) == pytest.approx(float(end), abs=1e-3) for end in means[0][1:])
    text = printed("results.py", "facts", *TIMED, "--only", 0, "--lr", 1, code=2)
    assert text.startswith("error: runs/facts/speed-dense-0 is from another command")


@pytest.mark.parametrize("mistake", ["--sees 2", "--seeds -1", "--minutes nan", "--only -1"])
def test_a_mistake_on_the_command_line_of_results_is_one_line_and_leaves_nothing(
    mistake, printed, tmp_path
):
    told = printed("results.py", "facts", *TIMED, *mistake.split(), code=2)
    assert told.startswith("error: ") and told.count("\n") == 1 and mistake.split()[0] in told
    assert not [path for path in tmp_path.glob("runs/facts/*") if path.is_dir()]
    if mistake == "--sees 2":  # it was train.py's mistake to find
        assert "picture " in printed("results.py", "facts", *TIMED, "--seeds", 1)


@pytest.mark.parametrize(
    "mistake",
    [
        "facts --data book.txt",  # it has no facts to recall
        "default --data book.txt",
        "default --seed 3",
        "facts --steps 5",
        "facts --dense=--steps=5",
        "facts --dense='",
        "facts --sparse --muon_ffn",
    ],
)
def test_a_flag_that_results_cannot_obey_is_one_line_before_anything_runs(
    mistake, monkeypatch, capsys
):
    monkeypatch.setattr(results, "train", None)
    assert call(results, *mistake.split()) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1
    assert re.search("--(data is for|seed|steps|dense|sparse)", told)


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A run of two steps, as results.py finds it; train.py has nothing more to do on it."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.csv").write_text("step,tokens_per_s\n0,\n1,5\n2,5\n")
    (run / "config.json").write_text('{"steps": 2}')
    popen = lambda *_, **__: types.SimpleNamespace(wait=lambda: 0)  # noqa: E731
    monkeypatch.setattr(results.subprocess, "Popen", popen)
    return run


@pytest.mark.parametrize(
    "name, left",
    [("log.csv", ""), ("log.csv", "step\n0\n1\n2\nx\n"), ("log.csv", "steps\n2\n")]
    + [("config.json", ""), ("config.json", '{"st'), ("config.json", "[2]"), ("log.csv", None)],
)
def test_a_run_that_lost_files_or_lines_is_told_by_its_name(name, left, finished):
    assert len(results.train(finished, "--steps 2")) == 3
    (finished / name).unlink()
    if left is not None:
        (finished / name).write_text(left)
    with pytest.raises(ValueError, match="run has lost files, or lines; delete it, and the same"):
        results.train(finished, "--steps 2")
    shutil.rmtree(finished)  # the remedy: a run that is not there is begun
    with pytest.raises(ValueError, match="run has lost"):
        results.train(finished, "--steps 2 --seed 1")


def test_the_default_run_without_its_best_model_is_told_and_its_picture_is_drawn_again(
    finished, monkeypatch, capsys
):
    row = "1,1,1.5,0.5,1,9"
    log = f"step,train_loss,val_loss,val_bits_per_byte,val_recall_bits,seconds\n{row}\n2{row[1:]}\n"
    (finished / "log.csv").write_text(log)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    seed_0 = finished.rename(finished.with_name("seed-0"))
    with pytest.raises(ValueError, match="seed-0 has lost files"):
        call(results, "default", "--out", seed_0.parent)
    checkpoint.save(
        seed_0 / "best.pt",
        {"config": {}, "model": {}, "tokenizer": None}
        | {"train_config": {"steps": 2}, "given": {}, "floor": 0.4},
    )
    (seed_0.parent / "seed-0.command").unlink()
    assert call(results, "default", "--out", seed_0.parent) == 0
    told = capsys.readouterr().out
    assert "seed 0: 0.500 bits per byte, 25.00% above the floor" in told and "\nloss " in told


def test_ctrl_c_ends_a_series_though_its_run_was_just_done(finished, monkeypatch):
    (finished / "log.csv").unlink()
    waits = iter([KeyboardInterrupt, None])

    def wait():
        if interrupt := next(waits):
            raise interrupt
        return 0

    popen = lambda *_, **__: types.SimpleNamespace(wait=wait)  # noqa: E731
    monkeypatch.setattr(results.subprocess, "Popen", popen)
    with pytest.raises(KeyboardInterrupt):
        results.train(finished, "--steps 2")


def noted(monkeypatch, *arguments):
    """The names of the runs that results.py makes; each of them has the same log."""
    row = {"val_bits_per_byte": "1", "load_max_over_mean": "1", "seconds": "1", "tokens": "2"}
    log, names = (
        [{**row, "step": f"{i}", "tokens_per_s": "1", "seconds": f"{i}"} for i in (1, 2)],
        [],
    )
    monkeypatch.setattr(results, "train", lambda run, *_, **__: names.append(run.name) or log)
    assert call(results, *arguments) == 0
    return names


def test_minutes_that_come_to_the_same_are_one_run(workplace, monkeypatch, capsys):
    sparse = ["sparse", "--data", "text.txt", "--seeds", 1]
    names = noted(monkeypatch, *sparse, "--sparse_minutes", 3, 3.0)
    assert names[2:] == ["dense-5-minutes-0", "sparse-3-minutes-0"]
    assert noted(monkeypatch, *sparse, "--minutes", 0.001)[-1] == "sparse-0.000667-minutes-0"


@pytest.mark.parametrize("data", ["stories of mine/", "stories.txt", "."])
def test_the_text_of_a_table_may_have_any_name(data, workplace, monkeypatch, capsys):
    names = noted(monkeypatch, "routers", "--data", data, "--seeds", 1, "--rounds", 0)
    assert len({*names}) == 14
    assert Path(data).resolve().stem in capsys.readouterr().out


def test_results_prints_the_table_of_the_readme(printed):
    flags = ["--data", "book.txt", "--seeds", 1, "--rounds", 1, "--steps", 2, *TINY.split()]
    rows = printed("results.py", "routers", *flags).splitlines()[-9:]
    readme = (TESTS.parent / "README.md").read_text(encoding="utf-8").splitlines()
    at = readme.index(rows[0].replace("book", "tinyshakespeare"))
    for row, there in zip(rows[1:], readme[at + 1 : at + 9], strict=True):
        assert row.split(" | ")[0] == there.split(" | ")[0].replace(" (dense)", "")
    table = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows[2:]]
    assert [row[3] for row in table].count("") == [row[5] for row in table].count("") == 1
    assert all(float(row[i]) > 0 for row in table[1:] for i in range(1, 6))


def test_results_has_the_default_run(printed):
    text = printed("results.py", "default", "--steps", 2, *TINY.split())
    assert re.search(r"seed 0: [\d.]+ bits per byte, [\d.]+% above the floor; a name told", text)


def test_results_lists_its_cases_and_calls_bench_for_the_speed(printed):
    assert {"default", "sparse", "speed", "routers", "facts"} <= {*printed("results.py").split()}
    assert "64 of 192, top 7 + 1" in printed("results.py", "speed", "--smallest")
