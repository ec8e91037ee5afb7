"""What leaves the project: merged weights in the base's data type, and a card that says where they come from."""

from pathlib import Path

import torch
import yaml
from diffusers import FluxPipeline, SD3Transformer2DModel
from safetensors.torch import load_file

from nft_ray.config import ModelConfig
from nft_ray.downloads.pipelines import location
from nft_ray.models.base import load_model
from nft_ray.models.lora import attach, numpy_weights, random_weights
from nft_ray.models.sd3 import LORA_TARGETS
from nft_ray.runs.export import export_merged, loading_code, model_card, stored_dtype
from tests.examples import example_config


def card(*overrides: str, hub_id: str | None = None) -> str:
    figures = "metric  base  trained"
    versions = {"nft_ray": "0.1.0", "commit": "a" * 40}
    return model_card(example_config(*overrides), epoch=7, figures=figures, versions=versions, hub_id=hub_id)


def test_a_merge_into_16_bit_is_rounded_once_from_float32(tmp_path: Path) -> None:
    base = load_model(ModelConfig(dtype="bfloat16"), torch.device("cpu"), transformer_only=True).transformer
    pristine = {name: value.clone() for name, value in base.state_dict().items()}
    folder = location("nano-sd3")
    assert folder is not None
    copy = tmp_path / "base"
    for source in folder.rglob("*"):
        if source.is_file() and source.parent.name != "transformer":
            (copy / source.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (copy / source.relative_to(folder)).symlink_to(source)
    base.save_pretrained(copy / "transformer")
    assert stored_dtype(copy / "transformer") == "bfloat16"
    assert stored_dtype(folder / "transformer") == "float32"

    config = example_config().model.model_copy(update={"path": str(copy)})
    fresh = load_model(config, torch.device("cpu"), transformer_only=True).transformer
    weights = random_weights(numpy_weights(attach(fresh, config.lora, LORA_TARGETS, seed=0)), seed=2)
    assert export_merged(weights, config, tmp_path / "merged") == "bfloat16"
    found = load_file(tmp_path / "merged" / "diffusion_pytorch_model.safetensors")
    assert found.keys() == pristine.keys()
    for name, value in found.items():
        layer = name.removesuffix(".weight")
        wanted = pristine[name]
        if f"{layer}.lora_A.weight" in weights:
            a, b = (torch.from_numpy(weights[f"{layer}.lora_{end}.weight"]) for end in "AB")
            wanted = (wanted.float() + 2.0 * (b @ a)).to(torch.bfloat16)
            assert not torch.equal(wanted, pristine[name])
        assert torch.equal(value, wanted), name
    assert (
        SD3Transformer2DModel.from_pretrained(tmp_path / "merged", torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    )


def test_the_card_has_the_hubs_header_and_says_what_was_done() -> None:
    text = card("model.path=stabilityai/stable-diffusion-3.5-medium", "model.revision=abc")
    header = yaml.safe_load(text.split("---")[1])
    assert header["base_model"] == "stabilityai/stable-diffusion-3.5-medium"
    assert {header["library_name"], header["pipeline_tag"]} == {"diffusers", "text-to-image"}
    for part in (
        "a" * 40,
        "stable-diffusion-3.5-medium @ abc",
        "rank 4, alpha 8",
        "84 images: 7 epochs x 3 prompts x 4 images",
        "prompts `shapes/train`",
        "| geneval | 1 |",
        "metric  base  trained",
        "4 steps of euler, guidance 1, seed 0",
        "(reward_curve.png)",
        "groups_per_epoch: 3",
    ):
        assert part in text


def test_of_a_run_in_stages_the_card_tells_each_that_trained_it() -> None:
    second = "{name: b, num_epochs: 9, rewards: {jpeg_compressibility: }, evaluation: {num_steps: 3}, "
    prompts = "prompts: {train: small/geneval, test: small/ocr, groups_per_epoch: 2}}"
    text = card(
        "run.num_epochs=14", f"stages=[{{name: a, num_epochs: 4}}, {second}{prompts}, {{name: c, num_epochs: 1}}]"
    )
    for part in (
        "prompts `shapes/train` (4 epochs), then `small/geneval` (3 epochs); no images",
        "72 images: 4 epochs x 3 prompts x 4 images + 3 epochs x 2 prompts x 4 images",
        "| held out | prompts `small/ocr` |",
        "| 1 to 4 | geneval | 1 |",
        "| 5 to 7 | jpeg_compressibility | 1 |",
        "Every held-out prompt once, 3 steps",
    ):
        assert part in text
    assert "8 to" not in text


def test_a_folder_is_no_base_model_of_the_hub() -> None:
    assert "base_model" not in yaml.safe_load(card().split("---")[1])


def test_the_code_loads_what_was_trained() -> None:
    sd3 = loading_code(example_config("model.path=a/b", "evaluation.guidance=4.5"), "me/lora")
    assert "StableDiffusion3Pipeline.from_pretrained('a/b'" in sd3
    assert "text_encoder_3=None" in sd3
    assert 'load_lora_weights("me/lora")' in sd3
    assert "guidance_scale=4.5, max_sequence_length=0" in sd3
    with_t5 = loading_code(example_config("model.path=a/b", "model.max_sequence_length=128"), "me/lora")
    assert "text_encoder_3" not in with_t5
    assert "max_sequence_length=128" in with_t5
    flux = loading_code(
        example_config("model.family=flux", "model.path=a/b", "model.max_sequence_length=256"), "me/lora"
    )
    assert f"{FluxPipeline.__name__}.from_pretrained('a/b', torch_dtype=torch.float32)" in flux
    assert "guidance_scale=3.5" in flux
    assert "true_cfg_scale" not in flux
