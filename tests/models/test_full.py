"""Full fine-tuning: every weight is trained, felt by a sampler, and drawn with by plain diffusers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from nft_ray.config import parse
from nft_ray.models.base import load_model
from nft_ray.models.full import export_transformer, random_change, replaced, train_all
from nft_ray.types import Weights
from tests.models.test_contract import experiment, our_images, plain_images, plain_pipeline
from tests.models.tiny import OF_EACH_FAMILY, numpy_weights, tiny_model

CPU = torch.device("cpu")
every_family = pytest.mark.parametrize("kind", OF_EACH_FAMILY)


def changed(kind: str, folder: Path) -> Weights:
    model = load_model(tiny_model(kind, folder), CPU, transformer_only=True)
    weights = numpy_weights(dict(model.transformer.named_parameters()))
    return {name: value + random_change(name, value.shape, seed=3) for name, value in weights.items()}


@every_family
def test_every_weight_gets_a_gradient(kind: str, tiny_folder: Path) -> None:
    """DistributedDataParallel waits for all of them."""
    model = load_model(tiny_model(kind, tiny_folder), CPU, transformer_only=True)
    parameters = train_all(model.transformer)
    assert list(parameters) == sorted(dict(model.transformer.named_parameters()))
    model.velocity(*model.probe()).square().mean().backward()
    assert [name for name, value in parameters.items() if value.grad is None] == []


@every_family
def test_an_exported_transformer_gives_our_image_in_plain_diffusers(
    kind: str, tiny_folder: Path, tmp_path: Path
) -> None:
    config = tiny_model(kind, tiny_folder, tuning="full")
    weights = changed(kind, tiny_folder)
    ours, base = our_images(experiment(config), weights), our_images(experiment(config), None)
    assert np.abs(ours.astype(int) - base.astype(int)).max() > 20
    export_transformer(weights, config, tmp_path)
    plain = plain_pipeline(config)
    plain.transformer = type(plain.transformer).from_pretrained(tmp_path)
    theirs = plain_images(plain, config)
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1
    assert (ours == theirs).mean() > 0.99


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_is_the_pristine_copy_to_the_last_bit(dtype: str, tiny_folder: Path) -> None:
    model = load_model(tiny_model("sd3", tiny_folder, dtype=dtype), CPU, transformer_only=True)
    weights, use = changed("sd3", tiny_folder), replaced(model.transformer)
    with torch.no_grad():
        base = model.velocity(*model.probe())
        for _ in range(3):
            assert use(weights) == len(weights)
            assert (model.velocity(*model.probe()) - base).norm() > 0.1 * base.norm()
            assert use(None) == 0
            assert torch.equal(model.velocity(*model.probe()), base)
    with pytest.raises(AssertionError, match="names differ"):
        use({name: value for name, value in weights.items() if "norm" not in name})


@pytest.mark.parametrize(
    ("model", "sampler", "message"),
    [
        ({"dtype": "float16"}, {}, "model: dtype = float16: .*bfloat16"),
        ({}, {"lora": "merged"}, "sampler.lora = merged: .*leave it out"),
    ],
)
def test_what_full_fine_tuning_rules_out_is_one_line(
    model: dict[str, str], sampler: dict[str, str], message: str
) -> None:
    data = {
        "run": {"name": "full"},
        "model": {"tuning": "full", **model},
        "sampler": sampler,
        "rewards": {"jpeg_compressibility": {"weight": 1}},
    }
    with pytest.raises(ValueError, match=message) as error:
        parse(data)
    assert "\n" not in str(error.value)
