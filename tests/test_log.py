"""What a run leaves to look at: loss by source, load by layer, pictures, and mlflow if asked."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import encode, random_model, small_config
from tiny_run import TINY, all_rows_of, at_training_step, call, make_text, press_ctrl_c, rows_of

import train
from bpe import Tokenizer
from data import datasets, tokens
from data.run import checkpoint, log, machine, pictures

EOT = "<|endoftext|>"
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def mixed(workplace):
    for name in ("poems", "letters"):
        documents = [make_text(20, f"{name} {i}") for i in range(60)]
        Path("mixed").mkdir(exist_ok=True)
        Path(f"mixed/{name}.txt").write_text(f"\n{EOT}\n".join(documents), encoding="utf-8")


def start(out, *flags, data="text.txt"):
    flags = [word for flag in flags for word in str(flag).split()]
    return call(train, "--data", data, "--out", out, *TINY, *flags)


# ---------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------

MIXTURE, NAMES = "mixed/poems.txt,mixed/letters.txt", ["poems", "letters"]


def test_the_loss_by_source_is_the_loss_on_its_documents_alone():
    corpus = datasets.read(MIXTURE)
    tokenizer = Tokenizer.train(corpus.train, 300)
    settings = train.TrainConfig(device="cpu", dtype="fp32", tokenizer="bytes")
    config = small_config(vocab_size=257)
    data = train.load_data(settings, config, corpus)
    tokenizer, model = data.tokenizer, random_model(config)

    def score(ids, kinds=None):
        spans = train.windows(ids, tokenizer.eot, 16)
        return train.evaluate(model, data._replace(val_ids=ids, spans=spans), settings, kinds)

    together = log.by_source(score(data.val_ids, data.source_of_byte), data)
    assert list(together) == NAMES
    of = [corpus.sources[i] for i in corpus.val.sources]
    for name in corpus.sources:
        alone = [text for text, source in zip(corpus.val, of, strict=True) if source == name]
        n_bytes = sum(len(text.encode()) + len(EOT) for text in alone)
        assert np.sum(data.source_of_byte == corpus.sources.index(name)) == n_bytes
        # documents begin windows of their own only where they fit: the context differs a little
        expected = score(encode(tokenizer, alone)).bits_per_byte
        assert together[name] == pytest.approx(expected, rel=0.05)
    total = np.bincount(data.source_of_byte) @ list(together.values())
    everything = score(data.val_ids).bits_per_byte
    assert total / len(data.source_of_byte) == pytest.approx(everything, rel=1e-9)


def test_a_source_without_validation_text_has_no_column():
    score = train.Score(1.0, 1.0, np.array([8.0, 4.0, 0.0]))
    corpus = datasets.Corpus("x", "", "", list("abcde"), None, None)
    data = train.Data(None, None, corpus, None, None, np.array([0, 0, 1, 1]))
    columns = {"val_loss": 1.0, "val_bits_per_byte": 1.0, "val_bpb_a": 4.0, "val_bpb_b": 2.0}
    assert log.columns_of_score(score, data) == columns


def test_the_log_of_a_drawn_corpus_has_what_a_fact_costs(capsys):
    assert start("run", "--steps 4 --draw_mb 1 --eval_every 2", data="facts") == 0
    scored = [row for row in all_rows_of("run/log.csv") if row["val_loss"]]
    best = min(scored, key=lambda row: float(row["val_bits_per_byte"]))
    (told,) = re.findall(
        r"a name or thing to be recalled costs (\S+) bits", capsys.readouterr().out
    )
    assert len(scored) == 3 and told == f"{float(best['val_recall_bits']):.3f}"


def test_facts_mixed_with_a_book_are_scored_apart_beside_their_floor(capsys):
    flags = ["--steps 2 --draw_mb 1"]
    assert start("run", *flags, data="facts,text.txt") == 0
    shown = r"by source  facts \d\.\d{4} \(floor \d\.\d{4}\)  text \d\.\d{4}"
    printed = capsys.readouterr().out
    assert re.search(shown, printed) and "partly generated text of 0.9" in printed
    last = rows_of("run/log.csv")[-1]
    assert float(last["val_bpb_facts"]) > 0 < float(last["val_bpb_text"])
    assert call(train, "--resume", "--out", "run") == 0


@pytest.mark.parametrize("flags, is_told", [("--top_k 1", True), ("", False)])
def test_a_router_that_the_loss_cannot_teach_is_told_of(flags, is_told, capsys):
    assert start("run", "--steps 1", flags) == 0
    assert ("teaches this" in capsys.readouterr().out) == is_told
    assert start("switch", "--steps 1 --router switch --top_k 1") == 0
    assert "teaches this" not in capsys.readouterr().out


def test_a_mixture_logs_and_shows_the_loss_of_each_source(capsys):
    assert start("run", "--steps 4 --eval_every 2 --log_every 1", data=MIXTURE) == 0
    printed = capsys.readouterr().out
    columns = [f"val_bpb_{name}" for name in NAMES]
    rows = rows_of("run/log.csv")
    assert list(rows[0])[-2:] == columns
    for row in rows:
        parts = [row[column] for column in columns]
        assert all(parts) if row["val_loss"] else not any(parts)
        assert max(map(len, parts)) <= 8  # as many digits as other columns
        if row["val_loss"]:
            low, high = sorted(map(float, parts))
            assert low <= float(row["val_bits_per_byte"]) <= high
            assert f"poems {float(parts[0]):.3f}" in printed
    assert re.search(r"by source  poems \d\.\d{4}  letters \d\.\d{4}", printed)


def test_a_resumed_mixture_keeps_its_columns():
    for out, stop in (("straight", 99), ("resumed", 3)):
        with at_training_step(stop, press_ctrl_c):
            start(out, "--steps 6 --eval_every 2 --log_every 1", data=MIXTURE)
    assert call(train, "--resume", "--out", "resumed") == 0
    for name in ("log.csv", "load.csv"):
        straight, resumed = (rows_of(f"{run}/{name}") for run in ("straight", "resumed"))
        for row in straight + resumed:
            for column in ("seconds", "tokens_per_s"):
                row.pop(column, None)
        assert straight == resumed and straight


def test_a_source_whose_file_was_renamed_keeps_what_was_logged_of_it():
    start("run", "--steps 2 --eval_every 1", data=MIXTURE)
    old = [row["val_bpb_poems"] for row in all_rows_of("run/log.csv")]
    moved = MIXTURE.replace("poems", "verses")
    Path("mixed/poems.txt").rename("mixed/verses.txt")
    assert call(train, "--resume", "--out", "run", "--steps", 3, "--data", moved) == 0
    rows = all_rows_of("run/log.csv")
    assert [row["val_bpb_poems"] for row in rows] == [*old, ""]
    assert [bool(row["val_bpb_verses"]) for row in rows] == [False, False, False, True]


def test_resume_notices_that_the_text_changed(capsys):
    with at_training_step(2, press_ctrl_c):
        start("run", "--steps 4")
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    original = Path("text.txt").read_bytes()
    Path("text.txt").write_bytes(original + b" more")
    capsys.readouterr()
    assert call(train, "--resume", "--out", "run") == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert all(word in message for word in ("text.txt", "bring that back", "--out"))
    assert {path: path.read_bytes() for path in Path("run").iterdir()} == before
    Path("text.txt").write_bytes(original)
    assert call(train, "--resume", "--out", "run") == 0


def test_the_column_of_a_table_is_a_flag_and_kept(capsys):
    rows = [[i, make_text(9, i), f"other {i} " * 9] for i in range(60)]
    with open("table.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "text", "other"], *rows])
    with at_training_step(1, press_ctrl_c):
        start("run", "--steps 2 --text_column other", data="table.csv")
    assert call(train, "--resume", "--out", "run") == 0
    assert start("bad", "--text_column wings", data="table.csv") == 2
    assert "no column 'wings'; it has: id, text, other" in capsys.readouterr().err
    assert start("guessed", "--steps 1", data="table.csv") == 0
    assert "text is column 'text'" in capsys.readouterr().out


def test_a_large_text_teaches_the_tokenizer_by_a_part_of_it_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(tokens, "SAMPLE", 500)
    learned = []
    real = tokens.count_words
    monkeypatch.setattr(
        tokens, "count_words", lambda texts, n: real(learned.append(list(texts)) or learned[-1], n)
    )
    assert start("run", "--steps 1 --tokenizer bpe --vocab_size 280", data="mixed") == 0
    assert start("again", "--steps 1 --tokenizer bpe --vocab_size 280", data="mixed") == 0
    assert len(learned) == 1, "the second run remembers the tokenizer"
    assert start("other", "--steps 1 --tokenizer bpe --vocab_size 290", data="mixed") == 0
    assert len(learned) == 2
    n = sum(len(text.encode()) for text in learned[0])
    assert 300 < n < 700 and "one document in" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------
# Load
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_dense, layers", [(0, "01"), (1, "12")])
def test_load_csv_has_the_share_of_each_expert_of_each_layer_and_fits_the_log(n_dense, layers):
    """A layer has the number that sample.py gives it, whatever layers before it are dense."""
    flags = f"--n_layers {2 + n_dense} --n_dense_layers {n_dense}" if n_dense else "--n_layers 2"
    start("run", f"--steps 6 --log_every 2 --eval_every 6 {flags}")
    loads, rows = rows_of("run/load.csv"), rows_of("run/log.csv")
    assert list(loads[0]) == ["step", "layer", "0", "1", "2"]
    assert [(row["step"], row["layer"]) for row in loads] == [
        (row["step"], layer) for row in rows for layer in layers
    ]
    for row in rows:
        shares = [[float(r[e]) for e in "012"] for r in loads if r["step"] == row["step"]]
        assert np.sum(shares, 1) == pytest.approx([3, 3], rel=1e-4)  # 1 is an equal share
        assert np.max(shares) == pytest.approx(float(row["load_max_over_mean"]), rel=1e-4)


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------


def figure_of(pyplot, act):
    """The figure that act() saves, kept open."""
    kept = []
    with mock.patch.object(pyplot, "close", kept.append):
        act()
    return kept[0]


def test_plot_averages_seeds_and_names_runs_by_what_differs(pyplot):
    for run, flags in {
        "runs/a0": "--seed 0",
        "runs/a1": "--seed 1",
        "runs/b": "--n_experts 4 --batch_size 4",
    }.items():
        start(run, "--steps 4 --log_every 1 --eval_every 2", flags)
    folders = ["runs/a0", "runs/a1", "runs/b"]
    figure = figure_of(pyplot, lambda: call(train, "--plot", *folders, "--out", "all"))
    of = [[r for r in all_rows_of(f"{run}/log.csv") if r["val_loss"]] for run in folders]
    bits = [[float(row["val_bits_per_byte"]) for row in rows] for rows in of]
    lines = [line for line in figure.axes[0].lines if not line.get_label().startswith("_")]
    assert lines[0].get_ydata() == pytest.approx(np.mean(bits[:2], axis=0))
    low, high = sorted(min(b) for b in bits[:2])
    mean = (low + high) / 2
    assert lines[0].get_label() == f"n_experts 3: {mean:.3f} ({low:.3f} to {high:.3f}, 2 seeds)"
    assert lines[1].get_label() == f"n_experts 4: {min(bits[2]):.3f}"
    Path("runs/b/best.pt").unlink()  # then nothing tells what it was
    figure = figure_of(pyplot, lambda: call(train, "--plot", *folders, "--out", "all"))
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert [label for label in labels if label.startswith("runs/b: ")]
    figure = figure_of(pyplot, lambda: call(train, "--plot", "runs/a0", "--out", "all"))
    assert figure.axes[0].lines[-1].get_label().startswith("runs/a0: ")


def test_a_run_named_twice_or_made_longer_is_no_second_seed_and_an_empty_flag_is_none(pyplot):
    start("a", "--steps 2")
    flags = ["--init", "a/best.pt", "--device", "cpu", "--dtype", "fp32", "--steps", 2]
    assert call(train, "--data", "text.txt", *flags, "--out", "b") == 0
    start("longer", "--steps 2")
    assert call(train, "--resume", "--out", "longer", "--steps", 9) == 0
    runs = ["a", "a/", "b", "longer"]
    figure = figure_of(pyplot, lambda: call(train, "--plot", *runs, "--out", "all"))
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert not [label for label in labels if "seeds" in label]
    assert [label for label in labels if "init none" in label and "tokenizer bytes" in label]


def test_where_a_floor_is_known_the_picture_is_of_what_is_above_it(pyplot, capsys):
    figure = figure_of(pyplot, lambda: start("run", "--steps 4 --draw_mb 1", data="stories"))
    floor = datasets.read("stories", train_bytes=10**6).floor
    axes = figure.axes[0]
    (line,) = [line for line in axes.lines if line.get_label().startswith("validation")]
    scored = [row for row in all_rows_of("run/log.csv") if row["val_loss"]]
    assert axes.get_yscale() == "log"
    expected = [float(row["val_bits_per_byte"]) - floor for row in scored]
    assert line.get_ydata() == pytest.approx(expected, rel=1e-4)
    assert axes.get_ylim()[0] < expected[-1] < axes.get_ylim()[1]
    alt = Path("run/loss.png").read_bytes()  # in words, for those who can't see it
    for words in ("over 4 steps", "above the floor", "the busiest", "times the mean at the end"):
        assert words.encode() in alt
    figure = figure_of(pyplot, lambda: call(train, "--plot", "run", "--out", "one"))
    assert figure.axes[0].get_yscale() == "log"
    assert figure.axes[0].lines[-1].get_ydata() == pytest.approx(expected, rel=1e-4)
    assert np.isnan(pictures.above([1.0, 0.9], 1.0)).all()  # at the floor or, by chance, below it


@pytest.mark.parametrize("flags", ["--n_layers 2", "--n_experts 1"])
def test_the_picture_has_a_line_for_each_expert_of_each_layer(flags, pyplot):
    figure = figure_of(pyplot, lambda: start("run", "--steps 6 --log_every 2", flags))
    meshes = [c for ax in figure.axes for c in ax.collections if hasattr(c, "get_coordinates")]
    loads = rows_of("run/load.csv")
    if not loads:
        assert len(figure.axes) == 1  # of the loss alone
        return
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[1].lines}
    for name, column in {"busiest": "load_max_over_mean", "idlest": "load_min_over_mean"}.items():
        logged = [float(row[column]) for row in rows_of("run/log.csv")]
        assert lines[f"the {name} expert"] == pytest.approx(logged)
    (mesh,) = [c for c in meshes if c.get_cmap().name == "cividis" and c.get_array().size < 100]
    expected = [[float(row[e]) for e in "012"] for row in loads]
    steps = len({row["step"] for row in loads})
    assert np.allclose(mesh.get_array().reshape(6, steps).T.reshape(-1, 3), expected)
    assert Path("run/loss.png").read_bytes().startswith(b"\x89PNG")


def test_plot_lays_runs_over_each_other_by_step_and_by_seconds(pyplot, capsys):
    for run, lr in (("a", 0.01), ("b", 0.001)):
        start(run, "--steps 6 --log_every 1 --eval_every 2", "--lr", lr)
    capsys.readouterr()
    figure = figure_of(pyplot, lambda: call(train, "--plot", "a", "b", "--out", "both.png"))
    assert Path("both.png").read_bytes().startswith(b"\x89PNG")
    assert "both.png" in capsys.readouterr().out
    for ax, column in zip(figure.axes, ("step", "seconds"), strict=True):
        lines = [line for line in ax.lines if not line.get_label().startswith("_")]
        assert [line.get_label()[:9] for line in lines] == ["lr 0.01: ", "lr 0.001:"]
        for line, run in zip(lines, "ab", strict=True):
            scored = [row for row in all_rows_of(f"{run}/log.csv") if row["val_loss"]]
            assert line.get_xdata() == pytest.approx([float(row[column]) for row in scored])
            bits = [float(row["val_bits_per_byte"]) for row in scored]
            assert line.get_ydata() == pytest.approx(bits)
        assert len({line.get_color() for line in lines}) == 2


def test_names_of_runs_and_of_pictures_may_be_any(pyplot, capsys, recwarn):
    start("_a", "--steps 2")
    for name in ("$x^{$", r"$\bad$", "日本"):
        shutil.copytree("_a", name)
        figure = figure_of(pyplot, lambda name=name: call(train, "--plot", name, "--out", "p"))
        (text,) = figure.legends[0].get_texts()
        assert text.get_text().replace(r"\$", "$").startswith(f"{name}: ")
    figure = figure_of(pyplot, lambda: call(train, "--plot", "_a", "--out", "p"))
    assert len(figure.legends[0].get_texts()) == 1
    assert not [w for w in recwarn.list if "Glyph" in f"{w.message}"], recwarn.list[0].message
    capsys.readouterr()
    pictures = {".": "plot.png", "_a": "_a/plot.png", "no/such/p.pdf": "no/such/p.pdf"}
    for out, path in {**pictures, "v1.2": "v1.2.png", "p.docx": "p.docx.png"}.items():
        assert call(train, "--plot", "_a", "--out", out) == 0
        assert Path(path).is_file() and f"picture    {path}" in capsys.readouterr().out


def test_plot_of_what_is_no_run_is_one_line(pyplot, capsys):
    Path("empty").mkdir()
    for run in ("nowhere", "empty"):
        assert call(train, "--plot", run) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and run in message and "folder of a run" in message
    Path("empty/log.csv").write_text("step,val_loss,val_bits_per_byte\n1,2,x\n")
    assert call(train, "--plot", "empty") == 2
    assert "folder of a run" in capsys.readouterr().err
    assert not Path("plot.png").exists()
    start("run", "--steps 4")
    assert call(train, "--plot", "run", "--out", "one") == 0
    assert "one.png" in capsys.readouterr().out and Path("one.png").exists()


def test_without_matplotlib_the_loss_is_a_line_of_text(capsys):
    start("run", "--steps 9 --log_every 1")
    printed = capsys.readouterr().out
    line = re.search(r"loss +([▁▂▃▄▅▆▇█]+) (\d\.\d\d) to (\d\.\d\d)", printed)
    assert len(line[1]) == 9 and line[1][0] == "█" and float(line[2]) > float(line[3])
    assert 'pip install -e ".[plot]"' in printed
    assert call(train, "--plot", "run") == 2
    assert 'pip install -e ".[plot]"' in capsys.readouterr().err


@pytest.mark.parametrize("drawn", [False, True])
def test_a_finished_run_whose_log_lost_its_rows_still_ends_as_it_should(drawn, request, capsys):
    if drawn:
        request.getfixturevalue("pyplot")
    start("run", "--steps 4")
    Path("run/log.csv").write_bytes(bytes(200))  # as after a power cut
    capsys.readouterr()
    assert start("run", "--steps 4 --resume") == 0
    printed = capsys.readouterr().out
    assert "picture    none: no evaluation in the log" in printed and "next       " in printed


def test_the_line_of_text_is_as_high_as_the_values():
    assert pictures.sparkline([1, 2, 3, 4, 5, 6, 7, 8]) == "▁▂▃▄▅▆▇█"
    assert pictures.sparkline([5.0, 5.0]) == "▁▁"
    assert len(pictures.sparkline(list(range(1000)))) == 60


# ---------------------------------------------------------------------------------------------
# mlflow
# ---------------------------------------------------------------------------------------------


class FakeMlflow:
    """As much of mlflow as is asked of it; `fails` names functions that raise."""

    def __init__(self):
        self.params, self.metrics, self.artifacts, self.runs = {}, [], [], []
        self.uri, self.ended, self.fails = None, 0, ()

    def __getattribute__(self, name):
        if name != "fails" and name in self.fails:
            return mock.Mock(side_effect=ConnectionError("no store\nof this name"))
        return super().__getattribute__(name)

    def set_tracking_uri(self, uri):
        self.uri = uri

    def set_experiment(self, name):
        self.experiment = name

    def start_run(self, run_id=None, run_name=None):
        self.runs.append((run_id, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "id-1"))

    def log_params(self, params):
        self.params.update(params)

    def log_metrics(self, metrics, step):
        assert all(type(value) is float for value in metrics.values())
        self.metrics.append((step, metrics))

    def log_artifact(self, path):
        self.artifacts.append(Path(path).name)

    def end_run(self):
        self.ended += 1


@pytest.fixture
def mlflow(monkeypatch):
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return fake


def test_mlflow_gets_the_configuration_each_row_the_picture_and_the_checkpoint(mlflow, pyplot):
    assert start("run", "--steps 4 --log_every 1 --eval_every 2 --track mlflow") == 0
    saved = checkpoint.read("run/last.pt")
    assert mlflow.params == {**saved["train_config"], **saved["config"]}
    assert mlflow.runs == [(None, "run")] and mlflow.ended == 1
    assert mlflow.uri == Path("mlruns").resolve().as_uri()
    assert mlflow.artifacts == ["log.csv", "load.csv", "loss.png", "best.pt"]
    rows = all_rows_of("run/log.csv")
    assert [step for step, _ in mlflow.metrics] == [int(row["step"]) for row in rows]
    for (_, metrics), row in zip(mlflow.metrics, rows, strict=True):
        logged = {name: float(value) for name, value in row.items() if value and name != "step"}
        assert metrics == pytest.approx(logged, rel=1e-4)


def test_a_resumed_run_goes_on_in_the_same_run_of_mlflow(mlflow):
    with at_training_step(2, press_ctrl_c):
        start("run", "--steps 4 --log_every 1 --track mlflow")
    mlflow.params.clear()
    assert call(train, "--resume", "--out", "run") == 0
    assert mlflow.runs == [(None, "run"), ("id-1", "run")] and mlflow.params == {}
    assert [step for step, _ in mlflow.metrics] == [0, 1, 2, 3, 4]


def test_an_address_of_ones_own_is_left_alone(mlflow, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://here")
    assert start("run", "--steps 1 --track mlflow") == 0
    assert mlflow.uri is None


@pytest.mark.parametrize("missing", [True, False])
def test_without_mlflow_or_its_store_nothing_is_trained(missing, mlflow, monkeypatch, capsys):
    mlflow.fails = ("start_run",)
    if missing:
        monkeypatch.setitem(sys.modules, "mlflow", None)
    with mock.patch.object(train, "train", side_effect=AssertionError("it trained")):
        assert start("run", "--steps 1 --track mlflow") == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "mlflow" in message
    assert ("[track]" if missing else "no store") in message
    assert not Path("run").exists(), "the next try would be refused"


@pytest.mark.parametrize("failing", ["log_metrics", "log_artifact", "end_run"])
def test_a_store_that_fails_later_costs_the_run_nothing(failing, mlflow, capsys):
    assert start("plain", "--steps 4 --log_every 1") == 0
    mlflow.fails = (failing,)
    capsys.readouterr()
    assert start("run", "--steps 4 --log_every 1 --track mlflow") == 0
    printed = capsys.readouterr().out
    assert printed.count("going on without it") == 1 and "no store" in printed
    losses = [[row["train_loss"] for row in rows_of(f"{run}/log.csv")] for run in ("plain", "run")]
    assert losses[0] == losses[1]


def test_another_tracker_is_refused(capsys):
    assert start("run", "--track wandb") == 2
    assert "track='wandb' is unknown" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# A CPU that others use as well
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environment, rounds",
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
@pytest.mark.parametrize("program", ["train", "sample"])
def test_threads_hardly_spin_unless_the_user_says_so(program, environment, rounds):
    """libgomp reads it once, when torch is imported: so it is set before."""
    code = (
        "import os, sys; from importlib.abc import MetaPathFinder\n"
        "class Look(MetaPathFinder):\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'torch':\n"
        "            print(os.environ.get('GOMP_SPINCOUNT'), flush=True), os._exit(0)\n"
        f"sys.meta_path.insert(0, Look()); import {program}"
    )
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", code]
    run = subprocess.run(
        command, env={**clean, **environment}, cwd=ROOT, capture_output=True, text=True
    )
    assert run.stdout.strip() == str(rounds), run.stderr


def test_a_fall_of_the_speed_is_said_once_with_a_remedy(capsys):
    """Rows at 1,000 tokens per second, then twice at 100, as another program takes the CPU."""
    model = random_model(small_config())
    run = SimpleNamespace(settings=SimpleNamespace(device="cpu"), folder="runs/x", model=model)
    speeds, best = [1000.0, 100.0, 100.0, 1000.0, 240.0], 0.0
    for speed in speeds:
        best = log.warn_of_slowness(speed, best, run)
    out = capsys.readouterr().out
    assert out.count("slow ") == 2 and "--resume --out runs/x" in out and "OMP_NUM_THREADS" in out


def test_the_number_format_of_a_cpu_is_not_left_to_chance(monkeypatch):
    """A race between formats would go one way or the other on a busy machine."""
    for has_it, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has_it=has_it: has_it)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert machine.pick_dtype("auto", "cpu") == expected
    assert machine.pick_dtype("fp32", "cuda") == "fp32"


def test_config_json_has_every_setting_also_those_that_nobody_gave(capsys):
    start("run", "--steps 2 --lr 0.01 --muon_ffn")
    written = json.loads(Path("run/config.json").read_text())
    saved = checkpoint.read("run/last.pt")
    assert written == {**saved["train_config"], **saved["config"]}
    assert (written["lr"], written["top_k"]) == (0.01, saved["config"]["top_k"])
    assert "on attention and experts, AdamW 0.01" in capsys.readouterr().out
