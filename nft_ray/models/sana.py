"""Sana 0.6B and 1.6B, 1.0 and 1.5 (diffusers' SanaPipeline): linear attention, 32 pixels per latent, Gemma as encoder.

A prompt is read after the pipeline's own instruction to enhance it; "" is the unconditional one and is read bare, as
in SanaPipeline. Its scheduler starts a little below 1 (0.9997 for 10 steps): so do the sigmas here.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

from nft_ray.config import ModelConfig
from nft_ray.models.base import Conditioning, Sizes, check_size, read_json, uint8_images
from nft_ray.models.conditioning import Conditioner, conditioner
from nft_ray.seeding import mix, noise

PIPELINE = SanaPipeline
TIMESTEPS = 1000.0
LORA_TARGETS = tuple(f"{attention}.{layer}" for attention in ("attn1", "attn2") for layer in ("to_k", "to_q", "to_v"))
"""Self- and cross-attention, as in diffusers' own LoRA example for Sana (to_k, to_q, to_v)."""
INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
MAX_TOKENS = 300
PROBE_TOKENS = 8


class Sana:
    """A frozen Sana pipeline on one device; implements nft_ray.models.base.FlowModel."""

    lora_targets = LORA_TARGETS

    def __init__(
        self,
        transformer: SanaTransformer2DModel,
        scheduler: DPMSolverMultistepScheduler,
        latent_shape: tuple[int, ...],
        vae: AutoencoderDC | None,
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
        """v(x_t, t), f32 (B, *latent); padding of the prompt is masked out."""
        (v,) = self.transformer(
            x.to(self._dtype),
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_attention_mask=conditioning["prompt_mask"],
            timestep=t * TIMESTEPS * self._config.timestep_scale,
            return_dict=False,
        )
        return v.float()

    def probe(self) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
        """One fixed input at t = 1/2: seeded noise in the shapes of latents and text features."""
        embeds = noise([mix("probe", "prompt_embeds")], (PROBE_TOKENS, self._config.caption_channels))
        conditioning = {"prompt_embeds": embeds, "prompt_mask": torch.ones(1, PROBE_TOKENS)}
        x = noise([mix("probe", "x")], self.latent_shape).to(self._device)
        t = torch.full((1,), 0.5, device=self._device)
        return x, t, {name: value.to(self._device, self._dtype) for name, value in conditioning.items()}

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Gemma's features and which of them are padding (0); batch len(prompts)."""
        assert self._text is not None, "a learner's model has no text encoder"
        return self._text.encode(prompts)

    @torch.no_grad()
    def decode(self, x0: torch.Tensor) -> torch.Tensor:
        """Latents -> uint8 NHWC, with the VAE's scale."""
        assert self._vae is not None, "a learner's model has no VAE"
        latents = x0 / self._vae.config.scaling_factor
        return uint8_images(self._vae.decode(latents.to(self._vae.dtype), return_dict=False)[0])

    def sigmas(self, num_steps: int) -> torch.Tensor:
        """The scheduler's own, f32 (num_steps + 1,)."""
        self._scheduler.set_timesteps(num_steps)
        return self._scheduler.sigmas.clone()

    def modules(self) -> list[torch.nn.Module]:
        """Transformer, VAE and the text encoders that were needed so far."""
        text = self._text.modules if self._text is not None else ()
        return [self.transformer, *([] if self._vae is None else [self._vae]), *text]


class _Text:
    """The pipeline's Gemma."""

    def __init__(self, pipeline: SanaPipeline, max_sequence_length: int) -> None:
        self.modules = (pipeline.text_encoder,)
        self._pipeline, self._max_sequence_length = pipeline, max_sequence_length

    def __call__(self, prompt: str, device: torch.device) -> Conditioning:
        embeds, mask, _, _ = self._pipeline.encode_prompt(
            [prompt],
            do_classifier_free_guidance=False,
            device=device,
            max_sequence_length=self._max_sequence_length,
            complex_human_instruction=INSTRUCTION if prompt else None,
        )
        return {"prompt_embeds": embeds, "prompt_mask": mask.float()}


def text_parts(config: ModelConfig) -> tuple[str, ...]:
    """The subfolders in use."""
    return ("text_encoder", "tokenizer")


def check(config: ModelConfig, folder: Path) -> None:
    """ValueError for a size that is no whole number of tokens, a number of Gemma tokens out of range, SANA-Sprint."""
    transformer = read_json(folder / "transformer" / "config.json")
    check_size(config, _factor(folder) * transformer["patch_size"])
    if not 1 <= config.max_sequence_length <= MAX_TOKENS:
        raise ValueError(
            f"model.max_sequence_length = {config.max_sequence_length}: Sana reads prompts with Gemma; "
            f"use 1 to {MAX_TOKENS} tokens"
        )
    if transformer.get("guidance_embeds"):
        raise ValueError(f"model.path = {config.path}: SANA-Sprint is not a flow model; use Sana 1.0 or 1.5")


def sizes(config: ModelConfig, folder: Path) -> Sizes:
    """Of latents and of a prompt's conditioning, from JSON alone."""
    transformer, factor = read_json(folder / "transformer" / "config.json"), _factor(folder)
    shape = (transformer["in_channels"], config.height // factor, config.width // factor)
    tokens = config.max_sequence_length
    return Sizes(latent_shape=shape, conditioning=tokens * transformer["caption_channels"] + tokens, tokens=tokens)


def load(config: ModelConfig, folder: Path, device: torch.device, *, transformer_only: bool) -> Sana:
    """Load the frozen pipeline (or its transformer only) in `config.dtype`."""
    dtype = getattr(torch, config.dtype)
    transformer = SanaTransformer2DModel.from_pretrained(folder, subfolder="transformer", dtype=dtype)
    transformer = transformer.to(device).requires_grad_(False).eval()
    scheduler = DPMSolverMultistepScheduler.from_pretrained(folder, subfolder="scheduler")
    shape = sizes(config, folder).latent_shape
    if transformer_only:
        return Sana(transformer, scheduler, shape, None, None)

    vae = AutoencoderDC.from_pretrained(folder, subfolder="vae", dtype=dtype).to(device).requires_grad_(False).eval()
    return Sana(transformer, scheduler, shape, vae, conditioner(config, folder, device))


def empty(config: ModelConfig, folder: Path) -> Sana:
    """The shapes alone, on the meta device."""
    with torch.device("meta"):
        transformer = SanaTransformer2DModel.from_config(read_json(folder / "transformer" / "config.json"))
    transformer = transformer.to(getattr(torch, config.dtype)).requires_grad_(False).eval()
    return Sana(transformer, DPMSolverMultistepScheduler(), sizes(config, folder).latent_shape, None, None)


def load_text(config: ModelConfig, folder: Path, dtype: torch.dtype) -> _Text:
    """The text encoder, on the host."""
    pipeline = PIPELINE.from_pretrained(folder, dtype=dtype, transformer=None, vae=None)
    return _Text(pipeline, config.max_sequence_length)


def _factor(folder: Path) -> int:
    """Pixels per latent along one side."""
    return 2 ** (len(read_json(folder / "vae" / "config.json")["encoder_block_out_channels"]) - 1)
