"""LoRA tensors by name: nothing is lost on the way, and plain diffusers draws what our sampler draws."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.numpy import load_file

from nft_ray.config import LoraConfig, ModelConfig
from nft_ray.cores.publish import checksum
from nft_ray.cores.sampler import SamplerCore
from nft_ray.downloads.pipelines import location
from nft_ray.models.base import load_model
from nft_ray.models.lora import (
    assign,
    attach,
    export_lora,
    merged,
    random_weights,
    unmerged,
)
from nft_ray.models.sd3 import LORA_TARGETS
from nft_ray.seeding import noise
from nft_ray.types import Adapters, AdapterWeights, Prompt, RolloutItem, RolloutRequest
from tests.examples import example_config
from tests.models.tiny import numpy_weights

CPU = torch.device("cpu")
LORA = LoraConfig(rank=4, alpha=8)
MODEL = ModelConfig()


def test_attach_is_a_function_of_the_seed_and_a_no_op() -> None:
    model = load_model(MODEL, CPU, transformer_only=True)
    with torch.no_grad():
        before = model.velocity(*model.probe())
        state = torch.random.get_rng_state()
        parameters = attach(model.transformer, LORA, LORA_TARGETS, seed=3)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert torch.equal(model.velocity(*model.probe()), before)
    again = attach(load_model(MODEL, CPU, transformer_only=True).transformer, LORA, LORA_TARGETS, seed=3)
    other = attach(load_model(MODEL, CPU, transformer_only=True).transformer, LORA, LORA_TARGETS, seed=4)
    assert checksum(numpy_weights(parameters)) == checksum(numpy_weights(again))
    assert checksum(numpy_weights(parameters)) != checksum(numpy_weights(other))
    trainable = [name for name, value in model.transformer.named_parameters() if value.requires_grad]
    assert len(trainable) == len(parameters) == 2 * (4 * 8 - 1)  # SD3's last block has no attn.to_add_out


def test_merged_and_unmerged_agree_with_the_trained_one() -> None:
    trained = load_model(MODEL, CPU, transformer_only=True)
    parameters = attach(trained.transformer, LORA, LORA_TARGETS, seed=0)
    weights = random_weights(numpy_weights(parameters), seed=1)
    assert assign(parameters, weights) == len(weights)
    with torch.no_grad():
        expected = trained.velocity(*trained.probe())
        for hold in (merged, unmerged):
            model = load_model(MODEL, CPU, transformer_only=True)
            base = model.velocity(*model.probe())
            use = hold(model.transformer, LORA, LORA_TARGETS)
            assert use(weights) == len(weights)
            found = model.velocity(*model.probe())
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            assert (found - base).norm() > 100 * (found - expected).norm()
            use(None)
            assert torch.equal(model.velocity(*model.probe()), base)


def test_weights_that_do_not_fit_are_refused() -> None:
    parameters = attach(load_model(MODEL, CPU, transformer_only=True).transformer, LORA, LORA_TARGETS, seed=0)
    weights = numpy_weights(parameters)
    name = next(iter(weights))
    with pytest.raises(AssertionError, match="names differ"):
        assign(parameters, {key: value for key, value in weights.items() if key != name})
    with pytest.raises(AssertionError, match="!="):
        assign(parameters, weights | {name: weights[name][:1]})


def test_an_unknown_target_is_one_clear_line() -> None:
    model = load_model(MODEL, CPU, transformer_only=True)
    with pytest.raises(ValueError, match=r"^model\.lora\.targets: ") as caught:
        attach(model.transformer, LORA, ("attn.to_z",), seed=0)
    assert "\n" not in str(caught.value)


def test_plain_diffusers_draws_the_same_image_with_the_exported_lora(tmp_path: Path) -> None:
    config = example_config("evaluation.num_steps=6")
    bare = load_model(config.model, CPU, transformer_only=True)
    parameters = attach(bare.transformer, config.model.lora, LORA_TARGETS, seed=0)
    weights = {name: 0.3 * value for name, value in random_weights(numpy_weights(parameters), seed=2).items()}
    seeds, text = (11, 12), "a photo of two circles"
    ours = _our_images(weights, seeds, text)

    export_lora(weights, config.model, tmp_path)
    plain = StableDiffusion3Pipeline.from_pretrained(str(location("nano-sd3")), text_encoder_3=None, tokenizer_3=None)
    plain.set_progress_bar_config(disable=True)

    def draw() -> np.ndarray:
        images = plain(
            [text] * 2,
            height=32,
            width=32,
            num_inference_steps=6,
            guidance_scale=1.0,
            latents=noise(seeds, (8, 8, 8)),
            max_sequence_length=0,
            output_type="np",
        ).images
        return np.round(images * 255).astype(np.uint8)

    without = draw()
    plain.load_lora_weights(str(tmp_path))
    theirs = draw()
    assert np.abs(theirs.astype(int) - ours.astype(int)).max() <= 1  # float32 rounding at a uint8 boundary
    assert np.abs(theirs.astype(int) - without.astype(int)).max() > 20


def test_the_same_weights_give_the_same_file(tmp_path: Path) -> None:
    """To the byte, in whatever process: Python's sets and safetensors' maps are ordered by chance."""
    weights = {f"transformer_blocks.0.attn.to_q.lora_{kind}.weight": np.eye(4, dtype=np.float32) for kind in "BA"}
    found = set()
    for name in map(str, range(8)):
        export_lora(weights, ModelConfig(lora=LORA), tmp_path / name)
        found.add((tmp_path / name / "pytorch_lora_weights.safetensors").read_bytes())
    (file,) = found
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:end])
    assert list(header) == sorted(header)
    assert list(header["__metadata__"]) == ["format", "lora_adapter_metadata"]
    metadata = json.loads(header["__metadata__"]["lora_adapter_metadata"])
    assert metadata["transformer.target_modules"] == sorted(LORA_TARGETS)  # not in a set's order
    assert end % 8 == 0, "the tensors are aligned, as safetensors writes them"
    loaded = load_file(tmp_path / "0" / "pytorch_lora_weights.safetensors")
    assert {f"transformer.{name}" for name in weights} == loaded.keys()
    assert all(np.array_equal(value, np.eye(4)) for value in loaded.values())


def _our_images(weights: dict[str, np.ndarray], seeds: tuple[int, ...], text: str) -> np.ndarray:
    core = SamplerCore(example_config("evaluation.num_steps=6"))
    pair = AdapterWeights(old=weights, ema=weights)
    nothing = np.zeros(1, np.float32)
    core.load(Adapters(version=0, weights=None, num_tensors=0, checksums={}, probe=nothing, probe_base=nothing), pair)
    items = (RolloutItem(group_id=0, prompt=Prompt(id=0, text=text), seeds=seeds),)
    request = RolloutRequest(epoch=0, items=items, adapter="ema", policy_version=0, split="eval")
    return core.rollout(request)[1]
