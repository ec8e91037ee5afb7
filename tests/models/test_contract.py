"""Every model family keeps the contract of nft_ray.models.base.FlowModel."""

import numpy as np
import pytest
import torch

from nft_ray.config import ModelConfig
from nft_ray.models.base import check_model, families, load_model, repeat

CPU = torch.device("cpu")
TINY = {"sd3": ModelConfig(family="sd3", path="nano-sd3", height=32, width=32)}
"""A small pipeline of the real classes for each family."""


def test_every_family_has_a_small_pipeline_here() -> None:
    assert sorted(TINY) == families()


@pytest.mark.parametrize("family", families())
def test_encode_draw_and_decode(family: str) -> None:
    config = TINY[family]
    model = load_model(config, CPU)
    prompts = ["a photo of a red circle", "a photo of two crosses"]
    conditioning = model.encode(prompts)
    assert all(len(value) == 2 for value in conditioning.values())
    alone = model.encode(prompts[1:])
    for name, value in repeat(conditioning, torch.tensor([1])).items():
        torch.testing.assert_close(value, alone[name], rtol=1e-5, atol=1e-5)
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.25, 0.75])
    v = model.velocity(x, t, conditioning)
    assert v.shape == x.shape
    assert v.dtype == torch.float32
    single = model.velocity(x[1:], t[1:], alone)
    torch.testing.assert_close(v[1:], single, rtol=1e-4, atol=1e-4)
    images = model.decode(x)
    assert images.shape == (2, config.height, config.width, 3)
    assert images.dtype == np.uint8


@pytest.mark.parametrize("family", families())
def test_sigmas_fall_from_one_to_zero(family: str) -> None:
    sigmas = load_model(TINY[family], CPU, transformer_only=True).sigmas(10)
    assert sigmas.shape == (11,)
    assert sigmas.dtype == torch.float32
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


@pytest.mark.parametrize("family", families())
def test_the_probe_is_the_same_with_and_without_text_encoders(family: str) -> None:
    whole = load_model(TINY[family], CPU)
    bare = load_model(TINY[family], CPU, transformer_only=True)
    with torch.no_grad():
        torch.testing.assert_close(whole.velocity(*whole.probe()), bare.velocity(*bare.probe()), rtol=0, atol=0)
    assert bare.latent_shape == whole.latent_shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "sd4"}, "model.family = 'sd4': unknown; did you mean sd3?"),
        (
            {"path": "/no/such/folder"},
            "model.path = /no/such/folder: no such folder; name a folder, a Hub id or nano-sd3",
        ),
        ({"path": "nano_sd3"}, "model.path = nano_sd3: no such folder"),
    ],
)
def test_a_wrong_model_is_one_clear_line(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_model(TINY["sd3"].model_copy(update=changes))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
