"""HPSv2.1: how much people would prefer an image of a prompt, by a CLIP ViT-H/14 fine-tuned on their choices.

    score = cos(image, prompt)

Source: Wu et al. 2023 (arXiv 2306.09341), `xswu/HPSv2`, HPS_v2.1_compressed.pt: the weights of open_clip's ViT-H-14.
The image's LONGER side is resized and the rest is black, unlike in CLIP: it moves a score of a 512 x 384 image a lot.
open_clip is an extra, `pip install nft_ray[openclip]`: it brings torchvision, which must match torch.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nft_ray.downloads.published import PublishedFile
from nft_ray.rewards.base import Cost, MemoryGib, Reward, Scores, TorchRewardConfig, check_batch
from nft_ray.rewards.weights import require, weights_root

ARCHITECTURE = "ViT-H-14"
CHECKPOINT = "xswu/HPSv2/HPS_v2.1_compressed.pt"


class Config(TorchRewardConfig):
    """Section `rewards.hpsv2`."""

    memory_gib: MemoryGib = 5.0


class HpsV2:
    """The reward. `architecture`: a model configuration of open_clip, None = the published one, ViT-H-14."""

    def __init__(self, config: Config, architecture: Mapping[str, Any] | None = None) -> None:
        from nft_ray.rewards._clip import ImageEncoder, TextEncoder, device_of, load_open_clip, open_clip
        from nft_ray.rewards.preprocessing import padded

        library, device = open_clip(), device_of(config)
        checkpoint = require("hpsv2", files(config), weights_root(config.weights))[CHECKPOINT]
        architecture = architecture or library.get_model_config(ARCHITECTURE)
        model = load_open_clip(architecture, read_checkpoint(checkpoint), checkpoint, config)
        tokenizer = library.get_tokenizer(ARCHITECTURE)
        size = architecture["vision_cfg"]["image_size"]
        self._images = ImageEncoder(model.encode_image, lambda images: padded(images, size, device=device), config)
        self._texts = TextEncoder(lambda prompts: model.encode_text(tokenizer(prompts).to(device)), config)

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """See Reward.score."""
        from nft_ray.rewards._clip import cosines

        check_batch(images, prompts, metadata)
        return Scores(values=cosines(self._images, images, self._texts, prompts))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The weights in the published file, by open_clip's keys; they stay in the file until they are used."""
    import torch

    published = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if "state_dict" not in published:
        raise ValueError(f"{path}: is not the published checkpoint: it has no key state_dict")
    found: dict[str, Any] = published["state_dict"]
    return found


def files(config: Config) -> tuple[PublishedFile, ...]:
    """The published file; the tokenizer comes with open_clip."""
    return (PublishedFile(path=CHECKPOINT, mib=1881),)


def cost(config: Config) -> Cost:
    """Of one image: PickScore's model, but the device resizes."""
    return Cost(
        parameters=986_109_441,
        flops=334.6e9,
        prompt_flops=47.1e9,
        activation_bytes=15_800_000,
        host_s=0.0005,
        source="CLIP ViT-H/14: counted (tests/planning/test_scoring.py); 786 KB of pixels to the device",
    )


def build(config: Config) -> Reward:
    """Load the model."""
    return HpsV2(config)
