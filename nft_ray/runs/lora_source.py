"""What `--lora` may name besides the files and Hub ids that lora_files.py reads: a run, or its checkpoints."""

from pathlib import Path

from nft_ray.models.lora_files import DIFFUSERS, PEFT_CONFIG, refuse_published, run_checkpoints
from nft_ray.runs.checkpoint import newest_whole


def find_source(name: str) -> str | Path:
    """What `read_lora` reads: of a run, or of its checkpoints, the newest whole one, whose EMA policy counts.

    ValueError with one line where a run has none yet, and where a folder holds `checkpoint-N` folders, as the published
    code leaves them: one of those has to be named. Any other name is passed on.
    """
    path = Path(name).expanduser()
    if any((path / file).is_file() for file in (DIFFUSERS, PEFT_CONFIG)):
        return name
    refuse_published(name)
    folder = run_checkpoints(name)
    if folder is None:
        return name
    whole = newest_whole(folder)
    if whole is None:
        raise ValueError(f"LoRA {name}: no checkpoint is there yet")
    return whole
