"""What is shown of the experts is what the routers did, and no text can disturb the showing."""

import dataclasses
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import ROUTERS, random_model, small_config
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import call

import sample
from bpe import Tokenizer
from data.exchange import experts as view
from data.exchange import load
from data.run import checkpoint

BYTES = Tokenizer([])


def model_with(**changes):
    return random_model(small_config(vocab_size=257, **changes))


def save(path, model):
    config, state = dataclasses.asdict(model.config), model.state_dict()
    checkpoint.save(path, {"config": config, "model": state, "tokenizer": BYTES.state()})


def routed(ids, experts, source="text"):
    """A text of one layer in which token t goes to experts[t] first, and to its follower next."""
    experts_LTA = torch.tensor([[e, e + 1] for e in experts])[None]
    pieces = [BYTES.decode([i]) for i in ids]
    return view.RoutedText(source, ids, pieces, experts_LTA, torch.full(experts_LTA.shape, 0.5))


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("model.pt", model_with(n_layers=3, n_dense_layers=1, n_experts=5, seq_len=16))
    Path("book.txt").write_text("Once, upon a time, 2 dogs. " * 4)
    return tmp_path


def run(capsys, *arguments):
    assert call(sample, "--model", "model.pt", *arguments) == 0
    return capsys.readouterr().out


# ---------------------------------------------------------------------------------------------
# Where the tokens went
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ROUTERS)
def test_experts_and_weights_are_what_the_routers_decided(router):
    model = model_with(n_experts=6, n_layers=3, n_dense_layers=1, router=router, seq_len=16)
    routings = []
    for block in model.blocks[1:]:
        block.ffn.router.register_forward_hook(lambda _, args, routing: routings.append(routing))
    x = view.route(model, BYTES, "text", list(range(40)))  # windows of 16, 16 and 8
    for row in (0, 1):
        windows = routings[row::2]
        assert [len(w.experts_NA) for w in windows] == [16, 16, 8]
        assert torch.equal(x.experts_LTA[row], torch.cat([w.experts_NA for w in windows]))
        assert torch.equal(x.weights_LTA[row], torch.cat([w.weights_NA for w in windows]))


def test_each_window_is_read_as_a_text_of_its_own():
    model = model_with(n_experts=6, seq_len=8)
    ids = [*b"a text of 22 letters.."]
    x = view.route(model, BYTES, "text", ids)
    for start in (0, 8, 16):
        alone = view.route(model, BYTES, "text", ids[start : start + 8])
        assert torch.equal(x.experts_LTA[:, start : start + 8], alone.experts_LTA)


def test_weights_come_with_the_experts_and_only_if_asked():
    model = model_with(n_layers=3, n_experts=5, top_k=2)
    ids_BT = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert model(ids_BT).expert_weights is None
    out = model(ids_BT, return_experts=True)
    assert out.expert_weights.shape == out.experts.shape == (3, 2, 3, 2)
    assert torch.allclose(out.expert_weights.sum(-1), torch.ones(3, 2, 3))  # topk: a softmax
    assert not torch.allclose(out.expert_weights[:, 0], out.expert_weights[:, 1])


@given(st.text(max_size=20))
def test_the_pieces_are_the_text(text):
    model = model_with(seq_len=8)
    ids = [BYTES.eot, *BYTES.encode(text)]
    x = view.route(model, BYTES, "text", ids)
    assert "".join(x.pieces) == "<|endoftext|>" + text
    assert len(x.pieces) == len(ids)


def test_half_a_character_at_the_end_is_shown_as_such():
    x = view.route(model_with(), BYTES, "text", [97, *"é".encode()[:1]])
    assert x.pieces == ["a", "\ufffd"]


def test_documents_of_a_file_begin_with_endoftext(tmp_path):
    (tmp_path / "two.txt").write_text("\ufeffab\n<|endoftext|>\n\ncd\n", encoding="utf-8")
    assert view.read_ids(tmp_path / "two.txt", BYTES) == [256, 97, 98, 256, 99, 100]


def test_of_a_long_file_the_first_tokens_are_read_and_that_is_said(tmp_path, capsys):
    (tmp_path / "long.txt").write_text("abc\n<|endoftext|>\n" * 10)
    ids = view.read_ids(tmp_path / "long.txt", BYTES, most=10)
    assert ids == [256, 97, 98, 99] * 2 + [256, 97]
    assert "long.txt: the first 10 tokens" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# Bits
# ---------------------------------------------------------------------------------------------


def test_entropy_by_hand():
    """Shares 1/2, 1/4, 1/4 have 1.5 bits; the correction is (3 - 1) / (2 * 4) nats."""
    assert math.isclose(view.entropy("aabc"), 1.5 + 2 / 8 / math.log(2))
    assert view.entropy("aaaa") == 0


def test_mutual_information_by_hand():
    """Of 8 pairs: ac 3, ad 1, bc 1, bd 3. H(X) = H(Y) = 1, H(X, Y) = 1.8113 bits.

    The corrections are 1/16, 1/16 and 3/16 nats: together -1/16.
    """
    x, y = "aaaabbbb", "cccdcddd"
    joint = -2 * (3 / 8 * math.log2(3 / 8) + 1 / 8 * math.log2(1 / 8))
    expected = 2 - joint - 1 / 16 / math.log(2)
    assert math.isclose(view.mutual_information(x, y), expected)
    assert math.isclose(view.mutual_information(y, x), expected)


def test_what_is_independent_tells_nothing_on_average():
    """Uncorrected, 4 experts and 5 kinds in 500 tokens would pretend 0.017 bits."""
    rng = random.Random(0)
    draws = [
        view.mutual_information(rng.choices(range(4), k=500), rng.choices("abcde", k=500))
        for _ in range(300)
    ]
    assert abs(sum(draws) / len(draws)) < 0.001


def test_a_copy_tells_everything():
    x = random.Random(0).choices(range(8), k=4000)
    assert math.isclose(view.mutual_information(x, x), 3, abs_tol=0.01)


# ---------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "token, kind",
    [("é", "letter"), (" 한", "letter"), ("2a", "digit"), (" \n", "space"), ("$", "punctuation")]
    + [(" —", "punctuation"), ("¿", "punctuation"), ("😀", "other"), ("<|endoftext|>", "other")],
)
def test_kinds_of_tokens(token, kind):
    assert view.kind_of(token) == kind


def printed_tables(capsys, texts, rows=(0,), **changes):
    config = small_config(vocab_size=257, **{"n_experts": 3, "seq_len": 8, **changes})
    view.print_tables(texts, config, BYTES, {row: row for row in rows})
    return capsys.readouterr().out


def cells(table, label):
    """The numbers of the row with this label."""
    line = next(line for line in table.splitlines() if line.startswith(label))
    return [float(cell) for cell in line[len(label) :].replace(",", "").split()]


def test_the_tables_count_first_experts_by_kind_place_and_source(capsys):
    ids = [BYTES.eot, *b"ab 1,cd, "]  # two windows of eight: positions 0 to 7, then 0 and 1
    first = routed(ids, [2, 0, 1, 0, 0, 2, 0, 0, 2, 1], source="first text")
    second = routed([*b"z"], [1], source="second text")
    table = printed_tables(capsys, [first, second])
    assert cells(table, "all") == [11, 45.5, 27.3, 27.3]
    assert cells(table, "letter") == [5, 60, 40, 0]
    assert cells(table, "space") == [2, 50, 50, 0]
    assert cells(table, "digit") == [1, 100, 0, 0]
    assert cells(table, "punctuation") == [2, 0, 0, 100]
    assert cells(table, "other") == [1, 0, 0, 100]
    assert cells(table, "first position") == [3, 0, 33.3, 66.7]
    assert cells(table, "quarter 1") == [2, 50, 50, 0]
    assert cells(table, "quarter 2") == [2, 50, 50, 0]
    assert cells(table, "quarter 3") == [2, 50, 0, 50]
    assert cells(table, "quarter 4") == [2, 100, 0, 0]
    assert cells(table, "first text") == [10, 50, 20, 30]
    assert cells(table, "second text") == [1, 0, 100, 0]


def test_one_text_has_no_table_by_source(capsys):
    assert "source" not in printed_tables(capsys, [routed([97, 98], [0, 1])])


def test_what_the_token_decides_is_told_by_the_token(capsys):
    """Each letter has its expert: the token tells all, the place nothing, and shuffled nothing."""
    letters = random.Random(0).choices(range(97, 101), k=4000)
    x = routed(letters, [i - 97 for i in letters])
    table = printed_tables(capsys, [x], n_experts=4)
    numbers = [float(n) for n in re.findall(r"-?\d+\.\d+", table.splitlines()[-1])]
    everything, token, shuffled, kind, _, position, _ = numbers
    assert math.isclose(everything, 2, abs_tol=0.01) and math.isclose(token, 2, abs_tol=0.01)
    assert abs(shuffled) < 0.02 and kind == 0 and abs(position) < 0.02


def test_an_expert_that_never_comes_first_has_its_column(capsys):
    table = printed_tables(capsys, [routed([97], [2])], n_experts=5)
    assert cells(table, "all") == [1, 0, 0, 100, 0, 0]


def test_of_many_experts_the_busiest_are_listed(capsys):
    experts = [e for e in range(64) for _ in range(1 + 9 * (e % 6 == 0))]  # 0, 6, ... 60: eleven
    table = printed_tables(capsys, [routed([97] * len(experts), experts)], n_experts=64)
    header = table.splitlines()[2].split()
    assert len(header) == 12 and set(map(int, header)) > set(range(0, 64, 6))
    assert "the 12 busiest of 64" in table


def test_layers_have_the_numbers_of_the_model(workplace, capsys):
    """Layer 0 of this model is dense: its experts begin with layer 1."""
    text = run(capsys, "--text", "book.txt")
    assert re.findall(r"^layer +(\d)", text, re.M) == ["1", "2"] * 3  # text, tables, bits
    assert re.findall(r"^layer (\d): ", run(capsys, "--text", "book.txt", "--layer", 2), re.M) == [
        "2"
    ]
    assert call(sample, "--model", "model.pt", "--layer", 0) == 2
    assert "from 1 to 2" in capsys.readouterr().err


@pytest.mark.parametrize("dense", [{"n_experts": 1}, {"n_dense_layers": 2}])
def test_a_dense_model_has_no_experts_to_show(dense, workplace, capsys):
    save("model.pt", model_with(**dense))
    assert call(sample, "Hello", "--model", "model.pt", "--show_experts") == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert "dense" in printed.err and "python train.py" in printed.err


# ---------------------------------------------------------------------------------------------
# In the terminal
# ---------------------------------------------------------------------------------------------

words = st.text("ab c한,", min_size=1, max_size=6)
tokens = st.lists(st.tuples(words, st.integers(0, 119)), min_size=1, max_size=30)


def cell_width(text):
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


@given(tokens, st.sampled_from([2, 10, 11, 120]), st.integers(12, 40))
def test_the_numbers_stand_below_the_first_character_of_their_tokens(tokens, n_experts, width):
    pieces, experts = [piece for piece, _ in tokens], [e % n_experts for _, e in tokens]
    lines = view.paint(pieces, experts, n_experts, False, width).split("\n")
    digits = len(str(n_experts - 1))
    text, read = "".join(pieces), []
    for start in range(0, len(lines), 1 + digits):
        line, *rows = lines[start : start + 1 + digits]
        assert cell_width(line) <= width
        columns = [column for column, c in enumerate(rows[0]) if c != " "]
        read += [int("".join(row[column] for row in rows)) for column in columns]
    assert read == experts
    assert "".join("".join(lines[:: 1 + digits]).split()) == "".join(text.split())


@given(tokens, st.sampled_from([2, 9, 10, 120]))
def test_colours_alone_tell_up_to_nine_experts_and_then_numbers_help(tokens, n_experts):
    pieces, experts = [piece for piece, _ in tokens], [e % n_experts for _, e in tokens]
    lines = view.paint(pieces, experts, n_experts, True, 40).split("\n")
    digits = 0 if n_experts <= 9 else len(str(n_experts - 1))
    painted = "".join(lines[:: 1 + digits])
    found = re.findall(r"\x1b\[38;5;16;48;5;(\d+)m(.*?)\x1b\[0m", painted)
    assert found == [(str(view.TERMINAL[e % 9]), p) for p, e in zip(pieces, experts, strict=True)]


def test_a_text_cannot_command_the_terminal():
    pieces = ["\x1b[2J", "a\x07\r", "\u202eb", "\n", "c"]
    assert view.paint(pieces, [0] * 5, 2, False, 80).splitlines()[::2] == [" [2Ja   b", "c"]


def luminance(red, green, blue):
    """Relative luminance of sRGB [WCAG 2.1]."""
    linear = [
        v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in (red, green, blue)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_black_is_easy_to_read_on_every_colour():
    """Contrast 7 and more: the best grade of WCAG."""
    colours = [[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in view.PALETTE]
    for n in view.TERMINAL:  # the 6 x 6 x 6 cube of a terminal's 256 colours, then the greys
        levels, n = (0, 95, 135, 175, 215, 255), n - 16
        grey = [8 + 10 * (n - 216)] * 3
        rgb = grey if n >= 216 else [levels[n // 36], levels[n // 6 % 6], levels[n % 6]]
        colours.append([level / 255 for level in rgb])
    assert len(view.PALETTE) == len(view.TERMINAL) == 9
    assert min((luminance(*colour) + 0.05) / 0.05 for colour in colours) >= 7


@pytest.mark.parametrize(
    "is_terminal, environment, is_coloured",
    [(True, {}, True), (False, {}, False), (True, {"NO_COLOR": "1"}, False)]
    + [(True, {"TERM": "dumb"}, False), (True, {"NO_COLOR": ""}, True)],
)
def test_colours_only_where_they_are_wanted(
    is_terminal, environment, is_coloured, workplace, monkeypatch
):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with mock.patch.object(sys, "stdout", io.StringIO()) as out:
        out.isatty = lambda: is_terminal
        assert call(sample, "--model", "model.pt", "--text", "book.txt") == 0
        assert ("\x1b[" in out.getvalue()) is is_coloured


def test_a_terminal_without_unicode_shows_what_it_can(workplace):
    Path("book.txt").write_text("été 한국 😀", encoding="utf-8")
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with mock.patch.object(sys, "stdout", ascii_only):
        assert call(sample, "--model", "model.pt", "--text", "book.txt") == 0
        ascii_only.flush()
        assert b"?t? ?? ?" in ascii_only.buffer.getvalue()


def test_the_first_expert_is_the_one_shown(capsys):
    view.print_text(routed([*b"abc"], [2, 0, 1]), 4, {0: 0})
    assert "\nabc\n201\n" in capsys.readouterr().out


def test_what_is_generated_is_shown(workplace, capsys):
    text = run(capsys, "abc", "--show_experts", "--seed", 1, "--max_new_tokens", 4, "-n", 2)
    assert re.findall(r"^layer (\d): (text \d)$", text, re.M) == [
        ("1", "text 1"),
        ("2", "text 1"),
        ("1", "text 2"),
        ("2", "text 2"),
    ]
    assert text.count("<|endoftext|>abc") == 4
    assert cells(text, "all")[0] == 16  # <|endoftext|>, abc and four more, twice


def test_a_long_text_is_cut_for_the_eye_and_counted_in_full(workplace, capsys):
    Path("book.txt").write_text("abcde" * 200)
    text = run(capsys, "--text", "book.txt", "--layer", 1)
    assert "the first 500 of 1,001 tokens" in text
    assert text.count("bcd") <= 100
    assert cells(text, "all")[0] == 1001


# ---------------------------------------------------------------------------------------------
# As a page
# ---------------------------------------------------------------------------------------------

HOSTILE = (
    "</script><b>bold</b><!--<script>&lt;\"'\\ \u2028 été 한국 😀 \x1b[31m\x00\r\n\t${1}` DATA"
)


class Parsed(HTMLParser):
    """A page as a browser reads it: its elements, and the data in it."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.json = [], ""
        self.feed(page)
        self.data = json.loads(self.json)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, text):
        if self.elements and self.elements[-1][1].get("type") == "application/json":
            self.json += text if text.strip() else ""


def hostile(text):
    return view.RoutedText(text, [97], [text], torch.zeros(2, 1, 2).long(), torch.ones(2, 1, 2))


ALL = {0: 0, 1: 1}  # rows and numbers of the layers of small_config
EMPTY = Parsed(view.make_page([], small_config(), ALL, 0))


@given(st.one_of(st.text(max_size=30), st.text("</script>!-- ", max_size=30), st.just(HOSTILE)))
def test_no_text_becomes_markup(text):
    page = view.make_page([hostile(text)], small_config(), ALL, 0)
    parsed = Parsed(page)
    assert page.isascii() and parsed.elements == EMPTY.elements
    assert parsed.data["texts"][0]["source"] == text
    assert parsed.data["texts"][0]["tokens"][0]["text"] == text


def test_the_page_needs_nothing_else():
    forbids = {"http-equiv": "Content-Security-Policy", "content": "default-src 'unsafe-inline'"}
    assert ("meta", forbids) in EMPTY.elements  # the browser itself refuses to load anything
    assert not {"src", "href", "srcset"} & {name for _, a in EMPTY.elements for name in a}
    assert not re.search(r"https?:|//\w|url\(|@import|fetch\(|innerHTML =", view.PAGE.read_text())


def test_the_page_holds_each_tokens_experts_and_weights(workplace, capsys):
    run(capsys, "--text", "book.txt", "--html", "page.html", "--layer", 2)
    model, _ = load("model.pt")
    x = view.route(model, BYTES, "book.txt", view.read_ids("book.txt", BYTES))
    data = Parsed(Path("page.html").read_text(encoding="ascii")).data
    assert (data["n_experts"], data["layers"], data["start"]) == (5, [1, 2], 1)
    (text,) = data["texts"]
    tokens = {name: [token[name] for token in text["tokens"]] for name in text["tokens"][0]}
    assert text["source"] == "book.txt" and tokens["text"] == x.pieces and tokens["id"] == x.ids
    assert tokens["position"] == [t % 16 for t in range(len(x.ids))]
    assert torch.equal(torch.tensor(tokens["experts"]), x.experts_LTA.transpose(0, 1))
    assert (torch.tensor(tokens["weights"]) - x.weights_LTA.transpose(0, 1)).abs().max() < 0.001


def test_only_a_page_of_ours_is_written_over(workplace, capsys):
    run(capsys, "--text", "book.txt", "--html", "page.html")
    first = Path("page.html").read_bytes()
    Path("book.txt").write_text("another text")
    run(capsys, "--text", "book.txt", "--html", "page.html")
    assert Path("page.html").read_bytes() != first
    theirs = b'<!doctype html><html lang="en">\n<p>my diary'
    Path("page.html").write_bytes(theirs)
    assert call(sample, "--model", "model.pt", "--text", "book.txt", "--html", "page.html") == 2
    assert Path("page.html").read_bytes() == theirs
    printed = capsys.readouterr()
    assert printed.out == "" and "another name" in printed.err and printed.err.count("\n") == 1


def test_a_full_disk_leaves_the_old_page(workplace, capsys):
    run(capsys, "--text", "book.txt", "--html", "page.html")
    before, files = Path("page.html").read_bytes(), sorted(workplace.iterdir())
    Path("book.txt").write_text("another text")
    with mock.patch.object(os, "fsync", side_effect=OSError(28, "No space left on device")):
        assert call(sample, "--model", "model.pt", "--text", "book.txt", "--html", "page.html") == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"
    assert Path("page.html").read_bytes() == before and sorted(workplace.iterdir()) == files


def test_a_long_text_is_cut_on_the_page_and_that_is_said():
    x = routed([97] * 12, [0] * 12)
    (text,) = Parsed(view.make_page([x], small_config(n_layers=1), {0: 0}, 0, most=10)).data[
        "texts"
    ]
    assert len(text["tokens"]) == 10 and text["source"] == "text, the first 10 of 12 tokens"


BROWSERS = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
BROWSER = next(filter(None, BROWSERS), None)


@pytest.mark.skipif(not BROWSER, reason="no Chromium to look at the page with")
def test_a_browser_shows_the_text_and_nothing_else(tmp_path):
    """In headless Chromium: as many spans as tokens, the text as text, a button an expert."""
    page = view.make_page([hostile(HOSTILE), hostile("b")], small_config(), ALL, 1)
    (tmp_path / "page.html").write_text(page)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command = [BROWSER, *flags, "--dump-dom", (tmp_path / "page.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, timeout=60).stdout.decode()
    tags = [tag for tag, _ in Parsed(dom).elements]
    assert tags.count("span") == 2 and tags.count("button") == 4 and "b" not in tags
    assert tags.count("input") == 2 and tags.count("script") == 2
    assert "&lt;/script&gt;&lt;b&gt;bold&lt;/b&gt;" in dom


def test_the_page_names_the_model_and_where_the_prompt_ends_and_the_text(workplace, capsys):
    model, _ = load("model.pt")
    model.head.weight.data[BYTES.eot] = 0.5 * model.head.weight.data.abs().sum(0)  # ends come often
    save("model.pt", model)
    asked = ["Hi", "-n", "3", "--seed", "1", "--max_new_tokens", "11", "--temperature", "2"]
    run(capsys, *asked, "--html", "page.html")
    data = Parsed(Path("page.html").read_text(encoding="ascii")).data
    about = "model.pt: 3 layers, 5 experts a layer, 2 for each token, router topk."
    assert data["about"] == about
    for text in data["texts"]:
        ids = [token["id"] for token in text["tokens"]]
        assert text["n_prompt"] == 3 and ids[:3] == [BYTES.eot, *b"Hi"]
        assert BYTES.eot not in ids[3:-1]  # nothing comes after it
    assert any(text["tokens"][-1]["id"] == BYTES.eot for text in data["texts"])
    run(capsys, "--text", "book.txt", "--html", "page.html")
    data = Parsed(Path("page.html").read_text(encoding="ascii")).data
    assert data["texts"][0]["n_prompt"] == 0  # nothing was written
