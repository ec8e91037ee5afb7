"""uint8 images to the pixels that a CLIP-like encoder was trained on.

Two ways, each as the code that published the model does it: `cropped` resizes bytes with Pillow, `padded` resizes
floats with torch. A bicubic resize of bytes rounds and clips, one of floats does not; both smooth when they shrink.
The bytes go to the device and become floats there: a quarter of what would have to be copied otherwise.
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
MAX_SIDE_RATIO = 16
"""More elongated images lose their ends before they are resized: 1 x 20000 becomes 3 GB, of which 0.15 MB stay."""
CPU = torch.device("cpu")


def cropped(
    images: np.ndarray, size: int, *, rounding: Callable[[float], int] = floor, device: torch.device = CPU
) -> torch.Tensor:
    """Shorter side to `size`, centre cut out: uint8 (B, H, W, 3) -> f32 (B, 3, size, size), normalised.

    Source: CLIP's own transform. Where the margin is odd, transformers cuts at the floor, torchvision at `round`.
    Pillow releases the interpreter's lock while it resizes, so images go through a few threads.
    """
    crop = partial(_crop, size=size, rounding=rounding)
    threads = min(len(images), len(os.sched_getaffinity(0)), 8)
    if threads < 2:
        pixels = [crop(image) for image in images]
    else:
        with ThreadPoolExecutor(threads) as pool:
            pixels = list(pool.map(crop, images))
    return _normalized(_scaled(np.stack(pixels), device))


def padded(images: np.ndarray, size: int, *, device: torch.device = CPU) -> torch.Tensor:
    """LONGER side to `size`, the rest black, centred: uint8 (B, H, W, 3) -> f32 (B, 3, size, size), normalised.

    Source: HPSv2's transform, on the tensor as there. Two differences, on purpose: an image whose longer side is
    already `size` is padded as well (there it stays as it is, and the encoder then fails unless it is square), and a
    side never shrinks to nothing.
    """
    height, width = images.shape[1:3]
    scale = size / max(height, width)
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    pixels = _scaled(images, device)
    if (new_height, new_width) != (height, width):
        pixels = torch.nn.functional.interpolate(
            pixels, (new_height, new_width), mode="bicubic", align_corners=False, antialias=True
        )
    left, top = (size - new_width) // 2, (size - new_height) // 2
    black = (left, size - new_width - left, top, size - new_height - top)
    return _normalized(torch.nn.functional.pad(pixels, black))


def _crop(image: np.ndarray, *, size: int, rounding: Callable[[float], int]) -> np.ndarray:
    image = _middle(image)
    height, width = image.shape[:2]
    short = min(height, width)
    new_height, new_width = int(size * height / short), int(size * width / short)
    if (new_height, new_width) != (height, width):
        image = np.asarray(Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BICUBIC))
    top, left = rounding((new_height - size) / 2), rounding((new_width - size) / 2)
    return image[top : top + size, left : left + size]


def _middle(image: np.ndarray) -> np.ndarray:
    """The image without the ends of a side that is more than MAX_SIDE_RATIO times the other."""
    longest = MAX_SIDE_RATIO * min(image.shape[:2])
    top, left = (max(0, side - longest) // 2 for side in image.shape[:2])
    return image[top : top + longest, left : left + longest]


def _scaled(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> f32 (B, 3, H, W) in [0, 1] on the device."""
    pixels = torch.from_numpy(np.array(images))  # a copy: arrays of the object store cannot be written to
    if device.type == "cuda":
        pixels = pixels.pin_memory()
    return pixels.to(device, non_blocking=True).permute(0, 3, 1, 2).contiguous().to(torch.float32) / 255


def _normalized(pixels: torch.Tensor) -> torch.Tensor:
    """f32 (B, 3, H, W) in [0, 1] -> the same with CLIP's mean taken off, in units of its deviation."""
    mean, std = (torch.tensor(numbers, device=pixels.device).view(3, 1, 1) for numbers in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std
