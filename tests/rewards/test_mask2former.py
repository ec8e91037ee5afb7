"""GenEval's detector: its post-processing against plain loops and against transformers' own, hand-made masks, the real
architecture with random weights in the published layout, and the whole reward with colours told by a stand-in."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

from nft_ray.rewards._detections import Asked
from nft_ray.rewards._mask2former import (
    BLANK,
    OBJECT_NAMES,
    ImageInstances,
    Instance,
    Mask2FormerDetector,
    Preprocessing,
    instances,
    load_model,
)
from nft_ray.rewards.base import TorchRewardConfig
from nft_ray.rewards.geneval import CONFIDENCE_THRESHOLD, GenEval

SMALL_SWIN = {"image_size": 64, "embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 3, 3], "window_size": 4}
SMALL = {
    "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 32, "encoder_layers": 1,
    "decoder_layers": 2, "num_attention_heads": 2, "dim_feedforward": 32, "num_queries": 12,
}  # fmt: skip
PUBLISHED_SWIN = {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}
PREPROCESSOR = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "ignore_index": 255,
    "image_mean": [0.48500001430511475, 0.4560000002384186, 0.4059999883174896],
    "image_processor_type": "Mask2FormerImageProcessor",
    "image_std": [0.2290000021457672, 0.2239999920129776, 0.22499999403953552],
    "num_labels": 80,
    "reduce_labels": False,
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 384, "width": 384},
    "size_divisor": 32,
}


def write_model(folder: Path, swin: dict[str, Any], sizes: dict[str, Any], side: int, num_labels: int = 80) -> None:
    """config.json, preprocessor_config.json and model.safetensors with random weights, sure of some classes.

    As published: names of the classes that are not GenEval's, and the buffers that older transformers saved.
    """
    torch.manual_seed(0)
    backbone = SwinConfig(**swin, out_features=["stage1", "stage2", "stage3", "stage4"])
    names = {index: f"label {index}" for index in range(num_labels)}
    config = Mask2FormerConfig(backbone_config=backbone, id2label=names, **sizes)
    model = Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "encoder" in name:
                parameter.normal_(std=parameter[0].numel() ** -0.5)  # the library's own makes all images alike
        model.class_predictor.weight.mul_(40)
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith("relative_position_bias_table")]:
        indices = torch.zeros(swin["window_size"] ** 2, swin["window_size"] ** 2, dtype=torch.int64)
        weights[name.replace("relative_position_bias_table", "relative_position_index")] = indices
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    preprocessor = PREPROCESSOR | {"size": {"height": side, "width": side}}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))


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


def random_images(num_images: int, height: int, width: int) -> np.ndarray:
    coarse = np.random.default_rng(height).integers(0, 256, (num_images, 6, 6, 3)).astype(np.uint8)
    found = np.stack([np.asarray(Image.fromarray(image).resize((width, height))) for image in coarse])
    found.setflags(write=False)  # as an array from the object store is
    return found


def random_logits(num_queries: int, num_classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """f32 (Q, C + 1), (Q, 24, 24): sure of few classes; masks are blobs, some of them empty."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randn(num_queries, num_classes + 1, generator=generator) * 4
    coarse = torch.randn(1, num_queries, 6, 6, generator=generator) * 6 - 4
    masks = torch.nn.functional.interpolate(coarse, (24, 24), mode="bicubic")[0]
    masks[::5] = -1.0
    return labels, masks


def plainly(labels: torch.Tensor, masks: torch.Tensor, size: tuple[int, int]) -> list[Instance]:
    """The rule of mmdet's instance head in loops over queries, classes and pixels."""
    pairs = []
    for query, row in enumerate(labels.softmax(-1)):
        pairs += [(float(probability), query, label) for label, probability in enumerate(row[:-1])]
    found = []
    for probability, query, label in sorted(pairs, reverse=True)[:100]:
        large = torch.nn.functional.interpolate(masks[query][None, None], size, mode="bilinear", align_corners=False)
        mask = large[0, 0].numpy() > 0
        if not mask.any():
            continue
        rows, columns = np.nonzero(mask)
        inside = 1 / (1 + np.exp(-large[0, 0].numpy()[mask].astype(np.float64)))
        x0, x1, y0, y1 = columns.min(), columns.max() + 1, rows.min(), rows.max() + 1
        box = (float(x0), float(y0), float(x1), float(y1))
        confidence = probability * float(inside.mean())
        found.append(Instance(label=label, confidence=confidence, box=box, mask=mask[y0:y1, x0:x1]))
    return sorted(found, key=lambda one: -one.confidence)


@pytest.mark.parametrize(("num_queries", "size"), [(40, (96, 96)), (40, (31, 77)), (5, (24, 24)), (12, (10, 1))])
def test_post_processing_is_the_rule_in_plain_loops(num_queries: int, size: tuple[int, int]) -> None:
    labels, masks = random_logits(num_queries, 9)
    ours, theirs = instances(labels, masks, size), plainly(labels, masks, size)
    assert len(ours) == len(theirs) > 10
    for one, other in zip(ours, theirs, strict=True):
        assert (one.label, one.box) == (other.label, other.box)
        assert one.confidence == pytest.approx(other.confidence, abs=1e-5)
        np.testing.assert_array_equal(one.mask, other.mask)


def test_a_floor_leaves_out_nothing_that_is_surer() -> None:
    labels, masks = random_logits(40, 9)
    every, floored = instances(labels, masks, (96, 96)), instances(labels, masks, (96, 96), floor=0.3)
    sure = [one for one in every if one.confidence > 0.3]
    assert 3 < len(sure) <= len(floored) < len(every)
    for one, other in zip(sure, floored, strict=False):
        assert (one.label, one.box) == (other.label, other.box)
        assert one.confidence == pytest.approx(other.confidence, abs=1e-6)
        np.testing.assert_array_equal(one.mask, other.mask)
    assert instances(labels, masks, (96, 96), floor=1.0) == []


def test_post_processing_agrees_with_transformers_where_it_means_the_same() -> None:
    """At 384 x 384, the size that transformers works at, with as many pairs as it takes: one per query."""
    labels, masks = random_logits(100, 80, seed=3)
    out = SimpleNamespace(class_queries_logits=labels[None], masks_queries_logits=masks[None])
    theirs = Mask2FormerImageProcessorPil().post_process_instance_segmentation(
        out, threshold=0.05, return_binary_maps=True, target_sizes=[(384, 384)]
    )[0]
    ours = [one for one in instances(labels, masks, (384, 384)) if one.confidence > 0.05]
    by_confidence = sorted(theirs["segments_info"], key=lambda segment: -segment["score"])
    assert len(ours) == len(by_confidence) > 30
    for one, segment in zip(ours, by_confidence, strict=True):
        assert one.label == segment["label_id"]
        assert one.confidence == pytest.approx(segment["score"], abs=1e-5)
        whole = np.zeros((384, 384), dtype=bool)
        x0, y0, x1, y1 = map(int, one.box)
        whole[y0:y1, x0:x1] = one.mask
        np.testing.assert_array_equal(whole, theirs["segmentation"][segment["id"]].numpy().astype(bool))


def test_boxes_of_masks_made_by_hand() -> None:
    """A mask of one pixel, one of two corners, a rectangle, and an empty one, the surest by its class."""
    masks = torch.full((4, 8, 8), -5.0)
    masks[0, 2, 6] = masks[1, 0, 0] = masks[1, 7, 7] = masks[2, 3:5, 1:3] = 5.0
    labels = torch.zeros(4, 81)
    labels[[0, 1, 2, 3], [41, 41, 65, 0]] = torch.tensor([9.0, 8.0, 7.0, 20.0])
    found = instances(labels, masks, (8, 8), floor=0.5)
    assert [(one.label, one.box) for one in found] == [
        (41, (6.0, 2.0, 7.0, 3.0)),
        (41, (0.0, 0.0, 8.0, 8.0)),
        (65, (1.0, 3.0, 3.0, 5.0)),
    ]
    assert found[0].confidence == pytest.approx(np.exp(9) / (np.exp(9) + 80) / (1 + np.exp(-5.0)), abs=1e-5)
    assert found[1].mask.sum() == 2
    twice = instances(labels[2:3], masks[2:3], (16, 24))[0]  # y 6..10 and x 3..9, a logit of 0 is outside
    assert twice.box == (3.0, 6.0, 9.0, 10.0)


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


def test_crops_are_masked_and_follow_the_boxes() -> None:
    image = np.full((10, 10, 3), 200, dtype=np.uint8)
    image[:, 5:] = (0, 0, 255)
    box = (3.0, 2.0, 7.0, 4.0)
    left, right = np.zeros((2, 2, 4), dtype=bool)
    left[:, :2], right[:, 2:] = True, True
    found = ImageInstances.of(
        image,
        [
            Instance(label=41, confidence=0.9, box=box, mask=right),
            Instance(label=41, confidence=0.8, box=box, mask=left),  # another object with the same box
            Instance(label=0, confidence=0.7, box=(9.0, 9.0, 10.0, 10.0), mask=np.ones((1, 1), bool)),
        ],
    )
    assert {name: len(boxes) for name, boxes in found.objects.items()} == {"cup": 2, "person": 1}
    first, second = found.crops("cup", [box, box])
    assert first.tolist() == [[[BLANK] * 3] * 2 + [[0, 0, 255]] * 2] * 2
    assert second.tolist() == [[[200] * 3] * 2 + [[BLANK] * 3] * 2] * 2
    assert found.crops("person", [(9.0, 9.0, 10.0, 10.0)])[0].tolist() == [[[0, 0, 255]]]
    assert (found.crops("cup", [box])[0] == first).all()


def test_equally_sure_objects_with_one_box_keep_their_own_masks() -> None:
    """`select` lets the later of two equals come first; the k-th box must still be the k-th object."""
    image, box = np.zeros((2, 2, 3), dtype=np.uint8), (0.0, 0.0, 2.0, 2.0)
    earlier, later = np.array([[1, 0], [0, 1]], bool), np.array([[0, 1], [1, 0]], bool)
    found = ImageInstances.of(
        image, [Instance(label=41, confidence=0.5, box=box, mask=mask) for mask in (earlier, later)]
    )
    first, second = found.crops("cup", [box, box])
    np.testing.assert_array_equal(first[..., 0] == 0, later)
    np.testing.assert_array_equal(second[..., 0] == 0, earlier)


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
