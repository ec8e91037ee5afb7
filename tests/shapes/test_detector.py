"""The detector: agrees with the renderer and is not fooled."""

import time
from random import Random

import cv2
import numpy as np
import pytest

from nft_ray.rewards.geneval import evaluate, select
from nft_ray.shapes.detector import ShapesDetector
from nft_ray.shapes.grammar import TAGS, Metadata, all_prompts
from nft_ray.shapes.world import BACKGROUND, COLORS, SHAPES, Scene, SceneObject, render, sample_scene

DETECTOR = ShapesDetector()


def scene_of(shape: str, color: str = "red", radius: float = 5.0) -> np.ndarray:
    return render(Scene(objects=(SceneObject(shape=shape, color=color, x=8.3, y=7.8, radius=radius),)))


def is_strict(image: np.ndarray, metadata: Metadata) -> bool:
    found = DETECTOR.detect(image)
    return evaluate(select(found.objects, metadata["tag"]), metadata, found.colors_of).strict


@pytest.mark.parametrize("noise", [0, 12])
@pytest.mark.parametrize("tag", TAGS)
def test_agrees_with_the_renderer(tag: str, noise: float) -> None:
    rng, prompts = Random(5), all_prompts(tag)
    pixels = np.random.default_rng(5)
    agreed = []
    for _ in range(300):
        metadata = rng.choice(prompts)
        image = render(sample_scene(metadata, rng))
        image = np.clip(image + noise * pixels.standard_normal(image.shape), 0, 255).astype(np.uint8)
        agreed.append(is_strict(image, metadata))
    assert np.mean(agreed) >= 0.98


@pytest.mark.parametrize("tag", ["two_object", "counting", "position", "color_attr"])
def test_another_prompts_scene_is_refused(tag: str) -> None:
    rng, prompts = Random(6), all_prompts(tag)
    for _ in range(100):
        shown, asked = rng.sample(prompts, 2)
        fits = shown["include"] == asked["include"] or {
            (one["class"], one["count"], one.get("color")) for one in shown["include"]
        } == {(one["class"], one["count"], one.get("color")) for one in asked["include"]}
        if not fits:
            assert not is_strict(render(sample_scene(shown, rng)), asked)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("radius", [4.4, 5.8])
def test_a_clean_object_is_sure(shape: str, color: str, radius: float) -> None:
    found = DETECTOR.detect(scene_of(shape, color, radius))
    ((box, confidence),) = found.objects[shape]
    assert list(found.objects) == [shape]
    assert confidence > 0.9
    assert found.colors_of(shape, [box]) == [color]
    assert (box[0] + box[2]) / 2 == pytest.approx(8.3, abs=0.5)
    assert (box[1] + box[3]) / 2 == pytest.approx(7.8, abs=1.0)


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (200, 200), (48, 96)])
def test_boxes_are_in_the_images_own_pixels(size: tuple[int, int]) -> None:
    height, width = size
    image = cv2.resize(scene_of("circle"), (width, height), interpolation=cv2.INTER_CUBIC)
    ((box, confidence),) = DETECTOR.detect(image).objects["circle"]
    assert confidence > 0.9
    assert (box[0] + box[2]) / 2 == pytest.approx(8.3 * width / 32, abs=0.5 * width / 32)
    assert (box[1] + box[3]) / 2 == pytest.approx(7.8 * height / 32, abs=0.5 * height / 32)


def hacks() -> dict[str, np.ndarray]:
    """Images that show no shape but might tempt a detector."""
    plain = np.full((32, 32, 3), BACKGROUND, dtype=np.uint8)
    rng = np.random.default_rng(0)
    images = {"nothing": plain, "noise": rng.integers(0, 256, plain.shape, dtype=np.uint8)}
    for color, rgb in COLORS.items():
        images[f"all {color}"] = np.full_like(plain, rgb)
    images["bar"] = cv2.rectangle(plain.copy(), (4, 4), (24, 9), COLORS["red"], -1)
    images["ellipse"] = cv2.ellipse(plain.copy(), (12, 10), (9, 5), 0, 0, 360, COLORS["blue"], -1)
    images["ring"] = cv2.circle(plain.copy(), (12, 12), 6, COLORS["green"], 2)
    images["dot"] = cv2.circle(plain.copy(), (12, 12), 1, COLORS["green"], -1)
    images["pale"] = cv2.addWeighted(plain, 0.8, scene_of("square"), 0.2, 0)
    images["grey"] = np.repeat(scene_of("square").mean(axis=2, keepdims=True), 3, axis=2).astype(np.uint8)
    two_tone = scene_of("square", radius=6)
    two_tone[:, 8:] = scene_of("square", "green", 6)[:, 8:]
    images["two tones"] = two_tone
    images["circle over triangle"] = np.minimum(scene_of("circle"), scene_of("triangle", radius=6))
    images["cross over square"] = np.minimum(scene_of("cross", radius=5.5), scene_of("square", radius=4.2))
    images["blurred blobs"] = cv2.GaussianBlur(rng.integers(0, 256, plain.shape, dtype=np.uint8), (9, 9), 0)
    return images


@pytest.mark.parametrize("name", hacks())
def test_what_is_no_shape_stays_below_the_threshold(name: str) -> None:
    for found in DETECTOR.detect(hacks()[name]).objects.values():
        assert all(confidence < 0.3 for _, confidence in found)


def test_more_detections_come_by_falling_confidence() -> None:
    image = scene_of("circle")
    image[20:32, 16:32] = cv2.resize(scene_of("circle")[1:15, 1:15], (16, 12))
    confidences = [confidence for _, confidence in DETECTOR.detect(image).objects["circle"]]
    assert len(confidences) == 2
    assert confidences == sorted(confidences, reverse=True)
    assert confidences[0] > 0.9 > confidences[1]


def test_is_deterministic_and_leaves_the_image_alone() -> None:
    image = render(sample_scene(all_prompts("counting")[2], Random(1)))
    before = image.copy()
    image.setflags(write=False)
    assert DETECTOR.detect(image) == ShapesDetector().detect(image)
    assert np.array_equal(image, before)


@pytest.mark.parametrize("image", [np.zeros((32, 32), np.uint8), np.zeros((32, 32, 3), np.float32)])
def test_other_arrays_are_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        DETECTOR.detect(image)


def test_takes_milliseconds() -> None:
    image = render(sample_scene(all_prompts("counting")[2], Random(1)))
    started_s = time.process_time()
    for _ in range(50):
        DETECTOR.detect(image)
    assert (time.process_time() - started_s) / 50 < 0.005
