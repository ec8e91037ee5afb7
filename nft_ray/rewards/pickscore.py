"""PickScore: how much people who chose between two images of a prompt would like this one.

    score = logit_scale * cos(image, prompt) / 26

Model: a CLIP ViT-H/14 fine-tuned on Pick-a-Pic (Kirstain et al. 2023, arXiv 2305.01569), `yuvalkirstain/PickScore_v1`,
with the tokenizer of the CLIP that it started from. The division by 26, which brings scores near 1, is the published
DiffusionNFT code's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nft_ray.downloads.published import PublishedFile
from nft_ray.rewards.base import Cost, MemoryGib, Reward, Scores, TorchRewardConfig, check_batch
from nft_ray.rewards.weights import require, weights_root

MODEL = "yuvalkirstain/PickScore_v1"
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
SCALE = 26.0


class Config(TorchRewardConfig):
    """Section `rewards.pickscore`."""

    memory_gib: MemoryGib = 5.0


class PickScore:
    """The reward. Detail `cos`: the bare cosine."""

    def __init__(self, config: Config) -> None:
        from nft_ray.rewards._clip import clip_images, clip_texts, load_clip, logit_scale

        place = require("pickscore", files(config), weights_root(config.weights))
        model = load_clip(place[MODEL], config)
        self._images, self._texts = clip_images(model, config), clip_texts(model, place[TOKENIZER], config)
        self._scale = logit_scale(place[MODEL]) / SCALE

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """See Reward.score."""
        from nft_ray.rewards._clip import cosines

        check_batch(images, prompts, metadata)
        cos = cosines(self._images, images, self._texts, prompts)
        return Scores(values=cos * np.float32(self._scale), details={"cos": cos})


def files(config: Config) -> tuple[PublishedFile, ...]:
    """The published files."""
    return (
        PublishedFile(path=f"{MODEL}/config.json"),
        PublishedFile(path=f"{MODEL}/model.safetensors", mib=3762),
        PublishedFile(path=f"{TOKENIZER}/tokenizer.json", mib=2.1),
        PublishedFile(path=f"{TOKENIZER}/tokenizer_config.json"),
    )


def cost(config: Config) -> Cost:
    """Of one image."""
    return Cost(
        parameters=986_109_441,
        flops=334.6e9,
        prompt_flops=47.1e9,
        activation_bytes=15_800_000,
        host_s=0.002,
        source="CLIP ViT-H/14: counted (tests/planning/test_scoring.py); a resize with Pillow takes 1.7 ms of a core",
    )


def build(config: Config) -> Reward:
    """Load the model."""
    return PickScore(config)
