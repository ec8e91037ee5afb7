import io

import numpy as np
import pytest
from PIL import Image

from nft_ray.rewards.base import load_reward

RNG = np.random.default_rng(0)
PLAIN = np.full((64, 64, 3), 200, dtype=np.uint8)
NOISE = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)


def score(name: str, *images: np.ndarray) -> np.ndarray:
    return load_reward(name, {}).score(np.stack(images), ["p"] * len(images), [{}] * len(images)).values


def test_incompressibility_is_kilobytes_at_quality_95() -> None:
    expected = []
    for image in (PLAIN, NOISE):
        buffer = io.BytesIO()
        Image.fromarray(image, "RGB").save(buffer, format="JPEG", quality=95)
        expected.append(len(buffer.getvalue()) / 1000)
    assert score("jpeg_incompressibility", PLAIN, NOISE) == pytest.approx(expected)
    assert expected[0] < 1 < 5 < expected[1]


def test_compressibility_is_minus_a_five_hundredth_of_it() -> None:
    kilobytes = score("jpeg_incompressibility", PLAIN, NOISE)
    np.testing.assert_allclose(score("jpeg_compressibility", PLAIN, NOISE), -kilobytes / 500, rtol=1e-6)


def test_a_512_px_image_of_noise_stays_above_minus_one() -> None:
    noise = RNG.integers(0, 256, (512, 512, 3), dtype=np.uint8)
    assert -1 < score("jpeg_compressibility", noise)[0] < -0.4
