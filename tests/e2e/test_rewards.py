"""The reward plane through the command line: scaled and shot at under a run that goes on; deployed without a run."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image
from safetensors.numpy import load_file

from nft_ray.shapes.grammar import test_lines as held_out_lines
from tests.command_line import NO_MLFLOW, REPO, environment, nft_ray, nft_ray_here, sets
from tests.conftest import LocalRay
from tests.deployments.sglang_folder import until
from tests.examples import QUICKSTART, SMALL, few_lines
from tests.rewards.misbehaving_server import MisbehavingServer

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def rewards(ray: LocalRay, *arguments: str) -> subprocess.CompletedProcess[str]:
    return nft_ray("rewards", *arguments, runs=Path("runs"), ray=ray.environment)


def status(ray: LocalRay) -> list[dict[str, Any]]:
    done = rewards(ray, "status", "--json")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def train(runs: Path, name: str, *settings: str) -> list[str]:
    """A run that is evaluated at its start only."""
    few = [few_lines(runs), "evaluation.every=500", "sampler.num_workers=1", "run.checkpoint_every=1", NO_MLFLOW]
    return ["train", str(QUICKSTART), *sets(*SMALL, *few, f"run.name={name}", *settings)]


def policy(run: Path, epoch: int) -> dict[str, bytes]:
    weights = load_file(run / "checkpoints" / f"epoch-{epoch:06d}" / "ema.safetensors")
    return {name: value.tobytes() for name, value in weights.items()}


@pytest.fixture(autouse=True)
def nothing_deployed(local_ray: LocalRay) -> Iterator[None]:
    """What a test that fails leaves deployed would fail the next one, too."""
    from ray import serve

    from deployments.plane import delete

    yield
    delete(list(serve.status().applications))


def replica_pids(ray: LocalRay) -> list[int]:
    """The processes of the reward's replicas: Ray names a worker after the actor that it runs."""
    found = subprocess.run(["pgrep", "-f", "ray::ServeReplica:.*/geneval"], capture_output=True, text=True)
    ours = ray.environment["RAY_AUTH_TOKEN_PATH"]
    return [int(pid) for pid in found.stdout.split() if ours in Path(f"/proc/{pid}/environ").read_text()]


def test_scaled_from_one_to_three_and_one_of_them_killed_changes_no_bit(tmp_path: Path, local_ray: LocalRay) -> None:
    """The rewards are what they would have been, so the policy is that of a run of as many epochs left in peace."""
    from deployments.plane import Dashboard, find

    log = (tmp_path / "log.txt").open("w+")
    process = subprocess.Popen(
        [sys.executable, "-m", "nft_ray", *train(tmp_path, "disturbed", "run.num_epochs=500")],
        cwd=REPO,
        env=environment(tmp_path, local_ray.environment),
        stdout=log,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    metrics = tmp_path / "disturbed" / "metrics.jsonl"

    def epochs() -> int:
        return len(metrics.read_text().splitlines()) - 1 if metrics.exists() else -1

    def wait_for(epoch: int) -> None:
        deadline = time.monotonic() + 100
        while epochs() < epoch:
            assert process.poll() is None, Path(log.name).read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    wait_for(1)
    scaled = rewards(local_ray, "scale", "geneval", "--replicas", "3")
    assert scaled.returncode == 0, scaled.stderr
    deadline = time.monotonic() + 100
    while (now := find(Dashboard(local_ray.dashboard), "geneval")) and (now.target, now.running) != (3, 3):
        assert time.monotonic() < deadline, now
        time.sleep(0.2)
    assert len(replica_pids(local_ray)) == 3
    before = epochs()
    wait_for(before + 1)
    os.kill(replica_pids(local_ray)[0], signal.SIGKILL)
    wait_for(before + 4)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, Path(log.name).read_text()
    saved = sorted((tmp_path / "disturbed" / "checkpoints").glob("epoch-??????/state.json"))
    last = int(saved[-1].parent.name.removeprefix("epoch-"))
    assert last >= before + 3
    lines = [json.loads(line) for line in metrics.read_text().splitlines()][: last + 1]
    assert [line["epoch"] for line in lines] == list(range(last + 1))
    assert [line["reward/missing"] for line in lines[1:]] == [0.0] * last
    calm = nft_ray_here(*train(tmp_path, "calm", f"run.num_epochs={last}"), "--local", runs=tmp_path)
    assert calm.returncode == 0, calm.stderr
    assert policy(tmp_path / "disturbed", last) == policy(tmp_path / "calm", last)


def test_rewards_without_a_run(tmp_path: Path, local_ray: LocalRay) -> None:
    """Deployed, asked, shared by a run that leaves them alone, and deleted."""
    port, config = local_ray.http_port, str(QUICKSTART)
    assert status(local_ray) == []
    served = rewards(local_ray, "serve", config, *sets(f"scorers.http.port={port}"))
    assert served.returncode == 0, served.stderr
    assert f"POST http://127.0.0.1:{port}/geneval" in served.stdout
    again = rewards(local_ray, "serve", config, *sets(f"scorers.http.port={port}"))
    assert again.returncode == 0, again.stderr

    line = held_out_lines()[0]
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (128, 128, 128)).save(buffer, format="PNG")
    (tmp_path / "image.png").write_bytes(buffer.getvalue())
    body = {"images": [base64.b64encode(buffer.getvalue()).decode()], "prompts": [""], "metadata": [line]}
    answer = requests.post(f"http://127.0.0.1:{port}/geneval", json=body, timeout=60)
    assert answer.json()["scores"] == [0.0]
    bad = requests.post(f"http://127.0.0.1:{port}/geneval", json=body | {"metadata": [{}]}, timeout=60)
    assert (bad.status_code, bad.json()["error"]) == (
        400,
        "reward geneval: not GenEval metadata: metadata.tag: missing",
    )
    arguments = ["score", "--reward", "geneval", "--metadata", json.dumps(line), str(tmp_path / "image.png")]
    scored = rewards(local_ray, *arguments, "--address", local_ray.environment["RAY_ADDRESS"])
    assert json.loads(scored.stdout.splitlines()[-1])["score"] == 0.0, scored.stderr

    shared = nft_ray(*train(tmp_path, "shared", "scorers.attach=true"), runs=tmp_path, ray=local_ray.environment)
    assert shared.returncode == 0, shared.stderr
    assert [(one["name"], one["running"]) for one in status(local_ray)] == [("shared/geneval", 1)]

    mistaken = rewards(local_ray, "delete", "genevall")
    assert "did you mean shared/geneval?" in mistaken.stderr.splitlines()[-1]
    assert rewards(local_ray, "delete", "geneval").returncode == 0
    assert status(local_ray) == []


def test_a_run_killed_with_9_goes_on_by_the_same_command_beside_a_run_of_another_experiment(
    tmp_path: Path, local_ray: LocalRay
) -> None:
    """Nobody tidies up: what the killed one has deployed is used again; a run with the same reward is not disturbed."""
    one = {"rewards.geneval.num_cpus": 0.2, "sampler.num_cpus": 0.2, "learner.num_cpus": 0.2}
    small = [f"{name}={value}" for name, value in one.items()]
    command = train(tmp_path, "killed", "run.num_epochs=40", *small)

    def start(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "nft_ray", *arguments],
            cwd=REPO,
            env=environment(tmp_path, local_ray.environment),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    first, metrics = start(*command), tmp_path / "killed" / "metrics.jsonl"
    until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 2, timeout_s=100)
    first.kill()
    first.communicate()
    assert [state["name"] for state in status(local_ray)] == ["killed/geneval"]
    before, again = len(metrics.read_text().splitlines()), start(*command)
    until(lambda: len(metrics.read_text().splitlines()) > before, timeout_s=100)  # else the other one would collect it
    other = start(*train(tmp_path, "other", "run.num_epochs=2", *small))
    said = {process: process.communicate(timeout=120)[1] for process in (again, other)}
    assert (again.returncode, other.returncode) == (0, 0), said
    assert "using killed/geneval again, which an earlier start of this run has left" in said[again]
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(41))
    assert status(local_ray) == []


@pytest.mark.parametrize("misbehaves", ["500", "hang"])
def test_a_monitor_whose_endpoint_is_down_costs_no_epoch(tmp_path: Path, local_ray: LocalRay, misbehaves: str) -> None:
    """Its real client, with patient settings: were it waited for, each of the groups would cost its deadline."""
    with MisbehavingServer(misbehaves) as server:
        section = f"{{eval_only: true, num_cpus: 0.1, urls: ['{server.url}'], timeout_s: 8, deadline_s: 9}}"
        monitor = [f"rewards.unified_reward={section}", "scorers.monitor_timeout_s=10", "rewards.geneval.num_cpus=0.2"]
        command = train(tmp_path, "monitored", "run.num_epochs=6", *monitor)
        done = nft_ray(*command, runs=tmp_path, ray=local_ray.environment)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "monitored" / "metrics.jsonl").read_text().splitlines()]
    assert [line["reward/missing/unified_reward"] for line in lines[1:]] == [1.0] * 6
    assert [line["reward/missing"] for line in lines[1:]] == [0.0] * 6
    assert done.stderr.count("reward unified_reward is down: ") == 1
    assert len(server.bodies) <= 100, "asked of the first 48 lines, twice at most: not of 72 images and 48 lines more"
