"""What GenEval's detector makes of logits: instances against plain loops and transformers' own, masks, crops."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

from nft_ray.rewards._mask2former import BLANK, ImageInstances, Instance, instances
from tests.rewards.mask2former_files import plainly


def random_logits(num_queries: int, num_classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """f32 (Q, C + 1), (Q, 24, 24): sure of few classes; masks are blobs, some of them empty."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randn(num_queries, num_classes + 1, generator=generator) * 4
    coarse = torch.randn(1, num_queries, 6, 6, generator=generator) * 6 - 4
    masks = torch.nn.functional.interpolate(coarse, (24, 24), mode="bicubic")[0]
    masks[::5] = -1.0
    return labels, masks


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
