"""What bpe.py promises, checked against its own plain version and against three other ones."""

import copy
import os
import pickle
import re
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from importlib import metadata
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import bpe
from bpe import SPECIAL, Tokenizer
from data import foreign

MISSING = "oracle missing: pip install -e '.[oracle]'"

# Characters at which splitters go wrong: all kinds of white space and line breaks, letters of the
# contractions (the long s is an s where case is ignored), digits that are no 0-9, marks, joiners.
TRICKY = (
    " \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u2028\u3000"
    "'sStTlLvVeErRdDmMſaZ019²Ⅷ٣_.,!-\"<|>éßİ字ア\u0301\u200d😀\0"
)
tricky_text = st.text(st.sampled_from(TRICKY), max_size=40)
any_text = st.one_of(
    tricky_text,
    st.text(),
    st.lists(st.sampled_from(["don't", " the", "  ", "\n", "\r\n", "!", SPECIAL, "12345"])).map(
        "".join
    ),
)
# Characters that every Unicode version in use agrees on: oracles carry tables of other versions.
agreed_text = st.one_of(tricky_text, st.text(st.characters(exclude_categories=["Cs", "Cn", "Co"])))

DOCUMENTS = [
    "The quick brown fox doesn't jump over 1234567 lazy dogs; it can't, it WON'T!\n\n\tEnd.  \n",
    "def f(x):\n    return x  # naïve café 北京市 привет 😀😀\r\n" * 3,
    "she sells sea shells on the sea shore, the shells she sells are sea shells I'm sure\n" * 2,
    "aaaaaaaa aaaa aaa aaaaaaaaaaaaa abababab ababab ---- -------- ======\n",
    "",
] + [bpe.__doc__]


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.train(DOCUMENTS, 500)


# ---------------------------------------------------------------- the plain BPE, without shortcuts


def plain_words(text):
    return [word.encode() for word in bpe.regex.findall(bpe.PATTERN, text)]


def plain_train(documents, vocab_size):
    words = [word for text in documents for word in plain_words(text)]
    return bpe.learn_plainly(words, vocab_size - 257)


def plain_encode(text, merges):
    return [i for word in plain_words(text) for i in bpe.encode_plainly(word, merges)]


def test_plain_replay_gives_the_ids_that_training_ended_with():
    """Merge by merge, written out on lists."""
    merges = bpe.learn_plainly([b"abababaab", b"bca"], 4)
    assert merges == [(97, 98), (256, 256), (97, 256), (98, 99)]
    assert bpe.encode_plainly(b"abababaab", merges) == [257, 256, 258]
    assert bpe.encode_plainly(b"abca", merges) == [256, 99, 97]  # ab before bc
    assert bpe.encode_plainly(b"", merges) == []


# ---------------------------------------------------------------- splitting


def words_of(pieces):
    return [word for piece in pieces for word in bpe.split_words(piece)]


@settings(max_examples=500)
@given(any_text)
@example("a  b")
@example("!\r\n\r\n  \n x")
@example("\n\x1c \x1c\n b")
def test_chunks_never_change_the_words(text):
    words = bpe.split_words(text)
    assert "".join(words) == text
    assert words_of(bpe.split_chunks(text)) == words
    assert all(bpe.split_words(word) == [word] for word in words)  # what the cache relies on


ASCII = [chr(i) for i in range(128)]


@settings(max_examples=500)
@given(any_text, st.text(st.sampled_from(" \t\n\r\x1c\x1f\v'sSlL1!aA")))
@example("".join(ASCII), "".join(a + b + c for a in " \n!a1" for b in ASCII for c in " \n!a1'"))
def test_the_faster_pattern_finds_the_same_words(anything, tricky):
    for text in (anything, tricky, anything + "\U00020000", tricky + "\U0001f600"):
        assert bpe.split_words(text) == bpe.regex.findall(bpe.PATTERN, text)


@pytest.mark.parametrize(
    "around", [" {0}a{0}1 {0}", "1{0}'{0}s\n{0}!{0}\r\n", "a{0}{0}{0}{0}  {0}x"]
)
def test_the_faster_pattern_knows_each_character(around):
    characters = map(chr, [*range(0xD800), *range(0xE000, 0x20000)])
    for some in iter(lambda: list(islice(characters, 999)), []):
        text = "".join(map(around.format, some))
        assert bpe.split_words(text) == bpe.regex.findall(bpe.PATTERN, text)


@settings(max_examples=500)
@given(any_text, st.integers(1, 5))
def test_blocks_never_change_the_words(text, size):
    full_size, bpe.BLOCK = bpe.BLOCK, size
    try:
        pieces = list(bpe.blocks(text))
    finally:
        bpe.BLOCK = full_size
    assert "".join(pieces) == text
    assert words_of(pieces) == bpe.split_words(text)


def test_blocks_are_short():
    for line in ("word " * 20_000, "line\n" * 20_000, "    x = 1;\n" * 20_000):
        assert max(map(len, bpe.blocks(line))) < bpe.BLOCK + 20


@given(st.lists(any_text))
def test_counts_are_the_words_of_all_documents(documents):
    assert bpe.count_words(documents) == Counter(words_of(documents))


# ---------------------------------------------------------------- training


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text("ab", min_size=1, max_size=30), st.integers(1, 4), max_size=9))
@example({"aaab": 2, "ab": 3})
def test_fast_training_equals_the_plain_one_on_words_full_of_overlaps(counts):
    words = [word.encode() for word, count in counts.items() for _ in range(count)]
    assert bpe.learn_merges(counts, 30) == bpe.learn_plainly(words, 30)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(any_text, st.text("ab ", max_size=60))), st.integers(257, 300))
@example(DOCUMENTS, 400)
@example(["a" * 50 + " " + "ab" * 30 + " " + "aab" * 20], 290)
def test_brute_force_gives_same_merges(documents, vocab_size):
    assert Tokenizer.train(documents, vocab_size).merges == plain_train(documents, vocab_size)


def test_ties_go_to_the_smallest_pair():
    assert Tokenizer.train(["zy xw ba"], 258).merges == [(32, 98)]  # " b" before "ba", "xw", "zy"
    assert Tokenizer.train(["zy\nxw\nba\n"], 260).merges == [(98, 97), (120, 119), (122, 121)]


def test_training_stops_when_no_pair_is_left():
    tok = Tokenizer.train(["abc", "abc"], 1000)
    assert tok.vocab_size == 259 and tok.eot == 258 and tok.decode([257]) == "abc"
    assert Tokenizer.train([], 1000).vocab_size == Tokenizer.train([""], 257).vocab_size == 257


def test_a_pair_that_is_too_long_keeps_no_other_from_being_merged():
    merges = bpe.learn_merges({"a" * 4096: 9, "bc": 1}, 99)
    assert len(merges) == 11 and merges[-1] == (98, 99)  # 2, 4, ... 1024 times a, then bc


def test_training_streams_its_documents():
    alive = Counter()

    class Document(str):
        def __new__(cls, text):
            alive["most"] = max(alive["most"], alive["now"] + 1)
            alive["now"] += 1
            return str.__new__(cls, text)

        def __del__(self):
            alive["now"] -= 1

    Tokenizer.train((Document(f"word{i} and more") for i in range(50)), 300)
    assert alive["most"] <= 2


def test_training_reports_progress():
    lines = []
    Tokenizer.train(["many words " * 200_000 + " ".join(map(str, range(9999)))], 600, lines.append)
    assert "million characters" in lines[0] and lines[-1] == "256 of 343 pairs merged"


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size=256 .* use 257 or more"):
        Tokenizer.train(["text"], 256)


def test_one_str_is_not_taken_for_documents(tok):
    with pytest.raises(TypeError, match=r"pass a list: \[text\]"):
        Tokenizer.train("text", 300)
    with pytest.raises(TypeError, match=r"pass a list: \[text\]"):
        tok.encode_array("text")


@pytest.mark.oracle
def test_merges_equal_rustbpe():
    rustbpe = pytest.importorskip("rustbpe", reason=MISSING)
    documents = DOCUMENTS + [Path(bpe.__file__).read_text(encoding="utf-8")]
    theirs = rustbpe.Tokenizer()
    theirs.train_from_iterator(iter(documents), 1500, pattern=bpe.PATTERN)
    ours = Tokenizer.train(documents, 1501)  # rustbpe has no special token
    assert [bytes(token) for token, _ in theirs.get_mergeable_ranks()] == [
        ours.decode_bytes([i]) for i in range(1500)
    ]


# ---------------------------------------------------------------- encoding and decoding


@settings(deadline=None)
@given(any_text)
def test_any_string_round_trips(tok, text):
    for tokenizer in (tok, Tokenizer([])):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.eot not in ids
        assert tokenizer.byte_lengths[ids].sum() == len(text.encode())


@settings(deadline=None)
@given(any_text)
def test_brute_force_gives_same_ids(tok, text):
    for tok._is_familiar in (False, True, False):  # by words, by chunks
        assert tok.encode(text) == plain_encode(text, tok.merges)


def test_what_was_seen_often_is_encoded_by_chunks_and_new_text_by_words(tok):
    text = "".join(f"the {i} foxes jump, {i} dogs don't\n" for i in range(5_000))
    new = Tokenizer(tok.merges)
    ids = [new.encode(text) for _ in range(3)]
    assert ids[0] == ids[1] == ids[2] == plain_encode(text, tok.merges)
    assert new._is_familiar and len(new._chunks) > 5_000
    new.encode(" ".join(map(chr, range(0x4E00, 0x6E00))))
    assert not new._is_familiar


@given(st.one_of(st.text("ab", min_size=1), st.binary(min_size=1)))
def test_long_words_are_merged_like_short_ones(text):
    tok = Tokenizer.train(["abababaab aaaa aababb abbabab bbbb ababaaaaaab"], 290)
    word = text.encode() if isinstance(text, str) else text
    ranks = {pair: 256 + i for i, pair in enumerate(tok.merges)}
    assert bpe.encode_plainly(word, ranks) == bpe.merge_word(word, ranks)
    assert bpe.merge_word(word * 400, ranks) == bpe.encode_plainly(word * 400, tok.merges)


def test_long_run_is_fast_enough(tok):
    start = time.process_time()
    for text in ("a" * 1_000_000, " " * 1_000_000 + "x", "=" * 300_000 + "\n" * 300_000):
        assert tok.decode(tok.encode(text)) == text
    Tokenizer.train(["a" * 1_000_000 + "ab" * 500_000], 300)
    assert time.process_time() - start < 30  # 4 s here; a quadratic merge takes an hour


@given(st.lists(any_text))
def test_encode_array_is_each_document_then_eot(tok, documents):
    array = tok.encode_array(iter(documents))
    assert array.dtype == np.uint16 and array.flags.writeable
    assert array.tolist() == [i for text in documents for i in (*tok.encode(text), tok.eot)]


def test_array_is_uint32_above_65536_ids():
    pairs = [(a, b) for a in range(256) for b in range(256)]
    for n, dtype in ((65536 - 257, np.uint16), (65536 - 256, np.uint32)):
        tok = Tokenizer(pairs[:n])
        assert tok.encode_array(["\u00ff"]).dtype == dtype
        assert tok.encode_array(["hi"]).tolist() == tok.encode("hi") + [n + 256]


def test_full_cache_changes_nothing(tok, monkeypatch):
    monkeypatch.setattr(bpe, "CACHE_SIZE", 3)
    small = Tokenizer(tok.merges)
    assert [small.encode(text) for text in DOCUMENTS] == [tok.encode(text) for text in DOCUMENTS]
    assert len(small._chunks) <= 3 and len(small._words) <= 3


def test_special_token_in_text_is_ordinary(tok):
    text = f"a{SPECIAL}b{SPECIAL}"
    assert tok.eot not in tok.encode(text) and tok.decode(tok.encode(text)) == text
    allowed = tok.encode(text, allow_special=True)
    assert allowed == [*tok.encode("a"), tok.eot, *tok.encode("b"), tok.eot]
    assert tok.decode(allowed) == text
    assert tok.byte_lengths[tok.eot] == len(SPECIAL)


def test_partial_utf8_decodes_to_replacement_characters():
    tok = Tokenizer([])
    ids = tok.encode("é!")
    assert tok.decode(ids[1:]) == "\ufffd!" and tok.decode(ids[:1]) == "\ufffd"
    assert tok.decode_bytes(ids[:1]) == "é".encode()[:1]
    assert tok.decode([]) == "" and tok.decode_bytes([]) == b""


def test_decode_takes_lists_arrays_and_generators(tok):
    ids = tok.encode("some text")
    assert (
        tok.decode(np.array(ids)) == tok.decode(iter(ids)) == tok.decode(tuple(ids)) == "some text"
    )


@pytest.mark.parametrize("bad", [-1, 500, 2**40, 2**70, 1.0, "a", None])
def test_id_out_of_range_is_refused(tok, bad):
    with pytest.raises(ValueError, match="integers from 0 to 499"):
        tok.decode([97, bad])


def test_surrogate_refused(tok):
    text = "fine, then \ud800"
    for call in (
        lambda: tok.encode(text),
        lambda: tok.encode_array([text]),
        lambda: Tokenizer.train([text], 300),
    ):
        with pytest.raises(ValueError, match=r"lone surrogate U\+D800") as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.oracle
@settings(deadline=None, max_examples=300)
@given(text=agreed_text)
def test_ids_equal_tiktoken(tok, text):
    pytest.importorskip("tiktoken", reason=MISSING)
    if not hasattr(tok, "oracle"):
        tok.oracle = foreign.to_tiktoken(tok)
    assert tok.encode(text) == tok.oracle.encode_ordinary(text)
    assert tok.oracle.n_vocab == tok.vocab_size and tok.oracle.eot_token == tok.eot


def hugging_face(tok):
    """Returns a tokenizers.Tokenizer with our merges, in GPT-2's alphabet of visible bytes."""
    oracle = pytest.importorskip("tokenizers", reason=MISSING)
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {i: chr(i) for i in visible}
    letters |= {i: chr(256 + n) for n, i in enumerate(sorted({*range(256)} - {*visible}))}
    names = ["".join(letters[i] for i in tok.decode_bytes([token])) for token in range(tok.eot)]
    model = oracle.models.BPE(
        {name: i for i, name in enumerate(names)}, [(names[a], names[b]) for a, b in tok.merges]
    )
    theirs, pre = oracle.Tokenizer(model), oracle.pre_tokenizers
    split = pre.Split(oracle.Regex(bpe.PATTERN), behavior="isolated")
    theirs.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(False, use_regex=False)])
    return theirs


@pytest.mark.oracle
@settings(deadline=None, max_examples=300)
@given(text=agreed_text)
def test_ids_equal_hf_tokenizers(tok, text):
    if not hasattr(tok, "hf_oracle"):
        tok.hf_oracle = hugging_face(tok)
    assert tok.encode(text) == tok.hf_oracle.encode(text).ids


@pytest.mark.oracle
def test_every_character_is_split_as_tokenizers_does_it_if_its_unicode_is_ours():
    oracle = pytest.importorskip("tokenizers", reason=MISSING)
    split = oracle.pre_tokenizers.Split(oracle.Regex(bpe.PATTERN), behavior="isolated")
    newest = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) != "Cs"]
    known = [c for c in newest if unicodedata.category(c) not in ("Cn", "Co")]
    for characters in (known, newest) if is_of_our_unicode(oracle) else (known,):
        text = "".join(f"a{c}b{c}1" for c in characters)
        assert [word for word, _ in split.pre_tokenize_str(text)] == bpe.split_words(text)


def is_of_our_unicode(tokenizers):
    letters = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\p{L}"), behavior="removed")
    left = letters.pre_tokenize_str("\U00011f04\u1c89\ua7ce\u208f")
    return 18 - len("".join(part for part, _ in left)) == bpe.UNICODE


def test_every_regex_within_the_bounds_has_the_letters_of_unicode_17():
    """Newer ones split newer letters otherwise, and a checkpoint would have other ids elsewhere."""
    project = Path(bpe.__file__).with_name("pyproject.toml").read_text(encoding="utf-8")
    bounds = re.search(r'"regex>=([\d.]+),<([\d.]+)"', project).groups()
    least, most, version = (
        [int(part) for part in text.split(".")] for text in (*bounds, metadata.version("regex"))
    )
    assert (bpe.UNICODE == 17) == (least <= version < most)
    assert Tokenizer([]).state()["unicode"] == bpe.UNICODE


# ---------------------------------------------------------------- saving


def test_save_load_and_state_give_the_same_tokenizer(tok, tmp_path):
    tok.save(tmp_path / "tok.json")
    assert os.listdir(tmp_path) == ["tok.json"]
    again = [Tokenizer.load(tmp_path / "tok.json"), Tokenizer.from_state(tok.state())]
    for other in [*again, pickle.loads(pickle.dumps(tok)), copy.deepcopy(tok)]:
        assert other.merges == tok.merges and other.vocab_size == tok.vocab_size
        assert other.encode(DOCUMENTS[0]) == tok.encode(DOCUMENTS[0])


def test_failed_save_leaves_the_old_file(tok, tmp_path, monkeypatch):
    tok.save(tmp_path / "tok.json")
    before = (tmp_path / "tok.json").read_bytes()

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        Tokenizer([]).save(tmp_path / "tok.json")
    assert os.listdir(tmp_path) == ["tok.json"]
    assert (tmp_path / "tok.json").read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"merges": 3}']
    + [b'{"merges": [], "pattern": "x"}', b'{"merges": [[1' + b"0" * 5000 + b", 2]]}"],
)
def test_damaged_file_is_one_line_with_a_remedy(tmp_path, content):
    (tmp_path / "tok.json").write_bytes(content)
    with pytest.raises(ValueError, match="tok.json.*train it again with: python bpe.py") as caught:
        Tokenizer.load(tmp_path / "tok.json")
    assert "\n" not in str(caught.value)


def test_missing_file_is_one_line_with_a_remedy(tmp_path):
    with pytest.raises(ValueError, match="No such file.*python bpe.py"):
        Tokenizer.load(tmp_path / "tok.json")


@pytest.mark.parametrize(
    "merges, cause",
    [
        ([(97, 256)], "only ids 0..255 exist"),
        ([(97, 98), (257, 97)], "only ids 0..256 exist"),
        ([(-1, 97)], "only ids"),
        ([(97, 98), (97, 98)], "duplicate of token 256"),
        ([(97, 98), (98, 99), (256, 99), (97, 257)], "duplicate of token 258"),
        ([(97, 98, 99)], "not a pair"),
        ([97], "not a pair"),
        ([(97.0, 98)], "not a pair"),
        ([("a", "b")], "not a pair"),
        ([(97, 97)] + [(i, i) for i in range(256, 320)], "longer than 1024 bytes"),
    ],
)
def test_hostile_merges_are_refused(merges, cause):
    with pytest.raises(ValueError, match=cause):
        Tokenizer(merges)


def test_what_training_makes_is_never_refused():
    tok = Tokenizer.train(["a" * 100_000, "=" * 50_000, "ab" * 5_000], 400)
    assert tok.byte_lengths[:-1].max() <= bpe.MAX_TOKEN_BYTES
    assert tok.decode(tok.encode("a" * 5000)) == "a" * 5000


# ---------------------------------------------------------------- command line


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_file_is_split_at_lines_that_are_exactly_the_special_token(tmp_path, end):
    lines = ["one", f" {SPECIAL}", f"x{SPECIAL}", SPECIAL, "two", SPECIAL, SPECIAL, f"{SPECIAL}!"]
    lines += ["three", SPECIAL]  # the last line has no end, and the first a byte order mark
    (tmp_path / "f").write_bytes(f"\ufeff{end.join(lines)}".encode())
    whole = [f"one\n {SPECIAL}\nx{SPECIAL}\n", "two\n", "", f"{SPECIAL}!\nthree\n", ""]
    assert list(bpe.read_documents(tmp_path / "f")) == whole


@pytest.mark.parametrize("unit", ["don't stop  now!\n\n é", "字。\n", "é", "a\r\n", "x y\t\n  "])
def test_huge_document_is_streamed_without_changing_its_words(tmp_path, unit):
    text = unit * (2_500_000 // len(unit))
    (tmp_path / "f").write_bytes(text.encode())
    pieces, text = list(bpe.read_documents(tmp_path / "f")), text.replace("\r\n", "\n")
    assert "".join(pieces) == text and bpe.count_words(pieces) == Counter(bpe.split_words(text))
    assert unit == "é" or max(map(len, pieces)) < 1_100_000  # one endless word cannot be cut


def run_cli(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["bpe.py", *map(str, arguments)])
    try:
        bpe.main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize(
    "content, arguments, message",
    [
        (None, [], "No such file or directory; give the path"),
        (b"", [], "is empty; give"),
        (f"{SPECIAL}\n".encode(), [], "is empty; give"),
        ("naïve".encode("latin1"), [], "not UTF-8 at byte 2; convert it"),
        (b"a\n" * 2_000_000 + b"\xff\n", [], "not UTF-8 at byte 4000000; convert it"),
        (b"caf\xc3", [], "not UTF-8 at byte 3; convert it"),
        ("text".encode("utf-16-le"), [], "has zero bytes: if text, then iconv -f utf-16"),
        (b"some text", ["--vocab_size", "256"], "use 257 or more"),
        (b"some text", ["--vocab_size", "many"], "invalid int value"),
        (b"some text", ["--vocab", "x", "--what"], "invalid int value"),
        (b"some text", ["--what"], "unrecognized arguments: --what"),
        (b"some text", ["--out", "nowhere/tok.json"], "existing folder"),
        (b"some text", ["--out", "."], "existing folder"),
    ],
)
def test_mistake_is_one_line_and_exit_code_2(
    tmp_path, monkeypatch, capsys, content, arguments, message
):
    if content is not None:
        (tmp_path / "f.txt").write_bytes(content)
    code, _, err = run_cli(monkeypatch, capsys, tmp_path / "f.txt", *arguments)
    assert code == 2 and message in err and err.startswith("bpe.py: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("out", ["f.txt", "link.json", os.devnull])
def test_saving_never_takes_the_place_of_the_text_or_of_a_device(
    tmp_path, monkeypatch, capsys, out
):
    (tmp_path / "f.txt").write_text("some text")
    if out == "link.json":
        os.symlink("f.txt", tmp_path / out)
    code, _, err = run_cli(monkeypatch, capsys, tmp_path / "f.txt", "--out", tmp_path / out)
    assert code == 2 and "name a file in an existing folder" in err
    assert (tmp_path / "f.txt").read_text() == "some text"


def test_folder_instead_of_file_is_one_line(tmp_path, monkeypatch, capsys):
    code, _, err = run_cli(monkeypatch, capsys, tmp_path)
    assert code == 2 and "give the path of a UTF-8 text file" in err and err.count("\n") == 1


def test_command_line_trains_shows_and_saves(tmp_path):
    (tmp_path / "f.txt").write_text("\n".join(DOCUMENTS), encoding="utf-8")
    command = [sys.executable, bpe.__file__, "f.txt", "--vocab_size", "600", "--out", "tok.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == ""
    assert re.search(r"600 ids *\n(.*\|){9,}.*\n\d\.\d\d bytes per token", done.stdout)
    assert Tokenizer.load(tmp_path / "tok.json").vocab_size == 600
