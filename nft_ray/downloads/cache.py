"""Where published files lie on this machine, and which are there. One cache: the Hub's, which other programs fill too.

    HF_HUB_CACHE/models--OWNER--REPOSITORY/snapshots/COMMIT/NAME -> ../../blobs/SUM       files of the Hub
    ROOT/PATH, with its sum in PATH.sha256                files of elsewhere, and what somebody wants in his own folder

A repository is used from one place: from ROOT where that holds all that is wanted of it, else from the Hub's cache.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from nft_ray.downloads.published import PublishedFile
from nft_ray.downloads.transfer import size_of

SHA256, GIT_SHA1 = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{40}")


def located(files: Sequence[PublishedFile], root: Path) -> dict[str, Path]:
    """Where each file is, by its path, and the folder of each repository, by its name; without what is not whole."""
    found: dict[str, Path] = {}
    for repository, members in groupby(sorted(files, key=lambda file: file.path), lambda file: file.repository):
        group = list(members)
        places = {file.path: root / file.path for file in group}
        folder = root / repository
        if not all(path.is_file() for path in places.values()):
            cached = {file.path: hub_file(file) for file in group}
            whole = {path: place for path, place in cached.items() if place is not None}
            if len(whole) < len(group):
                continue
            places, first = whole, group[0]
            folder = whole[first.path].parents[first.name.count("/")]
        found |= places | {repository: folder}
    return found


def hub_cache() -> Path:
    """The folder of the Hub's cache: HF_HUB_CACHE, or HF_HOME/hub, or ~/.cache/huggingface/hub."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def hub_file(file: PublishedFile) -> Path | None:
    """The file in the Hub's cache, at its revision as this machine last saw it; None where it is not there."""
    if file.url is not None:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(file.repository, file.name, cache_dir=hub_cache(), revision=file.revision)
    if not isinstance(found, str):
        return None
    named = Path(found).resolve().name == file.digest  # a blob is named by its sum
    return Path(found) if file.digest is None or named or matches(Path(found), file.digest) else None


def hub_blob(file: PublishedFile, tag: str) -> Path:
    """Where the Hub's cache keeps the content that the Hub calls `tag`."""
    return _hub_folder(file) / "blobs" / tag


def link(file: PublishedFile, commit: str, tag: str) -> None:
    """Make the blob `tag` the file of this commit, and the commit that of the file's branch, for all who read it."""
    pointer = _hub_folder(file) / "snapshots" / commit / file.name
    pointer.parent.mkdir(parents=True, exist_ok=True)
    fresh = pointer.with_name(f"{pointer.name}.{os.getpid()}")
    fresh.symlink_to(os.path.relpath(hub_blob(file, tag), pointer.parent))
    os.replace(fresh, pointer)
    if file.revision != commit:
        reference = _hub_folder(file) / "refs" / file.revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)


def _hub_folder(file: PublishedFile) -> Path:
    return hub_cache() / f"models--{file.repository.replace('/', '--')}"


# A folder of somebody's own


def is_verified(file: PublishedFile, root: Path) -> bool:
    """Whether a file is in a folder and known to be right, without a network and mostly without reading it."""
    target = root / file.path
    if not target.is_file():
        return False
    recorded = _recorded(target)
    if recorded is not None and _is_unchanged(target, recorded[1]):
        return file.sha256 in (None, recorded[0])
    if recorded is None and file.digest is None and file.url is None:
        return False  # the Hub knows
    found, wanted = sha256(target), file.sha256 or (recorded[0] if recorded else None)
    right = found == wanted if wanted else matches(target, file.git_sha1)
    if right:
        record(target, found)
    return right


def record(target: Path, sha: str) -> None:
    """Write down a file's sha256 as `sha256sum -c` reads it, and its size: a second fetch looks at that only."""
    _record_file(target).write_text(f"{sha}  {target.name}\n# {size_of(target)} bytes\n")


def _recorded(target: Path) -> tuple[str, int] | None:
    """(sha256, bytes) as written down when the file was checked."""
    try:
        found = re.match(r"([0-9a-f]{64})  .*\n# (\d+) bytes", _record_file(target).read_text())
    except FileNotFoundError:
        return None
    return (found[1], int(found[2])) if found else None


def _is_unchanged(target: Path, size: int) -> bool:
    """Since its checksum was written down."""
    return size_of(target) == size and target.stat().st_mtime_ns <= _record_file(target).stat().st_mtime_ns


def _record_file(target: Path) -> Path:
    return target.with_name(f"{target.name}.sha256")


# Checksums


def matches(path: Path, digest: str | None) -> bool:
    """Whether a file has this sha256, or this sum of git's; None is what nobody knows."""
    if digest is None:
        return True
    return digest == (sha256(path) if SHA256.fullmatch(digest) else git_sha1(path))


def sha256(path: Path) -> str:
    """Of a file's content, in hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def git_sha1(path: Path) -> str:
    """The name that git gives a file's content, which is the ETag of the Hub's small files."""
    with open(path, "rb") as stream:
        begun = hashlib.sha1(b"blob %d\0" % size_of(path), usedforsecurity=False)
        return hashlib.file_digest(stream, lambda: begun).hexdigest()
