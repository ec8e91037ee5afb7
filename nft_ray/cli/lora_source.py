"""What `--lora` may name besides the files that lora_files.py reads: a run, its checkpoints, a Hub id."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from nft_ray.checkpoint import whole_checkpoints

FILES = ("*.safetensors", "*adapter_config.json")


def find_source(name: str) -> Path:
    """A file or folder that `read_lora` reads. Of a run, or of its checkpoints, the newest whole one: its EMA policy.

    A name that is no file here is taken for a Hub id, and downloaded. ValueError with one line where there is neither.
    """
    path = Path(name).expanduser()
    if (path / "config.yaml").is_file() and (path / "checkpoints").is_dir():
        path = path / "checkpoints"
    if path.is_dir() and path.name == "checkpoints":
        whole = whole_checkpoints(path)
        if not whole:
            raise ValueError(f"LoRA {name}: no checkpoint is there yet")
        return whole[-1]
    if path.exists():
        return path
    return _download(name)


def _download(name: str) -> Path:
    try:
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise HFValidationError
        validate_repo_id(name)
    except HFValidationError:
        raise ValueError(f"LoRA {name}: no such file or folder, and no Hub id (owner/name)") from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        cause = error.__cause__ or error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status in (401, 403, 404):
            raise ValueError(
                f"LoRA {name}: no such file or folder, and the Hub answers {status}: not there, or not for this "
                "HF_TOKEN"
            ) from None
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"LoRA {name}: no such file or folder, and the Hub cannot be asked: {why}") from None
