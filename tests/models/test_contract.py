"""Every model family keeps the contract of nft_ray.models.base.FlowModel, and draws what plain diffusers draws."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from nft_ray.config import ExperimentConfig, LoraConfig, ModelConfig
from nft_ray.cores.learner import LearnerCore
from nft_ray.cores.publish import verify
from nft_ray.cores.sampler import SamplerCore
from nft_ray.models.base import FlowModel, check_model, families, family, load_model, repeat, sizes
from nft_ray.models.lora import attach, export_lora, num_trained, random_weights
from nft_ray.seeding import noise
from nft_ray.types import Adapters, AdapterWeights, Prompt, RolloutItem, RolloutRequest, TrainGroup, Weights
from tests.examples import example_config
from tests.models.tiny import KINDS, OF_EACH_FAMILY, numpy_weights, tiny_model

CPU = torch.device("cpu")
NANO = ModelConfig()
PROMPTS = ("a photo of two red circles", "a dog (blue)")
SEEDS = (11, 12)
STEPS = 5
LORA = LoraConfig(rank=4, alpha=8)
every_kind = pytest.mark.parametrize("kind", KINDS)


def test_every_family_has_a_tiny_pipeline_here() -> None:
    assert sorted({family for _, family in KINDS.values()}) == families()
    assert sorted(KINDS[kind][1] for kind in OF_EACH_FAMILY) == families()


@every_kind
def test_a_batch_is_its_single_images(kind: str, tiny_folder: Path) -> None:
    config = tiny_model(kind, tiny_folder)
    model = load_model(config, CPU)
    conditioning, alone = model.encode(PROMPTS), model.encode(PROMPTS[1:])
    for name, value in repeat(conditioning, torch.tensor([1])).items():
        assert torch.equal(value, alone[name])
    x = noise(SEEDS, model.latent_shape)
    t = torch.tensor([0.25, 0.75])
    with torch.no_grad():
        v, single = model.velocity(x, t, conditioning), model.velocity(x[1:], t[1:], alone)
        other = model.velocity(x[1:], t[1:], repeat(conditioning, torch.tensor([0])))
    assert (v.shape, v.dtype) == (x.shape, torch.float32)
    torch.testing.assert_close(v[1:], single, rtol=1e-4, atol=1e-5)
    assert (single - other).norm() > 1e-3 * single.norm()  # the prompt matters
    images = model.decode(x)
    assert (images.shape, images.dtype) == ((2, config.height, config.width, 3), torch.uint8)
    assert (images[1:].int() - model.decode(x[1:]).int()).abs().max() <= 1


@every_kind
def test_the_image_of_a_seed_is_that_of_plain_diffusers(kind: str, tiny_folder: Path) -> None:
    config = tiny_model(kind, tiny_folder)
    ours = our_images(experiment(config), None)
    theirs = plain_images(plain_pipeline(config), config)
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1  # float32 rounding at a uint8 boundary
    assert (ours == theirs).mean() > 0.99
    assert ours.std() > 10


@every_kind
def test_an_exported_lora_gives_our_image_in_plain_diffusers(kind: str, tiny_folder: Path, tmp_path: Path) -> None:
    config = tiny_model(kind, tiny_folder, lora=LORA)
    bare = load_model(config, CPU, transformer_only=True)
    weights = random_weights(numpy_weights(attach(bare.transformer, LORA, bare.lora_targets, seed=0)), seed=2)
    weights = {name: 2 * value for name, value in weights.items()}
    ours, base = our_images(experiment(config), weights), our_images(experiment(config), None)
    assert np.abs(ours.astype(int) - base.astype(int)).max() > 20
    export_lora(weights, config, tmp_path)
    plain = plain_pipeline(config)
    plain.load_lora_weights(str(tmp_path))
    theirs = plain_images(plain, config)
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1
    assert (ours == theirs).mean() > 0.99


@every_kind
def test_sigmas_are_the_pipelines_own(kind: str, tiny_folder: Path) -> None:
    for changes in ({}, {"height": 64, "width": 32}):  # FLUX shifts by resolution
        config = tiny_model(kind, tiny_folder, **changes)
        sigmas = load_model(config, CPU, transformer_only=True).sigmas(STEPS)
        assert (sigmas.shape, sigmas.dtype) == ((STEPS + 1,), torch.float32)
        assert 0.99 < sigmas[0] <= 1
        assert sigmas[-1] == 0
        assert (sigmas.diff() < 0).all()
        plain = plain_pipeline(config)
        plain(**arguments(config), height=config.height, width=config.width, num_inference_steps=STEPS)
        assert torch.equal(sigmas, plain.scheduler.sigmas)


@every_kind
def test_the_velocity_is_differentiable_in_the_lora_alone(kind: str, tiny_folder: Path) -> None:
    model = load_model(tiny_model(kind, tiny_folder), CPU, transformer_only=True)
    parameters = attach(model.transformer, LORA, model.lora_targets, seed=0)
    x, t, conditioning = model.probe()
    model.velocity(x, t, conditioning).square().mean().backward()
    moved = {name for name, value in parameters.items() if value.grad is not None and value.grad.abs().max() > 0}
    assert any(".lora_B." in name for name in moved)  # lora_A gets none while B is zero
    others = {name: value for name, value in model.transformer.named_parameters() if "lora" not in name}
    assert all(value.grad is None for value in others.values())


def trained(model: FlowModel, config: ModelConfig) -> Weights:
    return numpy_weights(attach(model.transformer, config.lora, model.lora_targets, seed=0))


@every_kind
def test_a_learner_loads_the_transformer_alone(kind: str, tiny_folder: Path, tmp_path: Path) -> None:
    config = tiny_model(kind, tiny_folder)
    whole = load_model(config, CPU)
    (tmp_path / "vae").mkdir()
    for file in ("model_index.json", "scheduler", "transformer", "vae/config.json"):  # nothing else is there to load
        source = Path(config.path) / file
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / file)
    bare = load_model(config.model_copy(update={"path": str(tmp_path)}), CPU, transformer_only=True)
    with torch.no_grad():
        assert torch.equal(whole.velocity(*whole.probe()), bare.velocity(*bare.probe()))
    assert bare.latent_shape == whole.latent_shape
    known = sizes(config)
    assert known is not None
    assert known.latent_shape == whole.latent_shape
    assert known.conditioning == sum(value.numel() for value in whole.encode(PROMPTS[:1]).values())
    assert num_trained(config) == sum(value.size for value in trained(bare, config).values())
    with pytest.raises(AssertionError):
        bare.encode(PROMPTS)
    with pytest.raises(AssertionError):
        bare.decode(noise(SEEDS, bare.latent_shape))


@every_kind
def test_what_is_empty_has_the_same_shapes(kind: str, tiny_folder: Path) -> None:
    config = tiny_model(kind, tiny_folder)
    whole, empty = load_model(config, CPU), family(config).empty(config, Path(config.path))
    assert {name: value.shape for name, value in empty.transformer.named_parameters()} == {
        name: value.shape for name, value in whole.transformer.named_parameters()
    }
    assert all(value.is_meta for value in (*empty.transformer.parameters(), *empty.transformer.buffers()))
    assert empty.latent_shape == whole.latent_shape
    with torch.no_grad():
        v = empty.velocity(
            *(
                {name: value.to("meta") for name, value in part.items()} if isinstance(part, dict) else part.to("meta")
                for part in whole.probe()
            )
        )
    assert (v.shape, v.is_meta) == ((1, *whole.latent_shape), True)
    known = sizes(config)
    assert known is not None
    assert known.tokens == whole.encode(PROMPTS[:1])["prompt_embeds"].shape[1]


@every_kind
def test_sixteen_bits(kind: str, tiny_folder: Path) -> None:
    exact = load_model(tiny_model(kind, tiny_folder), CPU)
    config = tiny_model(kind, tiny_folder, dtype="bfloat16", text_encoder_dtype="float32")
    model = load_model(config, CPU)
    assert {value.dtype for value in model.transformer.parameters()} == {torch.bfloat16}
    conditioning, reference = model.encode(PROMPTS), exact.encode(PROMPTS)
    for name, value in conditioning.items():
        if "mask" not in name:
            assert torch.equal(value, reference[name].bfloat16())  # the text encoders keep their own 32 bits
    x, t = noise(SEEDS, model.latent_shape), torch.tensor([0.25, 0.75])
    with torch.no_grad():
        v, wanted = model.velocity(x, t, conditioning), exact.velocity(x, t, reference)
    assert v.dtype == torch.float32
    assert (v - wanted).norm() < 0.05 * wanted.norm()
    sixteen = load_model(config.model_copy(update={"text_encoder_dtype": None}), CPU).encode(PROMPTS)
    assert any(not torch.equal(sixteen[name], conditioning[name]) for name in sixteen)
    assert model.decode(x).shape == exact.decode(x).shape


@pytest.mark.parametrize("kind", OF_EACH_FAMILY)
def test_what_a_sampler_gives_trains_a_learner(kind: str, tiny_folder: Path) -> None:
    config = experiment(tiny_model(kind, tiny_folder, lora=LORA))
    sampler, learner = SamplerCore(config), LearnerCore(config)
    ((adapters, weights),) = learner.adapters()
    verify(adapters, sampler.load(adapters, weights), config.model.dtype)
    item = RolloutItem(group_id=0, prompt=Prompt(id=0, text=PROMPTS[0]), seeds=(1, 2, 3, 4))
    request = RolloutRequest(epoch=0, items=(item,), adapter="old", policy_version=0, split="train")
    _, _, samples = sampler.rollout(request)
    assert samples is not None
    r = np.array([0.0, 0.3, 0.7, 1.0], np.float32)
    group = TrainGroup(group_id=0, samples=None, weight=r, step=np.zeros(4, np.int32))
    result, moved = learner.update(0, [group], [samples], (4,))
    assert result.metrics["nft/kl"] < 1e-6  # version 0 IS the reference: both velocities must be the same
    assert result.metrics["nft/grad_norm"] > 0
    verify(result.adapters, sampler.load(result.adapters, moved), config.model.dtype)
    assert any(not np.array_equal(moved.ema[name], weights.ema[name]) for name in weights.ema)


def test_flux_is_told_its_guidance(tiny_folder: Path) -> None:
    velocities = []
    for guidance in (None, 3.5, 7.0):
        model = load_model(tiny_model("flux_dev", tiny_folder, distilled_guidance=guidance), CPU, transformer_only=True)
        with torch.no_grad():
            velocities.append(model.velocity(*model.probe()))
    assert torch.equal(velocities[0], velocities[1])
    assert not torch.equal(velocities[1], velocities[2])


def test_other_sizes_than_squares(tiny_folder: Path) -> None:
    for kind in OF_EACH_FAMILY:
        config = tiny_model(kind, tiny_folder, height=48, width=32)
        assert our_images(experiment(config), None).shape == (2, 48, 32, 3)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (None, {"family": "sd4"}, "model.family = 'sd4': unknown; did you mean sd3?"),
        (None, {"path": "/no/such/folder"}, "model.path = /no/such/folder: no such folder; name a folder, a Hub id or"),
        (None, {"path": "nano_sd3"}, "model.path = nano_sd3: no such folder"),
        (None, {"height": 36}, "model.height = 36: must be a multiple of 8 pixels; nearest: 32 or 40"),
        (None, {"max_sequence_length": 8}, "model.max_sequence_length = 8: this pipeline has no T5; use 0"),
        (None, {"distilled_guidance": 3.5}, "model.distilled_guidance = 3.5: sd3 has no guidance embedding"),
        ("sd35_medium", {"width": 72}, "model.width = 72: this model's positions end at 64 pixels"),
        ("sd35_medium", {"max_sequence_length": 513}, "model.max_sequence_length = 513: use at most 512"),
        ("sd35_medium", {"family": "flux"}, "is a StableDiffusion3Pipeline; model.family flux needs a FluxPipeline"),
        ("flux_dev", {"max_sequence_length": 0}, "model.max_sequence_length = 0: FLUX reads prompts with T5; use 1 to"),
        ("flux_dev", {"height": 4}, "model.height = 4: must be a multiple of 8 pixels; nearest: 8"),
        ("flux_schnell", {"distilled_guidance": 2.0}, "this FLUX has no guidance embedding; leave it out"),
        ("sana", {"max_sequence_length": 0}, "model.max_sequence_length = 0: Sana reads prompts with Gemma"),
    ],
)
def test_a_wrong_model_is_one_clear_line(
    kind: str | None, changes: dict[str, Any], message: str, tiny_folder: Path
) -> None:
    config = NANO if kind is None else tiny_model(kind, tiny_folder)
    with pytest.raises(ValueError) as caught:
        check_model(config.model_copy(update=changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("gone", "named"),
    [
        ("model_index.json", "holds no model_index.json"),
        ("transformer/diffusion_pytorch_model.safetensors", "lacks transformer/*.safetensors"),
        ("text_encoder_3", "lacks text_encoder_3/config.json"),
        ("tokenizer_2", "lacks tokenizer_2/"),
        ("vae/diffusion_pytorch_model.safetensors", "lacks vae/*.safetensors"),
    ],
)
def test_a_folder_that_lacks_a_part_is_one_clear_line(gone: str, named: str, tiny_folder: Path, tmp_path: Path) -> None:
    config = tiny_model("sd35_medium", tiny_folder)
    folder = tmp_path / "cut"
    shutil.copytree(config.path, folder)
    (shutil.rmtree if (folder / gone).is_dir() else Path.unlink)(folder / gone)
    with pytest.raises(ValueError, match=r"^model\.path = ") as caught:
        check_model(config.model_copy(update={"path": str(folder)}))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def experiment(model: ModelConfig) -> ExperimentConfig:
    return example_config(f"evaluation.num_steps={STEPS}").model_copy(update={"model": model})


def our_images(config: ExperimentConfig, weights: Weights | None) -> np.ndarray:
    """Two prompts, a seed each, through a sampler: with a LoRA, or the base model."""
    core = SamplerCore(config)
    if weights is not None:
        pair = AdapterWeights(old=weights, ema=weights)
        core.load(Adapters(version=0, weights=None, num_tensors=0, checksums={}, probe=None, probe_base=None), pair)
    items = tuple(
        RolloutItem(group_id=i, prompt=Prompt(id=i, text=text), seeds=(seed,))
        for i, (text, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True))
    )
    adapter = "reference" if weights is None else "ema"
    return core.rollout(RolloutRequest(epoch=0, items=items, adapter=adapter, policy_version=0, split="eval"))[1]


def plain_pipeline(config: ModelConfig) -> Any:
    without_t5 = {} if config.max_sequence_length else {"text_encoder_3": None, "tokenizer_3": None}
    plain = family(config).PIPELINE.from_pretrained(config.path, **without_t5)
    plain.set_progress_bar_config(disable=True)
    return plain


def arguments(config: ModelConfig) -> dict[str, Any]:
    """What a plain pipeline is called with besides prompts and noise."""
    own = {
        "sd3": {"guidance_scale": 1.0},
        "flux": {"guidance_scale": 3.5},
        "sana": {"guidance_scale": 1.0, "use_resolution_binning": False},
    }
    prompts = {"prompt": list(PROMPTS), "max_sequence_length": config.max_sequence_length}
    return {**prompts, **own[config.family], "output_type": "np"}


def plain_images(plain: Any, config: ModelConfig) -> np.ndarray:
    """The images of plain diffusers from the same noise by the same Euler steps, uint8 (2, H, W, 3)."""
    x = noise(SEEDS, (4, config.height // 4, config.width // 4))
    options = arguments(config)
    if config.family == "flux":
        x = plain._pack_latents(x, *x.shape)
    if config.family == "sana":  # its own solver is of second order and counts whole timesteps: take plain Euler
        plain.scheduler.set_timesteps(STEPS)
        options["sigmas"] = plain.scheduler.sigmas[:-1].tolist()
        plain.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    size = {"height": config.height, "width": config.width}
    images = plain(**options, **size, num_inference_steps=STEPS, latents=x).images
    return np.round(images * 255).astype(np.uint8)
