"""Text comes as it is drawn, whole characters only, and the same seed gives the same text."""

import dataclasses
import io
import os
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import random_model, small_config
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import call

import lamoe
import sample
from bpe import Tokenizer
from data.exchange import load
from data.run import checkpoint

BYTES = Tokenizer([])


def save_model(path, seed=0, seq_len=64):
    """A checkpoint with random weights; a byte is a token."""
    model = random_model(small_config(vocab_size=257, seq_len=seq_len), seed)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    config, state = dataclasses.asdict(model.config), model.state_dict()
    checkpoint.save(path, {"config": config, "model": state, "tokenizer": BYTES.state()})


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model("model.pt")
    return tmp_path


def run(capsys, *arguments):
    """What is written to stdout."""
    assert call(sample, *arguments) == 0
    return capsys.readouterr().out


class Writes(io.StringIO):
    """A stdout that remembers each write."""

    def __init__(self):
        super().__init__()
        self.pieces = []

    def reconfigure(self, **options):
        """Every real stdout has it; this one takes any text as it is."""

    def write(self, text):
        self.pieces.append(text)
        return super().write(text)


def stream(text, *arguments, ends=True, seq_len=10_000):
    """(what each write brought, everything) if the model says `text`, a byte a time."""
    ids = [*text.encode(), *([BYTES.eot] if ends else [])] if isinstance(text, str) else text

    def generate(ids_BT, max_new_tokens, *args, **kwargs):
        for i in ids[: min(max_new_tokens, seq_len - ids_BT.shape[1])]:
            yield torch.tensor([i])

    model = SimpleNamespace(config=SimpleNamespace(seq_len=seq_len), generate=generate)
    with (
        mock.patch.object(sample, "load", lambda *args: (model, BYTES)),
        mock.patch.object(sys, "stdout", Writes()) as out,
        mock.patch.object(sys, "stderr", io.StringIO()),
    ):
        assert call(sample, "> ", "--model", "x", *arguments) == 0
    return out.pieces, out.getvalue().removeprefix("> ").removesuffix("\n")


# ---------------------------------------------------------------------------------------------
# Seeds
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    ["", "--temperature 1.5", "--top_k 5", "--top_p 0.9", "--repetition_penalty 1.3", "-n 2"],
)
def test_the_same_seed_gives_the_same_text_and_another_another(flags, capsys):
    command = ["Hello", "--model", "model.pt", "--max_new_tokens", 30, *flags.split()]
    first, again, other = (run(capsys, *command, "--seed", seed) for seed in (7, 7, 8))
    assert first == again != other


def test_without_a_seed_each_text_is_another(capsys):
    assert len({run(capsys, "Hello", "--model", "model.pt") for _ in range(3)}) == 3


def test_temperature_0_needs_no_seed(capsys):
    command = ["Hello", "--model", "model.pt", "--temperature", "0"]
    assert run(capsys, *command) == run(capsys, *command)


def test_the_filters_can_be_switched_off(capsys):
    command = ["Hello", "--model", "model.pt", "--max_new_tokens", 30, "--seed", 3]
    assert run(capsys, *command, "--min_p", 0) != run(capsys, *command, "--min_p", 0.5)


def test_the_text_is_what_generate_draws_after_endoftext_and_the_prompt(capsys):
    text = run(capsys, "Hé", "--model", "model.pt", "--seed", 3, "--max_new_tokens", 20)
    model, tokenizer = load("model.pt")
    ids = torch.tensor([[tokenizer.eot, *"Hé".encode()]])
    generator = torch.Generator().manual_seed(3)
    drawn = model.generate(ids, 20, 0.8, min_p=0.02, stop=tokenizer.eot, generator=generator)
    new = [i.item() for i in drawn]
    expected = bytes(i for i in new if i != tokenizer.eot).decode("utf-8", "replace")
    assert text.rstrip("\ufffd\n") == ("Hé" + expected).rstrip("\ufffd\n")


# ---------------------------------------------------------------------------------------------
# The stream
# ---------------------------------------------------------------------------------------------


@given(st.text("aé😀\n한\u0301", max_size=12))
def test_no_write_ever_holds_half_a_character(text):
    pieces, printed = stream(text)
    assert printed == text
    assert not any("\ufffd" in piece for piece in pieces)
    shown = [piece for piece in pieces if piece][1:]  # after the prompt
    assert len(shown) >= len(text), "characters appear one by one, not at the end"


def test_half_a_character_at_the_end_is_not_printed():
    for n in (3, 4, 5):
        _, printed = stream("ab😀", "--max_new_tokens", n)
        assert printed == "ab"
    assert stream("ab😀", "--max_new_tokens", 6)[1] == "ab😀"


def test_bytes_that_are_no_character_are_shown_as_such():
    assert stream([97, 0xFF, 98, BYTES.eot])[1] == "a\ufffdb"


@given(st.text("ab", max_size=12), st.text("ab", min_size=1, max_size=4))
def test_the_stop_text_is_cut_and_its_beginnings_are_held_back(text, stop):
    pieces, printed = stream(text, "--stop", stop)
    assert printed == text.partition(stop)[0]
    assert "".join(pieces) == f"> {printed}\n"  # nothing printed is ever taken back


def cut_at_first_stop(text, stops):
    """The text before the stop text that is complete first; of two that end together the longer."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=6),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_the_first_of_several_stop_texts_cuts_however_the_tokens_fall(parts, stops):
    tokenizer = SimpleNamespace(eot=-1, decode_bytes=lambda ids: parts[ids[0]].encode())
    text = sample.Continuation(tokenizer, stops)
    pieces = [text.add(i) for i in range(len(parts))] + [text.finish()]
    assert "".join(pieces) == text.text == cut_at_first_stop("".join(parts), stops)


def test_several_stop_texts_on_the_command_line():
    assert stream("one. two! three", "--stop", "!", "--stop", ".")[1] == "one"
    assert stream("one! two. three", "--stop", "!", "--stop", ".")[1] == "one"


def test_a_stop_text_with_accents_across_tokens():
    assert stream("un été à la mer", "--stop", "té à")[1] == "un é"


def test_generation_ends_at_endoftext_without_printing_it():
    _, printed = stream([*b"The end.", BYTES.eot, *b" More"])
    assert printed == "The end."


def test_max_new_tokens_is_the_most_that_is_drawn():
    assert stream("abcdefgh", "--max_new_tokens", 3)[1] == "abc"


def test_a_full_context_is_said(capsys):
    save_model("short.pt", seq_len=16)
    text = run(capsys, "12345", "--model", "short.pt", "--seed", 1)
    assert text.rstrip().endswith("[the context of 16 tokens is full]")
    assert "full" not in run(capsys, "12345", "--model", "short.pt", "--max_new_tokens", 3)


def test_a_full_context_in_mid_character_is_said_last():
    _, printed = stream("abcd😀", ends=False, seq_len=9)  # <|endoftext|>, "> ", then six bytes
    assert printed == "abcd [the context of 9 tokens is full]"


def test_a_text_that_ends_just_as_the_context_is_full_is_whole():
    assert stream("abcdef", seq_len=10)[1] == "abcdef"  # <|endoftext|>, "> ", six bytes, the end


def test_an_empty_prompt_is_a_prompt(capsys):
    assert "User:" not in run(capsys, "", "--model", "model.pt", "--max_new_tokens", 3)


def test_n_continuations_are_numbered_and_begin_with_the_prompt(capsys):
    text = run(capsys, "Hello", "--model", "model.pt", "-n", 3, "--seed", 1, "--max_new_tokens", 9)
    blocks = text.split("--- ")[1:]
    assert [block.splitlines()[0] for block in blocks] == ["1 of 3", "2 of 3", "3 of 3"]
    assert all(block.split("\n", 1)[1].startswith("Hello") for block in blocks)
    assert len(set(block[6:] for block in blocks)) == 3


def test_n_continuations_are_one_batch(capsys):
    generate = lamoe.LaMoE.generate
    with mock.patch.object(lamoe.LaMoE, "generate", autospec=True, side_effect=generate) as spy:
        run(capsys, "Hello", "--model", "model.pt", "-n", 3, "--max_new_tokens", 4)
    ((_, ids_BT, *_), _), *others = spy.call_args_list
    assert ids_BT.tolist() == [[BYTES.eot, *b"Hello"]] * 3 and not others


def batch(*texts, flags=()):
    """What is printed if row k of the batch says texts[k], a byte a time."""

    def generate(ids_BT, max_new_tokens, *args, **options):
        for column in zip_longest(*(t.encode() for t in texts), fillvalue=BYTES.eot):
            yield torch.tensor(column)
        raise AssertionError("asked for more after all had ended")

    model = SimpleNamespace(config=SimpleNamespace(seq_len=999), generate=generate)
    with (
        mock.patch.object(sample, "load", lambda *args: (model, BYTES)),
        mock.patch.object(sys, "stdout", Writes()) as out,
        mock.patch.object(sys, "stderr", io.StringIO()) as err,
    ):
        assert call(sample, "> ", "--model", "x", "-n", len(texts), *flags) == 0
    return out.getvalue(), err.getvalue()


def test_each_of_n_continuations_ends_by_itself():
    printed, speed = batch("é 1. more\x7f", "a longer one.\x7f", flags=["--stop", "."])
    assert printed == "--- 1 of 2\n> é 1\n--- 2 of 2\n> a longer one\n"
    assert speed.startswith(f"[{len('é 1.'.encode()) + len('a longer one.')} tokens, ")


def test_the_speed_goes_to_stderr_and_only_text_to_stdout(capsys):
    assert call(sample, "Hello", "--model", "model.pt", "--max_new_tokens", 5) == 0
    printed = capsys.readouterr()
    assert "tokens" in printed.err and "second" in printed.err
    assert "tokens" not in printed.out


def test_text_the_terminal_cannot_show_does_not_stop_the_program():
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    model = SimpleNamespace(config=SimpleNamespace(seq_len=99))
    model.generate = lambda *args, **kwargs: (torch.tensor([i]) for i in "aé😀b".encode())
    with (
        mock.patch.object(sample, "load", lambda *args: (model, BYTES)),
        mock.patch.object(sys, "stdout", ascii_only),
    ):
        assert call(sample, "> ", "--model", "x") == 0
        ascii_only.flush()
        assert ascii_only.buffer.getvalue().decode().strip() == "> a??b"


def interrupted(*args, **options):
    """A model that says "ab" to every prompt, until somebody presses Ctrl-C."""
    n_rows = len(args[1])
    yield torch.tensor([97] * n_rows)
    yield torch.tensor([98] * n_rows)
    raise KeyboardInterrupt


@pytest.mark.parametrize("n, shown", [(1, "Helloab\n"), (2, "--- 1 of 2\nHelloab\n--- 2 of 2\n")])
def test_ctrl_c_loses_nothing_that_was_drawn(n, shown, capsys):
    with mock.patch.object(lamoe.LaMoE, "generate", interrupted):
        assert call(sample, "Hello", "--model", "model.pt", "-n", n) == 130
    printed = capsys.readouterr()
    assert printed.out.startswith(shown) and printed.err == ""


# ---------------------------------------------------------------------------------------------
# Conversation
# ---------------------------------------------------------------------------------------------


def converse(capsys, monkeypatch, typed):
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert call(sample, "--model", "model.pt", "--max_new_tokens", 5) == 0
    return capsys.readouterr()


@pytest.mark.parametrize("typed", ["hello\nagain\nexit\nnever\n", "hello\nagain\n exit \n"])
def test_a_conversation_goes_on_until_exit(typed, capsys, monkeypatch):
    printed = converse(capsys, monkeypatch, typed).out
    assert printed.count("User: ") == 3
    assert printed.count("Model: ") == 2
    assert "Model: hello" in printed and "Model: again" in printed
    assert "never" not in printed


def test_a_conversation_ends_with_its_input(capsys, monkeypatch):
    printed = converse(capsys, monkeypatch, "hello").out
    assert printed.count("Model: ") == 1 and printed.endswith("\n")


def test_a_prompt_that_is_too_long_is_said_and_the_conversation_goes_on(capsys, monkeypatch):
    printed = converse(capsys, monkeypatch, f"{'long ' * 20}\nshort\nexit\n")
    assert "the prompt has 100 tokens" in printed.out + printed.err
    assert "shorten it to 62" in printed.out + printed.err
    assert "Model: short" in printed.out


def test_ctrl_c_in_an_answer_ends_the_answer_and_the_conversation_goes_on(capsys, monkeypatch):
    with mock.patch.object(lamoe.LaMoE, "generate", interrupted):
        printed = converse(capsys, monkeypatch, "one\ntwo\nexit\n").out
    assert printed.count("[stopped]") == 2 and printed.count("User: ") == 3
    assert "Model: oneab\n[stopped]\n" in printed and "Model: twoab\n[stopped]\n" in printed


def test_ctrl_c_at_the_prompt_ends_the_conversation(capsys):
    with mock.patch("builtins.input", side_effect=KeyboardInterrupt):
        assert call(sample, "--model", "model.pt") == 130
    assert capsys.readouterr().err == ""


def test_a_failure_in_an_answer_is_said_and_the_conversation_goes_on(capsys, monkeypatch):
    with mock.patch.object(lamoe.LaMoE, "generate", side_effect=RuntimeError("out of memory\n!")):
        printed = converse(capsys, monkeypatch, "one\ntwo\nexit\n").out
    assert printed.count("[out of memory]\n") == 2 and printed.count("User: ") == 3


def test_bytes_that_are_no_text_do_not_end_the_conversation(capsys, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9\nagain\nexit\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    assert call(sample, "--model", "model.pt", "--max_new_tokens", 5) == 0
    assert "Model: again" in capsys.readouterr().out


def test_a_file_of_windows_is_a_conversation_of_its_lines(capsys, monkeypatch):
    stdin = io.TextIOWrapper(
        io.BytesIO(b"one\r\n\r\nexit\r\nnever"), encoding="utf-8", newline="\n"
    )
    monkeypatch.setattr(sys, "stdin", stdin)
    with mock.patch.object(sample, "respond") as spy:
        assert call(sample, "--model", "model.pt") == 0
    assert [asked.args[-1] for asked in spy.call_args_list] == ["one", ""]


def test_a_conversation_repeats_with_its_seed(capsys, monkeypatch):
    def talk(seed):
        monkeypatch.setattr(sys, "stdin", io.StringIO("one\none\nexit\n"))
        return run(capsys, "--model", "model.pt", "--max_new_tokens", 20, "--seed", seed)

    first = talk(1)
    assert first == talk(1) != talk(2)
    _, one, other = first.split("User: ")[:3]
    assert one != other


def test_a_prompt_is_read_as_utf8_whatever_the_locale_makes_of_it(capsys):
    """Of bytes that it can't read Python makes lone surrogates, which no tokenizer takes."""
    flags = ["--model", "model.pt", "--max_new_tokens", 3]
    for raw, text in (("é😀 a".encode(), "é😀 a"), (b"caf\xe9 ", "caf\ufffd ")):
        assert run(capsys, raw.decode("ascii", "surrogateescape"), *flags).startswith(text)
    assert run(capsys, "é ", *flags).startswith("é ")
    assert stream("un été", "--stop", "té".encode().decode("ascii", "surrogateescape"))[1] == "un é"


@pytest.mark.parametrize("penalty, is_fine", [(1e300, 0), (1e-300, 0), (0, 0), (100, 1), (0.01, 1)])
def test_a_penalty_that_no_float_holds_is_refused_before_a_text_begins(penalty, is_fine, capsys):
    flags = ["--model", "model.pt", "--max_new_tokens", 5, "--repetition_penalty", penalty]
    assert call(sample, "Hello", *flags) == (0 if is_fine else 2)
    printed = capsys.readouterr()
    assert printed.out.startswith("Hello") if is_fine else "must be from 0.01 to 100" in printed.err


@pytest.mark.parametrize(
    "path, beside, remedy",
    [
        ("run/log.csv", "run/best.pt", "try run/best.pt"),
        ("run/best.pt", "run/last.pt", "try run/last.pt"),
        ("run/best.pt", "run/other", "use another, or train again"),
        ("folder/model.safetensors", "folder/config.json", "name its folder, folder"),
        ("model.gguf", "other", "name what it was made of: GGUF files are only written here"),
    ],
)
def test_of_a_file_that_is_no_checkpoint_it_is_said_what_to_name_instead(
    path, beside, remedy, capsys
):
    for name in (path, beside):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("no checkpoint")
    assert call(sample, "Hello", "--model", path) == 2
    told = f"error: {path} is not a readable checkpoint (File is not a zip file); {remedy}\n"
    assert capsys.readouterr().err == told


def test_a_prompt_that_begins_with_a_dash_goes_after_two(capsys):
    flags = ["--model", "model.pt", "--max_new_tokens", 3]
    for prompt in ("-hello", "--top_p", "-"):
        assert run(capsys, *flags, "--", prompt).startswith(prompt)
    assert run(capsys, "- an item", *flags).startswith("- an item")


def test_an_empty_line_is_an_empty_prompt(capsys, monkeypatch):
    assert converse(capsys, monkeypatch, "\nexit\n").out.count("Model: ") == 1


# ---------------------------------------------------------------------------------------------
# Which model
# ---------------------------------------------------------------------------------------------


def test_without_a_model_one_line_says_which_command_makes_one(capsys):
    assert call(sample, "Hello") == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert "no model" in printed.err and "python train.py" in printed.err


def test_the_newest_run_is_taken(capsys):
    for seed, name in enumerate(["b", "c", "a"]):
        save_model(f"runs/{name}/best.pt", seed)
        os.utime(f"runs/{name}/best.pt", (1e9 + seed, 1e9 + seed))
    command = ["Hello", "--temperature", 0]
    newest, *others = (run(capsys, *command, "--model", f"runs/{n}/best.pt") for n in "abc")
    assert run(capsys, *command) == newest
    assert newest not in others


def test_a_prompt_of_the_greatest_length_works_and_one_more_does_not(capsys):
    assert call(sample, "x" * 62, "--model", "model.pt") == 0
    capsys.readouterr()
    assert call(sample, "x" * 63, "--model", "model.pt") == 2
    assert "shorten it to 62" in capsys.readouterr().err


def test_a_start_imports_neither_torchs_compiler_nor_its_shards(tmp_path):
    """They take longer than all else between the command and the first text."""
    start = (
        "import sys, runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], None, '__main__')"
    )
    names = "torch._dynamo sympy torch.distributed.tensor triton matplotlib tokenizers".split()
    check = f"; print([name for name in {names} if name in sys.modules])"
    flags = ["Once", "--model", "model.pt", "--max_new_tokens", "2"]
    command = [sys.executable, "-c", start + check, sample.__file__, *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
