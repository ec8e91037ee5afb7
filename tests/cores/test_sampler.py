"""The sampler core: the same images for the same request, the learner's velocities, and proof of every load."""

import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from nft_ray.config import ExperimentConfig
from nft_ray.cores.learner import LearnerCore
from nft_ray.cores.publish import PROBE_FLOOR, verify
from nft_ray.cores.sampler import SamplerCore
from nft_ray.seeding import image_seed
from nft_ray.types import AdapterWeights, Prompt, RolloutItem, RolloutRequest, TrainGroup, Weights
from tests.examples import example_config


def request(config: ExperimentConfig, adapter: str = "old", version: int = -1, split: str = "train") -> RolloutRequest:
    prompt = Prompt(id=7, text="a photo of a red circle")
    seeds = tuple(image_seed(0, 0, 7, i) for i in range(config.prompts.images_per_group))
    items = (RolloutItem(group_id=7, prompt=prompt, seeds=seeds),)
    return RolloutRequest(epoch=0, items=items, adapter=adapter, policy_version=version, split=split)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def config() -> ExperimentConfig:
    return example_config(kl_weight=0.1)


@pytest.fixture(scope="module")
def learner(config: ExperimentConfig) -> LearnerCore:
    return LearnerCore(config)


def loaded(config: ExperimentConfig, learner: LearnerCore) -> SamplerCore:
    core = SamplerCore(config)
    adapters, weights = learner.probe()
    verify(adapters, core.load(adapters, weights), config.model.dtype)
    return core


def test_a_rollout_has_the_shapes_it_promises(config: ExperimentConfig, learner: LearnerCore) -> None:
    info, images, samples = loaded(config, learner).rollout(request(config))
    assert images.shape == (4, 32, 32, 3)
    assert images.dtype == np.uint8
    assert samples is not None
    assert samples.v_ref is not None
    assert samples.x0.shape == (4, 8, 8, 8)
    assert samples.v_old.shape == samples.v_ref.shape == (4, 2, 8, 8, 8)
    assert samples.t.shape == samples.noise_seeds.shape == (4, 2)
    assert len(set(samples.noise_seeds.ravel().tolist())) == 8
    assert info.policy_version == -1


@pytest.mark.parametrize("split", ["train", "eval"])
def test_num_bytes_are_all_that_goes_through_the_object_store(
    config: ExperimentConfig, learner: LearnerCore, split: str
) -> None:
    info, images, samples = loaded(config, learner).rollout(request(config, split=split))
    names = 4096  # pickle says besides what the arrays are called
    assert 0 < len(pickle.dumps((images, samples))) - info.num_bytes < names


def test_what_was_done_before_changes_nothing(config: ExperimentConfig, learner: LearnerCore) -> None:
    fresh, used = loaded(config, learner), loaded(config, learner)
    used.rollout(request(config, adapter="reference", split="eval"))
    used.rollout(request(config, adapter="ema", split="eval"))
    _, images, samples = fresh.rollout(request(config))
    _, again, same = used.rollout(request(config))
    assert samples is not None
    assert same is not None
    np.testing.assert_array_equal(images, again)
    np.testing.assert_array_equal(samples.v_old, same.v_old)


def test_an_image_does_not_depend_on_its_neighbours(config: ExperimentConfig, learner: LearnerCore) -> None:
    core, whole = loaded(config, learner), request(config)
    (item,) = whole.items
    part = dataclasses.replace(whole, items=(dataclasses.replace(item, seeds=item.seeds[2:]),))
    _, _, all_samples = core.rollout(whole)
    _, _, some = core.rollout(part)
    assert all_samples is not None
    assert some is not None
    np.testing.assert_array_equal(all_samples.noise_seeds[2:], some.noise_seeds)
    np.testing.assert_array_equal(all_samples.t[2:], some.t)
    np.testing.assert_allclose(all_samples.x0[2:], some.x0, rtol=1e-4, atol=1e-4)  # batches round differently


def test_merging_from_the_pristine_weights_does_not_drift(config: ExperimentConfig, learner: LearnerCore) -> None:
    core = loaded(config, learner)
    pristine = {name: value.clone() for name, value in SamplerCore(config).model.transformer.state_dict().items()}
    for _ in range(100):
        core._use("old", -1, reload=True)
        core._use("reference", -1, reload=True)
    assert all(torch.equal(value, pristine[name]) for name, value in core.model.transformer.state_dict().items())


@pytest.mark.parametrize("field", ["num_tensors", "checksums", "probe"])
def test_a_load_that_moved_something_else_stops_the_run(
    field: str, config: ExperimentConfig, learner: LearnerCore
) -> None:
    core = SamplerCore(config)
    adapters, weights = learner.probe()
    receipt = core.load(adapters, weights)
    wrong = {"num_tensors": 3, "checksums": {"old": "0", "ema": "0"}, "probe": adapters.probe_base}[field]
    with pytest.raises(RuntimeError, match=r"differs|another velocity"):
        verify(adapters, dataclasses.replace(receipt, **{field: wrong}), config.model.dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_lora_from_a_file_must_move_the_velocity(dtype: str, learner: LearnerCore) -> None:
    adapters, weights = learner.probe()
    from_file = dataclasses.replace(adapters, probe=None, probe_base=None)
    receipt = SamplerCore(example_config(f"model.dtype={dtype}")).load(from_file, weights)
    verify(from_file, receipt, dtype)
    with pytest.raises(RuntimeError, match="the velocity is the base model's"):
        verify(from_file, dataclasses.replace(receipt, probe=receipt.probe_base), dtype)
    (nothing, no_op), *_ = learner.adapters()
    unmoved = dataclasses.replace(nothing, probe=None, probe_base=None)
    with pytest.raises(RuntimeError, match="the velocity is the base model's"):
        verify(unmoved, SamplerCore(example_config(f"model.dtype={dtype}")).load(unmoved, no_op), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_probe_floor_is_what_rounding_explains(dtype: str) -> None:
    config = example_config(f"model.dtype={dtype}")
    learner, core = LearnerCore(config), SamplerCore(config)
    for adapters, weights in (learner.probe(), *learner.adapters()):
        receipt = core.load(adapters, weights)
        verify(adapters, receipt, dtype)
        difference = np.linalg.norm(adapters.probe - receipt.probe) / np.linalg.norm(adapters.probe)
        assert difference <= PROBE_FLOOR[dtype]


def test_a_version_that_was_not_loaded_is_refused(config: ExperimentConfig, learner: LearnerCore) -> None:
    with pytest.raises(RuntimeError, match="policy version 5 is not loaded"):
        loaded(config, learner).rollout(request(config, version=5))


def test_guidance_changes_the_image() -> None:
    plain, guided = example_config(), example_config("evaluation.guidance=3")
    images = [SamplerCore(c).rollout(request(c, adapter="reference", split="eval"))[1] for c in (plain, guided)]
    assert (images[0] != images[1]).any()


def test_guidance_in_one_forward_is_guidance_in_two() -> None:
    core = SamplerCore(example_config("evaluation.guidance=3", "sampler.num_steps=2"))
    conditioning = core.model.encode(["a photo of a red circle", "a photo of two squares"])
    x = torch.randn(2, *core.model.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = core._velocity_of(conditioning, 2, 3.0)(x, 0.5)
        t, null = torch.full((2,), 0.5), core.model.encode(["", ""])
        v, v_null = core.model.velocity(x, t, conditioning), core.model.velocity(x, t, null)
    torch.testing.assert_close(found, v_null + 3.0 * (v - v_null), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("size", [0.003, 0.3])
def test_the_gradient_of_a_16_bit_run_is_that_of_an_exact_one(dtype: str, size: float) -> None:
    """The bar of docs/decisions/0003 for the defaults, at small and large LoRAs."""
    group = ["prompts.images_per_group=12", "sampler.num_times=4", "algorithm.beta=1"]
    fast = example_config(f"model.dtype={dtype}", "sampler.velocity_dtype=float16", *group)
    exact = example_config("sampler.lora=unmerged", *group)
    gradients, samples = [], None
    for config in (fast, exact):
        learner, sampler = LearnerCore(config), SamplerCore(config)
        announced, whole = learner.probe()
        old, policy = (scaled(whole.old, factor) for factor in (size, 1.1 * size))
        weights = AdapterWeights(old=old, ema=old)
        sampler.load(announced, weights)
        samples = samples or sampler.rollout(request(config))[2]
        assert samples is not None
        conditioning = sampler.model.encode(["a photo of a red circle"])
        v_old = sampler.velocities(torch.from_numpy(samples.x0), samples.t, samples.noise_seeds, conditioning)()
        learner.restore(dataclasses.replace(learner.state(), policy=policy, versions={0: weights}))
        r = np.linspace(0.3, 0.7, 12, dtype=np.float32)
        train = TrainGroup(group_id=0, samples=None, weight=r, step=np.zeros(12, np.int32))
        learner.update(0, [train], [dataclasses.replace(samples, v_old=v_old)], (12,))
        gradients.append(flat_gradient(learner))
    a, b = gradients
    assert 0.99 <= a @ b / (a.norm() * b.norm()) < 1


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_left_the_range_of_its_numbers_is_named_and_sent_as_zeros(dtype: str, learner: LearnerCore) -> None:
    core = SamplerCore(example_config(f"model.dtype={dtype}"))
    adapters, weights = learner.probe()
    core.load(adapters, weights)
    assert core.rollout(request(core.config))[0].non_finite == ()
    next(core.model.transformer.parameters()).data[0] = torch.inf
    for split in ("train", "eval"):
        info, images, samples = core.rollout(request(core.config, split=split))
        assert info.non_finite == (0, 1, 2, 3)
        assert len(np.unique(images.reshape(4, -1), axis=0)) == 1  # what zeros look like
    info, _, samples = core.rollout(request(core.config))
    assert samples is not None
    assert not samples.x0.any()
    assert not samples.v_old.any()


def test_the_neighbours_of_an_image_that_is_not_finite_are_as_good_as_ever(
    config: ExperimentConfig, learner: LearnerCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = loaded(config, learner)
    _, images, expected = core.rollout(request(config))
    draw, velocities = core._draw, core.velocities

    def broken_draw(*arguments: Any) -> torch.Tensor:
        x0 = draw(*arguments)
        x0[1, 0, 0, 0] = torch.nan
        return x0

    def broken_velocities(*arguments: Any) -> Any:
        v = velocities(*arguments)()
        v[3, 1, 0, 0, 0] = np.inf
        return lambda: v

    monkeypatch.setattr(core, "_draw", broken_draw)
    monkeypatch.setattr(core, "velocities", broken_velocities)
    info, again, samples = core.rollout(request(config))
    assert info.non_finite == (1, 3)
    assert samples is not None
    assert expected is not None
    np.testing.assert_array_equal(again[[0, 2, 3]], images[[0, 2, 3]])
    for name in ("x0", "v_old", "v_ref"):
        found, wanted = getattr(samples, name), getattr(expected, name)
        np.testing.assert_array_equal(found[[0, 2]], wanted[[0, 2]])
        assert not found[[1, 3]].any()


def test_a_sampler_goes_back_to_an_earlier_version(config: ExperimentConfig, learner: LearnerCore) -> None:
    adapters, weights = learner.probe()
    core = SamplerCore(config)
    for version in (4, 5, 3, 4):
        core.load(dataclasses.replace(adapters, version=version), weights)
        core.rollout(request(config, version=version))


@pytest.mark.parametrize(("dtype", "hint"), [("float16", "model.dtype = bfloat16"), ("float32", "of no use$")])
def test_a_velocity_that_is_not_finite_is_said_to_be(dtype: str, hint: str, learner: LearnerCore) -> None:
    adapters, weights = learner.probe()
    weights = AdapterWeights(old=scaled(weights.old, 1e30), ema=weights.ema)
    receipt = SamplerCore(example_config(f"model.dtype={dtype}")).load(adapters, weights)
    blown = dataclasses.replace(adapters, checksums=receipt.checksums, probe=receipt.probe)
    with pytest.raises(RuntimeError, match=f"^local: the velocity of version -1 is not finite: .*{hint}") as error:
        verify(blown, receipt, dtype)
    assert "\n" not in str(error.value)


def scaled(weights: Weights, factor: float) -> Weights:
    return {name: value * np.float32(factor if ".lora_B." in name else 1) for name, value in weights.items()}


def flat_gradient(learner: LearnerCore) -> torch.Tensor:
    return torch.cat([value.grad.double().flatten() for value in learner.policy.values() if value.grad is not None])


def test_equal_weights_give_equal_velocities_in_bfloat16() -> None:
    """To the last bit: what rounds in a learner rounds alike in its sampler, so v - v_old starts at 0."""
    config = example_config("model.dtype=bfloat16", "sampler.velocity_dtype=float32")
    learner, sampler = LearnerCore(config), SamplerCore(config)
    adapters, weights = learner.probe()
    receipt = sampler.load(adapters, weights)
    assert np.array_equal(receipt.probe, adapters.probe)
    assert not np.array_equal(receipt.probe, receipt.probe_base)


@pytest.mark.slow
def test_compiled_blocks_see_every_new_version_and_compile_once(compiler: None) -> None:
    """One batch size, a short last chunk included; loading, switching off and guidance trace nothing anew."""
    settings = [
        "sampler.micro_batch_size=6",
        "sampler.lora=unmerged",
        "evaluation.guidance=2",
        "algorithm.kl_weight=0.1",
    ]
    config = example_config(*settings)
    plain, fast = SamplerCore(config), SamplerCore(load_again(config, compile=True))
    learner = LearnerCore(config)
    (first, weights), ((second, start),) = learner.probe(), learner.adapters()
    for core in (plain, fast):
        core.load(first, weights)
    fast.rollout(request(config))  # compiles
    with torch.compiler.set_stance("fail_on_recompile"):
        for adapters, loaded in ((first, weights), (second, start)):
            for core in (plain, fast):
                core.load(adapters, loaded)
            for split in ("train", "eval"):
                asked = request(config, version=adapters.version, split=split)
                (_, images, samples), (_, again, same) = plain.rollout(asked), fast.rollout(asked)
                assert np.abs(images.astype(int) - again.astype(int)).max() <= 2
                if samples is not None and same is not None:
                    np.testing.assert_allclose(samples.v_old, same.v_old, rtol=1e-2, atol=1e-3)
                    assert samples.v_ref is not None
                    assert same.v_ref is not None
                    np.testing.assert_allclose(samples.v_ref, same.v_ref, rtol=1e-2, atol=1e-3)
                    assert np.array_equal(same.v_old, same.v_ref) == (adapters.version == 0)  # version 0 does nothing


def load_again(config: ExperimentConfig, **sampler: object) -> ExperimentConfig:
    return config.model_copy(update={"sampler": config.sampler.model_copy(update=sampler)})


def test_one_image_at_a_time_is_all_of_them_at_once(config: ExperimentConfig, learner: LearnerCore) -> None:
    """Of the smallest micro-batch, and of one that leaves a last piece of one."""
    whole, *others = [
        loaded(load_again(config, micro_batch_size=size), learner).rollout(request(config))[1:] for size in (64, 1, 7)
    ]
    for images, samples in others:
        assert np.abs(images.astype(int) - whole[0].astype(int)).max() <= 1
        assert samples is not None
        assert whole[1] is not None
        np.testing.assert_allclose(samples.v_old, whole[1].v_old, rtol=1e-2, atol=1e-3)
