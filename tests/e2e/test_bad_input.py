"""Mistakes of a user and of the world: one clear line, the last one, a status other than 0, and nothing started."""

import json
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nft_ray.cli.main import main
from tests.command_line import NO_MLFLOW, REPO, environment, nft_ray_here, sets
from tests.examples import QUICKSTART, SMALL, few_lines


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs `nft-ray train` in this process; the one line that it says."""
    assert main(["train", str(QUICKSTART), *arguments]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1, errors
    assert errors[0].startswith("nft-ray: ")
    return errors[0]


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NFT_RAY_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("learner.learning_rat=1", ["learner.learning_rat", "did you mean learning_rate?"]),
        ("rewards.genevl.weight=1", ["genevl", "did you mean 'geneval'?"]),
        ("model.path=/no/such/model", ["model.path = /no/such/model", "no such folder"]),
        ("prompts.train=/no/such/file.txt", ["/no/such/file.txt", "no such file"]),
        ("prompts.groups_per_epoch=5000", ["prompts.groups_per_epoch = 5000", "at most 2880"]),
        ("sampler.num_cpus=64", ["128", "CPUs", "cluster has"]),
        ("learner.num_gpus=1", ["GPUs", "cluster has 0"]),
    ],
)
def test_a_mistake_in_the_experiment(
    setting: str, parts: list[str], capsys: pytest.CaptureFixture[str], runs: Path
) -> None:
    line = fails(capsys, "--set", setting)
    for part in parts:
        assert part in line
    assert not runs.exists(), "nothing may be written for an experiment that cannot start"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "the file is empty"),
        ("\n\n", "the file is empty"),
        ("{]", "line 1: is no JSON"),
        ('{"prompt": "a"}\n{"tag": "b"}', 'line 2: needs an object with a text under "prompt"'),
    ],
)
def test_a_prompt_file_without_prompts(
    text: str, part: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    assert part in fails(capsys, "--set", f"prompts.train={file}")


def test_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = fails(capsys, "--set", f"cluster.dashboard_port={port}")
    assert f"cluster.dashboard_port = {port}" in line
    assert "in use" in line


def test_a_dry_run_prints_yaml_and_placement_and_starts_nothing(capsys: pytest.CaptureFixture[str], runs: Path) -> None:
    assert main(["train", str(QUICKSTART), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for part in ("images_per_group: ", "sampler", "learner", "reward-geneval", "CPUs", "total"):
        assert part in printed
    assert not runs.exists()


@pytest.mark.parametrize("placement", ["disaggregated", "colocated"])
def test_a_dry_run_of_local_shows_one_process_and_reserves_nothing(
    placement: str, capsys: pytest.CaptureFixture[str], runs: Path
) -> None:
    """The YAML has two samplers and two learners; --local runs one of each."""
    assert main(["train", str(QUICKSTART), "--dry-run", "--local", "--set", f"cluster.placement={placement}"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("sampler ", "learner "))]
    assert [row[:4] for row in rows] == [["sampler", "1", "0", "0"], ["learner", "1", "0", "0"]]
    assert not runs.exists()


@pytest.mark.slow
def test_local_imports_no_ray() -> None:
    script = (
        "import sys; from nft_ray.cli.main import main;"
        f"main(['train', {str(QUICKSTART)!r}, '--local', '--set', 'model.path=/no']);"
        "assert 'ray' not in sys.modules, 'ray was imported'"
    )
    subprocess.run([sys.executable, "-c", script], cwd=REPO, check=True, capture_output=True)


def small_files_only() -> None:
    """As on a full disk: no file may grow beyond 200 KB, which the optimizer's state does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


@pytest.mark.slow
def test_a_full_disk_while_saving_leaves_the_earlier_checkpoint(runs: Path, tmp_path: Path) -> None:
    settings = [*SMALL, few_lines(tmp_path), "run.name=full", "run.checkpoint_every=1", NO_MLFLOW]
    command = ["train", str(QUICKSTART), "--local", *sets(*settings)]
    one_epoch = nft_ray_here(*command, *sets("run.num_epochs=1"), runs=runs)
    assert one_epoch.returncode == 0, one_epoch.stderr
    failed = subprocess.run(
        [sys.executable, "-m", "nft_ray", *command],
        cwd=REPO,
        env=environment(runs),
        capture_output=True,
        text=True,
        preexec_fn=small_files_only,
        timeout=200,
        check=False,
    )
    assert failed.returncode == 1
    last = failed.stderr.splitlines()[-1]
    assert "the disk is full; earlier checkpoints are intact" in last
    checkpoints = runs / "full" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["epoch-000001"]
    again = nft_ray_here(*command, runs=runs)
    assert again.returncode == 0, again.stderr
    assert json.loads((runs / "full" / "summary.json").read_text())["epochs"] == 2
