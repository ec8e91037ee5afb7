"""LoRA files of others: which tensors they hold and with which rank, alpha and targets. Headers only, no torch.

pytorch_lora_weights.safetensors (or another .safetensors file)   diffusers; alpha and targets in its metadata
adapter_config.json + adapter_model.safetensors                   peft, as the published code writes them; one file of
                                                                  another name will do
checkpoint-N/lora/..., RUN/lora/...                                the published layout, our finished run: one folder up
state.json + ema.safetensors                                      our own checkpoint: the EMA policy

A file is read with what stands beside it, however it was named: its alpha is not in its tensors.
"""

import functools
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from nft_ray.config import LoraConfig
from nft_ray.downloads.pipelines import is_hub_id, lora_folder, token

logger = logging.getLogger(__name__)

DIFFUSERS, PEFT, PEFT_CONFIG = "pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"
STATE = "state.json"
METADATA = "lora_adapter_metadata"
"""What diffusers writes into its file's header: peft's configuration."""
PEFT_ALPHA = 8
"""`peft.LoraConfig().lora_alpha`, the default of that field: peft, and diffusers with such metadata, scale a LoRA by it
whose configuration leaves `lora_alpha` out. peft itself writes every field, so only a file made by hand does."""
SHOWN = 8
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
    others = sorted(place.glob("*.safetensors"))
    if (place / PEFT_CONFIG).is_file():
        if not (place / PEFT).is_file() and len(others) != 1:
            choice = f"; name one of {', '.join(file.name for file in others[:SHOWN])}" if others else ""
            raise ValueError(f"LoRA {path}: {PEFT_CONFIG} stands there without {PEFT}{choice}")
        return _file(place / PEFT if (place / PEFT).is_file() else others[0])
    if (place / DIFFUSERS).is_file():
        return _file(place / DIFFUSERS)
    refuse_published(path)
    if (place / STATE).is_file() and (place / "ema.safetensors").is_file():
        return _file(place / "ema.safetensors")
    if (place / "lora").is_dir():
        return find_lora(place / "lora")
    if len(others) == 1:
        return _file(others[0])
    _refuse_run(path)
    raise ValueError(f"LoRA {path}: holds neither {DIFFUSERS} nor {PEFT_CONFIG} with {PEFT}, nor one .safetensors file")


@contextmanager
def opened(file: LoraFile, framework: str) -> Iterator[Any]:
    """Its tensors as safetensors gives them ("pt", "np"); ValueError where it cannot be read."""
    try:
        with safe_open(file.path, framework) as tensors:
            yield tensors
    except SafetensorError as error:  # what the header's shapes do not show: data types, gaps between the tensors
        raise ValueError(f"LoRA {file.path}: not a whole safetensors file ({' '.join(str(error).split())})") from None


def lora_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a LoRA's tensors by wire name; ValueError with one line as `find_lora`, and where it cannot be read."""
    file = find_lora(path)
    with opened(file, "np"):
        return {name: shape for name, (_, shape) in file.tensors.items()}


def refuse_published(path: str | Path) -> None:
    """ValueError where a folder holds `checkpoint-N` folders, as the published code leaves them: one is to be named."""
    folder = Path(path).expanduser()
    if found := _numbered(folder, "checkpoint-") or _numbered(folder / "checkpoints", "checkpoint-"):
        raise ValueError(f"LoRA {path}: holds checkpoints of the published code {_listed(found)}")


def run_checkpoints(path: str | Path) -> Path | None:
    """The folder of a run's checkpoints, of the run or of that folder itself; None where `path` is neither."""
    folder = Path(path).expanduser()
    if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
        folder = folder / "checkpoints"
    return folder if folder.is_dir() and folder.name == "checkpoints" else None


def _refuse_run(path: str | Path) -> None:
    """A policy starts from ONE checkpoint: a run that goes on would be another start tomorrow."""
    folder = run_checkpoints(path)
    if folder is None:
        return
    found = [checkpoint for checkpoint in _numbered(folder, "epoch-") if (checkpoint / STATE).is_file()]
    if not found:
        raise ValueError(f"LoRA {path}: no checkpoint is there yet")
    raise ValueError(f"LoRA {path}: holds checkpoints of a run {_listed(found)}")


def _numbered(folder: Path, prefix: str) -> list[Path]:
    """FOLDER/checkpoint-30, ...: by their numbers."""
    found = {path: path.name.removeprefix(prefix) for path in folder.glob(f"{prefix}*") if path.is_dir()}
    return sorted((path for path, number in found.items() if number.isdigit()), key=lambda path: int(found[path]))


def _listed(found: list[Path]) -> str:
    shown = ["..."] * (len(found) > SHOWN) + [folder.name for folder in found[-SHOWN:]]
    return f"({', '.join(shown)}); name one, the newest is {found[-1]}"


def _file(path: Path) -> LoraFile:
    header = _header(path)
    metadata = header.pop("__metadata__", {})
    tensors = {_wire_name(name, path): (name, tuple(entry["shape"])) for name, entry in sorted(header.items())}
    for name, shape in tensors.values():
        if len(shape) != 2 or 0 in shape:
            raise ValueError(
                f"LoRA {path}: tensor {name} has shape {shape}; lora_A and lora_B are matrices: is it a LoRA?"
            )
    where, options = _options(path, metadata, header)
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
    if where is None:
        _say_scaled_by_one(path, rank)
    alpha = rank if where is None else options.get("lora_alpha", PEFT_ALPHA)
    whole = type(alpha) is int or (type(alpha) is float and alpha.is_integer())  # true is an int as well
    if not whole or alpha < 1:
        raise ValueError(f"LoRA {path}: lora_alpha = {alpha!r} in {where}; a whole number from 1 is needed, as 16")
    config = LoraConfig(rank=rank, alpha=int(alpha), targets=_targets(options, layers))
    return LoraFile(path=path, tensors=tensors, config=config)


def _options(path: Path, metadata: Mapping[str, Any], names: Iterable[str]) -> tuple[str | None, Mapping[str, Any]]:
    """peft's options of a file, and where they stand: in its metadata, or in what stands beside it.

    A file in diffusers' format may do without: (None, {}). ValueError where nothing says alpha.
    """
    if METADATA in metadata and (own := _object(path, METADATA, metadata[METADATA])):
        return METADATA, {key.removeprefix("transformer."): value for key, value in own.items()}
    for_diffusers = all(name.startswith("transformer.") for name in names)
    if for_diffusers and path.name == DIFFUSERS:  # diffusers' own name: what lies beside is not about this file
        return None, {}
    if (path.parent / PEFT_CONFIG).is_file():
        return PEFT_CONFIG, _beside(path, PEFT_CONFIG)
    if for_diffusers:
        return None, {}
    if (path.parent / STATE).is_file():
        try:
            ours = _beside(path, STATE)["config"]["model"]["lora"]
            return STATE, {"lora_alpha": ours["alpha"], "target_modules": ours["targets"]}
        except (KeyError, TypeError):
            raise ValueError(f"LoRA {path}: {STATE} does not say config.model.lora's alpha and targets") from None
    if any(name.startswith("base_model.model.") for name in names):
        raise ValueError(f"LoRA {path}: a file of peft whose {PEFT_CONFIG} is missing beside it: that says alpha")
    raise ValueError(f"LoRA {path}: nothing says its alpha: {PEFT_CONFIG} or {STATE} is missing beside it")


def _beside(path: Path, name: str) -> dict[str, Any]:
    try:
        return _object(path, name, (path.parent / name).read_text())
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"LoRA {path}: {name}: {' '.join(str(error).split())}") from None


def _object(path: Path, where: str, text: Any) -> dict[str, Any]:
    """The JSON object that `text` is; ValueError with one line for anything else."""
    try:
        data = json.loads(text)
        if not isinstance(data, dict):
            raise TypeError(f"but {text[:20]}")
    except (ValueError, TypeError) as error:
        raise ValueError(f"LoRA {path}: {where}: no JSON object ({' '.join(str(error).split())})") from None
    return data


@functools.cache
def _say_scaled_by_one(path: Path, rank: int) -> None:
    logger.warning(
        "LoRA %s: does not say its alpha; it is scaled by 1, as diffusers does: alpha = rank = %d", path, rank
    )


def _targets(options: Mapping[str, Any], layers: list[str]) -> tuple[str, ...]:
    """The names that were asked for, where they say it all; otherwise every layer by its whole path."""
    named = options.get("target_modules")
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        return tuple(layers)
    if any(options.get(option) for option in NARROWING):
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
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        ends = [entry["data_offsets"][1] for entry in entries]
        if not ends:
            raise ValueError("no tensor")
        if not all(isinstance(size, int) for entry in entries for size in entry["shape"]):
            raise ValueError("a shape that is none")
        if not isinstance(header.get("__metadata__", {}), dict):
            raise ValueError("metadata that are no object")
        if path.stat().st_size != 8 + size + max(ends):
            raise ValueError("the data are cut")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"LoRA {path}: not a whole safetensors file ({' '.join(str(error).split())})") from None
    return header
