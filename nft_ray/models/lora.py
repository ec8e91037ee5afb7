"""LoRA tensors in and out of a transformer, by name, with every count asserted.

Three ways to hold one: a learner trains it with peft (`attach`); a float32 sampler adds it to the weights (`merged`),
always from the kept pristine ones, since unmerging accumulates rounding. In 16 bit a merge can round away more than an
early LoRA's whole effect, so there a sampler keeps it beside them (`unmerged`). Names on the wire are diffusers' own:
`transformer_blocks.0.attn.to_q.lora_A.weight`.
"""

import hashlib
import importlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open

from nft_ray.config import LoraConfig, ModelConfig
from nft_ray.models.lora_files import LoraFile, find_lora
from nft_ray.seeding import mix
from nft_ray.types import Weights

PREFIX, ADAPTER = "base_model.model.", ".default"


def peft_config(config: LoraConfig, targets: tuple[str, ...]) -> peft.LoraConfig:
    """The published initialisation: A gaussian, B zero."""
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        init_lora_weights="gaussian",
        target_modules=list(config.targets or targets),
    )


def attach(
    transformer: torch.nn.Module, config: LoraConfig, targets: tuple[str, ...], seed: int
) -> dict[str, torch.nn.Parameter]:
    """Inject one trainable float32 LoRA into the transformer, in place; returns its parameters by wire name.

    The draw is a function of the seed alone. ValueError where a target names no layer.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix("lora", seed))
        try:
            model = peft.get_peft_model(transformer, peft_config(config, targets))
        except ValueError as error:
            raise ValueError(f"model.lora.targets: {' '.join(str(error).split())}") from error
    found = {_wire_name(name): value for name, value in model.named_parameters() if ".lora_" in name}
    assert found, "peft attached no LoRA"
    for value in found.values():
        value.data = value.data.float()
        value.requires_grad_(True)
    return dict(sorted(found.items()))


def _wire_name(name: str) -> str:
    return name.removeprefix(PREFIX).replace(f"{ADAPTER}.", ".")


def numpy_weights(parameters: dict[str, torch.nn.Parameter] | dict[str, torch.Tensor]) -> Weights:
    """A float32 copy on the host, by wire name."""
    return {name: value.detach().float().cpu().numpy().copy() for name, value in parameters.items()}


@torch.no_grad()
def assign(parameters: dict[str, torch.nn.Parameter] | dict[str, torch.Tensor], weights: Weights) -> int:
    """Copy weights into parameters; every name and shape must match. Returns the number of tensors moved."""
    assert parameters.keys() == weights.keys(), f"LoRA names differ: {sorted(parameters.keys() ^ weights.keys())[:4]}"
    for name, value in parameters.items():
        assert tuple(value.shape) == weights[name].shape, f"LoRA {name}: {tuple(value.shape)} != {weights[name].shape}"
        value.copy_(torch.from_numpy(np.array(weights[name])))
    return len(parameters)


def checksum(weights: Weights) -> str:
    """A digest over names, shapes and the exact float32 bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        digest.update(f"{name}{weights[name].shape}".encode())
        digest.update(np.ascontiguousarray(weights[name], dtype=np.float32).tobytes())
    return digest.hexdigest()


def random_weights(weights: Weights, seed: int) -> Weights:
    """A random LoRA in the shapes of another: neither factor is zero, so loading it must change the velocity."""
    rng = np.random.default_rng(mix("random lora", seed))
    return {
        name: (rng.standard_normal(value.shape) / np.sqrt(value.shape[1])).astype(np.float32)
        for name, value in weights.items()
    }


def merged(
    transformer: torch.nn.Module, config: LoraConfig, targets: tuple[str, ...]
) -> Callable[[Weights | None], int]:
    """A function that sets a float32 transformer's layers to pristine + alpha/r * B A, or pristine for None.

    It returns the number of LoRA tensors it used. The pristine weights are kept aside, and every merge starts there.
    """
    endings = tuple(f".{target}" for target in config.targets or targets)
    layers = {name: module for name, module in transformer.named_modules() if f".{name}".endswith(endings)}
    pristine = {name: module.weight.detach().clone() for name, module in layers.items()}
    scale = config.alpha / config.rank

    @torch.no_grad()
    def use(weights: Weights | None) -> int:
        factors = {} if weights is None else {name: torch.from_numpy(np.array(w)) for name, w in weights.items()}
        for name, module in layers.items():
            module.weight.copy_(pristine[name])
            if weights is not None:
                a, b = factors.pop(f"{name}.lora_A.weight"), factors.pop(f"{name}.lora_B.weight")
                module.weight.add_((b @ a).to(module.weight), alpha=scale)
        assert not factors, f"LoRA tensors without a layer: {sorted(factors)[:4]}"
        return 0 if weights is None else 2 * len(layers)

    return use


def unmerged(
    transformer: torch.nn.Module, config: LoraConfig, targets: tuple[str, ...]
) -> Callable[[Weights | None], int]:
    """Like `merged` for 16-bit weights: the LoRA stays beside them in float32; None switches its layers off."""
    parameters = attach(transformer, config, targets, seed=0)
    layers = [module for module in transformer.modules() if isinstance(module, LoraLayer)]

    def use(weights: Weights | None) -> int:
        for layer in layers:
            layer.enable_adapters(weights is not None)
        for value in parameters.values():
            value.requires_grad_(False)
        return 0 if weights is None else assign(parameters, weights)

    return use


def read_lora(path: str | Path) -> tuple[Weights, LoraConfig]:
    """A LoRA's tensors by wire name, float32, and its rank, alpha and targets: see lora_files.py for what is read.

    ValueError with one line where there is none, or one that this project cannot use.
    """
    file = find_lora(path)
    return _read(file), file.config


def assign_start(parameters: dict[str, torch.nn.Parameter], config: LoraConfig) -> None:
    """Put the LoRA of `config.start`, if any, into the attached parameters; ValueError where it is not theirs."""
    if config.start is None:
        return
    weights = _read(find_lora(config.start))
    strange = sorted(parameters.keys() ^ weights.keys())
    if strange:
        layer, where = strange[0].rsplit(".lora_", 1)[0], "it" if strange[0] in parameters else "this model"
        raise ValueError(f"model.lora.start = {config.start}: {where} has no LoRA on {layer}; is it another model's?")
    for name, value in parameters.items():
        if tuple(value.shape) != weights[name].shape:
            raise ValueError(
                f"model.lora.start = {config.start}: {name} is {weights[name].shape}, {tuple(value.shape)} is needed; "
                "is it another model's, or its rank another?"
            )
    assign(parameters, weights)


def _read(file: LoraFile) -> Weights:
    with safe_open(file.path, "pt") as tensors:
        return {wire: tensors.get_tensor(name).float().numpy() for wire, (name, _) in file.tensors.items()}


def export_lora(weights: Weights, config: ModelConfig, folder: Path) -> None:
    """Write a LoRA that plain diffusers loads: `pipeline.load_lora_weights(folder)`.

    The metadata carries alpha: without it a reload would scale by 1 and give other images.
    """
    family = importlib.import_module(f"nft_ray.models.{config.family}")
    family.PIPELINE.save_lora_weights(
        save_directory=str(folder),
        transformer_lora_layers={name: torch.from_numpy(np.array(value)) for name, value in weights.items()},
        transformer_lora_adapter_metadata=peft_config(config.lora, family.LORA_TARGETS).to_dict(),
    )
