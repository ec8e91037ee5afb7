"""What a run keeps is damaged, or cannot be delivered: a checkpoint, MLflow's server."""

import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.cluster import Cluster
from tests.chaos.conftest import Calm, Scenarios
from tests.chaos.running import Run, mlflow_statuses, mlflow_steps
from tests.cli.test_track import server
from tests.command_line import nft_ray_here, sets
from tests.conftest import free_port
from tests.examples import QUICKSTART
from tests.runs.test_damage import cut, emptied, flipped, removed


def train(run: Run, epochs: int) -> str:
    """In this process, up to so many epochs: what it prints."""
    settings = sets(*run.settings, f"run.num_epochs={epochs}")
    done = nft_ray_here("train", str(QUICKSTART), "--local", *settings, runs=run.runs)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.full
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    scenarios: Scenarios, calm: Calm, caplog: pytest.LogCaptureFixture
) -> None:
    run = scenarios.run("damaged", None)
    other = calm.run(8, "run.seed=9")

    def another_runs(file: Path) -> None:
        shutil.rmtree(file.parent)
        shutil.copytree(other.path / "checkpoints" / file.parent.name, file.parent)

    damages: tuple[tuple[str, Callable[[Path], None]], ...] = (
        ("policy", flipped), ("ema-*", cut), ("optimizer", emptied), ("old-*", removed), ("policy", another_runs)
    )  # fmt: skip
    epochs = 2
    train(run, epochs)
    for name, damage in damages:
        folder, started = run.path / "checkpoints" / f"epoch-{epochs:06d}", time.monotonic()
        damage(min(folder.glob(f"{name}.safetensors")))
        caplog.clear()
        epochs += 1
        assert f"going on after epoch {epochs - 2}" in train(run, epochs)
        (line,) = [line for line in caplog.messages if str(folder) in line]
        assert "put aside" in line
        run.table.add("the newest checkpoint is damaged", seconds=time.monotonic() - started, redone=1)
    run.whole(epochs)
    assert run.state(epochs) == calm.run(epochs).state(epochs)


@pytest.mark.full
def test_mlflows_server_goes_and_comes_and_has_every_epoch_once(
    ray_cluster: Cluster, scenarios: Scenarios, calm: Calm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training does not wait for it; what it missed is delivered by the run, and the rest by `nft-ray track`."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.chdir(scenarios.folder)  # artifacts of a server without a place for them would go there
    folder, port = scenarios.folder, free_port()
    run = scenarios.run("away", ray_cluster, "run.num_epochs=500", mlflow=True)
    run.settings.append(f"tracking.uri=http://127.0.0.1:{port}")
    with server(folder, port):
        run.start().reach(1)
    for _ in range(5):
        run.hit("MLflow's server is killed", lambda _: None, lambda: True)
        with server(folder, port):
            run.reach(run.epoch + 2)
    with server(folder, port):
        epochs = run.stopped_as(calm.run)
        done = nft_ray_here("track", str(run.path), runs=run.runs)
        assert done.returncode == 0, done.stderr
    assert mlflow_steps(folder, run.name) == Counter(range(1, epochs + 1))
    assert mlflow_statuses(folder, run.name) == ["RUNNING"]
    ray_cluster.nothing_left()
