"""A name, a file or a folder becomes documents, and the two sides of the split stay apart."""

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import datasets, formats, stories

EOT = "<|endoftext|>"


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def everything(corpus):
    return [*corpus.train, *corpus.val]


def split(name, documents, sources=None):
    """The corpus of these documents, of one source or of the one given for each."""

    def pieces(note=None):
        for i, document in enumerate(documents):
            yield sources[i] if sources else "", document, True

    return datasets.split(name, pieces, datasets.scan(pieces))


# ---------------------------------------------------------------------------------------------
# Files and folders
# ---------------------------------------------------------------------------------------------


def test_one_document_is_split_by_position_and_the_last_tenth_is_for_validation(tmp_path):
    text = "".join(f"line {i} été\n" for i in range(100))
    corpus = datasets.read(write(tmp_path / "book.txt", text))
    assert corpus.name == "book"
    assert "".join(everything(corpus)) == text
    assert len(corpus.train) == len(corpus.val) == 1
    assert len(*corpus.train) == int(0.9 * len(text))
    assert "last 10%" in corpus.how
    assert corpus.kind_of_byte is None and corpus.floor_bits is None


def test_a_path_is_a_name(tmp_path):
    (tmp_path / "book.txt").write_text("a b c d e f g h i j")
    assert datasets.read(tmp_path / "book.txt").key == datasets.read(f"{tmp_path}/book.txt").key


def test_what_others_installed_keeps_its_cache_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    assert datasets.cache_folder() == Path(datasets.__file__).parent / "cache"
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    assert datasets.cache_folder() == tmp_path / ".cache" / "lamoe"


def test_documents_are_separated_by_lines_and_by_nothing_else(tmp_path):
    documents = [f"document {i}\n\nwith {EOT} inside a line" for i in range(60)]
    corpus = datasets.read(write(tmp_path / "many.txt", f"\n{EOT}\n".join(documents)))
    assert sorted(everything(corpus)) == sorted(documents)
    assert "60 documents" in corpus.how and f"{len(corpus.val)} of them" in corpus.how


def test_empty_documents_and_the_separator_at_the_end_make_no_document(tmp_path):
    documents = [f"document {i}" for i in range(30)]
    content = f"{EOT}\n\n{EOT}\n" + "".join(f"{d}\n{EOT}\n\n" for d in documents) + f" {EOT} "
    corpus = datasets.read(write(tmp_path / "many.txt", content))
    assert sorted(everything(corpus)) == sorted(documents)


def test_windows_line_ends_and_a_byte_order_mark_change_nothing(tmp_path):
    documents = [f"document {i}\nsecond line" for i in range(30)]
    plain = f"\n{EOT}\n".join(documents)
    first = datasets.read(write(tmp_path / "a" / "text.txt", plain))
    windows = b"\xef\xbb\xbf" + plain.replace("\n", "\r\n").encode()
    second = datasets.read(write(tmp_path / "b" / "text.txt", windows))
    assert everything(second) == everything(first) and second.key == first.key


def test_a_folder_is_read_to_its_bottom_in_a_stable_order(tmp_path):
    for name in ("z.txt", "sub/a.txt", "sub/deeper/b.txt"):
        write(tmp_path / "shelf" / name, f"text of {name}, " * 3)
    write(tmp_path / "shelf" / "code.py", "print('text, too') # " * 3)
    write(tmp_path / "shelf" / "picture.png", b"\x89PNG\r\n\x1a\n1234")
    write(tmp_path / "shelf" / "table.bin", b"\0\1\2\3" * 9)
    write(tmp_path / "shelf" / ".git" / "config", "hidden")
    write(tmp_path / "shelf" / "empty.txt", "")
    corpus = datasets.read("shelf")
    joined = "".join(everything(corpus))
    assert corpus.name == "shelf"
    assert "print('text, too')" in joined and "1234" not in joined and "hidden" not in joined
    assert "left out: 1 .bin, 1 .png (image)" in corpus.how
    order = ["sub/a.txt", "sub/deeper/b.txt", "z.txt"]
    assert [name for name in sorted(order, key=joined.find) if name in joined] == order
    assert everything(datasets.read(str(tmp_path / "shelf"))) == everything(corpus)


def test_the_files_of_a_folder_are_documents(tmp_path):
    for i in range(40):
        write(tmp_path / "shelf" / f"{i:02}.txt", f"file {i}")
    corpus = datasets.read("shelf/")
    assert sorted(everything(corpus)) == sorted(f"file {i}" for i in range(40))
    assert corpus.train and corpus.val


def test_the_current_folder_has_a_name(tmp_path):
    write(tmp_path / "a.txt", "some text")
    assert datasets.read(".").name == tmp_path.name


@pytest.mark.parametrize("n", [2, 5, 19])
def test_a_few_documents_are_split_by_position_and_stay_documents(tmp_path, n):
    """The separator is never text: the model gets a token for it."""
    documents = [f"document {i} " * 5 + "end" for i in range(n)]
    corpus = datasets.read(write(tmp_path / "few.txt", f"\n{EOT}\n".join(documents)))
    assert not any(EOT in document for document in everything(corpus))
    assert "".join(everything(corpus)) == "".join(documents)
    size = sum(map(len, documents))
    assert sum(map(len, corpus.train)) == pytest.approx(0.9 * size, abs=2)
    assert all(everything(corpus))


# ---------------------------------------------------------------------------------------------
# Mistakes: the message says where
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, words",
    [
        ("caf\xe9".encode("latin-1"), ["byte 3", "0xe9", "iconv"]),
        (b"\xef\xbb\xbfcaf\xe9", ["byte 6", "0xe9", "iconv"]),
        ("hello".encode("utf-16"), ["byte 0", "0xff"]),
        (b"a\0b", ["zero byte"]),
        (b"", ["empty"]),
        (b" \r\n\t\n", ["empty"]),
    ],
)
def test_a_file_that_is_no_text_is_refused_with_the_place(tmp_path, content, words):
    path = write(tmp_path / "bad.txt", content)
    with pytest.raises(ValueError) as error:
        datasets.read(path)
    assert all(word in str(error.value) for word in ["bad", *words])
    assert "\n" not in str(error.value)


def test_in_a_folder_a_bad_file_is_left_out_and_named(tmp_path):
    write(tmp_path / "shelf" / "good.txt", "text")
    write(tmp_path / "shelf" / "worse.txt", b"\xff")
    write(tmp_path / "shelf" / "worst.txt", "hello".encode("utf-16"))
    corpus = datasets.read("shelf")
    assert "".join(everything(corpus)) == "text"
    assert "left out: shelf/worse.txt is not UTF-8" in corpus.how and "(and 1 more)" in corpus.how
    (tmp_path / "shelf" / "good.txt").unlink()
    with pytest.raises(ValueError, match="worse.txt is not UTF-8"):
        datasets.read("shelf")


def test_what_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere.*no such file.*--data stories.*tinystories"):
        datasets.read("nowhere")
    write(tmp_path / "shelf" / "a.png", b"\x89PNG")
    with pytest.raises(ValueError, match="shelf holds no file of UTF-8 text"):
        datasets.read("shelf")


@pytest.mark.parametrize("name", ["", "a.txt,", ","])
def test_an_empty_name_is_not_the_folder_where_one_is(tmp_path, name):
    write(tmp_path / "a.txt", "text")
    with pytest.raises(ValueError, match="a name of --data is empty; give a path, or [.]"):
        datasets.read(name)


def test_what_is_on_the_web_is_to_be_fetched():
    with pytest.raises(ValueError, match="https://a.org/b.txt is not on this machine; fetch it"):
        datasets.read("https://a.org/b.txt")


def test_names_may_be_of_the_home_and_have_spaces_between(tmp_path, monkeypatch):
    for name in ("a", "b"):
        write(tmp_path / "home" / f"{name}.txt", f"text {name} " * 30)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    assert datasets.read("~/a.txt, ~/b.txt").sources == ["a", "b"]
    with pytest.raises(ValueError, match="~nobody-here/a.txt: no such file"):
        datasets.read("~nobody-here/a.txt")


def test_many_files_may_be_named(tmp_path):
    names = [write(tmp_path / f"{n}.txt", f"text {n} " * 30) for n in range(300)]
    assert len(datasets.read(",".join(names)).sources) == 300


def test_what_is_said_of_many_files_is_said_once(tmp_path):
    for n in range(30):
        write(tmp_path / "hub" / f"{n:02}.jsonl", f'{{"text": "row {n}"}}\n' + '{"n": 1}\n' * n)
    how = datasets.read("hub").how
    assert "00.jsonl (and 29 more): text is column 'text'" in how
    assert how.count(".jsonl") == 8 and how.endswith("and 22 other notes")


# ---------------------------------------------------------------------------------------------
# The split
# ---------------------------------------------------------------------------------------------

many = st.lists(st.text("abcé \n", min_size=1, max_size=6), min_size=20, max_size=80)


@given(many, st.lists(st.text("xyz", min_size=1, max_size=6), max_size=20), st.randoms())
def test_adding_documents_moves_none_to_the_other_side(documents, more, rng):
    before = split("a", documents)
    if "% of" in before.how:  # twenty documents by chance all on one side
        return
    mixed = documents + more
    rng.shuffle(mixed)
    after = split("b", mixed)
    assert set(before.train) <= set(after.train)
    assert set(before.val) <= set(after.val)


@given(many, st.randoms())
def test_copies_of_a_document_are_left_out_and_nothing_else_is_lost(documents, rng):
    spaced = [document.replace(" ", rng.choice([" ", "  ", " \n"])) for document in documents]
    corpus = split("a", [*documents, *spaced])
    if "% of" in corpus.how:
        return
    bodies = ["".join(document.split()) for document in everything(corpus)]
    assert sorted(bodies) == sorted({"".join(document.split()) for document in documents})
    assert f"{2 * len(documents) - len(bodies)} copies left out" in corpus.how


@pytest.mark.parametrize("n", [1, 30])
def test_a_source_of_copies_alone_is_none(tmp_path, n):
    text = f"\n{EOT}\n".join(f"document {i} of words" for i in range(n))
    for name in ("a", "b", "c"):
        write(tmp_path / f"{name}.txt", text + name * (name == "c"))
    corpus = datasets.read("a.txt,b.txt,c.txt")
    assert corpus.sources == ["a", "c"] and "copies left out" in corpus.how
    assert set(corpus.train.sources) | set(corpus.val.sources) == {0, 1}
    assert datasets.read("a.txt,./a.txt").val


def test_about_one_document_in_ten_is_for_validation():
    corpus = split("a", [f"document {i}" for i in range(5000)])
    assert 0.08 < len(corpus.val) / 5000 < 0.12
    digest = hashlib.sha256("\n".join(corpus.val).encode()).hexdigest()
    assert digest.startswith("3e53f352")  # another split would leak into old checkpoints


def test_documents_that_are_all_alike_are_still_split():
    corpus = split("a", ["the same words "] * 30)
    assert "".join(everything(corpus)) == "the same words "
    assert len(*corpus.val) == 2 and "29 copies left out" in corpus.how


def test_of_a_large_corpus_only_so_much_is_scored_and_that_grows_with_no_document(monkeypatch):
    monkeypatch.setattr(datasets, "MOST_VAL", 500)
    small = split("a", [f"document {i:04}" for i in range(400)])
    large = split("a", [f"document {i:04}" for i in range(4000)])
    assert 500 <= large.val.n_bytes < 500 + 13 and small.val.n_bytes <= 513
    assert "more held out and not used" in large.how
    assert len(large.train) + len(large.val) < 0.92 * 4000
    assert set(small.train) <= set(large.train) and not set(large.val) & set(small.train)


def test_of_a_long_text_only_so_much_of_the_end_is_scored(monkeypatch):
    monkeypatch.setattr(datasets, "MOST_VAL", 50)
    corpus = split("a", ["x" * 1000])
    assert (len(*corpus.train), len(*corpus.val)) == (950, 50) and "last 5%" in corpus.how


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(1, 9))
def test_a_document_in_pieces_is_cut_at_the_same_character(lengths, n_documents):
    """Also where a piece ends: the document then ends there too."""
    text = "".join(str(i % 10) for i in range(sum(lengths)))

    def pieces(note=None):
        for document in range(n_documents):
            left = text
            for i, length in enumerate(lengths):
                yield "", chr(97 + document) + left[1:length], i == len(lengths) - 1
                left = left[length:]

    corpus = datasets.split("a", pieces, datasets.scan(pieces))
    whole = "".join(text for _, text, _ in pieces())
    if "% of" not in corpus.how:
        return
    assert "".join(corpus.train) == whole[: int(0.9 * len(whole))]
    assert "".join(corpus.val) == whole[int(0.9 * len(whole)) :]
    for side in (corpus.train, corpus.val):
        assert sum(ends for _, ends in side.pieces()) == len(side)
        assert all(ends for _, ends in list(side.pieces())[-1:])


def test_each_source_of_a_mixture_is_on_both_sides():
    """A source of one long document is cut; one of many is split by their hashes."""
    documents = [f"poem {i}" for i in range(100)] + ["a novel " * 100]
    corpus = split("a", documents, ["poems"] * 100 + ["novel"])
    assert corpus.sources == ["poems", "novel"]
    for side in (corpus.train, corpus.val):
        found = [corpus.sources[i] for i in side.sources]
        expected = ["poems" if text.startswith("poem") else "novel" for text in side]
        assert found == expected and set(found) == {"poems", "novel"}
    assert sum(len(text) for text in corpus.val if "poem" not in text) == 80
    alone = split("b", documents[:100])
    assert [text for text in corpus.val if "poem" in text] == list(alone.val)


def test_a_mixture_of_sets_and_files_names_them(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "SETS", tmp_path / "sets")
    write(tmp_path / "sets/tinystories/any.txt", f"\n{EOT}\n".join(f"story {i}" for i in range(50)))
    write(tmp_path / "book.txt", "a book " * 40)
    corpus = datasets.read("tinystories,book.txt")
    assert corpus.sources == ["tinystories", "book"]
    assert len(everything(corpus)) == 52
    with pytest.raises(ValueError, match="nowhere: no such"):
        datasets.read("book.txt,nowhere")


def test_an_embedded_corpus_can_be_mixed_with_other_text_and_keeps_its_floor(tmp_path):
    write(tmp_path / "shelf/a.txt", f"\n{EOT}\n".join(f"a book {i}" for i in range(50)))
    write(tmp_path / "shelf/b.txt", f"\n{EOT}\n".join(f"another book {i}" for i in range(50)))
    shelf, alone = datasets.read(f"{tmp_path}/shelf"), datasets.read("stories", train_bytes=9_000)
    mixed = datasets.read(f"{tmp_path}/shelf,stories", train_bytes=9_000)
    assert mixed.sources == ["stories", *shelf.sources]
    for side in ("train", "val"):
        ours, (first, second) = getattr(mixed, side), (getattr(c, side) for c in (alone, shelf))
        assert [*ours] == [*first, *second] == [*ours]  # and again
        assert (
            len(ours) == len(first) + len(second) and ours.n_bytes == first.n_bytes + second.n_bytes
        )
        assert ours.sources.tolist() == [0] * len(first) + [i + 1 for i in second.sources]
    assert mixed.floor is None and mixed.floors == {"stories": alone.floor}
    assert len({mixed.key, shelf.key, alone.key}) == 3
    both = datasets.read("stories,facts", train_bytes=1_000_000)
    assert both.sources == ["stories", "facts"] == [*both.floors]
    write(tmp_path / "stories.txt", "not those " * 40)
    assert (
        datasets.read(f"stories,{tmp_path}/shelf/a.txt", train_bytes=9_000).sources[0] == "stories"
    )
    with pytest.raises(ValueError, match="two of the sources are called stories; rename"):
        datasets.read(f"stories,{tmp_path}/stories.txt", train_bytes=9_000)


# ---------------------------------------------------------------------------------------------
# Reading again
# ---------------------------------------------------------------------------------------------


def test_documents_can_be_read_again_and_again(tmp_path):
    write(tmp_path / "many.txt", f"\n{EOT}\n".join(f"document {i}" for i in range(60)))
    corpus = datasets.read("many.txt")
    assert list(corpus.train) == list(corpus.train) != []
    for side in (corpus.train, corpus.val):
        assert len(side) == len(list(side)) == len(side.sources)
        assert side.n_bytes == sum(len(text.encode()) for text in side)


def test_the_table_of_documents_is_made_once_and_again_when_a_file_changes(tmp_path, monkeypatch):
    text = f"\n{EOT}\n".join(f"document {i}" for i in range(60))
    write(tmp_path / "many.txt", text)
    first = datasets.read("many.txt")
    scan = datasets.scan
    monkeypatch.setattr(datasets, "scan", None)
    again = datasets.read("many.txt")
    assert (again.how, again.key) == (first.how, first.key)
    assert everything(again) == everything(first)
    monkeypatch.setattr(datasets, "scan", scan)
    write(tmp_path / "many.txt", text.replace("document 7", "dokument 7"))
    assert datasets.read("many.txt").key != first.key


@pytest.mark.parametrize("change", [lambda t: t + f"\n{EOT}\nmore", lambda t: t[: len(t) // 2]])
def test_a_text_that_changes_while_it_is_read_is_noticed(tmp_path, change):
    text = f"\n{EOT}\n".join(f"document {i}" for i in range(60))
    write(tmp_path / "many.txt", text)
    corpus = datasets.read("many.txt")
    write(tmp_path / "many.txt", change(text))
    with pytest.raises(ValueError, match="changed while it was read"):
        list(corpus.train)


def test_the_key_is_of_the_content_alone(tmp_path):
    text = f"\n{EOT}\n".join(f"document {i}" for i in range(60))
    keys = [datasets.read(write(tmp_path / name, text)).key for name in ("a.txt", "b/c.txt")]
    assert keys[0] == keys[1] != datasets.read(write(tmp_path / "d.txt", text + "x")).key


# ---------------------------------------------------------------------------------------------
# The embedded corpus
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def small_stories(tmp_path, monkeypatch):
    real = stories.write
    monkeypatch.setattr(datasets, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(stories, "write", lambda folder: real(folder, 30_000, 8_000))
    return datasets.read("stories")


def test_the_embedded_corpus_is_what_the_grammar_draws(small_stories):
    corpus = small_stories
    assert corpus.name == "stories"
    train = [stories.document(i).text for i in range(len(corpus.train))]
    val = [stories.document(i, split="val").text for i in range(len(corpus.val))]
    assert (list(corpus.train), list(corpus.val)) == (train, val)
    assert (corpus.train.n_bytes, corpus.val.n_bytes) == (len("".join(train)), len("".join(val)))
    assert len("".join(train)) > 25_000 and not set(train) & set(val)
    assert f"{len(train)} documents" in corpus.how


def test_the_floor_and_the_kinds_of_bytes_are_those_of_the_grammar(small_stories):
    corpus = small_stories
    documents = [stories.document(i, split="val") for i in range(len(corpus.val))]
    assert corpus.floor_bits.sum() == pytest.approx(sum(d.bits for d in documents), rel=1e-9)
    assert corpus.floor_bits[datasets.KINDS.index("recall")] == 0
    assert corpus.floor_bits[datasets.KINDS.index("rest")] == 0

    expected = []
    for document in documents:
        kinds = ["rest"] * (len(document.text) + len(EOT))
        for span in document.spans:
            kinds[span.start : span.end] = [span.kind] * (span.end - span.start)
        expected += kinds
    assert [datasets.KINDS[kind] for kind in corpus.kind_of_byte] == expected
    assert set(np.unique(corpus.kind_of_byte)) == {0, 1, 2}


def test_the_second_reading_finds_the_first(small_stories, monkeypatch):
    monkeypatch.setattr(stories, "texts", None)  # drawing again would fail
    again = datasets.read("stories")
    assert everything(again) == everything(small_stories) and again.key == small_stories.key


def test_another_text_of_the_same_name_size_and_time_is_another_text(tmp_path, monkeypatch):
    """Restored backups and `cp -p` keep both; so do two folders."""
    for folder, letter in (("A", "a"), ("B", "b")):
        write(tmp_path / folder / "book.txt", f"{letter} text. " * 40)
        os.utime(tmp_path / folder / "book.txt", ns=(10**18, 10**18))
    found = []
    for folder in ("A", "B"):
        monkeypatch.chdir(tmp_path / folder)
        found.append("".join(everything(datasets.read("book.txt"))))
    shutil.copy2(tmp_path / "A" / "book.txt", "book.txt")
    found.append("".join(everything(datasets.read("book.txt"))))
    assert [text[0] for text in found] == ["a", "b", "a"]


def test_starting_again_looks_into_no_file_and_notices_each_that_changed(tmp_path, monkeypatch):
    for i in range(40):
        write(tmp_path / "shelf" / f"{i:02}.txt", f"file {i}")
    write(tmp_path / "shelf" / "picture.png", b"\x89PNG")
    first = datasets.read("shelf")
    find = datasets.find
    monkeypatch.setattr(datasets, "find", None)
    again = datasets.read("shelf")
    assert (again.how, again.key) == (first.how, first.key) and "left out: 1 .png" in again.how
    monkeypatch.setattr(datasets, "find", find)
    assert everything(datasets.read("shelf")) == everything(first)
    write(tmp_path / "shelf" / "new.txt", "one more")
    assert "one more" in everything(datasets.read("shelf"))
    write(tmp_path / "shelf" / "00.txt", "FILE 0")
    assert "FILE 0" in everything(datasets.read("shelf"))
    assert datasets.read("shelf", suffix=".txt").how.count("left out") == 1


def test_a_first_reading_tells_how_long_it_takes(tmp_path, monkeypatch):
    write(tmp_path / "many.txt", f"\n{EOT}\n".join(f"document {i}" for i in range(60)))
    clock = iter(range(10**6))
    monkeypatch.setattr(datasets.time, "monotonic", lambda: next(clock))
    told = []
    datasets.read("many.txt", progress=told.append)
    assert "list of files" in told[0] and "of 0 MB" in told[1] and "s left" in told[1]


def test_of_many_files_it_is_told_how_many_were_looked_into(tmp_path):
    for n in range(1001):
        write(tmp_path / "many" / f"{n}.txt", f"text {n}")
    told = []
    datasets.read("many", progress=told.append)
    assert told[1:4] == [
        f"reading    the first lines of {n} of 1,001 files" for n in ("0", "500", "1,000")
    ]


def test_one_long_text_is_not_read_again_either_and_both_readings_tell_how_long(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(datasets, "CACHE", tmp_path / "cache")
    write(tmp_path / "book.txt", "some words of a book\n" * 999)
    told, read = [], []
    text_blocks = formats.text_blocks
    monkeypatch.setattr(formats, "text_blocks", lambda *a: read.append(a) or text_blocks(*a))
    datasets.read("book.txt", progress=told.append)
    assert len(read) == 2 and sum(" documents" in line for line in told) >= 2
    assert datasets.read("book.txt").val and len(read) == 2
