"""Weights that leave the project: merged in the base's data type, rounded once."""

from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file

from nft_ray.config import ModelConfig
from nft_ray.downloads.pipelines import location
from nft_ray.models.base import load_model
from nft_ray.models.lora import attach, random_weights
from nft_ray.models.sd3 import LORA_TARGETS
from nft_ray.runs.export import export_merged, stored_dtype
from tests.examples import example_config
from tests.models.tiny import numpy_weights


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
