"""What the rewards around a CLIP model share: loading it, and images and prompts to unit vectors.

A group is many images of ONE prompt: each distinct prompt is tokenised and encoded once, and the last ones are
remembered. Vectors leave in float32, whatever the model computes in. Two libraries build the models: transformers,
and open_clip, which is an extra.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from nft_ray.rewards.base import TorchRewardConfig
from nft_ray.rewards.preprocessing import cropped

MAX_TOKENS = 77
"""Of CLIP's text tower; longer prompts are cut."""
REMEMBERED_PROMPTS = 1024
WEIGHTS = "model.safetensors"

Encode = Callable[[torch.Tensor], torch.Tensor]
"""Pixels in the model's data type -> features (B, D)."""
Preprocess = Callable[[np.ndarray], torch.Tensor]
"""uint8 (B, H, W, 3) -> f32 (B, 3, size, size), normalised, on the model's device."""


def device_of(config: TorchRewardConfig) -> torch.device:
    """Where the model runs: as configured, else the GPU that this process has been given, else the CPU.

    Raises ValueError where cuda is asked for and there is none.
    """
    if config.device and config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device = {config.device!r}: this process sees no GPU; set num_gpus, or device: cpu")
    return torch.device(config.device or ("cuda" if config.num_gpus and torch.cuda.is_available() else "cpu"))


def dtype_of(config: TorchRewardConfig) -> torch.dtype:
    """Data type of weights and forward."""
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32


class ImageEncoder:
    """Images to unit vectors, `micro_batch_size` at a time: the next are resized while the GPU works."""

    def __init__(self, encode: Encode, preprocess: Preprocess, config: TorchRewardConfig) -> None:
        self._encode, self._preprocess = encode, preprocess
        self._dtype, self._micro_batch = dtype_of(config), config.micro_batch_size

    def __call__(self, images: np.ndarray) -> torch.Tensor:
        """uint8 (B, H, W, 3), at least one -> f32 (B, D) on the model's device, each of length 1."""
        parts = [
            self._encode(self._preprocess(images[start : start + self._micro_batch]).to(self._dtype))
            for start in range(0, len(images), self._micro_batch)
        ]
        return _unit(torch.cat(parts))


class TextEncoder:
    """Prompts to unit vectors, each distinct one once; the REMEMBERED_PROMPTS that were asked for last are kept."""

    def __init__(self, encode: Callable[[list[str]], torch.Tensor], config: TorchRewardConfig) -> None:
        self._encode, self._micro_batch = encode, config.micro_batch_size
        self._known: OrderedDict[str, torch.Tensor] = OrderedDict()

    def __call__(self, prompts: Sequence[str]) -> torch.Tensor:
        """At least one prompt -> f32 (B, D) on the model's device, each of length 1."""
        distinct = list(dict.fromkeys(prompts))
        found = {prompt: self._known[prompt] for prompt in distinct if prompt in self._known}
        new = [prompt for prompt in distinct if prompt not in found]
        for start in range(0, len(new), self._micro_batch):
            some = new[start : start + self._micro_batch]
            found |= zip(some, _unit(self._encode(some)), strict=True)
        for prompt in distinct:
            self._known[prompt] = found[prompt]
            self._known.move_to_end(prompt)
        while len(self._known) > REMEMBERED_PROMPTS:
            self._known.popitem(last=False)
        return torch.stack([found[prompt] for prompt in prompts])


def cosines(image_encoder: ImageEncoder, images: np.ndarray, texts: TextEncoder, prompts: Sequence[str]) -> np.ndarray:
    """Of each image, uint8 (B, H, W, 3), and its prompt -> f32 (B,). B may be 0."""
    if not prompts:
        return np.zeros(0, np.float32)
    with torch.inference_mode():
        found: np.ndarray = (image_encoder(images) * texts(prompts)).sum(dim=-1).cpu().numpy()
    return found


def load_clip(folder: Path, config: TorchRewardConfig) -> Any:
    """A published transformers CLIPModel on the device of the config, frozen. Its config.json says how large it is.

    Raises ValueError where the file's keys or shapes are not exactly the architecture's.
    """
    from transformers import CLIPModel

    model, loading = CLIPModel.from_pretrained(
        folder,
        dtype=dtype_of(config),
        local_files_only=True,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # so that they are reported, and refused below, like any other wrong key
        output_loading_info=True,
    )
    # transformers before 4.31 saved two buffers that are computed now; both published files have them
    unexpected = {key for key in loading["unexpected_keys"] if not key.endswith("embeddings.position_ids")}
    check_keys(folder, loading["missing_keys"], unexpected, {key for key, *_ in loading["mismatched_keys"]})
    return model.to(device_of(config)).eval().requires_grad_(False)


def logit_scale(folder: Path) -> float:
    """What the cosine is multiplied with, as published, in float32: bf16 would move every score by up to 1 %."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return float(file.get_tensor("logit_scale").float().exp())


def clip_images(model: Any, config: TorchRewardConfig) -> ImageEncoder:
    """The image tower of a transformers CLIPModel."""
    size, device = model.config.vision_config.image_size, model.device
    return ImageEncoder(
        lambda pixels: model.get_image_features(pixel_values=pixels).pooler_output,
        lambda images: cropped(images, size, device=device),
        config,
    )


def clip_texts(model: Any, tokenizer_folder: Path, config: TorchRewardConfig) -> TextEncoder:
    """The text tower of a transformers CLIPModel with the published tokenizer of a folder."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)

    def encode(prompts: list[str]) -> torch.Tensor:
        tokens = tokenizer(prompts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        features: torch.Tensor = model.get_text_features(**tokens.to(model.device)).pooler_output
        return features

    return TextEncoder(encode, config)


def open_clip() -> ModuleType:
    """The package, or a ValueError that names the extra."""
    try:
        import open_clip as module
    except ImportError as error:
        raise ValueError(
            f"this reward needs open_clip ({error}): pip install 'nft_ray[openclip]' where the replicas run"
        ) from None
    found: ModuleType = module
    return found


def load_open_clip(
    architecture: Mapping[str, Any], weights: Mapping[str, torch.Tensor], path: Path, config: TorchRewardConfig
) -> Any:
    """open_clip's CLIP of this model configuration with exactly these weights, on the device of the config, frozen.

    It is built without memory and takes the weights as its own, so nothing is initialised at random first. Raises
    ValueError, naming `path`, where keys or shapes differ.
    """
    device, dtype = device_of(config), dtype_of(config)
    with torch.device("meta"):
        model = open_clip().model.CLIP(**architecture)
    wanted = model.state_dict()
    shared = wanted.keys() & weights.keys()
    misshapen = {key for key in shared if wanted[key].shape != weights[key].shape}
    check_keys(path, wanted.keys() - weights.keys(), weights.keys() - wanted.keys(), misshapen)
    model.load_state_dict({key: value.to(device, dtype) for key, value in weights.items()}, assign=True)
    if model.attn_mask is not None:  # the only buffer that is no weight: no word sees a later one
        later = torch.full(model.attn_mask.shape, float("-inf"), device=device, dtype=dtype)
        model.register_buffer("attn_mask", later.triu(1), persistent=False)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    return model.eval().requires_grad_(False)


def check_keys(path: Path, missing: Iterable[str], unexpected: Iterable[str], misshapen: Iterable[str] = ()) -> None:
    """ValueError, one line that counts the keys and names the first of them, unless all are empty."""
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    problems = []
    for kind, keys in kinds.items():
        if names := sorted(keys):
            problems.append(f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if names[3:] else ''})")
    if problems:
        raise ValueError(f"{path}: is not the published checkpoint: keys {'; '.join(problems)}")


def _unit(features: torch.Tensor) -> torch.Tensor:
    """(B, D) -> f32 (B, D), each of length 1."""
    return torch.nn.functional.normalize(features.float(), dim=-1)
