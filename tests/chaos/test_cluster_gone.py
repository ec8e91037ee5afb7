"""The cluster itself goes: its GCS or its head node is killed. The run ends with one line; the next cluster goes on."""

import signal
import time

import pytest

from tests.chaos.cluster import cluster
from tests.chaos.conftest import Calm, Scenarios
from tests.chaos.running import mlflow_statuses

ENDED_BY_THE_WORLD = 75
"""EX_TEMPFAIL, as in cli/main.py: a retry policy may start the command again."""


@pytest.mark.full
def test_the_head_is_lost_and_the_same_command_finishes_on_another(scenarios: Scenarios, calm: Calm) -> None:
    programs = ("gcs_server", "raylet", "gcs_server", "raylet", "gcs_server")
    epochs = 4 * len(programs) + 2
    reference = calm.run(epochs)
    run = scenarios.run("head", None, f"run.num_epochs={epochs}", mlflow=True)
    event = "the head is lost (its GCS or its raylet is killed)"
    for program in programs:
        with cluster() as ray:
            run.on(ray.environment).start()
            run.reach(run.saved + 2)
            ray.head.kill(program)
            status = run.end(90)
            assert status == ENDED_BY_THE_WORLD, run.said[-3000:]
            last = run.last_line
            assert "the cluster is gone" in last, run.said[-3000:]
            assert f"epoch {run.saved} is kept" in last
            before, lost = run.epoch, run.epoch - run.saved
            assert lost <= 1
        assert mlflow_statuses(run.runs, run.name) != ["RUNNING"]
        run.table.add(f"{event}: the run ends with its line", redone=lost)
    with cluster() as ray:
        started = time.monotonic()
        run.on(ray.environment).start().reach(before + 1)
        run.table.add(f"{event}: the same command on another cluster", seconds=time.monotonic() - started)
        run.same_as(reference, epochs)
        run.once_in_mlflow(epochs)
        ray.nothing_left()


@pytest.mark.full
def test_a_driver_that_is_stopped_with_sigstop_goes_on(scenarios: Scenarios, calm: Calm) -> None:
    """As when a laptop sleeps or a VM is moved: 15 s of nothing are no reason to end."""
    epochs = 16
    reference = calm.run(epochs)
    with cluster() as ray:
        run = scenarios.run("paused", ray, f"run.num_epochs={epochs}").start()
        for _ in range(5):
            run.reach(run.epoch + 1)
            run.send(signal.SIGSTOP)
            before, started = run.epoch, time.monotonic()
            time.sleep(2)  # the injection itself
            run.send(signal.SIGCONT)
            run.reach(before + 1)
            run.table.add("the driver is stopped for 2 s", seconds=time.monotonic() - started)
        run.same_as(reference, epochs)
        ray.nothing_left()
