"""The driver dies, or is told to stop: what is kept, what it says, and that the same command goes on by itself."""

import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.chaos.cluster import Cluster, until
from tests.chaos.conftest import Calm, Scenarios
from tests.chaos.running import Run
from tests.command_line import ray_of_its_own


def killed_and_again(run: Run, event: str, chosen: random.Random, gone: Callable[[], bool] = lambda: True) -> None:
    """kill -9 within the next epochs, then the same command: a row with the seconds to the next finished epoch."""
    run.reach(max(1, run.epoch) + chosen.randint(1, 2))
    run.send(signal.SIGKILL)
    run.end()
    until("what the killed driver started ends by itself", gone, 60)
    before, started = run.epoch, time.monotonic()
    run.start()
    line = run.until("it goes on", lambda: run.line("going on after epoch"))
    redone = before - int(line.split()[-1])
    run.reach(before + 1)
    run.table.add(event, seconds=time.monotonic() - started, redone=redone)
    assert redone <= 1, f"{line}, and epoch {before} was finished"


@pytest.mark.parametrize("times", [1, pytest.param(4, marks=pytest.mark.full)])
def test_a_driver_on_a_shared_cluster_is_killed_and_the_same_command_goes_on(
    times: int, ray_cluster: Cluster, scenarios: Scenarios, calm: Calm
) -> None:
    epochs, chosen = 4 + 4 * times, random.Random(2)
    reference = calm.run(epochs)
    run = scenarios.run("driver", ray_cluster, f"run.num_epochs={epochs}", mlflow=True).start()
    for _ in range(times):
        killed_and_again(run, "the driver is killed, joined cluster", chosen)
    run.same_as(reference, epochs)
    run.once_in_mlflow(epochs)
    ray_cluster.nothing_left()


@pytest.fixture
def own_ray() -> Iterator[dict[str, str]]:
    with ray_of_its_own() as environment:
        yield environment


def of_that_ray(environment: dict[str, str]) -> list[psutil.Process]:
    """Every process whose home is that Ray's folder."""
    found = []
    for one in psutil.process_iter():
        try:
            if one.environ().get("HOME") == environment["HOME"] and one.status() != psutil.STATUS_ZOMBIE:
                found.append(one)
        except psutil.Error:
            continue
    return found


@pytest.mark.full
def test_a_driver_with_a_ray_of_its_own_is_killed_and_nothing_piles_up(
    own_ray: dict[str, str], scenarios: Scenarios, calm: Calm
) -> None:
    epochs, chosen = 18, random.Random(3)
    reference = calm.run(epochs)
    run = scenarios.run("own", None, f"run.num_epochs={epochs}").on(own_ray).start()
    for _ in range(5):
        event = "the driver is killed, a Ray of its own"
        killed_and_again(run, event, chosen, lambda: not of_that_ray(own_ray))
    run.same_as(reference, epochs)
    until("its Ray ends with it", lambda: not of_that_ray(own_ray), 30)


@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.full)])
def test_sigterm_and_ctrl_c_lose_no_epoch(times: int, ray_cluster: Cluster, scenarios: Scenarios, calm: Calm) -> None:
    """Between checkpoints, which are 50 epochs apart here."""
    epochs, chosen = 4 + 6 * times, random.Random(4)
    reference = calm.run(epochs)
    run = scenarios.run("stopped", ray_cluster, f"run.num_epochs={epochs}", "run.checkpoint_every=50").start()
    for number, event in ((signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")) * times:
        run.reach(run.saved + chosen.randint(1, 2))
        run.send(number)
        status = run.end(60)
        before, kept = run.epoch, run.saved
        assert kept == before, f"{event}: {run.last_line}"
        assert f"epoch {kept} is kept" in run.last_line
        assert status == (0 if number == signal.SIGTERM else 130), run.last_line
        assert ("preempted" in run.last_line) == (number == signal.SIGTERM)
        started = time.monotonic()
        run.start().reach(before + 1)
        run.table.add(
            "SIGTERM or Ctrl-C, then the same command", seconds=time.monotonic() - started, lost=before - kept
        )
    run.same_as(reference, epochs)
    ray_cluster.nothing_left()


@pytest.mark.full
def test_a_second_start_of_a_live_run_is_refused_and_touches_nothing(
    ray_cluster: Cluster, scenarios: Scenarios, calm: Calm
) -> None:
    epochs = 60
    reference = calm.run(epochs)
    run = scenarios.run("twice", ray_cluster, f"run.num_epochs={epochs}", mlflow=True).start()
    run.reach(1)
    second = scenarios.run("twice", ray_cluster, f"run.num_epochs={epochs}", mlflow=True)
    second.log_file = scenarios.folder / "second.log"
    for _ in range(5):
        before = run.lines()
        assert second.start().end() == 1
        assert str(run.pid) in second.last_line, second.last_line
        assert run.lines()[: len(before)] == before
        run.table.add("a second start of a live run's name")
    run.same_as(reference, epochs)
    run.once_in_mlflow(epochs)
    ray_cluster.nothing_left()


@pytest.mark.full
def test_torn_metrics_and_a_damaged_mlflow_database_stop_nothing(
    ray_cluster: Cluster, scenarios: Scenarios, calm: Calm
) -> None:
    """The last line is cut, and the database is overwritten with rubbish: the run goes on.

    Of an epoch whose checkpoint is there the line stays away: its figures stood nowhere else.
    """
    epochs, torn = 16, set[int]()
    reference = calm.run(epochs)
    run = scenarios.run("torn", ray_cluster, f"run.num_epochs={epochs}", mlflow=True).start()
    run.reach(1)
    for _ in range(5):
        run.reach(run.epoch + 1)
        run.send(signal.SIGKILL)
        run.end()
        file = run.path / "metrics.jsonl"
        file.write_bytes(file.read_bytes()[:-40])
        torn |= {run.saved} - {line["epoch"] for line in run.lines()}
        damage(run.runs / "mlflow.db")
        before, started = run.saved, time.monotonic()
        run.start().reach(before + 1)
        run.table.add("metrics.jsonl torn, MLflow's database damaged", seconds=time.monotonic() - started)
    assert run.end() == 0, run.said[-3000:]
    assert [line["epoch"] for line in run.lines()] == [epoch for epoch in range(epochs + 1) if epoch not in torn]
    assert run.state(epochs) == reference.state(epochs)


def damage(database: Path) -> None:
    if database.exists():
        with database.open("r+b") as file:
            file.write(b"rubbish " * 64)
