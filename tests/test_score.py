"""sample.py --score: the number that training would log if a text were its validation text."""

import csv
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import import_oracle, random_model, small_config
from test_interchange import byte_level, save_foreign, sentencepiece
from test_sample import BYTES, run, save_model
from tiny_run import TINY, call, make_text

import sample
import train
from bpe import SPECIAL
from data import datasets
from data.exchange import export, load
from data.run.checkpoint import read


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # a run without pictures, in less time
    return tmp_path


def scored(capsys, *arguments):
    """{unit: number} of the line that is printed."""
    line = run(capsys, "--score", *arguments)
    assert line.count("\n") == 1
    found = re.findall(r"([\d.,]+) (tokens|bytes|nats/token|nats/byte|bits/byte)", line)
    return {unit: float(number.replace(",", "")) for number, unit in found}


def test_the_score_of_the_validation_text_is_the_one_in_the_log(capsys):
    documents = [make_text(60, seed) for seed in range(30)]
    Path("text.txt").write_text(f"\n{SPECIAL}\n".join(documents), encoding="utf-8")
    flags = "--data text.txt --out run --steps 20 --eval_every 10".split()
    assert call(train, *flags, *TINY) == 0
    with open("run/log.csv", encoding="utf-8") as file:
        row = [row for row in csv.DictReader(file) if row["val_loss"]][-1]
    held_out = [*datasets.read("text.txt").val]
    assert len(held_out) > 1
    Path("val.txt").write_text(f"\n{SPECIAL}\n".join(held_out), encoding="utf-8")
    capsys.readouterr()
    score = scored(capsys, "val.txt", "--model", "run/last.pt", "--dtype", "fp32")
    assert score["bits/byte"] == pytest.approx(float(row["val_bits_per_byte"]), abs=1e-4)
    assert score["nats/token"] == pytest.approx(float(row["val_loss"]), abs=1e-4)
    n_bytes = sum(len(text.encode()) + len(SPECIAL) for text in held_out)
    assert score["bytes"] == n_bytes


def test_the_score_of_a_line_is_its_probability(capsys):
    save_model("model.pt")
    Path("line.txt").write_text("Once, été", encoding="utf-8")
    model, tokenizer = load("model.pt")
    ids = [tokenizer.eot, *tokenizer.encode("Once, été"), tokenizer.eot]
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    nats = -sum(logs[t, i].item() for t, i in enumerate(ids[1:]))
    score = scored(capsys, "line.txt", "--model", "model.pt", "--dtype", "fp32")
    n_bytes = len("Once, été".encode()) + len(SPECIAL)
    assert score["bytes"] == n_bytes and score["tokens"] == len(ids) - 1
    assert score["nats/byte"] == pytest.approx(nats / n_bytes, abs=1e-4)
    assert score["bits/byte"] == pytest.approx(nats / n_bytes / math.log(2), abs=1e-4)
    assert score["nats/token"] == pytest.approx(nats / (len(ids) - 1), abs=1e-4)


@pytest.mark.oracle
def test_a_folder_scores_as_its_checkpoint(capsys):
    import_oracle("safetensors")
    model = random_model(small_config(vocab_size=257, seq_len=32, n_shared_experts=1, qk_norm=True))
    export(model, BYTES, "folder")
    parts = {"config": vars(model.config), "model": model.state_dict()}
    torch.save({**parts, "tokenizer": BYTES.state()}, "model.pt")
    assert read("model.pt")
    Path("text.txt").write_text(make_text(200), encoding="utf-8")
    scores = [scored(capsys, "text.txt", "--model", name) for name in ("model.pt", "folder")]
    assert scores[0] == scores[1] and scores[0]["bits/byte"] > 1


def test_mistakes_end_in_one_line(capsys):
    save_model("model.pt")
    Path("empty.txt").write_text("\n\n")
    Path("latin.txt").write_bytes("été".encode("latin-1"))
    for arguments, words in (
        (["--score", "nowhere.txt"], ["nowhere.txt", "no such file"]),
        (["--score", "empty.txt"], ["empty.txt is empty"]),
        (["--score", "latin.txt"], ["latin.txt", "UTF-8"]),
        (["Once", "--score", "latin.txt"], ["--score"]),
        (["--text", "latin.txt", "--score", "latin.txt"], ["--score"]),
        (["--score", ""], ["no such file"]),
    ):
        assert call(sample, *arguments, "--model", "model.pt") == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and all(word in message for word in words), message


@pytest.mark.oracle
@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_a_foreign_tokenizer_begins_a_document_as_it_does_a_prompt(make, capsys):
    config = small_config(vocab_size=500, seq_len=64)
    model = random_model(config)
    export(model, None, "folder")
    save_foreign(make, Path("folder"))
    tokenizer, text = load("folder")[1], "the old cat"
    Path("line.txt").write_text(text, encoding="utf-8")
    ids = [*tokenizer.start, *tokenizer.encode(text), tokenizer.eot]
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    nats = -sum(logs[t, i].item() for t, i in enumerate(ids[1:]))
    score = scored(capsys, "line.txt", "--model", "folder", "--dtype", "fp32")
    assert score["tokens"] == len(ids) - 1 and score["bytes"] == len(text) + len(SPECIAL)
    assert score["nats/byte"] == pytest.approx(nats / score["bytes"], abs=1e-4)
