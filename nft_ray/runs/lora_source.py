"""What `--lora` may name besides the files and Hub ids that lora_files.py reads: a run, or its checkpoints."""

from pathlib import Path

from nft_ray.models.lora_files import DIFFUSERS, PEFT_CONFIG
from nft_ray.runs.checkpoint import whole_checkpoints

SHOWN = 8


def find_source(name: str) -> str | Path:
    """What `read_lora` reads: of a run, or of its checkpoints, the newest whole one, whose EMA policy counts.

    ValueError with one line where a run has none yet, and where a folder holds `checkpoint-N` folders, as the published
    code leaves them: one of those has to be named. Any other name is passed on.
    """
    path = Path(name).expanduser()
    if any((path / file).is_file() for file in (DIFFUSERS, PEFT_CONFIG)):
        return name
    if published := _published(path) or _published(path / "checkpoints"):
        shown = ["..."] * (len(published) > SHOWN) + [folder.name for folder in published[-SHOWN:]]
        raise ValueError(
            f"LoRA {name}: holds checkpoints of the published code ({', '.join(shown)}); name one, the newest is "
            f"{published[-1]}"
        )
    if (path / "config.yaml").is_file() and (path / "checkpoints").is_dir():
        path = path / "checkpoints"
    if not path.is_dir() or path.name != "checkpoints":
        return name
    whole = whole_checkpoints(path)
    if not whole:
        raise ValueError(f"LoRA {name}: no checkpoint is there yet")
    return whole[-1]


def _published(folder: Path) -> list[Path]:
    """FOLDER/checkpoint-30, ...: by their numbers."""
    found = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*") if path.is_dir()}
    return sorted((path for path, number in found.items() if number.isdigit()), key=lambda path: int(found[path]))
