"""PickScore on the real architecture, small and with random weights in the published files, against transformers; and
what all rewards around a CLIP model share: each prompt encoded once, strict loading, data types, one-line errors."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPModel

from nft_ray.rewards import _clip
from nft_ray.rewards.base import Reward, TorchRewardConfig, load_reward, reward_config, reward_files
from nft_ray.rewards.pickscore import MODEL, TOKENIZER
from tests.rewards.clip_files import (
    CLIP_H,
    own_logits,
    own_model,
    random_images,
    save_state,
    write_clip,
    write_tokenizer,
)

PROMPTS = ["a cat", "two cats on a mat", "at night", "CAT  at", "", "ä ☃"]
NONE = [{}] * 64


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def model(weights: Path) -> CLIPModel:
    write_clip(weights / MODEL)
    write_tokenizer(weights / TOKENIZER)
    return own_model(weights / MODEL)


@pytest.fixture(scope="module")
def reward(weights: Path, model: CLIPModel) -> Reward:
    return load_reward("pickscore", {"weights": str(weights), "micro_batch_size": 4})


@pytest.mark.parametrize(("height", "width"), [(28, 28), (64, 64), (40, 91), (37, 30), (5, 3)])
def test_is_the_models_own_logit_over_26(
    reward: Reward, model: CLIPModel, weights: Path, height: int, width: int
) -> None:
    images = random_images(6, height, width)
    expected = own_logits(model, weights / TOKENIZER, images, PROMPTS)
    scores = reward.score(images, PROMPTS, NONE[:6])
    assert scores.values.dtype == scores.details["cos"].dtype == np.float32
    np.testing.assert_allclose(scores.values, expected / 26, atol=2e-6)
    np.testing.assert_allclose(scores.details["cos"], expected / 100, atol=1e-6)
    assert np.ptp(expected / 26) > 0.2


def test_a_batch_is_its_images_one_by_one_in_their_order(reward: Reward) -> None:
    images = random_images(6, 33, 50)
    images.setflags(write=False)
    whole = reward.score(images, PROMPTS, NONE[:6]).values
    order = [3, 0, 5, 1, 4, 2]
    shuffled = reward.score(images[order], [PROMPTS[i] for i in order], NONE[:6]).values
    alone = [reward.score(images[i : i + 1], PROMPTS[i : i + 1], [{}]).values[0] for i in range(6)]
    np.testing.assert_allclose(whole, alone, atol=2e-6)
    np.testing.assert_allclose(whole[order], shuffled, atol=2e-6)
    assert reward.score(images[:0], [], []).values.shape == (0,)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of prompts of each call of the text tower from now on."""
    calls: list[int] = []
    original = CLIPModel.get_text_features

    def counted(self: CLIPModel, **tokens: torch.Tensor) -> object:
        calls.append(len(tokens["input_ids"]))
        return original(self, **tokens)

    monkeypatch.setattr(CLIPModel, "get_text_features", counted)
    return calls


def test_a_prompt_is_encoded_once_for_all_its_images(reward: Reward, encoded: list[int]) -> None:
    group = random_images(24, 28, 28)
    first = reward.score(group, ["a mat"] * 24, NONE[:24])
    assert encoded == [1]
    again = reward.score(group, ["a mat"] * 12 + ["a mate"] * 12, NONE[:24])
    assert encoded == [1, 1]
    np.testing.assert_array_equal(first.values[:12], again.values[:12])
    assert not np.isclose(first.values[12:], again.values[12:], atol=1e-4).any()


def test_remembers_the_prompts_that_were_asked_for_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_clip, "REMEMBERED_PROMPTS", 2)
    asked: list[list[str]] = []

    def encode(prompts: list[str]) -> torch.Tensor:
        asked.append(prompts)
        return torch.tensor([[float(prompt), 3.0] for prompt in prompts])

    texts = _clip.TextEncoder(encode, TorchRewardConfig(micro_batch_size=2))
    found = texts(["4", "0", "4", "9"])  # more than are remembered, and than fit one forward
    assert asked == [["4", "0"], ["9"]]
    torch.testing.assert_close(found[:3], torch.tensor([[0.8, 0.6], [0.0, 1.0], [0.8, 0.6]]))
    for prompts in (["0"], ["8"], ["0"], ["9"]):  # 0 was used after 9: it stays, 9 goes
        texts(prompts)
    assert asked[2:] == [["8"], ["9"]]


def test_a_prompt_is_cut_at_77_tokens(reward: Reward, model: CLIPModel, weights: Path) -> None:
    images = random_images(1, 28, 28).repeat(3, axis=0)
    prompts = ["cat " * 75, "cat " * 75 + "mat", "cat " * 74 + "mat"]
    values = reward.score(images, prompts, NONE[:3]).values
    assert values[0] == pytest.approx(values[1], abs=1e-6)
    assert abs(values[0] - values[2]) > 1e-4
    np.testing.assert_allclose(values, own_logits(model, weights / TOKENIZER, images, prompts) / 26, atol=2e-6)


def test_bfloat16_keeps_the_scale_in_float32(reward: Reward, weights: Path) -> None:
    images = random_images(6, 40, 40)
    exact = reward.score(images, PROMPTS, NONE[:6])
    rough = load_reward("pickscore", {"weights": str(weights), "dtype": "bfloat16"}).score(images, PROMPTS, NONE[:6])
    # in bf16 it would be exp(4.59375) = 98.9
    np.testing.assert_allclose(rough.values, rough.details["cos"] * np.float32(100 / 26), rtol=1e-6)
    np.testing.assert_allclose(rough.values, exact.values, atol=0.1)
    assert np.corrcoef(rough.values, exact.values)[0, 1] > 0.99
    assert not np.array_equal(rough.values, exact.values)


def test_files_are_what_is_loaded(weights: Path, model: CLIPModel) -> None:
    listed = {file.path for file in reward_files("pickscore", reward_config("pickscore", {}))}
    assert listed == {path.relative_to(weights).as_posix() for path in weights.rglob("*") if path.is_file()}


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"PickScore_v1/config\.json is missing \(and 3 more\): run `nft-ray rewards"):
        load_reward("pickscore", {"weights": str(tmp_path)})


def drop(state: dict[str, torch.Tensor]) -> None:
    del state["visual_projection.weight"]


def add(state: dict[str, torch.Tensor]) -> None:
    state |= {f"extra{i}": torch.zeros(1) for i in range(4)}


def reshape(state: dict[str, torch.Tensor]) -> None:
    state["text_projection.weight"] = torch.zeros(16, 25)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"keys 1 missing \(visual_projection\.weight\)$"),
        (add, r"keys 4 unexpected \(extra0, extra1, extra2, \.\.\.\)$"),
        (reshape, r"keys 1 of another shape \(text_projection\.weight\)$"),
    ],
)
def test_another_checkpoint_is_refused(
    change: Callable[[dict[str, torch.Tensor]], None], message: str, tmp_path: Path
) -> None:
    write_clip(tmp_path / MODEL)
    write_tokenizer(tmp_path / TOKENIZER)
    state = load_file(tmp_path / MODEL / "model.safetensors")
    assert {"vision_model.pre_layrnorm.weight", "text_model.encoder.layers.0.self_attn.q_proj.weight"} <= state.keys()
    change(state)
    save_state(tmp_path / MODEL, state)
    with pytest.raises(ValueError, match=message) as error:
        load_reward("pickscore", {"weights": str(tmp_path)})
    assert "\n" not in str(error.value)
    assert str(tmp_path / MODEL) in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_said_and_null_is_the_cpu(weights: Path, model: CLIPModel) -> None:
    with pytest.raises(ValueError, match="device = 'cuda': this process sees no GPU; set num_gpus, or device: cpu"):
        load_reward("pickscore", {"weights": str(weights), "device": "cuda"})
    load_reward("pickscore", {"weights": str(weights), "num_gpus": 0.5})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_scores_as_the_cpu_does(reward: Reward, weights: Path) -> None:
    images = random_images(6, 40, 91)
    on_gpu = load_reward("pickscore", {"weights": str(weights), "device": "cuda", "micro_batch_size": 4})
    np.testing.assert_allclose(
        on_gpu.score(images, PROMPTS, NONE[:6]).values, reward.score(images, PROMPTS, NONE[:6]).values, atol=1e-4
    )


def test_importing_the_modules_imports_no_model_library() -> None:
    script = "import sys; from nft_ray.rewards import aesthetic, clipscore, hpsv2, pickscore; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "nft_ray.rewards.hpsv2" in modules
    assert not {"torch", "transformers", "safetensors", "ray"} & set(modules)


@pytest.mark.large
def test_real_size(tmp_path: Path) -> None:
    with TemporaryDirectory(dir=tmp_path) as root:  # 4 GB, which pytest would keep
        write_clip(Path(root) / MODEL, CLIP_H)
        write_tokenizer(Path(root) / TOKENIZER)
        reward = load_reward("pickscore", {"weights": root, "dtype": "bfloat16"})
        scores = reward.score(random_images(2, 512, 384), PROMPTS[:2], NONE[:2])
    assert np.isfinite(scores.values).all()
    assert (np.abs(scores.details["cos"]) <= 1).all()
