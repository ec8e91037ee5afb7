"""What a model family must offer. One file per ARCHITECTURE; its name is what `model.family` says.

The number 1000 (diffusion timesteps), latent scaling and packing live in those files only: everywhere else t is in
[0, 1] with 1 = noise, latents are (C, H, W), and the velocity is noise - x0.
"""

import difflib
import importlib
import json
import pkgutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import diffusers
import numpy as np
import torch
import transformers

import nft_ray.models
from nft_ray.config import ModelConfig
from nft_ray.models.parts import fetch, folder_of, missing_parts, prepare
from nft_ray.models.resolve import started

Conditioning = dict[str, torch.Tensor]  # name -> (B, ...); what the transformer needs to know of the prompts
NOT_FAMILIES = {"base", "conditioning", "full", "lora", "lora_files", "parts", "resolve"}


class Sizes(NamedTuple):
    """What is known of a model before it is loaded. `conditioning`: numbers that one prompt becomes; `tokens`: rows of
    its text features.
    """

    latent_shape: tuple[int, int, int]
    conditioning: int
    tokens: int


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
        """Conditioning of the prompts, batch len(prompts); "" is the unconditional one. Needs the text encoders."""
        ...

    def decode(self, x0: torch.Tensor) -> torch.Tensor:
        """Clean latents (B, *latent) -> images uint8 (B, H, W, 3), on the model's device. Needs the VAE."""
        ...

    def sigmas(self, num_steps: int) -> torch.Tensor:
        """The pipeline's own sigmas, f32 (num_steps + 1,), falling, the last one 0."""
        ...

    def modules(self) -> Sequence[torch.nn.Module]:
        """All that holds weights: the transformer and, unless it is a learner's model, VAE and text encoders."""
        ...


class Family(Protocol):
    """What a family's module holds; DISTILLED_GUIDANCE, the default, too, where its transformer is told a guidance."""

    PIPELINE: Any  # the diffusers pipeline that its LoRAs are exported for
    LORA_TARGETS: tuple[str, ...]

    @staticmethod
    def text_parts(config: ModelConfig) -> tuple[str, ...]:
        """Subfolders of the pipeline that hold the text encoders and tokenizers in use."""
        ...

    @staticmethod
    def check(config: ModelConfig, folder: Path) -> None:
        """ValueError with one line where the configuration does not fit the pipeline; reads JSON only."""
        ...

    @staticmethod
    def sizes(config: ModelConfig, folder: Path) -> Sizes:
        """Of latents and conditioning; reads JSON only."""
        ...

    @staticmethod
    def load(config: ModelConfig, folder: Path, device: torch.device, *, transformer_only: bool) -> FlowModel:
        """The frozen pipeline in `config.dtype`."""
        ...

    @staticmethod
    def empty(config: ModelConfig, folder: Path) -> FlowModel:
        """The same without weights, VAE or text encoders, on the meta device: to count what it takes."""
        ...

    @staticmethod
    def load_text(config: ModelConfig, folder: Path, dtype: torch.dtype) -> Any:
        """The text encoders (conditioning.TextEncoders), on the host."""
        ...


def families() -> list[str]:
    """Names of the model families: the modules of this package."""
    found = {module.name for module in pkgutil.iter_modules(nft_ray.models.__path__)}
    return sorted(found - NOT_FAMILIES)


def family(config: ModelConfig) -> Any:
    """The module of `config.family` (see `Family`); ValueError with the nearest name."""
    if config.family not in families():
        close = difflib.get_close_matches(config.family, families(), 1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(families())}"
        raise ValueError(f"model.family = {config.family!r}: unknown; {hint}")
    return importlib.import_module(f"nft_ray.models.{config.family}")


def load_model(config: ModelConfig, device: torch.device, *, transformer_only: bool = False) -> FlowModel:
    """Load a model family; learners load the transformer only (then `encode` and `decode` raise)."""
    quiet_libraries()
    module = family(config)
    folder = prepare(config, module.text_parts(config), transformer_only=transformer_only)
    check_folder(config, folder, transformer_only=transformer_only)
    model: FlowModel = module.load(config, folder, device, transformer_only=transformer_only)
    return model


def sizes(config: ModelConfig) -> Sizes | None:
    """Of a model that is not loaded; None where its configuration is not at hand."""
    folder = folder_of(config)
    if folder is None:
        return None
    found: Sizes = family(config).sizes(config, folder)
    return found


def fetch_model(config: ModelConfig, token: str | None, *, transformer_only: bool = False) -> Iterator[str]:
    """Bring a Hub id's files to this node; gives lines of progress. See pipelines.fetch."""
    return fetch(config, family(config).text_parts(config), transformer_only=transformer_only, token=token)


def quiet_libraries() -> None:
    """Errors only from transformers and diffusers, and no bars: ours say what is loading, one line per role."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()


def check_model(config: ModelConfig) -> None:
    """ValueError with one line for what is known to be wrong before anything starts: family, path, files, sizes."""
    family(config)
    folder = folder_of(config)
    if folder is not None:
        check_folder(config, folder)
    if config.lora.start is not None:
        started(config.lora)


def check_folder(config: ModelConfig, folder: Path, *, transformer_only: bool = False) -> None:
    """ValueError with one line where a pipeline's folder lacks a part, or the configuration does not fit it."""
    module = family(config)
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"model.path = {config.path}: holds no model_index.json; name a pipeline in diffusers format")
    pipeline, wanted = read_json(folder / "model_index.json").get("_class_name"), module.PIPELINE.__name__
    if pipeline != wanted:
        raise ValueError(f"model.path = {config.path}: is a {pipeline}; model.family {config.family} needs a {wanted}")
    if config.distilled_guidance is not None and not hasattr(module, "DISTILLED_GUIDANCE"):
        raise ValueError(
            f"model.distilled_guidance = {config.distilled_guidance:g}: {config.family} has no guidance embedding; "
            "leave it out"
        )
    module.check(config, folder)
    missing = missing_parts(folder, () if transformer_only else module.text_parts(config), transformer_only)
    if missing:
        raise ValueError(f"model.path = {config.path}: lacks {missing[0]}; use a whole pipeline in diffusers format")


def check_size(config: ModelConfig, multiple: int, largest: int | None = None) -> None:
    """ValueError where height or width is no multiple of what one token covers, or above the largest (pixels)."""
    for name in ("height", "width"):
        pixels = getattr(config, name)
        below, above = pixels // multiple * multiple, -(-pixels // multiple) * multiple
        if below != above:
            nearest = f"{below} or {above}" if below else str(above)
            raise ValueError(f"model.{name} = {pixels}: must be a multiple of {multiple} pixels; nearest: {nearest}")
        if largest is not None and pixels > largest:
            raise ValueError(
                f"model.{name} = {pixels}: this model's positions end at {largest} pixels; use at most that"
            )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a pipeline; ValueError with one line."""
    try:
        data: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    return data


def uint8_images(pixels: torch.Tensor) -> torch.Tensor:
    """A VAE's output (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3), with diffusers' own rounding."""
    pixels = (pixels.float() / 2 + 0.5).clamp(0, 1) * 255
    return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # its shape is not that of any work
def probe_velocity(model: FlowModel) -> np.ndarray:
    """The model's velocity on its fixed probe, f32 (*latent)."""
    return model.velocity(*model.probe())[0].cpu().numpy()


def repeat(conditioning: Conditioning, index: torch.Tensor) -> Conditioning:
    """Rows of a conditioning, by index (B,) i64."""
    return {name: value.index_select(0, index.to(value.device)) for name, value in conditioning.items()}
