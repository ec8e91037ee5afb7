"""The bytes of one file: over as many connections as it takes, resumed where they broke, also by a later process.

    url --GET, from byte n--> NAME.part        NAME.part.tag says of which version of the file these bytes are

Knows no Hub and no checksum: what came is complete, whether it is right is fetch.py's to say. A connection that breaks
is made again, ATTEMPTS times without progress.
"""

import fcntl
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import requests

Say = Callable[[str], None]

ATTEMPTS = 5
"""Failures in a row without a new byte before a download is given up."""
ATTEMPTS_UNREACHED = 2
"""The same for a server that has never answered: there is no network, most likely."""
RETRY_S = 1.0
"""Pause after the first of them; it grows by as much with each."""
TIMEOUT_S = (10.0, 60.0)
"""To connect, and between two pieces."""
EVERY_S = 10.0
"""Seconds between two lines of progress."""
PIECE_BYTES = 2**16
"""Read and written at once; what a broken connection loses is less than this."""
MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a file is and what it must be. `tag` names this version of it: bytes of another one are of no use."""

    url: str
    headers: dict[str, str] = field(default_factory=dict)
    size: int | None = None
    digest: str | None = None
    tag: str | None = None
    commit: str | None = None
    """Of a Hub file, the commit that `url` names."""


class UnreachableError(Exception):
    """There is no way to `host`, or nothing comes from it any more."""

    def __init__(self, host: str, reason: str) -> None:
        super().__init__(f"{host} cannot be reached ({reason})")
        self.host, self.reason = host, reason


class RefusedError(Exception):
    """The server answers `status`, and will again."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the server answers {status}")
        self.status = status


def download(source: Source, out: BinaryIO, part: Path, say: Say, label: str) -> None:
    """Fill NAME.part, which `out` appends to. Raises UnreachableError, RefusedError, or ValueError: too little disk."""
    failures, reached = 0, False
    while True:
        before = size_of(part)
        try:
            return _transfer(source, out, part, say, label)
        except requests.RequestException as error:
            out.flush()
            failures = 1 if size_of(part) > before else failures + 1
            reached |= size_of(part) > before or isinstance(error, requests.HTTPError)
            if failures == (ATTEMPTS if reached else ATTEMPTS_UNREACHED):
                raise UnreachableError(urlsplit(source.url).netloc, innermost(error)) from None
            time.sleep(RETRY_S * failures)


def _transfer(source: Source, out: BinaryIO, part: Path, say: Say, label: str) -> None:
    """One connection. `out` appends to NAME.part. Raises a RequestException where another try may help."""
    have = _resumable(source, part)
    if have and have == source.size:
        return
    headers = {**source.headers, "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if source.tag != (tag := tag_file(part).read_text()):
            headers["If-Range"] = tag  # the server's own name of that version: another one is sent from the start
    with requests.get(source.url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
        if response.status_code == 416:  # nothing comes after what we have: it is whole, or of no use
            if response.headers.get("Content-Range") == f"bytes */{have}":
                return
            out.truncate(0)
            raise requests.ConnectionError("the server has fewer bytes than were here")
        if response.status_code in (408, 429) or response.status_code >= 500:
            raise requests.HTTPError(f"the server answers {response.status_code}")
        if response.status_code not in (200, 206):
            raise RefusedError(response.status_code)
        start = _start(response, have)
        length = None if "Content-Encoding" in response.headers else response.headers.get("Content-Length")
        total = source.size if length is None else start + int(length)
        check_space((total or 0) - start, part.parent)
        out.truncate(start)
        _write_tag(source, response, part)
        with _progress(label, start, total, say) as advance:
            for piece in response.iter_content(PIECE_BYTES):
                out.write(piece)
                advance(len(piece))
        out.flush()
    if total is not None and size_of(part) != total:
        raise requests.ConnectionError(f"{size_of(part)} of {total} bytes came")


def _start(response: requests.Response, have: int) -> int:
    """The byte that an answer begins with."""
    if response.status_code == 200:
        return 0
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    if found is None or int(found[1]) != have:
        raise requests.ConnectionError(f"bytes from {have} were asked for, {found and found[1]} came")
    return have


def _resumable(source: Source, part: Path) -> int:
    """How many bytes of NAME.part are of the file that is published now."""
    if not tag_file(part).is_file():
        return 0
    tag = tag_file(part).read_text()
    known = source.tag is None or tag == source.tag  # without one, the server decides by If-Range
    return size_of(part) if known and tag else 0


def _write_tag(source: Source, response: requests.Response, part: Path) -> None:
    """Remember which version these bytes are of; a server that does not say so gets no second half asked for."""
    tag = source.tag
    if tag is None:
        etag = response.headers.get("ETag", "")
        tag = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")
    tag_file(part).write_text(tag)


@contextmanager
def locked(part: Path, *, wait: bool = False) -> Iterator[BinaryIO]:
    """NAME.part, open to append, of this caller alone; an empty one is removed again.

    ValueError with one line where another has it, unless this one waits: then that one's file may be there by now.
    """
    part.parent.mkdir(parents=True, exist_ok=True)
    while True:
        out = open(part, "ab")  # noqa: SIM115 - it is closed below
        try:
            fcntl.flock(out, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            out.close()
            raise ValueError(f"{part}: another fetch is writing to it; wait for that one") from None
        if part.exists() and os.path.samestat(os.fstat(out.fileno()), part.stat()):
            break
        out.close()  # the other has moved it to its place, or thrown it away
    with out:
        try:
            yield out
        finally:
            if part.exists() and not size_of(part):
                part.unlink()
                tag_file(part).unlink(missing_ok=True)


@contextmanager
def _progress(label: str, start: int, total: int | None, say: Say) -> Iterator[Callable[[int], object]]:
    """A bar on a terminal, a line every EVERY_S elsewhere."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(desc=label, initial=start, total=total, unit="B", unit_scale=True, unit_divisor=1024) as bar:
            yield bar.update
        return
    done, begin, shown = start, time.monotonic(), time.monotonic()
    if start:
        say(f"{label}: goes on at {start / MIB:.0f} MiB")

    def advance(count: int) -> None:
        nonlocal done, shown
        done += count
        if (now := time.monotonic()) - shown > EVERY_S:
            rate = (done - start) / MIB / (now - begin)
            say(f"{label}: {done / MIB:.0f} of {'?' if total is None else f'{total / MIB:.0f}'} MiB, {rate:.1f} MiB/s")
            shown = now

    yield advance


def part_of(target: Path) -> Path:
    """NAME.part beside NAME."""
    return target.with_name(f"{target.name}.part")


def tag_file(part: Path) -> Path:
    """What says of which version of the file NAME.part is."""
    return part.with_name(f"{part.name}.tag")


def size_of(path: Path) -> int:
    """Bytes; 0 where there is no file."""
    return path.stat().st_size if path.exists() else 0


def check_space(num_bytes: float, folder: Path) -> None:
    """ValueError with one line where so many bytes do not fit on the disk of a folder."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if num_bytes > free:
        raise ValueError(
            f"{folder}: {num_bytes / 2**30:.1f} GiB are to come and {free / 2**30:.1f} GiB are free; make room, "
            "or choose another folder"
        )


def innermost(error: BaseException) -> str:
    """The innermost cause, in one line."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
