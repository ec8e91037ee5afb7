"""Full fine-tuning: every parameter of the transformer is trained, sent, kept and exported. Names are diffusers' own.

What a LoRA is in models/lora.py, the whole transformer is here: trained in float32 (`train_all`), held by a sampler
beside the pristine copy (`replaced`), written as the folder that plain diffusers loads (`export_transformer`).
Memory, P = bytes of the float32 weights: a learner has weights, gradients, two moments and the EMA (5 P, `fsdp`
divides it by the ranks) and on the host 2 P per kept version; a sampler has the weights and the pristine copy in
`model.dtype` and on the host 2 P per kept version; a checkpoint is 6 P. SD3.5-medium: P = 9.9 GB.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

from nft_ray.config import ModelConfig
from nft_ray.models.base import load_model
from nft_ray.models.lora import Hold, assign
from nft_ray.seeding import mix
from nft_ray.types import Weights

PROBE_SCALE = 0.1


def train_all(transformer: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Make every parameter of a float32 transformer trainable; returns them by name, sorted."""
    parameters = dict(sorted(transformer.named_parameters()))
    for name, value in parameters.items():
        assert value.dtype == torch.float32, f"{name} is {value.dtype}: weights are trained in float32"
        value.requires_grad_(True)
    return parameters


def replaced(transformer: torch.nn.Module) -> Hold:
    """A function that sets a transformer's weights to others, rounded to its dtype, or to the pristine for None."""
    parameters = dict(transformer.named_parameters())
    pristine = {name: value.detach().clone() for name, value in parameters.items()}
    for name, value in pristine.items():  # a buffer: it is parked with the model, and never saved
        transformer.register_buffer(f"pristine_{name.replace('.', '_')}", value, persistent=False)

    @torch.no_grad()
    def use(weights: Weights | None) -> int:
        if weights is not None:
            return assign(parameters, weights)
        for name, value in parameters.items():
            value.copy_(pristine[name])
        return 0

    return use


def random_change(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """What the probe adds to one parameter, float32: a function of name and seed, felt in every layer."""
    rng = np.random.default_rng(mix("random weights", seed, name))
    fan_in = np.prod(shape[1:], dtype=np.int64) if len(shape) > 1 else 1
    return (PROBE_SCALE / np.sqrt(fan_in) * rng.standard_normal(shape)).astype(np.float32)


def read_full(source: str | Path) -> Weights | None:
    """The EMA policy of a checkpoint of a run that trained all weights; None where `source` is anything else."""
    state = Path(source).expanduser() / "state.json"
    if not state.is_file():
        return None
    config = json.loads(state.read_text())["config"]
    if not config or config["model"].get("tuning") != "full":
        return None
    return load_file(state.with_name("ema.safetensors"))


def export_transformer(weights: Weights, config: ModelConfig, folder: Path) -> None:
    """Write the transformer in diffusers' format, float32: `SD3Transformer2DModel.from_pretrained(folder)`."""
    model = load_model(config.model_copy(update={"dtype": "float32"}), torch.device("cpu"), transformer_only=True)
    assign(dict(model.transformer.named_parameters()), weights)
    model.transformer.save_pretrained(str(folder))  # type: ignore[operator]  # a diffusers ModelMixin
