"""ImageReward: how much people would prefer an image of a prompt, by a BLIP that was trained on their rankings.

    score = (head(BLIP(image, prompt)) - 0.167) / 1.033           mean 0 and deviation 1 on the authors' images

Source: Xu et al. 2023 (arXiv 2304.05977), `THUDM/ImageReward`, ImageReward-v1.0, and its package image-reward 1.5 for
the preprocessing, the tokens and the two constants. That package does not import beside transformers 5; this is its
network in transformers' own modules (`_blip.py`).
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nft_ray.downloads.published import PublishedFile
from nft_ray.rewards.base import Cost, MemoryGib, Reward, Scores, TorchRewardConfig, check_batch
from nft_ray.rewards.weights import require, weights_root

if TYPE_CHECKING:
    import torch

    from nft_ray.rewards._blip import Dimensions

CHECKPOINT = "THUDM/ImageReward/ImageReward.pt"
TEXT_CONFIG = "THUDM/ImageReward/med_config.json"
VOCABULARY = "google-bert/bert-base-uncased/vocab.txt"
ADDED_TOKENS = ("[DEC]", "[ENC]")
"""What BLIP appends to BERT's vocabulary, in this order. A score uses neither: its text starts with [CLS]."""
MAX_TOKENS = 35
MEAN = 0.16717362830052426
STD = 1.0333394966054072


class Config(TorchRewardConfig):
    """Section `rewards.imagereward`."""

    memory_gib: MemoryGib = 3.0


class ImageReward:
    """The reward. `dimensions`: of the network, where it is not the published one."""

    def __init__(self, config: Config, dimensions: "Dimensions | None" = None) -> None:
        from nft_ray.rewards._blip import Dimensions, TextDimensions, load
        from nft_ray.rewards._clip import device_of, dtype_of

        place = require("imagereward", files(config), weights_root(config.weights))
        dimensions = dimensions or Dimensions()
        self._device, self._dtype = device_of(config), dtype_of(config)
        self._size, self._micro_batch = dimensions.image_size, config.micro_batch_size
        text = TextDimensions.read(place[TEXT_CONFIG])
        self._tokenizer = _tokenizer(str(place[VOCABULARY]))
        if len(self._tokenizer) != text.vocab_size:
            raise ValueError(
                f"{place[VOCABULARY]}: {len(self._tokenizer)} tokens with {' and '.join(ADDED_TOKENS)}, "
                f"but {place[TEXT_CONFIG]} says {text.vocab_size}"
            )
        self._network = load(place[CHECKPOINT], text, dimensions, device=self._device, dtype=self._dtype)

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """See Reward.score."""
        check_batch(images, prompts, metadata)
        if not len(images):
            return Scores(values=np.zeros(0, np.float32))
        import torch

        step = self._micro_batch
        with torch.inference_mode():
            parts = [
                self._raw(images[start : start + step], prompts[start : start + step])
                for start in range(0, len(images), step)
            ]
            return Scores(values=((torch.cat(parts) - MEAN) / STD).cpu().numpy())

    def _raw(self, images: np.ndarray, prompts: Sequence[str]) -> "torch.Tensor":
        """f32 (B,) on the device. Nothing waits for the GPU here: the next images are resized while it works."""
        from nft_ray.rewards.preprocessing import cropped

        tokens = self._tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        found: torch.Tensor = self._network(
            cropped(images, self._size, rounding=round, device=self._device).to(self._dtype),
            tokens["input_ids"].to(self._device),
            tokens["attention_mask"].to(self._device),
        )
        return found


def _tokenizer(vocabulary: str) -> Any:
    """BERT's, lower-casing, with BLIP's two tokens behind its own."""
    from transformers import BertTokenizer

    tokenizer = BertTokenizer(vocab=vocabulary)
    tokenizer.add_tokens(list(ADDED_TOKENS), special_tokens=True)
    return tokenizer


def files(config: TorchRewardConfig) -> tuple[PublishedFile, ...]:
    """The published files."""
    return (
        PublishedFile(path=CHECKPOINT, mib=1706),
        PublishedFile(path=TEXT_CONFIG),
        PublishedFile(path=VOCABULARY, mib=0.2),
    )


def cost(config: Config) -> Cost:
    """Of one image with its prompt: both are read together."""
    return Cost(
        parameters=447_000_000,
        flops=137e9,
        activation_bytes=17_000_000,
        host_s=0.002,
        source="by hand: ViT-L/16 of 197 patches 124 GFLOP, BERT-base of 35 tokens with cross-attention 13; parameters "
        "from the file's size; activations and resize as CLIP ViT-L/14",
    )


def build(config: Config) -> Reward:
    """Load the model."""
    return ImageReward(config)
