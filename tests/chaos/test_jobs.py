"""`ray job stop` under a run: what Ray's 3 s between SIGTERM and SIGKILL leave of it."""

import random
import shlex
import time

import pytest

from tests.chaos.cluster import REPO, Cluster, until
from tests.chaos.conftest import Calm, Scenarios
from tests.chaos.running import Run


def submit(cluster: Cluster, run: Run, job: str) -> None:
    """The run's own command, as a job of the cluster."""
    variables = {"NFT_RAY_RUNS": str(run.runs), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    command = f"cd {REPO} && exec {shlex.join(run.command)}"
    cluster.ask("jobs/", tell={"submission_id": job, "entrypoint": command, "runtime_env": {"env_vars": variables}})


def status(cluster: Cluster, job: str) -> str:
    return str(cluster.ask(f"jobs/{job}")["status"])


def logs(cluster: Cluster, job: str) -> str:
    return str(cluster.ask(f"jobs/{job}/logs")["logs"])


@pytest.mark.full
def test_a_job_is_stopped_and_the_same_one_goes_on(ray_cluster: Cluster, scenarios: Scenarios, calm: Calm) -> None:
    epochs, chosen = 20, random.Random(8)
    reference = calm.run(epochs)
    run = scenarios.run("job", ray_cluster, f"run.num_epochs={epochs}", mlflow=True)
    for number in range(6):
        job, before, kept, started = f"job-{number}", run.epoch, run.saved, time.monotonic()
        submit(ray_cluster, run, job)
        if number:
            until("it goes on", lambda job=job: "going on after epoch" in logs(ray_cluster, job), 60)
            run.reach(before + 1)
            seconds = time.monotonic() - started
            run.table.add("`ray job stop`, then the same job", seconds=seconds, redone=before - kept)
        if number == 5:
            break
        run.reach(max(1, run.epoch) + chosen.randint(1, 2))
        ray_cluster.ask(f"jobs/{job}/stop", tell={})
        until("the job is stopped", lambda job=job: status(ray_cluster, job) == "STOPPED", 30)
        assert run.epoch - run.saved <= 1, f"{run.epoch} epochs were finished, {run.saved} are kept"
        assert f"epoch {run.saved} is kept" in logs(ray_cluster, job), logs(ray_cluster, job)[-2000:]
    until("the last one ends", lambda: status(ray_cluster, "job-5") not in ("RUNNING", "PENDING"), 120)
    assert status(ray_cluster, "job-5") == "SUCCEEDED", logs(ray_cluster, "job-5")[-3000:]
    run.whole(epochs)
    assert run.state(epochs) == reference.state(epochs)
    run.once_in_mlflow(epochs)
    ray_cluster.nothing_left()
