"""Finds the shapes in an image: segmentation, one contour per blob, comparison with the ideal shape, palette.

    image --resize--> 128 x 128 --unlike the background?--> blobs --against five ideal shapes--> class, confidence
                                                              `--median colour--> palette

A confidence is high only where everything speaks for a shape: the blob covers the ideal outline of its own bounding box
(intersection over union), the box is as wide as high as that shape's, large enough, the filling is one colour and that
colour is of the palette. The factors are multiplied, so a model that is rewarded by this detector gains nothing by
smears, dots or half-tones. Thresholds are the caller's (GenEval: 0.3, for counting 0.9).
"""

import itertools
from dataclasses import dataclass, field

import cv2
import numpy as np

from nft_ray.shapes.world import BACKGROUND, COLORS, IMAGE_SIZE, SHAPES, Scene, SceneObject, render

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels of the image, y downwards."""

_SIZE = 128
_SCALE = _SIZE / IMAGE_SIZE
_FOREGROUND = 72.0  # least difference from the background in one channel
_MIN_SIDE = 3.0 * _SCALE  # smaller blobs are noise: not even doubtful objects
_SIDE = (5.0 * _SCALE, 7.0 * _SCALE)  # shorter side of the box; here and below: confidence 0 to 1
_LONG_SIDE = (18.0 * _SCALE, 15.5 * _SCALE)  # longer side: no object is larger than a cell
_IOU = (0.76, 0.88)
_RIVAL = (0.02, 0.08)  # lead over the second best shape
_ASPECT = (0.70, 0.84)  # shorter side / longer side, after the shape's own is divided out
_PURITY = (0.60, 0.85)  # share of the inner pixels that look like the median
_PURITY_DISTANCE = 60.0
_COLOR_DISTANCE = (110.0, 60.0)  # from the nearest palette colour
_TEMPLATE = 48
_TEMPLATE_RADIUS = 5.1
_OFFSETS = (0.0, 0.25, 0.5, 0.75)
_BACKGROUND = np.full((_SIZE, _SIZE, 3), BACKGROUND, dtype=np.uint8)
_PALETTE = np.array(list(COLORS.values()), dtype=np.float32)
_NAMES = tuple(COLORS)
_KERNEL = np.ones((5, 5), dtype=np.uint8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Detections:
    """What was found in one image.

    objects: class -> [(box, confidence), ...], sorted by falling confidence; classes without a blob are left out.
    """

    objects: dict[str, list[tuple[Box, float]]]
    _colors: dict[tuple[str, Box], str] = field(repr=False)

    def colors_of(self, class_name: str, boxes: list[Box]) -> list[str]:
        """The palette colour of each of these boxes, which must be boxes of `objects[class_name]`."""
        return [self._colors[class_name, box] for box in boxes]


class ShapesDetector:
    """Stateless but for its templates; deterministic; about a millisecond per image."""

    def __init__(self) -> None:
        outlines = {shape: _template(shape) for shape in SHAPES}
        self._templates = np.stack([template for template, _ in outlines.values()])
        self._aspects = np.array([aspect for _, aspect in outlines.values()])

    def detect(self, image: np.ndarray) -> Detections:
        """Find the shapes in an image, uint8 (H, W, 3) RGB of any size; boxes are in its own pixels."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"expected an image uint8 (H, W, 3), not {image.dtype} {image.shape}")
        height, width = image.shape[:2]
        pixels = _resized(image)
        num_labels, labels, stats, _ = cv2.connectedComponentsWithStats(_segment(pixels), connectivity=4)

        objects: dict[str, list[tuple[Box, float]]] = {}
        colors: dict[tuple[str, Box], str] = {}
        for label in range(1, num_labels):
            x, y, w, h = (int(value) for value in stats[label, :4])
            if min(w, h) < _MIN_SIDE:
                continue
            mask = labels[y : y + h, x : x + w] == label
            shape, confidence = self._classify(mask)
            color, plainness = _color(pixels[y : y + h, x : x + w], mask)
            box = (x * width / _SIZE, y * height / _SIZE, (x + w) * width / _SIZE, (y + h) * height / _SIZE)
            objects.setdefault(shape, []).append((box, confidence * plainness))
            colors[shape, box] = color
        for found in objects.values():
            found.sort(key=lambda one: -one[1])
        return Detections(objects=objects, _colors=colors)

    def _classify(self, mask: np.ndarray) -> tuple[str, float]:
        """mask bool (h, w), the blob in its own bounding box -> the likeliest shape, how sure that is in [0, 1]."""
        h, w = mask.shape
        fitted = cv2.resize(mask.astype(np.float32), (_TEMPLATE, _TEMPLATE), interpolation=cv2.INTER_AREA)
        union = np.maximum(self._templates, fitted).sum(axis=(1, 2))
        iou = np.minimum(self._templates, fitted).sum(axis=(1, 2)) / union
        second, best = np.argsort(iou)[-2:]
        aspect = w / h / self._aspects[best]
        confidence = (
            _ramp(iou[best], *_IOU)
            * _ramp(iou[best] - iou[second], *_RIVAL)
            * _ramp(min(aspect, 1 / aspect), *_ASPECT)
            * _ramp(min(w, h), *_SIDE)
            * _ramp(-max(w, h), *(-end for end in _LONG_SIDE))
        )
        return SHAPES[best], confidence


def _template(shape: str) -> tuple[np.ndarray, float]:
    """A shape as it is seen after segmentation, in its own bounding box: f32 (48, 48) in [0, 1], and width / height.

    Drawn by the renderer, for what 32 pixels make of a tip belongs to the shape; a mean over colours and positions.
    """
    masks, aspects = [], []
    for color, dx, dy in itertools.product(COLORS, _OFFSETS, _OFFSETS):
        center = IMAGE_SIZE / 2
        one = SceneObject(shape=shape, color=color, x=center + dx, y=center + dy, radius=_TEMPLATE_RADIUS)
        x, y, w, h = cv2.boundingRect(foreground := _segment(_resized(render(Scene(objects=(one,))))))
        cut = foreground[y : y + h, x : x + w].astype(np.float32)
        masks.append(cv2.resize(cut, (_TEMPLATE, _TEMPLATE), interpolation=cv2.INTER_AREA))
        aspects.append(w / h)
    return np.mean(masks, axis=0), float(np.mean(aspects))


def _resized(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> (128, 128, 3)."""
    interpolation = cv2.INTER_CUBIC if max(image.shape[:2]) < _SIZE else cv2.INTER_AREA
    return cv2.resize(image, (_SIZE, _SIZE), interpolation=interpolation)


def _segment(pixels: np.ndarray) -> np.ndarray:
    """uint8 (128, 128, 3) -> (128, 128), 1 where a pixel is unlike the background."""
    return (cv2.absdiff(pixels, _BACKGROUND).max(axis=2) > _FOREGROUND).astype(np.uint8)


def _color(pixels: np.ndarray, mask: np.ndarray) -> tuple[str, float]:
    """pixels uint8 (h, w, 3), mask bool (h, w) -> the nearest palette colour, how plainly it is that in [0, 1]."""
    inner = cv2.erode(np.pad(mask.astype(np.uint8), 2), _KERNEL)[2:-2, 2:-2].astype(bool)
    values = pixels[inner if inner.any() else mask].astype(np.float32)
    median = np.median(values, axis=0)
    to_palette = np.linalg.norm(_PALETTE - median, axis=1)
    purity = float((np.linalg.norm(values - median, axis=1) < _PURITY_DISTANCE).mean())
    nearest = int(to_palette.argmin())
    return _NAMES[nearest], _ramp(purity, *_PURITY) * _ramp(-to_palette[nearest], *(-end for end in _COLOR_DISTANCE))


def _ramp(value: float, low: float, high: float) -> float:
    """0 up to `low`, 1 from `high` on, a line between."""
    return float(np.clip((value - low) / (high - low), 0.0, 1.0))
