"""A trained run evaluated again gives its own figures to the bit; killed and resumed, the same file to the byte."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.examples import QUICKSTART, SMALL

REPO = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Runs in a folder of their own; a Ray of our own: its files in a short path, its token nobody else's."""
    folder = tempfile.mkdtemp(prefix="nr-", dir="/tmp")  # Ray's socket paths have a limit
    Path(folder, "token").write_text(secrets.token_hex(32))
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    ours = {"RAY_AUTH_TOKEN_PATH": f"{folder}/token", "RAY_TMPDIR": folder, "HOME": folder}
    runs = {"NFT_RAY_RUNS": str(tmp_path_factory.mktemp("runs")), "OMP_NUM_THREADS": "1"}
    yield kept | ours | runs
    shutil.rmtree(folder, ignore_errors=True)


def command(verb: str, *arguments: str) -> list[str]:
    settings = [part for setting in SMALL for part in ("--set", setting)]
    return [sys.executable, "-m", "nft_ray", verb, str(QUICKSTART), *settings, "--set", "run.name=short", *arguments]


def nft_ray(environment: dict[str, str], verb: str, *arguments: str) -> str:
    done = subprocess.run(
        command(verb, *arguments),
        cwd=REPO,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def short_run(environment: dict[str, str]) -> Path:
    """Two epochs in one process."""
    nft_ray(environment, "train", "--local")
    return Path(environment["NFT_RAY_RUNS"]) / "short"


@pytest.fixture(scope="module")
def trained(environment: dict[str, str], short_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported LoRA on the held-out lines, in one process, never interrupted."""
    output = tmp_path_factory.mktemp("trained")
    nft_ray(environment, "evaluate", "--local", "--lora", str(short_run / "lora"), "--output", str(output))
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
    environment: dict[str, str], short_run: Path, trained: Path, tmp_path: Path
) -> None:
    nft_ray(environment, "evaluate", "--local", "--output", str(tmp_path / "base"))
    wanted = figures(short_run)
    assert means(tmp_path / "base") == wanted["base"]
    compare = [sys.executable, "-m", "nft_ray", "evaluate", "--compare", str(tmp_path / "base"), str(trained)]
    subprocess.run(compare, cwd=REPO, env=environment, check=True, capture_output=True)
    for name, pair in json.loads((trained / "compare.json").read_text())["metrics"].items():
        assert (pair["a"], pair["b"]) == (wanted["base"][name], wanted["trained"][name])
        assert pair["difference"] == pytest.approx(pair["b"] - pair["a"])


@pytest.mark.ray
def test_killed_in_one_process_and_resumed_on_two_samplers_it_is_the_same_file(
    environment: dict[str, str], short_run: Path, trained: Path, tmp_path: Path
) -> None:
    """The run's folder stands for its newest checkpoint, whose EMA is what was exported."""
    arguments = ("--lora", str(short_run), "--output", str(tmp_path))
    process = subprocess.Popen(command("evaluate", "--local", *arguments), cwd=REPO, env=environment)
    deadline = time.monotonic() + 200
    results = tmp_path / "results.jsonl"
    while not results.exists() or not results.stat().st_size:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it was finished before it was killed"
    kept = len(results.read_text().splitlines())
    assert 0 < kept < 480
    shown = nft_ray(environment, "evaluate", *arguments)
    assert f"going on: {kept - kept % 48} of 480 lines" in shown
    assert "starting 2 samplers\n" in shown
    for name in ("results.jsonl", "summary.json", "contact_sheet.png"):
        assert (tmp_path / name).read_bytes() == (trained / name).read_bytes(), name
