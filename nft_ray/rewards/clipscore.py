"""CLIPScore: how well an image and its prompt agree, by OpenAI's CLIP ViT-L/14.

    score = logit_scale * cos(image, prompt) / 100          (the model's logit_scale is 100: the cosine)

Source: Hessel et al. 2021 (arXiv 2104.08718) for the idea, the published DiffusionNFT code for the scale. One
difference, on purpose: that code resizes bilinearly, this bicubically, as CLIP was trained and as it is used elsewhere.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nft_ray.downloads.published import PublishedFile
from nft_ray.rewards.base import Cost, MemoryGib, Reward, Scores, TorchRewardConfig, check_batch
from nft_ray.rewards.weights import require, weights_root

MODEL = "openai/clip-vit-large-patch14"
SCALE = 100.0


class Config(TorchRewardConfig):
    """Section `rewards.clipscore`."""

    memory_gib: MemoryGib = 3.0


class ClipScore:
    """The reward."""

    def __init__(self, config: Config) -> None:
        from nft_ray.rewards._clip import clip_images, clip_texts, load_clip, logit_scale

        place = require("clipscore", files(config), weights_root(config.weights))
        model = load_clip(place[MODEL], config)
        self._images, self._texts = clip_images(model, config), clip_texts(model, place[MODEL], config)
        self._scale = logit_scale(place[MODEL]) / SCALE

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """See Reward.score."""
        from nft_ray.rewards._clip import cosines

        check_batch(images, prompts, metadata)
        return Scores(values=cosines(self._images, images, self._texts, prompts) * np.float32(self._scale))


def image_files() -> tuple[PublishedFile, ...]:
    """The published files of the model without its tokenizer."""
    return (
        PublishedFile(path=f"{MODEL}/config.json"),
        PublishedFile(path=f"{MODEL}/model.safetensors", mib=1631),
    )


def files(config: Config) -> tuple[PublishedFile, ...]:
    """The published files."""
    return (
        *image_files(),
        PublishedFile(path=f"{MODEL}/tokenizer.json", mib=2.1),
        PublishedFile(path=f"{MODEL}/tokenizer_config.json"),
    )


def cost(config: TorchRewardConfig) -> Cost:
    """Of one image."""
    return Cost(
        parameters=427_616_513,
        flops=162.0e9,
        prompt_flops=13.3e9,
        activation_bytes=16_900_000,
        host_s=0.002,
        source="CLIP ViT-L/14: counted (tests/planning/test_scoring.py); a resize with Pillow takes 1.7 ms of a core",
    )


def build(config: Config) -> Reward:
    """Load the model."""
    return ClipScore(config)
