"""Where a pipeline's files are: a folder, or the Hub's cache of this node, filled once per node.

    prepare ──► folder? whole snapshot in the cache? ──► its path
                    │ neither
                    ▼
                fetch: one process of the node holds the lock and downloads, the others wait; lines of progress

The Hub's client says which files match and resolves names and licences; fetch.py brings them, as it brings the rewards'
weights, and goes on where a connection broke or a process died. What is whole in the cache is used as it is, without
asking the Hub: name `model.revision` to have the same on every node. The token is used for requests and appears
nowhere else.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import httpx2
import huggingface_hub
from filelock import FileLock, Timeout
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)
from huggingface_hub.utils import validate_repo_id
from tqdm import tqdm

from nft_ray.downloads.cache import hub_file
from nft_ray.downloads.fetch import fetch as fetch_files
from nft_ray.downloads.published import PublishedFile
from nft_ray.downloads.transfer import ATTEMPTS, MIB, TIMEOUT_S

logger = logging.getLogger(__name__)

FAILURES = (HfHubHTTPError, httpx2.HTTPError, XetDownloadError, OSError, ValueError, RuntimeError)
"""What the Hub's client raises."""
NANO = "nano-sd3"
Whole = Callable[[Path], bool]
"""Whether a snapshot has all that is needed of it (models/parts.py)."""
REPORT_S = 10.0
"""Seconds between two lines of progress."""
CONNECTIONS = 4
"""Files that come at the same time."""
STALL_S = ATTEMPTS * TIMEOUT_S[1]
"""A download of which nothing arrived for so many seconds is given up."""
LORA_FILES = ["*.json", "*.safetensors"]


def token() -> str | None:
    """The Hub token of this process: HF_TOKEN, or what `hf auth login` left."""
    return huggingface_hub.get_token()


def location(path: str) -> Path | None:
    """The folder that `path` names (`nano-sd3` is packaged), None for a Hub id; ValueError for neither."""
    if path == NANO:
        return Path(__file__).parents[1] / "shapes" / "nano_sd3"
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_id(path):
        raise ValueError(f"model.path = {path}: no such folder; name a folder, a Hub id or {NANO}")
    return None


def described(path: str, revision: str | None, small: Sequence[str]) -> Path | None:
    """The snapshot of a Hub id with these small files; None where the Hub cannot be reached.

    ValueError with one line where the Hub says no: a licence to accept, a name or a revision that is not there.
    """
    mine = token()
    try:
        return Path(_snapshot(path, revision, small, mine, etag_timeout=3))
    except LocalEntryNotFoundError:
        return None  # the nodes may have it, or reach it
    except FAILURES as error:
        raise explained(error, _subject(path, revision), path, mine) from None


def prepare(path: str, revision: str | None, wanted: Sequence[str], whole: Whole) -> Path:
    """The snapshot of a Hub id with the wanted files, once `whole` says so; downloads it first where it must."""
    cached = _cached(path, revision, wanted, whole)
    if cached is None:
        for line in fetch(path, revision, wanted, whole, token()):
            logger.info(line)
        cached = _cached(path, revision, wanted, whole)
    if cached is None:
        raise ValueError(f"model.path = {path}: the repository is no whole pipeline in diffusers format")
    return cached


def fetch(path: str, revision: str | None, wanted: Sequence[str], whole: Whole, token: str | None) -> Iterator[str]:
    """Bring a Hub id's files to this node; gives a line of progress, or "" while another process does it.

    wanted: patterns of the files. ValueError with one line where the Hub says no, or cannot be reached; RuntimeError
    where nothing arrives any more.
    """
    folder = Path(constants.HF_HUB_CACHE) / ".locks" / "nft_ray"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{path.replace('/', '--')}.lock")
    while _cached(path, revision, wanted, whole) is None:
        try:
            with lock.acquire(timeout=REPORT_S):
                if _cached(path, revision, wanted, whole) is None:
                    yield from _download(path, revision, wanted, token)
                return
        except Timeout:
            yield ""


def is_hub_id(path: str) -> bool:
    """Whether this is how the Hub names a repository: ORG/NAME."""
    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return path.count("/") == 1 and not path.startswith((".", "/", "~"))


def is_remote(name: str) -> bool:
    """Whether this pipeline or LoRA is a Hub id, so that there may be something to download."""
    return name != NANO and not Path(name).expanduser().exists() and is_hub_id(name)


def lora_folder(name: str, token: str | None) -> Path:
    """The folder of a LoRA's repository on the Hub, downloaded first where it must: its JSON and safetensors.

    Not a merged transformer that stands beside it. Without a way to the Hub, what is in the cache.
    """
    subject, others = f"LoRA {name}", {"ignore_patterns": ["transformer/*"]}
    try:
        files = _planned(name, None, LORA_FILES, token, subject, **others)
        fetch_files(files, None, logger.info, into_hub_cache=True, token=token or False)
    except ValueError:
        with suppress(LocalEntryNotFoundError):
            return Path(_snapshot(name, None, LORA_FILES, None, local_files_only=True, **others))
        raise
    return Path(_snapshot(name, None, LORA_FILES, None, local_files_only=True, **others))


def explained(error: BaseException, subject: str, name: str, token: str | None) -> Exception:
    """What the Hub's answer about the repository `name` means for the user, in one line that starts with `subject`."""
    url = f"https://huggingface.co/{name}"
    had = "the token has no access" if token else "HF_TOKEN is not set"
    if isinstance(error, DryRunError):
        error = error.__cause__ or LocalEntryNotFoundError(str(error))
    if isinstance(error, GatedRepoError):
        return ValueError(
            f"{subject}: gated, and {had}: accept its licence at {url} and set HF_TOKEN to a token of that account"
        )
    if isinstance(error, RevisionNotFoundError):
        return ValueError(f"{subject}: it has no such branch, tag or commit as its revision says; see {url}")
    if isinstance(error, RepositoryNotFoundError):
        return ValueError(
            f"{subject}: the Hub shows no such repository, and {had}: check the name at {url}; if it is private or "
            "gated, set HF_TOKEN to a token that may read it"
        )
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return ValueError(
            f"{subject}: the Hub refuses the token ({error.response.status_code}): accept the licence at {url} and set "
            "HF_TOKEN to a valid token of that account"
        )
    if isinstance(error, (LocalEntryNotFoundError, httpx2.ConnectError, OfflineModeIsEnabled)):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        return ValueError(
            f"{subject}: not (whole) in {constants.HF_HUB_CACHE}, and {why}: name a folder with its files instead, as "
            f"`hf download {name} --local-dir FOLDER` makes one where there is a connection"
        )
    what = " ".join(str(error).split())[:300] or type(error).__name__
    return RuntimeError(f"{subject}: the download failed: {what}; start again, what has come is kept")


def _subject(path: str, revision: str | None) -> str:
    return f"model.path = {path}" + (f" at revision {revision}" if revision else "")


def _download(path: str, revision: str | None, wanted: Sequence[str], token: str | None) -> Iterator[str]:
    """In threads, so that a line, or "", comes every REPORT_S seconds."""
    subject, lines = _subject(path, revision), SimpleQueue[str | Exception | None]()
    files = _planned(path, revision, wanted, token, subject)
    yield f"downloading {path}: {sum(file.mib for file in files) / 1024:.2f} GiB in {len(files)} files"

    def bring(some: Sequence[PublishedFile]) -> None:
        try:
            fetch_files(some, None, lines.put, into_hub_cache=True, token=token or False)
            lines.put(None)
        except Exception as error:  # noqa: BLE001 - it is raised where the lines are read
            lines.put(error)

    for number in range(CONNECTIONS):
        name, some = f"download {path} {number}", files[number::CONNECTIONS]
        threading.Thread(target=bring, args=(some,), name=name, daemon=True).start()
    running = CONNECTIONS
    while running:
        try:
            line = lines.get(timeout=REPORT_S)
        except Empty:
            line = ""
        if isinstance(line, Exception):
            raise explained(line, subject, path, token) from line
        if line is None:
            running -= 1
        else:
            yield line and f"downloading {path}: {line}"
    yield f"downloaded {path}"


def _planned(
    name: str, revision: str | None, wanted: Sequence[str], token: str | None, subject: str, **options: Any
) -> list[PublishedFile]:
    """What the cache lacks of the newest commit's files that match; ValueError with one line where the Hub says no."""
    try:
        found = _snapshot(name, revision, wanted, token, dry_run=True, **options)
    except FAILURES as error:
        raise explained(error, subject, name, token) from None
    planned = []
    for one in found:
        mib = (one.file_size or 0) / MIB if one.will_download else 0.0
        file = PublishedFile(path=f"{name}/{one.filename}", revision=revision or "main", mib=mib)
        here = hub_file(file)
        if here is None or one.commit_hash not in here.parts:  # a blob that is here may still want its link
            planned.append(file)
    return planned


def _snapshot(name: str, revision: str | None, wanted: Sequence[str], token: str | None, **options: Any) -> Any:
    return snapshot_download(
        name, revision=revision, allow_patterns=list(wanted), token=token or False, tqdm_class=_NoBar, **options
    )


def _cached(path: str, revision: str | None, wanted: Sequence[str], whole: Whole) -> Path | None:
    """The snapshot in the cache, if it is whole."""
    try:
        folder = Path(_snapshot(path, revision, wanted, None, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return folder if whole(folder) else None


class _NoBar(tqdm):  # type: ignore[type-arg]
    """Bars are for terminals; here, lines are told."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{name: value for name, value in options.items() if name != "name"}, disable=True)
