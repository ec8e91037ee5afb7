"""What rewards say that they take: against their architectures, counted, and on the device where they run."""

from typing import Any

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from nft_ray.config import load
from nft_ray.planning.devices import device_named
from nft_ray.planning.scoring import REQUEST_S, scoring
from nft_ray.planning.trace import Trace
from nft_ray.rewards.base import Cost, reward_config, reward_cost, reward_names
from tests.planning.test_estimate import CONFIGS

CARD = device_named("h100")
BATCH = 4
VISION = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
KINDS: dict[str, tuple[tuple[int, ...], tuple[int, ...], int, str]] = {
    "pickscore": ((1280, 32, 16, 5120), (1024, 24, 16, 4096), 1024, "gelu"),
    "hpsv2": ((1280, 32, 16, 5120), (1024, 24, 16, 4096), 1024, "gelu"),
    "clipscore": ((1024, 24, 16, 4096), (768, 12, 12, 3072), 768, "quick_gelu"),
}
"""laion/CLIP-ViT-H-14, which PickScore and HPSv2 are, and openai/clip-vit-large-patch14."""


def cost(name: str, **section: Any) -> Cost:
    found = reward_cost(name, reward_config(name, section))
    assert found is not None
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pickscore", "clipscore", "hpsv2"])
def test_clip_rewards_take_what_their_architecture_counts(name: str) -> None:
    vision, text, width, activation = KINDS[name]
    settings = CLIPConfig(
        vision_config=dict(zip(VISION, vision, strict=True))
        | {"patch_size": 14, "image_size": 224, "hidden_act": activation},
        text_config=dict(zip(VISION, text, strict=True)) | {"hidden_act": activation},
        projection_dim=width,
    )
    said = cost(name)
    with torch.device("meta"), torch.no_grad():
        model = CLIPModel(settings).eval()
        pixels, tokens = torch.empty(BATCH, 3, 224, 224), torch.zeros(1, 77, dtype=torch.long)
        image = Trace.of(lambda: model.get_image_features(pixel_values=pixels))
        prompt = Trace.of(lambda: model.get_text_features(input_ids=tokens))
    assert said.parameters == sum(value.numel() for value in model.parameters())
    assert said.flops == pytest.approx(image.flops / BATCH, rel=0.01)
    assert said.prompt_flops == pytest.approx(prompt.flops, rel=0.01)
    assert said.activation_bytes == pytest.approx(image.peak_bytes / BATCH, rel=0.02)


@pytest.mark.large
def test_geneval_takes_what_mask2former_counts() -> None:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    from nft_ray.planning.trace import _Seen
    from nft_ray.rewards.geneval import COLOR_CROPS

    model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(num_labels=80)).eval()
    seen = _Seen()
    with torch.no_grad(), seen:
        model(pixel_values=torch.zeros(1, 3, 800, 800))
    said = cost("geneval", detector="mask2former")
    clip = cost("clipscore")
    assert said.parameters == sum(value.numel() for value in model.parameters()) + clip.parameters
    assert said.flops == pytest.approx(seen.flops + COLOR_CROPS * clip.flops, rel=0.01)
    assert said.activation_bytes == pytest.approx(seen.peak, rel=0.05)


@pytest.mark.parametrize("name", [name for name in reward_names() if name != "unified_reward"])
def test_every_reward_says_what_it_takes_and_how_it_knows(name: str) -> None:
    said = cost(name, **({"detector": "mask2former"} if name == "geneval" else {}))
    assert said.source
    assert said.host_s > 0


def test_a_reward_without_a_word_is_assumed() -> None:
    config = reward_config("unified_reward", {"urls": ["http://127.0.0.1:1/v1"]})
    assert reward_cost("unified_reward", config) is None
    assert scoring("unified_reward", config, CARD).source.startswith("assumed")


def test_all_rewards_of_the_presets_say_it() -> None:
    for file in CONFIGS.glob("*.yaml"):
        for name, config in load(file).reward_configs.items():
            assert reward_cost(name, config) is not None, (file.stem, name)


def test_on_the_card_or_on_the_host() -> None:
    def of(name: str = "pickscore", **section: Any) -> Any:
        return scoring(name, reward_config(name, section), CARD)

    card, host, four = of(num_gpus=1), of(), of(num_cpus=4)
    assert card.image_s < host.image_s / 50
    assert four.image_s == pytest.approx(host.image_s / 4)
    assert host.device_bytes == 0
    assert card.device_bytes > 4 * 986e6
    assert of(num_gpus=1, dtype="bfloat16").device_bytes < 0.6 * card.device_bytes
    assert of(num_gpus=1, dtype="bfloat16").image_s < card.image_s
    assert of(num_gpus=1, batch_size=4, batch_wait_s=0.5).request_s == pytest.approx(card.request_s + 0.5)
    assert of("ocr").image_s == pytest.approx(0.247)
    assert of("ocr", num_gpus=1).image_s == pytest.approx(0.247), "rapidocr has no use for a card"
    assert of("ocr").request_s == REQUEST_S
