"""Files to documents: folders, zips, texts, tables, and the little cleaning that known sets need.

A zip is read where it lies and never unpacked, so none of its members can land anywhere. Nothing is
ever read whole: each reader is a generator of (text, ends), and a document longer than PIECE comes
in pieces, of which the last one `ends`. Pieces are cut only where no word of bpe.py changes.

Which set a file belongs to is seen from its layout alone, wherever it came from:

| layout                                   | a document is | cleaned                               |
|------------------------------------------|---------------|---------------------------------------|
| .../business/001.txt and four more (BBC) | a file        | cp1252 where it is not UTF-8          |
| .../AA/wiki_00 (Wikipedia)               | an article    | "word ()" to "word"                   |
| a csv with a speaker and a line          | a scene       | stage directions out                  |
| a csv with page, section_title, text     | a page        | formulas folded, "word ()" to "word"  |
| any other .csv .tsv .jsonl .json .parquet| a row         | messages, prompt and answer: joined   |
| a hub's README.md beside tables          | as above      | the tables alone are read             |
| code beside .json that has no rows       | a file        | such a .json is text like the code    |
| .ipynb                                   | a file        | its cells, without what they put out  |
| any other text                           | a file, or what lines <|endoftext|> separate in it    |
"""

import codecs
import contextlib
import gzip
import io
import itertools
import json
import lzma
import os
import re
import shlex
import struct
import zipfile
import zlib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

from data.rows import LONGEST_LINE, TABLES, TALKS, TEXT_ALONE, few, read_rows
from data.unpack import PACKED, unpacked

SEPARATOR = "<|endoftext|>"  # a line of its own in files, a token for the model
BLOCK = 1 << 20  # read at a time [bytes]
PIECE = 1 << 20  # longer documents come in pieces [characters]
ABOUT = re.compile(r"readme|licen[sc]e|citation|dataset_(infos?|dict)\.json|state\.json", re.I)
NO_TEXT = {  # how files begin that are no text, and what to do
    b"%PDF": "a PDF; write its text to a file: pdftotext FILE",
    b"PK\3\4": "a zip or an Office document (.docx); save it as plain text",
    b"\x89PNG": "an image; name a file of text",
    b"\xff\xd8\xff": "an image; name a file of text",
    b"GIF8": "an image; name a file of text",
    b"II*\0": "an image; name a file of text",
    b"MM\0*": "an image; name a file of text",
    b"RIFF": "an image, sound or film; name a file of text",
    b"PAR1": "Parquet; name it FILE.parquet",
    b"\x28\xb5\x2f\xfd": "packed by zstd; name it FILE.zst",
    b"BZh": "packed by bzip2; name it FILE.bz2",
    b"\xfd7zXZ": "packed by xz; name it FILE.xz",
    b"version https://git-lfs": "a pointer of Git LFS, not the file; fetch that: git lfs pull",
    b"\x1f\x8b": "packed by gzip; name it FILE.gz",
    b"\xd0\xcf\x11\xe0": "an Office document; save it as plain text",
    b"7z\xbc\xaf": "a 7z archive; unpack it and name the folder: 7z x FILE",
    b"Rar!": "a rar archive; unpack it and name the folder: unrar x FILE",
    b"ARROW1": "Arrow; save it as Parquet, with to_parquet",
    b"\xff\xff\xff\xff": "Arrow; save it as Parquet, with to_parquet",
}
IN_ZIPS = {  # what tells zips apart that are documents
    b"word/document.xml": "a Word document (.docx); save it as plain text",
    b"xl/workbook.xml": "an Excel table (.xlsx); save it as .csv",
    b"ppt/presentation.xml": "PowerPoint slides (.pptx); save them as plain text",
    b"mimetypeapplication/vnd.oasis": "an OpenDocument file (.odt); save it as plain text",
    b"mimetypeapplication/epub+zip": "an e-book (.epub); turn it into text: pandoc -t plain FILE",
}
KINDS = {  # what else a folder may hold, and what to do
    ".docx .doc": "Word: save as text",
    ".xlsx .xls": "Excel: save as .csv",
    ".pptx .ppt": "PowerPoint: save as text",
    ".odt .ods .odp": "OpenDocument: save as text",
    ".epub": "e-book: pandoc -t plain FILE",
    ".pdf": "PDF: pdftotext FILE",
    ".arrow": "Arrow: save as Parquet, with to_parquet",
    ".zip": "unpack it",
    ".png .jpg .jpeg .gif .webp .bmp .tif .tiff .heic .ico": "image",
}
KIND_OF = {suffix: f" ({kind})" for suffixes, kind in KINDS.items() for suffix in suffixes.split()}
CATEGORIES = "business entertainment politics sport tech".split()
BBC = re.compile(rf"(?:^|/)({'|'.join(CATEGORIES)})/\d+\.txt$")
WIKI = re.compile(r"(?:^|/)[A-Z]{2}/wiki_\d+$")
MOST_SOURCES = 8  # more subfolders than that are no kinds of text

# --- 1. What is there: files, and members of zips -------------------------------------------------


class Member(NamedTuple):
    path: Path  # of a file, or of the zip it is in
    inside: str  # its name in the zip, else ""
    name: str  # as a person would look for it
    source: str = ""  # the kind of text, where folders tell: "sport"


def find(path: Path, suffixes: str = "", progress=None) -> list[Member]:
    """The files of text at a path in a stable order; of a known set only what belongs to it.

    In a folder that is every UTF-8 file, of whatever suffix: code is text. What is left out is what
    `left_out` names. suffixes: only files with one of these, ".py,.md".
    """
    if path.is_file() and not is_zip(path):
        return [Member(path, "", path.name)]  # whatever it is called
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(
            f"{path} is a pipe or device, to be read once only; save its text in a file"
        )
    members = chosen = members_of(path)
    if suffixes:
        wanted = {f".{suffix.strip().lstrip('*.').lower()}" for suffix in suffixes.split(",")}
        chosen = [m for m in members if wanted & {kind(m.name), Path(m.name.lower()).suffix}]
    if members and not chosen:
        have = ", ".join(some_of(Counter(kind(m.name) or m.name for m in members)))
        raise ValueError(f"{path} has no file that ends in {suffixes}; it has {have}")
    bbc = [m for m in chosen if BBC.search(m.name) and "/Summaries/" not in f"/{m.name}"]
    if {BBC.search(m.name)[1] for m in bbc} == set(CATEGORIES):
        return [m._replace(source=BBC.search(m.name)[1]) for m in bbc]
    wiki = [m for m in chosen if WIKI.search(m.name)]
    if wiki:
        return wiki
    texts = []
    for n, (member, file) in enumerate(opened(chosen)):
        if progress and n % 500 == 0:
            progress(f"reading    the first lines of {n:,} of {len(chosen):,} files")
        texts += [member] * is_text(member, file)
    return by_folder(of_a_hub(texts))


def members_of(path: Path) -> list[Member]:
    """All files below a folder, and the members of its zips, but for the hidden ones."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    members = []
    for file in files:
        name = file.name if file == path else file.relative_to(path).as_posix()
        if is_zip(file):
            members += [Member(file, inside, f"{name}/{inside}") for inside in zip_names(file)]
        else:
            members.append(Member(file, "", name))
    hidden = re.compile(r"(?:^|/)(?:\.|__MACOSX/)")
    return [m for m in members if not hidden.search(m.name)]


def kind(name: str) -> str:
    """The suffix of what a file holds once it is unpacked: of rows.jsonl.gz it is ".jsonl"."""
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in PACKED else path.suffix


def of_a_hub(members: list[Member]) -> list[Member]:
    """Of a data set with the README.md of a hub, its tables; beside Parquet no README is text."""
    tables = [m for m in members if kind(m.name) in TABLES and not ABOUT.match(Path(m.name).name)]
    card = next((m for m in members if m.name.rpartition("/")[2].lower() == "readme.md"), None)
    is_hub = card and any(file.read(4) == b"---\n" for _, file in opened([card]))
    if is_hub and tables:
        return tables
    of_arrow = all(ABOUT.match(Path(m.name).name) and kind(m.name) == ".json" for m in members)
    if is_hub or of_arrow or any(kind(m.name) == ".parquet" for m in tables):
        return [m for m in members if m in tables or not ABOUT.match(Path(m.name).name)]
    return members


def is_text(member: Member, file) -> bool:
    """Whether an open file may be text. One in an older encoding may: its reader names the byte."""
    try:
        start = file.read(4096)
    except (*UNZIPPING, OSError) as error:
        raise damaged(member, error) from None
    if kind(member.name) == ".parquet" and start[:4] == b"PAR1":
        return True
    is_known = start.startswith(tuple(NO_TEXT)) or start[257:262] == b"ustar"
    if start.startswith(b"version https://git-lfs"):  # a pointer to text is refused by its reader
        is_known = kind(member.name) in KIND_OF
    return bool(looks_like_utf16(start)) or not is_known and b"\0" not in start


def left_out(path: Path, members: list[Member]) -> str:
    """What of a folder or zip is not read, as "3 .png (image)"; of a known set nothing."""
    is_one = path.is_file() and not is_zip(path)
    if is_one or any(m.source in CATEGORIES or WIKI.search(m.name) for m in members):
        return ""
    kept = {m[:2] for m in members}
    names = [Path(m.name) for m in members_of(path) if m[:2] not in kept]
    suffixes = Counter(name.suffix.lower() or name.name for name in names)
    for folder, inner, _ in os.walk(path):
        inner[:] = [name for name in inner if name[0] != "."]  # walk goes into these
        for p in (os.path.join(folder, name) for name in inner):
            suffixes["link(s) to folders (name those: A,B)"] += os.path.islink(p)
            suffixes["closed folder(s)"] += not os.access(p, os.R_OK | os.X_OK)
    return ", ".join(some_of(+suffixes))  # +: without those of which there are 0


def some_of(suffixes: Counter) -> list[str]:
    """The commonest of them, as "3 .png (image)"."""
    ordered = sorted(suffixes.items(), key=lambda item: (-item[1], item[0]))
    return [f"{n} {suffix}{KIND_OF.get(suffix, '')}" for suffix, n in ordered[:6]]


def is_zip(path: Path) -> bool:
    return path.suffix.lower() == ".zip"


def by_folder(members: list[Member]) -> list[Member]:
    """The members with the topmost folders that tell them apart as sources, if these are few."""
    parts = [m.name.split("/") for m in members]
    depth = 0
    while members and min(map(len, parts)) > depth + 1 and len({p[depth] for p in parts}) == 1:
        depth += 1
    tops = {p[depth] for p in parts if len(p) > depth + 1}
    if not 2 <= len(tops) <= MOST_SOURCES or any(len(p) == depth + 1 for p in parts):
        return members
    return [m._replace(source=p[depth]) for m, p in zip(members, parts, strict=True)]


def zip_names(path: Path) -> list[str]:
    """Names of a zip's files, sorted. Refused: what is no zip, wants a password, or is a bomb."""
    try:
        with zipfile.ZipFile(path) as archive:
            files = [info for info in archive.infolist() if not info.is_dir()]
    except UNZIPPING:
        raise ValueError(f"{path} is no whole zip; delete it and fetch it again") from None
    if any(info.flag_bits & 1 for info in files):
        raise ValueError(f"{path} wants a password; unpack it yourself and name the folder")
    sizes = [(info.file_size, info.compress_size) for info in files]
    for whole, packed in (*sizes, (sum(size for size, _ in sizes), path.stat().st_size)):
        if whole > max(100 * packed, 1 << 26):  # text shrinks to a third, hardly to a tenth
            raise ValueError(
                f"{path} would unpack from {packed / 1e6:.1f} to {whole / 1e6:,.0f} MB, as no "
                f"text does; unpack it yourself if you trust it, and name the folder"
            )
    return sorted(info.filename for info in files)


def opened(members: list[Member]):
    """Yields each member and its open binary file; a zip stays open from one to the next."""
    for path, group in itertools.groupby(members, key=lambda member: member.path):
        with zipfile.ZipFile(path) if is_zip(path) else contextlib.nullcontext() as archive:
            for member in group:
                try:
                    file = archive.open(member.inside) if archive else open(path, "rb")
                except (*UNZIPPING, KeyError, RuntimeError) as error:  # no such name; a password
                    raise damaged(member, error) from None
                with file, unpacked(file, Path(member.name.lower()).suffix) as content:
                    yield member, content


# What zipfile raises at archives that are damaged, or packed in a way it doesn't know.
UNZIPPING = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error)
UNZIPPING += (EOFError, NotImplementedError, OverflowError, gzip.BadGzipFile)


def name_of(member: Member) -> str:
    return f"{member.path}/{member.inside}".rstrip("/")


def damaged(member: Member, error: Exception) -> Exception:
    if isinstance(error, OSError) and error.errno:  # of the disk; bz2 raises one without a number
        return error
    at = f" at {member.inside}" if member.inside else ""
    return ValueError(
        f"{member.path} is damaged{at}, or packed in a way Python can't unpack "
        f"({str(error)[:100]}); fetch it again, or unpack it yourself and name the folder"
    )


# --- 2. Bytes to text -----------------------------------------------------------------------------


class NotUTF8(ValueError):
    """A file in another encoding, or of no text; its message says which and what to do."""


def text_blocks(file, name: str):
    """Yields the text of a UTF-8 file block by block, with line ends of any system as \\n.

    ValueError names the byte that is not UTF-8. A byte-order mark is no text and left out.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    decoder, done = io.IncrementalNewlineDecoder(decoder, translate=True), 0
    for data in itertools.chain(iter(partial(file.read, BLOCK), b""), [b""]):
        if not done and (what := what_else(data)):
            raise ValueError(f"{name} is {what.replace('FILE', name)}")
        if not done and (kind := looks_like_utf16(data)):
            raise NotUTF8(
                f"{name} is {kind[:6].upper()} text, not UTF-8 (byte 0 is 0x{data[0]:02x}); "
                f"convert it: {iconv(kind, name)}"
            )
        if b"\0" in data:
            raise NotUTF8(f"{name} is not text (it has a zero byte); name a plain text file")
        done += len(data)
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:  # error.object: `data` and what was held back
            at = done - len(error.object) + error.start
            start = f"{name} is not UTF-8 text (byte {at} is 0x{error.object[error.start]:02x})"
            if error.object[: error.start].isascii():
                raise NotUTF8(f"{start}; {from_older(error.object, name)}") from None
            raise NotUTF8(f"{start} but was till there; drop it: {iconv('utf-8', name)}") from None
        yield text


def from_older(data: bytes, name: str) -> str:
    """What to do with text that is not UTF-8: of few letters beyond ASCII it is Western."""
    letters = len(re.findall(rb"[A-Za-z]", data))
    if len(re.findall(rb"[\x80-\xff]", data)) <= max(3, letters):  # 3: what a file may end in
        return f"convert it: {iconv('cp1252', name)}"
    return f"convert it from cp1251, gb18030, shift_jis or what it is: {iconv('ENCODING', name)}"


def iconv(encoding: str, name: str) -> str:
    """The command that makes a file UTF-8, and drops what is not if it is nearly so."""
    drop = "-c " if encoding == "utf-8" else ""
    suffix = kind(name) if kind(name) in TABLES else ".txt"
    return f"iconv {drop}-f {encoding} -t utf-8 {shlex.quote(name)} > utf8{suffix}"


def cells(data: bytes) -> str:
    """The text of a notebook, cell by cell; none if it is no notebook."""
    with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
        sources = [cell["source"] for cell in json.loads(data)["cells"]]
        text = "\n\n".join(s if isinstance(s, str) else "".join(s) for s in sources)
        return text.encode("utf-8", "replace").decode()
    return ""


def what_else(data: bytes) -> str:
    """What a file is that begins so, and what to do, if it is known and no text."""
    what = next((what for start, what in NO_TEXT.items() if data.startswith(start)), "")
    if data[257:262] == b"ustar":
        return "a tar archive; unpack it and name the folder: tar -xf FILE"
    inside = IN_ZIPS.items() if data.startswith(b"PK\3\4") else ()
    return next((what for name, what in inside if name in data), what)


def looks_like_utf16(data: bytes) -> str:
    """iconv's name for the encoding: by its mark, else by zeros in every other byte."""
    if data[:4] in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):
        return "utf-32"
    if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "utf-16"
    for kind, start in (("utf-16le", 1), ("utf-16be", 0)):
        other = data[start:1000:2]
        if (
            len(data) > 20
            and other.count(0) > 0.7 * len(other)
            and not data[1 - start : 1000 : 2].count(0)
        ):
            return kind
    return ""


# --- 3. Text to documents -------------------------------------------------------------------------

separator_line = re.compile(rf"^[^\S\n]*{re.escape(SEPARATOR)}[^\S\n]*(?:\n|\Z)", re.M)
# Where bpe.py may be given a text in two parts: after a line break before a non-space, and before
# a space after a non-space; here not before what is or may become a separator, which would then
# stand on a line of its own.
find_cut = re.compile(r"(?<=\n)(?=\S)|(?<=\S)(?= (?!\s*(?:<\||<?\Z)))")


def split_documents(blocks):
    """Yields (text, ends): the parts between lines that hold nothing but the separator.

    Line breaks around a separator go with it. Blank documents are left out.
    """
    text, inside, separated, clear = "", False, False, 0  # clear: no cut is before it
    for block in itertools.chain(blocks, [None]):
        text += block or ""
        known = len(text) if block is None else text.rfind("\n") + 1  # the last line may go on
        *documents, rest = parts_of(text[:known])
        for document in documents:
            document = document.rstrip("\n") if inside else document.strip("\n")
            if inside or document.strip():
                yield document, True
            inside, separated, clear = False, True, 0
        text = rest + text[known:]
        text = text if inside else text.lstrip("\n")
        while len(text) > PIECE and block is not None:
            cut = find_cut.search(text, max(PIECE, clear))
            clear = len(text.rstrip().rstrip("<").rstrip())  # at the end a cut may still come
            if not cut and len(text) < 16 * PIECE:
                break
            at = cut.start() if cut else PIECE  # 16 megabytes without a gap: no text that we know
            yield text[:at], False
            text, inside, clear = text[at:], True, 0 if cut else clear - at
    text = text.rstrip("\n") if separated else text
    if inside or text.strip():
        yield text, True


def parts_of(text: str) -> list[str]:
    return separator_line.split(text) if SEPARATOR in text else [text]  # 10 times as fast to ask


def split_articles(blocks):
    """Yields the articles of a Wikipedia dump: three or more blank lines separate them."""
    text = ""
    for block in itertools.chain(blocks, [None]):
        text += block or ""
        *whole, text = re.split(r"\n(?:[^\S\n]*\n){3,}", text)
        if block is None:
            whole.append(text)
        for article in whole:
            if article.strip():
                yield remove_empty_brackets(article.strip("\n")), True


def remove_empty_brackets(text: str) -> str:
    """Without the brackets whose content (a pronunciation, say) was lost on the way.

    >>> remove_empty_brackets("an algorithm () is f() ( )")
    'an algorithm is f()'
    """
    return re.sub(r" \([\s,;]*\)", "", text)


def fold_formulas(text: str) -> str:
    r"""Each formula that MathML spread over a ladder of lines, as its last rung: the TeX.

    >>> fold_formulas("the field \n  \n    \n      B\n    \n    \\mathbf {B}\n  , in terms")
    'the field \\mathbf {B}, in terms'
    """
    tex = re.compile(r"\{\\displaystyle (.*)\}")

    def last_rung(found):
        rung = found[1].strip()
        return " " + (tex.fullmatch(rung) or [rung, rung])[1].strip()

    return re.sub(r"[^\S\n]*\n  \n(?: {4,}[^\n]*\n)* {4,}(\S[^\n]*)\n {2}", last_rung, text)


def remove_directions(line: str) -> str:
    """A spoken line without what is not spoken.

    >>> remove_directions("Ay me! [Aside] She speaks. [Exit]")
    'Ay me! She speaks.'
    """
    return " ".join(re.sub(r"\[[^\]]*\]", " ", line).split())


# --- 4. Tables to documents -----------------------------------------------------------------------

# Column names without capitals and punctuation, likeliest first; a word that starts so will do for
# the first two, as nobody agreed on them ("Speaker Name", "movie_lines", but no "headline").
SPEAKERS = ("player", "speaker", "character")
LINES = ("playerline", "textentry", "dialogue", "dialog", "quote", "speech", "line", "text")
PLAYS = ("play", "playname", "movie", "film", "movietitle", "title", "episode")
PLACES = ("actsceneline", "linenumber")  # "1.2.77": act, scene, line; empty: nobody speaks
TEXTS = (*TEXT_ALONE, *TALKS, "review", "description")
# What is asked and what is answered, in reading order: a row with both is like messages.
ASKED = ("system", "systemprompt", "instruction", "context", "prompt", "question", "query")
ASKED += ("problem", "input", "inputs")
ANSWERED = ("completion", "response", "output", "answer", "answers", "answerstext", "solution")
ANSWERED += ("targets", "chosen")


def column(header, wanted: tuple, part=False) -> str | None:
    """The column that has the first of the wanted names, or one with a word that starts so."""
    plain = {name: re.sub("[^a-z]", "", name.lower()) for name in header if name}
    exact = [name for want in wanted for name in plain if plain[name] == want]
    numbers = ("number", "id", "no", "dataline", "place")
    parts = [
        name
        for want in wanted
        for name in plain
        if part and not plain[name].endswith(numbers)
        if any(word.startswith(want) for word in words(name))
    ]
    return next(iter(exact + parts), None)


def words(name: str) -> list[str]:
    """Of "speaker_name" and "SpeakerName" speaker and name."""
    return [word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", name)]


def table(rows, name: str, text_column: str, note, is_table=True):
    """Yields the documents of a table, and tells note() which columns they come from.

    is_table: for sure; else a .json without rows that have a text is refused, as settings.
    """
    rows = iter(rows)
    first = few(rows)
    rows, header = itertools.chain(first, rows), list(dict.fromkeys(k for r in first for k in r))
    if not first:
        return iter(())
    if text_column:
        chosen = [text_column] if text_column in header else text_column.split(",")
        if missing := [name for name in chosen if name not in header]:
            have = ", ".join(map(str, header))
            raise ValueError(f"{name} has no column {missing[0]!r}; it has: {have}")
        return texts_of(rows, chosen, name, note)
    if {"page", "section_title", "text"} <= set(header):
        note(f"{name} has pages in sections")
        return pages(rows)
    speaker, line = column(header, SPEAKERS, part=True), column(header, LINES, part=True)
    names = [row.get(speaker) or "" for row in first]
    if (
        speaker
        and line
        and speaker != line
        and not all(n.strip(" .0123456789") == "" for n in names)
    ):
        note(f"{name} has lines {line!r} of speakers {speaker!r}")
        return scenes(rows, speaker, line, column(header, PLAYS), column(header, PLACES))
    chosen, is_named = guess(header, first)
    if not is_table and kind(name) == ".json" and not (is_named and len(first) > 1):
        raise ValueError(f"{name} has no rows with a text")
    some = f"column{'s' * (len(chosen) > 1)} {' and '.join(map(repr, chosen))}"
    note(f"{name}: text is {some} (another: --text_column)")
    return texts_of(rows, chosen, name, note)


def guess(header, first) -> tuple[list[str], bool]:
    """The columns of the text, seen from the first rows, and whether their names tell."""
    if text := column(header, TEXTS):
        system = column(header, ASKED[:2]) if text.lower() in TALKS else None
        return ([system] if system else []) + [text], True
    asked, answered = (
        [found for want in wanted if (found := column(header, (want,)))]
        for wanted in (ASKED, ANSWERED)
    )
    if asked and answered:
        return list(dict.fromkeys(asked + answered)), True
    inner = {name.rpartition(".")[2]: name for name in header}  # of "row.text" the end
    if text := column(inner, (*TEXTS, "chosen")):  # beside "rejected", the prompt in both
        return [inner[text]], True
    looks = {name: prose(row.get(name) or "" for row in first) for name in header}
    return [max(looks, key=looks.get, default="")], False


def prose(texts) -> tuple[int, int]:
    """How much like prose a column is: its characters in words of letters, then those in all."""
    words = [word for text in texts for word in text.split()]
    letters = sum(len(word) for word in words if not re.search(r"[\d/@_\\]", word))
    return letters, sum(map(len, words))


def texts_of(rows, chosen: list[str], name: str, note):
    """Yields the texts in a column, or in several as in messages, and says how many rows have none.

    >>> list(texts_of([{"prompt": "Hi", "answer": "Hello."}], ["prompt", "answer"], "", print))
    ['prompt:\\nHi\\n\\nanswer:\\nHello.']
    """
    missing, n, (one, *others) = 0, 0, chosen
    for n, row in enumerate(rows, 1):
        text = row.get(one) or ""
        if others:
            parts = ((name, row.get(name) or "") for name in chosen)
            parts = ((f"{name}:\n" * (name.lower() not in TALKS), part) for name, part in parts)
            text = "\n\n".join(label + part for label, part in parts if part.strip())
        missing += not text.strip()
        yield text
    if missing:
        names = " and ".join(map(repr, chosen))
        note(f"{name}: {missing:,} of {n:,} rows have no text in {names} and are left out")


def pages(rows):
    """A page's sections, each under its title, formulas folded."""
    for page, sections in itertools.groupby(rows, key=lambda row: row["page"]):
        parts = [page or ""]
        for row in sections:
            text = remove_empty_brackets(fold_formulas(row["text"] or ""))
            parts += [row["section_title"] or "", text]
        yield "\n\n".join(part.strip() for part in parts if part.strip())


def scenes(rows, speaker: str, line: str, play: str | None, place: str | None):
    """A scene's speeches: NAME:, the lines, a blank line. Rows that nobody speaks are left out."""

    def scene(row):  # "5.2.381" is line 381 of scene 5.2; a plain number says nothing
        return row.get(play), (row.get(place) or "").rpartition(".")[0]

    spoken = (row for row in rows if (not place or row.get(place)) and row.get(speaker))
    for _, group in itertools.groupby(spoken, key=scene):
        speeches = []
        for name, speech in itertools.groupby(group, key=lambda row: row[speaker].strip()):
            said = [remove_directions(row.get(line) or "") for row in speech]
            if any(said):
                speeches.append("\n".join([f"{name}:", *filter(None, said)]))
        yield "\n\n".join(speeches)


# --- 5. All of it ---------------------------------------------------------------------------------


def documents(members: list[Member], text_column: str = "", note=lambda line: None):
    """Yields (source, text, ends) of all documents of these files, one after the other.

    One of many files that turns out not to be UTF-8 is left out, and so is, beside files of another
    kind, one that is called like a table and is none read as text; notes say so.
    """
    bad, plain = [], []
    are_tables = all(kind(member.name) in TABLES for member in members)
    for member, file in opened(members):
        begun = False
        try:
            try:
                pairs = documents_of(member, file, text_column, note, are_tables)
            except NoTable as error:
                plain.append(error)
                file.seek(0)
                pairs = split_documents(text_blocks(file, name_of(member)))
            for text, ends in pairs:
                begun = True
                yield member.source, text, ends
        except NotUTF8 as error:
            if begun or len(members) == 1 or are_tables:
                raise
            bad.append(error)
        except (*UNZIPPING, OSError) as error:
            raise damaged(member, error) from None
    if bad and len(bad) == len(members):
        raise bad[0]
    for what, errors in (("left out", bad), ("read as plain text", plain)):
        others = f" (and {len(errors) - 1:,} more)" if len(errors) > 1 else ""
        if errors:
            note(f"{what}: {errors[0]}{others}")


class NoTable(ValueError):
    """A file that is called like a table and has no rows."""


def documents_of(member: Member, file, text_column: str, note, is_table=True):
    """Yields (text, ends) of one file, read as its name and its first line ask for.

    NoTable if it is no table, unless it is one for sure.
    """
    if member.source in CATEGORIES and BBC.search(member.name):
        return split_documents([utf8_or_cp1252(file.read())])
    suffix, name = kind(member.name), name_of(member)
    if suffix in TABLES:
        content = file if suffix == ".parquet" else text_blocks(file, name)
        try:
            rows = read_rows(suffix, content, member.name)
            texts = table(rows, member.name, text_column, note, is_table)
        except NotUTF8:
            raise
        except ValueError as error:
            if is_table or text_column or suffix == ".parquet":
                raise
            raise NoTable(str(error).partition(";")[0]) from None
        return ((text, True) for text in texts if text.strip())
    if suffix == ".ipynb":
        if text := cells(file.read(LONGEST_LINE)):
            return [(text, True)]
        file.seek(0)
    blocks = text_blocks(file, name)
    return (split_articles if WIKI.search(member.name) else split_documents)(blocks)


def utf8_or_cp1252(content: bytes) -> str:
    """For the BBC set, in which a pound sign of one file is 0xA3."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252", "replace")
    return text.replace("\r\n", "\n")
