"""Several runs on one cluster, and what belongs to whom."""

import signal

import pytest

from tests.chaos.cluster import SAMPLER, Cluster, until
from tests.chaos.conftest import Calm, Scenarios


@pytest.mark.full
def test_two_experiments_with_the_same_reward_do_not_meet(
    ray_cluster: Cluster, scenarios: Scenarios, calm: Calm
) -> None:
    """One of them is killed and goes on, five times; the other does not notice."""
    epochs = 12
    reference = calm.run(epochs)
    first = scenarios.run(
        "first", ray_cluster, "run.num_epochs=500", "run.keep_checkpoints=500", "sampler.num_workers=1"
    )
    second = scenarios.run("second", ray_cluster, f"run.num_epochs={epochs}", "sampler.num_workers=1", mlflow=True)
    first.start()
    first.reach(0)
    for _ in range(5):
        second.start()
        second.reach(second.saved + 1)
        first.hit("another experiment with the same reward is killed", second.send, lambda: signal.SIGKILL)
        second.end()
    second.start().same_as(reference, epochs)
    second.once_in_mlflow(epochs)
    first.send(signal.SIGTERM)
    assert first.end(60) == 0, first.said[-3000:]
    first.whole(first.epoch)
    assert first.state(epochs) == reference.state(epochs)
    ray_cluster.nothing_left()


@pytest.mark.full
def test_what_a_killed_run_left_is_collected_by_the_next_run(ray_cluster: Cluster, scenarios: Scenarios) -> None:
    """Whoever comes next, not only the run itself: its applications are those of a dead job."""
    for number in range(5):
        dead = scenarios.run(f"dead{number}", ray_cluster, "run.num_epochs=500").start()
        dead.until("its reward is deployed", lambda dead=dead: dead.line("starting 1 samplers"))
        dead.send(signal.SIGKILL)
        dead.end()
        assert ray_cluster.applications()
        until("its actors end with it", lambda: not ray_cluster.pids(SAMPLER), 30)
        if number < 4:
            scenarios.table.add("a run is killed for good: the next one collects its applications")
    last = scenarios.run("last", ray_cluster, "run.num_epochs=2").start()
    assert last.end() == 0, last.said[-3000:]
    scenarios.table.add("a run is killed for good: the next one collects its applications")
    ray_cluster.nothing_left()
