"""Fetching the public data sets: one file each, which a broken connection does not lose.

A download grows under NAME.part; the same command goes on where it stopped (HTTP Range, and
If-Range so that two editions are never glued together). It gets its name once its size is as
announced, its checksum as known, and it is what it should be: a site that wants a login likes to
answer with a web page. With a limit, only the first part of a text is fetched, and of a zip only
the first members.
"""

import hashlib
import http.client
import io
import os
import re
import sys
import time
import urllib.error
import urllib.request
import zipfile
from argparse import ArgumentTypeError
from pathlib import Path
from typing import NamedTuple

from data.run.files import check_space, replacing

KAGGLE = "https://www.kaggle.com/api/v1/datasets/download/"
BLOCK = 1 << 20  # bytes
TIMEOUT = 30  # seconds without a byte
LESS = "fetch less with --limit 500MB"


class Source(NamedTuple):
    url: str
    file: str  # its name here
    page: str  # for a person with a browser
    sha256: str = ""


def kaggle(name: str, owner_and_set: str) -> Source:
    return Source(
        KAGGLE + owner_and_set, f"{name}.zip", f"https://www.kaggle.com/datasets/{owner_and_set}"
    )


KARPATHY = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
KARPATHY += "tinyshakespeare/input.txt"
KARPATHY_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
LINUX = "https://github.com/torvalds/linux"
FINEWEB = "https://huggingface.co/datasets/karpathy/fineweb-edu-100b-shuffle"
STORIES = "https://huggingface.co/datasets/roneneldan/TinyStories"
SETS = {
    "bbc": kaggle("bbc", "pariza/bbc-news-summary"),
    "shakespeare": kaggle("shakespeare", "kingburrito666/shakespeare-plays"),
    "avengers": kaggle("avengers", "divaxshah/avengers-and-iron-man-movies-dataset"),
    "physics": kaggle("physics", "judehunt23/llm-science-exam-training-data-wiki-pages"),
    "wiki": kaggle("wiki", "ffatty/plaintext-wikipedia-full-english"),
    "tinyshakespeare": Source(KARPATHY, "tinyshakespeare.txt", KARPATHY, KARPATHY_SHA256),
    "tinystories": Source(
        f"{STORIES}/resolve/main/TinyStoriesV2-GPT4-train.txt", "tinystories.txt", STORIES
    ),
    # For gigabytes and a GPU; none wants a login. Web pages that teach something: 250 MB of prose,
    # the first of 1,823 such files.
    "fineweb": Source(f"{FINEWEB}/resolve/main/shard_00000.parquet", "fineweb.parquet", FINEWEB),
    # Source code, 1.4 GB in 80,000 files, of which a server never tells the size.
    "linux": Source(f"{LINUX}/archive/refs/tags/v6.12.zip", "linux.zip", LINUX),
    # The first 1,000,000,000 bytes of Wikipedia, with its markup.
    "enwik9": Source(
        "https://mattmahoney.net/dc/enwik9.zip",
        "enwik9.zip",
        "https://mattmahoney.net/dc/textdata.html",
    ),
}


def size(text: str) -> int:
    """Bytes of "500MB", "2 GB" or "1000000"; an argparse type."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)B?", text.strip().upper())
    if not found or not (n := int(float(found[1]) * 1000 ** " KMGT".index(found[2] or " "))):
        raise ArgumentTypeError(f"{text!r} is no size; try 500MB")
    return n


def fetch(name: str, folder: Path, limit: int | None = None) -> Path:
    """The file of a set, fetched into folder unless it is there."""
    source = SETS[name]
    path = folder / source.file
    if path.exists():
        print(f"{path} is here already; to fetch it again, delete it")
        return path
    folder.mkdir(parents=True, exist_ok=True)
    if limit and path.suffix == ".parquet":
        raise ValueError(f"{name} is one Parquet file, of which no part can be read: no --limit")
    get = download_members if limit and path.suffix == ".zip" else download
    try:
        get(source, path, limit)
    except urllib.error.HTTPError as error:
        wants = {401: "wants a login", 403: "wants a login", 404: "has no such file (any more)"}
        reason = f"{wants.get(error.code, 'refused')} ({error.code} {error.reason})"
    except WebPage:
        reason = "sent a web page, a login perhaps, where the file should be"
    except Interrupted as error:
        raise ValueError(f"{error}; the same command goes on where it stopped") from None
    except urllib.error.URLError as error:
        reason = f"can't be reached ({error.reason})"
    except (http.client.HTTPException, OSError) as error:
        if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
            raise
        reason = f"broke off ({error})"
    else:
        return path
    raise ValueError(
        f"{source.url.split('/')[2]} {reason}; open {source.page} in a browser and put the file "
        f"into {folder}/"
    )


class WebPage(Exception):
    pass


class Interrupted(Exception):
    pass


# --- 1. All of a file, or the first part of a text ------------------------------------------------


def request(url: str, **headers):
    """The open response; headers as If_Range="..."."""
    headers = {name.replace("_", "-"): value for name, value in headers.items() if value}
    headers["User-Agent"] = "lamoe"  # some sites refuse Python's own
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)


def download(source: Source, path: Path, limit: int | None = None) -> None:
    """The file; with a limit, its first bytes, up to the last complete line."""
    part, edition = (path.with_name(path.name + end) for end in (".part", ".part.edition"))
    have = part.stat().st_size if part.exists() and edition.exists() else 0
    resume = {"Range": f"bytes={have}-", "If_Range": edition.read_text()} if have else {}
    try:
        response = request(source.url, **resume)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # what is there is no part of what the site has now
            raise
        have, response = 0, request(source.url)
    with response:
        starts_at = response.headers.get("Content-Range", "").partition("-")[0]
        if response.status == 206 and starts_at != f"bytes {have}":
            edition.unlink(missing_ok=True)  # the next try begins anew
            raise Interrupted("the server sent another part than was asked for")
        have = have if response.status == 206 else 0  # 200: all of it, from the beginning
        total = total_size(response)
        if response.headers.get_content_type() == "text/html":
            raise WebPage
        check_space(path, min(total or 0, limit or total or 0) - have, LESS)
        edition.write_text(
            response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        )
        if not edition.read_text():
            edition.unlink()  # nothing to recognise it by: the next try begins anew
        with open(part, "ab" if have else "wb") as file:
            have = copy(response, file, have, total, limit)
    if total and have < min(total, limit or total):
        raise Interrupted(f"the connection ended after {have:,} of {total:,} bytes")
    edition.unlink(missing_ok=True)
    check(part, source._replace(sha256="") if limit else source)  # of a part it is not known
    with open(part, "rb+") as file:
        if limit and have >= limit:
            file.truncate(last_line(file, limit))
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def total_size(response) -> int | None:
    """Of the whole file, where the server tells."""
    if response.status == 206:
        whole = response.headers.get("Content-Range", "").rpartition("/")[2]
        return int(whole) if whole.isdecimal() else None
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def copy(response, file, have: int, total: int | None, limit: int | None) -> int:
    """Copies the response, with progress; returns how much of the file is there then."""
    goal, started, before = min(total or limit or 0, limit or total or 0), time.monotonic(), have
    while not limit or have < limit:
        try:
            data = response.read(BLOCK)
        except (http.client.HTTPException, OSError) as error:
            raise Interrupted(f"the connection broke after {have:,} bytes ({error})") from None
        if not data:
            break
        file.write(data)
        have += len(data)
        speed = (have - before) / max(1e-6, time.monotonic() - started)
        show_progress(have, goal, speed)
    return have


def show_progress(have: int, goal: int, speed: float) -> None:
    if sys.stdout.isatty():
        of = f" of {goal / 1e6:,.1f}" if goal else ""
        left = f", {(goal - have) / speed:,.0f} s left" if goal > have and speed else ""
        print(f"{f'{have / 1e6:,.1f}{of} MB, {speed / 1e6:.1f} MB/s{left}':79}", end="\r")


def check(part: Path, source: Source) -> None:
    """Refuses, and deletes, what is not the file it should be."""
    with open(part, "rb") as file:
        start = file.read(512).lstrip().lower()
        if start.startswith((b"<!doctype html", b"<html")):
            part.unlink()
            raise WebPage
        file.seek(0)
        digest = hashlib.sha256()
        while source.sha256 and (data := file.read(BLOCK)):
            digest.update(data)
    what = ""
    if not part.stat().st_size:
        what = "is empty"
    elif source.sha256 and digest.hexdigest() != source.sha256:
        what = f"has the SHA-256 {digest.hexdigest()[:12]}..., not {source.sha256[:12]}..."
    elif source.file.endswith(".zip") and not zipfile.is_zipfile(part):
        what = "is no whole zip"
    elif source.file.endswith(".parquet") and not is_parquet(part):
        what = "is no whole Parquet file"
    if what:
        part.unlink()
        raise ValueError(
            f"what {source.url} sent {what}; try again, or open {source.page} in a browser and put "
            f"the file into {part.parent}/"
        )


def is_parquet(path: Path) -> bool:
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        marks = [file.read(4) for at in (0, max(0, size - 4)) if file.seek(at) >= 0]
    return size > 8 and marks == [b"PAR1"] * 2


def last_line(file, limit: int) -> int:
    """Where the last document, or else the last line, ends within limit bytes."""
    file.seek(max(0, limit - BLOCK))
    before, data = file.tell(), file.read(min(limit, BLOCK))
    for end in (b"\n<|endoftext|>\n", b"\n"):
        if end in data:
            return before + data.rindex(end) + len(end)
    return limit


# --- 2. The first members of a zip that is too large to fetch -------------------------------------


class RemoteFile(io.RawIOBase):
    """A file on a server that is read where one asks: what zipfile needs of a zip is its end,
    where the names are, and the members that are read."""

    def __init__(self, url: str):
        with request(url, Range="bytes=0-0") as response:
            if response.headers.get_content_type() == "text/html":
                raise WebPage
            self.url, self.size, self.at = response.geturl(), total_size(response), 0
            if response.status != 206 or not self.size:
                raise ValueError(
                    f"{url.split('/')[2]} sends whole files only; fetch all of it, without --limit"
                )

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def readinto(self, buffer) -> int:
        wanted = min(len(buffer), self.size - self.at)
        if wanted <= 0:
            return 0
        with request(self.url, Range=f"bytes={self.at}-{self.at + wanted - 1}") as response:
            data = response.read()
        if response.status != 206 or len(data) != wanted:
            raise Interrupted(f"the connection broke after {self.at:,} bytes")
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


def download_members(source: Source, path: Path, limit: int) -> None:
    """A zip of the first members of the remote zip, `limit` bytes of text in all."""
    check_space(path, limit, LESS)
    remote, have, started = RemoteFile(source.url), 0, time.monotonic()
    try:
        with (
            zipfile.ZipFile(io.BufferedReader(remote, 8 * BLOCK)) as whole,
            replacing(path) as file,
            zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as part,
        ):
            for info in sorted(whole.infolist(), key=lambda info: info.filename):
                if not info.is_dir():
                    part.writestr(info.filename, whole.read(info))
                    have += info.file_size
                    show_progress(have, limit, have / max(1e-6, time.monotonic() - started))
                if have >= limit:
                    return
    except zipfile.BadZipFile as error:
        raise ValueError(f"{source.url} is no zip ({error}); fetch {source.page} by hand") from None
