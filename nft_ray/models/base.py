"""What a model family must offer. One file per ARCHITECTURE; its name is what `model.family` says.

The number 1000 (diffusion timesteps), latent scaling and packing live in those files only: everywhere else t is in
[0, 1] with 1 = noise, and the velocity is noise - x0.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Sequence
from typing import Protocol

import diffusers
import numpy as np
import torch
import transformers

import nft_ray.models
from nft_ray.config import ModelConfig

Conditioning = dict[str, torch.Tensor]  # name -> (B, ...); what the transformer needs to know of the prompts
NOT_FAMILIES = {"base", "lora", "lora_files"}


class FlowModel(Protocol):
    """A frozen text-to-image flow model on one device. Only its transformer ever gets a LoRA."""

    transformer: torch.nn.Module
    latent_shape: tuple[int, ...]
    lora_targets: tuple[str, ...]

    def velocity(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """v(x_t, t): x (B, *latent) f32, t (B,) f32 in [0, 1] -> (B, *latent) f32. Differentiable."""
        ...

    def probe(self) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
        """A fixed input (x, t, conditioning) of batch 1, the same in every process: to compare velocities."""
        ...

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of the prompts, batch len(prompts). Needs the text encoders."""
        ...

    def decode(self, x0: torch.Tensor) -> np.ndarray:
        """Clean latents (B, *latent) -> images uint8 (B, H, W, 3). Needs the VAE."""
        ...

    def sigmas(self, num_steps: int) -> torch.Tensor:
        """The scheduler's own sigmas, f32 (num_steps + 1,), falling, the last one 0."""
        ...


def families() -> list[str]:
    """Names of the model families: the modules of this package."""
    found = {module.name for module in pkgutil.iter_modules(nft_ray.models.__path__)}
    return sorted(found - NOT_FAMILIES)


def load_model(config: ModelConfig, device: torch.device, *, transformer_only: bool = False) -> FlowModel:
    """Load a model family; learners load the transformer only (then `encode` and `decode` raise)."""
    quiet_libraries()
    check_model(config)
    module = importlib.import_module(f"nft_ray.models.{config.family}")
    return module.load(config, device, transformer_only=transformer_only)


def quiet_libraries() -> None:
    """Errors only from transformers and diffusers, and no bars: ours say what is loading, one line per role."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()


def check_model(config: ModelConfig) -> None:
    """ValueError with one line for an unknown family or a path that is neither a folder nor a Hub id."""
    if config.family not in families():
        close = difflib.get_close_matches(config.family, families(), 1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(families())}"
        raise ValueError(f"model.family = {config.family!r}: unknown; {hint}")
    importlib.import_module(f"nft_ray.models.{config.family}").check(config)


def repeat(conditioning: Conditioning, index: torch.Tensor) -> Conditioning:
    """Rows of a conditioning, by index (B,) i64."""
    return {name: value.index_select(0, index.to(value.device)) for name, value in conditioning.items()}
