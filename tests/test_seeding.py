"""Seeds are functions of what they are for, and stay what they are: the pinned numbers change when the mixing does."""

from itertools import permutations

import numpy as np
import pytest
import torch

from nft_ray.seeding import evaluation_seed, image_seed, mix, noise, permutation


@pytest.mark.parametrize(
    ("keys", "seed"),
    [
        ((), 1470146276),
        ((0,), 2508256122),
        ((1,), 4280167086),
        (("1",), 3662127497),
        (("a", 2), 3373532001),
    ],
)
def test_the_mixing_is_pinned(keys: tuple[int | str, ...], seed: int) -> None:
    assert mix(*keys) == seed


def test_the_seeds_are_pinned() -> None:
    assert image_seed(0, 0, 0, 0) == 2333781566
    assert image_seed(7, 3, 41, 5) == 3005866115
    assert evaluation_seed(0, 0) == 448045488
    assert evaluation_seed(3, 479) == 4253256609


def test_the_numbers_drawn_are_pinned() -> None:
    drawn = noise([image_seed(0, 0, 0, 0)], (4,))
    expected = [[0.8551969528198242, 0.8630387783050537, 1.0673599243164062, 0.9823172092437744]]
    np.testing.assert_allclose(drawn.numpy(), expected, rtol=1e-6)
    assert permutation(8, "prompts", 0, 0).tolist() == [7, 2, 3, 4, 5, 0, 1, 6]
    assert permutation(8, "prompts", 0, 1).tolist() == [4, 1, 5, 0, 6, 3, 7, 2]


def test_seeds_fill_32_bits_and_no_more() -> None:
    seeds = [mix("range", i) for i in range(2000)]
    assert all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
    assert np.bitwise_or.reduce(seeds) == 2**32 - 1
    assert np.bitwise_and.reduce(seeds) == 0
    assert min(seeds) < 2**32 / 100
    assert max(seeds) > 2**32 * 0.99


def test_type_order_and_number_of_keys_count() -> None:
    keys: list[tuple[int | str, ...]] = [*permutations((1, 2, 3)), (1,), ("1",), ("i1",), ("s1",), (1, 1), (11,), (-1,)]
    keys += [(), ("",), ("", ""), ("a", "b"), ("ab",), ("b", "a"), (1, "1"), ("1", 1), (2**32,), (0,)]
    assert len({mix(*key) for key in keys}) == len(keys)


def test_an_integer_is_the_same_key_whichever_library_made_it() -> None:
    assert mix("noise", np.int64(7), np.uint32(2)) == mix("noise", 7, 2)


def test_a_key_that_is_no_integer_is_refused() -> None:
    with pytest.raises((TypeError, ValueError)):
        mix("noise", 0.5)  # type: ignore[arg-type]


def test_no_two_images_of_an_epoch_share_their_seed() -> None:
    for epoch in range(4):
        lines = permutation(2880, "prompts", 0, epoch)[:48].tolist()
        seeds = {image_seed(0, epoch, line, image) for line in lines for image in range(24)}
        assert len(seeds) == 48 * 24


def test_each_part_of_an_image_changes_its_seed() -> None:
    near = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    assert len({image_seed(*key) for key in near}) == len(near)


def test_evaluation_and_training_seeds_are_apart() -> None:
    assert len({evaluation_seed(0, line) for line in range(480)}) == 480
    assert evaluation_seed(0, 5) != evaluation_seed(1, 5)
    assert mix(0, 5) != evaluation_seed(0, 5) != mix("image", 0, 5)


@pytest.mark.parametrize("shape", [(4,), (16, 4, 4)])
def test_a_row_of_noise_depends_on_its_own_seed_only(shape: tuple[int, ...]) -> None:
    seeds = [11, 2**32 - 1, 0, 12]
    batch = noise(seeds, shape)
    assert batch.shape == (4, *shape)
    assert batch.dtype == torch.float32
    assert batch.device.type == "cpu"
    for i, seed in enumerate(seeds):
        assert torch.equal(noise([seed], shape)[0], batch[i])
    assert torch.equal(noise(seeds[::-1], shape), batch.flip(0))
    assert torch.equal(noise(np.array(seeds, dtype=np.int64), shape), batch)
    assert len({tuple(row.flatten()[:4].tolist()) for row in batch}) == 4


def test_noise_is_standard_normal_whatever_was_drawn_before() -> None:
    drawn = noise([3], (64, 64))
    assert abs(drawn.mean().item()) < 0.05
    assert abs(drawn.std().item() - 1) < 0.05
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(noise([3], (64, 64)), drawn)
    assert torch.equal(torch.rand(3), expected)  # and the global generator is not touched


def test_no_seeds_no_rows() -> None:
    assert noise([], (4, 2)).shape == (0, 4, 2)


def test_a_permutation_is_one_and_a_function_of_its_keys() -> None:
    for n in (0, 1, 97):
        drawn = permutation(n, "prompts", 0, 3)
        assert drawn.dtype == np.int64
        assert sorted(drawn.tolist()) == list(range(n))
        np.random.seed(0)
        assert permutation(n, "prompts", 0, 3).tolist() == drawn.tolist()
    ways = {tuple(permutation(97, *keys)) for keys in (("prompts", 0, 3), ("prompts", 3, 0), ("steps", 0, 3), (0, 3))}
    assert len(ways) == 4
