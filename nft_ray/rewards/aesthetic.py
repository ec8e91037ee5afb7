"""LAION's aesthetic predictor: how beautiful people would find an image, rated 1 to 10. The prompt does not matter.

    score = head(unit vector of CLIP ViT-L/14's image embedding), head = five linear layers without activations

Source: christophschuhmann/improved-aesthetic-predictor, `sac+logos+ava1-l14-linearMSE.pth`. Dropout stood between the
layers in training (hence the gaps in the file's numbering) and is nothing here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from nft_ray.downloads.published import PublishedFile
from nft_ray.rewards.base import Cost, MemoryGib, Reward, Scores, TorchRewardConfig, check_batch
from nft_ray.rewards.clipscore import MODEL, image_files
from nft_ray.rewards.clipscore import cost as clipscore_cost
from nft_ray.rewards.weights import require, weights_root

HEAD = "christophschuhmann/improved-aesthetic-predictor/sac+logos+ava1-l14-linearMSE.pth"
HEAD_URL = (
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth"
)
HEAD_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"
"""Of the 3,714,759 bytes of git blob 7c0d8aa2 in that repository."""
WIDTHS = (1024, 128, 64, 16, 1)
POSITIONS = (0, 2, 4, 6, 7)
"""Indices of the linear layers in the published `layers`."""


class Config(TorchRewardConfig):
    """Section `rewards.aesthetic`."""

    memory_gib: MemoryGib = 3.0


class Aesthetic:
    """The reward. The head computes in float32, whatever the encoder does."""

    def __init__(self, config: Config) -> None:
        from nft_ray.rewards._clip import clip_images, load_clip

        place = require("aesthetic", files(config), weights_root(config.weights))
        model = load_clip(place[MODEL], config)
        del model.text_model, model.text_projection  # a quarter of the weights, and no prompt is read
        self._images = clip_images(model, config)
        self._head = load_head(place[HEAD], model.config.projection_dim).to(model.device)

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """See Reward.score."""
        import torch

        check_batch(images, prompts, metadata)
        if not len(images):
            return Scores(values=np.zeros(0, np.float32))
        with torch.inference_mode():
            return Scores(values=self._head(self._images(images))[:, 0].cpu().numpy())


def load_head(path: Path, dim: int) -> Any:
    """The published head for features of length `dim`, float32. ValueError where keys or shapes are not its own."""
    import torch

    from nft_ray.rewards._clip import check_keys

    published = torch.load(path, map_location="cpu", weights_only=True)
    head = torch.nn.Sequential(*(torch.nn.Linear(*pair) for pair in pairwise((dim, *WIDTHS))))
    wanted = {
        f"layers.{position}.{kind}": (f"{index}.{kind}", getattr(head[index], kind).shape)
        for index, position in enumerate(POSITIONS)
        for kind in ("weight", "bias")
    }
    misshapen = {key for key in wanted.keys() & published.keys() if published[key].shape != wanted[key][1]}
    check_keys(path, wanted.keys() - published.keys(), published.keys() - wanted.keys(), misshapen)
    head.load_state_dict({ours: published[theirs].float() for theirs, (ours, _) in wanted.items()})
    return head.eval().requires_grad_(False)


def files(config: Config) -> tuple[PublishedFile, ...]:
    """The published files: CLIP ViT-L/14 without its tokenizer, and the head."""
    return (*image_files(), PublishedFile(path=HEAD, url=HEAD_URL, sha256=HEAD_SHA256, mib=3.5))


def cost(config: Config) -> Cost:
    """Of one image: CLIPScore's image encoder, the head is nothing beside it."""
    return replace(clipscore_cost(config), prompt_flops=0.0)


def build(config: Config) -> Reward:
    """Load the model."""
    return Aesthetic(config)
