"""Each mistake gets one line that names cause and remedy, exit code 2, and no traceback.

One table: a command line, and the words its message must hold: what is wrong, then what to do.
"""

import dataclasses
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import random_model, small_config
from tiny_run import TINY, call, make_text

import bpe
import sample
import train
from bpe import Tokenizer
from data import datasets
from data.run import checkpoint, storage

ROOT = Path(train.__file__).parent
PROGRAMS = {"train.py": train, "sample.py": sample}
BOOK = "train.py --data book.txt"
HELLO = "sample.py Hello --model good.pt"

# The files are made by `make_texts` and `make_checkpoints` below.
TABLE = {
    # -- what argparse sees
    f"{BOOK} --lerning_rate 1": ["--lerning_rate", "--help"],
    f"{BOOK} --lea 1": ["--lea", "--help"],
    f"{BOOK} another.txt": ["another.txt", "--help"],
    f"{BOOK} --steps ten": ["--steps", "'ten'", "int", "--help"],
    f"{BOOK} --steps 1.5": ["--steps", "'1.5'", "int", "--help"],
    f"{BOOK} --lr high": ["--lr", "'high'", "float", "--help"],
    f"{BOOK} --lr": ["--lr", "--help"],
    "sample.py Hello world": ["world", "--help"],
    f"{HELLO} --temprature 1": ["--temprature", "--help"],
    # -- the text
    "train.py --data nowhere.txt": ["nowhere.txt", "no such file", "--data stories"],
    "train.py --data storys": ["storys", "no such", "--data stories"],
    "train.py --data empty.txt": ["empty is empty", "name a file"],
    "train.py --data blank.txt": ["blank is empty", "name a file"],
    "train.py --data short.txt": ["short.txt", "too short", "--seq_len"],
    "train.py --data tiny.txt": ["tiny.txt", "too short", "more text"],
    "train.py --data binary.txt": ["binary.txt", "not text", "plain text"],
    "train.py --data image.png": ["image.png", "an image", "name a file of text"],
    "train.py --data latin.txt": ["latin.txt", "not UTF-8", "byte 3 is 0xe9", "iconv"],
    "train.py --data shelf": ["shelf", "no file of UTF-8 text", "put text there"],
    "train.py --data mixed/bad.txt": ["bad.txt", "not UTF-8", "byte 3 is 0xe9", "iconv"],
    "train.py --data wide.txt": ["wide.txt", "UTF-16", "iconv -f utf-16"],
    "train.py --data damaged.zip": ["damaged.zip", "no whole zip", "fetch it again"],
    "train.py --data table.csv --text_column body": ["table.csv", "'body'", "id, text"],
    "train.py --data lines.jsonl": ["lines.jsonl", "line 2", "JSON"],
    "train.py --data wiki": ["wiki", "not here yet", "python data/datasets.py wiki"],
    "train.py --data book.txt,nowhere": ["nowhere", "no such", "--data stories"],
    "train.py --data book.txt,": ["name of --data is empty", "give a path"],
    "train.py --data https://a.org/b.txt": ["not on this machine", "fetch it"],
    "train.py --data archive.tar": ["archive.tar", "a tar archive", "tar -xf archive.tar"],
    "train.py --data broken": ["broken/a b.txt", "not UTF-8", "iconv"],
    f"{BOOK} --track wandb": ["track='wandb'", "mlflow"],
    "train.py --plot nowhere": ["matplotlib", "pip install"],
    f"{BOOK} --seq_len 5000": ["book.txt", "too short", "5000", "--seq_len"],
    # -- the model
    f"{BOOK} --dim 18 --n_heads 4": ["dim=18", "n_heads=4", "try dim=16"],
    f"{BOOK} --n_heads 4 --n_kv_heads 3": ["n_heads=4", "n_kv_heads=3", "[1, 2, 4]"],
    f"{BOOK} --top_k 4": ["top_k=4", "n_experts=3", "try top_k=3"],
    f"{BOOK} --router magic": ["magic", "unknown", "topk"],
    f"{BOOK} --head_dim 5": ["head_dim=5", "even", "try head_dim="],
    f"{BOOK} --head_dim 0": ["head_dim=0", "must be"],
    f"{BOOK} --head_dim -2": ["head_dim=-2", "must be"],
    f"{BOOK} --n_layers 0": ["n_layers=0", "at least 1"],
    f"{BOOK} --dim -16": ["dim=-16", "at least 1"],
    f"{BOOK} --n_experts 0": ["n_experts=0", "at least 1"],
    f"{BOOK} --seq_len 0": ["seq_len=0", "at least 1"],
    f"{BOOK} --seq_len -3": ["seq_len=-3", "at least 1"],
    f"{BOOK} --tokenizer bpe --vocab_size 256": ["vocab_size=256", "too small", "257"],
    f"{BOOK} --tokenizer bpe --vocab_size -1": ["vocab_size=-1"],
    f"{BOOK} --rope_theta 0": ["rope_theta=0", "must be"],
    f"{BOOK} --norm_eps -1": ["norm_eps=-1", "must be"],
    f"{BOOK} --balance_weight nan": ["balance_weight=nan", "must be"],
    f"{BOOK} --z_weight -1": ["z_weight=-1", "must be"],
    f"{BOOK} --dim 4000000000000": ["memory", "--dim"],  # more than any address space
    # -- the training
    f"{BOOK} --preset huge": ["huge", "gpu", "laptop"],
    f"{BOOK} --device tpu": ["tpu", "--device"],
    f"{BOOK} --tokenizer words": ["words", "bpe", "bytes"],
    f"{BOOK} --dtype fp16": ["fp16", "bf16", "fp32"],
    f"{BOOK} --steps -5": ["steps=-5", "must be"],
    f"{BOOK} --batch_size 0": ["batch_size=0", "must be"],
    f"{BOOK} --batch_size -4": ["batch_size=-4", "must be"],
    f"{BOOK} --grad_accum 0": ["grad_accum=0", "must be"],
    f"{BOOK} --log_every 0": ["log_every=0", "must be"],
    f"{BOOK} --log_every -1": ["log_every=-1", "must be"],
    f"{BOOK} --eval_every -1": ["eval_every=-1", "must be"],
    f"{BOOK} --save_every -1": ["save_every=-1", "must be"],
    f"{BOOK} --lr -1": ["lr=-1", "must be"],
    f"{BOOK} --lr nan": ["lr=nan", "must be"],
    f"{BOOK} --muon_lr -1": ["muon_lr=-1", "must be"],
    f"{BOOK} --weight_decay -1": ["weight_decay=-1", "must be"],
    f"{BOOK} --warmup 2": ["warmup=2", "must be"],
    f"{BOOK} --warmup -1": ["warmup=-1", "must be"],
    f"{BOOK} --clip 0": ["clip=0", "must be"],
    f"{BOOK} --clip -1": ["clip=-1", "must be"],
    f"{BOOK} --seed -1": ["seed=-1", "must be"],
    f"{BOOK} --seed 99999999999999999999999": ["seed", "99999999999999999999999"],
    # -- the folder
    f"{BOOK} --out used": ["used already holds a run", "--resume --out used", "another --out"],
    f"{BOOK} --out book.txt": ["book.txt", "another --out"],
    f"{BOOK} --out book.txt/run": ["book.txt/run", "--out"],
    "train.py --resume": ["no run", "python train.py"],
    "train.py --resume --out nowhere": ["nowhere", "no such run", "--out nowhere"],
    "train.py --resume --out book.txt": ["book.txt", "no such run", "python train.py"],
    # -- sample.py
    "sample.py Hello": ["no model", "python train.py"],
    "sample.py": ["no model", "python train.py"],
    "sample.py Hello --model nowhere.pt": ["nowhere.pt", "no such file", "python train.py"],
    "sample.py Hello --model used": ["used", "checkpoint"],
    "sample.py Hello --model book.txt": ["book.txt", "not a readable checkpoint", "another"],
    "sample.py Hello --model damaged.pt": ["damaged.pt", "not a readable checkpoint", "another"],
    "sample.py Hello --model empty.txt": ["empty.txt", "not a readable checkpoint", "another"],
    "sample.py Hello --model code.pt": ["code.pt", "not a readable checkpoint", "another"],
    "sample.py Hello --model list.pt": ["list.pt", "not a LaMoE checkpoint", "train.py"],
    "sample.py Hello --model other.pt": ["other.pt", "not a LaMoE checkpoint", "train.py"],
    "sample.py Hello --model field.pt": ["field.pt", "does not fit", "wings"],
    "sample.py Hello --model shape.pt": ["shape.pt", "does not fit", "size mismatch"],
    "sample.py Hello --model value.pt": ["value.pt", "dim=15"],
    "sample.py Hello --model mismatch.pt": [
        "mismatch.pt",
        "tokenizer",
        "257",
        "260",
        "one training",
    ],
    "sample.py Hello --model merges.pt": ["merges.pt", "tokenizer"],
    "sample.py Hello --model pattern.pt": ["pattern.pt", "tokenizer", "pattern"],
    "sample.py Hello --model untokenized.pt": ["untokenized.pt", "no tokenizer", "train.py"],
    f"{HELLO} --temperature -1": ["--temperature", "-1", "0 or more"],
    f"{HELLO} --temperature nan": ["--temperature", "nan", "0 or more"],
    f"{HELLO} --temperature hot": ["--temperature", "'hot'", "float"],
    f"{HELLO} --top_p 1.5": ["--top_p", "1.5", "at most 1"],
    f"{HELLO} --top_p 0": ["--top_p", "0", "above 0"],
    f"{HELLO} --top_p most": ["--top_p", "'most'", "float"],
    f"{HELLO} --min_p -1": ["--min_p", "-1", "0"],
    f"{HELLO} --top_k 0": ["--top_k", "0", "above 0"],
    f"{HELLO} --top_k few": ["--top_k", "'few'", "int"],
    f"{HELLO} --max_new_tokens 0": ["--max_new_tokens", "0", "above 0"],
    f"{HELLO} --repetition_penalty 0": ["--repetition_penalty", "0 must", "from 0.01"],
    f"{HELLO} -n 0": ["-n", "0", "above 0"],
    f"{HELLO} -n 100000000": ["-n", "100000000", "at most 1024"],
    f"{HELLO} --stop ''": ["--stop", "at least one character"],
    f"{HELLO} --text book.txt": ["--text", "give one of these"],
    f"{HELLO} --layer -1": ["--layer", "-1", "0 or more"],
    f"{HELLO} --layer 9": ["--layer 9", "no experts", "from 0 to 1"],
    f"{HELLO} --html book.txt": ["book.txt", "no page of sample.py", "another name"],
    f"{HELLO} --html shelf": ["shelf", "no page of sample.py", "another name"],
    f"{HELLO} --html nowhere/page.html": ["no folder nowhere", "make it first"],
    "sample.py --text nowhere.txt --model good.pt": ["nowhere.txt", "no such file", "text file"],
    "sample.py --text shelf --model good.pt": ["shelf", "no such file", "text file"],
    "sample.py --text empty.txt --model good.pt": ["empty.txt", "empty", "name a file"],
    "sample.py --text latin.txt --model good.pt": ["latin.txt", "not UTF-8", "byte 3", "iconv"],
    "sample.py -hello --model good.pt": ["begins with a dash", '-- "-x"'],
    "sample.py -nope --model good.pt": ["begins with a dash", '-- "-x"'],
    f"{HELLO} --seed now": ["--seed", "'now'", "int"],
    f"{HELLO} --seed 99999999999999999999999": ["seed", "99999999999999999999999"],
    f"{HELLO} --device tpu": ["--device", "'tpu'", "cpu"],
    f"sample.py {'long' * 20} --model good.pt": ["80 tokens", "shorten it to 14"],
}
if not torch.cuda.is_available():
    TABLE |= {
        f"{BOOK} --device cuda": ["'cuda'", "not available", "--device cpu"],
        f"{HELLO} --device cuda": ["cuda", "not available", "--device cpu"],
    }
if not torch.backends.mps.is_available():
    TABLE |= {
        f"{BOOK} --device mps": ["'mps'", "not available", "--device cpu"],
        f"{HELLO} --device mps": ["mps", "not available", "--device cpu"],
    }
if hasattr(os, "geteuid") and os.geteuid() != 0:  # root may write and read anything
    TABLE |= {
        f"{BOOK} --out sealed/run": ["sealed/run", "--out"],
        "train.py --data secret.txt": ["secret.txt", "Permission"],
    }


class Code:
    """What a checkpoint must never be able to run."""

    def __reduce__(self):
        return os._exit, (99,)


def make_checkpoints():
    model = random_model(small_config(vocab_size=257))
    config, state = dataclasses.asdict(model.config), model.state_dict()
    good = {"config": config, "model": state, "tokenizer": Tokenizer([]).state()}
    merges = {**good["tokenizer"], "merges": [[97, 98], [98, 99], [99, 100]]}
    checkpoint.save("good.pt", good)
    checkpoint.save("list.pt", [1, 2, 3])
    checkpoint.save("other.pt", {"state_dict": state, "epoch": 3})
    checkpoint.save("field.pt", {**good, "config": {**config, "wings": 2}})
    checkpoint.save("shape.pt", {**good, "config": {**config, "hidden_dim": 13}})
    checkpoint.save("value.pt", {**good, "config": {**config, "dim": 15}})
    checkpoint.save("mismatch.pt", {**good, "tokenizer": merges})
    checkpoint.save("merges.pt", {**good, "tokenizer": {**merges, "merges": [[97, 900]]}})
    checkpoint.save("pattern.pt", {**good, "tokenizer": {**merges, "pattern": "."}})
    checkpoint.save("untokenized.pt", {"config": config, "model": state})
    torch.save({"config": config, "model": Code()}, "code.pt")
    whole = Path("good.pt").read_bytes()
    Path("damaged.pt").write_bytes(whole[: len(whole) // 2])


def make_texts():
    for folder in ("shelf", "mixed", "used", "sealed", "broken"):
        Path(folder).mkdir()
    latin = "caf\xe9".encode("latin-1")
    files = {
        "book.txt": make_text(300).encode(),
        "empty.txt": b"",
        "blank.txt": b" \n\r\n\t",
        "short.txt": b"only a hundred bytes " * 5,
        "tiny.txt": b"x",
        "binary.txt": b"text\0text" * 100,
        "image.png": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
        "latin.txt": latin * 100,
        "wide.txt": ("some text " * 100).encode("utf-16"),
        "damaged.zip": b"PK\3\4" + bytes(100),
        "table.csv": b"id,text\n1,x\n",
        "lines.jsonl": b'{"text": "x"}\nnot json\n',
        "archive.tar": b"a.txt".ljust(257, b"\0") + b"ustar" + bytes(99),
        "broken/a\nb.txt" if os.name == "posix" else "broken/a b.txt": latin * 100,
        "shelf/picture.jpg": b"\xff\xd8\xff\xe0 not a text",
        "mixed/bad.txt": latin * 100,
        "mixed/good.txt": b"good " * 100,
        "used/log.csv": b"step\n",
        "secret.txt": b"text",
    }
    for name, content in files.items():
        Path(name).write_bytes(content)
    Path("secret.txt").chmod(0)
    Path("sealed").chmod(0o500)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The mistakes, made once: no command of the table may change them."""
    path = tmp_path_factory.mktemp("mistakes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        make_texts()
        make_checkpoints()
    yield path
    (path / "sealed").chmod(0o700)


@pytest.fixture
def workplace(folder, monkeypatch):
    """The folder, for ten seconds at most: --seq_len 0 once made windows without end."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(datasets, "SETS", folder / "sets")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    if os.name != "posix":
        yield
        return
    handler = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)


def give_up(number, frame):
    raise AssertionError("it still runs after ten seconds")


def everything():
    return sorted(str(path) for path in Path().rglob("*"))


def split_command(line):
    """The program, and its arguments; a training is made tiny in case it starts after all."""
    program, *arguments = shlex.split(line)
    resuming = "--resume" in arguments
    tiny = [*TINY, "--steps", "2"] if program == "train.py" and not resuming else []
    return program, [*tiny, *arguments]


@pytest.mark.parametrize("line", TABLE)
def test_each_mistake_gets_one_line_with_cause_and_remedy(line, workplace, capsys):
    """And leaves nothing behind: else the next run is book-2, and --resume finds an empty one."""
    program, arguments = split_command(line)
    before = everything()
    code = call(PROGRAMS[program], *arguments)
    message, after = capsys.readouterr().err, everything()
    shutil.rmtree("runs", ignore_errors=True)  # of a command that went through: not for the next
    assert code == 2, f"exit code {code}"
    assert message.startswith("error: ")
    assert message.count("\n") == 1 and message.endswith("\n"), f"not one line: {message}"
    assert [word for word in TABLE[line] if word not in message] == [], message
    assert after == before


@pytest.mark.parametrize(
    "program, words",
    [
        (train, []),
        (sample, ["a"]),
        (bpe, ["a"]),
        (import_module("data.exchange.export"), ["a", "b"]),
        (datasets, ["bbc"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_arguments_with_line_breaks_are_told_in_one_line_too(program, words, workplace, capsys):
    assert call(program, *words, "c\nd") == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "c d" in message, message


@pytest.mark.parametrize(
    "line",
    [f"{BOOK} --dim 18 --n_heads 4", "sample.py Hello --model damaged.pt"],
)
def test_from_a_shell_too(line, workplace):
    program, arguments = split_command(line)
    command = [sys.executable, ROOT / program, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in TABLE[line])


# ---------------------------------------------------------------------------------------------
# The remedy works
# ---------------------------------------------------------------------------------------------


def with_flag(words, flag, value):
    """The words with that value of a flag, instead of what it had."""
    if flag not in words:
        return [*words, flag, str(value)]
    at = words.index(flag) + 1
    has_value = at < len(words) and not re.match("--[a-z]", words[at])
    return [*words[:at], str(value), *words[at + has_value :]]


def nearest(least, most, value):
    """What is allowed and nearest to what was asked for."""
    if value == value and float(least) <= value <= float(most):
        return value
    return most if value > float(least) and most != "inf" else least


# What a message says, and what a person would do then, who reads no more than it.
RULES = {
    r"; try (\w+)=(\w+)": lambda w, flag, value: with_flag(w, f"--{flag}", value),
    r"try (\w+) from \[(\d+)": lambda w, flag, value: with_flag(w, f"--{flag}", value),
    r"(\w+)=\S+ must be at least (\d+)": lambda w, flag, n: with_flag(w, f"--{flag}", n),
    r"(\w+)=(\S+) must be from (\S+) to (\S+)": lambda w, flag, value, least, most: with_flag(
        w, f"--{flag}", nearest(least, most, float(value))
    ),
    r"(\w+)=\S+ must be a number from 0": lambda w, flag: with_flag(w, f"--{flag}", 0.5),
    r"(\w+)=\S+ is unknown; try one of [\[(]'(\w*)'": lambda w, flag, name: with_flag(
        w, f"--{flag}", name
    ),
    r"(\w+)=\S+ is too small.*use (\d+) or more": lambda w, flag, n: with_flag(w, f"--{flag}", n),
    r"unrecognized arguments: (.*); see": lambda w, more: [x for x in w if x not in more.split()],
    r"argument (-+\w+): (?:.*invalid (?:int|float)|\S+ is no|\S+ must be.*above)": (
        lambda w, flag: with_flag(w, flag, 1)
    ),
    r"argument (-+\w+): \S+ must be (?:from )?(\d)": with_flag,
    r"argument (-+\w+): \S+ must be at least one character": (
        lambda w, flag: with_flag(w, flag, "x")
    ),
    r"argument (-+\w+): \S+ must be above 0": lambda w, flag: with_flag(w, flag, 1),
    r"argument (-+\w+): expected one argument": lambda w, flag: with_flag(w, flag, 1),
    r"argument (-+\w+): invalid choice.*choose from '?auto'?, '?(\w+)": with_flag,
    r"try (--device) (\w+)": with_flag,
    r"a (--seq_len) of ([1-9]\d+) or less": with_flag,
    r"shorten it to (\d+)": lambda w, n: [w[0][: int(n)], *w[1:]],
    r"give one from (\d+) to": lambda w, n: with_flag(w, "--layer", n),
    r"another name|make it first": lambda w: with_flag(w, "--html", "page.html"),
    r"another --out": lambda w: with_flag(w, "--out", "another"),
    r"give one of these": lambda w: w[1:],
    r"try --data stories|use it alone": lambda w: with_flag(w, "--data", "stories"),
    r"columns?.* id, text": lambda w: with_flag(w, "--text_column", "text"),
    r"a prompt that begins with a dash": lambda w: [*w[1:], "--", w[0]],
}


def follow(program, words, message):
    """(program, words) after doing what the message says; None if none of the rules reads it."""
    if iconv := re.search(r"iconv -f (\S+) -t utf-8 (\S+) > utf8.txt", message):
        found = next(Path().rglob(Path(iconv[2]).name)).read_bytes()
        content = found.decode(iconv[1], "replace").replace("\0", "")
        Path("utf8.txt").write_text(content, encoding="utf-8")
        return program, with_flag(
            words, "--data" if program == "train.py" else "--text", "utf8.txt"
        )
    for rule, act in RULES.items():
        if found := re.search(rule, message):
            return program, act(words, *found.groups())
    if re.search("more text|name (a|another) file|name a (plain|UTF-8) text file", message):
        name = "--data" if program == "train.py" else "--text"
        return program, with_flag(words, name, "book.txt")
    if re.search("train again|another training|python train.py", message):
        return "train.py", ["--data", "book.txt", "--out", "another"]
    return None


def stop_at_once(run, stop, training=train.train):
    stop.append(signal.SIGINT)
    training(run, stop)


def obey(line, capsys):
    """Whether the command of a mistake works after what its messages say, three of them at most."""
    program, *words = shlex.split(line)
    for _ in range(4):
        tiny = [*TINY, "--steps", "2"] if program == "train.py" else []
        code, message = call(PROGRAMS[program], *tiny, *words), capsys.readouterr().err
        if code in (0, 130):
            return True
        if not (done := follow(program, words, message)):
            return False
        program, words = done
    return False


def test_a_preset_for_gpus_runs_on_a_cpu(workplace, capsys):
    assert (
        call(train, "--data", "book.txt", *TINY, *"--preset gpu --steps 1 --out gpu".split()) == 0
    )
    shutil.rmtree("gpu")
    assert "not compiled" in capsys.readouterr().out


def test_the_remedies_of_more_than_sixty_mistakes_work(folder, monkeypatch, capsys):
    """Told by the words of the messages alone."""
    monkeypatch.chdir(folder)
    write, small = datasets.stories.write, {"train_bytes": 20_000, "val_bytes": 3_000}
    monkeypatch.setattr(datasets.stories, "write", lambda cache: write(cache, **small))
    monkeypatch.setattr(datasets, "SETS", folder / "sets")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(train, "train", stop_at_once)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # faster
    monkeypatch.setattr("sys.stdin", io.StringIO("exit\n"))
    there, mended = set(Path().iterdir()), []
    for line in TABLE:
        mended += [line] * obey(line, capsys)
        for path in set(Path().iterdir()) - there:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert len(mended) > 110, sorted(TABLE.keys() - set(mended))


def test_the_name_of_a_run_is_no_longer_than_a_file_may_have(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = storage.new_folder({"data": ",".join(f"part-{n}.txt" for n in range(99))})
    assert len(folder.name) < 80


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes that have names")
def test_a_pipe_is_told_from_a_file_that_is_not_there_or_empty(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    os.mkfifo("pipe")
    try:
        for program, *line in (
            (train, "--data", "pipe", *TINY),
            (sample, "--text", "pipe", "--model", "good.pt"),
            (sample, "--score", "pipe", "--model", "good.pt"),
        ):
            assert call(program, *line) == 2
            told = (
                "error: pipe is a pipe or device, to be read once only; save its text in a file\n"
            )
            assert capsys.readouterr().err == told
    finally:
        os.unlink("pipe")
