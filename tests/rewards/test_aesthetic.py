"""The aesthetic predictor on a small CLIP with random weights and a random head in the published files."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from transformers import CLIPModel

from nft_ray.rewards.aesthetic import HEAD
from nft_ray.rewards.base import Reward, load_reward, reward_config, reward_files
from nft_ray.rewards.clipscore import MODEL
from tests.rewards.clip_files import CLIP_L, own_model, own_pixels, random_images, write_clip


def published_head(dim: int) -> torch.nn.Sequential:
    """As the predictor was trained: linear layers with dropout after the first three."""
    linear, dropout = torch.nn.Linear, torch.nn.Dropout
    return torch.nn.Sequential(
        linear(dim, 1024), dropout(0.2), linear(1024, 128), dropout(0.2), linear(128, 64), dropout(0.1),
        linear(64, 16), linear(16, 1),
    ).eval()  # fmt: skip


def write_head(root: Path, head: torch.nn.Sequential) -> None:
    (root / HEAD).parent.mkdir(parents=True, exist_ok=True)
    torch.save({f"layers.{key}": value for key, value in head.state_dict().items()}, root / HEAD)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def model(weights: Path) -> CLIPModel:
    write_clip(weights / MODEL)
    return own_model(weights / MODEL)


@pytest.fixture(scope="module")
def head(weights: Path) -> torch.nn.Sequential:
    torch.manual_seed(1)
    found = published_head(16)
    write_head(weights, found)
    return found


@pytest.fixture(scope="module")
def reward(weights: Path, model: CLIPModel, head: torch.nn.Sequential) -> Reward:
    return load_reward("aesthetic", {"weights": str(weights), "micro_batch_size": 2})


@pytest.mark.parametrize(("height", "width"), [(28, 28), (64, 30), (5, 9)])
def test_is_the_head_on_the_unit_vector(
    reward: Reward, model: CLIPModel, head: torch.nn.Sequential, height: int, width: int
) -> None:
    images = random_images(5, height, width)
    with torch.inference_mode():
        features = model.get_image_features(pixel_values=own_pixels(model, images)).pooler_output
        expected = head(features / features.norm(dim=-1, keepdim=True)).squeeze(1).numpy()
    scores = reward.score(images, ["whatever"] * 5, [{}] * 5)
    np.testing.assert_allclose(scores.values, expected, atol=1e-6)
    assert scores.values.dtype == np.float32
    assert np.ptp(expected) > 1e-3

    alone = [reward.score(image[None], ["something else"], [{}]).values[0] for image in images]
    np.testing.assert_allclose(scores.values, alone, atol=1e-6)
    assert reward.score(images[:0], [], []).values.shape == (0,)


def test_bfloat16_is_close_and_the_head_stays_in_float32(reward: Reward, weights: Path) -> None:
    images = random_images(5, 28, 28)
    exact = reward.score(images, ["p"] * 5, [{}] * 5).values
    rough = load_reward("aesthetic", {"weights": str(weights), "dtype": "bfloat16"})
    values = rough.score(images, ["p"] * 5, [{}] * 5).values
    np.testing.assert_allclose(values, exact, atol=0.1 * np.ptp(exact))
    assert not np.array_equal(values, exact)
    assert {parameter.dtype for parameter in rough._head.parameters()} == {torch.float32}  # type: ignore[attr-defined]


def test_needs_no_tokenizer_and_lists_what_it_loads(reward: Reward, weights: Path) -> None:
    listed = reward_files("aesthetic", reward_config("aesthetic", {}))
    present = {path.relative_to(weights).as_posix() for path in weights.rglob("*") if path.is_file()}
    assert {file.path for file in listed} == present
    assert listed[-1].sha256
    assert listed[-1].origin.endswith("/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"layers.7.bias": None}, r"keys 1 missing \(layers\.7\.bias\)$"),
        ({"layers.1.weight": torch.zeros(1)}, r"keys 1 unexpected \(layers\.1\.weight\)$"),
        ({"layers.0.weight": torch.zeros(1024, 768)}, r"keys 1 of another shape \(layers\.0\.weight\)$"),
    ],
)
def test_another_head_is_refused(keys: dict[str, torch.Tensor | None], message: str, tmp_path: Path) -> None:
    write_clip(tmp_path / MODEL)
    write_head(tmp_path, published_head(16))
    state = torch.load(tmp_path / HEAD) | keys
    torch.save({key: value for key, value in state.items() if value is not None}, tmp_path / HEAD)
    with pytest.raises(ValueError, match=message) as error:
        load_reward("aesthetic", {"weights": str(tmp_path)})
    assert "\n" not in str(error.value)


def test_code_in_the_file_is_not_run(tmp_path: Path) -> None:
    write_clip(tmp_path / MODEL)
    (tmp_path / HEAD).parent.mkdir(parents=True)
    torch.save({"layers.0.weight": Path("/")}, tmp_path / HEAD)
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        load_reward("aesthetic", {"weights": str(tmp_path)})


@pytest.mark.large
def test_real_size(tmp_path: Path) -> None:
    with TemporaryDirectory(dir=tmp_path) as root:  # 2 GB, which pytest would keep
        write_clip(Path(root) / MODEL, CLIP_L)
        write_head(Path(root), published_head(768))
        reward = load_reward("aesthetic", {"weights": root})
        assert np.isfinite(reward.score(random_images(2, 512, 384), ["p"] * 2, [{}] * 2).values).all()
