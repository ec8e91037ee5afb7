"""JPEG compressibility: minus the kilobytes of a JPEG of quality 95, over 500. Plain images earn.

A reward that needs no model: for trying out a set-up. Source: DDPO (Black et al. 2023, arXiv 2305.13301), divided by
500 as in the published DiffusionNFT code, so that a 512 px image scores between -1 and 0.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nft_ray.rewards.base import Cost, Reward, RewardConfig, Scores, check_batch
from nft_ray.rewards.jpeg_incompressibility import jpeg_cost, jpeg_kilobytes

KILOBYTES_PER_POINT = 500


class Config(RewardConfig):
    """Section `rewards.jpeg_compressibility`."""


class JpegCompressibility:
    """The reward: - kilobytes / 500, below 0. Prompts and metadata do not matter."""

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """See Reward.score."""
        check_batch(images, prompts, metadata)
        return Scores(values=-jpeg_kilobytes(images) / np.float32(KILOBYTES_PER_POINT))


def cost(config: RewardConfig) -> Cost:
    """Of one image: its JPEG."""
    return jpeg_cost()


def build(config: Config) -> Reward:
    """Nothing to load."""
    return JpegCompressibility()
