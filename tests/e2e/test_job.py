"""`ray job submit` against a head of our own, with and without a token: how it ends, and that nothing stays behind."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.examples import SMALL

REPO = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
pytestmark = [pytest.mark.ray, pytest.mark.slow]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
    while subprocess.run([RAY, "job", "list"], env=environment, capture_output=True, check=False).returncode:
        assert process.poll() is None, "the head has ended"
        assert time.monotonic() < deadline, "the head does not answer"
        time.sleep(1)
    yield environment
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def submit(head: dict[str, str], job: str, *settings: str) -> subprocess.CompletedProcess[str]:
    command = [
        RAY,
        "job",
        "submit",
        "--submission-id",
        job,
        "--working-dir",
        ".",
        "--",
        sys.executable,
        "-m",
        "nft_ray",
    ]
    command += ["train", "configs/quickstart.yaml"]
    for setting in [*SMALL, f"run.name={job}", *settings]:
        command += ["--set", setting]
    return subprocess.run(command, cwd=REPO, env=head, capture_output=True, text=True, timeout=400, check=False)


def status(head: dict[str, str], job: str) -> str:
    """SUCCEEDED, FAILED, ... as the cluster's own REST interface says."""
    request = urllib.request.Request(f"{head['RAY_API_SERVER_ADDRESS']}/api/jobs/{job}")
    if "RAY_AUTH_TOKEN_PATH" in head:
        request.add_header("Authorization", f"Bearer {Path(head['RAY_AUTH_TOKEN_PATH']).read_text()}")
    with urllib.request.urlopen(request, timeout=30) as answer:
        return str(json.load(answer)["status"])


def applications(head: dict[str, str]) -> list[str]:
    """Serve applications that run on the cluster, asked of its own dashboard."""
    script = (
        "import json, ray; from ray import serve; ray.init(address='auto', log_to_driver=False);"
        "print(json.dumps(list(serve.status().applications)))"
    )
    done = subprocess.run([sys.executable, "-c", script], env=head, capture_output=True, text=True, check=True)
    return list(json.loads(done.stdout.splitlines()[-1]))


def test_a_job_succeeds_and_its_run_can_be_found(head: dict[str, str]) -> None:
    done = submit(head, "good")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert status(head, "good") == "SUCCEEDED"
    folder = Path(head["HOME"]) / "nft_ray" / "runs" / "good"
    assert f"this run is kept in {folder}" in done.stdout
    assert (folder / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert json.loads((folder / "summary.json").read_text())["epochs"] == 2
    assert applications(head) == []


def test_a_job_that_fails_says_why_in_its_last_line_and_deletes_what_it_deployed(head: dict[str, str]) -> None:
    prompts = Path(head["HOME"]) / "no_tags.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"a photo of {i} things"}) + "\n" for i in range(8)))
    failed = submit(head, "bad", f"prompts.train={prompts}")
    assert failed.returncode != 0
    assert status(head, "bad") == "FAILED"
    logs = subprocess.run([RAY, "job", "logs", "bad"], env=head, capture_output=True, text=True, check=False).stdout
    lines = [line for line in logs.splitlines() if line.strip()]
    assert lines[-1].startswith("nft-ray: rewards.geneval: "), lines[-3:]
    assert applications(head) == []
