"""Which files of a pipeline a model needs, and whether a folder has them. `downloads/pipelines.py` brings them."""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from nft_ray.config import ModelConfig
from nft_ray.downloads import pipelines
from nft_ray.downloads.pipelines import location, lora_folder

ALWAYS = ("scheduler", "transformer", "vae")
WEIGHTS = ("diffusion_pytorch_model", "model")
DESCRIPTIONS = ("model_index.json", "transformer/config.json", "vae/config.json")


def folder_of(config: ModelConfig) -> Path | None:
    """The folder of a pipeline; of a Hub id the snapshot with its JSON files, None where the Hub cannot be reached.

    ValueError with one line where the Hub says no: a licence to accept, a name or a revision that is not there.
    """
    return location(config.path) or pipelines.described(config.path, config.revision, DESCRIPTIONS)


def prepare(config: ModelConfig, text_parts: Sequence[str], *, transformer_only: bool) -> Path:
    """The folder with every part that is needed; downloads it first where it must."""
    folder = location(config.path)
    if folder is not None:
        return folder
    wanted = patterns(text_parts, transformer_only)
    return pipelines.prepare(config.path, config.revision, wanted, _whole(text_parts, transformer_only))


def fetch(
    config: ModelConfig, text_parts: Sequence[str], *, transformer_only: bool, token: str | None
) -> Iterator[str]:
    """Bring to this node what of the Hub is needed, the LoRA to start from too; see pipelines.fetch."""
    start = config.lora.start
    if start is not None and not Path(start).expanduser().exists():
        lora_folder(start, token)  # small: no lock, no progress
    if location(config.path) is None:
        wanted = patterns(text_parts, transformer_only)
        yield from pipelines.fetch(config.path, config.revision, wanted, _whole(text_parts, transformer_only), token)


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


def weight_files(place: Path) -> list[Path]:
    """What holds the weights of a part: one file, or the shards that its index names, be they there or not."""
    for name in WEIGHTS:
        index = place / f"{name}.safetensors.index.json"
        if index.is_file():
            return [place / shard for shard in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        if (place / f"{name}.safetensors").is_file():
            return [place / f"{name}.safetensors"]
    return []


def _whole(text_parts: Sequence[str], transformer_only: bool) -> pipelines.Whole:
    parts = () if transformer_only else text_parts
    return partial(_lacks_nothing, text_parts=parts, transformer_only=transformer_only)


def _lacks_nothing(folder: Path, text_parts: Sequence[str], transformer_only: bool) -> bool:
    return not missing_parts(folder, text_parts, transformer_only)


def _missing_weights(place: Path) -> list[str]:
    files = weight_files(place)
    if not files:
        return [f"{place.name}/*.safetensors"]
    return [f"{place.name}/{file.relative_to(place)}" for file in files if not file.is_file()]
