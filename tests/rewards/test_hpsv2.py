"""HPSv2.1: our scores against the published package's, on the same checkpoint file of random weights.

The tests that need open_clip run where it is installed; elsewhere the last two run them in .envs/openclip
(`make test-all`), and one runs everywhere, with a stand-in for open_clip.
"""

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch

from nft_ray.rewards.base import load_reward
from nft_ray.rewards.hpsv2 import ARCHITECTURE, CHECKPOINT, Config, HpsV2
from nft_ray.rewards.preprocessing import CLIP_MEAN, CLIP_STD
from tests.oracles import make_env
from tests.rewards import stand_in_open_clip
from tests.rewards.clip_files import random_images

FILE = "tests/rewards/test_hpsv2.py"
SMALL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 56, "layers": 2, "width": 64, "head_width": 16, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
PROMPTS = ["A cat, two dogs &amp; a CAFÉ", "a photo of " + "many " * 100 + "birds", "", "ä ☃ (snowman)"]
has_open_clip = importlib.util.find_spec("open_clip") is not None
needs_open_clip = pytest.mark.skipif(not has_open_clip, reason="run in the environment openclip by the last tests")


def write_checkpoint(root: Path, architecture: dict[str, Any], dtype: torch.dtype = torch.float32) -> Path:
    """Random weights as the published file holds them; its path."""
    from open_clip.model import CLIP

    with torch.device("meta"):
        shapes = {key: value.shape for key, value in CLIP(**architecture).state_dict().items()}
    most = max(shape.numel() for shape in shapes.values())
    noise = torch.empty(most + 7919).uniform_(-1, 1, generator=torch.Generator().manual_seed(0)).to(dtype)
    state, start = {}, 0
    for key, shape in shapes.items():
        spread = math.sqrt(3 / math.prod(shape[1:])) if len(shape) > 1 else 0.1
        around = 1.0 if "ln_" in key and key.endswith("weight") else 0.0
        start = (start + 7919) % (len(noise) - shape.numel())  # every tensor another part: 1e9 draws take 10 s
        state[key] = noise[start : start + shape.numel()].view(shape) * spread + around
    path = root / CHECKPOINT
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state}, path)
    return path


def published_scores(checkpoint: Path, prompts: list[str], images: dict[str, np.ndarray]) -> np.ndarray:
    """By the published package: f32 (prompts, images)."""
    folder = checkpoint.parent
    np.savez(folder / "images.npz", **images)
    (folder / "prompts.json").write_text(json.dumps(prompts))
    oracle = make_env.HERE / "hpsv2x" / "oracle.py"
    done = subprocess.run([make_env.python_of("hpsv2x"), oracle, "score", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return np.array(json.loads((folder / "scores.json").read_text()), dtype=np.float32)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("weights")
    write_checkpoint(root, SMALL)
    return root


@pytest.fixture(scope="module")
def reward(weights: Path) -> HpsV2:
    return HpsV2(Config(weights=str(weights), micro_batch_size=3), SMALL)


def test_is_the_cosine_of_image_and_prompt_with_a_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", stand_in_open_clip.stand_in())
    state, small = stand_in_open_clip.weights(), stand_in_open_clip.SMALL
    (tmp_path / CHECKPOINT).parent.mkdir(parents=True)
    torch.save({"state_dict": state}, tmp_path / CHECKPOINT)
    images = random_images(4, 28, 28)
    scores = HpsV2(Config(weights=str(tmp_path), micro_batch_size=3), small).score(images, PROMPTS, [{}] * 4).values
    model = stand_in_open_clip.CLIP(**small)  # type: ignore[arg-type]
    model.load_state_dict(state)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std
    texts = model.encode_text(stand_in_open_clip.tokenizer(PROMPTS))
    expected = torch.cosine_similarity(model.encode_image(pixels), texts).detach().numpy()
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert np.ptp(expected) > 0.01
    del state["visual.bias"]
    torch.save({"state_dict": state}, tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match=r"is not the published checkpoint: keys 1 missing \(visual\.bias\)$"):
        HpsV2(Config(weights=str(tmp_path)), small)


@needs_open_clip
def test_is_what_the_published_package_scores(weights: Path, reward: HpsV2) -> None:
    sizes = [(512, 384), (256, 256), (56, 56), (48, 80)]
    images = {f"{height}x{width}": random_images(1, height, width)[0] for height, width in sizes}
    (weights / CHECKPOINT).with_name(f"{ARCHITECTURE}.json").write_text(json.dumps(SMALL))
    published = published_scores(weights / CHECKPOINT, PROMPTS, images)
    ours = [[reward.score(one[None], [prompt], [{}]).values[0] for one in images.values()] for prompt in PROMPTS]
    assert published.shape == (4, 4)
    np.testing.assert_allclose(ours, published, atol=1e-5)
    assert np.ptp(published) > 0.1


@needs_open_clip
def test_a_batch_is_its_images_one_by_one_in_their_order(reward: HpsV2) -> None:
    images = random_images(4, 60, 41)
    images.setflags(write=False)
    whole = reward.score(images, PROMPTS, [{}] * 4).values
    alone = [reward.score(images[i : i + 1], PROMPTS[i : i + 1], [{}]).values[0] for i in range(4)]
    np.testing.assert_allclose(whole, alone, atol=1e-6)
    assert whole.dtype == np.float32
    assert np.ptp(whole) > 0.05
    assert reward.score(images[:0], [], []).values.shape == (0,)


@needs_open_clip
def test_a_prompt_is_encoded_once_for_all_its_images(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from open_clip.model import CLIP

    encoded: list[int] = []
    original = CLIP.encode_text
    monkeypatch.setattr(CLIP, "encode_text", lambda self, text: encoded.append(len(text)) or original(self, text))
    reward = HpsV2(Config(weights=str(weights)), SMALL)
    for prompts in (["a"] * 24, ["b"] * 12 + ["a"] * 12):
        reward.score(random_images(24, 56, 56), prompts, [{}] * 24)
    assert encoded == [1, 1]


@needs_open_clip
def test_bfloat16(weights: Path, reward: HpsV2) -> None:
    images = random_images(4, 60, 41)
    exact = reward.score(images, PROMPTS, [{}] * 4).values
    rough = HpsV2(Config(weights=str(weights), dtype="bfloat16"), SMALL).score(images, PROMPTS, [{}] * 4).values
    np.testing.assert_allclose(rough, exact, atol=0.02)
    assert not np.array_equal(rough, exact)


@needs_open_clip
def test_nothing_is_initialised_at_random_and_the_generator_is_not_moved(weights: Path) -> None:
    before = torch.get_rng_state()
    HpsV2(Config(weights=str(weights)), SMALL)
    assert torch.equal(before, torch.get_rng_state())


@needs_open_clip
def test_the_published_architecture_has_686_weights_and_no_others(tmp_path: Path) -> None:
    from open_clip import get_model_config
    from open_clip.model import CLIP

    with torch.device("meta"):
        published = CLIP(**get_model_config(ARCHITECTURE)).state_dict()
    assert len(published) == 686
    (tmp_path / CHECKPOINT).parent.mkdir(parents=True)
    torch.save({"state_dict": {"logit_scale": torch.zeros(())}}, tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match="keys 685 missing"):
        load_reward("hpsv2", {"weights": str(tmp_path)})


def drop(state: dict[str, torch.Tensor]) -> None:
    del state["visual.proj"]


def add(state: dict[str, torch.Tensor]) -> None:
    state["score_predictor.layers.0.weight"] = torch.zeros(2)


def reshape(state: dict[str, torch.Tensor]) -> None:
    state["visual.conv1.weight"] = torch.zeros(64, 3, 16, 16)


@needs_open_clip
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"keys 1 missing \(visual\.proj\)$"),
        (add, r"keys 1 unexpected \(score_predictor\.layers\.0\.weight\)$"),
        (reshape, r"keys 1 of another shape \(visual\.conv1\.weight\)$"),
        (lambda state: state.clear(), r"it has no key state_dict$"),
    ],
)
def test_another_checkpoint_is_refused(
    change: Callable[[dict[str, torch.Tensor]], None], message: str, tmp_path: Path
) -> None:
    path = write_checkpoint(tmp_path, SMALL)
    state = torch.load(path)["state_dict"]
    change(state)
    torch.save({"state_dict": state} if state else {"model": 1}, path)
    with pytest.raises(ValueError, match=message) as error:
        HpsV2(Config(weights=str(tmp_path)), SMALL)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@needs_open_clip
def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"HPS_v2\.1_compressed\.pt is missing: run `nft-ray rewards fetch hpsv2`"):
        load_reward("hpsv2", {"weights": str(tmp_path)})


@needs_open_clip
@pytest.mark.large
def test_real_size_is_what_the_published_package_scores(tmp_path: Path) -> None:
    from open_clip import get_model_config

    with TemporaryDirectory(dir=tmp_path) as root:
        checkpoint = write_checkpoint(Path(root), get_model_config(ARCHITECTURE), torch.float16)
        images = random_images(1, 512, 384)
        published = published_scores(checkpoint, ["a cat"], {"one": images[0]})
        ours = load_reward("hpsv2", {"weights": root}).score(images, ["a cat"], [{}]).values
    np.testing.assert_allclose(ours, published[0], atol=1e-5)


@pytest.mark.skipif(has_open_clip, reason="open_clip is installed here")
def test_without_open_clip_one_line_names_the_extra(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs open_clip \(No module named 'open_clip'\): pip install 'nft_ray\[ope"):
        load_reward("hpsv2", {"weights": str(tmp_path)})


@pytest.mark.large
@pytest.mark.skipif(has_open_clip, reason="open_clip is installed here")
def test_in_the_environment_with_open_clip() -> None:
    assert "12 passed" in make_env.run_tests("openclip", FILE)


@pytest.mark.skipif(has_open_clip, reason="open_clip is installed here")
@pytest.mark.large
def test_real_size_in_the_environment_with_open_clip() -> None:
    assert "1 passed" in make_env.run_tests("openclip", FILE, "-m", "large")
