"""What a transformer is made of, known before it is loaded: names and shapes; and whether weights are for it.

    the headers of its files ───────────────────────┐
                                                    ├──► {name: shape} ──► how much is trained, what does not fit
    its class, built without memory (brings torch) ─┘

The second only where the files are not on this machine, such as a Hub id that the nodes are still to download.
"""

from collections.abc import Mapping
from functools import lru_cache
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from nft_ray.config import ModelConfig
from nft_ray.models.base import family, read_json
from nft_ray.models.parts import folder_of, weight_files

Shapes = Mapping[str, tuple[int, ...]]


def parameters(config: ModelConfig) -> Shapes | None:
    """Shapes of the transformer's parameters by diffusers' names; None where its configuration is not at hand."""
    folder = folder_of(config)
    return None if folder is None else _parameters(config, folder)


@lru_cache(maxsize=4)
def _parameters(config: ModelConfig, folder: Path) -> Shapes:
    found = _of_files(folder)
    if found is None:
        return _of_class(folder)
    return {name: shape for name, shape in found.items() if name not in family(config).BUFFERS}


def linear_layers(shapes: Shapes) -> Shapes:
    """Of these parameters the linear layers, (outputs, inputs): in every family what has a matrix as its weight."""
    suffix = ".weight"
    return {
        name.removesuffix(suffix): shape for name, shape in shapes.items() if name.endswith(suffix) and len(shape) == 2
    }


def num_trained(config: ModelConfig) -> int | None:
    """How many numbers are trained: of the LoRA, or of the whole transformer; None where nothing tells."""
    shapes = parameters(config)
    if shapes is None:
        return None
    if config.tuning == "full":
        return sum(map(prod, shapes.values()))
    endings = tuple(f".{target}" for target in config.lora.targets or family(config).LORA_TARGETS)
    targets = [shape for name, shape in linear_layers(shapes).items() if f".{name}".endswith(endings)]
    return config.lora.rank * sum(map(sum, targets))


def check_layers(lora: Shapes, config: ModelConfig, name: str) -> None:
    """ValueError with one line where a LoRA is not for this model: a layer is not there, or has another size.

    Nothing is said where the model's configuration is not at hand.
    """
    shapes = parameters(config)
    if shapes is None:
        return
    layers = linear_layers(shapes)
    for tensor, shape in lora.items():
        layer, end = tensor.removesuffix(".weight").rsplit(".lora_", 1)
        if layer not in layers:
            raise ValueError(f"LoRA {name}: model.path = {config.path} has no linear layer {layer}; is it another's?")
        side = 1 if end == "A" else 0
        wants, has = shape[side], layers[layer][side]
        if wants != has:
            raise ValueError(
                f"LoRA {name}: {layer} has {wants} {'inputs' if end == 'A' else 'outputs'} there and {has} in "
                f"model.path = {config.path}; is it another's?"
            )


def check_weights(weights: Shapes, config: ModelConfig, name: str) -> None:
    """ValueError with one line where all weights of a transformer are not for this model; see `check_layers`."""
    wanted = parameters(config)
    if wanted is None:
        return
    strange = sorted(key for key in {*wanted, *weights} if wanted.get(key) != weights.get(key))
    if strange:
        raise ValueError(
            f"LoRA {name}: holds all weights of a transformer, and {strange[0]} is {weights.get(strange[0])} there and "
            f"{wanted.get(strange[0])} in model.path = {config.path}; is it another's?"
        )


def _of_files(folder: Path) -> Shapes | None:
    """What the transformer's files hold; None where they are not all there, or are no whole ones: loading says why."""
    shapes: dict[str, tuple[int, ...]] = {}
    files = weight_files(folder / "transformer")
    try:
        for path in files:
            with safe_open(path, "np") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None
    return shapes if files else None


def _of_class(folder: Path) -> Shapes:
    """What diffusers makes of the transformer's configuration."""
    import diffusers
    import torch

    kind = getattr(diffusers, read_json(folder / "model_index.json")["transformer"][1])
    with torch.device("meta"):
        transformer = kind.from_config(read_json(folder / "transformer" / "config.json"))
    return {name: tuple(value.shape) for name, value in transformer.named_parameters()}
