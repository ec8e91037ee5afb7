"""Stable Diffusion 3, 3.5-medium and 3.5-large (diffusers' StableDiffusion3Pipeline), and nano-sd3, which is one too.

Text goes through the pipeline's own `encode_prompt`, sigmas come from its own scheduler, latents through its VAE's
shift and scale: so what is trained here is what plain diffusers runs afterwards.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from nft_ray.config import ModelConfig
from nft_ray.models.base import Conditioning, Sizes, check_size, read_json, uint8_images
from nft_ray.models.conditioning import Conditioner, conditioner
from nft_ray.seeding import mix, noise

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
MAX_TOKENS, CLIP_TOKENS = 512, 77
PROBE_TOKENS = 8


class SD3:
    """A frozen SD3 pipeline on one device; implements nft_ray.models.base.FlowModel."""

    lora_targets = LORA_TARGETS

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        latent_shape: tuple[int, ...],
        vae: AutoencoderKL | None,
        text: Conditioner | None,
    ) -> None:
        self.transformer = transformer
        self.latent_shape = latent_shape
        self._config = transformer.config
        self._scheduler = scheduler
        self._vae, self._text = vae, text
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

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Both CLIP encoders and, unless `max_sequence_length` is 0, T5; batch len(prompts)."""
        assert self._text is not None, "a learner's model has no text encoders"
        return self._text.encode(prompts)

    @torch.no_grad()
    def decode(self, x0: torch.Tensor) -> torch.Tensor:
        """Latents -> uint8 NHWC, with the VAE's shift and scale."""
        assert self._vae is not None, "a learner's model has no VAE"
        latents = x0 / self._vae.config.scaling_factor + self._vae.config.shift_factor
        return uint8_images(self._vae.decode(latents.to(self._vae.dtype), return_dict=False)[0])

    def sigmas(self, num_steps: int) -> torch.Tensor:
        """What diffusers' own pipeline would step through, f32 (num_steps + 1,)."""
        self._scheduler.set_timesteps(num_steps)
        return self._scheduler.sigmas.clone()

    def modules(self) -> list[torch.nn.Module]:
        """Transformer, VAE and the text encoders that were needed so far."""
        text = self._text.modules if self._text is not None else ()
        return [self.transformer, *([] if self._vae is None else [self._vae]), *text]


class _Text:
    """The pipeline's text encoders, with or without T5."""

    def __init__(self, pipeline: StableDiffusion3Pipeline, max_sequence_length: int) -> None:
        encoders = (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3)
        self.modules = [encoder for encoder in encoders if encoder is not None]
        self._pipeline, self._max_sequence_length = pipeline, max_sequence_length

    def __call__(self, prompt: str, device: torch.device) -> Conditioning:
        embeds, _, pooled, _ = self._pipeline.encode_prompt(
            [prompt],
            None,
            None,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self._max_sequence_length,
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def text_parts(config: ModelConfig) -> tuple[str, ...]:
    """The subfolders in use; T5 is the third encoder."""
    parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    return (*parts, "text_encoder_3", "tokenizer_3") if config.max_sequence_length else parts


def check(config: ModelConfig, folder: Path) -> None:
    """ValueError for a size that is no whole number of tokens, or T5 tokens of a pipeline without T5."""
    transformer = read_json(folder / "transformer" / "config.json")
    token = _factor(folder) * transformer["patch_size"]
    check_size(config, token, token * transformer["pos_embed_max_size"])
    has_t5 = read_json(folder / "model_index.json").get("text_encoder_3", [None])[0] is not None
    if config.max_sequence_length and not has_t5:
        raise ValueError(f"model.max_sequence_length = {config.max_sequence_length}: this pipeline has no T5; use 0")
    if config.max_sequence_length > MAX_TOKENS:
        raise ValueError(f"model.max_sequence_length = {config.max_sequence_length}: use at most {MAX_TOKENS}")


def sizes(config: ModelConfig, folder: Path) -> Sizes:
    """Of latents and of a prompt's conditioning, from JSON alone."""
    transformer, factor = read_json(folder / "transformer" / "config.json"), _factor(folder)
    shape = (transformer["in_channels"], config.height // factor, config.width // factor)
    clip = folder / "text_encoder" / "config.json"  # the driver of a Hub id may not have it
    tokens = read_json(clip)["max_position_embeddings"] if clip.is_file() else CLIP_TOKENS
    tokens += config.max_sequence_length
    width, pooled = transformer["joint_attention_dim"], transformer["pooled_projection_dim"]
    return Sizes(latent_shape=shape, conditioning=tokens * width + pooled, tokens=tokens)


def load(config: ModelConfig, folder: Path, device: torch.device, *, transformer_only: bool) -> SD3:
    """Load the frozen pipeline (or its transformer only) in `config.dtype`."""
    dtype = getattr(torch, config.dtype)
    transformer = SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer", dtype=dtype)
    transformer = transformer.to(device).requires_grad_(False).eval()
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    shape = sizes(config, folder).latent_shape
    if transformer_only:
        return SD3(transformer, scheduler, shape, None, None)

    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", dtype=dtype).to(device).requires_grad_(False).eval()
    vae.to(memory_format=torch.channels_last)
    return SD3(transformer, scheduler, shape, vae, conditioner(config, folder, device))


def empty(config: ModelConfig, folder: Path) -> SD3:
    """The shapes alone, on the meta device."""
    with torch.device("meta"):
        transformer = SD3Transformer2DModel.from_config(read_json(folder / "transformer" / "config.json"))
    transformer = transformer.to(getattr(torch, config.dtype)).requires_grad_(False).eval()
    return SD3(transformer, FlowMatchEulerDiscreteScheduler(), sizes(config, folder).latent_shape, None, None)


def load_text(config: ModelConfig, folder: Path, dtype: torch.dtype) -> _Text:
    """The text encoders in use, on the host."""
    parts: dict[str, Any] = {"vae": None, "transformer": None}
    if not config.max_sequence_length:  # `encode_prompt` asks the transformer how wide the features of no T5 would be
        with torch.device("meta"):
            transformer = SD3Transformer2DModel.from_config(read_json(folder / "transformer" / "config.json"))
        parts |= {"transformer": transformer, "text_encoder_3": None, "tokenizer_3": None}
    return _Text(PIPELINE.from_pretrained(folder, dtype=dtype, **parts), config.max_sequence_length)


def _factor(folder: Path) -> int:
    """Pixels per latent along one side."""
    return 2 ** (len(read_json(folder / "vae" / "config.json")["block_out_channels"]) - 1)
