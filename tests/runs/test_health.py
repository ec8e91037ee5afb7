"""What ends a run, or takes it back, and what only costs itself."""

import dataclasses

import pytest

from nft_ray.config.sections import RunConfig
from nft_ray.runs.health import FLAT, Health, NotFiniteError, not_finite
from nft_ray.types import Adapters, Batch, Rewards, RolloutInfo, ScoredGroup, UpdateResult
from tests.fakes import fake_request

NOTHING = Rewards(raw={}, details={}, total=None, missing={})  # type: ignore[arg-type]
BATCH = Batch(epoch=0, shards=(), samples_per_step=(), metrics={})
ADAPTERS = Adapters(version=0, weights=None, num_tensors=0, checksums={}, probe=None, probe_base=None)
UPDATE = UpdateResult(version=1, num_optimizer_steps=1, metrics={}, steps=(), adapters=ADAPTERS)


def groups(*non_finite: tuple[int, ...]) -> list[ScoredGroup]:
    """Of three images each."""
    info = RolloutInfo(epoch=0, policy_version=0, worker="w", seconds=0.0, num_bytes=0)
    return [
        ScoredGroup(
            request=fake_request(prompt=number),
            info=dataclasses.replace(info, non_finite=places),
            samples=None,
            rewards=NOTHING,
        )
        for number, places in enumerate(non_finite)
    ]


def test_some_images_that_are_not_finite_end_no_run_and_most_of_them_do() -> None:
    assert not_finite(groups((), ()), UPDATE) == ""
    health = Health(RunConfig(name="a", max_skipped_epochs=2))
    for epoch in range(1, 9):
        assert health.check(epoch, groups((1,), (0, 2)), BATCH, UPDATE)
    most = groups((0, 1, 2), (2,))
    assert not health.check(9, most, BATCH, UPDATE)
    with pytest.raises(NotFiniteError, match=r"^epochs 9 to 10: .*\(4 of 6 images, of 'prompt 0', 'prompt 1'\)") as bad:
        health.check(10, most, BATCH, UPDATE)
    assert (bad.value.epoch, bad.value.last_good) == (10, 8)


def test_a_skipped_step_is_named_by_whose_loss_it_was(caplog: pytest.LogCaptureFixture) -> None:
    skipped = dataclasses.replace(UPDATE, skipped_steps=2, culprits=(1,))
    assert not_finite(groups((), ()), skipped) == "2 steps, by 'prompt 1'"
    assert not_finite(groups((), ()), dataclasses.replace(skipped, culprits=())) == "2 steps"
    Health(RunConfig(name="a")).check(
        5, groups((), ()), BATCH, dataclasses.replace(skipped, metrics={"nft/loss_scale": 0.5})
    )
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        "epoch 5: left out, for a gradient was not finite: 2 steps, by 'prompt 1'; float16's loss scale is 0.5 of what "
        "it began with"
    )


def test_a_run_that_stopped_without_signal_does_not_go_on_because_it_is_started_again() -> None:
    run = RunConfig(name="a", max_epochs_without_signal=3, num_epochs=8)
    lines = [{"epoch": epoch, FLAT: float(epoch > 2)} for epoch in range(6)]
    with pytest.raises(RuntimeError, match=r"^epochs 3 to 5: in no group"):
        Health(run).begin(lines)
    Health(run.model_copy(update={"max_epochs_without_signal": None})).begin(lines)
    Health(run.model_copy(update={"num_epochs": 5})).begin(lines)  # only its figures are left
    health = Health(run)
    health.begin(lines[:5])
    with pytest.raises(RuntimeError, match=r"^epochs 3 to 5: in no group"):
        health.check(5, groups(()), dataclasses.replace(BATCH, metrics={FLAT: 1.0}), UPDATE)
