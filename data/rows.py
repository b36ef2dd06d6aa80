"""Rows of tables: .csv .tsv .jsonl .json .parquet to dicts of texts, a few in memory at a time."""

import contextlib
import csv
import itertools
import json
import re
from collections import deque
from functools import partial

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
BLOCK = 1 << 20  # of a Parquet file, read at a time [bytes]
LONGEST_LINE = 1 << 26  # of a csv or jsonl, or a row of a json [characters]
csv.field_size_limit(LONGEST_LINE)
# Columns that hold a text; an object that has one is a row, and no table.
TEXT_ALONE = ("text", "content", "body", "article", "story", "document")
TALKS = ("messages", "conversations")
white_space = re.compile(r"\s*")


def read_rows(suffix: str, content, name: str):
    """Yields the rows of a table, {column: text}.

    content: blocks of text; of Parquet the open file. name: for a message of what is wrong with it.
    """
    readers = dict.fromkeys((".jsonl", ".ndjson"), jsonl_rows)
    readers |= {".json": json_rows, ".parquet": parquet_rows, ".tsv": partial(csv_rows, of="\t")}
    try:
        yield from readers.get(suffix, csv_rows)(content, name)
    except RecursionError:
        raise ValueError(
            f"{name} has lists in lists, too deep for rows; if it is plain text, rename it to .txt"
        ) from None


def few(items) -> list:
    """The first of these, as many as say what a table is: a thousand, or fewer of 8 MB in all."""
    taken, size = [], 0
    for item in itertools.islice(items, 1000):
        taken.append(item)
        if (size := size + n_chars(item)) > 1 << 23:
            break
    return taken


def n_chars(value) -> int:
    """How much text is in a row, or in any value of JSON."""
    if isinstance(value, (dict, list)):
        return sum(map(n_chars, value.values() if isinstance(value, dict) else value))
    return len(value) if isinstance(value, str) else 0


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


def csv_rows(blocks, name: str, of: str = ""):
    """Yields a csv's rows as dicts; the commonest of , ; | and tab in its first line separates, or
    the one that the name tells of, if it is there.

    A row of another number of fields than the header's would lose text, and so would one whose
    quotes never end: ValueError names its line. Without a header, the first row would be lost.
    """
    found, start = lines(blocks, name), []
    while not start or start[-1].isspace():
        start.append(next(found, ""))
    first = start[-1]
    mark = re.fullmatch(r"sep=(.)\s*", first)  # Excel's, in a line before the header
    bare = re.sub('"[^"]*"', "", first)
    told = mark[1] if mark else of if of in bare else ""
    delimiter = told or max(",;\t|", key=bare.count)
    start += few(found)
    reader = csv.reader(
        itertools.chain(start, found),
        delimiter=delimiter,
        quoting=csv.QUOTE_NONE if is_unquoted(start, delimiter) else csv.QUOTE_MINIMAL,
        skipinitialspace=f"{delimiter} " in first,
        strict=True,
    )
    remedy = "put texts with commas or quotes in quotes; or if it is no table, rename it to .txt"
    rows = filter(None, reader)
    try:
        header = next(itertools.islice(rows, bool(mark), None), [])
        if is_row(header):
            raise ValueError(f"{name} begins with text, not with names of columns; add them")
        for i in range(len(header)):
            header[i] += f".{i + 1}" * (header[i] in header[:i])
        for row in rows:
            if len(row) != len(header):
                raise ValueError(
                    f"{name}, line {reader.line_num}: a row of {len(row)} fields, and the header "
                    f"has {len(header)}; {remedy}"
                )
            yield dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"{name}, line {reader.line_num}: {error}; {remedy}") from None


def is_unquoted(lines, delimiter: str) -> bool:
    """Whether quotes are text like any other, as in many tables that are separated by tabs.

    Then each line is a row, and some field begins with a quote that does not end it.
    """
    rows = [line.rstrip("\n").split(delimiter) for line in lines if line.strip()]
    is_said = any(field[:1] == '"' != field[1:][-1:] for row in rows for field in row)
    return delimiter == "\t" and is_said and len(set(map(len, rows))) == 1


def is_row(header) -> bool:
    """Whether a first row can't be names of columns: one is long, or some, not all, are numbers."""
    numbers = {bool(re.fullmatch(r"-?\d+(\.\d+)?", name)) for name in header if name}
    years = any(re.fullmatch(r"(19|20)\d\d", name) for name in header)
    return len(numbers) == 2 and not years or len(max(header, key=len, default="")) > 60


def jsonl_rows(blocks, name: str):
    """Yields the objects of a jsonl file; a line that is a string is an object with `text`."""
    for number, line in enumerate(lines(blocks, name), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError(
                f"{name} is no jsonl at line {number}: {line[:30]!r}; each line must be JSON, and "
                f"JSON in one piece be called .json"
            ) from None
        yield flat_row(row, f"{name}, line {number}")


# --- 2. JSON in one piece -------------------------------------------------------------------------


def json_rows(blocks, name: str):
    """Yields the rows of a JSON file: those of its array, or those in its object.

    The file is never whole in memory. Many call lines of JSON .json, too: each is then a row.
    """
    blocks = iter(blocks)
    start = next((block for block in blocks if block.strip()), "").lstrip()
    first, _, more = start.partition("\n")
    blocks = itertools.chain([start], blocks)
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(json.loads(first), dict) and more.strip():
            yield from jsonl_rows(blocks, name)
            return
    reader, is_end = JSONReader(blocks, name), False
    while not is_end:  # values may follow each other
        if reader.skip("["):
            found = reader.array()
        elif reader.skip("{"):
            found = rows_of_object(reader)
        else:
            raise reader.error()
        yield from (flat_row(row, f"{name}, row {n}") for n, row in enumerate(found, 1))
        is_end = reader.is_at_end()


def rows_of_object(reader):
    """Yields the rows in an object, of which "{" was read. A long array of rows is never kept."""
    row, like = {}, None
    while not reader.skip("}"):
        key = f"{reader.value()}"
        reader.expect(":")
        if reader.skip("["):
            values = reader.array()
            row[key] = first = few(values)
            for value in values:  # so it is long
                if not are_rows(first):
                    deque(values, 0)  # numbers
                elif like is None or are_alike(value, like):
                    like = value
                    yield from itertools.chain(row.pop(key), [value], values)
                else:
                    raise ValueError(
                        f"{reader.name} has several long arrays; write a row a line, as .jsonl"
                    )
        else:
            row[key] = reader.value()
        if not reader.skip(","):
            reader.expect("}")
            break
    yield from rows_beside(row, like) if like is not None else rows_in(row)


def rows_beside(row: dict, like):
    """Those of an object's arrays that are like a row of another one: "test" beside "train"."""
    arrays = [v for v in row.values() if isinstance(v, list) and v and are_alike(v[0], like)]
    return itertools.chain.from_iterable(arrays)


def rows_in(row: dict):
    """The rows in an object that is whole: of its array of "rows" or "data", else of that with the
    most text, and of those like it; or of a table by columns or by names; else it is a row itself.

    >>> list(rows_in({"tags": ["a tag"], "train": [{"text": "b"}], "test": [{"text": "c"}]}))
    [{'text': 'b'}, {'text': 'c'}]
    >>> rows_in({"id": {"0": 7, "1": 8}, "text": {"0": "a", "1": "b"}})  # as pandas writes it
    [{'id': 7, 'text': 'a'}, {'id': 8, 'text': 'b'}]
    """
    arrays = {k: v for k, v in row.items() if isinstance(v, list) and are_rows(v)}
    objects = [v for v in row.values() if isinstance(v, dict)]
    has_text = any(isinstance(row.get(name), str) and row[name].strip() for name in TEXT_ALONE)
    if has_text or any(is_talk(row.get(name)) for name in TALKS):
        return [row]
    if arrays:
        dicts = {k for k, v in arrays.items() if v and isinstance(v[0], dict)}
        best = max(arrays, key=lambda k: (k in ("rows", "data"), k in dicts, n_chars(arrays[k])))
        if best in dicts:
            return rows_beside(row, arrays[best][0])
        if best in ("rows", "data") or 2 * n_chars(arrays[best]) >= n_chars(row):
            return arrays[best]
    if objects and len(objects) == len(row):
        if all(map(str.isdecimal, objects[0])):
            return [{name: row[name].get(key) for name in row} for key in objects[0]]
        if len(objects) > 1 and are_alike(*objects[:2]):
            return objects
    return [row]


def are_rows(values: list) -> bool:
    return all(isinstance(value, (dict, str)) for value in values)


def are_alike(a, b) -> bool:
    """Whether two values may be rows of one table."""
    return isinstance(a, dict) and isinstance(b, dict) and bool(a.keys() & b.keys() or a == b)


class JSONReader:
    """JSON that is read value by value; what was read is forgotten."""

    def __init__(self, blocks, name: str):
        self.blocks, self.name, self.text, self.at = blocks, name, "", 0
        self.decoder = json.JSONDecoder()

    def error(self) -> ValueError:
        return ValueError(
            f"{self.name} is no JSON at {self.text[self.at : self.at + 30]!r}; write it again as "
            f"JSON, or if it is plain text, rename it to .txt"
        )

    def more(self) -> bool:
        """Reads a block; False at the end of the file."""
        block = next(self.blocks, None)
        self.text, self.at = self.text[self.at :] + (block or ""), 0
        if len(self.text) > LONGEST_LINE:
            raise ValueError(
                f"{self.name} has a value of more than {LONGEST_LINE >> 20} million characters; "
                f"write a row a line, as .jsonl"
            )
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

    def is_at_end(self) -> bool:
        self.skip("")  # white space
        return self.at == len(self.text)

    def value(self):
        self.skip("")
        while True:
            with contextlib.suppress(ValueError, RecursionError):
                value, end = self.decoder.raw_decode(self.text, self.at)
                if end < len(self.text):  # else it may go on: 12 is also the start of 123
                    self.at = end
                    return value
            twice = 2 * (len(self.text) - self.at)  # else a long value takes O(n^2)
            if not self.more():
                raise self.error()
            while len(self.text) < twice and self.more():
                pass

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
        texts = re.compile("string|^(large_)?binary")  # some write text as bytes of no kind
        names = [field.name for field in table.schema_arrow if texts.search(f"{field.type}")]
        if not names:
            have = ", ".join(table.schema_arrow.names)
            raise ValueError(f"{name} has no column of text; it has: {have}")
        groups = map(table.metadata.row_group, range(table.num_row_groups))
        size = sum(group.total_byte_size for group in groups)
        n = max(1, min(64, table.metadata.num_rows * BLOCK // max(1, size)))  # a row may be a book
        for batch in table.iter_batches(n, columns=names, use_threads=False):
            yield from (flat_row(row, name) for row in batch.to_pylist())
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
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
    if isinstance(row, str) or isinstance(row, list) and is_talk(row):
        row = {"text": row}
    if not isinstance(row, dict):
        raise ValueError(
            f"{where} is neither an object nor a string, as rows are; an array of them is called "
            f".json, what is no table .txt"
        )
    flat = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": text for inner, text in flat_row(value, where).items()}
        if isinstance(value, list):
            value = joined(value, where)
        if isinstance(value, bytes):
            with contextlib.suppress(UnicodeDecodeError):
                value = value.decode()
        if isinstance(value, str):
            value = value.encode("utf-8", "replace").decode()
            flat[name] = value.replace("\r\n", "\n").replace("\r", "\n")
    return flat


ROLES, SAYINGS = ("role", "from", "speaker"), ("content", "value", "text")


def is_talk(parts) -> bool:
    """Whether this is a list of messages."""
    return isinstance(parts, list) and any(
        isinstance(part, dict) and set(ROLES) & part.keys() for part in parts
    )


def joined(parts: list, where: str) -> str:
    """The texts of a list in a row; of messages as in a play, in the order in which one reads.

    >>> joined([{"from": "human", "value": "Hi"}, {"value": "Hello.", "from": "gpt"}], "")
    'human:\\nHi\\n\\ngpt:\\nHello.'
    """
    texts = []
    for part in parts:
        if isinstance(part, list):
            texts.append(joined(part, where))
        elif isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict):
            texts.append(said(part, where))
    return ("\n\n" if is_talk(parts) else "\n").join(filter(None, texts))


def said(part: dict, where: str) -> str:
    """The text of an object in a list: a message under its role, a part of one, or a row."""
    role, saying = (next((k for k in keys if k in part), "") for keys in (ROLES, SAYINGS))
    if role and saying:
        text = flat_row({"text": part[saying]}, where).get("text", "")
        calls = [json.dumps(call, ensure_ascii=False) for call in part.get("tool_calls") or []]
        text = "\n".join([text] * bool(text.strip()) + calls)
        return f"{part[role]}:\n{text}" if text else ""
    if isinstance(part.get("type"), str) and saying:  # a message may have parts,
        return part[saying] if isinstance(part[saying], str) else ""
    if str(part.get("type")).startswith(("image", "audio")):  # of which some are no text
        return ""
    return "\n".join(flat_row(part, where).values())
