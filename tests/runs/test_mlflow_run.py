"""A run in MLflow: complete, never twice, with its parameters, pictures and files."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nft_ray.config import ExperimentConfig
from nft_ray.runs.mlflow_run import flattened
from tests.examples import example_config
from tests.runs.tracked import FULL_S, UNUSABLE, begun, train


def test_flattened_keeps_every_leaf_as_text() -> None:
    data = {"a": {"b": 1, "c": {"d": None}}, "e": [1, 2], "f": "x", "g": {}}
    assert dict(flattened(data)) == {"a.b": "1", "a.c.d": "null", "e": "[1, 2]", "f": "x", "g": "{}"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of runs, and so one database, for all tests below: its tables take 8 s."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def first(root: Path) -> tuple[Path, ExperimentConfig, float]:
    """A run of 5 epochs with its artifacts; the seconds are those of all log calls together."""
    folder, config = root / "first", example_config("run.name=first", "run.num_epochs=5")
    tracker = begun(folder, config)
    started = time.monotonic()
    train(tracker, range(1, 6))
    seconds = time.monotonic() - started
    (folder / "lora").mkdir()
    (folder / "lora" / "weights.txt").write_text("w")
    (folder / "picture.png").write_text("p")
    tracker.log_artifacts([folder / "lora", folder / "picture.png"])
    tracker.close(timeout_s=FULL_S)
    return folder, config, seconds


@pytest.fixture
def client(root: Path, first: tuple[Path, ExperimentConfig, float]) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")


def the_run(client: Any, name: str) -> Any:
    experiment = client.get_experiment_by_name("nft_ray")
    (run,) = client.search_runs([experiment.experiment_id], filter_string=f"attributes.run_name = '{name}'")
    return run


def history(client: Any, run_id: str, key: str) -> list[tuple[int, float]]:
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, key))


def test_a_run_has_metrics_parameters_and_status(client: Any, first: tuple[Path, ExperimentConfig, float]) -> None:
    folder, _, seconds = first
    run = the_run(client, "first")
    assert seconds < 2, "logging waited for the tables of MLflow"
    assert run.info.status == "FINISHED"
    assert (folder / "mlflow_run_id.txt").read_text().strip() == run.info.run_id
    assert history(client, run.info.run_id, "reward/total") == [(e, e / 10) for e in range(1, 6)]
    assert history(client, run.info.run_id, "step/nft/loss") == [(n, 0.1 * n) for n in range(1, 11)]
    assert history(client, run.info.run_id, "eval/geneval/strict") == [(0, 0.5), (2, 0.52), (4, 0.54)]
    assert "nft/loss" not in run.data.metrics  # NaN
    assert run.data.params["run.num_epochs"] == "5"
    assert run.data.params["rewards.geneval.detector"] == "shapes"
    assert run.data.params["learner.betas"] == "[0.9, 0.999]"


def test_artifacts_lie_beside_the_database(
    client: Any, root: Path, first: tuple[Path, ExperimentConfig, float]
) -> None:
    run_id = the_run(client, "first").info.run_id
    assert {"config.yaml", "images", "lora", "picture.png"} <= {file.path for file in client.list_artifacts(run_id)}
    assert [file.path for file in client.list_artifacts(run_id, "lora")] == ["lora/weights.txt"]
    assert len(list((root / "mlflow-artifacts").rglob("weights.txt"))) == 1
    pictures = [file.path for file in client.list_artifacts(run_id, "images") if file.path.endswith(".png")]
    assert sorted(int(path.split("+")[2]) for path in pictures) == [0, 2, 4]


def test_resume_goes_on_in_the_same_run_and_appends_nothing_twice(
    client: Any, root: Path, first: tuple[Path, ExperimentConfig, float]
) -> None:
    folder = root / "resumed"
    before = begun(folder, example_config("run.name=resumed", "run.num_epochs=5"))
    train(before, range(1, 6))  # killed after epoch 5; the checkpoint is of epoch 2
    before.close("failed", timeout_s=FULL_S)
    assert the_run(client, "resumed").info.status == "FAILED"
    after = begun(folder, example_config("run.name=resumed", "run.num_epochs=8"), epoch=2)
    train(after, range(3, 9))
    after.close(timeout_s=FULL_S)
    run = the_run(client, "resumed")  # one run of that name
    assert before.run_id == after.run_id == run.info.run_id
    assert run.info.status == "FINISHED"
    for key, expected in {"reward/total": range(1, 9), "step/nft/loss": range(1, 17)}.items():
        assert Counter(step for step, _ in history(client, run.info.run_id, key)) == Counter(expected)
    assert [step for step, _ in history(client, run.info.run_id, "eval/geneval/strict")] == [0, 2, 4, 6, 8]
    pictures = [f.path for f in client.list_artifacts(run.info.run_id, "images") if f.path.endswith(".png")]
    assert sorted(int(path.split("+")[2]) for path in pictures) == [0, 2, 4, 6, 8]
    assert run.data.params["run.num_epochs"] == "5"  # MLflow lets no parameter change


def test_a_run_that_mlflow_lost_is_made_again_with_all_its_epochs(
    client: Any, root: Path, first: tuple[Path, ExperimentConfig, float]
) -> None:
    folder, config = root / "moved", example_config("run.name=moved")
    before = begun(folder, example_config("run.name=moved", UNUSABLE))
    train(before, range(1, 4))
    before.close(timeout_s=0)
    (folder / "mlflow_run_id.txt").write_text("0" * 32)
    after = begun(folder, config, epoch=3)
    train(after, range(4, 5))
    after.close(timeout_s=FULL_S)
    run = the_run(client, "moved")
    assert after.run_id == run.info.run_id != "0" * 32
    assert [step for step, _ in history(client, run.info.run_id, "reward/total")] == [1, 2, 3, 4]


def test_names_and_values_beyond_the_limits_of_mlflow_are_taken(
    client: Any, root: Path, first: tuple[Path, ExperimentConfig, float], caplog: pytest.LogCaptureFixture
) -> None:
    targets = ",".join(f"layer_{i}_{'x' * 60}" for i in range(120))
    tracker = begun(root / "odd", example_config("run.name=odd", f"model.lora.targets=[{targets}]"))
    many = {f"reward/{i}": 1.0 for i in range(1500)}
    tracker.log_epoch(1, {"eval/a tag (hard)!": 0.5, "y" * 300: 1.0} | many, ())
    tracker.close(timeout_s=FULL_S)
    run = the_run(client, "odd")
    own = [record.getMessage() for record in caplog.records if UNUSABLE.partition("=")[2] not in record.getMessage()]
    assert own == []  # a tracker of another test, which was not waited for, may still warn of its own store
    assert run.info.status == "FINISHED"
    assert run.data.metrics["eval/a tag _hard__"] == 0.5
    assert len(run.data.metrics) == 1502
    assert len(run.data.params["model.lora.targets"]) == 6000
