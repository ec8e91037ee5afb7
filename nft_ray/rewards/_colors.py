"""GenEval's colours: which of ten a masked crop shows, by OpenAI's CLIP ViT-L/14 as a zero-shot classifier.

For each class a colour's text feature is the mean over three templates of unit vectors, made a unit vector again; a
crop has the colour whose feature is nearest. All crops go through the image encoder together, whatever their sizes and
classes; a class's texts are encoded once. It does not know where crops come from.

Source: djghosh13/geneval, evaluation/evaluate_images.py, and clip_benchmark's zeroshot_classification. The weights are
OpenAI's in open_clip's format; OpenAI's models have QuickGELU, which open_clip's plain ViT-L-14 has not.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from nft_ray.rewards._clip import ImageEncoder, TextEncoder, device_of, load_open_clip, open_clip
from nft_ray.rewards._vocabulary import COLORS
from nft_ray.rewards.base import TorchRewardConfig
from nft_ray.rewards.preprocessing import cropped

ARCHITECTURE = "ViT-L-14-quickgelu"
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


class ColorClassifier:
    """`path`: safetensors; `architecture`: a model configuration of open_clip, None = the published one.

    Raises ValueError, one line, without open_clip or where the weights are not the architecture's.
    """

    def __init__(self, path: Path, config: TorchRewardConfig, architecture: Mapping[str, Any] | None = None) -> None:
        library, device = open_clip(), device_of(config)
        architecture = architecture or library.get_model_config(ARCHITECTURE)
        model = load_open_clip(architecture, load_file(path), path, config)
        tokenizer, size = library.get_tokenizer(ARCHITECTURE), architecture["vision_cfg"]["image_size"]
        self._images = ImageEncoder(
            model.encode_image, lambda crops: cropped(crops, size, rounding=round, device=device), config
        )
        self._texts = TextEncoder(lambda texts: model.encode_text(tokenizer(texts).to(device)), config)
        self._known: dict[str, torch.Tensor] = {}

    def __call__(self, crops: Sequence[np.ndarray], class_names: Sequence[str]) -> list[str]:
        """crops uint8 (h, w, 3) of any sizes, the class of each -> the colour of each."""
        if not crops:
            return []
        with torch.inference_mode():
            colors = torch.stack([self._colors(name) for name in class_names])
            likeness = torch.einsum("bd,bcd->bc", self._images(_ragged(crops)), colors)
            return [COLORS[index] for index in likeness.argmax(dim=1).tolist()]

    def _colors(self, class_name: str) -> torch.Tensor:
        """f32 (10, D) on the device, unit vectors."""
        if class_name not in self._known:
            texts = [template.format(color=color, name=class_name) for color in COLORS for template in TEMPLATES]
            mean = self._texts(texts).view(len(COLORS), len(TEMPLATES), -1).mean(dim=1)
            self._known[class_name] = torch.nn.functional.normalize(mean, dim=-1)
        return self._known[class_name]


def _ragged(crops: Sequence[np.ndarray]) -> np.ndarray:
    """Crops of different sizes as one array of objects: it is cut into micro-batches and resized one by one."""
    together = np.empty(len(crops), dtype=object)
    for index, crop in enumerate(crops):
        together[index] = crop
    return together
