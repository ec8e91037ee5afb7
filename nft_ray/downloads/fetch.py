"""Downloads published files, of rewards, prompt sets and pipelines: resumed, checked, and never half there.

    published record ──► bytes into NAME.part (transfer.py) ──► checksum ──► its place (cache.py)

What is published: `file.sha256` or `file.git_sha1` where our code pins one; else what the Hub records of a file, the
sha256 of a large one and git's own sum of a small one. A direct URL without either has nothing to be compared with;
its sum is written down.

huggingface_hub is asked where a file is and what its sum is (HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE hold), but does
not move the bytes: its version 2.4 writes to a file of a random name and deletes it when it is cut off, so 4 GiB on a
bad line would never arrive. Ours stay in NAME.part.

Failure policy: a file that fails does not stop the others; at the end one ValueError of one line says what to do about
the first, the rest have been said.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from nft_ray.downloads.cache import (
    GIT_SHA1,
    SHA256,
    git_sha1,
    hub_blob,
    hub_cache,
    hub_file,
    is_verified,
    link,
    matches,
    record,
    sha256,
)
from nft_ray.downloads.published import HUB, PublishedFile
from nft_ray.downloads.transfer import (
    MIB,
    RefusedError,
    Say,
    Source,
    UnreachableError,
    check_space,
    download,
    innermost,
    locked,
    part_of,
    size_of,
    tag_file,
)

Token = str | bool | None
"""Of the Hub: one, False for none, None for that of this process."""


def fetch(
    files: Sequence[PublishedFile], root: Path | None, say: Say, *, into_hub_cache: bool = False, token: Token = None
) -> None:
    """Bring every file that is not there yet; return when all are, each of the published content.

    root: the folder where they go. into_hub_cache: files of the Hub go to its cache instead, but for a repository that
    is whole in the folder; without a folder all do. What the Hub's cache has is never downloaded again.
    Raises ValueError, one line: no network (which file to put where), too little disk, a refusal, a wrong checksum.
    """
    places = _places(files, root, into_hub_cache)
    wanted = [file for file in files if not _is_there(file, files, places)]
    if present := len(files) - len(wanted):
        say(f"{present} of {len(files)} files are there")
    for place in dict.fromkeys(places[file.path] for file in wanted):
        _check_space([file for file in wanted if places[file.path] == place], place)
    problems: list[str] = []
    unreachable: dict[str, UnreachableError] = {}
    for number, file in enumerate(wanted, 1):
        place, host = places[file.path], _host(file)
        try:
            if host in unreachable:
                raise unreachable[host]
            _fetch_one(file, place, say, f"[{number}/{len(wanted)}] {file.path}", token)
        except UnreachableError as error:
            if place is not None and (place / file.path).is_file():
                say(f"{file.path}: is there but not checked, for {error.host} cannot be reached")
                continue
            unreachable[error.host] = error
            problems.append(f"{error}: {_instead(file, root)}")
        except RefusedError as error:
            problems.append(_refusal(file, error.status))
        except ValueError as error:
            problems.append(str(error))
    for problem in problems[1:]:
        say(problem)
    if problems:
        raise ValueError(problems[0] + (f" (and {len(problems) - 1} more, said above)" if problems[1:] else ""))


def _places(files: Sequence[PublishedFile], root: Path | None, into_hub_cache: bool) -> dict[str, Path | None]:
    """Path -> the folder below which a file belongs, None for the Hub's cache."""
    if root is None:
        return dict.fromkeys(file.path for file in files)
    absent = {file.repository for file in files if not (root / file.path).is_file()}
    to_hub = {file.path for file in files if into_hub_cache and file.url is None and file.repository in absent}
    return {file.path: None if file.path in to_hub else root for file in files}


def _is_there(file: PublishedFile, files: Sequence[PublishedFile], places: dict[str, Path | None]) -> bool:
    """A repository in the Hub's cache is whole or asked for again: its files must be of one commit."""
    place = places[file.path]
    if place is not None:
        return is_verified(file, place)
    return all(hub_file(other) for other in files if other.repository == file.repository)


def _fetch_one(file: PublishedFile, place: Path | None, say: Say, label: str, token: Token) -> None:
    if place is not None and _copied_from_hub_cache(file, place / file.path):
        say(f"{label}: copied from the Hub's cache")
        return
    source = _published(file, token)
    target = hub_blob(file, source.tag or "") if place is None else place / file.path
    if target.is_file():
        if place is None or matches(target, source.digest):
            _keep(file, source, target, place)
            say(f"{label}: was there, and is what is published")
            return
        say(f"{label}: what is there is not what is published; downloading it again")
    part = part_of(target)
    with locked(part, wait=place is None) as out:
        if place is None and target.is_file():  # of another who was first, perhaps under another name
            _keep(file, source, target, place)
            return
        download(source, out, part, say, label)
        out.flush()
        os.fsync(out.fileno())
        if not matches(part, source.digest):
            said = sha256(part) if SHA256.fullmatch(source.digest or "") else git_sha1(part)
            part.unlink()
            tag_file(part).unlink(missing_ok=True)
            raise ValueError(
                f"{file.origin}: its checksum is {said}, published is {source.digest}; deleted, fetch it again"
            )
        os.replace(part, target)
        tag_file(part).unlink(missing_ok=True)
        _keep(file, source, target, place)
    say(f"{label}: {size_of(target) / MIB:.1f} MiB, {'checksum right' if source.digest else sha256(target)}")


def _keep(file: PublishedFile, source: Source, target: Path, place: Path | None) -> None:
    """Make a whole file known: by its record in a folder, by its names in the Hub's cache."""
    if place is not None:
        record(target, sha256(target))
    else:
        assert source.commit is not None
        assert source.tag is not None
        link(file, source.commit, source.tag)


def _copied_from_hub_cache(file: PublishedFile, target: Path) -> bool:
    """Somebody wants it in his folder and has it in the cache: no byte comes over the network."""
    known = hub_file(file)
    if known is None or target.is_file():
        return False
    with locked(part_of(target)):
        shutil.copyfile(known, part_of(target))
        os.replace(part_of(target), target)
        tag_file(part_of(target)).unlink(missing_ok=True)
        record(target, sha256(target))
    return True


# What is published


def _published(file: PublishedFile, token: Token) -> Source:
    if file.url is not None:
        return Source(url=file.url, digest=file.digest, tag=file.digest)
    source = _hub_record(file, token)
    if file.sha256 is None:
        return source
    if source.digest is not None and SHA256.fullmatch(source.digest) and source.digest != file.sha256:
        raise ValueError(f"{file.origin}: its checksum is {source.digest} by now, wanted is {file.sha256}")
    return Source(
        url=source.url,
        headers=source.headers,
        size=source.size,
        digest=file.sha256,
        tag=source.tag,
        commit=source.commit,
    )


def _hub_record(file: PublishedFile, token: Token) -> Source:
    """Ask the Hub; the answer's URL names the commit, so that no later push mixes into the bytes."""
    import httpx2
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import build_hf_headers

    endpoint = constants.ENDPOINT
    url = hf_hub_url(file.repository, file.name, revision=file.revision, endpoint=endpoint)
    try:
        answer = get_hf_file_metadata(url, endpoint=endpoint, token=token)
    except OfflineModeIsEnabled:
        raise UnreachableError(_host(file), "HF_HUB_OFFLINE is set") from None
    except httpx2.TransportError as error:
        raise UnreachableError(_host(file), innermost(error)) from None
    except HfHubHTTPError as error:
        raise RefusedError(error.response.status_code) from None
    if answer.etag is None or answer.commit_hash is None:
        raise ValueError(f"{url}: does not answer as the Hub does (no ETag or no commit); is HF_ENDPOINT right?")
    is_sum = SHA256.fullmatch(answer.etag) or GIT_SHA1.fullmatch(answer.etag)
    return Source(
        url=hf_hub_url(file.repository, file.name, revision=answer.commit_hash, endpoint=endpoint),
        headers=build_hf_headers(token=token),
        size=answer.size,
        digest=answer.etag if is_sum else None,
        tag=answer.etag,
        commit=answer.commit_hash,
    )


def _host(file: PublishedFile) -> str:
    from huggingface_hub import constants

    return urlsplit(file.url or constants.ENDPOINT).netloc


# What a person is told


def _refusal(file: PublishedFile, status: int) -> str:
    if status in (401, 403) and file.url is None:
        access = f"accept its licence at {HUB}/{file.repository} and set HF_TOKEN"
        return f"{file.origin}: {status}, there is no such repository or it wants an account: {access}"
    return f"{file.origin}: the server answers {status}; look for the file's new place and put it there by hand"


def _instead(file: PublishedFile, root: Path | None) -> str:
    if root is None:
        return "start again, what has come is kept"
    return f"on a machine with a network, download {file.origin} and put it at {root / file.path}"


def _check_space(files: Sequence[PublishedFile], place: Path | None) -> None:
    """Of one place. What came earlier counts where its name is known before anybody is asked."""
    come = 0 if place is None else sum(size_of(part_of(place / file.path)) for file in files)
    check_space(sum(file.mib for file in files) * MIB - come, place or hub_cache())
