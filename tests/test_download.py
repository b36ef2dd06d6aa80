"""A download survives what servers and connections do, and never believes what it should not.

Against a server of our own, whose faults are switched on one by one.
"""

import hashlib
import io
import os
import random
import re
import shutil
import threading
import zipfile
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import conftest
import pytest

from data import datasets, download

CONTENT = random.Random(0).randbytes(300_000)
TEXT = b"".join(b"document %d\nof two lines\n<|endoftext|>\n" % i for i in range(4000))


class Server(BaseHTTPRequestHandler):
    """Serves server.files, with Range; server.faults says what goes wrong."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        faults, content = self.server.faults, self.server.files.get(self.path, b"")
        self.server.requests.append((self.path, self.headers.get("Range")))
        if "redirect" in faults and self.path == "/file":
            return self.answer(302, b"", Location="/moved")
        if "status" in faults:
            return self.answer(faults["status"], b"no")
        if "html" in faults:
            return self.answer(200, faults["body"], Content_Type=faults["html"])
        etag = faults.get("etag", '"one"')
        headers = {"ETag": etag} if etag else {}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        same = self.headers.get("If-Range", etag) == etag
        if not asked or not same or "no range" in faults:
            return self.answer(200, content, **headers)
        start, end = int(asked[1]), int(asked[2] or len(content) - 1)
        if start >= len(content):
            return self.answer(416, b"")
        part = content[start : end + 1]
        where = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
        where = faults.get("where", where)
        self.answer(206, part, Content_Range=where, **headers)

    def answer(self, status, content, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        length = len(content) + self.server.faults.get("longer", 0)
        length = self.server.faults.get("length", length)
        if "no length" not in self.server.faults:
            self.send_header("Content-Length", str(length))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content[: self.server.faults.get("cut", len(content))])
        self.close_connection = True


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server with one set, "it", of which a test may change everything."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.files, server.faults, server.requests = {}, {}, []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/file"
    server.offer = lambda content, file="it.txt", sha256="": (
        server.files.update({"/file": content, "/moved": content}),
        monkeypatch.setattr(
            download, "SETS", {"it": download.Source(url, file, "http://page.example", sha256)}
        ),
    )
    server.offer(CONTENT)
    monkeypatch.setattr(datasets, "SETS", tmp_path / "sets")
    yield server
    server.shutdown()
    server.server_close()


FOLDER = Path("sets/it")


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def fetch(*flags):
    """The exit code of `python data/datasets.py it flags`."""
    try:
        datasets.main(["it", *flags])
    except SystemExit as end:
        return end.code
    return 0


def refused(capsys, *words):
    assert fetch() == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert [word for word in words if word not in message] == [], message
    assert not (FOLDER / "it.txt").exists() and not (FOLDER / "it.zip").exists()


BY_HAND = ["127.0.0.1", "http://page.example", "browser", str(FOLDER)]


@pytest.mark.parametrize(
    "faults", [{}, {"redirect": 1}, {"no range": 1}, {"etag": ""}, {"no length": 1}]
)
def test_a_file_is_fetched_whole_and_alone(faults, server, capsys):
    server.faults.update(faults)
    assert fetch() == 0
    assert (FOLDER / "it.txt").read_bytes() == CONTENT
    assert os.listdir(FOLDER) == ["it.txt"]
    assert "train.py --data it" in capsys.readouterr().out


def test_what_is_there_is_not_fetched_again(server, capsys):
    fetch()
    n = len(server.requests)
    assert fetch() == 0 and len(server.requests) == n
    assert "here already" in capsys.readouterr().out


def break_off(server, capsys, at=100_000):
    server.faults["cut"] = at
    refused(capsys, "after 100,000 of 300,000 bytes", "the same command goes on")
    del server.faults["cut"]
    assert (FOLDER / "it.txt.part").stat().st_size == at


@pytest.mark.parametrize("faults", [{}, {"redirect": 1}])
def test_a_broken_download_goes_on_where_it_stopped(faults, server, capsys):
    server.faults.update(faults)
    break_off(server, capsys)
    assert fetch() == 0
    assert (FOLDER / "it.txt").read_bytes() == CONTENT
    assert server.requests[-1][1] == "bytes=100000-"
    assert os.listdir(FOLDER) == ["it.txt"]


@pytest.mark.parametrize("faults", [{"etag": '"two"'}, {"no range": 1}, {"etag": ""}])
def test_two_editions_are_never_glued_together(faults, server, capsys):
    break_off(server, capsys)
    server.faults.update(faults)
    server.files["/file"] = CONTENT[::-1]
    assert fetch() == 0
    assert (FOLDER / "it.txt").read_bytes() == CONTENT[::-1]


def test_a_part_without_its_edition_is_not_trusted(server, capsys):
    server.faults["etag"] = ""
    break_off(server, capsys)
    assert fetch() == 0
    assert server.requests[-1][1] is None
    assert (FOLDER / "it.txt").read_bytes() == CONTENT


def test_a_part_that_is_longer_than_the_file_begins_anew(server, capsys):
    break_off(server, capsys)
    server.files["/file"] = CONTENT[:50_000]
    assert fetch() == 0
    assert (FOLDER / "it.txt").read_bytes() == CONTENT[:50_000]


def test_a_wrong_length_is_noticed(server, capsys):
    server.faults["longer"] = 7
    refused(capsys, "after 300,000 of 300,007 bytes")


def test_another_part_than_was_asked_for_is_not_glued_on(server, capsys):
    break_off(server, capsys)
    server.faults["where"] = "bytes 0-199999/300000"
    refused(capsys, "another part than was asked for", "the same command goes on")
    assert fetch() == 0 and (FOLDER / "it.txt").read_bytes() == CONTENT


def test_an_empty_answer_is_no_file_and_a_length_that_is_no_number_none(server, capsys):
    server.offer(b"")
    refused(capsys, "is empty", "http://page.example")
    server.offer(CONTENT)
    server.faults["length"] = "many"
    assert fetch() == 0 and (FOLDER / "it.txt").read_bytes() == CONTENT


@pytest.mark.parametrize(
    "status, words", [(401, ["login", "401"]), (403, ["login", "403"]), (404, ["no such", "404"])]
)
def test_a_refusal_names_page_and_folder(status, words, server, capsys):
    server.faults["status"] = status
    refused(capsys, *words, *BY_HAND)
    server.faults["status"] = 500
    refused(capsys, "500", *BY_HAND)


@pytest.mark.parametrize(
    "kind, body",
    [("text/html; charset=utf-8", b"Please log in"), ("application/zip", b"\n<!doctype HTML>")],
)
def test_a_login_page_is_not_taken_for_the_file(kind, body, server, capsys):
    server.offer(b"", "it.zip")
    server.faults |= {"html": kind, "body": body}
    refused(capsys, "web page", *BY_HAND)
    assert not list(FOLDER.glob("*.zip*"))


def test_without_a_network_page_and_folder_are_named(server, capsys, monkeypatch):
    source = download.Source("http://127.0.0.1:9/file", "it.txt", "http://page.example")
    monkeypatch.setattr(download, "SETS", {"it": source})
    refused(capsys, "can't be reached", *BY_HAND)


def test_a_checksum_that_does_not_fit_is_refused(server, capsys):
    server.offer(CONTENT, sha256=hashlib.sha256(b"other").hexdigest())
    refused(capsys, "SHA-256", "try again", *BY_HAND[:2])
    assert os.listdir(FOLDER) == []
    server.offer(CONTENT, sha256=hashlib.sha256(CONTENT).hexdigest())
    assert fetch() == 0


def zipped(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_a_truncated_zip_is_refused(server, capsys):
    whole = zipped({"a.txt": CONTENT})
    server.offer(whole[: len(whole) // 2], "it.zip")
    refused(capsys, "no whole zip", *BY_HAND[:2])
    server.offer(whole, "it.zip")
    assert fetch() == 0 and (FOLDER / "it.zip").read_bytes() == whole


def test_a_disk_that_is_too_small_is_noticed_first(server, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 200_000))
    refused(capsys, "needs 0.3 MB", "make room", "--limit")
    assert os.listdir(FOLDER) == []


# ---------------------------------------------------------------------------------------------
# Limits
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("faults", [{}, {"no range": 1}])
def test_a_limit_takes_the_first_whole_documents_of_a_text(faults, server):
    server.offer(TEXT, sha256="0" * 64)  # of all of it: not of this part
    server.faults.update(faults)
    assert fetch("--limit", "50kB") == 0
    part = (FOLDER / "it.txt").read_bytes()
    assert 49_000 < len(part) <= 50_000 and TEXT.startswith(part)
    assert part.endswith(b"\n<|endoftext|>\n")


def test_a_limit_beyond_the_file_takes_all_of_it(server):
    server.offer(TEXT)
    assert fetch("--limit", "1GB") == 0
    assert (FOLDER / "it.txt").read_bytes() == TEXT


def test_a_limit_takes_the_first_members_of_a_zip_and_fetches_little_else(server, monkeypatch):
    rng = random.Random(1)
    members = {f"AA/wiki_{i:02}": rng.randbytes(20_000) for i in range(60)}
    server.offer(zipped(members), "it.zip")
    sent = []
    answer = Server.answer
    monkeypatch.setattr(
        Server,
        "answer",
        lambda self, status, content, **h: (
            sent.append(len(content)),
            answer(self, status, content, **h),
        ),
    )
    monkeypatch.setattr(download, "BLOCK", 4096)
    assert fetch("--limit", "100 kB") == 0
    with zipfile.ZipFile(FOLDER / "it.zip") as part:
        assert part.namelist() == [f"AA/wiki_{i:02}" for i in range(5)]
        assert all(part.read(name) == members[name] for name in part.namelist())
    assert sum(sent) < 400_000 < len(server.files["/file"])
    assert os.listdir(FOLDER) == ["it.zip"]


def test_of_a_server_without_range_all_or_nothing(server, capsys):
    server.offer(zipped({"a.txt": CONTENT}), "it.zip")
    server.faults["no range"] = 1
    assert fetch("--limit", "1kB") == 2
    assert "without --limit" in capsys.readouterr().err


def test_a_broken_limited_download_goes_on_too(server, capsys):
    server.offer(TEXT)
    server.faults["cut"] = 20_000
    assert fetch("--limit", "50kB") == 2
    assert "goes on" in capsys.readouterr().err
    del server.faults["cut"]
    assert fetch("--limit", "50kB") == 0
    assert 49_000 < len((FOLDER / "it.txt").read_bytes()) <= 50_000
    assert server.requests[-1][1] == "bytes=20000-"


@pytest.mark.parametrize("text, n", [("500MB", 500e6), ("2 GB", 2e9), ("1.5k", 1500), ("70", 70)])
def test_sizes(text, n):
    assert download.size(text) == n


@pytest.mark.parametrize("flags", [["--limit", "much"], ["--limit", "0"], ["--limit", "-5MB"]])
def test_a_size_that_is_none_is_one_line(flags, server, capsys):
    assert fetch(*flags) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "500MB" in message or "--limit" in message


def test_without_a_name_the_sets_are_listed(capsys):
    datasets.main([])
    listed = capsys.readouterr().out
    assert all(f"datasets.py {name} " in listed for name in download.SETS)


def test_every_set_has_an_address_a_page_and_a_name_of_its_own():
    for name, source in download.SETS.items():
        assert source.url.startswith("https://") and source.page.startswith("https://")
        assert Path(source.file).stem == name


# ---------------------------------------------------------------------------------------------
# The large sets, as they are laid out on their servers
# ---------------------------------------------------------------------------------------------


def offer(server, monkeypatch, name, content):
    """Serves a set of download.SETS from here."""
    server.files.update({"/file": content, "/moved": content})
    url = f"http://127.0.0.1:{server.server_port}/file"
    monkeypatch.setattr(download, "SETS", {name: SETS[name]._replace(url=url)})


SETS = dict(download.SETS)


def fetched(name):
    datasets.main([name])
    corpus = datasets.read(name)
    return sorted([*corpus.train, *corpus.val]), corpus


@pytest.mark.oracle
def test_fineweb_is_a_parquet_file_of_one_column(server, monkeypatch, capsys):
    arrow = conftest.import_oracle("pyarrow")
    from pyarrow import parquet

    pages = [f"Page {i}\n\nteaches {i}." for i in range(3000)]
    file = io.BytesIO()
    table = arrow.table({"text": pages})
    parquet.write_table(table, file, row_group_size=1024, compression="zstd")
    offer(server, monkeypatch, "fineweb", file.getvalue())
    server.faults["redirect"] = 1  # to the store where large files are
    with pytest.raises(SystemExit):
        datasets.main(["fineweb", "--limit", "1MB"])
    assert "no --limit" in capsys.readouterr().err
    found, corpus = fetched("fineweb")
    assert found == sorted(pages) and "text is column 'text'" in corpus.how


@pytest.mark.parametrize("cut", [lambda data: data[:-5], lambda data: b"PAR1"])
def test_half_a_parquet_file_is_refused(cut, server, capsys, monkeypatch):
    offer(server, monkeypatch, "fineweb", cut(b"PAR1" + bytes(99) + b"PAR1"))
    with pytest.raises(SystemExit):
        datasets.main(["fineweb"])
    assert "is no whole Parquet file" in capsys.readouterr().err
    assert os.listdir("sets/fineweb") == []


def test_linux_is_a_zip_that_is_made_as_it_is_sent(server, monkeypatch):
    """No length, no edition, no ranges; one folder; hidden, binary and a few older files in it."""
    code = {f"kernel/{i}.c": f"int f{i}(void)\n{{\n\treturn {i};\n}}\n" for i in range(50)}
    code |= {"Makefile": "obj-y += kernel/\n", "Documentation/index.rst": "Linux\n=====\n"}
    others = {".gitignore": "*.o", ".clang-format": "x", "logo.gif": b"GIF89a\0\0"}
    others |= {"old.c": b"/* caf\xe9 */", "empty": ""}
    members = {f"linux-6.12/{name}": text for name, text in {**code, **others}.items()}
    offer(server, monkeypatch, "linux", zipped(members))
    server.faults |= {"redirect": 1, "no range": 1, "no length": 1, "etag": ""}
    found, corpus = fetched("linux")
    assert found == sorted(code.values())
    assert "old.c is not UTF-8" in corpus.how


def test_enwik9_is_a_zip_of_one_file_without_a_suffix(server, monkeypatch):
    text = "<mediawiki>\n" + "".join(f"  <page>{i}</page>\n" for i in range(999))
    offer(server, monkeypatch, "enwik9", zipped({"enwik9": text}))
    found, corpus = fetched("enwik9")
    assert "".join([*corpus.train, *corpus.val]) == text and "the last 10%" in corpus.how
