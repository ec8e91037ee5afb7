"""An export to the Hub: its files in one commit, to a repository that is private if this makes it."""

import os
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from nft_ray.downloads.pipelines import FAILURES


def push(folder: Path, hub_id: str, token: str, written: Sequence[str]) -> str:
    """Upload these files and folders of an export in one commit, to a repository that is made private if it is not
    there; returns its URL.

    ValueError where the Hub refuses, RuntimeError where it cannot be reached, with one line.
    """
    api = HfApi(token=token)
    patterns = [f"{name}/*" if (folder / name).is_dir() else name for name in written]
    try:
        url = api.create_repo(hub_id, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=hub_id, folder_path=folder, allow_patterns=patterns, commit_message="exported by nft_ray"
        )
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise ValueError(
                f"--push {hub_id}: the Hub refuses HF_TOKEN ({status}): it needs write access to that repository; "
                "see https://huggingface.co/settings/tokens"
            ) from None
        raise RuntimeError(f"--push {hub_id}: {_cause(error)}; {folder} is whole: push again") from None
    except FAILURES as error:
        raise RuntimeError(f"--push {hub_id}: {_cause(error)}; {folder} is whole: push again") from None
    return str(url)


def push_token(hub_id: str) -> str:
    """HF_TOKEN; ValueError with one line where it is not set, or that is no Hub id."""
    try:
        validate_repo_id(hub_id)
    except HFValidationError:
        raise ValueError(f"--push {hub_id}: is no Hub id; write owner/name") from None
    if hub_id.count("/") != 1:
        raise ValueError(f"--push {hub_id}: is no Hub id; write owner/name")
    token = os.environ.get("HF_TOKEN")
    if not token:
        raise ValueError(
            f"--push {hub_id}: HF_TOKEN is not set; make one with write access at https://huggingface.co/settings/tokens"
        )
    return token


def _cause(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
