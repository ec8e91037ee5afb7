"""The head of a cluster is killed under a run: one line, a status that says to try again, and nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.command_line import NO_MLFLOW, REPO, environment, ray_of_its_own, sets
from tests.conftest import free_port
from tests.examples import QUICKSTART, SMALL, few_lines

GONE_AFTER_S = 9  # 3/4 of what Ray is told here; 45 s is the default
pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def home() -> Iterator[dict[str, str]]:
    with ray_of_its_own() as variables:
        yield variables | {"RAY_gcs_rpc_server_reconnect_timeout_s": "24"}


def processes(home: dict[str, str], name: str = "") -> list[int]:
    """Those of this Ray whose command line holds `name`."""
    pattern = f"{name}.*{home['RAY_TMPDIR']}" if name else home["RAY_TMPDIR"]
    found = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def kill(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


@contextmanager
def head(home: dict[str, str], runs: Path) -> Iterator[str]:
    """The address of a cluster of one node that others started."""
    port = free_port()
    start = ["-m", "ray.scripts.scripts", "start", "--head", f"--port={port}", "--num-cpus=2"]
    options = [f"--temp-dir={home['RAY_TMPDIR']}", "--include-dashboard=false", "--object-store-memory=100000000"]
    variables = environment(runs, home | {"RAY_AUTH_MODE": "token"})
    subprocess.run([sys.executable, *start, *options], env=variables, check=True, capture_output=True, timeout=60)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        kill(processes(home))


def until_a_checkpoint(process: subprocess.Popen[str], run: Path) -> None:
    deadline = time.monotonic() + 200
    while not list(run.glob("checkpoints/epoch-??????/state.json")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.parametrize(
    "joined", [False, pytest.param(True, marks=pytest.mark.full)], ids=["gcs-of-its-own-ray", "whole-head-joined"]
)
def test_a_lost_head_ends_the_run_with_one_line_that_says_what_to_do(
    joined: bool, home: dict[str, str], tmp_path: Path
) -> None:
    settings = sets(*SMALL, NO_MLFLOW, few_lines(tmp_path, every=40), "run.name=lost", "run.num_epochs=500")

    def run(*options: str) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "nft_ray", "train", str(QUICKSTART), *settings, *options],
            cwd=REPO,
            env=environment(tmp_path, home | ({"RAY_AUTH_MODE": "token"} if joined else {})),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        until_a_checkpoint(process, tmp_path / "lost")
        kill([*processes(home, "gcs_server"), *(processes(home, "raylet") if joined else [])])
        killed = time.monotonic()
        out, errors = process.communicate(timeout=60)
        assert process.returncode == 75, (out + errors)[-3000:]
        assert time.monotonic() - killed < GONE_AFTER_S + 15
        last = errors.splitlines()[-1]
        assert last.startswith("nft-ray: the cluster is gone: epoch ")
        assert f" is kept in {tmp_path / 'lost' / 'checkpoints'}" in last
        assert last.endswith("; run the same command to go on")
        assert "Traceback" not in errors

    if joined:
        with head(home, tmp_path) as address:
            run("--address", address)
        return
    run()
    deadline = time.monotonic() + 15
    while (left := processes(home)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, "processes of the Ray that the run started are still there"
