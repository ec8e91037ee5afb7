"""`ray job submit` against a head of our own, with and without a token: how it ends, and that nothing stays behind."""

import getpass
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import NO_MLFLOW, REPO, sets
from tests.conftest import free_port
from tests.examples import SMALL, few_lines

RAY = str(Path(sys.executable).with_name("ray"))
pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module", params=["with a token", "without a token"])
def head(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """The environment of a running head of 2 CPUs, whose dashboard is at RAY_API_SERVER_ADDRESS."""
    folder = tempfile.mkdtemp(prefix="nr-", dir="/tmp")  # Ray's socket paths have a limit
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"HOME": folder, "OMP_NUM_THREADS": "1"}
    if request.param == "with a token":
        Path(folder, "token").write_text(secrets.token_hex(32))
        environment |= {"RAY_AUTH_TOKEN_PATH": f"{folder}/token", "RAY_AUTH_MODE": "token"}
    dashboard = free_port()
    command = [RAY, "start", "--head", "--block", "--num-cpus=2", f"--temp-dir={folder}/ray", f"--port={free_port()}"]
    command += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}"]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    environment["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{dashboard}"
    deadline = time.monotonic() + 90
    while not answers(environment):
        assert process.poll() is None, "the head has ended"
        assert time.monotonic() < deadline, "the head does not answer"
        time.sleep(0.2)
    yield environment
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def answers(head: dict[str, str]) -> bool:
    """Whether jobs can be submitted."""
    try:
        ask(head, "jobs/")
    except OSError:
        return False
    return True


def submit(head: dict[str, str], job: str, *settings: str) -> subprocess.CompletedProcess[str]:
    command = [RAY, "job", "submit", "--submission-id", job, "--working-dir", "."]
    small = [*SMALL, few_lines(Path(head["HOME"])), "sampler.num_workers=1", f"run.name={job}"]
    command += ["--", sys.executable, "-m", "nft_ray", "train", "configs/quickstart.yaml", *sets(*small, *settings)]
    return subprocess.run(command, cwd=REPO, env=head, capture_output=True, text=True, timeout=400, check=False)


def ask(head: dict[str, str], path: str) -> Any:
    """What the cluster's own REST interface says."""
    request = urllib.request.Request(f"{head['RAY_API_SERVER_ADDRESS']}/api/{path}")
    if "RAY_AUTH_TOKEN_PATH" in head:
        request.add_header("Authorization", f"Bearer {Path(head['RAY_AUTH_TOKEN_PATH']).read_text()}")
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def status(head: dict[str, str], job: str) -> str:
    """SUCCEEDED, FAILED, ..."""
    return str(ask(head, f"jobs/{job}")["status"])


def applications(head: dict[str, str]) -> list[str]:
    """Serve applications that run on the cluster."""
    return list(ask(head, "serve/applications/")["applications"])


def test_a_job_succeeds_and_its_run_can_be_found(head: dict[str, str]) -> None:
    done = submit(head, "good")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert status(head, "good") == "SUCCEEDED"
    folder = Path(head["HOME"]) / "nft_ray" / getpass.getuser() / "runs" / "good"
    assert f"this run is kept in {folder}" in done.stdout
    assert (folder / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert json.loads((folder / "summary.json").read_text())["epochs"] == 2
    assert applications(head) == []


@pytest.mark.parametrize("head", ["with a token"], indirect=True)
def test_a_job_that_fails_says_why_in_its_last_line_and_deletes_what_it_deployed(head: dict[str, str]) -> None:
    prompts = Path(head["HOME"]) / "no_tags.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"a photo of {i} things"}) + "\n" for i in range(8)))
    failed = submit(head, "bad", NO_MLFLOW, f"prompts.train={prompts}")
    assert failed.returncode != 0
    assert status(head, "bad") == "FAILED"
    logs = subprocess.run([RAY, "job", "logs", "bad"], env=head, capture_output=True, text=True, check=False).stdout
    lines = [line for line in logs.splitlines() if line.strip()]
    assert lines[-1].startswith("nft-ray: rewards.geneval: "), lines[-3:]
    assert applications(head) == []
