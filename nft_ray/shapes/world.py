"""The world of coloured shapes: what an image of it may show, and how it is drawn.

    metadata (GenEval) --sample_scene--> Scene --render--> uint8 (32, 32, 3)

Objects stand in cells of a 2 x 2 grid, moved a little and of varying size, on a plain background. This file knows no
prompts (see grammar) and no model. Everything random comes from the generator that the caller passes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import cv2
import numpy as np

IMAGE_SIZE = 32
"""Pixels of a side."""
BACKGROUND = (244, 244, 240)
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 205, 40),
    "purple": (150, 60, 190),
    "orange": (245, 130, 20),
}
"""Colour name -> RGB."""
_ARM = 0.34
OUTLINES: dict[str, tuple[tuple[float, float], ...] | None] = {
    "circle": None,
    "square": ((-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)),
    "triangle": ((0.0, -1.0), (1.08, 0.9), (-1.08, 0.9)),
    "cross": tuple(
        (x * 1.05, y * 1.05)
        for x, y in (
            (-_ARM, -1.0), (_ARM, -1.0), (_ARM, -_ARM), (1.0, -_ARM), (1.0, _ARM), (_ARM, _ARM),
            (_ARM, 1.0), (-_ARM, 1.0), (-_ARM, _ARM), (-1.0, _ARM), (-1.0, -_ARM), (-_ARM, -_ARM),
        )
    ),
    "diamond": ((0.0, -1.15), (1.15, 0.0), (0.0, 1.15), (-1.15, 0.0)),
}  # fmt: skip
"""Shape name -> corners in units of the radius, y downwards; None is the circle."""
SHAPES = tuple(OUTLINES)
MAX_OBJECTS = 4

_SUPERSAMPLING = 8
_CELL = IMAGE_SIZE // 2
_RADIUS = (4.4, 5.8)
_JITTER = 1.0
_CELLS = tuple((column, row) for row in range(2) for column in range(2))


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneObject:
    """One object: `x`, `y` is its centre and `radius` its size, in pixels."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What one image shows; at most one object per cell, so they never touch."""

    objects: tuple[SceneObject, ...]


def render(scene: Scene) -> np.ndarray:
    """Draw a scene, antialiased: uint8 (32, 32, 3) RGB."""
    size = IMAGE_SIZE * _SUPERSAMPLING
    canvas = np.full((size, size, 3), BACKGROUND, dtype=np.uint8)
    for one in scene.objects:
        fill_shape(
            canvas,
            one.shape,
            (one.x * _SUPERSAMPLING, one.y * _SUPERSAMPLING),
            one.radius * _SUPERSAMPLING,
            COLORS[one.color],
        )
    return cv2.resize(canvas, (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_AREA)


def fill_shape(
    canvas: np.ndarray, shape: str, center: tuple[float, float], radius: float, color: Sequence[int]
) -> None:
    """Fill one shape into `canvas` (H, W) or (H, W, 3) in place; `center` and `radius` in its pixels."""
    outline = OUTLINES[shape]
    if outline is None:
        cv2.circle(canvas, (round(center[0]), round(center[1])), round(radius), color, -1)
        return
    corners = np.array(center) + radius * np.array(outline)
    cv2.fillPoly(canvas, [np.round(corners).astype(np.int32)], color)


def sample_scene(metadata: Mapping[str, Any], rng: Random) -> Scene:
    """Draw a scene that shows exactly what the metadata's `include` asks for.

    Several objects of one clause share a colour; a clause without a colour gets a random one. A clause with a
    `position` stands in the same row or column as its target, which must be the only object of the first clause.
    """
    clauses = metadata["include"]
    wanted = [clause for clause in clauses for _ in range(clause["count"])]
    if not 0 < len(wanted) <= MAX_OBJECTS:
        raise ValueError(f"a scene holds 1 to {MAX_OBJECTS} objects, not {len(wanted)}")
    relation = next((clause["position"][0] for clause in clauses if "position" in clause), None)
    cells = rng.sample(_CELLS, len(wanted)) if relation is None else _related_cells(relation, rng)
    colors = {id(clause): clause.get("color") or rng.choice(tuple(COLORS)) for clause in clauses}
    return Scene(
        objects=tuple(
            SceneObject(
                shape=clause["class"],
                color=colors[id(clause)],
                x=_CELL * (column + 0.5) + rng.uniform(-_JITTER, _JITTER),
                y=_CELL * (row + 0.5) + rng.uniform(-_JITTER, _JITTER),
                radius=rng.uniform(*_RADIUS),
            )
            for clause, (column, row) in zip(wanted, cells, strict=True)
        )
    )


def _related_cells(relation: str, rng: Random) -> list[tuple[int, int]]:
    """The cells (column, row) of a target and of the object that is `relation` it."""
    lane = rng.randrange(2)
    before, after = ((0, lane), (1, lane)) if relation in ("left of", "right of") else ((lane, 0), (lane, 1))
    return [after, before] if relation in ("left of", "above") else [before, after]
