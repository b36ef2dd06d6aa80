"""Readers: a name, a file, a folder or a zip becomes documents to train on and to check with.

corpus = read("stories")               # the embedded corpus, drawn on first use
corpus = read("facts")                 # another: an invented world to memorise
corpus = read("bbc")                   # a public set, once `python data/datasets.py bbc` has run
corpus = read("book.txt")              # text, code, .csv .jsonl .parquet .zip, or a folder of them
corpus = read("bbc,physics,book.txt")  # a mixture; each document keeps its source

A corpus is never in memory: its documents are read anew each time one iterates. What is kept of
each are hashes and its length; they find copies and decide the side of the split.

    python data/datasets.py NAME [--limit 500MB]
"""

import contextlib
import hashlib
import itertools
import json
import os
import sys
import time
import zipfile
from array import array
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

if __package__ in (None, ""):  # run as a script: let it find its neighbours
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import download, facts, formats, rows, stories, unpack  # noqa: E402
from data.formats import SEPARATOR, split_documents  # noqa: E402
from data.run.files import replacing  # noqa: E402
from data.run.flags import OneLineParser, one_line_errors  # noqa: E402
from data.unpack import PACKED  # noqa: E402


def cache_folder() -> Path:
    """Beside this file (git ignores it), or at home where others installed it."""
    beside = Path(__file__).parent / "cache"
    is_ours = os.access(beside if beside.exists() else beside.parent, os.W_OK)
    return beside if is_ours else Path(os.path.expanduser("~/.cache/lamoe"))


CACHE = cache_folder()  # drawn text, tables of documents, ids
SETS = Path(__file__).parent / "sets"  # downloads, a folder each; git ignores it
KINDS = ("rest", "choice", "recall")  # what a byte of a drawn corpus is
DRAWN = {"stories": stories, "facts": facts}  # corpora we write ourselves, with an exact floor
FEW = 20  # fewer documents than that are split by position
MOST_VAL = 1_000_000  # validation on more would take longer than it tells [bytes]

# --- 1. A corpus: documents that can be read again and again --------------------------------------


class Documents:
    """Some of the documents of a text: read() yields (source, text, ends) of all, `wanted` picks.

    Iterating yields str; a document beyond a megabyte comes in pieces, as formats.py cuts it.
    """

    def __init__(self, read, wanted: np.ndarray, n_bytes: int, sources: np.ndarray):
        self.read, self.wanted = read, wanted
        self.n_bytes = n_bytes  # in UTF-8
        self.sources = sources  # of the wanted documents: indices into Corpus.sources

    def __len__(self):
        return int(self.wanted.sum())

    def __iter__(self):
        return (text for _, text, _ in self.all())

    def pieces(self):
        """Yields (text, ends)."""
        return ((text, ends) for _, text, ends in self.all())

    def all(self):
        """Yields (source, text, ends)."""
        n = 0
        for source, text, ends in self.read():
            if n == len(self.wanted):
                break
            if self.wanted[n]:
                yield source, text, ends
            n += ends
        else:
            if n == len(self.wanted):
                return
        raise ValueError("the text changed while it was read; start again when it is at rest")


class Corpus(NamedTuple):
    name: str
    how: str  # what was read and how it was split, in a line
    key: str  # of the content: another text has another key
    sources: list[str]  # where documents come from; [name] if there is nothing to tell apart
    train: Documents
    val: Documents  # documents that are not in train
    kind_of_byte: np.ndarray | None = None  # of the validation text: an index into KINDS
    floor_bits: np.ndarray | None = None  # exact entropy of the validation text, by the same kinds
    floors: dict[str, float] = {}  # of a mixture: bits per byte that no model can beat, by source

    @property
    def floor(self) -> float | None:
        """Bits per byte that no model can beat, where the source is known."""
        bits = self.floor_bits
        return None if bits is None else float(bits.sum() / len(self.kind_of_byte))


def read(
    name: str | os.PathLike, text_column="", train_bytes=0, progress=None, suffix: str = ""
) -> Corpus:
    """The corpus called `name`. ValueError names the cause and a remedy.

    text_column: of tables, else guessed. train_bytes: of a drawn corpus, else its own. suffix: of a
    folder's files only these, ".py,.md".
    """
    if (name := os.fspath(name)) in DRAWN:
        return read_drawn(name, train_bytes)
    is_one = name and os.path.exists(find_path(name))  # Path.exists raises at many names
    parts = [name] if is_one else [part.strip() for part in name.split(",")]
    if drawn := [part for part in dict.fromkeys(parts) if part in DRAWN]:
        others = ",".join(part for part in parts if part not in DRAWN)
        corpora = [read_drawn(part, train_bytes) for part in drawn]
        return mix(
            [*corpora, read(others, text_column, 0, progress, suffix)] if others else corpora
        )
    names = [Path(part).stem for part in parts]
    names = names if len(set(names)) == len(names) else parts
    for part in parts:
        check_name(part)
    if progress:
        progress("reading    the list of files")
    files = [identity for part in parts for identity in identities(find_path(part))]

    @cache
    def members():  # looks into every file: not needed where nothing is read
        return [find(part, suffix, progress) for part in parts]

    def pieces(note=lambda line: None):
        for label, found in zip(names, members(), strict=True):
            for source, text, ends in formats.documents(found, text_column, note):
                yield label if len(parts) > 1 else source, text, ends

    def pieces_and_notes(note):
        yield from pieces(note)
        for part, found in zip(parts, members(), strict=True):
            if what := formats.left_out(find_path(part), found):
                note(f"{find_path(part)}: left out: {what}")

    packed = any(file.lower().endswith((".zip", ".parquet", *PACKED)) for file, *_ in files)
    total = 0 if packed else sum(size for _, size, *_ in files)
    key = (files, parts, text_column, suffix)
    table = documents_table(pieces_and_notes, key, progress, total)
    again = partial(documents_table, key=(key, "cut"), progress=progress, total=total)
    return split((Path(name).stem or Path(name).resolve().name)[:60], pieces, table, again)


def find_path(name: str) -> Path:
    return SETS / name if name in download.SETS else Path(os.path.expanduser(name))


def identities(path: Path) -> list[tuple]:
    """Of each file below a path what no other has, hidden folders left out: a second for 100,000.

    A backup keeps size and time of change, but not when it was made.
    """
    files = [os.path.realpath(path)]
    if path.is_dir():
        walk = os.walk(files.pop())
        for folder, folders, names in walk:
            folders[:] = sorted(name for name in folders if name[0] != ".")
            files += (os.path.join(folder, name) for name in sorted(names))
    found = []
    for file in files:
        with contextlib.suppress(FileNotFoundError):  # a link to nowhere
            now = os.stat(file)
            found.append((file, now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino))
    return found


def check_name(name: str) -> None:
    """ValueError unless something of that name is here."""
    known, path = name in download.SETS, find_path(name)
    if not name:  # Path("") is the folder where one is
        raise ValueError("a name of --data is empty; give a path, or . for this folder")
    if "://" in name:
        raise ValueError(f"{name} is not on this machine; fetch it, and give --data its path")
    if not path.exists():
        if known:
            raise ValueError(f"{name} is not here yet; fetch it: python data/datasets.py {name}")
        names = ", ".join([*DRAWN, *download.SETS])
        raise ValueError(
            f"{name}: no such file, folder or data set; try --data stories, a path, or one of "
            f"{names}"
        )


def find(name: str, suffix: str = "", progress=None) -> list[formats.Member]:
    """The files of a set or a path, in a folder those of these suffixes."""
    known, path = name in download.SETS, find_path(name)
    members = formats.find(path, suffix, progress)
    if not members:
        remedy = f"fetch it: python data/datasets.py {name}" if known else "name another"
        but = f", but {has}" if (has := formats.left_out(path, [])) else ""
        raise ValueError(f"{path} holds no file of UTF-8 text{but}; put text there, or {remedy}")
    return members


# --- 2. The table of documents, and the split -----------------------------------------------------


class Table(NamedTuple):
    """What a first reading leaves, by document."""

    digests: np.ndarray  # uint64, of its content
    bodies: np.ndarray  # uint64, of its content without white space: copies have the same
    n_chars: np.ndarray
    n_bytes: np.ndarray  # in UTF-8
    sources: np.ndarray  # indices into names
    names: list[str]  # of sources
    notes: list[str]  # what was guessed


ARRAYS = Table._fields[:5]


def documents_table(pieces, key, progress=None, total: int = 0) -> Table:
    """The table of a text; remembered as long as its files and these readers stay as they are."""
    code = [
        Path(module.__file__).read_bytes()
        for module in (formats, rows, unpack, sys.modules[__name__])
    ]
    path = CACHE / f"table-{hashlib.sha256(repr((code, key)).encode()).hexdigest()[:16]}.npz"
    damaged = ValueError, LookupError, EOFError, zipfile.BadZipFile
    with contextlib.suppress(OSError, *damaged), np.load(path) as saved:
        return Table(*(saved[field] for field in ARRAYS), *json.loads(str(saved["words"])))
    table = scan(pieces, progress, total)
    CACHE.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        words = json.dumps([table.names, table.notes])
        np.savez(file, words=words, **{field: getattr(table, field) for field in ARRAYS})
    return table


def scan(pieces, progress=None, size_of_all: int = 0) -> Table:
    """Reads all of a text once; size_of_all, if known, tells how long that takes [bytes]."""
    digests, bodies, sources = array("Q"), array("Q"), array("H")
    n_chars, n_bytes, names, notes = array("q"), array("q"), {}, []
    digest, body, chars, size = hashlib.sha256(), hashlib.blake2b(digest_size=8), 0, 0
    total, started, said = 0, 0.0, 0.0
    for source, text, ends in pieces(notes.append):
        started = started or time.monotonic()  # not before all files were looked into
        data = text.encode()
        digest.update(data)
        body.update(data.translate(None, b" \n\t"))
        chars, size, total = chars + len(text), size + len(data), total + len(data)
        if ends:
            digests.append(int.from_bytes(digest.digest()[:8], "little"))
            bodies.append(int.from_bytes(body.digest(), "little"))
            n_chars.append(chars)
            n_bytes.append(size)
            sources.append(names.setdefault(source, len(names)))
            digest, body, chars, size = hashlib.sha256(), hashlib.blake2b(digest_size=8), 0, 0
        if progress and time.monotonic() - said > 0.2:
            said = time.monotonic()
            line = f"reading    {total / 1e6:,.0f} MB, {len(digests):,} documents"
            if total < size_of_all and said > started + 0.2:
                left = (said - started) * (size_of_all / total - 1)
                line = (
                    line.replace(" MB", f" of {size_of_all / 1e6:,.0f} MB") + f", {left:.0f} s left"
                )
            progress(line)
    arrays = (np.array(column) for column in (digests, bodies, n_chars, n_bytes, sources))
    return Table(*arrays, list(names), brief(notes))


def brief(notes: list[str], most: int = 8) -> list[str]:
    """Each note once; one that holds for many files names the first and how many more.

    >>> brief(["a.csv: 2 rows", "b.csv: 2 rows", "b.csv has pages"])
    ['a.csv (and 1 more): 2 rows', 'b.csv has pages']
    """
    names = {}
    for note in dict.fromkeys(" ".join(note.split()) for note in notes):
        name, colon, what = note.partition(": ")
        names.setdefault(colon + what if what else note, []).append(name if what else "")
    lines = [
        first + (f" (and {len(others):,} more)" if others else "") + what
        for what, (first, *others) in names.items()
    ]
    return lines[:most] + [f"and {len(lines) - most:,} other notes"] * (len(lines) > most)


def split(name: str, pieces, table: Table, scan=scan) -> Corpus:
    """One document in ten for validation, chosen by its content; a few long ones by position.

    By content: adding documents later moves none from one side to the other. Copies (but for white
    space) are left out. Of what is held out, as much is used as tells the loss well enough.
    """
    fresh = one_of_copies(table)
    if not fresh.any():
        raise ValueError(f"{name} is empty; name a file with text in it")
    n, copies = fresh.sum(), np.sum(~fresh)
    key = hashlib.sha256(table.digests.tobytes() + table.sources.tobytes()).hexdigest()[:16]
    used = np.unique(table.sources[fresh])  # not those of copies alone
    places = np.searchsorted(used, table.sources)
    table = table._replace(sources=places, names=[table.names[i] for i in used])
    if ends := ends_of_training(table, fresh):
        pieces = partial(cut, Documents(pieces, fresh, 0, table.sources), ends)
        table = scan(pieces)._replace(notes=table.notes)
        fresh = np.ones(len(table.digests), bool)
    held_out, how = fresh & by_content(table), []
    for source, end in ends.items():
        own = table.sources == table.names.index(source)
        held_out[own] = np.cumsum(table.n_chars[own]) > end
        share = table.n_chars[held_out & own].sum() / table.n_chars[own].sum()
        how.append(f"the last {100 * share:.3g}% of {source or name} for validation")
    val, train = few_of(held_out, table), fresh & ~held_out
    if len(ends) < len(table.names):
        how.insert(0, f"{n:,} documents, {val.sum():,} of them for validation")
    if left := held_out.sum() - val.sum():
        how.append(f"{left:,} more held out and not used")
    if copies:
        how.append(f"{copies:,} copies left out")
    sources = table.names if len(table.names) > 1 else [name]
    sides = (
        Documents(pieces, side, int(table.n_bytes[side].sum()), table.sources[side])
        for side in (train, val)
    )
    return Corpus(name, "; ".join(how + table.notes), key, sources, *sides)


def one_of_copies(table: Table) -> np.ndarray:
    """True for one document of each body, whatever their order."""
    order = np.lexsort((table.digests, table.bodies))
    fresh = np.zeros(len(order), bool)
    fresh[order[np.append(True, np.diff(table.bodies[order]) != 0)[: len(order)]]] = True
    return fresh


def by_content(table: Table) -> np.ndarray:
    """Whether a document is held out: by a byte of its hash, one in ten."""
    return (table.digests & np.uint64(255)) % 10 == 0


def ends_of_training(table: Table, fresh: np.ndarray) -> dict[str, int]:
    """{source: characters} for the sources of so few documents that the split cuts one of them."""
    ends = {}
    for source, name in enumerate(table.names):
        own = fresh & (table.sources == source)
        held_out = own & by_content(table)
        if own.sum() < FEW or held_out.sum() in (0, own.sum()):
            total = int(table.n_chars[own].sum())
            ends[name] = max(int(0.9 * total), total - MOST_VAL // len(table.names))
    return ends


def cut(documents: Documents, ends: dict[str, int], note=None):
    """Yields (source, text, ends) with a document's end after so many characters of a source."""
    left = dict(ends)
    for source, text, whole in documents.all():
        if (at := left.get(source, 0)) > 0:
            left[source] = at - len(text)
            if at < len(text) or (at == len(text) and not whole):
                yield source, text[:at], True
                text = text[at:]
        if text or whole:
            yield source, text, whole


def few_of(held_out: np.ndarray, table: Table) -> np.ndarray:
    """The held-out documents of the smallest hashes, MOST_VAL bytes shared by the sources."""
    order = np.argsort(table.digests >> np.uint64(8), kind="stable")
    order, chosen = order[held_out[order]], np.zeros_like(held_out)
    for source in range(len(table.names)):
        own = order[table.sources[order] == source]
        before = np.cumsum(table.n_bytes[own]) - table.n_bytes[own]
        chosen[own[before < MOST_VAL / len(table.names)]] = True
    return chosen


# --- 3. Drawn corpora -----------------------------------------------------------------------------


def read_drawn(name: str, train_bytes: int = 0) -> Corpus:
    """A drawn corpus with its exact floor, and what each byte of the validation text is."""
    paths = DRAWN[name].write(CACHE, train_bytes) if train_bytes else DRAWN[name].write(CACHE)
    (train, key), (val, val_key) = (read_own(path) for path in (paths.train, paths.val))
    kinds, bits = [], np.zeros(len(KINDS))
    for document, (_, _, spans) in zip(val, json.loads(paths.floor.read_text()), strict=True):
        kind = np.full(len(document) + len(SEPARATOR), KINDS.index("rest"), np.uint8)
        for start, end, of, cost in spans:
            kind[start:end] = KINDS.index(of)
            bits[KINDS.index(of)] += cost
        kinds.append(kind)
    how = f"{len(train):,} documents drawn by data/{name}.py, {len(val):,} others for validation"
    key = f"{name}-{key}-{val_key}"
    return Corpus(name, how, key, [name], train, val, np.concatenate(kinds), bits)


def read_own(path: Path) -> tuple[Documents, str]:
    """All documents of a file that stories.save made, and a key of their content."""

    def pieces():
        with open(path, "rb") as file:
            for text, ends in split_documents(formats.text_blocks(file, path.name)):
                yield "", text, ends

    n, digest = 0, hashlib.sha256()
    for _, text, _ in pieces():
        digest.update(f"{text}{stories.END}".encode())
        n += 1
    size = path.stat().st_size - n * len(stories.END)
    documents = Documents(pieces, np.ones(n, bool), size, np.zeros(n, np.uint8))
    return documents, digest.hexdigest()[:8]


def mix(corpora: list[Corpus]) -> Corpus:
    """All of these corpora as one, each with its own validation text, and its floor if it has one.

    ValueError if two have a source of one name.
    """
    names = [source for corpus in corpora for source in corpus.sources]
    if doubled := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two of the sources are called {doubled[0]}; rename the file or folder")

    def side(parts: list[Documents]) -> Documents:
        before = np.cumsum([0] + [len(corpus.sources) for corpus in corpora])
        sources = [part.sources.astype(int) + n for part, n in zip(parts, before, strict=False)]
        everything = np.ones(sum(map(len, parts)), bool)
        n_bytes = sum(part.n_bytes for part in parts)

        def read():
            return itertools.chain.from_iterable(part.all() for part in parts)

        return Documents(read, everything, n_bytes, np.concatenate(sources))

    key = hashlib.sha256("\n".join(corpus.key for corpus in corpora).encode()).hexdigest()[:16]
    return Corpus(
        "-".join(corpus.name for corpus in corpora)[:60],
        "; ".join(corpus.how for corpus in corpora),
        key,
        names,
        side([corpus.train for corpus in corpora]),
        side([corpus.val for corpus in corpora]),
        floors={corpus.name: corpus.floor for corpus in corpora if corpus.floor},
    )


# --- 4. Command line ------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser("data/datasets.py", description="Fetches a public data set.")
    parser.add_argument("name", nargs="?", metavar="NAME", choices=sorted(download.SETS))
    parser.add_argument("--limit", metavar="SIZE", type=download.size, help="500MB, 2GB, ...")
    with one_line_errors("stopped; the same command goes on where it stopped"):
        asked = parser.parse_args(arguments)
        if not asked.name:
            for name, source in download.SETS.items():
                print(f"python data/datasets.py {name:16} # {source.page}")
            return
        path = download.fetch(asked.name, SETS / asked.name, asked.limit)
        print(f"{path} ({path.stat().st_size / 1e6:,.1f} MB)")
        print(f"next: python train.py --data {asked.name}")


if __name__ == "__main__":
    main()
