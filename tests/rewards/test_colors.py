"""GenEval's colour classifier against the same rule spelled out with open_clip's own model, transform and tokenizer.

Tests that need open_clip run where it is installed; elsewhere the last two run them by the Python of .envs/openclip.
"""

import importlib.util
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from nft_ray.rewards._colors import ARCHITECTURE, COLORS, ColorClassifier
from nft_ray.rewards._detections import Asked
from nft_ray.rewards.base import TorchRewardConfig, load_reward
from nft_ray.rewards.geneval import COLORS_CHECKPOINT, MASK2FORMER
from tests.oracles import make_env
from tests.rewards import stand_in_open_clip

FILE = "tests/rewards/test_colors.py"
SMALL = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 56, "layers": 2, "width": 64, "head_width": 16, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
has_open_clip = importlib.util.find_spec("open_clip") is not None
needs_open_clip = pytest.mark.skipif(not has_open_clip, reason="run in the environment openclip by the last tests")


def write_weights(path: Path, architecture: dict[str, Any]) -> None:
    """Random weights as open_clip_model.safetensors holds them."""
    from open_clip.model import CLIP

    with torch.device("meta"):
        shapes = {key: value.shape for key, value in CLIP(**architecture).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in shapes.items():
        spread = math.sqrt(3 / math.prod(shape[1:])) if len(shape) > 1 else 0.1
        around = 1.0 if "ln_" in key and key.endswith("weight") else 0.0
        state[key] = torch.empty(shape).uniform_(around - spread, around + spread, generator=generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)


def random_crops(num_crops: int) -> list[np.ndarray]:
    """Plain colours with some noise, of many sizes: wide, high, tiny, exactly the model's."""
    rng = np.random.default_rng(0)
    sizes = [(56, 56), (1, 1), (200, 37), (9, 150), (57, 56), (80, 81), (300, 301)]
    crops = []
    for index in range(num_crops):
        height, width = sizes[index % len(sizes)]
        noise = rng.integers(-40, 40, (height, width, 3))
        crops.append((rng.integers(0, 256, 3) + noise).clip(0, 255).astype(np.uint8))
    return crops


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("weights") / "open_clip_model.safetensors"
    write_weights(found, SMALL)
    return found


def classifier(path: Path, **section: Any) -> ColorClassifier:
    return ColorClassifier(path, TorchRewardConfig(**section), SMALL)


def plainly(path: Path, crops: list[np.ndarray], class_names: list[str]) -> list[str]:
    """One crop, one template and one colour after the other, with torchvision's transform."""
    from open_clip import get_tokenizer, image_transform
    from open_clip.model import CLIP

    model = CLIP(**SMALL).eval()
    model.load_state_dict(load_file(path))
    transform, tokenizer = image_transform(56, is_train=False), get_tokenizer(ARCHITECTURE)
    found = []
    for crop, name in zip(crops, class_names, strict=True):
        with torch.no_grad():
            image = model.encode_image(transform(Image.fromarray(crop))[None])[0]
            logits = []
            for color in COLORS:
                texts = [f"a photo of a {color} {name}", f"a photo of a {color}-colored {name}"]
                vectors = model.encode_text(tokenizer([*texts, f"a photo of a {color} object"]))
                mean = (vectors / vectors.norm(dim=1, keepdim=True)).mean(dim=0)
                logits.append(float(100 * (image / image.norm()) @ (mean / mean.norm())))
        found.append(COLORS[int(np.argmax(logits))])
    return found


NAMES = ["cup", "dog", "tv remote", "cup", "dining table"]


def test_the_likest_of_ten_colours_with_a_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", stand_in_open_clip.stand_in())
    state, small = stand_in_open_clip.weights(), stand_in_open_clip.SMALL
    save_file(state, tmp_path / "weights.safetensors")
    crops, names = random_crops(40), [NAMES[index % len(NAMES)] for index in range(40)]
    found = ColorClassifier(tmp_path / "weights.safetensors", TorchRewardConfig(micro_batch_size=3), small)
    colors = found(crops, names)
    assert set(colors) <= set(COLORS)
    assert len(set(colors)) >= 3
    assert [found([crop], [name])[0] for crop, name in zip(crops, names, strict=True)] == colors
    with torch.no_grad():  # the first crop has the model's size: no resizing between it and the rule
        image = found._images(crops[0][None, :28, :28])[0]
        model = stand_in_open_clip.CLIP(**small)  # type: ignore[arg-type]
        model.load_state_dict(state)
        likeness = []
        for color in COLORS:
            texts = [f"a photo of a {color} cup", f"a photo of a {color}-colored cup", f"a photo of a {color} object"]
            vectors = torch.nn.functional.normalize(model.encode_text(stand_in_open_clip.tokenizer(texts)), dim=1)
            likeness.append(float(image @ torch.nn.functional.normalize(vectors.mean(dim=0), dim=0)))
    assert found([crops[0][:28, :28]], ["cup"]) == [COLORS[int(np.argmax(likeness))]]


@needs_open_clip
def test_is_the_published_rule_for_crops_of_any_size_and_class(path: Path) -> None:
    crops = random_crops(40)
    names = [NAMES[index % len(NAMES)] for index in range(40)]
    ours = classifier(path)(crops, names)
    assert ours == plainly(path, crops, names)
    assert len(set(ours)) >= 3


@needs_open_clip
def test_the_class_matters_and_crops_do_not_see_each_other(path: Path) -> None:
    crops = random_crops(40)
    one = classifier(path)
    whole = one(crops, ["cup"] * 40)
    assert [one([crop], ["cup"])[0] for crop in crops] == whole
    assert classifier(path, micro_batch_size=7)(crops, ["cup"] * 40) == whole
    assert one(crops, ["giraffe"] * 40) != whole
    assert one([], []) == []


@needs_open_clip
def test_all_crops_are_one_forward_and_a_class_is_encoded_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from open_clip.model import CLIP

    images: list[int] = []
    texts: list[int] = []
    image, text = CLIP.encode_image, CLIP.encode_text
    monkeypatch.setattr(CLIP, "encode_image", lambda self, x: images.append(len(x)) or image(self, x))
    monkeypatch.setattr(CLIP, "encode_text", lambda self, x: texts.append(len(x)) or text(self, x))
    one = classifier(path)
    for _ in range(2):
        one(random_crops(12), ["cup"] * 6 + ["dog"] * 6)
    assert images == [12, 12]
    assert texts == [30, 20]  # of the dog's 30 texts the ten of "object" are known


@needs_open_clip
def test_bfloat16(path: Path) -> None:
    crops = random_crops(40)
    exact, rough = (classifier(path, dtype=dtype)(crops, ["cup"] * 40) for dtype in ("float32", "bfloat16"))
    assert np.mean([one == other for one, other in zip(exact, rough, strict=True)]) >= 0.8


def drop(state: dict[str, torch.Tensor]) -> None:
    del state["visual.proj"]


def add(state: dict[str, torch.Tensor]) -> None:
    state["visual.head"] = torch.zeros(2)


@needs_open_clip
@pytest.mark.parametrize(
    ("change", "message"), [(drop, r"keys 1 missing \(visual\.proj\)$"), (add, r"keys 1 unexpected \(visual\.head\)$")]
)
def test_another_checkpoint_is_refused(
    path: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    state = load_file(path)
    change(state)
    save_file(state, tmp_path / "changed.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        classifier(tmp_path / "changed.safetensors")
    assert "\n" not in str(error.value)


@needs_open_clip
def test_the_architecture_is_the_one_that_the_published_weights_are_for() -> None:
    from open_clip import get_model_config, get_pretrained_cfg

    published = get_pretrained_cfg("ViT-L-14", "openai")
    assert COLORS_CHECKPOINT.startswith(published["hf_hub"])
    assert published["quick_gelu"]
    assert published["mean"] == (0.48145466, 0.4578275, 0.40821073)
    plain, ours = get_model_config("ViT-L-14"), get_model_config(ARCHITECTURE)
    assert ours.pop("quick_gelu")
    assert plain == ours


@needs_open_clip
@pytest.mark.large
def test_the_whole_reward_with_the_real_classifier(tmp_path: Path) -> None:
    """From files to scores: a small Mask2Former that is sure of what it sees, ViT-L/14 at its real size."""
    from open_clip import get_model_config

    from tests.rewards.mask2former_files import SMALL as SMALL_DETECTOR
    from tests.rewards.mask2former_files import SMALL_SWIN, random_images, write_model

    write_model(tmp_path / MASK2FORMER, SMALL_SWIN, SMALL_DETECTOR, 64)
    write_weights(tmp_path / COLORS_CHECKPOINT, get_model_config(ARCHITECTURE))
    reward = load_reward("geneval", {"detector": "mask2former", "weights": str(tmp_path)})
    image = random_images(1, 96, 80)
    detector = reward._detector  # type: ignore[attr-defined]
    found = detector.detect(image)[0]
    boxes = {name: [box for box, sure in some if sure > 0.3] for name, some in found.objects.items()}
    name = min((name for name in boxes if boxes[name]), key=lambda name: len(boxes[name]))
    seen = detector.colors_of([Asked(detections=found, class_name=name, boxes=boxes[name])])[0]
    asked = [seen[0], next(color for color in COLORS if color not in seen)]
    clause = {"class": name, "count": len(boxes[name])}
    lines = [{"tag": "colors", "include": [clause | {"color": color}]} for color in asked]
    scores = reward.score(image.repeat(2, axis=0), ["p"] * 2, lines)
    assert scores.values.tolist() == pytest.approx([(1 + seen.count(seen[0]) / len(seen)) / 2, 0.5])
    (tmp_path / COLORS_CHECKPOINT).unlink()


@pytest.mark.skipif(has_open_clip, reason="open_clip is installed here")
def test_without_open_clip_one_line_names_the_extra(tmp_path: Path) -> None:
    from nft_ray.rewards.base import reward_config, reward_files

    section = {"detector": "mask2former", "weights": str(tmp_path)}
    for file in reward_files("geneval", reward_config("geneval", section)):
        (tmp_path / file.path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file.path).write_text(json.dumps({}))
    with pytest.raises(ValueError, match=r"needs open_clip .*: pip install 'nft_ray\[openclip\]'") as error:
        load_reward("geneval", section)
    assert "\n" not in str(error.value)


@pytest.mark.large
@pytest.mark.skipif(has_open_clip, reason="open_clip is installed here")
def test_in_the_environment_with_open_clip() -> None:
    assert "8 passed" in make_env.run_tests("openclip", FILE)


@pytest.mark.skipif(has_open_clip, reason="open_clip is installed here")
@pytest.mark.large
def test_the_whole_reward_in_the_environment_with_open_clip() -> None:
    assert "1 passed" in make_env.run_tests("openclip", FILE, "-m", "large")
