"""GenEval's objects by Mask2Former: images to boxes with classes, confidences and masks, all images in one forward.

    images --resize--> Mask2Former --100 queries: class logits, coarse mask logits--> `instances` --> boxes, masks
                                                                        masked crops --a classifier--> colours

The weights are Facebook's (swin-small, COCO instances), where GenEval's own are mmdet's of the same architecture. Until
both have judged the same images, figures with the one are NOT COMPARABLE with figures with the other.

Classes go by their index: GenEval has its own spelling of some of COCO's names ("tv remote"), and the names in the
published config are others again. The post-processing is mmdet's: the 100 likeliest (query, class) pairs; mask = logits
above 0; confidence = class probability x mean probability inside the mask; box = extent of the mask. One difference:
mask logits are brought to the image's size in one bilinear step, not in two (padded input, then image).
Source: Cheng et al. 2022 (arXiv 2112.01527), mmdet 2.28's MaskFormerFusionHead, djghosh13/geneval.
"""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError

from nft_ray.rewards._clip import check_keys, device_of, dtype_of
from nft_ray.rewards._detections import Asked, Box
from nft_ray.rewards._vocabulary import OBJECT_NAMES
from nft_ray.rewards.base import TorchRewardConfig, one_line

MAX_INSTANCES = 100
"""Per image; mmdet's max_per_image."""
BLANK = 0x99
"""GenEval paints #999 over everything that is not the object."""

Classify = Callable[[Sequence[np.ndarray], Sequence[str]], list[str]]
"""(crops uint8 (h, w, 3) of any sizes, the class of each) -> the colour of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One object. label: index of its class; mask: bool (y1 - y0, x1 - x0), cut out at its box."""

    label: int
    confidence: float
    box: Box
    mask: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInstances:
    """What was found in one image. objects: class -> [(box, confidence), ...], by falling confidence."""

    objects: dict[str, list[tuple[Box, float]]]
    image: np.ndarray = field(repr=False)
    masks: dict[tuple[str, Box], list[np.ndarray]] = field(repr=False)

    @classmethod
    def of(cls, image: np.ndarray, found: Sequence[Instance]) -> "ImageInstances":
        """image uint8 (H, W, 3); found: by falling confidence.

        `geneval.select` lets the later of two equally sure objects come first, so `masks` are in that order.
        """
        objects: dict[str, list[tuple[Box, float]]] = {}
        for one in found:
            objects.setdefault(OBJECT_NAMES[one.label], []).append((one.box, one.confidence))
        masks: dict[tuple[str, Box], list[np.ndarray]] = {}
        for one in sorted(reversed(found), key=lambda one: -one.confidence):
            masks.setdefault((OBJECT_NAMES[one.label], one.box), []).append(one.mask)
        return cls(objects=objects, image=image, masks=masks)

    def crops(self, class_name: str, boxes: Sequence[Box]) -> list[np.ndarray]:
        """The boxes' pixels, uint8 (h, w, 3), with what is not the object painted #999.

        Two objects may have the same box and different masks: the k-th time that a box is named it is the k-th surest.
        """
        named: dict[Box, int] = {}
        crops = []
        for box in boxes:
            mask = self.masks[class_name, box][named.setdefault(box, 0)]
            named[box] += 1
            x0, y0, x1, y1 = map(int, box)
            crops.append(np.where(mask[..., None], self.image[y0:y1, x0:x1], np.uint8(BLANK)))
        return crops


class Mask2FormerDetector:
    """Finds GenEval's 80 classes. `floor`: less sure than this is not returned (a speed-up, not a rule of GenEval)."""

    def __init__(self, folder: Path, config: TorchRewardConfig, classify: Classify, *, floor: float) -> None:
        self._device, self._dtype = device_of(config), dtype_of(config)
        self._micro_batch, self._classify, self._floor = config.micro_batch_size, classify, floor
        self._preprocess = Preprocessing.read(folder / "preprocessor_config.json")
        self._model = load_model(folder).to(self._device, self._dtype)

    def detect(self, images: np.ndarray) -> list[ImageInstances]:
        """uint8 (B, H, W, 3) -> one per image. Boxes are in pixels of the image."""
        found: list[ImageInstances] = []
        with torch.inference_mode():
            for start in range(0, len(images), self._micro_batch):
                found += self._forward(images[start : start + self._micro_batch])
        return found

    def colors_of(self, asked: Sequence[Asked[ImageInstances]]) -> list[list[str]]:
        """The colour of every box that is asked about; all of them go through the classifier together."""
        crops, names = [], []
        for one in asked:
            crops += one.detections.crops(one.class_name, one.boxes)
            names += [one.class_name] * len(one.boxes)
        colors = iter(self._classify(crops, names) if crops else ())
        return [[next(colors) for _ in one.boxes] for one in asked]

    def _forward(self, images: np.ndarray) -> list[ImageInstances]:
        out = self._model(pixel_values=self._preprocess(images, self._device).to(self._dtype))
        pairs = zip(images, out.class_queries_logits.float(), out.masks_queries_logits.float(), strict=True)
        size = (images.shape[1], images.shape[2])
        return [
            ImageInstances.of(image, instances(labels, masks, size, floor=self._floor))
            for image, labels, masks in pairs
        ]


def instances(
    class_logits: torch.Tensor, mask_logits: torch.Tensor, size: tuple[int, int], *, floor: float = 0.0
) -> list[Instance]:
    """What the queries of one image say, by falling confidence; see the module for the rule.

    class_logits f32 (Q, C + 1), the last column is "nothing"; mask_logits f32 (Q, h, w) for the whole image; size: its
    height and width. Pairs whose class probability is not above `floor` are left out before their masks are made: a
    confidence is never above it. So are empty masks, of confidence 0.
    """
    probabilities = class_logits.softmax(dim=-1)[:, :-1]
    likeliest = probabilities.flatten().topk(min(MAX_INSTANCES, probabilities.numel()))
    pairs = likeliest.indices[likeliest.values > floor]
    if not len(pairs):
        return []
    queries, labels = pairs // probabilities.shape[1], pairs % probabilities.shape[1]
    logits = torch.nn.functional.interpolate(mask_logits[queries][None], size, mode="bilinear", align_corners=False)[0]
    masks = logits > 0
    inside = (logits.sigmoid() * masks).sum(dim=(1, 2)) / masks.sum(dim=(1, 2)).clamp(min=1)
    confidences = (likeliest.values[: len(pairs)] * inside).tolist()
    boxes = zip(*_extent(masks.any(dim=1)), *_extent(masks.any(dim=2)), strict=True)
    found = [
        Instance(
            label=label,
            confidence=confidence,
            box=(float(x0), float(y0), float(x1), float(y1)),
            mask=mask[y0:y1, x0:x1].copy(),
        )
        for label, confidence, (x0, x1, y0, y1), mask in zip(
            labels.tolist(), confidences, boxes, masks.cpu().numpy(), strict=True
        )
        if confidence > 0
    ]
    return sorted(found, key=lambda one: -one.confidence)


def _extent(occupied: torch.Tensor) -> tuple[list[int], list[int]]:
    """bool (K, N) -> the first True of each row, and one behind the last; of a row without any, (0, N)."""
    values = occupied.to(torch.uint8)
    ends = occupied.shape[1] - values.flip(1).argmax(dim=1)
    return values.argmax(dim=1).tolist(), ends.tolist()


class _FixedSize(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    height: PositiveInt
    width: PositiveInt

    def of(self, height: int, width: int) -> tuple[int, int]:
        return self.height, self.width


class _Edges(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    shortest_edge: PositiveInt
    longest_edge: PositiveInt

    def of(self, height: int, width: int) -> tuple[int, int]:
        """The shorter side becomes `shortest_edge`, less where the longer one would be above `longest_edge`."""
        short, long = min(height, width), max(height, width)
        side = min(float(self.shortest_edge), self.longest_edge * short / long)
        shorter, longer = round(side), int(side * long / short)
        return (shorter, longer) if height <= width else (longer, shorter)


class Preprocessing(BaseModel):
    """The part of the published preprocessor_config.json that decides on pixels: resized, scaled, normalised."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    do_resize: Literal[True] = True
    do_rescale: Literal[True] = True
    do_normalize: Literal[True] = True
    size: _FixedSize | _Edges
    resample: int
    size_divisor: int
    rescale_factor: PositiveFloat
    image_mean: tuple[float, float, float]
    image_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat]

    @classmethod
    def read(cls, path: Path) -> "Preprocessing":
        """ValueError, one line, where the file does not say it all."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise ValueError(one_line(error, str(path))) from None

    def __call__(self, images: np.ndarray, device: torch.device) -> torch.Tensor:
        """uint8 (B, H, W, 3), B > 0 -> f32 (B, 3, h, w) on the device.

        The whole image is stretched, so masks come back by stretching. Pillow's threads, bytes to the device: as in
        `preprocessing.cropped`.
        """
        height, width = (self._divisible(side) for side in self.size.of(images.shape[1], images.shape[2]))

        def resized(image: np.ndarray) -> np.ndarray:
            return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling(self.resample)))

        with ThreadPoolExecutor(min(len(images), len(os.sched_getaffinity(0)), 8)) as pool:
            pixels = torch.from_numpy(np.stack(list(pool.map(resized, images))))
        if device.type == "cuda":
            pixels = pixels.pin_memory()
        scaled = pixels.to(device, non_blocking=True).permute(0, 3, 1, 2).to(torch.float32) * self.rescale_factor
        mean, std = (
            torch.tensor(numbers, device=device).view(3, 1, 1) for numbers in (self.image_mean, self.image_std)
        )
        return (scaled - mean) / std

    def _divisible(self, side: int) -> int:
        return math.ceil(side / self.size_divisor) * self.size_divisor if self.size_divisor else side


def load_model(folder: Path) -> Any:
    """The published model, float32 and frozen. ValueError, one line, where keys differ or classes are not COCO's 80."""
    from transformers import Mask2FormerForUniversalSegmentation as Model

    model, loading = Model.from_pretrained(
        folder,
        dtype=torch.float32,
        local_files_only=True,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # so that they are reported, and refused below, like any other wrong key
        output_loading_info=True,
    )
    misshapen = {key for key, *_ in loading["mismatched_keys"]}
    unexpected = [key for key in loading["unexpected_keys"] if not key.endswith("relative_position_index")]
    missing = [key for key in loading["missing_keys"] if key != "criterion.empty_weight"]  # of the training loss
    if model.config.num_labels != len(OBJECT_NAMES):
        raise ValueError(f"{folder}: {model.config.num_labels} classes, but GenEval's objects are {len(OBJECT_NAMES)}")
    check_keys(folder, missing, unexpected, misshapen)
    return model.eval().requires_grad_(False)
