"""LoRA tensors in and out of a transformer, by name, with every count asserted.

Three ways to hold one: a learner trains it with peft (`attach`); a sampler adds it to the weights (`merged`), always
from the kept pristine ones, since unmerging accumulates rounding, or keeps it beside them (`unmerged`), which rounds
less in 16 bit. What that means for the gradient is measured: docs/decisions/0003. Names on the wire are diffusers'
own: `transformer_blocks.0.attn.to_q.lora_A.weight`.
"""

import importlib
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import diffusers
import numpy as np
import peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from torch.nn.functional import linear

from nft_ray.config import LoraConfig, ModelConfig
from nft_ray.models.base import family, read_json
from nft_ray.models.lora_files import DIFFUSERS, LoraFile, find_lora
from nft_ray.models.parts import folder_of
from nft_ray.seeding import mix
from nft_ray.types import Weights

Hold = Callable[[Weights | None], int]
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
    for module in transformer.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False
            for factor in (*module.lora_A.values(), *module.lora_B.values()):
                factor.__class__ = LinearLikeItsInput
    return dict(sorted(found.items()))


class LinearLikeItsInput(torch.nn.Linear):
    """A linear layer with float32 weights that works in the dtype of its input.

    So a LoRA is trained in the arithmetic in which a sampler holds it (`LinearBeside`), at the speed of that dtype, and
    v - v_old of equal weights is 0 and not the difference of two roundings. peft would work in float32.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.weight.to(input.dtype))


def _wire_name(name: str) -> str:
    return name.removeprefix(PREFIX).replace(f"{ADAPTER}.", ".")


@torch.no_grad()
def assign(parameters: dict[str, torch.nn.Parameter] | dict[str, torch.Tensor], weights: Weights) -> int:
    """Copy weights into parameters; every name and shape must match. Returns the number of tensors moved."""
    assert parameters.keys() == weights.keys(), f"LoRA names differ: {sorted(parameters.keys() ^ weights.keys())[:4]}"
    for name, value in parameters.items():
        assert tuple(value.shape) == weights[name].shape, f"LoRA {name}: {tuple(value.shape)} != {weights[name].shape}"
        value.copy_(torch.from_numpy(np.array(weights[name])))
    return len(parameters)


def random_weights(weights: Weights, seed: int) -> Weights:
    """A random LoRA in the shapes of another: neither factor is zero, so loading it must change the velocity."""
    rng = np.random.default_rng(mix("random lora", seed))
    return {
        name: (rng.standard_normal(value.shape) / np.sqrt(value.shape[1])).astype(np.float32)
        for name, value in weights.items()
    }


def merged(transformer: torch.nn.Module, config: LoraConfig, targets: tuple[str, ...]) -> Hold:
    """A function that sets the layers of a transformer to pristine + alpha/r * B A, or to pristine for None.

    It returns the number of LoRA tensors it used. The pristine weights are kept aside (the targets' only, in their own
    dtype), every merge starts there, is computed in float32 and rounded once.
    """
    layers = target_layers(transformer, config, targets)
    for module in layers.values():  # a buffer: it is parked with the model, and never saved
        module.register_buffer("pristine", module.weight.detach().clone(), persistent=False)

    @torch.no_grad()
    def use(weights: Weights | None) -> int:
        factors = dict(weights or {})
        for name, module in layers.items():
            pristine = module.get_buffer("pristine")
            if weights is None:
                module.weight.copy_(pristine)
                continue
            a, b = (_factor(factors, name, kind, module.weight.device) for kind in "AB")
            module.weight.copy_(torch.add(pristine.float(), b @ a, alpha=config.alpha / config.rank))
        assert not factors, f"LoRA tensors without a layer: {sorted(factors)[:4]}"
        return 0 if weights is None else 2 * len(layers)

    return use


class LinearBeside(torch.nn.Module):
    """A frozen linear layer and a LoRA beside it, x W + (x A)(alpha/r B), all in the layer's own dtype.

    Off is B = 0: that adds an exact zero, and the compiled graph stays the same.
    """

    def __init__(self, base: torch.nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.a = torch.nn.Buffer(base.weight.new_zeros(rank, base.in_features), persistent=False)
        self.b = torch.nn.Buffer(base.weight.new_zeros(base.out_features, rank), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + linear(linear(x, self.a), self.b)


def unmerged(transformer: torch.nn.Module, config: LoraConfig, targets: tuple[str, ...]) -> Hold:
    """Like `merged`, but the weights stay as they are and every target layer gets its LoRA beside it, in place."""
    layers = {
        name: LinearBeside(layer, config.rank) for name, layer in target_layers(transformer, config, targets).items()
    }
    for name, module in layers.items():
        transformer.set_submodule(name, module)

    @torch.no_grad()
    def use(weights: Weights | None) -> int:
        factors = dict(weights or {})
        for name, module in layers.items():
            if weights is None:
                module.b.zero_()
                continue
            a, b = (_factor(factors, name, kind, module.b.device) for kind in "AB")
            module.a.copy_(a)
            module.b.copy_(b * (config.alpha / config.rank))
        assert not factors, f"LoRA tensors without a layer: {sorted(factors)[:4]}"
        return 0 if weights is None else 2 * len(layers)

    return use


def target_layers(
    transformer: torch.nn.Module, config: LoraConfig, targets: tuple[str, ...]
) -> dict[str, torch.nn.Linear]:
    endings = tuple(f".{target}" for target in config.targets or targets)
    found = {name: module for name, module in transformer.named_modules() if f".{name}".endswith(endings)}
    return {name: module for name, module in found.items() if isinstance(module, torch.nn.Linear)}


def _factor(factors: Weights, layer: str, kind: str, device: torch.device) -> torch.Tensor:
    """Take one LoRA matrix out of `factors`, float32 on the device."""
    return torch.from_numpy(np.array(factors.pop(f"{layer}.lora_{kind}.weight"))).to(device)


def read_lora(path: str | Path) -> tuple[Weights, LoraConfig]:
    """A LoRA's tensors by wire name, float32, and its rank, alpha and targets: see lora_files.py for what is read.

    ValueError with one line where there is none, or one that this project cannot use.
    """
    file = find_lora(path)
    return _read(file), file.config


def skeleton(config: ModelConfig) -> torch.nn.Module | None:
    """The transformer without memory, built from its configuration; None where that is not at hand."""
    folder = folder_of(config)
    if folder is None:
        return None
    kind = getattr(diffusers, read_json(folder / "model_index.json")["transformer"][1])
    with torch.device("meta"):
        transformer: torch.nn.Module = kind.from_config(read_json(folder / "transformer" / "config.json"))
    return transformer


@lru_cache(maxsize=4)
def num_trained(config: ModelConfig) -> int | None:
    """How many numbers are trained: of the LoRA, or of the whole transformer; None where nothing tells."""
    transformer = skeleton(config)
    if transformer is None:
        return None
    if config.tuning == "full":
        return sum(parameter.numel() for parameter in transformer.parameters())
    layers = target_layers(transformer, config.lora, family(config).LORA_TARGETS).values()
    return config.lora.rank * sum(layer.in_features + layer.out_features for layer in layers)


def check_layers(weights: Weights, config: ModelConfig, name: str) -> None:
    """ValueError with one line where a LoRA is not for this model: a layer is not there, or has another size.

    Nothing is said where the model's configuration is not at hand.
    """
    transformer = skeleton(config)
    if transformer is None:
        return
    found = {layer: module for layer, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    for tensor, value in weights.items():
        layer, end = tensor.removesuffix(".weight").rsplit(".lora_", 1)
        if layer not in found:
            raise ValueError(f"LoRA {name}: model.path = {config.path} has no linear layer {layer}; is it another's?")
        has = found[layer].in_features if end == "A" else found[layer].out_features
        wants = value.shape[1 if end == "A" else 0]
        if wants != has:
            raise ValueError(
                f"LoRA {name}: {layer} has {wants} {'inputs' if end == 'A' else 'outputs'} there and {has} in "
                f"model.path = {config.path}; is it another's?"
            )


def assign_start(parameters: dict[str, torch.nn.Parameter], config: LoraConfig) -> None:
    """Put the LoRA of `config.start`, if any, into the attached parameters; ValueError where it is not theirs."""
    if config.start is None:
        return
    file = find_lora(config.start)
    weights = _read(file)
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
    if file.config.alpha != config.alpha:  # no tensor would tell
        raise ValueError(
            f"model.lora.alpha = {config.alpha}: the LoRA to start from has {file.config.alpha}; leave alpha out"
        )
    assign(parameters, weights)


def _read(file: LoraFile) -> Weights:
    try:
        with safe_open(file.path, "pt") as tensors:
            return {wire: tensors.get_tensor(name).float().numpy() for wire, (name, _) in file.tensors.items()}
    except SafetensorError as error:  # what the header's shapes do not show: data types, gaps between the tensors
        raise ValueError(f"LoRA {file.path}: not a whole safetensors file ({' '.join(str(error).split())})") from None


def export_lora(weights: Weights, config: ModelConfig, folder: Path) -> None:
    """Write a LoRA that plain diffusers loads: `pipeline.load_lora_weights(folder)`.

    The metadata carries alpha: without it a reload would scale by 1 and give other images. The same weights give the
    same file, to the byte.
    """
    family = importlib.import_module(f"nft_ray.models.{config.family}")
    family.PIPELINE.save_lora_weights(
        save_directory=str(folder),
        transformer_lora_layers={name: torch.from_numpy(np.array(value)) for name, value in weights.items()},
        transformer_lora_adapter_metadata={
            name: sorted(value) if isinstance(value, set) else value
            for name, value in peft_config(config.lora, family.LORA_TARGETS).to_dict().items()
        },
    )
    _sort_header(folder / DIFFUSERS)


def _sort_header(path: Path) -> None:
    """Write a safetensors file's header (its length in 8 bytes, then JSON) in the order of its keys.

    safetensors writes the metadata in the order of a hash map, which is another one in every call.
    """
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.dumps(json.loads(whole[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the tensors stay aligned
    written = path.with_suffix(".new")
    written.write_bytes(len(header).to_bytes(8, "little") + header + whole[end:])
    written.replace(path)
