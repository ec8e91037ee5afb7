"""LoRA files of others: which tensors they hold and with which rank, alpha and targets. Headers only, no torch.

pytorch_lora_weights.safetensors (or another .safetensors file)   diffusers; alpha and targets in its metadata
adapter_config.json + adapter_model.safetensors                   peft, as the published code writes them
checkpoint-N/lora/...                                             the published layout, one folder up
state.json + ema.safetensors                                      our own checkpoint: the EMA policy

A file is read with what stands beside it, however it was named: its alpha is not in its tensors.
"""

import functools
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nft_ray.config import LoraConfig
from nft_ray.downloads.pipelines import is_hub_id, lora_folder, token

logger = logging.getLogger(__name__)

DIFFUSERS, PEFT, PEFT_CONFIG = "pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"
STATE = "state.json"
PREFIXES = ("base_model.model.", "transformer.")
"""What peft and diffusers write before a layer's name."""
UNSUPPORTED = ("use_dora", "use_rslora", "lora_bias", "rank_pattern", "alpha_pattern")
"""peft options that change what the factors mean; false or empty in every LoRA that this project makes."""
NARROWING = ("layers_to_transform", "layers_pattern", "exclude_modules")
"""peft options by which not every layer of that name has a LoRA."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraFile:
    """A safetensors file with a LoRA; `tensors`: wire name -> (name in the file, shape)."""

    path: Path
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    config: LoraConfig


def find_lora(path: str | Path) -> LoraFile:
    """The LoRA in a file or folder, or of a Hub id, which is downloaded; ValueError where none can be used."""
    place = Path(path).expanduser()
    if place.is_file():
        return _file(place)
    if not place.is_dir():
        if not is_hub_id(str(path)):
            raise ValueError(f"LoRA {path}: no such file or folder, and no Hub id")
        place = lora_folder(str(path), token())
    if (place / PEFT_CONFIG).is_file():
        if not (place / PEFT).is_file():
            raise ValueError(f"LoRA {path}: {PEFT_CONFIG} stands there without {PEFT}")
        return _file(place / PEFT)
    if (place / DIFFUSERS).is_file():
        return _file(place / DIFFUSERS)
    if (place / STATE).is_file() and (place / "ema.safetensors").is_file():
        return _file(place / "ema.safetensors")
    if (place / "lora").is_dir():
        return find_lora(place / "lora")
    others = sorted(place.glob("*.safetensors"))
    if len(others) == 1:
        return _file(others[0])
    raise ValueError(f"LoRA {path}: holds neither {DIFFUSERS} nor {PEFT_CONFIG} with {PEFT}, nor one .safetensors file")


def _file(path: Path) -> LoraFile:
    header = _header(path)
    metadata = json.loads(header.pop("__metadata__", {}).get("lora_adapter_metadata", "{}"))
    tensors = {_wire_name(name, path): (name, tuple(entry["shape"])) for name, entry in sorted(header.items())}
    options = {key.removeprefix("transformer."): value for key, value in metadata.items()} or _beside(path, header)
    for option in UNSUPPORTED:
        if options.get(option):
            raise ValueError(f"LoRA {path}: {option} = {options[option]!r} is not supported; train one without it")
    layers = sorted({name.rsplit(".lora_", 1)[0] for name in tensors})
    alone = sorted(layer for layer in layers for end in "AB" if f"{layer}.lora_{end}.weight" not in tensors)
    if alone:
        raise ValueError(f"LoRA {path}: layer {alone[0]} has only one of lora_A and lora_B")
    ranks = {shape[0 if ".lora_A." in name else 1] for name, (_, shape) in tensors.items()}
    if len(ranks) != 1:
        raise ValueError(f"LoRA {path}: layers of ranks {sorted(ranks)}; one rank for all is needed")
    (rank,) = ranks
    if "lora_alpha" not in options:
        _say_scaled_by_one(path, rank)
    alpha = options.get("lora_alpha", rank)
    if alpha != int(alpha) or alpha < 1:
        raise ValueError(f"LoRA {path}: alpha = {alpha}; a whole number from 1 is needed")
    config = LoraConfig(rank=rank, alpha=int(alpha), targets=_targets(options, layers))
    return LoraFile(path=path, tensors=tensors, config=config)


def _beside(path: Path, names: Iterable[str]) -> Mapping[str, Any]:
    """What says of a file without metadata what it is: peft's configuration or our state, in the same folder.

    A file in diffusers' format may do without. ValueError where nothing says alpha.
    """
    if all(name.startswith("transformer.") for name in names):
        return {}
    if (path.parent / PEFT_CONFIG).is_file():
        return _json(path.parent / PEFT_CONFIG)
    if (path.parent / STATE).is_file():
        ours = _json(path.parent / STATE)["config"]["model"]["lora"]
        return {"lora_alpha": ours["alpha"], "target_modules": ours["targets"]}
    if any(name.startswith("base_model.model.") for name in names):
        raise ValueError(f"LoRA {path}: a file of peft whose {PEFT_CONFIG} is missing beside it: that says alpha")
    raise ValueError(f"LoRA {path}: nothing says its alpha: {PEFT_CONFIG} or {STATE} is missing beside it")


@functools.cache
def _say_scaled_by_one(path: Path, rank: int) -> None:
    logger.warning(
        "LoRA %s: does not say its alpha; it is scaled by 1, as diffusers does: alpha = rank = %d", path, rank
    )


def _targets(options: Mapping[str, Any], layers: list[str]) -> tuple[str, ...]:
    """The names that were asked for, where they say it all; otherwise every layer by its whole path."""
    named = options.get("target_modules")
    if not isinstance(named, list) or any(options.get(option) for option in NARROWING):
        return tuple(layers)
    endings = tuple(f".{name}" for name in named)
    return tuple(sorted(named)) if all(f".{layer}".endswith(endings) for layer in layers) else tuple(layers)


def _wire_name(name: str, path: Path) -> str:
    found = name
    while any(found.startswith(prefix) for prefix in PREFIXES):
        for prefix in PREFIXES:
            found = found.removeprefix(prefix)
    found = found.replace(".default.weight", ".weight")
    if not found.endswith((".lora_A.weight", ".lora_B.weight")) or found.startswith("text_encoder"):
        raise ValueError(f"LoRA {path}: tensor {name} is not a transformer's lora_A or lora_B; use diffusers' format")
    return found


def _header(path: Path) -> dict[str, Any]:
    """The JSON at the head of a safetensors file: 8 bytes of length, then names, shapes and offsets."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 0 < size <= path.stat().st_size - 8:
                raise ValueError("the header is cut")
            header: dict[str, Any] = json.loads(file.read(size))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        if not ends:
            raise ValueError("no tensor")
        if path.stat().st_size != 8 + size + max(ends):
            raise ValueError("the data are cut")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"LoRA {path}: not a whole safetensors file ({' '.join(str(error).split())})") from None
    return header


def _json(path: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"LoRA {path}: {' '.join(str(error).split())}") from None
    return data
