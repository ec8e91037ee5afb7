"""The reward plane through the command line: scaled and shot at under a run that goes on; deployed without a run."""

import base64
import io
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
import requests
from PIL import Image

from nft_ray.shapes.grammar import test_lines as held_out_lines
from tests.conftest import free_port
from tests.e2e.test_run import command as train_command
from tests.e2e.test_run import environment, lora, nft_ray

REPO = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
pytestmark = [pytest.mark.ray, pytest.mark.slow]
LONGER = ["run.num_epochs=50", "prompts.groups_per_epoch=8", "prompts.images_per_group=8", "evaluation.every=50"]


@pytest.fixture
def ray_home() -> Iterator[dict[str, str]]:
    """Environment of a Ray of our own: its files in a short path, its token nobody else's."""
    folder = tempfile.mkdtemp(prefix="nr-", dir="/tmp")  # Ray's socket paths have a limit
    Path(folder, "token").write_text(secrets.token_hex(32))
    yield {"RAY_AUTH_TOKEN_PATH": f"{folder}/token", "RAY_TMPDIR": folder, "HOME": folder}
    shutil.rmtree(folder, ignore_errors=True)


def rewards(extra: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nft_ray", "rewards", *arguments],
        cwd=REPO,
        env=environment(Path("runs"), extra),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def status(extra: dict[str, str]) -> list[dict[str, Any]]:
    done = rewards(extra, "status", "--json")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def replica_pids(temp_dir: str) -> list[int]:
    """The processes of the reward's replicas: Ray names a worker after the actor that it runs."""
    found = subprocess.run(["pgrep", "-f", "ray::ServeReplica:reward-geneval"], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split() if temp_dir in Path(f"/proc/{pid}/environ").read_text()]


def test_scaled_from_one_to_three_and_one_of_them_killed_changes_no_bit(
    tmp_path: Path, ray_home: dict[str, str]
) -> None:
    """The rewards are what they would have been, so the LoRA of a run that nothing disturbed is the same."""
    calm = nft_ray(tmp_path, "calm", *LONGER)
    assert calm.returncode == 0, calm.stderr
    log = (tmp_path / "log.txt").open("w+")
    process = subprocess.Popen(
        train_command("disturbed", *LONGER, flags=()),
        cwd=REPO,
        env=environment(tmp_path, ray_home),
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    metrics = tmp_path / "disturbed" / "metrics.jsonl"

    def epochs() -> int:
        return len(metrics.read_text().splitlines()) - 1 if metrics.exists() else -1

    def wait_for(epoch: int) -> None:
        deadline = time.monotonic() + 200
        while epochs() < epoch:
            assert process.poll() is None, Path(log.name).read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)

    wait_for(1)
    scaled = rewards(ray_home, "scale", "geneval", "--replicas", "3")
    assert scaled.returncode == 0, scaled.stderr
    deadline = time.monotonic() + 100
    while [(one["name"], one["target"], one["running"]) for one in status(ray_home)] != [("geneval", 3, 3)]:
        assert time.monotonic() < deadline, status(ray_home)
    assert len(replica_pids(ray_home["RAY_TMPDIR"])) == 3
    before = epochs()
    wait_for(before + 1)
    os.kill(replica_pids(ray_home["RAY_TMPDIR"])[0], signal.SIGKILL)
    wait_for(before + 2)
    assert epochs() < 50, "the run was over before anything happened to it"
    assert process.wait(300) == 0, Path(log.name).read_text()
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(51))
    assert [line["reward/missing"] for line in lines[1:]] == [0.0] * 50
    assert lora(tmp_path, "disturbed") == lora(tmp_path, "calm")


@pytest.fixture
def head(ray_home: dict[str, str]) -> Iterator[dict[str, str]]:
    """The environment of a running head of 2 CPUs."""
    command = [RAY, "start", "--head", "--block", "--num-cpus=2", f"--port={free_port()}"]
    command += [f"--temp-dir={ray_home['RAY_TMPDIR']}/ray", f"--dashboard-port={free_port()}"]
    extra = ray_home | {"RAY_AUTH_MODE": "token", "OMP_NUM_THREADS": "1"}
    port = next(word.removeprefix("--port=") for word in command if word.startswith("--port="))
    process = subprocess.Popen(
        [*command, f"--dashboard-agent-listen-port={free_port()}"],
        env=environment(Path("runs"), extra),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    extra["RAY_ADDRESS"] = f"127.0.0.1:{port}"
    deadline = time.monotonic() + 90
    while rewards(extra, "status").returncode:
        assert process.poll() is None, "the head has ended"
        assert time.monotonic() < deadline, "the head does not answer"
        time.sleep(1)
    yield extra
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def test_rewards_without_a_run(head: dict[str, str], tmp_path: Path) -> None:
    """Deployed, asked, shared by a run that leaves them alone, and deleted."""
    port, config = free_port(), str(REPO / "configs" / "quickstart.yaml")
    assert status(head) == []
    served = rewards(head, "serve", config, "--set", f"scorers.http.port={port}")
    assert served.returncode == 0, served.stderr
    assert f"POST http://127.0.0.1:{port}/geneval" in served.stdout
    again = rewards(head, "serve", config, "--set", f"scorers.http.port={port}")
    assert again.returncode == 0, again.stderr

    line = held_out_lines()[0]
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (128, 128, 128)).save(buffer, format="PNG")
    (tmp_path / "image.png").write_bytes(buffer.getvalue())
    body = {"images": [base64.b64encode(buffer.getvalue()).decode()], "prompts": [""], "metadata": [line]}
    answer = requests.post(f"http://127.0.0.1:{port}/geneval", json=body, timeout=60)
    assert answer.json()["scores"] == [0.0]
    bad = requests.post(f"http://127.0.0.1:{port}/geneval", json=body | {"metadata": [{}]}, timeout=60)
    assert (bad.status_code, bad.json()["error"]) == (400, "not GenEval metadata: metadata.tag: missing")
    arguments = ["score", "--reward", "geneval", "--metadata", json.dumps(line), str(tmp_path / "image.png")]
    scored = rewards(head, *arguments, "--address", head["RAY_ADDRESS"])
    assert json.loads(scored.stdout.splitlines()[-1])["score"] == 0.0, scored.stderr

    refused = nft_ray(tmp_path, "refused", flags=(), extra=head)
    assert refused.returncode == 1
    assert "reward-geneval exists on this cluster already; set scorers.attach=true" in refused.stderr.splitlines()[-1]
    shared = nft_ray(tmp_path, "shared", "scorers.attach=true", flags=(), extra=head)
    assert shared.returncode == 0, shared.stderr
    other = nft_ray(tmp_path, "other", "scorers.attach=true", "rewards.geneval.credit=soft", flags=(), extra=head)
    assert "rewards.geneval.credit is 'strict' there, 'soft' here" in other.stderr.splitlines()[-1]
    assert [one["running"] for one in status(head)] == [1]

    mistaken = rewards(head, "delete", "genevall")
    assert "did you mean geneval?" in mistaken.stderr.splitlines()[-1]
    assert rewards(head, "delete", "geneval").returncode == 0
    assert status(head) == []
