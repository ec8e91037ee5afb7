"""What GenEval's rule, its reward and its detectors speak of: boxes, what was found in an image, questions of colour.

Knows no detector and no rule.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels, y downwards."""


class Detections(Protocol):
    """What a detector found in one image."""

    @property
    def objects(self) -> Mapping[str, list[tuple[Box, float]]]: ...


D = TypeVar("D", bound=Detections)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked(Generic[D]):
    """A question about colours: those of some boxes of `detections.objects[class_name]`."""

    detections: D
    class_name: str
    boxes: list[Box]


class Detector(Protocol[D]):
    """Finds objects in images, with any confidence (the thresholds are the reward's), and then tells their colours."""

    def detect(self, images: np.ndarray) -> Sequence[D]:
        """images uint8 (B, H, W, 3) -> what is in each."""
        ...

    def colors_of(self, asked: Sequence[Asked[D]]) -> Sequence[list[str]]:
        """For each question, about any of the images, one colour per box. Asked at most once per batch."""
        ...
