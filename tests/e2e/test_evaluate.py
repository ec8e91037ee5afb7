"""A trained run evaluated again gives its own figures to the bit; killed and resumed, the same file to the byte."""

import json
from pathlib import Path
from typing import Any

import pytest

from nft_ray.evaluation.results import EvaluationFolder
from tests.command_line import NO_MLFLOW, killed_after, nft_ray, nft_ray_here, sets
from tests.conftest import LocalRay
from tests.examples import QUICKSTART, SMALL, few_lines

pytestmark = pytest.mark.slow
NUM_LINES, BATCH = 48, 8


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def command(runs: Path, verb: str, *arguments: str) -> list[str]:
    settings = [*SMALL, "run.name=short", few_lines(runs), f"evaluation.batch_size={BATCH}", NO_MLFLOW]
    return [verb, str(QUICKSTART), *sets(*settings), *arguments]


def here(runs: Path, verb: str, *arguments: str) -> str:
    done = nft_ray_here(*command(runs, verb, *arguments), "--local", runs=runs)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def short_run(runs: Path) -> Path:
    """Two epochs in one process."""
    here(runs, "train")
    return runs / "short"


@pytest.fixture(scope="module")
def trained(runs: Path, short_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported LoRA on the held-out lines, in one process, never interrupted."""
    output = tmp_path_factory.mktemp("trained")
    here(runs, "evaluate", "--lora", str(short_run / "lora"), "--output", str(output))
    return output


def figures(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "summary.json").read_text()))


def means(folder: Path) -> dict[str, float]:
    return {name: row["mean"] for name, row in figures(folder).items()}


def identity(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "evaluation.json").read_text())["identity"])


def test_the_lora_of_a_run_gives_the_runs_own_figures(short_run: Path, trained: Path) -> None:
    wanted = figures(short_run)
    assert means(trained) == wanted["trained"]
    assert {name: row["count"] for name, row in figures(trained).items()} == wanted["counts"]
    assert wanted["trained"] != wanted["base"]
    own = short_run / "evaluations" / "epoch-000002"
    assert (own / "results.jsonl").read_bytes() == (trained / "results.jsonl").read_bytes()
    assert identity(own) == identity(trained), "the same evaluation, and it says so"


def test_without_a_lora_it_is_the_base_model_and_the_difference_is_the_runs_own(
    runs: Path, short_run: Path, trained: Path, tmp_path: Path
) -> None:
    here(runs, "evaluate", "--output", str(tmp_path / "base"))
    wanted = figures(short_run)
    assert means(tmp_path / "base") == wanted["base"]
    compared = nft_ray_here("evaluate", "--compare", str(tmp_path / "base"), str(trained), runs=runs)
    assert compared.returncode == 0
    for name, pair in json.loads((trained / "compare.json").read_text())["metrics"].items():
        assert (pair["a"], pair["b"]) == (wanted["base"][name], wanted["trained"][name])
        assert pair["difference"] == pytest.approx(pair["b"] - pair["a"])


@pytest.mark.ray
def test_killed_in_one_process_and_resumed_on_two_samplers_it_is_the_same_file(
    runs: Path, short_run: Path, trained: Path, tmp_path: Path, local_ray: LocalRay
) -> None:
    """The run's folder stands for its newest checkpoint, whose EMA is what was exported."""
    arguments = ("--lora", str(short_run), "--output", str(tmp_path))
    local = command(runs, "evaluate", "--local", *arguments)
    killed_after(EvaluationFolder, "append", 2, *local, runs=runs)
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2 * BATCH
    done = nft_ray(*command(runs, "evaluate", *arguments), runs=runs, ray=local_ray.environment)
    assert done.returncode == 0, done.stderr
    assert f"going on: {2 * BATCH} of {NUM_LINES} lines" in done.stdout
    assert "starting 2 samplers\n" in done.stdout
    for name in ("results.jsonl", "summary.json", "contact_sheet.png"):
        assert (tmp_path / name).read_bytes() == (trained / name).read_bytes(), name
