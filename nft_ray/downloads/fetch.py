"""Downloads published files, of rewards and prompt sets: resumed where it was cut off, checked, and never half there.

    published record --GET, from byte n--> NAME.part --checksum--> NAME + NAME.sha256

What is published: `file.sha256` or `file.git_sha1` where our code pins one; else what the Hub records of a file, the
sha256 of a large one and git's own sum of a small one. A direct URL without either has nothing to be compared with;
its sum is written down. Beside each file lies NAME.sha256, as `sha256sum -c` reads it, so that a second fetch looks at
the size only.

huggingface_hub is asked where a file is and what its sum is (HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE hold), but does
not move the bytes: its version 2.4 writes to a file of a random name and deletes it when it is cut off, so 4 GiB on a
bad line would never arrive. Ours stay in NAME.part, and a NAME.part.tag says of which version of the file they are.

Failure policy: a connection that breaks is resumed ATTEMPTS times without progress. A file that fails does not stop
the others; at the end one ValueError of one line says what to do about the first, the rest have been said.
"""

import fcntl
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import requests

from nft_ray.downloads.published import HUB, PublishedFile

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
PIECE_BYTES = 2**16
"""Read and written at once; what a broken connection loses is less than this."""
MIB = 2**20
_SHA256, _GIT_SHA1 = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{40}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Published:
    """Where a file is and what it must be. `tag` names this version of it: bytes of another one are of no use."""

    url: str
    headers: dict[str, str] = field(default_factory=dict)
    size: int | None = None
    digest: str | None = None
    tag: str | None = None


class _NoNetworkError(ValueError):
    """There is no way to `host` from here."""

    def __init__(self, host: str, reason: str, file: PublishedFile, root: Path) -> None:
        super().__init__(
            f"{host} cannot be reached ({reason}): on a machine with a network, download {file.origin} "
            f"and put it at {root / file.path}"
        )
        self.host, self.reason = host, reason


def fetch(files: Sequence[PublishedFile], root: Path, say: Say) -> None:
    """Bring every file to root/path that is not there yet; return when all are, each of the published content.

    Raises ValueError, one line: no network (which file to put where), too little disk, a refusal, a wrong checksum.
    """
    wanted = [file for file in files if not _is_verified(file, root)]
    if present := len(files) - len(wanted):
        say(f"{present} of {len(files)} files are there")
    _check_space(sum(file.mib for file in wanted) * MIB - sum(_size(_part(root / file.path)) for file in wanted), root)
    problems: list[str] = []
    unreachable: dict[str, str] = {}
    for number, file in enumerate(wanted, 1):
        try:
            if (host := _host(file)) in unreachable:
                raise _NoNetworkError(host, unreachable[host], file, root)
            _fetch_one(file, root, say, f"[{number}/{len(wanted)}] {file.path}")
        except ValueError as error:
            if isinstance(error, _NoNetworkError):
                if (root / file.path).is_file():
                    say(f"{file.path}: is there but not checked, for {error.host} cannot be reached")
                    continue
                unreachable[error.host] = error.reason
            problems.append(str(error))
    for problem in problems[1:]:
        say(problem)
    if problems:
        raise ValueError(problems[0] + (f" (and {len(problems) - 1} more, said above)" if problems[1:] else ""))


def _fetch_one(file: PublishedFile, root: Path, say: Say, label: str) -> None:
    target = root / file.path
    published = _published(file, root)
    if target.is_file():
        if _matches(target, published.digest):
            _record(target, _sha256(target))
            say(f"{label}: was there, and is what is published")
            return
        say(f"{label}: what is there is not what is published; downloading it again")
    part = _part(target)
    with _locked(part) as out:
        _download(published, out, part, say, label, file, root)
        out.flush()
        os.fsync(out.fileno())
        found = _sha256(part)
        if not _matches(part, published.digest):
            said = found if _SHA256.fullmatch(published.digest or "") else _git_sha1(part)
            part.unlink()
            _tag_file(part).unlink(missing_ok=True)
            raise ValueError(
                f"{file.origin}: its checksum is {said}, published is {published.digest}; deleted, fetch it again"
            )
        os.replace(part, target)
        _tag_file(part).unlink(missing_ok=True)
        _record(target, found)
    say(f"{label}: {target.stat().st_size / MIB:.1f} MiB, {'checksum right' if published.digest else f'{found}'}")


# What is published


def _published(file: PublishedFile, root: Path) -> _Published:
    if file.url is not None:
        return _Published(url=file.url, digest=file.digest, tag=file.digest)
    record = _hub_record(file, root)
    if file.sha256 is not None:
        if record.digest is not None and _SHA256.fullmatch(record.digest) and record.digest != file.sha256:
            raise ValueError(f"{file.origin}: its checksum is {record.digest} by now, wanted is {file.sha256}")
        return _Published(url=record.url, headers=record.headers, size=record.size, digest=file.sha256, tag=record.tag)
    return record


def _hub_record(file: PublishedFile, root: Path) -> _Published:
    """Ask the Hub; the answer's URL names the commit, so that no later push mixes into the bytes."""
    import httpx2
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import build_hf_headers

    endpoint = constants.ENDPOINT
    url = hf_hub_url(file.repository, file.name, revision=file.revision, endpoint=endpoint)
    try:
        record = get_hf_file_metadata(url, endpoint=endpoint)
    except OfflineModeIsEnabled:
        raise _NoNetworkError(_host(file), "HF_HUB_OFFLINE is set", file, root) from None
    except httpx2.TransportError as error:
        raise _NoNetworkError(_host(file), _reason(error), file, root) from None
    except HfHubHTTPError as error:
        raise ValueError(_refusal(file, error.response.status_code)) from None
    if record.etag is None or record.commit_hash is None:
        raise ValueError(f"{url}: does not answer as the Hub does (no ETag or no commit); is HF_ENDPOINT right?")
    is_sum = _SHA256.fullmatch(record.etag) or _GIT_SHA1.fullmatch(record.etag)
    return _Published(
        url=hf_hub_url(file.repository, file.name, revision=record.commit_hash, endpoint=endpoint),
        headers=build_hf_headers(),
        size=record.size,
        digest=record.etag if is_sum else None,
        tag=record.etag,
    )


def _refusal(file: PublishedFile, status: int) -> str:
    if status in (401, 403) and file.url is None:
        access = f"accept its licence at {HUB}/{file.repository} and set HF_TOKEN"
        return f"{file.origin}: {status}, there is no such repository or it wants an account: {access}"
    return f"{file.origin}: the server answers {status}; look for the file's new place and put it there by hand"


def _host(file: PublishedFile) -> str:
    from huggingface_hub import constants

    return urlsplit(file.url or constants.ENDPOINT).netloc


# The bytes


def _download(
    published: _Published, out: BinaryIO, part: Path, say: Say, label: str, file: PublishedFile, root: Path
) -> None:
    """Fill NAME.part, over as many connections as it takes."""
    failures, reached = 0, False
    while True:
        before = _size(part)
        try:
            return _transfer(published, out, part, say, label, file)
        except requests.RequestException as error:
            out.flush()
            failures = 1 if _size(part) > before else failures + 1
            reached |= _size(part) > before or isinstance(error, requests.HTTPError)
            if failures == (ATTEMPTS if reached else ATTEMPTS_UNREACHED):
                raise _NoNetworkError(urlsplit(published.url).netloc, _reason(error), file, root) from None
            time.sleep(RETRY_S * failures)


def _transfer(published: _Published, out: BinaryIO, part: Path, say: Say, label: str, file: PublishedFile) -> None:
    """One connection. `out` appends to NAME.part. Raises a RequestException where another try may help."""
    have = _resumable(published, part)
    if have and have == published.size:
        return
    headers = {**published.headers, "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if published.tag != (tag := _tag_file(part).read_text()):
            headers["If-Range"] = tag  # the server's own name of that version: another one is sent from the start
    with requests.get(published.url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
        if response.status_code == 416:  # nothing comes after what we have: it is whole, or of no use
            if response.headers.get("Content-Range") == f"bytes */{have}":
                return
            out.truncate(0)
            raise requests.ConnectionError("the server has fewer bytes than were here")
        if response.status_code in (408, 429) or response.status_code >= 500:
            raise requests.HTTPError(f"the server answers {response.status_code}")
        if response.status_code not in (200, 206):
            raise ValueError(_refusal(file, response.status_code))
        start = _start(response, have)
        length = None if "Content-Encoding" in response.headers else response.headers.get("Content-Length")
        total = published.size if length is None else start + int(length)
        _check_space((total or 0) - start, part.parent)
        out.truncate(start)
        _write_tag(published, response, part)
        with _progress(label, start, total, say) as advance:
            for piece in response.iter_content(PIECE_BYTES):
                out.write(piece)
                advance(len(piece))
        out.flush()
    if total is not None and _size(part) != total:
        raise requests.ConnectionError(f"{_size(part)} of {total} bytes came")


def _start(response: requests.Response, have: int) -> int:
    """The byte that an answer begins with."""
    if response.status_code == 200:
        return 0
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    if found is None or int(found[1]) != have:
        raise requests.ConnectionError(f"bytes from {have} were asked for, {found and found[1]} came")
    return have


def _resumable(published: _Published, part: Path) -> int:
    """How many bytes of NAME.part are of the file that is published now."""
    if not _tag_file(part).is_file():
        return 0
    tag = _tag_file(part).read_text()
    known = published.tag is None or tag == published.tag  # without one, the server decides by If-Range
    return _size(part) if known and tag else 0


def _write_tag(published: _Published, response: requests.Response, part: Path) -> None:
    """Remember which version these bytes are of; a server that does not say so gets no second half asked for."""
    tag = published.tag
    if tag is None:
        etag = response.headers.get("ETag", "")
        tag = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")
    _tag_file(part).write_text(tag)


@contextmanager
def _locked(part: Path) -> Iterator[BinaryIO]:
    """NAME.part, open to append, of this process alone; an empty one is removed again."""
    part.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "ab") as out:
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{part}: another fetch is writing to it; wait for that one") from None
        try:
            yield out
        finally:
            if part.exists() and not _size(part):
                part.unlink()
                _tag_file(part).unlink(missing_ok=True)


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


# Files


def _is_verified(file: PublishedFile, root: Path) -> bool:
    """Whether a file is there and known to be right, without a network and mostly without reading it."""
    target = root / file.path
    if not target.is_file():
        return False
    recorded = _recorded(target)
    if recorded is not None and _is_unchanged(target, recorded[1]):
        return file.sha256 in (None, recorded[0])
    if recorded is None and file.digest is None and file.url is None:
        return False  # the Hub knows
    found, wanted = _sha256(target), file.sha256 or (recorded[0] if recorded else None)
    right = found == wanted if wanted else _matches(target, file.git_sha1)
    if right:
        _record(target, found)
    return right


def _is_unchanged(target: Path, size: int) -> bool:
    """Since its checksum was written down."""
    return _size(target) == size and target.stat().st_mtime_ns <= _record_file(target).stat().st_mtime_ns


def _record_file(target: Path) -> Path:
    return target.with_name(f"{target.name}.sha256")


def _record(target: Path, sha256: str) -> None:
    _record_file(target).write_text(f"{sha256}  {target.name}\n# {_size(target)} bytes\n")


def _recorded(target: Path) -> tuple[str, int] | None:
    """(sha256, bytes) as written down when the file was checked."""
    try:
        found = re.match(r"([0-9a-f]{64})  .*\n# (\d+) bytes", _record_file(target).read_text())
    except FileNotFoundError:
        return None
    return (found[1], int(found[2])) if found else None


def _part(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def _tag_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.tag")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _matches(path: Path, digest: str | None) -> bool:
    if digest is None:
        return True
    return digest == (_sha256(path) if _SHA256.fullmatch(digest) else _git_sha1(path))


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _git_sha1(path: Path) -> str:
    """The name that git gives a file's content, which is the ETag of the Hub's small files."""
    with open(path, "rb") as stream:
        begun = hashlib.sha1(b"blob %d\0" % _size(path), usedforsecurity=False)
        return hashlib.file_digest(stream, lambda: begun).hexdigest()


def _check_space(num_bytes: float, folder: Path) -> None:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if num_bytes > free:
        raise ValueError(
            f"{folder}: {num_bytes / 2**30:.1f} GiB are to come and {free / 2**30:.1f} GiB are free; make room, "
            "or choose another folder"
        )


def _reason(error: BaseException) -> str:
    """The innermost cause, in one line."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
