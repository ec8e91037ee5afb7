"""Stable Diffusion 3, 3.5-medium and 3.5-large (diffusers' StableDiffusion3Pipeline), and nano-sd3, which is one too.

Text goes through the pipeline's own `encode_prompt`, sigmas come from its own scheduler, latents through its VAE's
shift and scale: so what is trained here is what plain diffusers runs afterwards.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from nft_ray.config import ModelConfig
from nft_ray.models.base import Conditioning
from nft_ray.seeding import mix, noise

log = logging.getLogger(__name__)

PIPELINE = StableDiffusion3Pipeline
TIMESTEPS = 1000.0
LORA_TARGETS = (
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "attn.to_k",
    "attn.to_out.0",
    "attn.to_q",
    "attn.to_v",
)
"""As published for DiffusionNFT on SD3.5-medium (NVlabs/DiffusionNFT, config/nft.py)."""
NANO = "nano-sd3"
PROBE_TOKENS = 8


class SD3:
    """A frozen SD3 pipeline on one device; implements nft_ray.models.base.FlowModel."""

    lora_targets = LORA_TARGETS

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        latent_shape: tuple[int, ...],
        pipeline: StableDiffusion3Pipeline | None,
        max_sequence_length: int,
    ) -> None:
        self.transformer = transformer
        self.latent_shape = latent_shape
        self._config = transformer.config
        self._scheduler = scheduler
        self._pipeline = pipeline
        self._max_sequence_length = max_sequence_length
        self._dtype: torch.dtype = transformer.dtype
        self._device: torch.device = transformer.device

    def velocity(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """v(x_t, t), f32 (B, *latent); t stays a float: cast to integers, as published, 8.93 would become 8."""
        (v,) = self.transformer(
            hidden_states=x.to(self._dtype),
            timestep=t * TIMESTEPS,
            encoder_hidden_states=conditioning["prompt_embeds"],
            pooled_projections=conditioning["pooled_prompt_embeds"],
            return_dict=False,
        )
        return v.float()

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

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Both CLIP encoders and, where the pipeline has one, T5; batch len(prompts)."""
        embeds, _, pooled, _ = self._loaded().encode_prompt(
            list(prompts),
            None,
            None,
            device=self._device,
            do_classifier_free_guidance=False,
            max_sequence_length=self._max_sequence_length,
        )
        return {"prompt_embeds": embeds.to(self._dtype), "pooled_prompt_embeds": pooled.to(self._dtype)}

    @torch.no_grad()
    def decode(self, x0: torch.Tensor) -> np.ndarray:
        """Latents -> uint8 NHWC, with the VAE's shift and scale and diffusers' own rounding."""
        vae = self._loaded().vae
        latents = x0 / vae.config.scaling_factor + vae.config.shift_factor
        pixels = vae.decode(latents.to(vae.dtype), return_dict=False)[0].float()
        pixels = (pixels / 2 + 0.5).clamp(0, 1) * 255
        return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()

    def sigmas(self, num_steps: int) -> torch.Tensor:
        """What diffusers' own pipeline would step through, f32 (num_steps + 1,)."""
        self._scheduler.set_timesteps(num_steps)
        return self._scheduler.sigmas.clone()

    def _loaded(self) -> StableDiffusion3Pipeline:
        assert self._pipeline is not None, "a learner's model has no text encoders and no VAE"
        return self._pipeline


def location(path: str) -> str:
    """Where to load from: the packaged pipeline for `nano-sd3`, else the path or Hub id itself."""
    return str(Path(__file__).parents[1] / "shapes" / "nano_sd3") if path == NANO else path


def check(config: ModelConfig) -> None:
    """ValueError where model.path cannot be a pipeline: before anything starts."""
    path = Path(location(config.path))
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ValueError(
                f"model.path = {config.path}: holds no model_index.json; name a pipeline in diffusers format"
            )
        return
    looks_like_folder = config.path.startswith((".", "/", "~")) or config.path.count("/") != 1
    try:
        validate_repo_id(config.path)
    except HFValidationError:
        looks_like_folder = True
    if looks_like_folder:
        raise ValueError(f"model.path = {config.path}: no such folder; name a folder, a Hub id or {NANO}")


def load(config: ModelConfig, device: torch.device, *, transformer_only: bool = False) -> SD3:
    """Load the frozen pipeline (or its transformer only) in `config.dtype`."""
    path, dtype = location(config.path), getattr(torch, config.dtype)
    source: dict[str, Any] = {"revision": config.revision}
    if transformer_only:
        pipeline = None
        transformer = SD3Transformer2DModel.from_pretrained(path, subfolder="transformer", dtype=dtype, **source)
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(path, subfolder="scheduler", **source)
        vae_config = AutoencoderKL.load_config(path, subfolder="vae", **source)
    else:
        without_t5 = {} if config.max_sequence_length else {"text_encoder_3": None, "tokenizer_3": None}
        pipeline = StableDiffusion3Pipeline.from_pretrained(path, dtype=dtype, **without_t5, **source).to(device)
        for part in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3):
            if part is not None:
                part.requires_grad_(False).eval()
        pipeline.vae.to(memory_format=torch.channels_last)
        transformer, scheduler, vae_config = pipeline.transformer, pipeline.scheduler, pipeline.vae.config
    transformer = transformer.to(device).requires_grad_(False).eval()
    factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
    shape = (transformer.config.in_channels, config.height // factor, config.width // factor)
    return SD3(transformer, scheduler, shape, pipeline, config.max_sequence_length)
