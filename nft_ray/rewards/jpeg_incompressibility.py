"""JPEG incompressibility: how many kilobytes an image takes as a JPEG of quality 95. Detail and noise earn.

A reward that needs no model: for trying out a set-up. Source: DDPO (Black et al. 2023, arXiv 2305.13301).
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from nft_ray.rewards.base import Cost, Reward, RewardConfig, Scores, check_batch

JPEG_QUALITY = 95


class Config(RewardConfig):
    """Section `rewards.jpeg_incompressibility`."""


class JpegIncompressibility:
    """The reward: kilobytes (1000 bytes) at JPEG quality 95, above 0. Prompts and metadata do not matter."""

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """See Reward.score."""
        check_batch(images, prompts, metadata)
        return Scores(values=jpeg_kilobytes(images))


def cost(config: RewardConfig) -> Cost:
    """Of one image: its JPEG."""
    return jpeg_cost()


def jpeg_cost() -> Cost:
    """Of writing one JPEG."""
    return Cost(host_s=0.0008, source="benchmarks/results/rewards.json, 19.2 ms for 24 of 512 px")


def build(config: Config) -> Reward:
    """Nothing to load."""
    return JpegIncompressibility()


def jpeg_kilobytes(images: np.ndarray) -> np.ndarray:
    """Size of each image as a JPEG of quality 95 (Pillow), in units of 1000 bytes: uint8 (B, H, W, 3) -> f32 (B,)."""
    return np.array([_num_bytes(image) / 1000 for image in images], dtype=np.float32)


def _num_bytes(image: np.ndarray) -> int:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return buffer.tell()
