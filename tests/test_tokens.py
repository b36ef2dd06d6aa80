"""The ids of a corpus on disk are those of the tokenizer, and a half file is never believed."""

import itertools
import multiprocessing
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import encode
from hypothesis import given
from hypothesis import strategies as st

import train
from bpe import Tokenizer
from data import datasets, formats, tokens, workers

EOT = "<|endoftext|>"
BYTES = Tokenizer([])
texts = st.lists(st.text("ab \n\u00e9", min_size=1, max_size=30), min_size=1, max_size=12)


def side_of(documents, pieces=1):
    """A datasets.Documents of these, each in so many pieces."""

    def read():
        for text in documents:
            step = -(-len(text) // pieces) or 1
            for at in range(0, len(text), step):
                yield "", text[at : at + step], at + step >= len(text)

    n_bytes = sum(len(text.encode()) for text in documents)
    n = len(documents)
    return datasets.Documents(read, np.ones(n, bool), n_bytes, np.zeros(n, np.uint8))


@given(texts, st.integers(1, 4), st.integers(1, 50))
def test_ids_are_those_of_the_tokenizer_whatever_the_batches_and_pieces(documents, pieces, batch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "BATCH", batch)
        path = datasets.CACHE / f"{len(list(datasets.CACHE.iterdir()))}.ids"
        ids = tokens.encode(side_of(documents, pieces), BYTES, path)
    assert isinstance(ids, np.memmap) and ids.dtype == np.uint16
    assert ids.tolist() == encode(BYTES, documents).tolist()


def test_a_large_vocabulary_takes_four_bytes_an_id(cache):
    large = Tokenizer([(i // 256, i % 256) for i in range(65_500)])
    ids = tokens.encode(side_of(["some text"]), large, cache / "a.ids")
    assert ids.dtype == np.uint32 and ids[-1] == large.eot
    assert ids.tolist() == encode(large, ["some text"]).tolist()


CHARACTERS = "aé\u20ac\u2019\u2026\U0001f600\U0001f601 \n"


@given(st.lists(st.text(CHARACTERS, min_size=1), min_size=1), st.text("b\xff\u2020" + CHARACTERS))
def test_chars_gives_each_character_of_the_training_text_one_id(documents, other):
    tokenizer = tokens.learn_characters(documents, 2048)
    for text in documents:
        assert [tokenizer.decode([i]) for i in tokenizer.encode(text)] == list(text)
    assert tokenizer.decode(tokenizer.encode(other)) == other  # what it never saw is bytes
    assert Tokenizer.from_state(tokenizer.state()).encode(other) == tokenizer.encode(other)


def test_chars_keeps_to_the_vocabulary_the_most_frequent_first():
    tokenizer = tokens.learn_characters(["éé\u00fc\u20ac\u20ac\u20ac\u20ac"], 260)
    assert tokenizer.vocab_size == 260
    assert [len(tokenizer.encode(c)) for c in "\u20acé\u00fc"] == [1, 1, 2]
    assert tokens.learn_characters(["plain"], 2048).vocab_size == 257  # those of bytes


def test_a_tokenizer_of_characters_is_remembered_beside_that_of_words(cache, monkeypatch):
    corpus = SimpleNamespace(key="k", train=side_of(["a \u20ac and a \u20ac"] * 9))
    bpe, chars = (tokens.make_tokenizer(kind, 300, corpus) for kind in ("bpe", "chars"))
    assert len(bpe.encode(" and")) < len(chars.encode(" and")) == 4
    monkeypatch.setattr(tokens, "learn_characters", None)
    assert tokens.make_tokenizer("chars", 300, corpus).state() == chars.state()


def test_the_second_time_nothing_is_encoded(cache):
    first = tokens.encode(side_of(["some text"]), BYTES, cache / "a.ids")
    second = tokens.encode(None, BYTES, cache / "a.ids")
    assert second.tolist() == first.tolist()


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"hello\n"]
)
def test_what_was_damaged_in_the_cache_is_made_again(cache, tmp_path, damage):
    """As by a copy of the folder that was broken off."""
    (tmp_path / "a.txt").write_text("".join(f"some text {i}\n" for i in range(999)))

    def prepare():
        corpus = datasets.read(str(tmp_path / "a.txt"))
        tokenizer = tokens.make_tokenizer("bpe", 300, corpus)
        return [ids.tobytes() for ids in tokens.encode_corpus(corpus, tokenizer, 16, "a.txt")]

    whole = prepare()
    files = [path for path in cache.iterdir() if path.suffix in (".ids", ".npz", ".bpe")]
    assert len(files) == 5
    for path in files:
        content = path.read_bytes()
        path.write_bytes(damage(content))
        assert prepare() == whole
        assert path.suffix == ".npz" or path.read_bytes() == content


def test_progress_is_told_with_the_time_left(cache, monkeypatch):
    monkeypatch.setattr(tokens, "BATCH", 10)
    monkeypatch.setattr(tokens, "EVERY", 0)
    told = []
    monkeypatch.setattr(tokens, "print_in_place", told.append)
    tokens.encode(side_of(["a text of some length"] * 8), BYTES, cache / "a.ids")
    assert len(told) == 9 and "0%" in told[0] and "left" in told[1] and "100%" in told[-1]


def test_a_disk_that_is_too_small_is_noticed_at_once(cache, monkeypatch):
    monkeypatch.setattr(tokens, "BATCH", 10)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(ValueError, match="make room"):
        tokens.encode(side_of(["a text of some length"] * 80), BYTES, cache / "a.ids")
    assert list(cache.iterdir()) == []


def test_a_text_that_cannot_be_read_to_its_end_leaves_nothing(cache, monkeypatch):
    monkeypatch.setattr(tokens, "BATCH", 1)
    documents = datasets.Documents(lambda: iter([("", "a", True)]), np.ones(3, bool), 3, None)
    with pytest.raises(ValueError, match="changed"):
        tokens.encode(documents, BYTES, cache / "a.ids")
    assert list(cache.iterdir()) == []


def _encode_and_die(path):
    tokens.BATCH = 1
    dying = itertools.chain([("", "text", True)] * 50, iter(lambda: os._exit(9), None))
    side = datasets.Documents(lambda: dying, np.ones(99, bool), 400, None)
    tokens.encode(side, BYTES, path)


def test_a_killed_build_leaves_nothing_believed(cache):
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_encode_and_die, args=(cache / "a.ids",))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert [path.suffix for path in cache.iterdir()] == [".tmp"]
    ids = tokens.encode(side_of(["whole"]), BYTES, cache / "a.ids")
    assert ids.tolist() == encode(BYTES, ["whole"]).tolist()


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 9))
def test_document_starts_do_not_depend_on_blocks_nor_on_where_the_ids_are(ids, block):
    ids = np.array(ids, np.uint16)
    path = datasets.CACHE / "some.ids"
    path.write_bytes(ids.tobytes())
    mapped = np.memmap(path, np.uint16, "r")
    expected = [i for i, token in enumerate(ids) if token == 3]
    for found in (ids, mapped, mapped[:-1]):
        wanted = [i for i in expected if i < len(found)]
        assert tokens.document_starts(found, 3, block).tolist() == wanted


def _peak_of_a_long_text(path, out):
    """Peak memory of making the table and the ids of a text, beyond what the program takes."""
    import resource

    datasets.CACHE = Path(path).parent / "cache2"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    side = datasets.read(path).train
    ids = tokens.encode(side, BYTES, datasets.CACHE / "a.ids")
    spans = train.windows(ids, BYTES.eot, 4096)
    batches = train.Batches(ids, BYTES.eot, 4096, 8, 0)
    batches(0, "cpu")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out.put((peak - before) * (1 if sys.platform == "darwin" else 1024))
    out.put(len(spans))


@pytest.mark.skipif(os.name != "posix", reason="measures with resource")
@pytest.mark.parametrize("separator", [f"\n{EOT}\n", "\n"])
def test_a_long_text_is_never_in_memory(tmp_path, separator):
    size = 64 << 20
    with open(tmp_path / "long.txt", "w") as file:
        for i in range(size >> 20):
            line = f"{i:08} some words of a text, " * 38 + separator
            file.write("".join(f"{j}{line}" for j in range((1 << 20) // len(line))))
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    process = context.Process(target=_peak_of_a_long_text, args=(str(tmp_path / "long.txt"), out))
    process.start()
    peak, n = out.get(timeout=100), out.get(timeout=10)
    process.join()
    assert n > 9_000
    assert peak < 0.6 * size


def test_pieces_of_formats_are_one_document_on_disk(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "PIECE", 1000)
    (tmp_path / "long.txt").write_text("".join(f"{i} and more\n" for i in range(9000)))
    corpus = datasets.read(str(tmp_path / "long.txt"))
    tokenizer = Tokenizer.train(corpus.train, 300)
    for name, side in (("train", corpus.train), ("val", corpus.val)):
        assert len(list(side)) > len(side) == 1
        ids = tokens.encode(side, tokenizer, cache / name)
        assert ids.tolist() == encode(tokenizer, ["".join(side)]).tolist()


def unlike(n, seed=0):
    """A megabyte n times, of words of which few occur twice."""
    rng = random.Random(seed)
    for _ in range(n):
        letters = rng.randbytes(1 << 20).translate(bytes(97 + i % 26 for i in range(256))).decode()
        yield " ".join(letters[at : at + 15] for at in range(0, len(letters), 15))


def test_where_all_words_differ_fewer_are_learned_from(monkeypatch):
    """Each takes memory: of 100 MB of Chinese they took 4 GB."""
    assert tokens.sample_size(unlike(6)) < 12 << 20
    assert tokens.sample_size([*unlike(2)] * 4) > 20 << 20
    assert tokens.sample_size([*unlike(1)] * 3) == tokens.sample_size([]) == tokens.SAMPLE
    usual = [
        "".join(f"word {i % (997 + n)} and {i % 89}\n" for i in range(60_000)) for n in range(9)
    ]
    assert tokens.sample_size(usual) == tokens.SAMPLE


def test_beyond_so_many_different_words_none_is_counted():
    words = Counter()
    for text in unlike(3):
        workers.add_words(words, [text], 100_000)
    assert 100_000 < len(words) < 170_000


@pytest.mark.parametrize("n", [0, 2])
def test_of_more_words_than_fit_memory_the_most_frequent_are_learned_from(n, monkeypatch):
    monkeypatch.setattr(workers, "how_many", lambda n_bytes, most=0: n)
    monkeypatch.setattr(tokens, "BATCH", 1 << 18)
    monkeypatch.setattr(tokens, "WORDS", 1000)
    words = tokens.count_words(["often " * 9 + text for text in unlike(3)], 3 << 20)
    assert 900 < sum(map(len, words)) <= 1000 and words[" often"] + words["often"] == 27


# ---------------------------------------------------------------------------------------------
# All cores
# ---------------------------------------------------------------------------------------------

SENTENCES = [
    f"Sentence {i} isn't  long,\n\nbut it has {i * i} words: \u00e9t\u00e9. " * 9
    for i in range(400)
]


@pytest.fixture
def two_workers(monkeypatch):
    """Two, and their process ids as they start."""
    started = []
    monkeypatch.setattr(workers, "how_many", lambda n_bytes, most=0: 2)
    monkeypatch.setattr(tokens, "BATCH", 3000)
    init = workers.Worker.__init__

    def start(self, *work):
        init(self, *work)
        started.append(self.process)

    monkeypatch.setattr(workers.Worker, "__init__", start)
    return started


def test_with_all_cores_words_merges_and_bytes_on_disk_are_the_same(
    cache, two_workers, monkeypatch
):
    side = side_of(SENTENCES, pieces=3)
    counts = tokens.count_words(side, side.n_bytes)
    pool = [tokens.encode(side, tokenizer, cache / f"pool-{i}").tobytes() for i, tokenizer in PAIR]
    assert len(two_workers) == 6 and all(p.poll() is not None for p in two_workers)
    monkeypatch.setattr(workers, "how_many", lambda n_bytes, most=0: 0)
    assert counts == tokens.count_words(side, side.n_bytes)
    alone = [tokens.encode(side, tokenizer, cache / f"one-{i}").tobytes() for i, tokenizer in PAIR]
    assert pool == alone and [len(ids) > 100_000 for ids in pool] == [True, True]


PAIR = [(0, BYTES), (1, Tokenizer.train(SENTENCES[:3], 400))]


def test_a_killed_worker_ends_in_one_line_and_leaves_nothing(cache, two_workers):
    def read():
        for i, text in enumerate(SENTENCES):
            if i == 200:
                two_workers[0].kill()
            yield "", text, True

    n = len(SENTENCES)
    side = datasets.Documents(read, np.ones(n, bool), 10**6, np.zeros(n, np.uint8))
    with pytest.raises(ValueError, match="was killed .exit code .*start again") as error:
        tokens.encode(side, BYTES, cache / "a.ids")
    assert "\n" not in str(error.value) and list(cache.iterdir()) == []
    assert all(process.poll() is not None for process in two_workers)


def test_ctrl_c_leaves_neither_a_file_nor_a_process(cache, two_workers):
    def read():
        yield from (("", text, True) for text in SENTENCES[:200])
        raise KeyboardInterrupt

    side = datasets.Documents(read, np.ones(400, bool), 10**6, np.zeros(400, np.uint8))
    with pytest.raises(KeyboardInterrupt):
        tokens.encode(side, BYTES, cache / "a.ids")
    assert list(cache.iterdir()) == []
    assert len(two_workers) == 2 and all(p.poll() is not None for p in two_workers)


def test_a_mistake_in_the_text_is_told_as_without_workers(cache, two_workers):
    for documents in ([*SENTENCES, "fine, then \ud800"], ["\ud800"]):
        side = datasets.Documents(
            lambda documents=documents: (("", text, True) for text in documents),
            np.ones(len(documents), bool),
            10**6,
            np.zeros(len(documents), np.uint8),
        )
        with pytest.raises(ValueError, match=r"lone surrogate U\+D800"):
            tokens.encode(side, BYTES, cache / "a.ids")
    assert list(cache.iterdir()) == []


def test_workers_die_with_the_program(tmp_path):
    """However it ends: they read from it."""
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); from data import workers\n"
        "batches = ((['some text ' * 1000], True) for _ in iter(int, 1))\n"
        "for n, _ in enumerate(workers.results('count', None, batches, 2)):\n"
        "    if n == 9: print('x', flush=True); os.kill(os.getpid(), 9)"
    )
    root = str(Path(tokens.__file__).parents[1])
    program = subprocess.Popen([sys.executable, "-c", code, root], stdout=subprocess.PIPE)
    assert program.stdout.read() == b"x\n"  # ends when nobody holds the other end
    assert program.wait() == -9


@pytest.mark.parametrize("n_bytes, n", [(0, 0), (10**6, 0), (10**8, 4), (10**12, 4)])
def test_small_texts_need_no_workers(n_bytes, n, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(4), raising=False)
    monkeypatch.setattr(Path, "read_text", lambda path: "max 100000")
    assert workers.how_many(n_bytes) == n
    monkeypatch.setattr(Path, "read_text", lambda path: "200000 100000")
    assert workers.how_many(n_bytes) == min(n, 2)
