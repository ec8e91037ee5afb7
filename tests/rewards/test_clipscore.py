"""CLIPScore on the real architecture, small and with random weights in the published files, against transformers."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from transformers import CLIPModel

from nft_ray.rewards.base import Reward, load_reward
from nft_ray.rewards.clipscore import MODEL
from tests.rewards.clip_files import CLIP_L, own_logits, own_model, random_images, write_clip, write_tokenizer

PROMPTS = ["a cat", "two cats on a mat", "at night", "CAT  at"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def model(weights: Path) -> CLIPModel:
    write_clip(weights / MODEL)
    write_tokenizer(weights / MODEL)
    return own_model(weights / MODEL)


@pytest.fixture(scope="module")
def reward(weights: Path, model: CLIPModel) -> Reward:
    return load_reward("clipscore", {"weights": str(weights), "micro_batch_size": 3})


@pytest.mark.parametrize(("height", "width"), [(28, 28), (64, 64), (40, 91), (37, 30), (5, 3)])
def test_is_the_models_own_logit_over_100(
    reward: Reward, model: CLIPModel, weights: Path, height: int, width: int
) -> None:
    images = random_images(4, height, width)
    expected = own_logits(model, weights / MODEL, images, PROMPTS) / 100
    scores = reward.score(images, PROMPTS, [{}] * 4)
    assert scores.values.dtype == np.float32
    assert scores.details == {}
    np.testing.assert_allclose(scores.values, expected, atol=1e-6)
    assert np.ptp(expected) > 0.05


@pytest.mark.large
def test_real_size(tmp_path: Path) -> None:
    with TemporaryDirectory(dir=tmp_path) as root:  # 2 GB, which pytest would keep
        write_clip(Path(root) / MODEL, CLIP_L)
        write_tokenizer(Path(root) / MODEL)
        reward = load_reward("clipscore", {"weights": root})
        scores = reward.score(random_images(2, 512, 384), PROMPTS[:2], [{}] * 2)
    assert np.isfinite(scores.values).all()
    assert (np.abs(scores.values) <= 1).all()
