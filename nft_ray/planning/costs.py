"""What a model takes, counted from its shapes at real size: no weights, no device, nothing that is guessed.

    ModelConfig ──► architectures ──► the real modules on torch's meta device ──► Trace (FLOPs, bytes, operations)
                                                                             └──► parameters, bytes of weights

A forward is the family's own `velocity`; an update adds the LoRA with peft as a learner does, or trains all weights:
its backward runs through frozen matrices (the gradient of activations) and makes no gradient of them. A micro-batch of
BATCH is traced and divided: an item's FLOPs are exact, its bytes hold an eighth of what a micro-batch has once (LoRA
casts and their gradients, under 1 %). One process counts each thing once (`lru_cache`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nft_ray.config import ModelConfig
from nft_ray.planning.architectures import known

if TYPE_CHECKING:
    import torch

    from nft_ray.planning.trace import Trace

CACHED = 64
BATCH = 8
"""Items of the micro-batch that is traced; nothing is computed, so it costs no more than one."""
CHARACTERS_PER_TOKEN = 4
"""Of English, roughly: for an instruction that is read with every prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Of one network or several. bytes: parameters and buffers as they are held."""

    parameters: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a learner trains. targets_bytes: the frozen weights of the layers that have a LoRA (all of it: full)."""

    parameters: int
    layers: int
    targets_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """What one item of a micro-batch takes; `operations` are the whole micro-batch's, whatever its size."""

    flops: int
    bytes: int
    operations: int

    @classmethod
    def of(cls, trace: "Trace", batch: int, *, besides: int = 0) -> "Item":
        """besides: bytes that a micro-batch holds once."""
        per_item = max(trace.peak_bytes - besides, 0) // batch
        return cls(flops=trace.flops // batch, bytes=per_item, operations=trace.operations)


@lru_cache(CACHED)
def transformer_size(config: ModelConfig) -> Size:
    """Of the frozen transformer in `config.dtype`."""
    return _size(_empty(config).transformer)


@lru_cache(CACHED)
def vae_size(config: ModelConfig) -> Size:
    """Of the whole VAE, which a sampler loads, in `config.dtype`."""
    return _size(_vae(config))


@lru_cache(CACHED)
def text_size(config: ModelConfig) -> Size:
    """Of all text encoders in use. T5 keeps the last matrix of each layer in float32 beside float16."""
    sizes = [_size(module) for module, _ in _text_encoders(config)]
    return Size(parameters=sum(size.parameters for size in sizes), bytes=sum(size.bytes for size in sizes))


@lru_cache(CACHED)
def trained(config: ModelConfig) -> Trained:
    """Of the LoRA, or of the whole transformer."""
    from nft_ray.models.base import family
    from nft_ray.models.lora import num_trained, target_layers

    transformer, parameters = _empty(config).transformer, num_trained(known(config))
    assert parameters is not None
    if config.tuning == "full":
        held = list(transformer.parameters())
        return Trained(parameters=parameters, layers=len(held), targets_bytes=sum(value.nbytes for value in held))
    layers = target_layers(transformer, config.lora, family(config).LORA_TARGETS).values()
    return Trained(
        parameters=parameters, layers=len(layers), targets_bytes=sum(layer.weight.nbytes for layer in layers)
    )


@lru_cache(CACHED)
def forward(config: ModelConfig) -> Item:
    """One velocity of one image, without gradient."""
    import torch

    from nft_ray.planning.trace import Trace

    model = _empty(config)
    inputs = _inputs(config, model)
    with torch.no_grad():
        return Item.of(Trace.of(lambda: model.velocity(*inputs)), BATCH)


@lru_cache(CACHED)
def training(config: ModelConfig, *, checkpointing: bool = False) -> Item:
    """Forward and backward of one (sample, time) pair, what checkpointing computes again included."""
    from nft_ray.models.lora import attach
    from nft_ray.planning.trace import Trace

    model, gradients = _empty(config), 0
    if config.tuning == "full":
        model.transformer.requires_grad_(True)
        gradients = transformer_size(config).bytes
    else:
        attach(model.transformer, config.lora, model.lora_targets, seed=0)
    if checkpointing:
        model.transformer.enable_gradient_checkpointing()
    inputs = _inputs(config, model)
    trace = Trace.of(lambda: model.velocity(*inputs).pow(2).mean().backward())
    return Item.of(trace, BATCH, besides=gradients)


@lru_cache(CACHED)
def decode(config: ModelConfig) -> Item:
    """The latents of one image through the VAE's decoder."""
    import torch

    from nft_ray.planning.trace import Trace

    vae, shape = _vae(config), _sizes(config).latent_shape
    latents = torch.empty(BATCH, *shape, device="meta", dtype=getattr(torch, config.dtype))
    with torch.no_grad():
        return Item.of(Trace.of(lambda: vae.decode(latents, return_dict=False)), BATCH)


@lru_cache(CACHED)
def encode(config: ModelConfig) -> Item:
    """One prompt, alone, through all text encoders in use, one after the other."""
    import torch

    from nft_ray.planning.trace import Trace

    traces = []
    with torch.no_grad():
        for module, tokens in _text_encoders(config):
            ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
            traces.append(Trace.of(partial(module, input_ids=ids)))
    return Item(
        flops=sum(trace.flops for trace in traces),
        bytes=max((trace.peak_bytes for trace in traces), default=0),
        operations=sum(trace.operations for trace in traces),
    )


def counted(config: ModelConfig) -> ModelConfig:
    """The part of a model's section that is counted: where text encoders wait and what is kept changes no count."""
    return config.model_copy(update={"text_encoders": "resident", "conditioning_cache": 0, "precomputed": None})


def latent_shape(config: ModelConfig) -> tuple[int, int, int]:
    """Of one image."""
    return _sizes(config).latent_shape


def _sizes(config: ModelConfig) -> Any:
    from nft_ray.models.base import sizes

    found = sizes(known(config))
    assert found is not None
    return found


def _empty(config: ModelConfig) -> Any:
    """The family's model (models.base.FlowModel) on the meta device, a new one: it may get a LoRA."""
    from nft_ray.models.base import family, quiet_libraries

    quiet_libraries()
    here = known(config)
    return family(here).empty(here, Path(here.path))


def _inputs(config: ModelConfig, model: Any) -> tuple["torch.Tensor", "torch.Tensor", dict[str, Any]]:
    """x, t and the conditioning of BATCH images: what the probe says of them, with the tokens of a real prompt."""
    import torch

    _, t, probe = model.probe()
    probe_tokens, tokens = next(value.shape[1] for value in probe.values() if value.ndim == 3), _sizes(config).tokens

    def shape(value: torch.Tensor) -> tuple[int, ...]:
        rest = tuple(value.shape[1:])
        return (BATCH, tokens, *rest[1:]) if rest[0] == probe_tokens else (BATCH, *rest)

    conditioning = {name: torch.empty(shape(value), dtype=value.dtype, device="meta") for name, value in probe.items()}
    x = torch.empty(BATCH, *model.latent_shape, device="meta")
    return x, torch.empty(BATCH, dtype=t.dtype, device="meta"), conditioning


def _vae(config: ModelConfig) -> Any:
    import diffusers
    import torch

    from nft_ray.models.base import read_json

    folder = Path(known(config).path)
    kind = getattr(diffusers, read_json(folder / "model_index.json")["vae"][1])
    with torch.device("meta"):
        vae = kind.from_config(read_json(folder / "vae" / "config.json"))
    return vae.to(getattr(torch, config.dtype)).requires_grad_(False).eval()


def _text_encoders(config: ModelConfig) -> Iterator[tuple[Any, int]]:
    """Each text encoder in use on the meta device, and the tokens that it reads of a prompt."""
    import torch
    import transformers

    from nft_ray.models.base import family, read_json

    here = known(config)
    folder, module = Path(here.path), family(config)
    index, dtype = read_json(folder / "model_index.json"), getattr(torch, config.text_encoder_dtype or config.dtype)
    instruction = sum(map(len, module.INSTRUCTION)) // CHARACTERS_PER_TOKEN if hasattr(module, "INSTRUCTION") else 0
    for part in module.text_parts(here):
        if not part.startswith("text_encoder"):
            continue
        name, data = index[part][1], read_json(folder / part / "config.json")
        settings = transformers.AutoConfig.for_model(**data)
        with torch.device("meta"):
            encoder = getattr(transformers, name)(settings).requires_grad_(False).eval()
        clip = name.startswith("CLIP")
        yield (
            _cast(encoder, dtype),
            data["max_position_embeddings"] if clip else config.max_sequence_length + instruction,
        )


def _cast(encoder: Any, dtype: "torch.dtype") -> Any:
    """To a dtype as transformers loads it: what it keeps in float32 beside float16 stays."""
    import torch

    kept = (encoder._keep_in_fp32_modules or ()) if dtype == torch.float16 else ()
    for name, module in encoder.named_modules():
        if not set(name.split(".")) & set(kept):
            for value in (*module._parameters.values(), *module._buffers.values()):
                if value is not None and value.is_floating_point():
                    value.data = value.data.to(dtype)
    return encoder


def _size(module: Any) -> Size:
    parameters = list(module.parameters())
    held = {id(value): value for value in (*parameters, *module.buffers())}
    return Size(
        parameters=sum(value.numel() for value in parameters), bytes=sum(value.nbytes for value in held.values())
    )
