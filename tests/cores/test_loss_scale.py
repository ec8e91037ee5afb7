"""The factor of float16's gradients: a power of two that shrinks, grows again, and knows no ranks."""

import math

import torch

from nft_ray.cores.loss_scale import GROWS_EVERY, SMALLEST, LossScale


def test_it_brings_a_velocitys_gradient_to_about_one_256th() -> None:
    scale = LossScale(torch.float16, (16, 64, 64))
    for num_pairs in (1, 9, 10_368, 10**6):
        factor = scale.of(num_pairs)
        assert math.log2(factor).is_integer()
        assert 1 / 512 < factor / (num_pairs * 16 * 64 * 64) <= 1 / 256
    assert scale.of(0) == scale.of(1)


def test_what_is_not_float16_is_left_alone() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        scale = LossScale(dtype, (4, 8, 8))
        scale.shrink()
        assert scale.of(100) == scale.relative == 1


def test_it_is_halved_and_grows_again_up_to_what_it_was() -> None:
    scale = LossScale(torch.float16, (4, 8, 8))
    start = scale.of(100)
    for _ in range(2):
        scale.shrink()
    assert scale.of(100) == start / 4
    grown = []
    for step in range(1, 4 * GROWS_EVERY):
        scale.stepped(step)
        grown.append(scale.of(100) / start)
    assert [grown.index(share) + 1 for share in (0.5, 1)] == [GROWS_EVERY, 2 * GROWS_EVERY]
    assert max(grown) == 1
    for _ in range(99):
        scale.shrink()
    assert scale.relative == SMALLEST
