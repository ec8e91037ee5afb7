"""The renderer and the sampling of scenes."""

from random import Random

import numpy as np
import pytest

from nft_ray.shapes.grammar import TAGS, all_prompts
from nft_ray.shapes.world import BACKGROUND, COLORS, IMAGE_SIZE, SHAPES, Scene, SceneObject, render, sample_scene


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("color", COLORS)
def test_an_object_has_its_color_in_the_middle_and_background_around(shape: str, color: str) -> None:
    image = render(Scene(objects=(SceneObject(shape=shape, color=color, x=8, y=8, radius=5),)))
    assert image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    assert image.dtype == np.uint8
    assert tuple(image[8, 8]) == COLORS[color]
    assert np.all(image[16:, 16:] == BACKGROUND)


@pytest.mark.parametrize("tag", TAGS)
def test_a_scene_shows_what_the_metadata_asks_for(tag: str) -> None:
    rng = Random(0)
    for metadata in all_prompts(tag):
        scene = sample_scene(metadata, rng)
        for clause in metadata["include"]:
            shown = [one for one in scene.objects if one.shape == clause["class"]]
            assert len(shown) == clause["count"]
            assert {one.color for one in shown} <= {clause.get("color", one.color) for one in shown}


def test_scenes_are_a_function_of_the_generator() -> None:
    metadata = all_prompts("color_attr")[7]
    assert sample_scene(metadata, Random(3)) == sample_scene(metadata, Random(3))
    assert sample_scene(metadata, Random(3)) != sample_scene(metadata, Random(4))


@pytest.mark.parametrize("relation", ["left of", "right of", "above", "below"])
def test_positions_are_the_prompts(relation: str) -> None:
    metadata = {
        "include": [
            {"class": "circle", "count": 1},
            {"class": "square", "count": 1, "position": [relation, 0]},
        ]
    }
    for seed in range(50):
        target, placed = sample_scene(metadata, Random(seed)).objects
        dx, dy = placed.x - target.x, placed.y - target.y
        along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
        assert (along < 0) == (relation in ("left of", "above"))
        assert abs(along) > 13
        assert abs(across) <= 2


def test_more_objects_than_cells_are_refused() -> None:
    with pytest.raises(ValueError, match="1 to 4 objects, not 5"):
        sample_scene({"include": [{"class": "circle", "count": 5}]}, Random(0))
