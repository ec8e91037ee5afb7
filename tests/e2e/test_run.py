"""Whole runs through the command line: what they leave behind, that they resume, and that Ray changes no bit."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from safetensors.numpy import load_file

from tests.command_line import NO_MLFLOW, REPO, environment, nft_ray, nft_ray_here, ray_of_its_own, sets
from tests.conftest import LocalRay
from tests.examples import QUICKSTART, SMALL, few_lines

pytestmark = pytest.mark.slow
LORA = "lora/pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs whose MLflow database is made once."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def ray_home() -> Iterator[dict[str, str]]:
    with ray_of_its_own() as extra:
        yield extra


def train(runs: Path, name: str, *settings: str) -> list[str]:
    """The arguments of a short run."""
    short = [*SMALL, "run.checkpoint_every=1", f"run.name={name}", few_lines(runs), "evaluation.picture_lines=[0,1]"]
    return ["train", str(QUICKSTART), *sets(*short, *settings)]


def here(runs: Path, name: str, *settings: str) -> subprocess.CompletedProcess[str]:
    """A short run in this process."""
    return nft_ray_here(*train(runs, name, NO_MLFLOW, *settings), "--local", runs=runs)


def lora(runs: Path, name: str) -> dict[str, bytes]:
    return {key: value.tobytes() for key, value in load_file(runs / name / LORA).items()}


@pytest.fixture(scope="module")
def local_run(runs: Path) -> subprocess.CompletedProcess[str]:
    """Three epochs in one process, never interrupted; the only one here that MLflow is told of."""
    done = nft_ray(*train(runs, "local", "run.num_epochs=3"), "--local", runs=runs)
    assert done.returncode == 0, done.stderr
    return done


def test_a_run_leaves_everything_behind(local_run: subprocess.CompletedProcess[str], runs: Path) -> None:
    folder = runs / "local"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["epochs"] == 3
    assert summary["seed"] == 0
    assert summary["seconds"] > 0
    for state in ("base", "trained"):
        assert 0 <= summary[state]["geneval/strict"] <= 1
        assert "geneval/strict/counting" in summary[state]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    assert "eval/geneval/strict" in lines[0]
    assert {"reward/geneval", "nft/loss", "nft/grad_norm", "time/epoch_s"} <= lines[1].keys()
    assert lines[3]["eval/geneval/strict"] == summary["trained"]["geneval/strict"]
    for picture in ("before_after.png", "reward_curve.png"):
        assert min(Image.open(folder / picture).size) > 100
    assert sum(line.startswith("epoch ") for line in local_run.stdout.splitlines()) == 3
    assert f"sqlite:///{runs / 'mlflow.db'}" in local_run.stdout


def test_a_finished_run_prints_its_table_and_starts_nothing(
    local_run: subprocess.CompletedProcess[str], runs: Path
) -> None:
    again = here(runs, "local", "run.num_epochs=3")
    assert again.returncode == 0
    assert "is finished" in again.stdout
    assert "geneval/strict" in again.stdout
    assert "epoch " not in again.stdout.replace("epochs", "")


@pytest.mark.parametrize("stop_after", [1, 2])
def test_stopped_after_any_epoch_and_resumed_the_lora_is_bit_identical(
    stop_after: int, local_run: subprocess.CompletedProcess[str], runs: Path
) -> None:
    name = f"stopped-{stop_after}"
    assert here(runs, name, f"run.num_epochs={stop_after}").returncode == 0
    done = here(runs, name, "run.num_epochs=3")
    assert done.returncode == 0, done.stderr
    assert f"going on after epoch {stop_after}" in done.stdout
    assert lora(runs, name) == lora(runs, "local")
    lines = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]


def test_a_run_that_ended_before_its_report_makes_it(local_run: subprocess.CompletedProcess[str], runs: Path) -> None:
    table, summary = (runs / "local" / name for name in ("table.txt", "summary.json"))
    before = table.read_text()
    table.unlink()
    summary.unlink()
    again = here(runs, "local", "run.num_epochs=3")
    assert again.returncode == 0, again.stderr
    assert table.read_text() == before
    assert json.loads(summary.read_text())["epochs"] == 3


def test_another_config_under_the_same_name_is_refused(local_run: subprocess.CompletedProcess[str], runs: Path) -> None:
    other = here(runs, "local", "run.num_epochs=3", "learner.learning_rate=1e-5")
    assert other.returncode == 1
    last = other.stderr.splitlines()[-1]
    for part in ("learner.learning_rate", "--set run.name=", "--overwrite"):
        assert part in last


@pytest.mark.ray
@pytest.mark.parametrize("staleness", [0, 1])
def test_ray_and_one_process_give_the_bit_identical_lora(
    staleness: int,
    local_run: subprocess.CompletedProcess[str],
    runs: Path,
    ray_home: dict[str, str],
    local_ray: LocalRay,
) -> None:
    """On a Ray that it starts, and on one that it joins."""
    settings = ("run.num_epochs=3", f"run.max_staleness={staleness}")
    local = "local" if staleness == 0 else "local-overlapped"
    if staleness:
        assert here(runs, local, *settings).returncode == 0
    on_ray, ray = f"ray-{staleness}", local_ray.environment if staleness else ray_home
    done = nft_ray(*train(runs, on_ray, NO_MLFLOW, *settings, "rewards.geneval.num_replicas=3"), runs=runs, ray=ray)
    assert done.returncode == 0, done.stderr
    assert "Ray dashboard: http://127.0.0.1:" in done.stdout
    assert ("joining the Ray cluster" in done.stdout) == (staleness == 1)
    assert lora(runs, on_ray) == lora(runs, local)
    assert staleness == 0 or lora(runs, local) != lora(runs, "local")


@pytest.mark.ray
@pytest.mark.parametrize("on_ray", [False, True], ids=["local", "ray"])
def test_samplers_and_learners_that_take_turns_give_the_bit_identical_lora(
    on_ray: bool, local_run: subprocess.CompletedProcess[str], runs: Path, local_ray: LocalRay
) -> None:
    name = f"colocated-{on_ray}"
    settings = ("run.num_epochs=3", "cluster.placement=colocated", "sampler.num_workers=1")
    if on_ray:
        done = nft_ray(*train(runs, name, NO_MLFLOW, *settings), runs=runs, ray=local_ray.environment)
    else:
        done = here(runs, name, *settings)
    assert done.returncode == 0, done.stderr
    assert lora(runs, name) == lora(runs, "local")


@pytest.mark.ray
def test_ctrl_c_ends_the_ray_that_it_started_and_keeps_the_last_checkpoint(
    runs: Path, ray_home: dict[str, str]
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "nft_ray", *train(runs, "interrupted", NO_MLFLOW, "run.num_epochs=500")],
        cwd=REPO,
        env=environment(runs, ray_home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    checkpoints = runs / "interrupted" / "checkpoints"
    deadline = time.monotonic() + 200
    while not list(checkpoints.glob("epoch-??????/state.json")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted: epoch" in errors.splitlines()[-1]
    left = subprocess.run(["pgrep", "-f", ray_home["RAY_TMPDIR"]], capture_output=True, text=True, check=False)
    assert not left.stdout.split(), "processes of the Ray that the run started are still there"


def test_full_fine_tuning_resumes_bit_for_bit_and_leaves_a_transformer(runs: Path) -> None:
    settings = ("model.tuning=full", "learner.learning_rate=1e-5", "run.num_epochs=2")
    done = here(runs, "full", *settings)
    assert done.returncode == 0, done.stderr
    stopped = here(runs, "full-stopped", *settings[:-1], "run.num_epochs=1")
    assert stopped.returncode == 0, stopped.stderr
    resumed = here(runs, "full-stopped", *settings)
    assert resumed.returncode == 0, resumed.stderr
    assert "going on after epoch 1" in resumed.stdout
    first, second = (
        load_file(runs / name / "transformer" / "diffusion_pytorch_model.safetensors")
        for name in ("full", "full-stopped")
    )
    assert first.keys() == second.keys()
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)
    epochs = [load_file(runs / name / "checkpoints/epoch-000002/ema.safetensors") for name in ("full", "full-stopped")]
    assert all(first[name].tobytes() == value.tobytes() for name, value in epochs[0].items())  # what was exported
    base = load_file(runs / "full-stopped" / "checkpoints/epoch-000001/ema.safetensors")
    assert any((first[name] != value).any() for name, value in base.items())
    assert str(runs / "full" / "transformer") in done.stdout
    assert not (runs / "full" / "lora").exists()


@pytest.mark.ray
def test_a_run_of_two_learners_goes_on_with_one_and_other_pieces(runs: Path, ray_home: dict[str, str]) -> None:
    """What is refused: tests/cli/test_going_on.py."""
    two = ("run.num_epochs=1", "learner.num_workers=2")
    first = nft_ray(*train(runs, "fewer", NO_MLFLOW, *two), runs=runs, ray=ray_home)
    assert first.returncode == 0, first.stderr
    fewer = ("learner.num_workers=1", "learner.micro_batch_size=7", "learner.timeout_s=900")
    settings = ("run.num_epochs=2", *fewer, "sampler.velocity_dtype=float16")
    second = nft_ray(*train(runs, "fewer", NO_MLFLOW, *settings), "--local", runs=runs)  # its log is on stderr
    assert second.returncode == 0, second.stderr
    assert "going on after epoch 1" in second.stdout
    (warning,) = [line for line in second.stderr.splitlines() if "last bits" in line]
    assert warning.endswith("last bits: sampler.velocity_dtype = 'float32' there, 'float16' here")
    assert sorted(file.name for file in runs.glob("fewer/configs/*")) == ["epoch-000000.yaml", "epoch-000001.yaml"]
