"""Pixels against the code that published the models: transformers, open_clip and HPSv2."""

import importlib.util
import subprocess
from collections.abc import Callable
from math import floor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from nft_ray.rewards.preprocessing import CLIP_MEAN, CLIP_STD, cropped, padded
from tests.oracles import make_env

SIZES = [
    (224, 224), (512, 512), (512, 384), (384, 512), (225, 224), (224, 225), (301, 299), (333, 500),
    (97, 13), (13, 97), (2, 3), (1, 1), (1, 9), (1000, 1100),
]  # fmt: skip
"""(height, width): as it is, square, wide, tall, odd margins, enlarged, very small and large."""
TOLERANCE = 2e-6
"""Of normalised pixels; one level of 255 is 0.015."""
needs_open_clip = pytest.mark.skipif(
    importlib.util.find_spec("open_clip") is None, reason="run in the environment openclip by the last test"
)


def image(height: int, width: int) -> np.ndarray:
    """Noise on a gradient: every pixel counts, and left is not right."""
    rng = np.random.default_rng(height * 10_000 + width)
    slope = np.linspace(0, 120, height * width * 3).reshape(height, width, 3)
    return (slope + rng.integers(0, 136, (height, width, 3))).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_cropped_is_what_transformers_makes(height: int, width: int) -> None:
    one = image(height, width)
    published = CLIPImageProcessorPil()(images=Image.fromarray(one), return_tensors="pt").pixel_values
    ours = cropped(one[None], 224)
    assert ours.shape == (1, 3, 224, 224)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, published, atol=TOLERANCE, rtol=0)


@needs_open_clip
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_cropped_with_round_is_what_open_clip_makes(height: int, width: int) -> None:
    from open_clip import image_transform

    one = image(height, width)
    published = image_transform(224, is_train=False, mean=CLIP_MEAN, std=CLIP_STD)(Image.fromarray(one))
    torch.testing.assert_close(cropped(one[None], 224, rounding=round)[0], published, atol=TOLERANCE, rtol=0)


def test_an_odd_margin_is_cut_at_the_floor_or_at_round() -> None:
    one = np.zeros((227, 224, 3), dtype=np.uint8)
    one[1] = 255  # the margin is 1.5: row 1 is the first one that stays, or the last one that goes
    at_floor, at_round = (cropped(one[None], 224, rounding=rounding)[0, 0, 0, 0] for rounding in (floor, round))
    assert at_floor > 1 > 0 > at_round


def test_padded_is_what_the_published_package_makes(tmp_path: Path) -> None:
    python = make_env.python_of("hpsv2x")
    sizes = [size for size in SIZES if max(size) != 224 or size == (224, 224)]
    np.savez(tmp_path / "images.npz", **{f"{height}x{width}": image(height, width) for height, width in sizes})
    subprocess.run([python, make_env.HERE / "hpsv2x" / "oracle.py", "transform", "224", tmp_path], check=True)
    with np.load(tmp_path / "pixels.npz") as published:
        assert len(published.files) == len(sizes)
        for height, width in sizes:
            ours = padded(image(height, width)[None], 224)[0].numpy()
            np.testing.assert_allclose(ours, published[f"{height}x{width}"], atol=TOLERANCE, rtol=0)


def test_padded_fits_the_longer_side_and_leaves_black() -> None:
    white = np.full((2, 60, 20, 3), 255, dtype=np.uint8)
    black, full = ((value - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD) for value in (0.0, 1.0))
    pixels = padded(white, 30)
    assert pixels.shape == (2, 3, 30, 30)
    torch.testing.assert_close(pixels[:, :, :, 10:20], full.view(3, 1, 1).expand(2, 3, 30, 10))
    for side in (pixels[:, :, :, :10], pixels[:, :, :, 20:]):
        torch.testing.assert_close(side, black.view(3, 1, 1).expand(2, 3, 30, 10))
    # where HPSv2's own transform returns 30 x 10
    torch.testing.assert_close(padded(white[:, :30, :10], 30), pixels)
    assert padded(white[:, :, :1].repeat(9, axis=1), 30).isfinite().all()  # 540 x 1: the side of 0.06 becomes 1


@pytest.mark.parametrize(("height", "width"), [(2, 5000), (5000, 2)])
def test_a_very_elongated_image_is_not_resized_whole(height: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise one picture of 1 x 20000 takes 3 GB. What stays of it is the same."""
    one = image(height, width)
    middle = tuple(slice(side // 2 - 4, side // 2 + 4) if side > 2 else slice(None) for side in one.shape[:2])
    sizes: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def noted(self: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
        sizes.append(size)
        return resize(self, size, resample)

    monkeypatch.setattr(Image.Image, "resize", noted)
    torch.testing.assert_close(cropped(one[None], 224), cropped(one[None][(slice(None), *middle)], 224))
    assert max(map(max, sizes)) <= 224 * 16


@pytest.mark.parametrize("transform", [cropped, padded])
def test_a_batch_is_its_images_in_their_order_and_may_be_read_only(transform: Callable[..., torch.Tensor]) -> None:
    batch = np.stack([np.roll(image(50, 41), shift, axis=1) for shift in range(9)])
    batch.setflags(write=False)
    alone = torch.cat([transform(one[None], 32) for one in batch])
    torch.testing.assert_close(transform(batch, 32), alone, atol=0, rtol=0)
    assert len({tuple(one.flatten().tolist()) for one in alone}) == 9


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("transform", [cropped, padded])
def test_a_gpu_makes_what_the_cpu_makes(transform: Callable[..., torch.Tensor]) -> None:
    batch = np.stack([image(512, 384)] * 3)
    on_gpu = transform(batch, 224, device=torch.device("cuda"))
    assert on_gpu.device.type == "cuda"
    torch.testing.assert_close(on_gpu.cpu(), transform(batch, 224), atol=1e-5, rtol=0)


@pytest.mark.large
def test_in_the_environment_with_open_clip() -> None:
    if importlib.util.find_spec("open_clip"):
        pytest.skip("this is an environment with open_clip")
    said = make_env.run_tests("openclip", "tests/rewards/test_preprocessing.py", "-k", "open_clip_makes")
    assert f"{len(SIZES)} passed" in said
