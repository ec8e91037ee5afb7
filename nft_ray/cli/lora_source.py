"""What `--lora` may name besides the files and Hub ids that lora_files.py reads: a run, or its checkpoints."""

from pathlib import Path

from nft_ray.runs.checkpoint import whole_checkpoints


def find_source(name: str) -> str | Path:
    """What `read_lora` reads: of a run, or of its checkpoints, the newest whole one, whose EMA policy counts.

    ValueError with one line where a run has none yet. Any other name is passed on.
    """
    path = Path(name).expanduser()
    if (path / "config.yaml").is_file() and (path / "checkpoints").is_dir():
        path = path / "checkpoints"
    if not path.is_dir() or path.name != "checkpoints":
        return name
    whole = whole_checkpoints(path)
    if not whole:
        raise ValueError(f"LoRA {name}: no checkpoint is there yet")
    return whole[-1]
