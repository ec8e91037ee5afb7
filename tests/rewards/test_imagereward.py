"""ImageReward: our network against the published package's, and what is promised for any published checkpoint.

Small weights are written here under the published names; those of the tests against the package (environment
`imagereward`) are written by the package itself.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nft_ray.rewards._blip import Dimensions
from nft_ray.rewards.base import load_reward, reward_config, reward_files
from nft_ray.rewards.imagereward import CHECKPOINT, MEAN, STD, TEXT_CONFIG, VOCABULARY, Config, ImageReward
from tests.oracles import make_env

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "cup", "##s", ",", "of", "photo", "e", "##n"]
SMALL = Dimensions(image_size=48, patch_size=16, hidden_size=24, intermediate_size=96, num_layers=2, num_heads=3)
SMALL_TEXT = {"hidden_size": 20, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL_VISION = {"img_size": 48, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 3}
PUBLISHED_TEXT: dict[str, Any] = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 30524,
    "encoder_width": 768,
    "add_cross_attention": True,
}
PROMPTS = ["A red cup", "a photo of blue cups, e [ENC] [DEC]", "", "red " * 100]


def write_text_files(root: Path, words: list[str], **changes: Any) -> None:
    for path in (TEXT_CONFIG, VOCABULARY):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
    text = PUBLISHED_TEXT | {"vocab_size": len(words) + 2} | changes
    (root / TEXT_CONFIG).write_text(json.dumps(text))
    (root / VOCABULARY).write_text("\n".join(words) + "\n")


def published_shapes(text: dict[str, Any], vision: Dimensions) -> dict[str, tuple[int, ...]]:
    """Every key of ImageReward.pt and its shape, written out by hand."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        shapes.update({f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)})

    def norm(name: str, size: int) -> None:
        shapes.update({f"{name}.weight": (size,), f"{name}.bias": (size,)})

    prefix, dim, inner = "blip.visual_encoder", vision.hidden_size, vision.intermediate_size
    patches = (vision.image_size // vision.patch_size) ** 2
    shapes[f"{prefix}.cls_token"] = (1, 1, dim)
    shapes[f"{prefix}.pos_embed"] = (1, patches + 1, dim)
    shapes[f"{prefix}.patch_embed.proj.weight"] = (dim, 3, vision.patch_size, vision.patch_size)
    shapes[f"{prefix}.patch_embed.proj.bias"] = (dim,)
    for block in (f"{prefix}.blocks.{index}" for index in range(vision.num_layers)):
        norm(f"{block}.norm1", dim)
        linear(f"{block}.attn.qkv", 3 * dim, dim)
        linear(f"{block}.attn.proj", dim, dim)
        norm(f"{block}.norm2", dim)
        linear(f"{block}.mlp.fc1", inner, dim)
        linear(f"{block}.mlp.fc2", dim, inner)
    norm(f"{prefix}.norm", dim)

    prefix, width, inner = "blip.text_encoder", text["hidden_size"], text["intermediate_size"]
    shapes[f"{prefix}.embeddings.word_embeddings.weight"] = (text["vocab_size"], width)
    shapes[f"{prefix}.embeddings.position_embeddings.weight"] = (text["max_position_embeddings"], width)
    norm(f"{prefix}.embeddings.LayerNorm", width)
    for layer in (f"{prefix}.encoder.layer.{index}" for index in range(text["num_hidden_layers"])):
        for attention, source in (("attention", width), ("crossattention", dim)):
            linear(f"{layer}.{attention}.self.query", width, width)
            linear(f"{layer}.{attention}.self.key", width, source)
            linear(f"{layer}.{attention}.self.value", width, source)
            linear(f"{layer}.{attention}.output.dense", width, width)
            norm(f"{layer}.{attention}.output.LayerNorm", width)
        linear(f"{layer}.intermediate.dense", inner, width)
        linear(f"{layer}.output.dense", width, inner)
        norm(f"{layer}.output.LayerNorm", width)
    linear("blip.vision_proj", 256, dim)
    linear("blip.text_proj", 256, width)
    for position, pair in zip((0, 2, 4, 6, 7), ((width, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)), strict=True):
        linear(f"mlp.layers.{position}", *reversed(pair))
    return shapes


def write_checkpoint(root: Path, text: dict[str, Any], vision: Dimensions) -> dict[str, torch.Tensor]:
    """ImageReward.pt with random weights of a size at which no layer loses the signal; returns them."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in published_shapes(text, vision).items():
        fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 25
        spread = (3 / fan_in) ** 0.5
        value = torch.empty(shape).uniform_(-spread, spread, generator=generator)
        state[key] = 1 + value if "norm" in key.lower() and key.endswith("weight") else value
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(text["max_position_embeddings"])[None]
    torch.save(state, root / CHECKPOINT)
    return state


def images(num_images: int, height: int, width: int) -> np.ndarray:
    """Coarse noise, so that it survives being made small."""
    coarse = np.random.default_rng(height).integers(0, 256, (num_images, 4, 4, 3)).astype(np.uint8)
    found = coarse.repeat(-(-height // 4), axis=1).repeat(-(-width // 4), axis=2)[:, :height, :width]
    found.setflags(write=False)  # as an array from the object store is
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    write_text_files(folder, WORDS, **SMALL_TEXT)
    write_checkpoint(folder, json.loads((folder / TEXT_CONFIG).read_text()), SMALL)
    return folder


def small(root: Path, **section: Any) -> ImageReward:
    return ImageReward(Config(weights=str(root), **section), SMALL)


def test_a_batch_is_its_images_one_by_one_in_their_order_and_micro_batches_change_nothing(root: Path) -> None:
    reward, batch, prompts = small(root), images(5, 64, 49), [*PROMPTS, "blue"]
    whole = reward.score(batch, prompts, [{}] * 5).values
    assert whole.dtype == np.float32
    assert np.ptp(whole) > 0.05
    alone = [reward.score(batch[i : i + 1], prompts[i : i + 1], [{}]).values[0] for i in range(5)]
    order = [3, 0, 4, 2, 1]
    shuffled = reward.score(batch[order], [prompts[i] for i in order], [{}] * 5).values
    np.testing.assert_allclose(whole, alone, atol=1e-5)
    np.testing.assert_allclose(whole[order], shuffled, atol=1e-5)
    np.testing.assert_allclose(whole, small(root, micro_batch_size=2).score(batch, prompts, [{}] * 5).values, atol=1e-5)
    assert reward.score(batch[:0], [], []).values.shape == (0,)


def test_the_image_the_prompt_and_their_order_of_words_all_matter(root: Path) -> None:
    reward, batch = small(root), images(2, 48, 48)
    scores = reward.score(batch[[0, 1, 0, 0]], ["red cup", "red cup", "blue cup", "cup red"], [{}] * 4).values
    assert len(np.unique(scores.round(3))) == 4


@pytest.mark.parametrize(("height", "width"), [(224, 224), (37, 91), (1, 1), (3, 200)])
def test_any_image_size(root: Path, height: int, width: int) -> None:
    assert np.isfinite(small(root).score(images(2, height, width), ["a cup"] * 2, [{}] * 2).values).all()


def test_a_prompt_is_cut_at_35_tokens_its_padding_is_not_seen(root: Path) -> None:
    reward, batch = small(root), images(1, 48, 48)

    def score(num_words: int, last: str) -> float:
        return float(reward.score(batch, ["red " * (num_words - 1) + last], [{}]).values[0])

    assert score(33, "red") != pytest.approx(score(33, "cup"), abs=1e-4)  # 33 words, [CLS] and [SEP]
    assert score(34, "red") == pytest.approx(score(34, "cup"), abs=1e-6)


def test_the_published_constants_are_the_last_step(root: Path) -> None:
    """A head whose last layer is 0 says its bias: (bias - mean) / std."""
    changed = torch.load(root / CHECKPOINT, weights_only=True)
    changed["mlp.layers.7.weight"].zero_()
    changed["mlp.layers.7.bias"].fill_(0.5)
    folder = root.parent / "constant"
    write_text_files(folder, WORDS, **SMALL_TEXT)
    torch.save(changed, folder / CHECKPOINT)
    assert small(folder).score(images(1, 48, 48), ["a"], [{}]).values[0] == pytest.approx(0.3220881, abs=1e-6)
    assert (MEAN, STD) == (0.16717362830052426, 1.0333394966054072)


def test_bfloat16(root: Path) -> None:
    dtypes = ("float32", "bfloat16")
    exact, rough = (small(root, dtype=dtype).score(images(4, 64, 64), PROMPTS, [{}] * 4).values for dtype in dtypes)
    np.testing.assert_allclose(rough, exact, atol=0.1)
    assert not np.array_equal(rough, exact)


def test_nothing_is_initialised_at_random_and_nothing_learns(root: Path) -> None:
    before = torch.get_rng_state()
    reward = small(root)
    assert torch.equal(before, torch.get_rng_state())
    assert not any(parameter.requires_grad for parameter in reward._network.parameters())
    assert not reward._network.training


def drop(state: dict[str, torch.Tensor]) -> None:
    del state["blip.visual_encoder.blocks.1.attn.qkv.bias"]


def add(state: dict[str, torch.Tensor]) -> None:
    state["blip.visual_encoder.blocks.1.attn.gate"] = state["mlp.layers.1.weight"] = torch.zeros(1)


def reshape(state: dict[str, torch.Tensor]) -> None:
    state["mlp.layers.6.weight"] = torch.zeros(8, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"keys 1 missing \(vision\.encoder\.layers\.1\.self_attn\.qkv\.bias\)$"),
        (add, r"keys 2 unexpected \(blip\.visual_encoder\.blocks\.1\.attn\.gate, mlp\.layers\.1\.weight\)$"),
        (reshape, r"keys 1 of another shape \(head\.3\.weight\)$"),
    ],
)
def test_another_checkpoint_is_refused_on_one_line(
    root: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    state = torch.load(root / CHECKPOINT, weights_only=True)
    change(state)
    write_text_files(tmp_path, WORDS, **SMALL_TEXT)
    torch.save(state, tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match=message) as error:
        small(tmp_path)
    assert "\n" not in str(error.value)


def test_a_pickled_object_is_not_unpickled(root: Path, tmp_path: Path) -> None:
    write_text_files(tmp_path, WORDS, **SMALL_TEXT)
    torch.save({"model": Path("x")}, tmp_path / CHECKPOINT)
    with pytest.raises(Exception, match=r"weights_only"):
        small(tmp_path)


def test_files_that_do_not_belong_together_and_missing_ones_are_named(root: Path, tmp_path: Path) -> None:
    write_text_files(tmp_path, [*WORDS, "dog"], **SMALL_TEXT, vocab_size=len(WORDS) + 2)
    (tmp_path / CHECKPOINT).symlink_to(root / CHECKPOINT)
    with pytest.raises(ValueError, match=rf"{len(WORDS) + 3} tokens with \[DEC\] and \[ENC\], but .* {len(WORDS) + 2}"):
        small(tmp_path)
    (tmp_path / TEXT_CONFIG).write_text("{}")
    with pytest.raises(ValueError, match=r"med_config\.json\.vocab_size: missing; "):
        small(tmp_path)
    (tmp_path / VOCABULARY).unlink()
    with pytest.raises(ValueError, match=r"vocab\.txt is missing: run `nft-ray rewards fetch imagereward`"):
        load_reward("imagereward", {"weights": str(tmp_path)})


def test_names_of_files_need_no_model_library() -> None:
    script = "import sys, nft_ray.rewards.imagereward as m; m.files(m.Config()); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    names = [file.path for file in reward_files("imagereward", reward_config("imagereward", {}))]
    assert names == [CHECKPOINT, TEXT_CONFIG, VOCABULARY]


def published(root: Path, prompts: list[str], pictures: dict[str, np.ndarray], vision: dict | None) -> dict[str, Any]:
    """Random weights by the published package, in the place of its file, and what it makes of these."""
    python, folder = make_env.python_of("imagereward"), (root / CHECKPOINT).parent
    (folder / "bert-base-uncased").symlink_to((root / VOCABULARY).parent)
    np.savez(folder / "images.npz", **pictures)
    (folder / "task.json").write_text(json.dumps({"seed": 0, "prompts": prompts, "vision": vision}))
    command = [python, make_env.HERE / "imagereward" / "oracle.py", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((folder / "scores.json").read_text())
    return found


SIZES = [(512, 384), (48, 48), (31, 90), (225, 224)]
PICTURES = {f"{height}x{width}": images(1, height, width)[0] for height, width in SIZES}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder of weights that the published package wrote, and its scores and features."""
    folder = tmp_path_factory.mktemp("published")
    write_text_files(folder, WORDS, **SMALL_TEXT)
    return folder, published(folder, PROMPTS, PICTURES, SMALL_VISION)


def test_is_what_the_published_package_scores(package: tuple[Path, dict[str, Any]]) -> None:
    folder, theirs = package
    reward = small(folder)
    ours = np.array(
        [[reward.score(one[None], [prompt], [{}]).values[0] for one in PICTURES.values()] for prompt in PROMPTS]
    )
    np.testing.assert_allclose(ours, theirs["scores"], atol=1e-4)
    assert np.ptp(ours, axis=0).min() > 0.02
    assert np.ptp(ours, axis=1).min() > 0.02

    features: list[torch.Tensor] = []
    reward._network.head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    for one in PICTURES.values():
        reward.score(one[None], PROMPTS[:1], [{}])
    np.testing.assert_allclose(torch.cat(features), theirs["features"], atol=1e-4)


def test_the_keys_written_here_are_those_that_the_published_package_saves(
    root: Path, package: tuple[Path, dict[str, Any]]
) -> None:
    theirs, ours = (torch.load(folder / CHECKPOINT, weights_only=True) for folder in (package[0], root))
    assert {key: value.shape for key, value in theirs.items()} == {key: value.shape for key, value in ours.items()}


@pytest.mark.large
def test_real_size_in_the_published_file_format(tmp_path: Path) -> None:
    words = [*WORDS, *(f"[unused{index}]" for index in range(30522 - len(WORDS)))]
    write_text_files(tmp_path, words)
    state = write_checkpoint(tmp_path, PUBLISHED_TEXT, Dimensions())
    assert sum(value.numel() for value in state.values()) == pytest.approx(447e6, rel=0.01)
    del state
    reward = load_reward("imagereward", {"weights": str(tmp_path)})
    batch, prompts = images(2, 512, 384), ["a red cup", "a photo of blue cups"]
    whole = reward.score(batch, prompts, [{}] * 2).values
    alone = [reward.score(batch[i : i + 1], prompts[i : i + 1], [{}]).values[0] for i in range(2)]
    np.testing.assert_allclose(whole, alone, atol=1e-4)
    assert abs(whole[0] - whole[1]) > 0.01
    (tmp_path / CHECKPOINT).unlink()
