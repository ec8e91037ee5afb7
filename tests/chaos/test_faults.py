"""Faults that no signal makes (tests/chaos/sabotage): a card's memory, a gradient, a reward's answer, a hang."""

import random
import signal

import pytest

from tests.chaos.cluster import LEARNER, REPLICA, SAMPLER, Cluster, kill
from tests.chaos.conftest import Calm, Scenarios
from tests.chaos.running import Run
from tests.rewards.misbehaving_server import MisbehavingServer

TWO = ("learner.num_workers=2", "learner.max_restarts=20")


FAULTS = {
    "sampler-oom": ("a sampler's card is out of memory", SAMPLER, 2),
    "sampler-xid": ("a sampler's card fails (Xid)", SAMPLER, 2),
    "learner-xid": ("a learner's card fails (Xid)", LEARNER, 1),
    "reward-oom": ("a replica's card is out of memory", REPLICA, 1),
}


def break_device(cluster: Cluster, run: Run, fault: str, event: str, title: str, ready: int) -> None:
    """The next call of such a worker fails as it does with a broken card; returns an epoch after it has happened."""
    run.hit(event, lambda _: cluster.order(fault), lambda: len(cluster.ready(title)) >= ready)
    run.until(f"{fault} has happened", lambda: not cluster.ordered(fault))
    run.reach(run.epoch + 1)


@pytest.mark.full
def test_a_device_breaks_in_a_sampler_a_learner_or_a_replica(
    ray_cluster: Cluster, scenarios: Scenarios, calm: Calm
) -> None:
    """torch's AcceleratorError and OutOfMemoryError, as they come from a card: the worker is replaced.

    By one with the same micro-batch: half of it may give other last bits.
    """
    settings = ("learner.max_restarts=20", "sampler.num_workers=2", "sampler.shrink_on_oom=false", "run.num_epochs=500")
    run = scenarios.run("devices", ray_cluster, *settings).start()
    run.reach(1)
    for _ in range(5):
        for fault, (event, title, ready) in FAULTS.items():
            break_device(ray_cluster, run, fault, event, title, ready)
    run.stopped_as(calm.run)
    ray_cluster.nothing_left()


@pytest.mark.full
def test_a_learner_whose_card_is_too_small_is_told_what_to_lower(ray_cluster: Cluster, scenarios: Scenarios) -> None:
    """Once may be an accident. After that, where it may, it takes smaller micro-batches: other last bits."""
    settings = ("learner.max_restarts=20", "learner.shrink_on_oom=true", "run.num_epochs=500")
    run = scenarios.run("memory", ray_cluster, *settings).start()
    run.reach(1)
    for _ in range(5):
        break_device(ray_cluster, run, "learner-oom", "a learner's card is out of memory", LEARNER, 1)
    run.send(signal.SIGTERM)
    assert run.end() == 0, run.said[-3000:]
    run.whole(run.saved)
    assert run.line("micro_batch_size = "), run.said[-3000:]
    ray_cluster.nothing_left()


@pytest.mark.full
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(ray_cluster: Cluster, scenarios: Scenarios) -> None:
    run = scenarios.run("nan", ray_cluster, "run.num_epochs=500").start()
    for _ in range(5):
        run.reach(run.epoch + 2)
        run.hit("a velocity is NaN", lambda _: ray_cluster.order("velocity-nan"), lambda: True)
        run.until("it has happened", lambda: not ray_cluster.ordered("velocity-nan"))
        run.reach(run.epoch + 1)  # an epoch that left out a step is no checkpoint: the next one is
    run.send(signal.SIGTERM)
    assert run.end() == 0, run.said[-3000:]
    run.whole(run.saved)
    assert sum(line.get("nft/skipped_steps", 0) for line in run.lines()) == 5, run.lines()
    assert run.line("not finite"), run.said[-3000:]
    assert all(b"nan" not in str(line).encode() for line in run.lines())
    ray_cluster.nothing_left()


@pytest.mark.full
def test_an_infinite_reward_is_missing_and_named(ray_cluster: Cluster, scenarios: Scenarios) -> None:
    epochs = 10
    run = scenarios.run("inf", ray_cluster, f"run.num_epochs={epochs}").start()
    run.reach(1)
    for _ in range(5):
        run.hit("a reward returns inf", lambda _: ray_cluster.order("reward-inf"), lambda: True)
    assert run.end() == 0, run.said[-3000:]
    assert [line["epoch"] for line in run.lines()] == list(range(epochs + 1))
    assert sum(line.get("reward/missing", 0) for line in run.lines()) > 0
    assert run.line("geneval.*(infinite|no number)"), run.said[-3000:]
    ray_cluster.nothing_left()


@pytest.mark.full
def test_a_reward_without_signal_stops_the_run_with_its_name(ray_cluster: Cluster, scenarios: Scenarios) -> None:
    """All images of all groups earn the same: no step, and after `run.max_epochs_without_signal` the end."""
    run = scenarios.run("flat", ray_cluster, "run.num_epochs=30").start()
    run.reach(1)
    (ray_cluster.faults / "reward-constant").touch()
    try:
        status = run.end(90)
    finally:
        (ray_cluster.faults / "reward-constant").unlink()
    assert status != 0, run.said[-3000:]
    assert run.epoch < 15
    assert "in no group did the reward differ" in run.last_line, run.said[-3000:]
    run.table.add("a reward is constant in all groups: the run stops")
    ray_cluster.nothing_left()


@pytest.mark.full
def test_training_never_waits_for_a_reward_that_only_monitors(
    ray_cluster: Cluster, scenarios: Scenarios, calm: Calm
) -> None:
    """Its server answers 500, or nothing at all: not one epoch is later for it, and the update is the same."""
    epochs = 10
    reference = calm.run(epochs)
    for answer in ("500", "hang"):
        with MisbehavingServer(answer) as server:
            section = f"{{eval_only: true, num_cpus: 0.1, deadline_s: 10, urls: ['{server.url}']}}"
            settings = (f"rewards.unified_reward={section}", "scorers.monitor_timeout_s=15", f"run.num_epochs={epochs}")
            run = scenarios.run(f"monitor-{answer}", ray_cluster, *settings).start()
            run.reach(epochs, 100)
            run.table.add("a monitor-only reward is down, per epoch", injected=epochs)
            assert run.end(150) == 0, run.said[-3000:]
        assert [line["epoch"] for line in run.lines()] == list(range(epochs + 1))
        assert max(line["time/epoch_s"] for line in run.lines()[2:]) < 5
        assert run.state(epochs) == reference.state(epochs)
    ray_cluster.nothing_left()


@pytest.mark.full
@pytest.mark.parametrize(
    ("title", "event", "setting"),
    [
        (SAMPLER, "a sampler hangs (SIGSTOP)", "sampler.timeout_s=15"),
        (LEARNER, "a learner hangs (SIGSTOP)", "learner.timeout_s=15"),
        (REPLICA, "a reward replica hangs (SIGSTOP)", "scorers.timeout_s=8"),
    ],
)
def test_a_worker_that_hangs_is_replaced(
    title: str, event: str, setting: str, ray_cluster: Cluster, scenarios: Scenarios, calm: Calm
) -> None:
    """Stopped, not killed: no connection breaks. Its deadline is what finds it, and the log says who it was."""
    chosen = random.Random(6)
    two = TWO if title == LEARNER else ("learner.num_workers=1",)
    more = ("sampler.num_workers=2", "rewards.geneval.num_replicas=2", "scorers.max_attempts=5")
    run = scenarios.run("hangs", ray_cluster, *two, *more, setting, "run.num_epochs=500").start()
    run.reach(1)
    for _ in range(5):
        stopped: list[int] = []

        def stop(pids: list[int], stopped: list[int] = stopped) -> None:
            stopped += pids
            kill(pids, signal.SIGSTOP)

        run.hit(event, stop, lambda: ray_cluster.some(title, 1, chosen))
        if title == REPLICA:  # Serve's own health check replaces it, in a minute or so: wait for no such thing
            kill(stopped, signal.SIGKILL)
    run.stopped_as(lambda reached: calm.run_on(ray_cluster, reached, *TWO) if title == LEARNER else calm.run(reached))
    ray_cluster.nothing_left()
