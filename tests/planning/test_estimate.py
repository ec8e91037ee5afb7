"""Seconds of work: what must change them does, by the amount that it must; every preset has them."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from nft_ray.config import ExperimentConfig, load
from nft_ray.planning import costs
from nft_ray.planning.devices import Device, device_named
from nft_ray.planning.estimate import estimate, work_of
from nft_ray.planning.work import Work
from tests.examples import example_config

CONFIGS = Path(__file__).parents[2] / "configs"
CPU, CARD = device_named("cpu"), device_named("h100")


def device(**changes: Any) -> Device:
    return CARD.model_copy(update=changes)


FREE = device(operation_s=0.0)
"""Launching costs nothing: arithmetic alone."""


def work(*overrides: str, on: Device = FREE) -> Work:
    return work_of(example_config(*overrides), on)


def test_velocities_per_image() -> None:
    """4 steps, 2 training times, v_old alone; heun takes two stages but for the last, guidance two rows."""
    base = work()
    per_velocity = base.draw_s / 4
    assert base.velocities_s == pytest.approx(2 * per_velocity)
    assert work("algorithm.kl_weight=0.01").velocities_s == pytest.approx(4 * per_velocity)
    assert work("sampler.solver=heun").draw_s == pytest.approx(7 * per_velocity)
    assert work("sampler.guidance=2").draw_s == pytest.approx(8 * per_velocity)
    assert base.draw_eval_s == pytest.approx(4 * per_velocity)
    assert work("evaluation.num_steps=8").draw_eval_s == pytest.approx(8 * per_velocity)


def test_a_velocity_is_its_flops_over_the_rate() -> None:
    config = example_config()
    item = costs.forward(costs.counted(config.model))
    rate = CARD.matmul_per_s["float32"] * CARD.utilisation.sampling
    assert work_of(config, FREE).draw_s == pytest.approx(4 * item.flops / rate)
    launched = work_of(config, device(operation_s=1e-5)).draw_s - work_of(config, FREE).draw_s
    assert launched == pytest.approx(4 * item.operations * 1e-5 / 4), "a group of 4 is one micro-batch"


def test_compiled_blocks_fill_up_the_last_micro_batch() -> None:
    sixty_four = work("sampler.compile=true", "sampler.micro_batch_size=64")
    assert sixty_four.draw_s == pytest.approx(16 * work("sampler.micro_batch_size=64").draw_s)
    assert work("sampler.compile=true", "sampler.micro_batch_size=4").draw_s == pytest.approx(work().draw_s)


def test_an_update_is_all_pairs_of_an_image() -> None:
    assert work("sampler.num_times=4").update_s == pytest.approx(2 * work().update_s)
    assert work("learner.gradient_checkpointing=true").update_s > 1.3 * work().update_s
    small, large = (work(f"learner.micro_batch_size={size}", on=CPU).update_s for size in (1, 64))
    assert small > 2 * large, "launching is shared by a micro-batch"


def test_more_learners_reduce_over_a_ring_and_over_the_network_beyond_a_node() -> None:
    one, two, eight, nine = (work(f"learner.num_workers={count}").step_s for count in (1, 2, 8, 9))
    trained = costs.trained(costs.counted(example_config().model)).parameters * 4
    assert two - one == pytest.approx(trained / CARD.link_bytes_per_s)
    assert eight - one == pytest.approx(2 * 7 / 8 * trained / CARD.link_bytes_per_s)
    assert nine - one == pytest.approx(2 * 8 / 9 * trained / CARD.network_bytes_per_s)


def test_text_encoders_that_are_lent_come_once_per_request() -> None:
    resident, offloaded = work(), work("model.text_encoders=offload")
    assert resident.lend_s == 0
    text = costs.text_size(costs.counted(example_config().model)).bytes
    assert offloaded.lend_s == pytest.approx(text / CARD.pageable_copy_bytes_per_s)
    assert offloaded.encode_s == resident.encode_s
    precomputed = work("model.precomputed=prompts")
    assert precomputed.lend_s == 0
    assert precomputed.encode_s == pytest.approx(resident.group_bytes / CARD.pageable_copy_bytes_per_s)


def test_only_colocated_sides_are_swapped() -> None:
    assert work().swap_s == {}
    shared = ("cluster.placement=colocated", "sampler.num_workers=1", "sampler.num_gpus=0.5", "learner.num_gpus=0.5")
    swaps = work(*shared).swap_s
    assert swaps["sampler"] > swaps["learner"] > 0
    assert work(*shared, on=CPU).swap_s == {"sampler": 0, "learner": 0}


def test_the_second_estimate_is_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    estimate(example_config(), CARD)

    def counted_again(*_: Any) -> None:
        raise AssertionError("a model was counted again")

    monkeypatch.setattr(costs, "_empty", counted_again)
    monkeypatch.setattr(costs, "_vae", counted_again)
    estimate(example_config("learner.micro_batch_size=3", "model.text_encoders=offload", "sampler.num_steps=3"), CARD)


def all_numbers(work: Work) -> list[float]:
    found: list[float] = []
    for value in asdict(work).values():
        found += value.values() if isinstance(value, dict) else [value]
    return found


def presets() -> list[tuple[str, str, ExperimentConfig]]:
    return [
        (file.stem, profile, load(file, [f"cluster={profile}"]))
        for file in sorted(CONFIGS.glob("[sf][dl]*.yaml"))
        for profile in ("one_gpu", "eight_gpus", "thirty_two_gpus")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("card", ["h100", "l40s"])
def test_every_preset_has_seconds_and_bytes(card: str) -> None:
    assert len(presets()) == 21
    for name, profile, config in presets():
        for stage in config.stage_configs:
            seconds, peak = estimate(stage, device_named(card))
            assert all(value >= 0 for value in all_numbers(seconds)), (name, profile)
            assert {*seconds.score_s} == {*stage.reward_configs} == {*peak.rewards}
            assert 2e9 < peak.sampler < 80e9, (name, profile)
            assert 2e9 < peak.learner < 80e9, (name, profile)


def test_the_cpus_figures_are_near_what_was_measured() -> None:
    """nano-sd3, one thread (benchmarks/results/scaling.json): 23.5 ms per sample of 9 times."""
    found = work_of(load(CONFIGS / "quickstart.yaml", ["sampler.num_times=9"]), CPU)
    assert found.update_s == pytest.approx(0.0235, rel=0.3)
