"""What our rewards use of open_clip, with a CLIP of two layers in the place of its own: it needs no torchvision.

Where open_clip is installed the same rewards are tested with it, on the published weights' architecture.
"""

from collections.abc import Mapping, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

LENGTH = 77
SMALL = {"embed_dim": 24, "vision_cfg": {"image_size": 28}, "text_cfg": {}}


class CLIP(torch.nn.Module):
    """An image is one patch, a text the sum of its letters."""

    def __init__(self, embed_dim: int, vision_cfg: Mapping[str, int], text_cfg: Mapping[str, int]) -> None:
        super().__init__()
        self.visual = torch.nn.Conv2d(3, embed_dim, vision_cfg["image_size"])
        self.token_embedding = torch.nn.Embedding(256, embed_dim)
        self.register_buffer("attn_mask", torch.empty(LENGTH, LENGTH), persistent=False)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return self.visual(images).flatten(1)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.token_embedding(tokens).sum(dim=1)


def tokenizer(texts: Sequence[str]) -> torch.Tensor:
    """int64 (B, LENGTH): the bytes of each text, cut or filled up with zeros."""
    tokens = torch.zeros(len(texts), LENGTH, dtype=torch.int64)
    for row, text in zip(tokens, texts, strict=True):
        data = list(text.encode()[:LENGTH])
        row[: len(data)] = torch.tensor(data)
    return tokens


def weights() -> dict[str, torch.Tensor]:
    """Random ones of the small CLIP, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CLIP(**SMALL).state_dict()  # type: ignore[arg-type]


def stand_in() -> Any:
    """To be put at sys.modules["open_clip"]."""
    module: Any = ModuleType("open_clip")
    module.model = SimpleNamespace(CLIP=CLIP)
    module.get_tokenizer = lambda name: tokenizer
    return module
