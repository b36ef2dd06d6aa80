"""Rows of tables: .csv .tsv .jsonl .json .parquet to dicts of texts, a few in memory at a time."""

import contextlib
import csv
import itertools
import json
import re

TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
BLOCK = 1 << 20  # of a Parquet file, read at a time [bytes]
LONGEST_LINE = 1 << 26  # of a csv or jsonl, or a row of a json [characters]
csv.field_size_limit(LONGEST_LINE)
white_space = re.compile(r"\s*")


def read_rows(suffix: str, content, name: str):
    """Yields the rows of a table, {column: text}.

    content: blocks of text; of Parquet the open file. name: for a message of what is wrong with it.
    """
    readers = {".jsonl": jsonl_rows, ".json": json_rows, ".parquet": parquet_rows}
    return readers.get(suffix, csv_rows)(content, name)


# --- 1. Lines: csv and jsonl ----------------------------------------------------------------------


def lines(blocks, name: str):
    """Yields lines with their \\n, as the csv module wants them."""
    rest = ""
    for block in blocks:
        *whole, rest = (rest + block).split("\n")
        for line in whole:
            yield line + "\n"
        if len(rest) > LONGEST_LINE:
            raise ValueError(
                f"{name} has a line of more than {LONGEST_LINE >> 20} million characters, which no "
                f"table has; if it is plain text, rename it to .txt"
            )
    if rest:
        yield rest


def csv_rows(blocks, name: str):
    """Yields a csv's rows as dicts; the commonest of , ; and tab in its first line separates.

    A row of another number of fields than the header's would lose text, and so would one whose
    quotes never end: ValueError names its line.
    """
    found = lines(blocks, name)
    first = next(found, "")
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(itertools.chain([first], found), delimiter=delimiter, strict=True)
    remedy = "put texts with commas or quotes in quotes; or if it is no table, rename it to .txt"
    try:
        header = next(reader, [])
        if longest := max(header, key=len, default=""):
            if len(longest) > 60:
                raise ValueError(f"{name} begins with text, not with names of columns; add them")
        for row in reader:
            if row and len(row) != len(header):
                raise ValueError(
                    f"{name}, line {reader.line_num}: a row of {len(row)} fields, and the header "
                    f"has {len(header)}; {remedy}"
                )
            if row:
                yield dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"{name}, line {reader.line_num}: {error}; {remedy}") from None


def jsonl_rows(blocks, name: str):
    """Yields the objects of a jsonl file; a line that is a string is an object with `text`."""
    for number, line in enumerate(lines(blocks, name), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError(
                f"{name} is no jsonl at line {number}: {line[:30]!r}; each line must be JSON"
            ) from None
        yield flat_row(row, f"{name}, line {number}")


# --- 2. JSON in one piece -------------------------------------------------------------------------


def json_rows(blocks, name: str):
    """Yields the rows of a JSON file: those of its array, or of the first array in its object.

    The file is never whole in memory. Many call lines of JSON .json, too: each is then a row.
    """
    blocks = iter(blocks)
    start = next(blocks, "")
    first, _, more = start.partition("\n")
    blocks = itertools.chain([start], blocks)
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(json.loads(first), dict) and more.strip():
            yield from jsonl_rows(blocks, name)
            return
    reader, row = JSONReader(blocks, name), {}
    if reader.skip("["):
        yield from (flat_row(r, f"{name}, row {n}") for n, r in enumerate(reader.array(), 1))
    elif reader.skip("{"):
        while not reader.skip("}"):
            key = reader.value()
            reader.expect(":")
            if reader.skip("["):
                yield from (
                    flat_row(r, f"{name}, row {n}") for n, r in enumerate(reader.array(), 1)
                )
                return  # what stands beside the rows is no text
            row[f"{key}"] = reader.value()
            reader.skip(",")
        yield flat_row(row, name)
    else:
        raise reader.error()


class JSONReader:
    """JSON that is read value by value; what was read is forgotten."""

    def __init__(self, blocks, name: str):
        self.blocks, self.name, self.text, self.at = blocks, name, "", 0
        self.decoder = json.JSONDecoder()

    def error(self) -> ValueError:
        return ValueError(f"{self.name} is no JSON at {self.text[self.at : self.at + 30]!r}")

    def more(self) -> bool:
        """Reads a block; False at the end of the file."""
        block = next(self.blocks, None)
        self.text, self.at = self.text[self.at :] + (block or ""), 0
        if len(self.text) > LONGEST_LINE:
            raise self.error()
        return block is not None

    def skip(self, mark: str) -> bool:
        """Whether this mark comes next; if so, it is read."""
        while True:
            self.at = white_space.match(self.text, self.at).end()
            if self.at < len(self.text):
                found = self.text[self.at] == mark
                self.at += found
                return found
            if not self.more():
                return False

    def expect(self, mark: str) -> None:
        if not self.skip(mark):
            raise self.error()

    def value(self):
        self.skip("")  # white space
        while True:
            with contextlib.suppress(ValueError, RecursionError):
                value, end = self.decoder.raw_decode(self.text, self.at)
                if end < len(self.text):  # else it may go on: 12 is also the start of 123
                    self.at = end
                    return value
            if not self.more():
                raise self.error()

    def array(self):
        """Yields the values of an array, of which "[" was read."""
        while not self.skip("]"):
            yield self.value()
            if not self.skip(","):
                self.expect("]")
                return


# --- 3. Parquet -----------------------------------------------------------------------------------


def parquet_rows(file, name: str):
    """Yields the rows of a Parquet file, of the columns with text alone; a few are in memory."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{name} is Parquet, which needs a package: pip install pyarrow") from None
    try:
        table = parquet.ParquetFile(file, buffer_size=BLOCK, pre_buffer=False)
        names = [field.name for field in table.schema_arrow if "string" in f"{field.type}"]
        if not names:
            have = ", ".join(table.schema_arrow.names)
            raise ValueError(f"{name} has no column of text; it has: {have}")
        for batch in table.iter_batches(64, columns=names, use_threads=False):
            yield from (flat_row(row, name) for row in batch.to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:100]
        raise ValueError(f"{name} is no whole Parquet file ({reason}); fetch it again") from None


# --- 4. Values to texts ---------------------------------------------------------------------------


def flat_row(row, where: str) -> dict:
    """The texts of a JSON row by name: those of objects inside by "outer.inner", lists joined.

    >>> flat_row({"id": 3, "data": {"text": ["a", "b"]}}, "x.json, row 1")
    {'data.text': 'a\\nb'}
    >>> flat_row({"messages": [{"role": "user", "content": "Hi"}]}, "x.json, row 1")
    {'messages': 'user:\\nHi'}
    """
    if isinstance(row, str):
        row = {"text": row}
    if not isinstance(row, dict):
        raise ValueError(f"{where} is neither an object nor a string")
    flat = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": text for inner, text in flat_row(value, where).items()}
        if isinstance(value, list):
            value = joined(value, where)
        if isinstance(value, str):
            value = value.encode("utf-8", "replace").decode()
            flat[name] = value.replace("\r\n", "\n").replace("\r", "\n")
    return flat


ROLES, SAYINGS = ("role", "from", "speaker"), ("content", "value", "text")


def joined(parts: list, where: str) -> str:
    """The texts of a list in a row; of messages as in a play, in the order in which one reads.

    >>> joined([{"from": "human", "value": "Hi"}, {"value": "Hello.", "from": "gpt"}], "")
    'human:\\nHi\\n\\ngpt:\\nHello.'
    """
    parts, texts = [p for p in parts if isinstance(p, (str, dict))], []
    for part in parts:
        role, said = ([k for k in keys if k in part] for keys in (ROLES, SAYINGS))
        if isinstance(part, dict) and role and said:
            text = flat_row({"text": part[said[0]]}, where).get("text", "")
            texts += [f"{part[role[0]]}:\n{text}"] * bool(text.strip())
        elif isinstance(part, dict) and said and part.get("type") == "text":
            texts.append(str(part[said[0]]))  # a message may have parts,
        elif isinstance(part, dict) and str(part.get("type")).startswith(("image", "audio")):
            pass  # of which some are no text
        else:
            texts.append("\n".join(flat_row(part, where).values()))
    is_talk = any(isinstance(part, dict) and set(ROLES) & part.keys() for part in parts)
    return ("\n\n" if is_talk else "\n").join(texts)
