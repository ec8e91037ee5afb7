"""uint8 images to the pixels that a CLIP-like encoder was trained on.

Resizing is Pillow's bicubic, as in the published scoring code: other implementations move a score by more than bf16
does. Pillow releases the interpreter's lock while it resizes, so images go through a few threads.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import floor

import numpy as np
import torch
from PIL import Image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of OpenAI's CLIP; OpenCLIP's ViT-H-14, HPSv2, PickScore and ImageReward kept them."""


def cropped(images: np.ndarray, size: int, *, rounding: Callable[[float], int] = floor) -> torch.Tensor:
    """Shorter side to `size`, centre cut out: uint8 (B, H, W, 3) -> f32 (B, 3, size, size), normalised.

    Source: CLIP's own transform. Where the margin is odd, transformers cuts at the floor, torchvision at `round`.
    """
    return _normalized(_each(partial(_crop, size=size, rounding=rounding), images))


def padded(images: np.ndarray, size: int) -> torch.Tensor:
    """LONGER side to `size`, the rest black, centred: uint8 (B, H, W, 3) -> f32 (B, 3, size, size), normalised.

    Source: HPSv2's transform. Black is 0 before the normalisation.
    """
    return _normalized(_each(partial(_pad, size=size), images))


def _crop(image: np.ndarray, *, size: int, rounding: Callable[[float], int]) -> np.ndarray:
    height, width = image.shape[:2]
    short = min(height, width)
    new_height, new_width = int(size * height / short), int(size * width / short)
    resized = _resize(image, new_height, new_width)
    top, left = rounding((new_height - size) / 2), rounding((new_width - size) / 2)
    return resized[top : top + size, left : left + size]


def _pad(image: np.ndarray, *, size: int) -> np.ndarray:
    height, width = image.shape[:2]
    scale = size / max(height, width)
    new_height, new_width = round(height * scale), round(width * scale)
    out = np.zeros((size, size, 3), dtype=np.uint8)
    top, left = (size - new_height) // 2, (size - new_width) // 2
    out[top : top + new_height, left : left + new_width] = _resize(image, new_height, new_width)
    return out


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def _each(transform: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> np.ndarray:
    threads = min(len(images), len(os.sched_getaffinity(0)), 8)
    if threads < 2:
        return np.stack([transform(image) for image in images])
    with ThreadPoolExecutor(threads) as pool:
        return np.stack(list(pool.map(transform, images)))


def _normalized(pixels: np.ndarray) -> torch.Tensor:
    """uint8 (B, size, size, 3) -> f32 (B, 3, size, size)."""
    scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32) / 255
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    return (scaled - mean) / std
