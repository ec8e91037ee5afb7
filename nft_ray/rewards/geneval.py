"""GenEval: are the objects that the prompt asks for in the image, so many, in these colours, at these places?

    image --detector--> objects {class: [(box, confidence), ...]} --select--> the sure ones --evaluate--> score

`evaluate` is the rule and knows no image: what was detected comes in as boxes, colours by an injected function. The
`GenEval` reward puts the detector that the experiment names in front of it. Metadata is GenEval's own:

    {"tag": "position", "include": [{"class": "cup", "count": 1},
                                    {"class": "dog", "count": 1, "position": ["left of", 0]}], "exclude": [...]}

Source: Ghosh et al. 2023 (arXiv 2310.11513) and the soft score of the published reward server. Two differences, on
purpose: a wrong position earns 0 (published: 1.0 is appended after the 0.0), a count term is never below 0 (published:
16 found where 1 is wanted is -14, which then feeds the global std).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from nft_ray.downloads.published import PublishedFile
from nft_ray.rewards import _vocabulary
from nft_ray.rewards._detections import Asked, Box, Detector
from nft_ray.rewards.base import Cost, Reward, Scores, TorchRewardConfig, check_batch, one_line
from nft_ray.rewards.weights import require, weights_root

if TYPE_CHECKING:
    from nft_ray.shapes.detector import Detections as ShapesDetections

Objects = Mapping[str, Sequence[tuple[Box, float]]]
"""class -> [(box, confidence), ...], by falling confidence once selected."""
ColorsOf = Callable[[str, list[Box]], list[str]]
"""(class, boxes) -> the colour of each box."""
Relation = Literal["left of", "right of", "above", "below"]
Credit = Literal["soft", "strict"]

CONFIDENCE_THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MAX_OBJECTS_PER_CLASS = 16
POSITION_THRESHOLD = 0.1
COLOR_CROPS = 0.5
"""Crops per image whose colour is asked for, as a plan assumes it: 200 of GenEval's 553 prompts name colours."""

MASK2FORMER = "facebook/mask2former-swin-small-coco-instance"
COLORS_CHECKPOINT = "timm/vit_large_patch14_clip_224.openai/open_clip_model.safetensors"


class _Clause(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)
    name: str = Field(alias="class")
    count: PositiveInt


class _Include(_Clause):
    color: str | None = None
    position: tuple[Relation, int] | None = None


class _Metadata(BaseModel):
    """The part of a line that `evaluate` reads; other keys (tag, prompt, ...) are not its business."""

    include: list[_Include] = Field(min_length=1)
    exclude: list[_Clause] = []


@dataclass(frozen=True, slots=True, kw_only=True)
class GenEvalResult:
    """score: mean of the partial credits, in [0, 1]. correct: GenEval's own verdict, where more objects than asked for
    are forgiven. strict: exactly as asked for; strict implies correct. reason: why not strict, empty if it is.
    """

    score: float
    correct: bool
    strict: bool
    reason: str


def evaluate(objects: Objects, metadata: Mapping[str, Any], colors_of: ColorsOf) -> GenEvalResult:
    """Judge what was detected in one image against GenEval metadata.

    objects: class -> [(box, confidence), ...], thresholds and limit already applied, sorted by falling confidence
    (`select` does both); colors_of(class, boxes) -> one colour name per box, asked at most once per clause.
    Per clause of `include` the score takes a term for the count, 1 - |wanted - found| / wanted clipped at 0; where the
    count is right, a term for the colour and, where that is right as well, one for the position (0 or 1); where it
    is wrong, a single 0 for them. Raises ValueError where the metadata is not GenEval's.
    """
    line = _parse(metadata)
    terms: list[float] = []
    reasons: list[str] = []
    correct = True
    strict_groups: list[list[Box] | None] = []  # per clause: the boxes that fulfil it, or None
    lenient_groups: list[list[Box] | None] = []
    for clause in line.include:
        boxes = [box for box, _ in objects.get(clause.name, ())]
        surest = boxes[: clause.count]
        colors = colors_of(clause.name, surest) if clause.color and len(surest) == clause.count else []

        terms.append(max(0.0, 1 - abs(clause.count - len(boxes)) / clause.count))
        if len(boxes) == clause.count:
            credits, problem = _look(clause, surest, colors, strict_groups)
            terms += credits
        else:
            problem = f"expected {clause.count} {clause.name}, found {len(boxes)}"
            terms += [0.0] if clause.color or clause.position else []
        reasons += [problem] if problem else []
        strict_groups.append(None if problem else surest)

        fulfilled = len(surest) == clause.count and not _look(clause, surest, colors, lenient_groups)[1]
        lenient_groups.append(surest if fulfilled else None)
        correct = correct and fulfilled
    for excluded in line.exclude:
        found = len(objects.get(excluded.name, ()))
        if found >= excluded.count:
            correct = False
            reasons.append(f"expected fewer than {excluded.count} {excluded.name}, found {found}")
    return GenEvalResult(score=sum(terms) / len(terms), correct=correct, strict=not reasons, reason="; ".join(reasons))


def select(objects: Objects, tag: str) -> dict[str, list[tuple[Box, float]]]:
    """The detections that count: above the threshold (0.3, for tag counting 0.9), the 16 surest of each class.

    Sorted by falling confidence; of equal ones the later comes first, as in the published `argsort(...)[::-1]`.
    """
    threshold = COUNTING_THRESHOLD if tag == "counting" else CONFIDENCE_THRESHOLD
    selected = {}
    for name, found in objects.items():
        sure = [(box, confidence) for box, confidence in reversed(found) if confidence > threshold]
        if sure:
            selected[name] = sorted(sure, key=lambda one: -one[1])[:MAX_OBJECTS_PER_CLASS]
    return selected


def relations(a: Box, b: Box) -> set[str]:
    """Where box a lies relative to box b: any of left of, right of, above, below; nothing where they are too close.

    The offset of the centres counts beyond a tenth of the boxes' summed sizes, in units of the whole offset.
    """
    corners = np.array([a, b], dtype=np.float64).reshape(2, 2, 2)
    center_a, center_b = corners.mean(axis=1)
    size_a, size_b = np.abs(corners[:, 1] - corners[:, 0])
    offset = center_a - center_b
    beyond = np.maximum(np.abs(offset) - POSITION_THRESHOLD * (size_a + size_b), 0) * np.sign(offset)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    dx, dy = beyond / np.linalg.norm(offset)
    held = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {relation for relation, holds in held.items() if holds}


def _look(
    clause: _Include, boxes: list[Box], colors: list[str], groups: list[list[Box] | None]
) -> tuple[list[float], str]:
    """Colour, then position, of exactly `count` boxes: (their terms of the score, what is wrong or "")."""
    terms = []
    if clause.color:
        right = colors.count(clause.color)
        terms.append(1 - abs(clause.count - right) / clause.count)
        if right != clause.count:
            return terms, f"expected {clause.count} {clause.color} {clause.name}, found {', '.join(colors)}"
    if clause.position:
        relation, target = clause.position
        targets = groups[target]
        if targets is None:
            return [*terms, 0.0], f"no target for {clause.name} to be {relation}"
        for box in boxes:
            for other in targets:
                found = relations(box, other)
                if relation not in found:
                    seen = " and ".join(sorted(found)) or "no relation to"
                    return [*terms, 0.0], f"expected {clause.name} {relation} target, found {seen} target"
        terms.append(1.0)
    return terms, ""


def _parse(metadata: Mapping[str, Any]) -> _Metadata:
    try:
        line = _Metadata.model_validate(metadata)
    except ValidationError as error:
        raise ValueError(f"not GenEval metadata: {one_line(error, 'metadata')}") from None
    for index, clause in enumerate(line.include):
        if clause.position and not 0 <= clause.position[1] < index:
            raise ValueError(
                f"not GenEval metadata: metadata.include.{index}.position: the target must be an earlier clause, "
                f"not {clause.position[1]}"
            )
    return line


class Config(TorchRewardConfig):
    """Section `rewards.geneval`. Device, dtype, micro_batch_size and weights are mask2former's."""

    detector: Literal["shapes", "mask2former"]
    """What finds the objects: `shapes`, for the world of coloured shapes, or `mask2former`, for COCO's 80 classes.

    Figures with `mask2former` are not comparable with published ones, which are mmdet's, until that has been checked.
    """
    credit: Credit = "soft"
    """The reward: `soft`, the mean of partial credits, as published, or `strict`, 1 for exactly what is asked for."""

    @model_validator(mode="before")
    @classmethod
    def _memory_of_the_models(cls, section: Any) -> Any:
        if isinstance(section, Mapping) and section.get("detector") == "mask2former":
            return {"memory_gib": 4.0} | dict(section)
        return section


class GenEval:
    """The reward: `values` is the soft score, or strict; details are `soft`, and `strict` and `correct`, 0 or 1."""

    def __init__(self, detector: Detector[Any], credit: Credit = "soft") -> None:
        self._detector, self._credit = detector, credit

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """See Reward.score. Raises ValueError where metadata is not GenEval's or has no tag."""
        check_batch(images, prompts, metadata)
        for prompt, line in zip(prompts, metadata, strict=True):
            check_line(prompt, line, None)
        results = self._judge(images, metadata) if len(images) else []
        details = {
            "soft": np.array([result.score for result in results], dtype=np.float32),
            "strict": np.array([result.strict for result in results], dtype=np.float32),
            "correct": np.array([result.correct for result in results], dtype=np.float32),
        }
        return Scores(values=details[self._credit], details=details)

    def _judge(self, images: np.ndarray, metadata: Sequence[Mapping[str, Any]]) -> list[GenEvalResult]:
        """One forward of the detector, one of the colours: what `evaluate` will ask is collected first."""
        found = self._detector.detect(images)
        sure = [select(one.objects, line["tag"]) for one, line in zip(found, metadata, strict=True)]
        asked = [
            Asked(detections=one, class_name=name, boxes=boxes)
            for one, objects, line in zip(found, sure, metadata, strict=True)
            for name, boxes in _questions(objects, line)
        ]
        answers = iter(self._detector.colors_of(asked) if asked else ())
        return [
            evaluate(objects, line, lambda _name, _boxes: next(answers))
            for objects, line in zip(sure, metadata, strict=True)
        ]


def _questions(objects: Objects, line: Mapping[str, Any]) -> list[tuple[str, list[Box]]]:
    """What `evaluate` will ask about colours, in its order: no answer changes a later question."""
    asked: list[tuple[str, list[Box]]] = []
    if not any(clause.get("color") for clause in line["include"]):
        return asked

    def note(name: str, boxes: list[Box]) -> list[str]:
        asked.append((name, boxes))
        return [""] * len(boxes)

    evaluate(objects, line, note)
    return asked


class _Shapes:
    """The detector of the world of coloured shapes: one image after the other, colours known from the start."""

    def __init__(self) -> None:
        from nft_ray.shapes.detector import ShapesDetector

        self._detector = ShapesDetector()

    def detect(self, images: np.ndarray) -> Sequence["ShapesDetections"]:
        return [self._detector.detect(image) for image in images]

    def colors_of(self, asked: Sequence[Asked["ShapesDetections"]]) -> list[list[str]]:
        return [one.detections.colors_of(one.class_name, one.boxes) for one in asked]


def check_line(prompt: str, metadata: Mapping[str, Any], config: Config | None) -> None:
    """ValueError where the metadata of a prompt is not GenEval's, has no tag, or asks for what the detector lacks."""
    if "tag" not in metadata:
        raise ValueError("not GenEval metadata: metadata.tag: missing")
    line = _parse(metadata)
    if config is None:
        return
    classes, colors = _known(config.detector)
    for index, clause in enumerate(line.include):
        for key, value, known in (("class", clause.name, classes), ("color", clause.color, colors)):
            if value and value not in known:
                some = ", ".join(known[:6]) + (", ..." if len(known) > 6 else "")
                other = "mask2former" if config.detector == "shapes" else "shapes"
                raise ValueError(
                    f"metadata.include.{index}.{key} = {value!r}: detector {config.detector} never finds it, only "
                    f"{some}; the other detector is {other}"
                )


def _known(detector: str) -> tuple[Sequence[str], Sequence[str]]:
    """The classes and the colours that a detector tells."""
    if detector == "mask2former":
        return _vocabulary.OBJECT_NAMES, _vocabulary.COLORS
    from nft_ray.shapes.world import COLORS, SHAPES

    return SHAPES, tuple(COLORS)


def files(config: Config) -> tuple[PublishedFile, ...]:
    """The published files of mask2former and of the colours; none for shapes."""
    if config.detector == "shapes":
        return ()
    return (
        PublishedFile(path=f"{MASK2FORMER}/config.json"),
        PublishedFile(path=f"{MASK2FORMER}/preprocessor_config.json"),
        PublishedFile(path=f"{MASK2FORMER}/model.safetensors", mib=263),
        PublishedFile(path=COLORS_CHECKPOINT, mib=1631),
    )


def cost(config: Config) -> Cost:
    """Of one image. COLOR_CROPS of them on the average go through the colours' CLIP ViT-L/14 as well."""
    if config.detector == "shapes":
        return Cost(host_s=0.0016, source="benchmarks/results/rewards.json, 38.3 ms for 24 images")
    return Cost(
        parameters=68_741_083 + 427_616_513,
        flops=441.8e9 + COLOR_CROPS * 162.0e9,
        activation_bytes=699_000_000,
        host_s=0.03,
        source="Mask2Former swin-small at 800 x 800: counted (tests/planning/test_scoring.py), 313 GFLOP published for "
        "smaller inputs (arXiv 2112.01527); half a crop per image for colours, and 30 ms of a core for resize, masks "
        "and boxes, are assumed",
    )


def build(config: Config) -> Reward:
    """Load the detector that the experiment names."""
    if config.detector == "shapes":
        return GenEval(_Shapes(), config.credit)
    place = require("geneval", files(config), weights_root(config.weights))
    from nft_ray.rewards._colors import ColorClassifier
    from nft_ray.rewards._mask2former import Mask2FormerDetector

    colors = ColorClassifier(place[COLORS_CHECKPOINT], config)
    detector = Mask2FormerDetector(place[MASK2FORMER], config, colors, floor=CONFIDENCE_THRESHOLD)
    return GenEval(detector, config.credit)
