"""What `--lora` may name besides the files that lora_files.py reads: a run, its checkpoints, a Hub id."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from nft_ray.checkpoint import whole_checkpoints
from nft_ray.models.download import FAILURES
from nft_ray.models.lora_files import DIFFUSERS, PEFT, PEFT_CONFIG

FILES = [DIFFUSERS, PEFT_CONFIG, PEFT]


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
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ValueError(f"LoRA {name}: no such file or folder, and no Hub id (owner/name)") from None
    if name.count("/") != 1:
        raise ValueError(f"LoRA {name}: no such file or folder, and no Hub id (owner/name)")
    return _download(name)


def _download(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=[*FILES, *(f"lora/{file}" for file in FILES)]))
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403, 404):
            raise ValueError(
                f"LoRA {name}: no such file or folder, and the Hub answers {status}: it is not there, or not for this "
                "HF_TOKEN"
            ) from None
        raise RuntimeError(f"LoRA {name}: the Hub answers {status}; try again") from None
    except FAILURES as error:
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"LoRA {name}: no such file or folder, and the Hub cannot be asked: {why}") from None
