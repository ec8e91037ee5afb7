"""Where a pipeline's files are: a folder, or the Hub's cache of this node, filled once per node.

    prepare ──► folder? whole snapshot in the cache? ──► its path
                    │ neither
                    ▼
                fetch: one process of the node holds the lock and downloads, the others wait; lines of progress

Only what is needed is fetched: of each part the safetensors without a variant, and its small files. What is whole in
the cache is used as it is, without asking the Hub: name `model.revision` to have the same on every node. A file that
is whole is never fetched again; within a file the Hub's client goes on where a connection broke. The token is used
for requests and appears nowhere else.
"""

import json
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
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

from nft_ray.config import ModelConfig

logger = logging.getLogger(__name__)

FAILURES = (HfHubHTTPError, httpx2.HTTPError, XetDownloadError, OSError, ValueError, RuntimeError)
"""What the Hub's client raises."""
NANO = "nano-sd3"
ALWAYS = ("scheduler", "transformer", "vae")
WEIGHTS = ("diffusion_pytorch_model", "model")
REPORT_S = 10.0
"""Seconds between two lines of progress."""
ATTEMPTS = 3
"""How often a broken connection is made again, beyond what the Hub's client does itself."""
STALL_S = 300.0
"""A download of which nothing arrived for so many seconds is given up."""


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


def folder_of(config: ModelConfig) -> Path | None:
    """The folder of a pipeline; of a Hub id the snapshot with its JSON files, None where the Hub cannot be reached.

    ValueError with one line where the Hub says no: a licence to accept, a name or a revision that is not there.
    """
    folder = location(config.path)
    if folder is not None:
        return folder
    small = ["model_index.json", "transformer/config.json", "vae/config.json"]
    mine = token()
    try:
        return Path(_snapshot(config.path, config.revision, small, mine, etag_timeout=3))
    except LocalEntryNotFoundError:
        return None  # the nodes may have it, or reach it
    except FAILURES as error:
        raise explained(error, _subject(config), config.path, mine) from None


def prepare(config: ModelConfig, text_parts: Sequence[str], *, transformer_only: bool) -> Path:
    """The folder with every part that is needed; downloads it first where it must."""
    folder = location(config.path)
    if folder is not None:
        return folder
    wanted = patterns(text_parts, transformer_only)
    cached = _cached(config, wanted, text_parts, transformer_only)
    if cached is None:
        for line in fetch(config, text_parts, transformer_only=transformer_only, token=token()):
            logger.info(line)
        cached = _cached(config, wanted, text_parts, transformer_only)
    if cached is None:
        raise ValueError(f"model.path = {config.path}: the repository is no whole pipeline in diffusers format")
    return cached


def fetch(
    config: ModelConfig, text_parts: Sequence[str], *, transformer_only: bool, token: str | None
) -> Iterator[str]:
    """Bring a Hub id's files to this node; gives a line of progress, or "" while another process does it.

    ValueError with one line where the Hub says no, or cannot be reached; RuntimeError where nothing arrives any more.
    """
    start = config.lora.start
    if start is not None and not Path(start).expanduser().exists():
        lora_folder(start, token)  # small: no lock, no progress
    if location(config.path) is not None:
        return
    wanted = patterns(text_parts, transformer_only)
    folder = Path(constants.HF_HUB_CACHE) / ".locks" / "nft_ray"
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{config.path.replace('/', '--')}.lock")
    while _cached(config, wanted, text_parts, transformer_only) is None:
        try:
            with lock.acquire(timeout=REPORT_S):
                if _cached(config, wanted, text_parts, transformer_only) is None:
                    yield from _download(config, wanted, token)
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


def is_remote(config: ModelConfig) -> bool:
    """Whether `fetch` may have something to do: the pipeline or the LoRA to start from is a Hub id."""
    names = [config.path, *([config.lora.start] if config.lora.start else [])]
    return any(name != NANO and not Path(name).expanduser().exists() and is_hub_id(name) for name in names)


def lora_folder(name: str, token: str | None) -> Path:
    """The folder of a LoRA's repository on the Hub, downloaded first where it must: its JSON and safetensors.

    Not a merged transformer that stands beside it.
    """
    try:
        return Path(_snapshot(name, None, ["*.json", "*.safetensors"], token, ignore_patterns=["transformer/*"]))
    except FAILURES as error:
        raise explained(error, f"LoRA {name}", name, token) from None


def patterns(text_parts: Sequence[str], transformer_only: bool) -> list[str]:
    """Files to fetch: of each part the small ones and the weights without a variant, whole or in shards."""
    weighed = ["transformer"] if transformer_only else ["transformer", "vae", *text_parts]
    found = ["model_index.json"]
    for part in [*ALWAYS, *([] if transformer_only else text_parts)]:
        found += [f"{part}/*.json", f"{part}/*.txt", f"{part}/*.model"]
    for part in weighed:
        found += [f"{part}/{name}{shard}.safetensors" for name in WEIGHTS for shard in ("", "-*-of-*")]
    return found


def missing_parts(folder: Path, text_parts: Sequence[str], transformer_only: bool = False) -> list[str]:
    """What a pipeline's folder lacks of the parts that are needed: folders, configurations, weights, shards."""
    missing = []
    for part in (*ALWAYS, *text_parts):
        place = folder / part
        tokenizer = part.startswith("tokenizer")
        config = "scheduler_config.json" if part == "scheduler" else "config.json"
        if not place.is_dir() or not (tokenizer or (place / config).is_file()):
            missing.append(f"{part}/" if tokenizer else f"{part}/{config}")
        elif part != "scheduler" and not tokenizer and not (part == "vae" and transformer_only):
            missing += _missing_weights(place)
    return missing


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
    return RuntimeError(f"{subject}: the download failed: {what}; start again, whole files are kept")


def _subject(config: ModelConfig) -> str:
    revision = f" at revision {config.revision}" if config.revision else ""
    return f"model.path = {config.path}{revision}"


def _download(config: ModelConfig, wanted: list[str], token: str | None) -> Iterator[str]:
    """In a thread, so that progress can be told; what is done is measured where it arrives, on the disk."""
    blobs = Path(constants.HF_HUB_CACHE) / f"models--{config.path.replace('/', '--')}" / "blobs"
    before, outcome = _size(blobs), list[Exception | None]()

    def work() -> None:
        for attempt in range(ATTEMPTS):
            try:
                _snapshot(config.path, config.revision, wanted, token)
                return outcome.append(None)
            except httpx2.TransportError as error:
                if attempt == ATTEMPTS - 1:
                    return outcome.append(error)
            except FAILURES as error:
                return outcome.append(error)

    try:
        planned = _snapshot(config.path, config.revision, wanted, token, dry_run=True)
    except FAILURES as error:
        raise explained(error, _subject(config), config.path, token) from None
    total = sum(file.file_size for file in planned if file.will_download)
    yield f"downloading {config.path}: {total / 2**30:.2f} GiB in {len(planned)} files"
    thread = threading.Thread(target=work, name=f"download {config.path}", daemon=True)
    thread.start()
    done, moved = 0, time.monotonic()
    while thread.is_alive():
        thread.join(REPORT_S)
        now = _size(blobs) - before
        if now != done:
            done, moved = now, time.monotonic()
        if time.monotonic() - moved > STALL_S:
            raise RuntimeError(f"model.path = {config.path}: nothing arrived for {STALL_S:g} s; start again")
        if thread.is_alive():
            yield f"downloading {config.path}: {done / 2**30:.2f} of {total / 2**30:.2f} GiB"
    failure = outcome[0] if outcome else RuntimeError("the thread died")
    if failure is not None:
        raise explained(failure, _subject(config), config.path, token) from failure
    yield f"downloaded {config.path}"


def _snapshot(name: str, revision: str | None, wanted: list[str], token: str | None, **options: Any) -> Any:
    return snapshot_download(
        name, revision=revision, allow_patterns=wanted, token=token or False, tqdm_class=_NoBar, **options
    )


def _cached(config: ModelConfig, wanted: list[str], text_parts: Sequence[str], transformer_only: bool) -> Path | None:
    """The snapshot in the cache, if it is whole."""
    try:
        folder = Path(_snapshot(config.path, config.revision, wanted, None, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    parts = () if transformer_only else text_parts
    return None if missing_parts(folder, parts, transformer_only) else folder


def _missing_weights(place: Path) -> list[str]:
    for name in WEIGHTS:
        index = place / f"{name}.safetensors.index.json"
        if index.is_file():
            shards = set(json.loads(index.read_text())["weight_map"].values())
            return [f"{place.name}/{shard}" for shard in sorted(shards) if not (place / shard).is_file()]
        if (place / f"{name}.safetensors").is_file():
            return []
    return [f"{place.name}/*.safetensors"]


class _NoBar(tqdm):  # type: ignore[type-arg]
    """Bars are for terminals; here, lines are told."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{name: value for name, value in options.items() if name != "name"}, disable=True)


def _size(folder: Path) -> int:
    """Bytes in a folder's files; a file that is renamed meanwhile counts next time."""
    total = 0
    for file in folder.glob("*"):
        try:
            total += file.stat().st_size
        except FileNotFoundError:
            continue
    return total
