"""FLUX.1-dev and -schnell (diffusers' FluxPipeline).

Outside this file latents are (C, H, W) as everywhere; inside, 2 x 2 of them are one token. The scheduler's shift grows
with the number of tokens. FLUX.1-dev was distilled with guidance as an INPUT of the transformer: its value
(`model.distilled_guidance`) is the same in training and sampling, and costs no second forward; classifier-free
guidance on top stays off unless `sampler.guidance` asks for it.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from nft_ray.config import ModelConfig
from nft_ray.models.base import Conditioning, Sizes, check_size, read_json, uint8_images
from nft_ray.models.conditioning import Conditioner, conditioner
from nft_ray.seeding import mix, noise

PIPELINE = FluxPipeline
LORA_TARGETS = (
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "attn.to_k",
    "attn.to_out.0",
    "attn.to_q",
    "attn.to_v",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
)
"""As published for RL of FLUX.1-dev (yifan123/flow_grpo, scripts/train_flux.py); DiffusionNFT published none."""
DISTILLED_GUIDANCE = 3.5
"""FluxPipeline's own default."""
MAX_TOKENS = 512
PROBE_TOKENS = 8


class Flux:
    """A frozen FLUX.1 pipeline on one device; implements nft_ray.models.base.FlowModel."""

    lora_targets = LORA_TARGETS

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        latent_shape: tuple[int, int, int],
        guidance: float,
        vae: AutoencoderKL | None,
        text: Conditioner | None,
    ) -> None:
        self.transformer = transformer
        self.latent_shape = latent_shape
        self._config = transformer.config
        self._scheduler = scheduler
        self._guidance = guidance
        self._vae, self._text = vae, text
        self._dtype: torch.dtype = transformer.dtype
        self._device: torch.device = transformer.device
        self._rows, self._columns = latent_shape[1] // 2, latent_shape[2] // 2
        self._positions = _positions(self._rows, self._columns).to(self._device)

    def velocity(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """v(x_t, t), f32 (B, *latent): packed into tokens (B, H/2 * W/2, 4 C) and back."""
        text = conditioning["prompt_embeds"]
        (v,) = self.transformer(
            hidden_states=pixel_unshuffle(x, 2).flatten(2).transpose(1, 2).to(self._dtype),
            timestep=t,
            guidance=torch.full_like(t, self._guidance) if self._config.guidance_embeds else None,
            pooled_projections=conditioning["pooled_prompt_embeds"],
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=text.device),
            img_ids=self._positions,
            return_dict=False,
        )
        return pixel_shuffle(v.float().transpose(1, 2).unflatten(2, (self._rows, self._columns)), 2)

    def probe(self) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
        """One fixed input at t = 1/2: seeded noise in the shapes of latents and text features."""
        shapes = {
            "prompt_embeds": (PROBE_TOKENS, self._config.joint_attention_dim),
            "pooled_prompt_embeds": (self._config.pooled_projection_dim,),
        }
        conditioning = {
            name: noise([mix("probe", name)], shape).to(self._device, self._dtype) for name, shape in shapes.items()
        }
        x = noise([mix("probe", "x")], self.latent_shape).to(self._device)
        return x, torch.full((1,), 0.5, device=self._device), conditioning

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """T5's features and CLIP's pooled one; batch len(prompts)."""
        assert self._text is not None, "a learner's model has no text encoders"
        return self._text.encode(prompts)

    @torch.no_grad()
    def decode(self, x0: torch.Tensor) -> torch.Tensor:
        """Latents -> uint8 NHWC, with the VAE's shift and scale."""
        assert self._vae is not None, "a learner's model has no VAE"
        latents = x0 / self._vae.config.scaling_factor + self._vae.config.shift_factor
        return uint8_images(self._vae.decode(latents.to(self._vae.dtype), return_dict=False)[0])

    def sigmas(self, num_steps: int) -> torch.Tensor:
        """What FluxPipeline steps through at this resolution, f32 (num_steps + 1,)."""
        shift = {
            new: self._scheduler.config[old]
            for old, new in (
                ("base_image_seq_len", "base_seq_len"),
                ("max_image_seq_len", "max_seq_len"),
                ("base_shift", "base_shift"),
                ("max_shift", "max_shift"),
            )
        }
        mu = calculate_shift(self._rows * self._columns, **shift)
        self._scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu)
        return self._scheduler.sigmas.clone()

    def modules(self) -> list[torch.nn.Module]:
        """Transformer, VAE and the text encoders that were needed so far."""
        text = self._text.modules if self._text is not None else ()
        return [self.transformer, *([] if self._vae is None else [self._vae]), *text]


class _Text:
    """The pipeline's CLIP and T5."""

    def __init__(self, pipeline: FluxPipeline, max_sequence_length: int) -> None:
        self.modules = (pipeline.text_encoder, pipeline.text_encoder_2)
        self._pipeline, self._max_sequence_length = pipeline, max_sequence_length

    def __call__(self, prompt: str, device: torch.device) -> Conditioning:
        embeds, pooled, _ = self._pipeline.encode_prompt(
            [prompt], device=device, max_sequence_length=self._max_sequence_length
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def text_parts(config: ModelConfig) -> tuple[str, ...]:
    """The subfolders in use."""
    return ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")


def check(config: ModelConfig, folder: Path) -> None:
    """ValueError for a size that is no whole number of tokens, or a number of T5 tokens out of range."""
    check_size(config, 2 * _factor(folder))
    if not 1 <= config.max_sequence_length <= MAX_TOKENS:
        raise ValueError(
            f"model.max_sequence_length = {config.max_sequence_length}: FLUX reads prompts with T5; "
            f"use 1 to {MAX_TOKENS} tokens"
        )
    has_embedding = read_json(folder / "transformer" / "config.json").get("guidance_embeds", False)
    if config.distilled_guidance is not None and not has_embedding:
        raise ValueError(
            f"model.distilled_guidance = {config.distilled_guidance:g}: this FLUX has no guidance embedding; "
            "leave it out"
        )


def sizes(config: ModelConfig, folder: Path) -> Sizes:
    """Of latents and of a prompt's conditioning, from JSON alone."""
    transformer, factor = read_json(folder / "transformer" / "config.json"), _factor(folder)
    shape = (transformer["in_channels"] // 4, config.height // factor, config.width // factor)
    width, pooled = transformer["joint_attention_dim"], transformer["pooled_projection_dim"]
    tokens = config.max_sequence_length
    return Sizes(latent_shape=shape, conditioning=tokens * width + pooled, tokens=tokens)


def load(config: ModelConfig, folder: Path, device: torch.device, *, transformer_only: bool) -> Flux:
    """Load the frozen pipeline (or its transformer only) in `config.dtype`."""
    dtype = getattr(torch, config.dtype)
    transformer = FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer", dtype=dtype)
    transformer = transformer.to(device).requires_grad_(False).eval()
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    shape = sizes(config, folder).latent_shape
    guidance = DISTILLED_GUIDANCE if config.distilled_guidance is None else config.distilled_guidance
    if transformer_only:
        return Flux(transformer, scheduler, shape, guidance, None, None)

    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", dtype=dtype).to(device).requires_grad_(False).eval()
    vae.to(memory_format=torch.channels_last)
    return Flux(transformer, scheduler, shape, guidance, vae, conditioner(config, folder, device))


def empty(config: ModelConfig, folder: Path) -> Flux:
    """The shapes alone, on the meta device."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(read_json(folder / "transformer" / "config.json"))
    transformer = transformer.to(getattr(torch, config.dtype)).requires_grad_(False).eval()
    scheduler, shape = FlowMatchEulerDiscreteScheduler(), sizes(config, folder).latent_shape
    return Flux(transformer, scheduler, shape, DISTILLED_GUIDANCE, None, None)


def load_text(config: ModelConfig, folder: Path, dtype: torch.dtype) -> _Text:
    """The text encoders in use, on the host."""
    pipeline = PIPELINE.from_pretrained(folder, dtype=dtype, transformer=None, vae=None)
    return _Text(pipeline, config.max_sequence_length)


def _positions(rows: int, columns: int) -> torch.Tensor:
    """Where each image token stands, f32 (rows * columns, 3): 0, row, column."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1).float()


def _factor(folder: Path) -> int:
    """Pixels per latent along one side."""
    return 2 ** (len(read_json(folder / "vae" / "config.json")["block_out_channels"]) - 1)
