"""Counts of real architectures without weights: against a hand count, against what loads, against each other."""

from pathlib import Path

import pytest
import torch

from nft_ray.config import LoraConfig, ModelConfig, load
from nft_ray.models.base import family, load_model
from nft_ray.planning import costs
from nft_ray.planning.architectures import kept, known

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
MEDIUM = ModelConfig(
    path="stabilityai/stable-diffusion-3.5-medium", dtype="float16", height=512, width=512, max_sequence_length=128
)
NANO = ModelConfig()
TERA = 1e12


def hand_count(image: int = 1024, text: int = 205, width: int = 1536, layers: int = 24, dual: int = 13) -> int:
    """SD3.5-medium's matrix products, as docs/planning.md lists them; a product of (n, a) and (a, b) is 2 n a b."""
    both = image + text
    linear = 2 * width * width
    attention = 2 * 2 * both * both * width  # Q K', and its product with V
    joint = both * 4 * linear + attention + both * 8 * linear  # Q, K, V, out; then the two matrices of the MLP
    block = joint + (6 + 6) * linear  # and modulation of both streams from the time
    second = image * 4 * linear + 2 * 2 * image * image * width + 3 * linear  # the image's own attention, 9 modulations
    last = -text * (1 + 8) * linear - 4 * linear  # the last block lets the text end: no out, no MLP, 2 modulations
    outside = (
        2 * image * (2 * 2 * 16) * width  # patches in
        + 2 * text * 4096 * width
        + 2 * (256 * width + width * width + 2048 * width + width * width)  # time and pooled text
        + 2 * linear  # modulation of the output
        + 2 * image * width * (2 * 2 * 16)
    )
    return layers * block + dual * second + last + outside


def test_sd35_medium_is_its_hand_count() -> None:
    found = costs.forward(MEDIUM)
    assert round(found.flops / TERA, 2) == 2.22
    assert found.flops == hand_count()


@pytest.mark.slow
def test_an_update_has_no_gradients_of_frozen_matrices() -> None:
    forward, update = costs.forward(MEDIUM).flops, costs.training(MEDIUM).flops
    assert 2.0 * forward < update < 2.3 * forward, (
        "forward, gradients of activations, the LoRA and flash's recomputation"
    )
    again = costs.training(MEDIUM, checkpointing=True)
    assert again.flops == pytest.approx(update + forward, rel=0.02)
    assert again.bytes < costs.training(MEDIUM).bytes / 8


def test_all_weights_have_gradients() -> None:
    forward, full = costs.forward(NANO).flops, costs.training(NANO.model_copy(update={"tuning": "full"})).flops
    assert full == pytest.approx(3 * forward, rel=0.05)
    lora = costs.training(NANO.model_copy(update={"lora": LoraConfig(rank=4, alpha=8)})).flops
    assert lora < 2.4 * forward


def test_sizes_are_those_of_what_is_loaded() -> None:
    model = load_model(NANO, torch.device("cpu"))
    transformer, vae, *text = model.modules()
    for found, modules in (
        (costs.transformer_size(NANO), [transformer]),
        (costs.vae_size(NANO), [vae]),
        (costs.text_size(NANO), text),
    ):
        assert found.parameters == sum(value.numel() for module in modules for value in module.parameters())
        held = [value for module in modules for value in (*module.parameters(), *module.buffers())]
        assert found.bytes == pytest.approx(sum(value.nbytes for value in held), rel=1e-3)  # buffers of positions


def test_t5_keeps_its_last_matrices_in_float32_beside_float16() -> None:
    half, brain = (costs.text_size(MEDIUM.model_copy(update={"dtype": name})) for name in ("float16", "bfloat16"))
    assert half.bytes - brain.bytes == 24 * 10240 * 4096 * 2
    assert brain.parameters * 2 == pytest.approx(brain.bytes, rel=1e-3)


@pytest.mark.parametrize(
    ("path", "transformer", "text"),
    [
        ("stabilityai/stable-diffusion-3.5-medium", 2.24e9, 5.58e9),  # docs/decisions/0010
        ("stabilityai/stable-diffusion-3.5-large", 8.06e9, 5.58e9),  # "8.1 B"
        ("black-forest-labs/FLUX.1-dev", 11.9e9, 4.89e9),  # "12 B"
        ("Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers", 1.60e9, 2.61e9),  # "1.6 B", Gemma-2-2B
    ],
)
def test_kept_architectures_have_the_published_number_of_parameters(path: str, transformer: float, text: float) -> None:
    name = next(name for name in ("flux", "sana", "sd3") if name in path.lower().replace("stable-diffusion-3", "sd3"))
    config = ModelConfig(family=name, path=path, dtype="bfloat16", height=512, width=512, max_sequence_length=128)
    assert costs.transformer_size(config).parameters == pytest.approx(transformer, rel=0.01)
    assert costs.text_size(config).parameters == pytest.approx(text, rel=0.01)
    here = known(config)
    family(here).check(here, Path(here.path))
    assert path in kept()


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_experiment_here_can_be_counted(file: Path) -> None:
    model = load(file).model
    assert costs.transformer_size(costs.counted(model)).parameters > 1e6
    assert costs.trained(costs.counted(model)).parameters > 1e5


def test_where_text_encoders_wait_is_not_counted_again() -> None:
    changed = MEDIUM.model_copy(update={"text_encoders": "offload", "conditioning_cache": 3})
    assert costs.counted(changed) == costs.counted(MEDIUM)


def test_an_unknown_folder_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"model\.path = nowhere: no such folder"):
        costs.transformer_size(ModelConfig(path="nowhere"))
