"""Workers of a run die under it: it goes on, and its policy is that of a run that was left in peace."""

import random

import pytest

from tests.chaos.cluster import LEARNER, REPLICA, SAMPLER, Cluster, kill
from tests.chaos.conftest import Calm, Scenarios


@pytest.mark.parametrize("times", [1, pytest.param(4, marks=pytest.mark.full)])
def test_workers_die_one_by_one_and_all_at_once(
    times: int, ray_cluster: Cluster, scenarios: Scenarios, calm: Calm
) -> None:
    chosen = random.Random(times)
    settings = ("run.num_epochs=500", "sampler.num_workers=2", "rewards.geneval.num_replicas=2")
    run = scenarios.run("workers", ray_cluster, *settings, "learner.max_restarts=10", mlflow=True).start()
    run.reach(1)
    for _ in range(times):
        run.hit("a reward replica is killed", kill, lambda: ray_cluster.some(REPLICA, 1, chosen))
        run.hit("a sampler is killed", kill, lambda: ray_cluster.some(SAMPLER, 1, chosen))
        run.hit("the only learner is killed", kill, lambda: ray_cluster.some(LEARNER, 1, chosen))
        run.hit("both samplers are killed at once", kill, lambda: ray_cluster.some(SAMPLER, 2, chosen), count=2)
    run.once_in_mlflow(run.stopped_as(calm.run), "RUNNING")
    ray_cluster.nothing_left()


@pytest.mark.full
def test_one_of_two_learners_dies(ray_cluster: Cluster, scenarios: Scenarios, calm: Calm) -> None:
    """The other one is in a reduction that will not come: both are made anew."""
    chosen = random.Random(1)
    two = ("learner.num_workers=2", "learner.max_restarts=10")
    run = scenarios.run("learners", ray_cluster, *two, "run.num_epochs=500", mlflow=True).start()
    run.reach(1)
    for _ in range(5):
        run.hit("one of two learners is killed", kill, lambda: ray_cluster.some(LEARNER, 1, chosen))
        assert run.line("learner [01]"), run.said[-3000:]
    epochs = run.stopped_as(lambda reached: calm.run_on(ray_cluster, reached, *two))
    run.once_in_mlflow(epochs, "RUNNING")
    ray_cluster.nothing_left()


@pytest.mark.full
def test_with_overlapped_rollouts_a_kill_changes_no_bit(ray_cluster: Cluster, scenarios: Scenarios, calm: Calm) -> None:
    """`run.max_staleness: 1`: an epoch is updated while the next one is drawn with the version before."""
    chosen = random.Random(7)
    stale = ("run.max_staleness=1", "learner.max_restarts=20")
    run = scenarios.run("stale", ray_cluster, *stale, "sampler.num_workers=2", "run.num_epochs=500").start()
    run.reach(1)
    for number in range(5):
        title = LEARNER if number % 2 else SAMPLER
        run.hit("a worker is killed, staleness 1", kill, lambda title=title: ray_cluster.some(title, 1, chosen))
    run.stopped_as(lambda reached: calm.run(reached, *stale))
    ray_cluster.nothing_left()
