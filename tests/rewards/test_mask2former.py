"""GenEval's detector: the real architecture with random weights in the published layout, its preprocessing, and the
whole reward with colours told by a stand-in. What it makes of logits: test_mask2former_instances.py.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Mask2FormerForUniversalSegmentation
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

from nft_ray.rewards._detections import Asked
from nft_ray.rewards._mask2former import OBJECT_NAMES, ImageInstances, Mask2FormerDetector, Preprocessing, load_model
from nft_ray.rewards.base import TorchRewardConfig
from nft_ray.rewards.geneval import CONFIDENCE_THRESHOLD, GenEval
from tests.rewards.mask2former_files import (
    PREPROCESSOR,
    PUBLISHED_SWIN,
    SMALL,
    SMALL_SWIN,
    plainly,
    random_images,
    write_model,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("mask2former")
    write_model(found, SMALL_SWIN, SMALL, 64)
    return found


def mean_color(crops: Sequence[np.ndarray], class_names: Sequence[str]) -> list[str]:
    """A stand-in for CLIP: the stronger of red and blue."""
    return ["red" if crop[..., 0].mean() > crop[..., 2].mean() else "blue" for crop in crops]


def detector(folder: Path, floor: float = 0.0, **section: Any) -> Mask2FormerDetector:
    return Mask2FormerDetector(folder, TorchRewardConfig(**section), mean_color, floor=floor)


def test_a_class_is_its_index_in_genevals_spelling_never_the_published_name() -> None:
    assert len(OBJECT_NAMES) == len(set(OBJECT_NAMES)) == 80
    known = {
        0: "person",
        41: "cup",
        58: "potted plant",
        62: "tv",
        64: "computer mouse",
        65: "tv remote",
        79: "toothbrush",
    }
    assert {index: OBJECT_NAMES[index] for index in known} == known


def test_the_model_with_its_published_files(folder: Path) -> None:
    batch = random_images(3, 96, 80)
    found = detector(folder).detect(batch)
    names = {name for one in found for name in one.objects}
    assert len(names) > 3
    assert names <= set(OBJECT_NAMES)
    assert max(confidence for one in found for boxes in one.objects.values() for _, confidence in boxes) > 0.3
    for one in found:
        for name, boxes in one.objects.items():
            assert [confidence for _, confidence in boxes] == sorted((sure for _, sure in boxes), reverse=True)
            for (x0, y0, x1, y1), confidence in boxes:
                assert 0 <= x0 < x1 <= 80
                assert 0 <= y0 < y1 <= 96
                assert 0 < confidence < 1
            for box, crop in zip([box for box, _ in boxes], one.crops(name, [box for box, _ in boxes]), strict=True):
                assert crop.shape == (box[3] - box[1], box[2] - box[0], 3)


def test_objects_are_what_transformers_own_model_and_processor_see(folder: Path) -> None:
    """The forward from files to logits by other means: from_pretrained's own defaults and the Pillow processor."""
    batch = random_images(2, 50, 70)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(folder).eval()
    processor = Mask2FormerImageProcessorPil.from_pretrained(folder)
    with torch.no_grad():
        out = model(**processor(images=[Image.fromarray(image) for image in batch], return_tensors="pt"))
    for index, one in enumerate(detector(folder).detect(batch)):
        expected: dict[str, list[float]] = {}
        for instance in plainly(out.class_queries_logits[index], out.masks_queries_logits[index], (50, 70)):
            expected.setdefault(OBJECT_NAMES[instance.label], []).append(instance.confidence)
        confidences = {name: [confidence for _, confidence in boxes] for name, boxes in one.objects.items()}
        assert confidences.keys() == expected.keys()
        for name, values in expected.items():
            assert confidences[name] == pytest.approx(values, abs=1e-4)


def flat(found: list[ImageInstances]) -> list[list[tuple[str, tuple[float, ...], float]]]:
    return [
        [(name, box, confidence) for name in sorted(one.objects) for box, confidence in one.objects[name]]
        for one in found
    ]


def test_a_batch_is_its_images_one_by_one(folder: Path) -> None:
    batch = random_images(5, 64, 64)
    alone = [detector(folder, 0.1).detect(batch[i : i + 1])[0] for i in range(5)]
    for micro_batch_size in (64, 2):
        whole = flat(detector(folder, 0.1, micro_batch_size=micro_batch_size).detect(batch))
        for one, other in zip(whole, flat(alone), strict=True):
            assert [name for name, _, _ in one] == [name for name, _, _ in other]
            np.testing.assert_allclose([box for _, box, _ in one], [box for _, box, _ in other], atol=1)
            np.testing.assert_allclose([sure for *_, sure in one], [sure for *_, sure in other], atol=1e-4)
    assert len({str(one) for one in flat(alone)}) == 5
    assert detector(folder).detect(batch[:0]) == []


def test_bfloat16(folder: Path) -> None:
    batch = random_images(2, 64, 64)
    exact, rough = (detector(folder, dtype=dtype).detect(batch) for dtype in ("float32", "bfloat16"))
    surest = [max((c, name) for name, boxes in one.objects.items() for _, c in boxes) for one in exact]
    for (confidence, name), one in zip(surest, rough, strict=True):
        assert max(c for _, c in one.objects[name]) == pytest.approx(confidence, abs=0.15)


@pytest.mark.parametrize(("height", "width"), [(384, 384), (512, 512), (37, 91), (640, 480), (1, 1)])
@pytest.mark.parametrize(
    "size", [{"height": 384, "width": 384}, {"height": 100, "width": 230}, {"shortest_edge": 80, "longest_edge": 133}]
)
def test_pixels_are_those_of_transformers_pillow_processor(
    tmp_path: Path, height: int, width: int, size: dict[str, int]
) -> None:
    section = PREPROCESSOR | {"size": size}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(section))
    batch = random_images(2, height, width)
    ours = Preprocessing.read(tmp_path / "preprocessor_config.json")(batch, torch.device("cpu"))
    processor = Mask2FormerImageProcessorPil.from_pretrained(tmp_path)
    theirs = processor(images=[Image.fromarray(image) for image in batch], return_tensors="pt")
    assert theirs.pixel_mask.all()
    np.testing.assert_allclose(ours, theirs.pixel_values, atol=1e-5)
    assert ours.dtype == torch.float32


def test_a_preprocessing_that_is_not_understood_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(PREPROCESSOR | {"do_resize": False}))
    with pytest.raises(ValueError, match=r"preprocessor_config\.json\.do_resize = False") as error:
        Preprocessing.read(path)
    assert "\n" not in str(error.value)


def drop(weights: dict[str, torch.Tensor]) -> None:
    del weights["class_predictor.bias"]


def add(weights: dict[str, torch.Tensor]) -> None:
    weights["class_predictor.scale"] = torch.zeros(1)


def reshape(weights: dict[str, torch.Tensor]) -> None:
    weights["class_predictor.bias"] = torch.zeros(80)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"keys 1 missing \(class_predictor\.bias\)$"),
        (add, r"keys 1 unexpected \(class_predictor\.scale\)$"),
        (reshape, r"keys 1 of another shape \(class_predictor\.bias\)$"),
    ],
)
def test_another_checkpoint_is_refused_on_one_line(
    folder: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=message) as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)


def test_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, SMALL_SWIN, SMALL, 64, num_labels=81)
    with pytest.raises(ValueError, match="81 classes, but GenEval's objects are 80"):
        load_model(tmp_path)


def test_all_crops_of_a_batch_are_classified_at_once(folder: Path) -> None:
    calls: list[tuple[int, list[str]]] = []

    def classify(crops: Sequence[np.ndarray], class_names: Sequence[str]) -> list[str]:
        calls.append((len(crops), list(class_names)))
        return [f"{name} {index}" for index, name in enumerate(class_names)]

    one = Mask2FormerDetector(folder, TorchRewardConfig(), classify, floor=0.0)
    asked = []
    for found in one.detect(random_images(3, 64, 64)):
        name = min(found.objects)
        asked.append(Asked(detections=found, class_name=name, boxes=[box for box, _ in found.objects[name]][:2]))
    colors = one.colors_of(asked)
    names = [question.class_name for question in asked for _ in question.boxes]
    assert calls == [(len(names), names)]
    assert [color for some in colors for color in some] == [f"{name} {index}" for index, name in enumerate(names)]
    assert [len(some) for some in colors] == [len(question.boxes) for question in asked]
    assert one.colors_of([]) == []
    assert len(calls) == 1


def test_the_whole_reward_asks_for_what_the_detector_sees(folder: Path) -> None:
    """Lines made from what is detected are fulfilled, whatever random weights see; lines about other things are not."""
    images = np.repeat(random_images(3, 64, 64), 2, axis=0)
    one = detector(folder, CONFIDENCE_THRESHOLD)
    lines = []
    for found in one.detect(images)[::2]:
        sure = {name: [b for b, c in boxes if c > 0.3] for name, boxes in found.objects.items()}
        name, boxes = next((name, boxes) for name, boxes in sure.items() if boxes)
        colors = one.colors_of([Asked(detections=found, class_name=name, boxes=boxes)])[0]
        clause: dict[str, Any] = {"class": name, "count": len(boxes)}
        if len(set(colors)) == 1:
            clause["color"] = colors[0]
        absent = next(other for other in OBJECT_NAMES if other not in sure)
        lines.append({"tag": "colors", "include": [clause]})
        lines.append({"tag": "colors", "include": [{"class": absent, "count": 1}]})
    scores = GenEval(one).score(images, ["p"] * 6, lines)
    assert scores.values.tolist() == [1.0, 0.0] * 3
    assert scores.details["strict"].tolist() == [1.0, 0.0] * 3


@pytest.mark.large
def test_real_size_swin_small(tmp_path: Path) -> None:
    write_model(tmp_path, PUBLISHED_SWIN, {}, 384)
    one = detector(tmp_path, micro_batch_size=2)
    assert sum(value.numel() for value in one._model.parameters()) == pytest.approx(69e6, rel=0.02)
    batch = random_images(2, 512, 512)
    whole = one.detect(batch)
    assert all(found.objects for found in whole)
    alone = one.detect(batch[1:])
    (name, boxes), other = max(whole[1].objects.items(), key=lambda item: item[1][0][1]), alone[0]
    assert other.objects[name][0][1] == pytest.approx(boxes[0][1], abs=1e-3)
