"""A run is its flags and its seed: stopped, resumed or repeated, it ends in the same numbers."""

import dataclasses
import errno
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import typing
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROUTERS, encode, random_model, small_config
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import TINY, all_rows_of, at_training_step, call, make_text, press_ctrl_c, rows_of

import lamoe
import train
from bpe import Tokenizer
from data import datasets, exchange
from data.run import checkpoint, presets, storage

ROOT = Path(train.__file__).parent
CADENCE = "--steps 20 --log_every 3 --eval_every 4 --save_every 5"
BYTES = Tokenizer([])


pytestmark = pytest.mark.usefixtures("workplace")


def words(flags):
    return [word for flag in flags for word in str(flag).split()]


def start(out, *flags):
    return call(train, "--data", "text.txt", "--out", out, *TINY, *words(flags))


def resume(out, *flags):
    return call(train, "--resume", "--out", out, *words(flags))


def all_of_log(run):
    return all_rows_of(Path(run) / "log.csv")


def log_of(run):
    return rows_of(Path(run) / "log.csv")


def timeless(rows):
    return [{k: v for k, v in row.items() if k not in ("tokens_per_s", "seconds")} for row in rows]


def leaves(tree, path=""):
    """(path, value) of everything in a checkpoint, tensors as bytes."""
    if isinstance(tree, (dict, list, tuple)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in items:
            yield from leaves(value, f"{path}/{key}")
    elif isinstance(tree, torch.Tensor):
        numbers = tree.reshape(-1).view(torch.uint8)  # numpy has no bf16
        yield path, (tree.dtype, tree.shape, numbers.numpy().tobytes())
    else:
        yield path, tree


def state_of(file):
    """Everything in a checkpoint but the clock and the folder's name."""
    own = ("/done/seconds", "/train_config/out")
    return {path: value for path, value in leaves(checkpoint.read(file)) if path not in own}


# ---------------------------------------------------------------------------------------------
# Interrupt and resume
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stop, flags",
    [
        (10, ""),
        (1, ""),
        (19, ""),
        (12, "--grad_accum 2"),
        (10, "--dtype bf16"),
        (10, "--n_experts 1"),
        (10, "--no-muon_ffn"),
        (10, "--tokenizer bpe --vocab_size 280"),
        *((10, f"--router {router} --top_k 1") for router in ROUTERS if router != "topk"),
    ],
)
def test_resume_is_bit_exact(stop, flags):
    micro_steps = 2 if "--grad_accum" in flags else 1
    assert start("straight", CADENCE, flags) == 0
    with at_training_step(stop * micro_steps, press_ctrl_c):
        assert start("resumed", CADENCE, flags) == 130
    assert checkpoint.read("resumed/last.pt")["done"]["step"] == stop
    torch.manual_seed(12345)  # as in a new process, nothing is left of the old generator
    assert resume("resumed") == 0

    straight, resumed = state_of("straight/last.pt"), state_of("resumed/last.pt")
    for part in ("/model/", "/optimizers/", "/meter/", "/rng"):
        assert any(path.startswith(part) for path in straight)
    assert straight.keys() == resumed.keys()
    assert [path for path in straight if straight[path] != resumed[path]] == []
    assert state_of("straight/best.pt") == state_of("resumed/best.pt")
    assert timeless(log_of("straight")) == timeless(log_of("resumed"))
    steps = [int(row["step"]) for row in log_of("resumed")]
    assert steps == [s for s in range(1, 21) if s % 3 == 0 or s % 4 == 0]


def test_a_killed_run_resumes_from_its_last_save_without_gaps_or_doubles():
    """The log is ahead of last.pt then: its rows after the save are cut and written again."""
    assert start("straight", CADENCE) == 0

    def press_twice():
        press_ctrl_c()
        press_ctrl_c()

    with at_training_step(9, press_twice):
        assert start("killed", CADENCE) == 130
    assert checkpoint.read("killed/last.pt")["done"]["step"] == 5
    assert int(log_of("killed")[-1]["step"]) == 8
    assert resume("killed") == 0
    assert timeless(log_of("straight")) == timeless(log_of("killed"))
    assert state_of("straight/last.pt") == state_of("killed/last.pt")


def test_a_torn_last_line_of_the_log_is_dropped_on_resume():
    assert start("straight", CADENCE) == 0
    with at_training_step(13, press_ctrl_c):
        start("torn", CADENCE)
    with open("torn/log.csv", "a", newline="") as file:
        file.write("1")  # of 15,...: the disk was full
    assert resume("torn") == 0
    assert timeless(log_of("straight")) == timeless(log_of("torn"))


OLD_PARTS = "config train_config given tokenizer text model done optimizers meter rng".split()
OLD_SETTINGS = (
    "data text_column out init device preset draw_mb tokenizer dtype seed steps batch_size "
    "grad_accum lr muon_lr muon_ffn weight_decay warmup clip eval_every save_every log_every "
    "compile fsdp track"
).split()
OLD_CONFIG = (
    "vocab_size dim n_layers n_heads n_kv_heads head_dim hidden_dim n_experts top_k router "
    "n_shared_experts n_dense_layers seq_len rope_theta rope_factor norm_eps qk_norm "
    "tie_embeddings dropout balance_weight z_weight capacity_factor eval_capacity_factor jitter "
    "n_groups top_groups bias_rate routed_scale sequence_weight"
).split()


def test_a_run_folder_of_the_first_version_loads_and_goes_on():
    """Its last.pt: these keys, plain dicts and lists, as torch.save writes them."""
    assert start("straight", CADENCE, "--lr 0.01") == 0
    with at_training_step(10, press_ctrl_c):
        assert start("old", CADENCE, "--lr 0.01") == 130
    saved = checkpoint.read("old/last.pt")
    muon, adamw = saved["optimizers"]
    scalars, load = saved["meter"]
    old = {
        "config": {name: saved["config"][name] for name in OLD_CONFIG},
        "train_config": {name: saved["train_config"][name] for name in OLD_SETTINGS},
        "given": {"data": "text.txt", "lr": 0.01, "tokenizer": "bytes", "dtype": "fp32"},
        "tokenizer": {"pattern": BYTES.state()["pattern"], "merges": []},
        "text": datasets.read("text.txt").key,
        "model": dict(saved["model"]),
        "done": {name: saved["done"][name] for name in ("step", "seconds", "best", "best_step")},
        "optimizers": [
            {"state": optimizer["state"], "param_groups": optimizer["param_groups"]}
            for optimizer in (muon, adamw)
        ],
        "meter": [scalars[:5].clone(), load.clone()],  # it did not know z, the sixth
        "rng": saved["rng"],
    }
    assert list(old) == OLD_PARTS and scalars.shape == (6,) and load.shape == (1, 3)
    assert all(list(state) == ["momentum"] for state in muon["state"].values())
    torch.save(old, "old/last.pt")
    shutil.copytree("old", "old-best")
    torch.save({name: old[name] for name in OLD_PARTS[:-3]}, "old-best/best.pt")
    model, tokenizer = exchange.load("old-best/best.pt")
    assert not model.training and tokenizer.vocab_size == 257

    assert resume("old", "--data text.txt --lr 0.01") == 0
    own = ("/given/",)  # what it began with is kept as it was
    straight, resumed = state_of("straight/last.pt"), state_of("old/last.pt")
    differing = [path for path in straight if straight[path] != resumed.get(path)]
    assert [path for path in differing if not path.startswith(own)] == []
    logs = [timeless(log_of(run)) for run in ("straight", "old")]
    next_row = [[row for row in log if row["step"] == "12"][0] for log in logs]
    assert float(next_row[0].pop("z")) > float(next_row[1].pop("z"))  # of two steps of its three
    assert float(next_row[0].pop("balance")) < float(next_row[1].pop("balance"))
    assert logs[0] == logs[1]


def test_a_run_on_an_embedded_corpus_goes_on_though_its_key_was_a_hash_of_code():
    drawn = datasets.Corpus("stories", "", "stories-1-2", [], None, None, np.ones(9), np.ones(3))
    own = datasets.Corpus("stories", "", "0123456789abcdef", [], None, None)
    storage.check_text({"text": "stories-0123456789ab"}, drawn, "stories")
    for text, corpus in (("facts-0123456789ab", drawn), ("stories-0123456789ab", own)):
        with pytest.raises(ValueError, match="is not the one this run began with"):
            storage.check_text({"text": text}, corpus, "stories")


def test_ctrl_c_saves_and_names_the_command_that_goes_on(capsys):
    with at_training_step(7, press_ctrl_c):
        assert start("run", CADENCE) == 130
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "saved at step 7" in printed.out
    assert "python train.py --resume --out run" in printed.out


def test_ctrl_c_before_the_first_step_stops_without_a_traceback(capsys):
    with mock.patch.object(datasets, "read", side_effect=KeyboardInterrupt):
        assert start("run") == 130
    assert capsys.readouterr().err.strip() == "stopped"


def test_resume_of_a_finished_run_says_so_and_changes_nothing(capsys):
    start("run", "--steps 3")
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    capsys.readouterr()
    assert resume("run") == 0
    printed = capsys.readouterr().out
    assert "finished" in printed and "sample.py" in printed
    assert "best       " in printed and "sample     " in printed  # it may have ended before them
    assert before == {path: path.read_bytes() for path in Path("run").iterdir()}


def remove(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[:1000])


def empty(path):
    path.write_bytes(b"")


def leave_only_what_sampling_needs(path):
    shutil.copy(path.with_name("best.pt"), path)


def leave_only_the_model(path):
    saved = checkpoint.read(path)
    checkpoint.save(path, {"config": saved["config"], "model": saved["model"]})


def change(path, part, **fields):
    saved = checkpoint.read(path)
    checkpoint.save(path, {**saved, part: {**saved[part], **fields}})


def come_from_another_trainer(path):
    change(path, "train_config", wings=2)


def come_from_another_model(path):
    change(path, "config", wings=2)


def have_weights_of_another_shape(path):
    change(path, "config", hidden_dim=9)


@pytest.mark.parametrize(
    "damage",
    [
        remove,
        truncate,
        empty,
        leave_only_what_sampling_needs,
        leave_only_the_model,
        come_from_another_trainer,
        come_from_another_model,
        have_weights_of_another_shape,
    ],
    ids=lambda f: f.__name__,
)
def test_resume_without_a_usable_checkpoint_starts_over_and_keeps_the_old_files(damage, capsys):
    start("straight", "--steps 4")
    start("run", "--steps 4")
    damage(Path("run/last.pt"))
    before = {path.name: path.read_bytes() for path in Path("run").iterdir() if path.suffix}
    capsys.readouterr()
    assert resume("run", "--data text.txt", *TINY, "--steps 4") == 0
    assert "starting over" in capsys.readouterr().out
    for name, content in before.items():
        assert (Path("run") / f"{name}.old").read_bytes() == content
    assert state_of("straight/last.pt") == state_of("run/last.pt")


@pytest.mark.parametrize("flags", ["", "--steps 8", "--steps 8 --router deepseek"])
def test_a_damaged_run_does_not_start_over_on_another_text(flags, capsys):
    """More steps, or a router's file, go with a run: they don't say what it was."""
    start("run", "--steps 2")
    truncate(Path("run/last.pt"))
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    assert resume("run", flags) == 2
    assert "repeat them, at least --data" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in Path("run").iterdir()}


@pytest.mark.parametrize("out", ["", "--out run"])
def test_resume_with_a_text_and_nothing_else_begins_where_there_is_no_run(out, monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "laptop", {"steps": 1, "dim": 16, "batch_size": 2})
    for _ in range(2):
        assert call(train, "--resume", "--data", "text.txt", "--device", "cpu", *out.split()) == 0
    (run,) = [path.parent for path in Path().rglob("last.pt")]
    assert checkpoint.read(run / "last.pt")["train_config"]["data"] == "text.txt"


def test_starting_over_twice_keeps_the_first_old_files_too():
    start("run", "--steps 2")
    first = Path("run/best.pt").read_bytes()
    for _ in range(2):
        remove(Path("run/last.pt"))
        resume("run", "--data text.txt", *TINY, "--steps 2", "--seed", "1")
    assert first in [path.read_bytes() for path in Path("run").iterdir()]


def test_resume_without_out_takes_the_newest_run(capsys):
    for i, name in enumerate(("runs/b", "runs/c", "runs/a")):
        with at_training_step(1, press_ctrl_c):
            start(name, "--steps 2")
        os.utime(f"{name}/log.csv", (1e9 + i, 1e9 + i))
    capsys.readouterr()
    assert call(train, "--resume") == 0
    assert f"{Path('runs/a')} at step 1 of 2" in capsys.readouterr().out


def test_resume_refuses_another_flag_and_takes_the_same_one(capsys):
    with at_training_step(2, press_ctrl_c):
        start("run", "--steps 4", "--lr 0.01")
    before = Path("run/last.pt").read_bytes()
    capsys.readouterr()
    for flags in ("--lr 0.02", "--dim 32", "--steps 3", "--seed 1", "--n_experts 2"):
        assert resume("run", flags) == 2
        message = capsys.readouterr().err
        assert flags in message and message.count("\n") == 1
    assert Path("run/last.pt").read_bytes() == before
    assert resume("run", "--data text.txt", *TINY, "--steps 4", "--lr 0.01") == 0


def test_a_finished_run_trains_longer_and_its_text_may_have_moved(capsys):
    assert start("run", "--steps 4 --log_every 1") == 0
    shutil.move("text.txt", "moved.txt")
    assert resume("run") == 2 and "text.txt" in capsys.readouterr().err
    assert resume("run", "--data moved.txt --steps 8") == 0
    assert "4 steps become 8" in capsys.readouterr().out
    rows = log_of("run")
    assert [int(row["step"]) for row in rows] == [*range(1, 9)]
    settings = train.TrainConfig(**checkpoint.read("run/last.pt")["train_config"])
    for row in rows[4:]:
        share = train.schedule(int(row["step"]) - 1, settings)
        assert float(row["lr"]) == pytest.approx(share * settings.lr, rel=1e-4)
    assert resume("run") == 0  # finished again, where it is now
    Path("moved.txt").write_text("another text " * 500)
    assert resume("run", "--steps 9") == 2
    assert "not the one this run began with" in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["", "--decay 0.5 --warmup 0"])
def test_the_command_that_trains_longer_goes_on_after_a_stop(flags, capsys):
    assert start("resumed", "--steps 4", flags) == 0
    with at_training_step(1, press_ctrl_c):
        assert resume("resumed", "--steps 8") == 130
    for steps in (4, 5, 7):
        assert resume("resumed", "--steps", steps) == 2
        assert f"--steps {steps} differs from the run's 8" in capsys.readouterr().err
    assert resume("resumed", "--data text.txt", *TINY, "--steps 8", flags) == 0
    assert resume("resumed", "--steps 8") == 0
    assert "it is finished" in capsys.readouterr().out
    assert checkpoint.read("resumed/last.pt")["done"]["step"] == 8


def test_of_rates_that_never_fall_nothing_else_is_said(capsys):
    start("run", "--steps 3 --decay 0")
    assert resume("run", "--steps 5") == 0
    assert "they are 100% now\n" in capsys.readouterr().out


@pytest.mark.parametrize("stop", [6, 99])
def test_a_run_with_a_plateau_goes_on_from_it_as_if_it_had_been_longer(stop, capsys):
    """Stopped on the plateau, or after its decay; every weight, moment and row of the log."""
    flags = "--decay 0.25 --warmup 0 --log_every 1 --eval_every 2 --save_every 99"
    assert start("straight", flags, "--steps 16") == 0
    with at_training_step(stop, press_ctrl_c):
        start("resumed", flags, "--steps 8")
    best = Path("resumed/best.pt").read_bytes()
    assert Path("resumed/plateau.pt").exists()
    capsys.readouterr()
    assert resume("resumed", "--steps 16") == 0
    printed = capsys.readouterr().out
    assert "at step 6 rates were 100% of the highest; they are 100% now" in printed
    assert timeless(all_of_log("straight")) == timeless(all_of_log("resumed"))
    own = ("/done/best", "/train_config/", "/given/")
    for name in ("last.pt", "plateau.pt"):
        one, other = (state_of(f"{run}/{name}") for run in ("straight", "resumed"))
        assert one.keys() == other.keys()
        assert [p for p in one if one[p] != other[p] and not p.startswith(own)] == []
    assert checkpoint.read("resumed/plateau.pt")["done"]["step"] == 12
    assert Path("resumed/best.pt").read_bytes() != best  # a better one


def test_a_run_that_ends_between_two_saves_keeps_its_plateau_and_its_best(capsys):
    """A full disk, or a kill: last.pt comes last, and best.pt may be of after it."""
    flags = "--steps 12 --decay 0.5 --warmup 0 --eval_every 3 --save_every 99 --lr 0.02"
    assert start("straight", flags) == 0
    save, best = checkpoint.save, checkpoint.read("straight/plateau.pt")["done"]["best"]

    def full(path, parts):
        if path.name == "plateau.pt":
            raise OSError(errno.EFBIG, "File too large")
        save(path, parts)

    with mock.patch.object(checkpoint, "save", full):
        assert start("run", flags) == 2
    assert "File too large; ulimit -f or the disk's" in capsys.readouterr().err
    assert resume("run", "--data text.txt", *TINY, flags) == 0
    assert state_of("run/plateau.pt") == state_of("straight/plateau.pt")
    saved = {"train_config": {"steps": 12}, "done": {**storage.NOTHING_DONE, "step": 2}}
    longer = storage.before_decay(Path("run"), saved, train.TrainConfig)
    assert longer["done"]["step"] == 6 and longer["done"]["best"] == best


def test_a_better_model_of_an_earlier_decay_stays_the_best():
    flags = "--decay 0.5 --warmup 0 --eval_every 4 --lr 0.02"
    start("run", flags, "--steps 8")
    best = checkpoint.read("run/best.pt")
    assert best["done"]["step"] == 8
    with at_training_step(1, press_ctrl_c):
        assert resume("run", "--steps 80") == 130
    last = checkpoint.read("run/last.pt")["done"]
    assert last["step"] == 5 and last["best"] == best["done"]["best"] and last["best_step"] == 8
    with at_training_step(1, press_ctrl_c):  # on a plateau, of which plateau.pt is not: from here
        assert resume("run", "--steps 90") == 130
    assert checkpoint.read("run/last.pt")["done"]["step"] == 6


def test_without_a_plateau_no_checkpoint_is_kept_for_it_and_longer_runs_say_what_rates_do(capsys):
    start("run", "--steps 4 --warmup 0.5")
    assert not Path("run/plateau.pt").exists()
    capsys.readouterr()
    assert resume("run", "--steps 40") == 0
    settings = train.TrainConfig(**checkpoint.read("run/last.pt")["train_config"])
    assert round(settings.warmup * 40) == 2  # steps of the rise, as before
    assert f"0% of the highest; they are {36 / 38:.0%} now" in capsys.readouterr().out


def test_fine_tuning_tells_where_it_begins(capsys):
    assert start("run", "--steps 3") == 0
    scored = float(log_of("run")[-1]["val_bits_per_byte"])
    capsys.readouterr()
    flags = words(["--steps 1 --lr 0 --muon_lr 0 --init run/best.pt --device cpu --dtype fp32"])
    assert call(train, "--data", "text.txt", "--out", "tuned", *flags) == 0
    (before,) = re.findall(r"start +loss [\d.]+, ([\d.]+) bits/byte", capsys.readouterr().out)
    assert float(before) == pytest.approx(scored, rel=1e-3)
    for row in all_of_log("tuned"):
        assert float(row["val_bits_per_byte"]) == pytest.approx(scored, rel=1e-3)


def test_the_folder_of_a_run_is_no_checkpoint(capsys):
    start("run", "--steps 1")
    assert call(train, "--data", "text.txt", "--init", "run", "--out", "tuned") == 2
    assert "run is the folder of a run, not a checkpoint; name" in capsys.readouterr().err


def test_rates_of_fine_tuning_fall_with_the_size_of_the_model():
    fresh = presets.GENTLE

    def rates(n):
        model = mock.Mock(parameters=lambda: [mock.Mock(numel=lambda: n)])
        return presets.tuning_rates(model)

    assert rates(10_000) == rates(2_000_000) == {**fresh, "muon_ffn": False}
    assert rates(10**9) == {"lr": 9.6e-5, "muon_lr": 4.8e-4, "muon_ffn": False}
    assert fresh["lr"] > rates(10**7)["lr"] > rates(10**8)["lr"] > rates(10**9)["lr"]


def test_the_same_command_with_resume_is_accepted_though_it_left_things_to_the_program():
    """auto, 0 and a vocabulary the text could not fill: what was settled is not a difference."""
    Path("text.txt").write_text("abc " * 400)
    flags = "--dtype auto --device auto --eval_every 0 --tokenizer bpe --vocab_size 400"
    with at_training_step(2, press_ctrl_c):
        assert start("run", "--steps 4", flags) == 130
    assert resume("run", "--data text.txt", *TINY, "--steps 4", flags) == 0


# ---------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------


def test_the_default_folder_is_never_one_that_exists():
    Path("runs/text-3").mkdir(parents=True)
    for _ in range(3):
        assert call(train, "--data", "text.txt", *TINY, "--steps", "1") == 0
    assert sorted(os.listdir("runs")) == ["text", "text-2", "text-3", "text-4"]
    assert os.listdir("runs/text-3") == []


@pytest.mark.parametrize("left", ["log.csv", "load.csv", "last.pt", "best.pt"])
def test_a_folder_that_holds_any_file_of_a_run_is_refused(left, capsys):
    start("run", "--steps 1")
    for path in Path("run").iterdir():
        if path.name != left:
            path.unlink()
    before = (Path("run") / left).read_bytes()
    assert start("run", "--steps 1") == 2
    message = capsys.readouterr().err
    assert "run already holds a run" in message and "--resume" in message and "--out" in message
    assert (Path("run") / left).read_bytes() == before


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_a_run_is_locked_against_a_second_and_the_lock_dies_with_its_process(capsys):
    forever = words(["--steps 1000000 --log_every 1 --eval_every 1000000 --save_every 1000000"])
    command = [sys.executable, ROOT / "train.py", "--data", "text.txt", "--out", "run", *TINY]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen([*command, *forever], stdout=subprocess.DEVNULL, env=environment)
    try:
        deadline = time.monotonic() + 60
        while not (Path("run/log.csv").exists() and len(log_of("run")) > 2):
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.05)
        assert resume("run", "--data text.txt", *TINY, "--steps 1") == 2
        assert "in use" in capsys.readouterr().err
        assert sorted(os.listdir("run")) == [
            "config.json",
            "load.csv",
            "lock",
            "log.csv",
        ]  # nothing moved, nothing lost
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert resume("run", "--data text.txt", *TINY, "--steps 2") == 0


# ---------------------------------------------------------------------------------------------
# Windows and batches
# ---------------------------------------------------------------------------------------------

EOT = 9
texts = st.lists(st.lists(st.integers(0, EOT - 1), max_size=12), min_size=1, max_size=8)
tokens_of_texts = texts.map(
    lambda documents: np.array([EOT, *sum(([*d, EOT] for d in documents), [])])
)


@given(tokens_of_texts, st.integers(1, 10))
def test_windows_score_each_token_once_and_begin_at_documents_where_they_can(tokens, length):
    spans = train.windows(tokens, EOT, length).tolist()
    scored = [position + 1 for start, end in spans for position in range(start, end)]
    assert scored == list(range(1, len(tokens)))
    for start, end in spans:
        inside = range(start + 1, min(start + length, len(tokens) - 2) + 1)
        documents = [i for i in inside if tokens[i] == EOT]
        assert end == (documents[-1] if documents else min(start + length, len(tokens) - 1))


def plain_windows(documents, last, length):
    """Window by window."""
    starts = [0]
    while (start := starts[-1]) < last:
        inside = [i for i in documents if start < i <= start + length]
        starts.append(min(inside[-1] if inside else start + length, last))
    return [list(span) for span in itertools.pairwise(starts)]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 20))
def test_windows_equal_those_of_a_plain_loop(lengths, length):
    ids = np.array([EOT, *sum(([0] * (n - 1) + [EOT] for n in lengths), [])])
    documents = [0, *np.cumsum(lengths).tolist()[:-1]]
    expected = plain_windows(documents, len(ids) - 1, length)
    assert train.windows(ids, EOT, length).tolist() == expected


def test_windows_of_a_worked_example():
    tokens = np.array([9, 1, 9, 2, 2, 9, 3, 3, 3, 3, 3, 9])  # documents of 1, 2 and 5 tokens
    assert train.windows(tokens, EOT, 4).tolist() == [[0, 2], [2, 5], [5, 9], [9, 11]]
    assert train.windows(tokens, EOT, 6).tolist() == [[0, 5], [5, 11]]


def all_rows(batches, n, size):
    """The first n windows that training meets."""
    rows = torch.cat([batches(i, "cpu")[0] for i in range(-(-n // size))])[:n]
    return [tuple(row.tolist()) for row in rows]


@given(st.integers(1, 7), st.integers(0, 5), st.integers(1, 9))
def test_every_window_is_met_once_in_the_first_epoch(size, seed, length):
    tokens = np.concatenate([[99], np.arange(40), [99]])  # no token twice: a window is known by it
    batches = train.Batches(tokens, 99, length, size, seed)
    n = len(train.windows(tokens, 99, length))
    rows = all_rows(batches, n, size)
    assert len(set(rows)) == n
    assert {token for row in rows for token in row} >= set(range(39))  # 39: only a target


@given(st.integers(1, 7), st.integers(0, 5))
def test_short_documents_are_each_met_once_an_epoch_in_another_order(size, seed):
    documents = [[99, *range(7 * i, 7 * i + 7)] for i in range(12)]
    tokens = np.array([*sum(documents, []), 99])
    batches = train.Batches(tokens, 99, 8, size, seed)
    n = len(batches.starts)
    rows = all_rows(batches, 3 * n, size)
    first, second, third = (rows[i : i + n] for i in (0, n, 2 * n))
    assert set(first) == set(second) == set(third) and len(set(first)) == n
    assert first != second != third


@given(st.integers(5, 9), st.integers(0, 5))
def test_a_long_document_is_cut_elsewhere_in_each_epoch_but_the_first(length, seed):
    tokens = np.array([99, *range(60), 99, *range(100, 160), 99])
    batches = train.Batches(tokens, 99, length, 1, seed)
    n = len(batches.starts)
    firsts = np.array([batches(i, "cpu")[0][0, 0].item() for i in range(6 * n)]).reshape(6, n)
    assert np.array_equal(np.sort(firsts[0]), np.sort(tokens[batches.starts]))
    assert ((firsts == 99).sum(1) == 2).all(), "documents are met from their beginning"
    cuts = np.sort(np.where(firsts == 99, -1, firsts))[:, 2:]
    assert (np.abs(cuts - cuts[0]) <= length).all()
    assert len(np.unique(cuts, axis=0)) > 1


@given(st.integers(0, 3), st.lists(st.integers(0, 60), min_size=1, max_size=6))
def test_batch_i_depends_on_i_and_the_seed_alone(seed, calls):
    tokens = np.concatenate([[99], np.arange(60), [99]])
    used = train.Batches(tokens, 99, 5, 3, seed)
    for i in calls:
        inputs, targets = used(i, "cpu")
        fresh_inputs, fresh_targets = train.Batches(tokens, 99, 5, 3, seed)(i, "cpu")
        assert torch.equal(inputs, fresh_inputs) and torch.equal(targets, fresh_targets)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
    other = train.Batches(tokens, 99, 5, 3, seed + 1)
    assert any(not torch.equal(used(i, "cpu")[0], other(i, "cpu")[0]) for i in range(4))


# ---------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------

SETTINGS = train.TrainConfig(device="cpu", dtype="fp32")


def data_of(tokenizer, ids, length):
    """As much of train.Data as evaluation reads."""
    return train.Data(tokenizer, None, None, ids, train.windows(ids, tokenizer.eot, length), None)


def naive_nats(model, ids, eot, length):
    """Nats of each token but the first: one forward pass a token, logarithms in float64."""
    nats, start = [], 0
    while start < len(ids) - 1:
        documents = [i for i in range(start + 1, start + length + 1) if i in eot[:-1]]
        end = documents[-1] if documents else min(start + length, len(ids) - 1)
        for position in range(start, end):
            context = torch.from_numpy(ids[None, start : position + 1].astype(np.int64))
            logits = model(context).logits[0, -1].double()
            nats.append(-logits.log_softmax(-1)[int(ids[position + 1])].item())
        start = end
    return np.array(nats)


@pytest.mark.parametrize("length", [4, 16])
@torch.no_grad()
def test_evaluation_equals_a_naive_loop_token_by_token(length):
    documents = ["Once, été.", "😀", "a much longer document, cut into several windows", "b c"]
    tokenizer = Tokenizer.train(documents, 275)
    ids = encode(tokenizer, documents)
    model = random_model(small_config(vocab_size=tokenizer.vocab_size, seq_len=length))
    data = data_of(tokenizer, ids, length)
    nats = naive_nats(model, ids, np.flatnonzero(ids == tokenizer.eot).tolist(), length)
    n_bytes = sum(len(document.encode()) + len("<|endoftext|>") for document in documents)
    kinds = np.random.default_rng(0).integers(0, len(datasets.KINDS), n_bytes)

    score = train.evaluate(model, data, SETTINGS, kinds)
    assert score.loss == pytest.approx(nats.mean(), rel=1e-5)
    assert score.bits_per_byte * n_bytes == pytest.approx(nats.sum() / math.log(2), rel=1e-5)

    by_kind, last_byte = [0.0] * len(datasets.KINDS), -1
    for token, cost in zip(ids[1:].tolist(), nats, strict=True):
        last_byte += len(tokenizer.decode_bytes([token]))
        by_kind[kinds[last_byte]] += cost / math.log(2)
    assert score.bits_of_label == pytest.approx(by_kind, rel=1e-5)
    assert score.bits_of_label.sum() == pytest.approx(score.bits_per_byte * n_bytes, rel=1e-9)
    assert train.evaluate(model, data, SETTINGS).bits_of_label is None


def test_evaluation_leaves_the_model_as_it_was_and_repeats_itself():
    data = data_of(BYTES, encode(BYTES, [make_text(100)]), 16)
    model = random_model(small_config(vocab_size=257)).train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    first, second = (train.evaluate(model, data, SETTINGS) for _ in range(2))
    assert first == second
    assert model.training
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


# ---------------------------------------------------------------------------------------------
# Optimizers, schedule, step
# ---------------------------------------------------------------------------------------------


@given(st.integers(1, 300), st.floats(0, 1))
def test_the_rate_rises_linearly_then_falls_linearly_to_zero(steps, warmup):
    config = train.TrainConfig(steps=steps, warmup=warmup)
    rise = max(1, round(warmup * steps))
    shares = [train.schedule(step, config) for step in range(steps + 1)]
    assert shares[:rise] == pytest.approx([(step + 1) / rise for step in range(rise)])
    assert shares[-1] == 0 < min(shares[:-1])
    if rise < steps:
        fall = np.linspace(1, 0, steps - rise + 1)
        assert shares[rise:] == pytest.approx(fall)


@given(st.integers(1, 300), st.floats(0, 1), st.floats(0, 1))
def test_with_decay_the_rate_stays_at_the_highest_until_the_last_share(steps, warmup, decay):
    config = train.TrainConfig(steps=steps, warmup=warmup, decay=decay)
    rise = max(1, round(warmup * steps))
    fall = max(1, min(round(decay * steps), steps - rise))
    shares = [train.schedule(step, config) for step in range(steps + 1)]
    assert shares[:rise] == pytest.approx([min(1, (step + 1) / rise) for step in range(rise)])
    assert all(share == 1 for share in shares[rise : steps - fall])
    if rise < steps:
        assert shares[steps - fall :] == pytest.approx(np.linspace(1, 0, fall + 1))


@pytest.mark.parametrize("n_experts", [1, 4])
@pytest.mark.parametrize("muon_ffn", [False, True])
def test_muon_gets_exactly_the_attention_matrices_and_the_experts_if_asked(n_experts, muon_ffn):
    model = lamoe.LaMoE(small_config(n_experts=n_experts, top_k=1, qk_norm=True))
    settings = train.TrainConfig(weight_decay=0.1, muon_ffn=muon_ffn)
    muon, adamw = train.make_optimizers(model, settings)
    names = {id(weight): name for name, weight in model.named_parameters()}

    def names_of(optimizer, decayed):
        groups = [g for g in optimizer.param_groups if (g["weight_decay"] > 0) == decayed]
        return sorted(names[id(weight)] for group in groups for weight in group["params"])

    expected = [f"blocks.{i}.attn.{m}_proj.weight" for i in (0, 1) for m in "kqov"]
    if muon_ffn:
        ffn = "ffn.{}_proj.weight" if n_experts == 1 else "ffn.experts.{}_proj"
        for part in ("gate_up", "down"):
            expected += [f"blocks.{i}.{ffn.format(part)}" for i in (0, 1)]
    assert isinstance(muon, train.Muon) and isinstance(adamw, torch.optim.AdamW)
    assert names_of(muon, True) == sorted(expected)
    assert names_of(muon, False) == []
    assert names_of(adamw, False) == sorted(name for name in names.values() if "norm" in name)
    all_names = [*names_of(muon, True), *names_of(adamw, True), *names_of(adamw, False)]
    assert sorted(all_names) == sorted(names.values())


def test_each_step_takes_the_rates_of_the_schedule():
    start("run", "--steps 5 --lr 0.01 --muon_lr 0.05 --warmup 0.4")
    share = train.schedule(4, train.TrainConfig(steps=5, warmup=0.4))
    muon, *adamw = checkpoint.read("run/last.pt")["optimizers"]
    for optimizer, highest in ((muon, 0.05), *((o, 0.01) for o in adamw)):
        for group in optimizer["param_groups"]:
            assert group["lr"] == pytest.approx(highest * share)


def test_two_micro_steps_of_four_windows_equal_one_step_of_eight():
    """Without the balance loss, which is not a mean over tokens but a product of two."""
    flags = "--steps 4 --log_every 1 --balance_weight 0 --z_weight 1"
    start("whole", flags, "--batch_size 8")
    start("halves", flags, "--batch_size 4 --grad_accum 2")
    for whole, halves in zip(log_of("whole"), log_of("halves"), strict=True):
        assert whole["tokens"] == halves["tokens"]
        for column in ("train_loss", "grad_norm", "val_loss"):
            assert float(whole[column]) == pytest.approx(float(halves[column]), rel=1e-4)


def test_gradients_are_clipped_at_the_norm_of_the_flag():
    """AdamW divides by a gradient's size, but not by less than 1e-8."""
    for clip in ("1", "1e-12"):
        start(clip, "--steps 1 --clip", clip)
    heads = (checkpoint.read(f"{clip}/last.pt")["model"]["head.weight"] for clip in ("1", "1e-12"))
    free, held = (head.abs().max() for head in heads)  # zero at first
    assert 0 < held < free / 100


@pytest.mark.parametrize("weight", ["balance_weight", "z_weight"])
def test_the_routers_own_losses_are_trained_on(weight):
    """In the first step nothing else moves them: experts give zeros."""
    for share in (0, 1):
        start(f"{share}", "--steps 1 --balance_weight 0 --z_weight 0", f"--{weight} {share}")
    name = "blocks.0.ffn.router.weight"
    none, moved = (checkpoint.read(f"{share}/last.pt")["model"][name] for share in (0, 1))
    assert not torch.equal(none, moved)


def test_the_bias_of_deepseeks_router_is_updated_once_a_step():
    start("run", "--router deepseek --top_k 1 --steps 1 --grad_accum 2 --bias_rate 0.125")
    state = checkpoint.read("run/last.pt")["model"]
    (bias,) = (value for name, value in state.items() if name.endswith("router.bias"))
    steps = torch.sign(bias)  # of three experts, not all can be above the mean
    assert {-1, 1} <= set(steps.tolist())
    assert bias.sum().item() == pytest.approx(0, abs=1e-6)
    assert (bias.max() - bias.min()).item() == pytest.approx(0.25, abs=1e-6)


@pytest.mark.parametrize("router", [*ROUTERS])
def test_a_frozen_router_stays_as_it_is_and_the_rest_learns(router, capsys):
    flags = [f"--router {router} --top_k 1 --bias_rate 0.1", "--freeze_router", CADENCE]
    start("first", flags[0], "--steps 3")  # a router that has learned something
    init = words(["--init first/last.pt --device cpu --dtype fp32 --batch_size 4", *flags[1:]])
    for out, stop in (("straight", 99), ("resumed", 7)):
        with at_training_step(stop, press_ctrl_c):
            call(train, "--data", "text.txt", "--out", out, *init)
    assert "routers frozen" in capsys.readouterr().out
    assert resume("resumed") == 0
    before = checkpoint.read("first/last.pt")["model"]
    straight, resumed = (checkpoint.read(f"{run}/last.pt") for run in ("straight", "resumed"))
    frozen = {name for name, weight in before.items() if ".router." in name}
    assert frozen == {n for n in before if torch.equal(before[n], straight["model"][n])}
    assert all(torch.equal(resumed["model"][n], straight["model"][n]) for n in before)


def test_a_dense_model_has_no_router_to_freeze(capsys):
    assert start("run", "--n_experts 1 --freeze_router") == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "leave it out" in message


# ---------------------------------------------------------------------------------------------
# Flags, log, end
# ---------------------------------------------------------------------------------------------


def test_every_field_is_a_flag_and_nothing_else_is(capsys):
    assert call(train, "--help") == 0
    flags = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    fields = [f for cls in (train.TrainConfig, lamoe.Config) for f in dataclasses.fields(cls)]
    expected = {"--help", "--resume", "--plot"} | {f"--{field.name}" for field in fields}
    expected |= {f"--no-{field.name}" for field in fields if field.type is bool}
    assert flags == expected
    assert len({field.name for field in fields}) == len(fields), "a name in both dataclasses"


def test_flags_have_the_types_of_their_fields():
    def parse(words):
        return presets.parse("", train.TrainConfig, words)

    fields = [f for cls in (train.TrainConfig, lamoe.Config) for f in dataclasses.fields(cls)]
    for field in fields:
        if field.type is bool:
            on, off = (parse([f"--{no}{field.name}"]) for no in ("", "no-"))
            assert (on[field.name], off[field.name]) == (True, False)
        else:
            value = parse([f"--{field.name}", "3"])[field.name]
            kind = next(iter(typing.get_args(field.type)), field.type)  # int of int | None
            assert value == kind(3) and type(value) is kind


def test_presets_name_only_fields_and_an_explicit_flag_wins():
    fields = {f.name for cls in (train.TrainConfig, lamoe.Config) for f in dataclasses.fields(cls)}
    assert all(set(preset) <= fields for preset in presets.PRESETS.values())
    start("preset", "--steps 1")
    start("explicit", "--steps 1", "--no-qk_norm", "--tie_embeddings")
    preset, explicit = (checkpoint.read(f"{run}/last.pt") for run in ("preset", "explicit"))
    assert preset["config"]["qk_norm"] and not explicit["config"]["qk_norm"]
    assert explicit["config"]["tie_embeddings"]
    assert preset["train_config"]["preset"] == "laptop"


SIZES = st.floats(4, 10).map(lambda x: 10**x)  # from ten kilobytes to ten gigabytes


@given(SIZES, st.sampled_from([64, 128, 512]), st.sampled_from([2, 16, 128]), st.booleans())
def test_the_recipe_has_no_steps_but_those_of_rounding(size, dim, batch_size, muon_ffn):
    """A text 5% larger has the same settings but for one notch; a context is doubled, then."""
    given = {"dim": dim, "batch_size": batch_size, "muon_ffn": muon_ffn, "seq_len": 256}
    one, more = (presets.recipe(n, given) for n in (size, 1.05 * size))
    if more["vocab_size"] == presets.DRAWN["vocab_size"]:  # too large to be read twice
        assert 3 * 256 * batch_size / (1.05 * size) < 1 / 600 or size < 1.1e6
        return
    assert 0 <= more["vocab_size"] - one["vocab_size"] <= 256 and one["vocab_size"] % 256 == 0
    assert one["seq_len"] in (64, 128, 256, 512)
    assert more["seq_len"] in (one["seq_len"], 2 * one["seq_len"])
    assert 1.11 > one["weight_decay"] / more["weight_decay"] >= 1
    same = ("lr", "muon_lr", "muon_ffn")
    assert [one[name] for name in same] == [more[name] for name in same]


def test_the_recipe_where_it_was_measured():
    bbc = {"vocab_size": 4096, "seq_len": 256, "weight_decay": 0.3, "lr": 0.02}
    assert presets.recipe(4_301_984, {}) == bbc | {"muon_lr": 0.04, "muon_ffn": True}
    model = presets.recipe(10**8, presets.GPU_TEXT)
    assert (model["vocab_size"], model["seq_len"], model["lr"]) == (8192, 512, 0.005)
    large = {**presets.DRAWN, "weight_decay": 0.11}
    assert presets.recipe(11_483_663, {}) == large
    assert presets.recipe(11_483_663, {"batch_size": 32})["muon_ffn"]
    defaults = {"dim": lamoe.Config.dim}
    defaults |= {name: getattr(train.TrainConfig, name) for name in ("batch_size", "grad_accum")}
    for n in (10**6, 10**7):
        assert presets.recipe(n, {}) == presets.recipe(n, defaults)
    # Twice the windows of a step: twice the share of the text, which is what decay goes by.
    assert presets.recipe(4_301_984, {"batch_size": 32})["weight_decay"] == 0.6
    assert presets.recipe(4_301_984, {"seq_len": 128})["weight_decay"] == 0.15


@pytest.mark.parametrize(
    "data, kind", [("stories", "generated"), ("text.txt,facts", "partly generated")]
)
def test_what_was_chosen_and_for_which_text_is_printed_and_kept(data, kind, capsys):
    flags = words(["--draw_mb 1 --steps 1 --out run --data", data])
    assert call(train, *TINY, *flags, "--seq_len", 256) == 0
    line = re.search(
        rf"recipe     for {kind} text of [\d.]+ MB, read (\S+) times: .*", capsys.readouterr().out
    )
    settings = json.loads(Path("run/config.json").read_text())
    assert f"AdamW {settings['lr']:g}, weight decay {settings['weight_decay']:g}" in line[0]
    assert settings["muon_ffn"] == ("attention and experts" in line[0])
    if kind == "generated":
        assert presets.DRAWN.items() <= {**settings, "vocab_size": 2048}.items()


def test_zero_steps_means_as_many_as_the_preset_says(monkeypatch):
    monkeypatch.setitem(presets.PRESETS["laptop"], "steps", 3)
    assert start("run", "--steps 0") == 0
    assert checkpoint.read("run/last.pt")["done"]["step"] == 3


def test_the_log_has_its_columns_and_they_add_up():
    start("run", CADENCE, "--grad_accum 2", "--lr 0.01", "--warmup 0.2")
    assert Path("run/log.csv").read_text().splitlines()[0] == (
        "step,tokens,flops,train_loss,val_loss,val_bits_per_byte,lr,grad_norm,aux,balance,z,"
        "load_max_over_mean,load_min_over_mean,dead_experts,dropped,tokens_per_s,seconds"
    )
    flops = lamoe.flops_per_token(exchange.load("run/best.pt")[0])
    config = train.TrainConfig(steps=20, warmup=0.2)
    for row in log_of("run"):
        step = int(row["step"])
        assert int(row["tokens"]) == step * 2 * 4 * 16
        assert float(row["lr"]) == pytest.approx(0.01 * train.schedule(step - 1, config), rel=1e-5)
        assert bool(row["val_loss"]) == bool(row["val_bits_per_byte"]) == (step % 4 == 0)
        assert float(row["flops"]) == pytest.approx(int(row["tokens"]) * flops, rel=1e-5)
        assert 1 <= float(row["load_max_over_mean"]) <= 3 / 2  # 3 experts, top 2
        assert 3 - 2 * 3 / 2 <= float(row["load_min_over_mean"]) <= 1
        parts = float(row["balance"]) + float(row["z"])
        assert 0 < float(row["z"]) < float(row["balance"]) < parts
        assert parts == pytest.approx(float(row["aux"]), rel=1e-4)
        assert 0 <= int(row["dead_experts"]) <= 1 and float(row["dropped"]) == 0
        assert float(row["tokens_per_s"]) > 0 and float(row["aux"]) > 0
    seconds = [float(row["seconds"]) for row in log_of("run")]
    assert seconds == sorted(seconds) and seconds[0] > 0


@pytest.mark.parametrize("flags", ["", "--n_experts 1"])
def test_step_0_is_a_row_of_its_own(flags):
    start("run", "--steps 4 --eval_every 2", flags)
    steps = [int(row["step"]) for row in all_of_log("run")]
    assert steps == [0, 2, 4]
    row = {name: value for name, value in all_of_log("run")[0].items() if value}
    assert float(row.pop("val_loss")) == pytest.approx(math.log(257), rel=1e-5)
    assert 7 < float(row.pop("val_bits_per_byte")) < math.log2(257)  # a separator is one token
    nothing = dict.fromkeys(("step", "tokens", "flops", "lr", "seconds"), "0")
    assert row == nothing


def test_a_row_is_the_mean_since_the_row_before():
    start("each", "--steps 6 --log_every 1 --eval_every 6")
    start("thirds", "--steps 6 --log_every 3 --eval_every 6")
    for i, row in enumerate(log_of("thirds")):
        for column in ("train_loss", "aux", "z"):
            steps = [float(one[column]) for one in log_of("each")[3 * i : 3 * i + 3]]
            assert float(row[column]) == pytest.approx(sum(steps) / 3, rel=1e-4)
    assert log_of("thirds")[-1]["grad_norm"] == log_of("each")[-1]["grad_norm"]


def test_a_dense_model_has_no_load_in_its_log():
    start("run", "--steps 2", "--n_experts 1")
    row = log_of("run")[-1]
    assert (row["load_max_over_mean"], row["dead_experts"], float(row["aux"])) == ("", "", 0)
    assert (row["load_min_over_mean"], float(row["balance"]), float(row["z"])) == ("", 0, 0)


@pytest.mark.parametrize("flags", ["", "--tie_embeddings", "--n_experts 1"])
def test_the_first_loss_is_the_logarithm_of_the_vocabulary(flags, capsys):
    start("run", "--steps 1", "--log_every 1", flags)
    tolerance = 0.1 if flags == "--tie_embeddings" else 1e-5
    assert float(log_of("run")[0]["train_loss"]) == pytest.approx(math.log(257), rel=tolerance)
    assert f"ln(257) = {math.log(257):.2f}" in capsys.readouterr().out


@pytest.mark.parametrize("flags", ["", "--dtype bf16", "--n_experts 1 --tie_embeddings"])
def test_the_loss_goes_down(flags):
    start("run", "--steps 60", "--eval_every 10", flags)
    bits = [float(row["val_bits_per_byte"]) for row in log_of("run") if row["val_loss"]]
    uniform = math.log2(257)
    assert bits[-1] < 0.7 * uniform and bits[-1] < bits[0]


def test_two_runs_of_the_same_seed_are_equal_and_another_seed_is_not():
    for run, seed in (("a", 0), ("b", 0), ("c", 1)):
        start(run, "--steps 3", "--seed", seed)
    assert timeless(log_of("a")) == timeless(log_of("b"))
    assert state_of("a/last.pt") == state_of("b/last.pt")
    assert timeless(log_of("a")) != timeless(log_of("c"))


def test_best_holds_the_best_evaluation_not_the_last():
    scores = iter([0.5, 3.0, 1.0, 2.0])  # of steps 0, which makes no checkpoint, 2, 4 and 6
    evaluate = train.evaluate

    def scripted(*arguments, **named):
        score = evaluate(*arguments, **named)
        return score._replace(bits_per_byte=next(scores, score.bits_per_byte))

    with mock.patch.object(train, "evaluate", scripted):
        start("run", "--steps 6", "--eval_every 2")
    best, last = checkpoint.read("run/best.pt"), checkpoint.read("run/last.pt")
    assert best["done"]["step"] == best["done"]["best_step"] == last["done"]["best_step"] == 4
    assert last["done"]["step"] == 6 and last["done"]["best"] == 1.0


def is_finite(file):
    state = checkpoint.read(file)["model"]
    return all(weight.isfinite().all() for weight in state.values())


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_last_checkpoint(capsys):
    forward, saved = lamoe.LaMoE.forward, {}

    def failing(self, ids, targets=None, *args, **kwargs):
        out = forward(self, ids, targets, *args, **kwargs)
        if not self.training:
            return out
        failing.calls += 1
        if failing.calls == 7:
            saved["last"] = Path("run/last.pt").read_bytes()
            return out._replace(loss=out.loss * math.inf)
        return out

    failing.calls = 0
    with mock.patch.object(lamoe.LaMoE, "forward", failing):
        assert start("run", CADENCE) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "not finite" in message and "last.pt" in message and "--lr" in message
    assert Path("run/last.pt").read_bytes() == saved["last"] and is_finite("run/last.pt")


def test_a_validation_that_is_not_finite_stops_the_run_too(capsys):
    """The loss of a step comes before its update: an evaluation is the first to meet the damage."""
    evaluate, calls = train.evaluate, iter(range(100))

    def failing(*arguments, **named):
        score = evaluate(*arguments, **named)
        return score._replace(loss=math.nan, bits_per_byte=math.nan) if next(calls) > 1 else score

    with mock.patch.object(train, "evaluate", failing):
        assert start("run", "--steps 4", "--eval_every 2") == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "not finite" in message and "--lr" in message
    assert checkpoint.read("run/last.pt")["done"]["step"] == 2


@pytest.mark.parametrize("flags", ["--eval_every 1", "--log_every 1 --eval_every 5"])
def test_a_rate_beyond_reason_stops_the_run_with_a_remedy(flags, capsys):
    assert start("run", "--lr 1e30", "--steps 10", flags) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "not finite" in message and "--lr" in message
    for path in Path("run").glob("*.pt"):
        assert is_finite(path)
    assert ("last.pt holds" in message) == Path("run/last.pt").exists()


def test_the_run_ends_with_score_sample_and_the_next_command(capsys):
    assert start("run", "--steps 2") == 0
    printed = capsys.readouterr().out
    for word in ("best ", "bits/byte", "sample ", "log.csv", "python sample.py"):
        assert word in printed
    assert "floor" not in printed


def test_a_run_ends_well_with_a_router_that_cannot_use_a_cache():
    assert start("run", "--router switch --eval_capacity_factor 1.25 --steps 1") == 0


def test_the_embedded_corpus_ends_with_its_floor_and_where_the_gap_is(
    monkeypatch, tmp_path, capsys
):
    write = datasets.stories.write
    small = {"train_bytes": 20_000, "val_bytes": 3_000}
    monkeypatch.setattr(datasets, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.stories, "write", lambda folder: write(folder, **small))
    assert call(train, *TINY, "--steps", "2", "--seq_len", "64") == 0
    printed = capsys.readouterr().out
    percent = r"(-?\d+\.\d+)"
    pattern = rf"floor +\d\.\d+: {percent}% above it, of which choices {percent}, recall {percent}"
    parts = re.search(rf"{pattern}, the rest {percent}", printed)
    above, *kinds = map(float, parts.groups())
    assert sum(kinds) == pytest.approx(above, abs=0.02)
    assert (Path("runs/stories") / "best.pt").exists()


def test_progress_is_written_for_a_terminal_only(monkeypatch, capsys):
    start("run", "--steps 3", "--log_every 1")
    assert "\r" not in capsys.readouterr().out


def test_numbers_survive_the_checkpoint_to_the_last_digit():
    """Else --resume with the same flags would be refused."""
    given = {"lr": 0.1 + 0.2, "muon_lr": 1 / 3, "clip": 2 / 3, "seed": 2**53 + 1}
    start("run", "--steps 1", *(word for k, v in given.items() for word in (f"--{k}", v)))
    saved = checkpoint.read("run/last.pt")["train_config"]
    assert {name: saved[name] for name in given} == given


def test_without_a_compiler_training_goes_on(capsys, monkeypatch):
    """A laptop without one, or a broken one: a line, and the same losses."""

    def broken(*args, **options):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    start("plain", "--steps 3 --log_every 1 --n_experts 1")
    monkeypatch.setattr(torch, "compile", broken)
    start("run", "--steps 3 --log_every 1 --n_experts 1 --compile")
    assert "no compiler here (Failed to find C compiler.)" in capsys.readouterr().err
    losses = [[row["train_loss"] for row in log_of(run)] for run in ("plain", "run")]
    assert losses[0] == losses[1]


def test_what_a_compiler_tells_itself_is_not_shown(monkeypatch):
    """Not in later steps either, which compile too; what others warn of is."""

    def train_and_warn(*args):
        for module in ("torch._inductor.lowering", "mine"):
            warnings.warn_explicit(module, FutureWarning, "file.py", 1, module)
        steps(*args)

    steps = train.train
    monkeypatch.setattr(train, "train", train_and_warn)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert start("run", "--steps 1 --n_experts 1 --compile") == 0
    assert [str(w.message) for w in seen if w.category is FutureWarning] == ["mine"]


@pytest.mark.parametrize("rows", [4, 1])
def test_experts_on_a_cpu_are_not_compiled(rows, capsys):
    assert start("run", "--steps 2 --compile --batch_size", rows) == 0
    assert "not compiled" in capsys.readouterr().out


def test_zero_is_by_preset_and_the_help_tells_what_a_run_has(capsys):
    with mock.patch.object(train, "run_training") as begin:
        assert call(train, "--steps", 0, "--draw_mb", 0, "--seed", 0) == 0
    assert begin.call_args.args == ({"seed": 0}, False)
    assert call(train, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for flag, default in (
        ("qk_norm", "True"),
        ("seq_len", "by the text: see `recipe` in data/run/presets.py"),
        ("steps", "850"),
    ):
        assert re.search(
            rf"--{flag} [^-]*?\(default: {default}\)|--{flag}, .*?default: {default}", text
        )


def test_a_stop_that_another_rank_was_asked_for_has_an_exit_code(monkeypatch):
    monkeypatch.setattr(train, "train", lambda run, stop: None)  # ended, with nothing in stop
    assert start("run", "--steps 4") == 128 + signal.SIGINT
