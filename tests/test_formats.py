"""Known layouts are recognised and cleaned, own files are read or refused with the place.

The samples are made here, in the shape of the public sets: none of their text is in the repository.
"""

import bz2
import codecs
import contextlib
import csv
import gzip
import io
import json
import lzma
import os
import random
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import conftest
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpe import Tokenizer
from data import datasets, formats, rows

EOT = "<|endoftext|>"


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, content):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return Path(path)


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return Path(path)


def read(path, text_column=""):
    """The documents at a path, pieces joined, and the notes."""
    notes, documents, parts = [], [], []
    found = formats.find(Path(path))
    for source, text, ends in formats.documents(found, text_column, notes.append):
        parts.append(text)
        if ends:
            documents.append((source, "".join(parts)))
            parts = []
    assert not parts, "the last document has no end"
    return documents, notes


def texts(path, text_column=""):
    return [text for _, text in read(path, text_column)[0]]


# ---------------------------------------------------------------------------------------------
# The known sets, wherever they lie
# ---------------------------------------------------------------------------------------------

BBC = {
    f"BBC News Summary/{kind}/{category}/{i:03}.txt": f"{kind} {category} {i}\n\nBody.\n"
    for kind in ("News Articles", "Summaries")
    for category in formats.CATEGORIES
    for i in (1, 2)
}


def test_of_the_bbc_set_only_articles_are_read_and_their_category_is_their_source():
    members = {**BBC, "BBC News Summary/readme.txt": "about"}
    expected = sorted(
        (category, f"News Articles {category} {i}\n\nBody.\n")
        for category in formats.CATEGORIES
        for i in (1, 2)
    )
    assert sorted(read(write_zip("a.zip", members))[0]) == expected
    nested = {f"once/more/{name}": content for name, content in members.items()}
    assert sorted(read(write_zip("b.zip", nested))[0]) == expected
    for name, content in members.items():
        write(Path("folder") / name, content)
    assert sorted(read("folder")[0]) == expected
    assert sorted(read("folder/BBC News Summary/News Articles")[0]) == expected


def test_only_the_bbc_set_may_hold_a_pound_sign_of_windows():
    members = {**BBC, "BBC News Summary/News Articles/sport/199.txt": b"costs \xa35m\r\nin all"}
    assert ("sport", "costs £5m\nin all") in read(write_zip("a.zip", members))[0]
    with pytest.raises(ValueError, match="not UTF-8 text .byte 6 is 0xa3"):
        read(write_zip("b.zip", {"sport/199.txt": b"costs \xa35m"}))


def test_wikipedia_is_split_at_three_blank_lines_and_loses_its_empty_brackets():
    page = "Title\n\nA word () is (; ) in f() and (this).\n\n\nstill here"
    content = f"{page}\n\n\n\nOther\n\nbody\n\n\n \n\n\n\nThird\n\nbody\n"
    write("dump/fullEnglish/AA/wiki_00", content)
    write("dump/fullEnglish/AB/wiki_01", "Last\n\nbody")
    write("dump/readme.txt", "about")
    first = "Title\n\nA word is in f() and (this).\n\n\nstill here"
    assert texts("dump") == [first, "Other\n\nbody", "Third\n\nbody", "Last\n\nbody"]


PLAYS = [
    ["Dataline", "Play", "PlayerLinenumber", "ActSceneLine", "Player", "PlayerLine"],
    ["1", "King Bob", "", "", "", "ACT I"],
    ["2", "King Bob", "", "", "", "SCENE I. A room."],
    ["3", "King Bob", "1", "1.1.1", "BOB", "So, shaken as we are [Aside] and wan,"],
    ["4", "King Bob", "1", "1.1.2", "BOB", "find we a time."],
    ["5", "King Bob", "1", "", "BOB", "Exit ANN"],
    ["6", "King Bob", "2", "1.1.3", "ANN", "[Within] My liege!"],
    ["7", "King Bob", "2", "1.2.1", "ANN", "Another scene."],
    ["8", "Queen Ann", "1", "1.2.1", "ANN", "Another play."],
]
SCENES = [
    "BOB:\nSo, shaken as we are and wan,\nfind we a time.\n\nANN:\nMy liege!",
    "ANN:\nAnother scene.",
    "ANN:\nAnother play.",
]


def test_plays_are_scenes_of_speeches_without_stage_directions():
    assert texts(write_csv("plays.csv", PLAYS)) == SCENES


def test_the_other_edition_of_the_plays_gives_the_same():
    header = "type,line_id,play_name,speech_number,line_number,speaker,text_entry".split(",")
    rows = [
        ["line", n, play, speech, line, who, text] for n, play, speech, line, who, text in PLAYS
    ]
    assert texts(write_csv("plays.csv", [header, *rows[1:]])) == SCENES


@pytest.mark.parametrize(
    "speaker, line", [("Character", "Dialogue"), ("Speaker Name", "Lines"), ("character", "quote")]
)
def test_films_need_only_a_speaker_and_a_line(speaker, line):
    rows = [["movie", speaker, line], ["A", "Tony", "Hi. [smiles]"], ["A", "Tony", "You?"]]
    rows += [["A", "Pepper", "Fine."], ["B", "Tony", "Later."]]
    found, notes = read(write_csv("films.csv", rows))
    expected = ["Tony:\nHi.\nYou?\n\nPepper:\nFine.", "Tony:\nLater."]
    assert [text for _, text in found] == expected
    assert len(notes) == 1 and repr(speaker) in notes[0] and repr(line) in notes[0]


@pytest.mark.parametrize(
    "row",
    [
        {"players": "two", "tagline": "mate", "description": "a game"},
        {"character": "x1y", "headline": "news", "body": "a game"},
    ],
)
def test_a_part_of_a_word_makes_no_play(row):
    assert texts(write("a.jsonl", json.dumps(row))) == ["a game"]


LADDER = (
    "the field, \n  \n    \n      B\n    \n    \\mathbf {B}\n  , in terms:\n\nwhere \n  \n    \n"
    "      μ\n      \n        0\n      \n    \n    {\\displaystyle \\mu _{0}}\n   is a number () "
    "and \n  \n    \n      J\n    \n    \\mathbf {J}\n   a current."
)


def test_pages_are_put_together_and_their_formulas_folded():
    rows = [["page", "section_title", "text"], ["Field", "One", LADDER], ["Field", "Two", "More."]]
    rows += [["Force", "One", "Other."]]
    folded = "the field, \\mathbf {B}, in terms:\n\nwhere \\mu _{0} is a number and \\mathbf {J} a"
    folded += " current."
    expected = [f"Field\n\nOne\n\n{folded}\n\nTwo\n\nMore.", "Force\n\nOne\n\nOther."]
    assert texts(write_csv("pages.csv", rows)) == expected


def test_text_that_is_no_ladder_is_left_alone():
    text = "code:\n    if x:\n        y()\nafter\n\n  two spaces\n"
    assert formats.fold_formulas(text) == text


# ---------------------------------------------------------------------------------------------
# Own tables
# ---------------------------------------------------------------------------------------------


def test_a_csv_gives_a_document_a_row_and_says_from_which_column():
    rows = [
        ["id", "title", "text"],
        ["1", "t", "first,\nof two lines"],
        ["2", "u", ""],
        ["3", "v", "x"],
    ]
    found, notes = read(write_csv("own.csv", rows))
    assert [text for _, text in found] == ["first,\nof two lines", "x"]
    assert "'text'" in notes[0] and "--text_column" in notes[0]
    assert notes[1:] == ["own.csv: 1 of 3 rows have no text in 'text' and are left out"]
    assert texts("own.csv", "title") == ["t", "u", "v"]


def test_without_a_known_name_the_longest_column_is_taken():
    rows = [["a", "b", "c"], *([str(i), f"a longer text number {i}", "short"] for i in range(5))]
    assert texts(write_csv("own.csv", rows)) == [row[1] for row in rows[1:]]


def test_a_name_and_a_text_are_no_dialogue():
    rows = [["name", "text"], ["Ann", "one"], ["Ann", "two"]]
    assert texts(write_csv("own.csv", rows)) == ["one", "two"]


@pytest.mark.parametrize("delimiter", ",;\t")
def test_the_delimiter_is_the_one_of_the_first_line(delimiter):
    write("own.csv", f"id{delimiter}text\r\n1{delimiter}first. second\r\n")
    assert texts("own.csv") == ["first. second"]


def test_jsonl_gives_a_document_a_line():
    lines = [
        json.dumps({"id": "1", "text": "été\n\ud83d\ude00"}),
        "",
        json.dumps({"text": "two", "n": 3}),
    ]
    lines += [json.dumps({"other": "no text"})]
    assert texts(write("own.jsonl", "\n".join(lines))) == ["été\n😀", "two"]
    assert texts(write("strings.jsonl", '"one"\n"two"\n')) == ["one", "two"]
    assert texts(write("bad.jsonl", json.dumps({"text": "a\ud800b"}))) == ["a?b"]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.jsonl", '{"text": "x"}\nnot json\n', ["a.jsonl", "line 2", "not json"]),
        ("a.jsonl", "[1, 2]\n", ["a.jsonl", "line 1", "object"]),
        ("a.csv", b"id,text\n1,caf\xe9\n", ["a.csv", "not UTF-8", "byte 13", "0xe9"]),
        ("a.csv", "id,text\n1,x\n", ["no column 'body'", "id, text"]),
    ],
)
def test_a_bad_table_is_refused_with_the_place(name, content, words):
    write(name, content)
    with pytest.raises(ValueError) as error:
        read(name, "body" if "column" in words[0] else "")
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize(
    "content, found",
    [
        ('"id, or n";text\n1;"a;\nb"\n', ["a;\nb"]),  # a comma in the header
        ("id|text\n1|a, b\n", ["a, b"]),
        ("sep=;\nid;text\n1;a\n", ["a"]),  # as Excel writes it
        ("\ufeffid,text\r\n\r\n1,a\r\n", ["a"]),
        ("\n\nid,text\n1,a\n", ["a"]),
        ('id, text\n1, "a, b"\n', ["a, b"]),
        ("text,text,text\na,b,c\n", ["a"]),  # none replaces another
        ("id,text,,\n1,a,,\n", ["a"]),
        ("n,2019,text\n1,2,a\n", ["a"]),  # a year is a name
    ],
)
def test_dialects_of_csv(content, found):
    assert texts(write("a.csv", content)) == found


@pytest.mark.parametrize(
    "content, found",
    [
        (
            'id\ttext\n1\t"Hi," he said\n2\t"open\n3\t5" wide\n',
            ['"Hi," he said', '"open', '5" wide'],
        ),
        ('id\ttext\n1\t"said ""Hi"""\n2\t"a\tb\nc"\n', ['said "Hi"', "a\tb\nc"]),
        ('id\ttext\n1\t"a"\n2\tb\n', ["a", "b"]),
        ("text, whole\tid\nAnn, Bee\t1\nCid, Dee\t2\n", ["Ann, Bee", "Cid, Dee"]),
    ],
)
def test_quotes_of_a_tsv_are_text_where_they_quote_no_field(content, found):
    assert texts(write("a.tsv", content)) == found


def test_columns_of_one_name_are_all_there():
    write("a.csv", "text,text\na,b\n")
    assert texts("a.csv", "text.2") == ["b"]


@pytest.mark.parametrize("content", ["1,hello there\n2,bye\n", "great film,0.5\nbad,0.1\n"])
def test_a_first_row_is_not_taken_for_the_header(content):
    write("a.csv", content)
    with pytest.raises(ValueError, match="begins with text, not with names of columns; add them"):
        read("a.csv")


@pytest.mark.parametrize(
    "row, found",
    [
        ({"url": "https://a.org/a/very/long/name", "comment": "good one"}, "good one"),
        ({"id": "12345678901234567890", "said": "yes"}, "yes"),
        ({"key": "ab12cd34ef56ab12cd34", "satz": "\u4f60\u597d\u3002"}, "\u4f60\u597d\u3002"),
        ({"row": {"id": "a long identifier", "text": "a"}}, "a"),
        ({"prompt": "p", "completion": " c"}, "prompt:\np\n\ncompletion:\n c"),
        (
            {"output": "o", "input": "", "instruction": "i"},
            "instruction:\ni\n\noutput:\no",
        ),
        ({"context": "c", "question": "q", "answers": {"text": ["a", "b"]}}, None),
        ({"prompt": "p", "response": "r", "text": "p r"}, "p r"),
        (
            {"conversations": [{"from": "human", "value": "q"}], "system": "s"},
            "system:\ns\n\nhuman:\nq",
        ),
        ({"rejected": "q: a long answer, but bad", "chosen": "q: good"}, "q: good"),
    ],
)
def test_the_column_that_is_guessed_is_prose_or_what_is_asked_and_answered(row, found):
    write("a.jsonl", json.dumps(row))
    squad = "context:\nc\n\nquestion:\nq\n\nanswers.text:\na\nb"
    assert texts("a.jsonl") == [found or squad]


def test_several_columns_may_be_named_and_are_told():
    write("a.jsonl", '{"prompt": "p", "answer": "a"}')
    assert "a.jsonl: text is columns 'prompt' and 'answer' (another" in read("a.jsonl")[1][0]
    write("a.csv", "a,b,c\n1,x,y\n2,,z\n")
    assert texts("a.csv", "c,b") == ["c:\ny\n\nb:\nx", "c:\nz"]
    with pytest.raises(ValueError, match="no column 'd'; it has: a, b, c"):
        read("a.csv", "c,d")


def test_rows_of_books_are_not_gathered_before_the_first_is_read():
    """What a table is, is seen from a thousand rows, or from the first few megabytes."""
    asked = []

    def books():
        for n in range(40):
            asked.append(n)
            yield {"text": "word " * 200_000}

    next(iter(formats.table(books(), "a.jsonl", "", print)))
    assert len(asked) < 15


# ---------------------------------------------------------------------------------------------
# Bytes
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 1 << 20])
def test_blocks_of_any_size_give_the_same_text(size, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK", size)
    content = codecs.BOM_UTF8 + "é\r\n😀\r\rb\n".encode()
    assert "".join(formats.text_blocks(io.BytesIO(content), "x")) == "é\n😀\n\nb\n"


@given(st.integers(0, 40), st.integers(1, 9), st.booleans())
def test_the_byte_that_is_not_utf8_is_named_in_any_block(before, block, mark):
    content = codecs.BOM_UTF8 * mark + "é".encode() * before + b"\xe9 and more"
    at = len(content) - len(b"\xe9 and more")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "BLOCK", block)
        with pytest.raises(ValueError, match=f"byte {at} is 0xe9"):
            list(formats.text_blocks(io.BytesIO(content), "x"))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16le", "utf-16be"])
def test_utf16_is_named_with_the_command_that_converts_it(encoding):
    write("a.txt", ("Hello, this is text. " * 20).encode(encoding))
    with pytest.raises(ValueError, match=f"UTF-16.*iconv -f {encoding} -t utf-8 a.txt"):
        read("a.txt")


# ---------------------------------------------------------------------------------------------
# Documents and pieces
# ---------------------------------------------------------------------------------------------

words = st.sampled_from(
    ["a", " ", "\n", "\n\n", "word", EOT, f"\n{EOT}\n", f" {EOT} \n", "é", "  "]
)


def in_blocks(text, sizes):
    while text:
        size = sizes[len(text) % len(sizes)]
        yield text[:size]
        text = text[size:]


def naive(text):
    """Documents of a whole text, line by line."""
    parts, lines, separated = [], [], False
    for line in text.split("\n"):
        if line.strip() == EOT:
            parts.append("\n".join(lines))
            lines, separated = [], True
        else:
            lines.append(line)
    parts.append("\n".join(lines))
    parts = [part.strip("\n") for part in parts[:-1]] + [parts[-1].lstrip("\n")]
    if separated:
        parts[-1] = parts[-1].rstrip("\n")
    return [part for part in parts if part.strip()]


@given(st.lists(words, max_size=30).map("".join), st.lists(st.integers(1, 40), min_size=1))
def test_documents_do_not_depend_on_the_blocks(text, sizes):
    found = list(formats.split_documents(in_blocks(text, sizes)))
    assert all(ends for _, ends in found)
    assert [document for document, _ in found] == naive(text)


@given(st.lists(words, max_size=60).map("".join), st.lists(st.integers(1, 40), min_size=1))
def test_pieces_of_long_documents_make_up_the_documents(text, sizes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "PIECE", 10)
        found, whole = list(formats.split_documents(in_blocks(text, sizes))), [""]
    for piece, ends in found:
        whole[-1] += piece
        whole += [""] * ends
    assert whole.pop() == ""
    expected = naive(text)
    assert [w.strip("\n") for w in whole if w.strip()] == [d.strip("\n") for d in expected]
    assert all(len(piece) < 16 * 10 + 2 * 40 for piece, _ in found)


def test_a_long_document_comes_in_pieces_that_cut_no_word(monkeypatch):
    monkeypatch.setattr(formats, "PIECE", 1000)
    text = "".join(f"It's  {i:04} words,\n\n and more!\n" for i in range(400))
    pieces = [piece for piece, _ in formats.split_documents(in_blocks(text, [700]))]
    assert len(pieces) > 5 and "".join(pieces) == text
    tokenizer = Tokenizer.train([text], 400)
    assert sum((tokenizer.encode(piece) for piece in pieces), []) == tokenizer.encode(text)


def test_a_word_without_end_does_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(formats, "PIECE", 1000)
    pieces = list(formats.split_documents("x" * 700 for _ in range(200)))
    assert "".join(piece for piece, _ in pieces) == "x" * 140_000
    assert max(len(piece) for piece, _ in pieces) < 17_000
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]


def test_a_word_without_end_is_not_searched_again_and_again(monkeypatch):
    """Each part of it once, or it takes hours for 300 MB."""
    monkeypatch.setattr(formats, "PIECE", 1000)
    monkeypatch.setattr(formats, "find_cut", counting := Counting(formats.find_cut))
    text = "x" * 200_000 + " <" + "y" * 9 + f"\n{EOT}\nlast"
    pieces = list(formats.split_documents(in_blocks(text, [700])))
    assert "".join(piece for piece, _ in pieces) == text.replace(f"\n{EOT}\n", "")
    assert counting.searched < 2 * len(text)


class Counting:
    """A pattern that counts what it looks at."""

    def __init__(self, pattern):
        self.pattern, self.searched = pattern, 0

    def search(self, text, start):
        found = self.pattern.search(text, start)
        self.searched += (found.start() if found else len(text)) - start
        return found


# ---------------------------------------------------------------------------------------------
# Zips and folders
# ---------------------------------------------------------------------------------------------


def test_a_zip_is_read_like_the_folder_it_was_made_of():
    files = {"b/two.md": "two", "a/one.txt": "one", "c/rows.csv": "id,text\n1,three\n"}
    files |= {"image.png": b"\x89PNG", ".hidden.txt": "no", "__MACOSX/._a.txt": "no"}
    for name, content in files.items():
        write(Path("folder") / name, content)
    write_zip("files.zip", files)
    assert texts("files.zip") == texts("folder") == ["one", "two", "three"]
    Path("shelf").mkdir()
    Path("files.zip").rename("shelf/files.zip")
    assert texts("shelf") == ["one", "two", "three"]


def test_folders_that_tell_documents_apart_are_their_sources():
    files = {f"root/{kind}/{i}.txt": f"{kind} {i}" for kind in ("poems", "letters") for i in (1, 2)}
    found, _ = read(write_zip("a.zip", files))
    assert [source for source, _ in found] == ["letters", "letters", "poems", "poems"]
    found, _ = read(write_zip("b.zip", {**files, "root/loose.txt": "loose"}))
    assert {source for source, _ in found} == {""}
    many = {f"{i}/{i}.txt": f"{i}" for i in range(20)}
    assert {source for source, _ in read(write_zip("c.zip", many))[0]} == {""}


def test_no_member_of_a_zip_leaves_it():
    Path("in").mkdir()
    bad = {"../evil.txt": "evil", "/abs/evil.txt": "evil", "ok.txt": "fine"}
    before = sorted(Path("..").rglob("*"))
    path = write_zip("in/bad.zip", bad)
    assert "fine" in texts(path)
    assert sorted(Path("..").rglob("*")) == sorted(
        [*before, Path("..") / Path().resolve().name / path]
    )


def test_a_bomb_is_refused_before_it_is_read():
    write_zip("bomb.zip", {"a.txt": b"0" * (70 << 20)})
    with pytest.raises(ValueError, match=r"would unpack from 0\.\d to 73 MB"):
        formats.find(Path("bomb.zip"))
    write_zip("text.zip", {"a.txt": b"0" * (50 << 20)})
    assert formats.find(Path("text.zip"))


def test_a_damaged_zip_is_one_line_that_says_so():
    good = write_zip("good.zip", {"a.txt": "some text " * 1000}).read_bytes()
    write("short.zip", good[: len(good) // 2])
    with pytest.raises(ValueError, match=r"short\.zip is no whole zip"):
        read("short.zip")
    middle = good.index(b"a.txt") + 40
    write("flipped.zip", good[:middle] + bytes([good[middle] ^ 255]) + good[middle + 1 :])
    with pytest.raises(ValueError, match=r"flipped\.zip is damaged at a\.txt"):
        read("flipped.zip")


def test_a_zip_with_a_password_is_refused():
    data = bytearray(write_zip("a.zip", {"a.txt": "text"}).read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1  # the flag in the directory at the end
    write("locked.zip", bytes(data))
    with pytest.raises(ValueError, match=r"locked\.zip wants a password"):
        read("locked.zip")


# ---------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------


def test_a_set_is_found_in_its_folder_as_file_folder_or_zip(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "SETS", tmp_path / "sets")
    with pytest.raises(ValueError, match=r"bbc is not here yet; .*python data/datasets.py bbc"):
        datasets.read("bbc")
    (tmp_path / "sets/bbc").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"holds no .*python data/datasets.py bbc"):
        datasets.read("bbc")
    write_zip("sets/bbc/whatever it is called.zip", BBC)
    assert set(datasets.read("bbc").sources) == set(formats.CATEGORIES)
    write_csv(write("sets/shakespeare/any.csv", ""), PLAYS)
    assert "".join(datasets.read("shakespeare").train).startswith(SCENES[0])


# ---------------------------------------------------------------------------------------------
# Nothing about text is silent
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, found, missing",
    [
        ([{"id": "0", "text": None}, {"id": "1", "text": "a b"}], ["a b"], 1),  # none in the first
        ([{"id": "0"}, {"id": "1", "text": "a b"}], ["a b"], 1),  # not even a key
        ([{"text": "a b"}, {"content": "c d"}], ["a b"], 1),
        ([{"id": "0", "text": ["a", "b"]}], ["a\nb"], 0),
        ([{"id": "0", "data": {"text": "a b"}}], ["a b"], 0),
        ([{"messages": [{"role": "user", "content": "a"}]}], ["user:\na"], 0),
        (["a b", "c\r\nd"], ["a b", "c\nd"], 0),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_the_text_of_a_row_is_found_wherever_it_is_and_rows_without_are_counted(
    suffix, rows, found, missing
):
    lines = "\n".join(map(json.dumps, rows))
    write(f"a.{suffix}", lines if suffix == "jsonl" else json.dumps({"version": 1, "data": rows}))
    texts_found, notes = read(f"a.{suffix}")
    assert [text for _, text in texts_found] == found
    assert any("rows have no text" in note for note in notes) == bool(missing)


@pytest.mark.parametrize(
    "content, line",
    [
        ("text\none, two\n", 2),  # commas in a text that has no quotes
        ("id,text\n1,a\n2,b,c\n", 3),
        ("id,text\n1,a\n2\n", 3),
        ('id,text\n1,a\n2,"open\n3,b\n', 4),  # a quote that never ends swallows the rest
        ('text\n"open\nb\n', 3),
    ],
)
def test_a_row_that_would_lose_text_is_named_with_its_line(content, line):
    write("a.csv", content)
    with pytest.raises(ValueError, match=f"a.csv, line {line}: .*rename it to .txt"):
        read("a.csv")


def test_a_csv_without_a_header_is_refused():
    write(
        "a.csv",
        "A sentence as long as those of books with nothing in it that names a column\n" * 3,
    )
    with pytest.raises(ValueError, match="begins with text"):
        read("a.csv")


def test_counts_are_no_speakers():
    """The header has a column whose name contains "character"."""
    write("a.csv", "character_count,text\n3,abc\n4,abcd\n")
    assert texts("a.csv") == ["abc", "abcd"]


@pytest.mark.parametrize("suffix, pack", [("gz", gzip), ("bz2", bz2), ("xz", lzma)])
def test_packed_files_are_read_as_what_they_hold(suffix, pack):
    for name, content in {
        "a.txt": "x\r\ny",
        "a.jsonl": '{"text": "z"}',
        "a.tsv": "text\tn\nw\t1",
    }.items():
        write(f"{name}.{suffix}", pack.compress(content.encode()))
    found = [texts(f"{name}.{suffix}") for name in ("a.txt", "a.jsonl", "a.tsv")]
    assert found == [["x\ny"], ["z"], ["w"]]


@pytest.mark.parametrize(
    "start, what",
    [
        (b"%PDF-1.4", "PDF"),
        (b"PK\3\4", "Office"),
        (b"PAR1", "Parquet"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
    ],
)
def test_what_is_no_text_is_called_what_it_is(start, what):
    write("a.dat", start + bytes(range(256)))
    with pytest.raises(ValueError, match=f"a.dat is .*{what}"):
        read("a.dat")


@pytest.mark.parametrize("start, what", [(b"II*\0", "image"), (b"RIFF", "image"), (b"BZh9", "bz2")])
def test_other_kinds_are_called_what_they_are_too(start, what):
    write("a.dat", start + bytes(range(256)))
    with pytest.raises(ValueError, match=f"a.dat is .*{what}"):
        read("a.dat")


@pytest.mark.parametrize(
    "names, what",
    [
        ("[Content_Types].xml word/document.xml", "a Word document .* save it as plain text"),
        ("[Content_Types].xml xl/workbook.xml", "an Excel table .* save it as .csv"),
        ("[Content_Types].xml ppt/presentation.xml", "PowerPoint slides"),
        ("mimetype=application/vnd.oasis.opendocument.text content.xml", "an OpenDocument file"),
        ("mimetype=application/epub+zip OEBPS/1.html", "an e-book .* pandoc -t plain a.dat"),
        ("any.txt", "a zip or an Office document"),
    ],
)
def test_a_zip_that_is_a_document_is_called_what_it_is(names, what):
    with zipfile.ZipFile("a.dat", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names.split():
            name, _, content = name.partition("=")
            packing = zipfile.ZIP_STORED if content else zipfile.ZIP_DEFLATED
            archive.writestr(name, content or "<xml/>" * 99, packing)
    with pytest.raises(ValueError, match=f"a.dat is {what}"):
        read("a.dat")


def test_of_a_folder_a_line_tells_what_was_left_out_and_what_to_do():
    write("mine/a.txt", "text")
    for name in ("a.docx", "b.DOCX", "c.xlsx", "d.pptx", "e.epub"):
        write(f"mine/{name}", b"PK\3\4" + bytes(30))
    write("mine/f.pdf", b"%PDF-1.4\n\0")
    for name in ("1.png", "2.png", "3.png"):
        write(f"mine/{name}", b"\x89PNG" + bytes(9))
    members = formats.find(Path("mine"))
    assert [member.name for member in members] == ["a.txt"]
    assert formats.left_out(Path("mine"), members) == (
        "3 .png (image), 2 .docx (Word: save as text), "
        "1 .epub (e-book: pandoc -t plain FILE), 1 .pdf (PDF: pdftotext FILE), "
        "1 .pptx (PowerPoint: save as text), 1 .xlsx (Excel: save as .csv)"
    )


def test_of_a_zip_alone_or_in_a_folder_a_line_tells_the_same():
    inside = {"a.txt": b"text", "b.png": b"\x89PNG" + bytes(9), "c.zip": b"PK\3\4" + bytes(30)}
    Path("mine").mkdir()
    with zipfile.ZipFile("mine/a.zip", "w") as archive:
        for name, content in inside.items():
            archive.writestr(name, content)
    for path in (Path("mine"), Path("mine/a.zip")):
        left = formats.left_out(path, formats.find(path))
        assert left == "1 .png (image), 1 .zip (unpack it)"


def test_a_pointer_of_git_lfs_is_no_text_and_to_an_image_nothing():
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n"
    write("code/a.py", "code")
    write("code/logo.png", pointer)
    assert texts("code") == ["code"]
    write("code/a.txt", pointer)
    for name in ("code", "code/a.txt"):
        with pytest.raises(ValueError, match="a.txt is a pointer of Git LFS.*git lfs pull"):
            read(name)


def test_settings_beside_code_are_text_and_tables_beside_it_tables():
    files = {
        "a.py": "code",
        "broken.json": "{",
        "comments.json": '// of a person\n{"a": 1,}',
        "package.json": '{"name": "x", "description": "y", "files": ["a", "b"], "n": {"o": "p"}}',
        "numbers.json": "[1, 2]",
        "rows.json": '[{"text": "one"}, {"text": "two"}]',
        "broken.csv": "a,b\n1,2,3\n",
        "rows.csv": "id,said\n1,three\n",
    }
    for name, content in files.items():
        write(Path("code") / name, content)
    found, notes = read("code")
    rows = ["one", "two", "three"]
    plain = [text for name, text in files.items() if name[:4] != "rows"]
    assert sorted(text for _, text in found) == sorted(rows + plain)
    assert notes[-1].startswith("read as plain text: broken.csv, line 2: a row of 3")
    assert notes[-1].endswith("(and 4 more)")
    for name in ("a.py", "comments.json", "package.json", "numbers.json", "broken.csv"):
        Path("code", name).unlink()
    with pytest.raises(ValueError, match="broken.json is no JSON"):  # tables alone: one is broken
        read("code")


def test_of_a_notebook_the_cells_are_text():
    cells = [{"cell_type": "markdown", "source": ["# A\n", "b"]}]
    cells += [{"cell_type": "code", "source": "1 + 1", "outputs": [{"text": ["2"]}]}]
    write("a.ipynb", json.dumps({"cells": cells, "metadata": {}, "nbformat": 4}))
    assert texts("a.ipynb") == ["# A\nb\n\n1 + 1"]
    write("a.ipynb", "no notebook")
    assert texts("a.ipynb") == ["no notebook"]


def test_a_zero_byte_far_into_a_file_of_a_folder_leaves_that_out():
    write("mine/a.txt", "text")
    write("mine/setup.sh", b"#!/bin/sh\n" * 1000 + b"\0")
    found, notes = read("mine")
    assert [text for _, text in found] == ["text"] and "setup.sh is not text" in notes[0]


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tgz", "tar.xz"])
def test_a_tar_archive_is_to_be_unpacked(suffix):
    with tarfile.open("a.tar", "w") as archive:
        archive.add(write("a.txt", "some text"))
    data = Path("a.tar").read_bytes()
    pack = {"tgz": gzip, "tar.gz": gzip, "tar.xz": lzma}.get(suffix)
    write(f"b.{suffix}", pack.compress(data) if pack else data)
    with pytest.raises(ValueError, match=f"tar archive; .*name the folder: tar -xf b.{suffix}"):
        read(f"b.{suffix}")


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zip"])
def test_a_file_that_is_not_packed_as_it_says_is_named(suffix):
    write(f"a.txt.{suffix}", "plain text")
    with pytest.raises(ValueError, match=f"a.txt.{suffix} is (damaged,|no whole zip)"):
        read(f"a.txt.{suffix}")


def test_the_command_that_converts_a_file_suits_it():
    for name, content, command in (
        ("a b.txt", b"caf\xe9", "iconv -f cp1252 -t utf-8 'a b.txt' > utf8.txt"),
        ("a.txt", "Вот, 日".encode("gb18030"), "iconv -f ENCODING -t utf-8 a.txt > utf8.txt"),
        ("a.csv", "id,text".encode("utf-16"), "iconv -f utf-16 -t utf-8 a.csv > utf8.csv"),
        ("a.txt", "text\n".encode("utf-32"), "iconv -f utf-32 -t utf-8 a.txt > utf8.txt"),
        ("a.txt", b"caf\xc3\xa9 \xff", "iconv -c -f utf-8 -t utf-8 a.txt > utf8.txt"),
    ):
        write(name, content)
        with pytest.raises(ValueError) as error:
            read(name)
        assert str(error.value).endswith(command)


@pytest.mark.skipif(os.name != "posix", reason="makes links")
def test_links_to_folders_are_told_and_never_walked_in_circles():
    write("mine/a.txt", "text")
    write("other/b.txt", "more")
    os.symlink("../other", "mine/other")
    os.symlink(".", "mine/mine")
    os.symlink("../other/b.txt", "mine/b.txt")
    members = formats.find(Path("mine"))
    assert [member.name for member in members] == ["a.txt", "b.txt"]
    left = formats.left_out(Path("mine"), members)
    assert left == "2 link(s) to folders (name those: A,B)"


def test_of_a_data_set_saved_by_the_hub_settings_are_no_rows():
    for name in ("state.json", "dataset_info.json"):
        write(Path("saved") / name, '{"features": {"text": {"dtype": "string"}}}')
    write("saved/data-00000-of-00001.arrow", b"\xff\xff\xff\xff" + bytes(99))
    assert formats.find(Path("saved")) == []
    with pytest.raises(ValueError, match="saved holds no .* but 2 .json, 1 .arrow .Arrow: save as"):
        datasets.read("saved")
    write("readme/README.md", "a text of a person")
    assert texts("readme") == ["a text of a person"]


# ---------------------------------------------------------------------------------------------
# Packed files, Parquet, JSON of any size
# ---------------------------------------------------------------------------------------------

ROWS = [
    {"id": 1, "text": "été\nof two lines", "tags": ["a"], "messages": None},
    {"id": 2, "text": "second", "tags": [], "messages": [{"role": "user", "content": "Hi"}]},
]


def parquet(rows, **options):
    arrow = conftest.import_oracle("pyarrow")
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist(rows), file, **options)
    return file.getvalue()


def tab(rows):
    return "id\ttext\n" + "".join(f'{row["id"]}\t"{row["text"]}"\n' for row in rows)


KINDS = {
    "txt": lambda rows: f"\n{EOT}\n".join(row["text"] for row in rows),
    "json": json.dumps,
    "jsonl": lambda rows: "\n".join(map(json.dumps, rows)),
    "tsv": tab,
    "csv": lambda rows: tab(rows).replace("\t", ","),
    "parquet": parquet,
}
PACKS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: conftest.import_oracle("zstandard").ZstdCompressor().compress(data),
}


@pytest.mark.oracle
@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read_however_it_is_packed_and_from_a_zip_too(kind, pack):
    content = KINDS[kind](ROWS)
    content = PACKS[pack](content.encode() if isinstance(content, str) else content)
    name = f"a.{kind}{pack}"
    write(name, content)
    assert texts(name) == [row["text"] for row in ROWS]
    write_zip("a.zip", {name: content})
    assert texts("a.zip") == [row["text"] for row in ROWS]


@pytest.mark.oracle
@pytest.mark.parametrize("pack", [pack for pack in PACKS if pack])
def test_a_packed_file_that_was_cut_off_is_damaged_and_not_a_short_text(pack):
    data = PACKS[pack](b"".join(b"%d words\n" % i for i in range(9999)))
    for end in (len(data) // 2, len(data) - 1):
        write(f"a.txt{pack}", data[:end])
        with pytest.raises(ValueError, match=f"a.txt{pack} is damaged"):
            read(f"a.txt{pack}")


@pytest.mark.oracle
def test_frames_of_zstd_follow_each_other():
    pack = PACKS[".zst"]
    write("a.txt.zst", pack(b"one ") + pack(b"") + pack(b"two"))
    assert texts("a.txt.zst") == ["one two"]


@pytest.mark.parametrize("name, package", [("a.parquet", "pyarrow"), ("a.txt.zst", "zstandard")])
def test_a_missing_package_is_one_line_that_says_how_to_install_it(name, package, monkeypatch):
    for module in ("pyarrow", "zstandard", "compression.zstd"):
        monkeypatch.setitem(sys.modules, module, None)
    write(name, b"PAR1 1234")
    with pytest.raises(ValueError, match=f"pip install {package}$"):
        read(name)


@pytest.mark.oracle
def test_parquet_is_read_by_column_and_refused_in_one_line():
    rows = [
        {"n": i, "body": f"text {i}", "say": [{"role": "a", "content": "b"}]} for i in range(99)
    ]
    write("a.parquet", parquet(rows, row_group_size=10))
    assert texts("a.parquet") == [row["body"] for row in rows]
    assert texts("a.parquet", "say") == ["a:\nb"] * 99
    with pytest.raises(ValueError, match="no column 'x'; it has: body, say"):
        read("a.parquet", "x")
    write("b.parquet", parquet([{"n": 1}]))
    with pytest.raises(ValueError, match="b.parquet has no column of text; it has: n"):
        read("b.parquet")
    whole = parquet(rows)
    for bad in (whole[: len(whole) // 2], b"PAR1", b"text"):
        write("c.parquet", bad)
        with pytest.raises(ValueError, match="c.parquet is no whole Parquet file") as error:
            read("c.parquet")
        assert "\n" not in str(error.value)


@pytest.mark.oracle
def test_of_parquet_with_a_book_in_each_row_one_is_in_memory():
    arrow = conftest.import_oracle("pyarrow")
    rng = random.Random(0)
    book = [{"text": rng.randbytes(1 << 20).hex()} for _ in range(30)]
    write("a.parquet", parquet(book, row_group_size=1))
    pool, most = arrow.default_memory_pool(), 0
    before = pool.bytes_allocated()
    for text in rows.parquet_rows(open("a.parquet", "rb"), "a.parquet"):
        most = max(most, pool.bytes_allocated() - before)
        assert len(text["text"]) == 2 << 20
    assert most < 12 << 20


@pytest.mark.oracle
def test_parquet_without_rows_or_with_bytes_that_are_no_text():
    arrow = conftest.import_oracle("pyarrow")
    from pyarrow import parquet

    text = arrow.array([b"a", b"\xff"])
    broken = arrow.Array.from_buffers(arrow.string(), 2, text.buffers())
    parquet.write_table(arrow.table({"text": broken}), "b.parquet")
    with pytest.raises(ValueError, match="b.parquet is no whole Parquet file .*0xff"):
        read("b.parquet")
    parquet.write_table(arrow.table({"text": arrow.array([], "string")}), "c.parquet")
    assert texts("c.parquet") == []
    table = {"text": text.slice(0, 1), "label": ["long"], "image": [b"\xff"]}
    parquet.write_table(arrow.table(table), "d.parquet")
    assert texts("d.parquet") == ["a"]


CARD = "---\nlicense: mit\n---\n# A set\n"


@pytest.mark.oracle
def test_a_set_cloned_from_a_hub_trains_on_its_rows():
    clone = {"README.md": CARD, "dataset_infos.json": "{}", ".gitattributes": "*.parquet lfs"}
    clone |= {"load.py": "print()", "data/train-00000-of-00001.parquet": parquet(ROWS)}
    for name, content in clone.items():
        write(Path("hub") / name, content)
    assert texts("hub") == [row["text"] for row in ROWS]
    assert formats.left_out(Path("hub"), formats.find(Path("hub"))) == ("1 .json, 1 .md, 1 .py")
    write("hub/README.md", "# my notes")  # of a person, not of a hub: code beside it is text
    assert len(texts("hub")) == len(ROWS) + 1
    write("repository/README.md", "# my notes")
    write("repository/rows.jsonl", '{"text": "row"}')
    assert texts("repository") == ["# my notes", "row"]


def test_of_a_folder_the_files_of_these_suffixes_are_read():
    for name in ("a.py", "b.md", "c.txt", "d.PY", "e.py.gz"):
        write(Path("code") / name, gzip.compress(b"e.py.gz") if name[-1] == "z" else name)
    found = formats.documents(formats.find(Path("code"), ".py, md"))
    assert [text for _, text, _ in found] == ["a.py", "b.md", "d.PY", "e.py.gz"]
    with pytest.raises(ValueError, match="code has no file that ends in .c; it has 3 .py, 1 .md"):
        formats.find(Path("code"), ".c")
    assert len(formats.find(Path("code/a.py"), ".md")) == 1  # a file that is named is meant


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.lists(st.text() | st.dictionaries(st.text(), json_values)), st.integers(1, 9))
def test_json_is_read_in_blocks_of_any_size(values, size):
    for indent in (None, 1):
        for content in (values, {"a": 12, "b": {"c": [1]}, "d": values, "e": [3]}):
            text = json.dumps(content, indent=indent)
            expected = [rows.flat_row(value, "") for value in values]
            assert list(rows.json_rows(in_blocks(text, [size]), "a.json")) == expected


@pytest.mark.parametrize("content", ["", "[", '["a"', '[{"a": }]', '{"a": 1', "12", '["a" "b"]'])
def test_broken_json_is_named(content):
    write("a.json", content)
    with pytest.raises(ValueError, match="a.json is no JSON"):
        read("a.json")


A, B = {"text": "a"}, {"text": "b"}
LONG = [{"text": f"{i}"} for i in range(3000)]


@pytest.mark.parametrize(
    "content, found",
    [
        # an array beside the rows
        ({"columns": [{"name": "text", "type": "string"}], "rows": [{"row": A}]}, ["a"]),
        ({"tags": ["some", "tags"], "items": [A, B]}, ["a", "b"]),
        ({"errors": [], "n": [1, 2], "items": [A, B]}, ["a", "b"]),
        ({"train": [A], "test": [B], "labels": [{"name": "x"}]}, ["a", "b"]),
        (
            {"n": [*range(3000)], "train": LONG, "test": [B], "x": [{"y": "z"}]},
            [r["text"] for r in LONG] + ["b"],
        ),
        # a table by columns, or by names
        ({"id": [1, 2], "text": ["a", "b"]}, ["a", "b"]),
        ({"id": {"0": 1, "1": 2}, "text": {"0": "a", "1": "b"}}, ["a", "b"]),
        ({"x1": A, "x2": B}, ["a", "b"]),
        # one row
        ({"tags": ["x", "y"], "text": "a"}, ["a"]),
        ({"messages": [{"role": "user", "content": "a"}], "tools": [{"b": "c"}]}, ["user:\na"]),
    ],
)
def test_the_rows_of_an_object_are_found(content, found):
    for indent in (None, 1):
        assert texts(write("a.json", json.dumps(content, indent=indent))) == found


@pytest.mark.parametrize("n", [300, 450, 480, 2000, 100_000])
def test_lists_in_lists_without_end_are_no_rows(n):
    write("a.json", '[{"text": "a", "b": ' + '[{"c": ' * n + '"d"' + "}]" * n + "}]")
    with contextlib.suppress(ValueError):
        assert texts("a.json") == ["a"]


def test_two_long_arrays_of_texts_are_refused():
    long = [f"{i}" for i in range(3000)]
    write("a.json", json.dumps({"title": long, "text": long}))
    with pytest.raises(ValueError, match="several long arrays; write a row a line"):
        read("a.json")


@pytest.mark.parametrize("between", ["", " ", "\n", "\n\n"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n", " "])
def test_json_that_follows_json_is_read_too(start, between):
    for indent in (None, 1):
        content = start + between.join(json.dumps(row, indent=indent) for row in (A, B))
        assert texts(write("a.json", content)) == ["a", "b"]
    assert texts(write("a.json", f"{start}[{json.dumps(A)}]{between}[{json.dumps(B)}]")) == [
        "a",
        "b",
    ]


@pytest.mark.parametrize(
    "content", ['[{"text": "a"}] garbage', '{"text": "a"}{', '{"a": 1 "b": 2}']
)
def test_what_follows_json_is_not_left_out_in_silence(content):
    write("a.json", content)
    with pytest.raises(ValueError, match="a.json is no JSON at .* rename it to .txt"):
        read("a.json")


def test_a_long_value_of_json_takes_no_quadratic_time():
    text = json.dumps([{"text": "a", "list": ["word"] * 500_000}])
    blocks, started = in_blocks(text, [1 << 14]), time.process_time()
    assert [row["text"] for row in rows.json_rows(blocks, "a.json")] == ["a"]
    assert time.process_time() - started < 5  # read anew with each block, it took 10


def test_an_object_without_rows_is_a_row_and_lines_of_json_are_rows():
    assert texts(write("a.json", '{"n": 1, "text": "one"}')) == ["one"]
    lines = ['{"messages": [{"role": "user", "content": "Hi"}]}'] * 2
    assert texts(write("b.json", "\n".join(lines))) == ["user:\nHi"] * 2


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "Be kind."}, {"content": "Hi", "role": "user"}],
        [{"from": "system", "value": "Be kind."}, {"value": "Hi", "from": "user"}],
        [
            {"role": "system", "content": [{"type": "text", "text": "Be kind."}]},
            {"role": "tool", "content": None},
            {"role": "user", "content": [{"type": "image", "url": {}}, "Hi"], "name": "x"},
        ],
        [
            {"role": "system", "content": [{"type": "input_text", "text": "Be kind."}]},
            {"role": "user", "content": [{"type": "text", "text": None}, ["Hi"]]},
        ],
    ],
)
def test_messages_are_joined_in_reading_order_with_roles_as_lines(messages):
    write("a.jsonl", json.dumps({"prompt_id": "123", "messages": messages}))
    assert texts("a.jsonl") == ["system:\nBe kind.\n\nuser:\nHi"]


def test_what_a_tool_is_asked_is_text_too():
    call = {"type": "function", "function": {"name": "sum", "arguments": '{"a": 1}'}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    messages += [
        {"role": "tool", "content": "3"},
        {"role": "user", "content": "", "tool_calls": None},
    ]
    write("a.jsonl", json.dumps({"messages": messages}))
    assert texts("a.jsonl") == [f"assistant:\n{json.dumps(call)}\n\ntool:\n3"]
