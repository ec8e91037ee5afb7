"""Clusters that have no room: too small for a piece, still to grow, with a disk that runs full. Real raylets."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from tests.chaos.test_head import kill, processes
from tests.command_line import NO_MLFLOW, environment, nft_ray, ray_of_its_own, sets
from tests.conftest import free_port
from tests.examples import QUICKSTART, SMALL, few_lines

pytestmark = [pytest.mark.ray, pytest.mark.slow]
STORE = 80 * 2**20
LISTS = (
    *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter"),
)
"""What else Ray wants to see in the file of `ray up`."""


@pytest.fixture
def home() -> Iterator[dict[str, str]]:
    with ray_of_its_own() as variables:
        try:
            yield variables | {"RAY_AUTH_MODE": "token"}
        finally:
            kill(processes(variables))


def ray_start(home: dict[str, str], *options: str, **extra: str) -> None:
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--object-store-memory={STORE}", *options]
    variables = environment(Path(home["HOME"]), home | extra)
    subprocess.run(start, env=variables, check=True, capture_output=True, timeout=60)


def head(home: dict[str, str], *options: str, port: int = 0, **extra: str) -> str:
    """The address of a head of 1 CPU."""
    port = port or free_port()
    place = [f"--temp-dir={home['RAY_TMPDIR']}", "--include-dashboard=false", "--num-cpus=1"]
    ray_start(home, "--head", f"--port={port}", *place, *options, **extra)
    return f"127.0.0.1:{port}"


def train(tmp_path: Path, home: dict[str, str], address: str, *settings: str) -> subprocess.CompletedProcess[str]:
    more = sets(*SMALL, NO_MLFLOW, few_lines(tmp_path, every=40), "run.name=x", "run.num_epochs=1", *settings)
    return nft_ray("train", str(QUICKSTART), *more, "--address", address, runs=tmp_path, ray=home)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    return done.stderr.splitlines()[-1]


def test_two_nodes_of_one_cpu_have_no_room_for_the_fifth_piece_of_four_tenths(
    home: dict[str, str], tmp_path: Path
) -> None:
    address = head(home)
    ray_start(home, f"--address={address}", "--num-cpus=1")
    pieces = ["sampler.num_workers=3", "sampler.num_cpus=0.4", "learner.num_cpus=0.4", "rewards.geneval.num_cpus=0.4"]
    done = train(tmp_path, home, address, *pieces)
    assert done.returncode == 1, done.stderr
    line = last_line(done)
    assert "no node has room for" in line
    assert "the nodes have 2 x 1 CPUs" in line
    assert "deploying" not in done.stdout


@pytest.mark.full
def test_a_cluster_without_a_node_for_it_grows_and_the_run_goes_on(home: dict[str, str], tmp_path: Path) -> None:
    """The autoscaler is Ray's own; its nodes are raylets on this machine. `ray up` leaves its file in the home."""
    port = free_port()
    worker = {"resources": {"CPU": 1, "GPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 1}
    config = {
        "cluster_name": "fake",
        "max_workers": 1,
        "provider": {"type": "fake_multinode", "gcs_address": f"127.0.0.1:{port}"},
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "gpu": worker,
        },
        "head_node_type": "ray.head.default",
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 5,
        "auth": {},
        "docker": {},
        **{key: [] for key in LISTS},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
    }
    file = tmp_path / "autoscaler.yaml"
    file.write_text(yaml.safe_dump(config))
    fake = {"RAY_FAKE_CLUSTER": "1", "RAY_OVERRIDE_NODE_ID_FOR_TESTING": "f" * 55 + "0"}
    address = head(home, f"--autoscaling-config={file}", port=port, **fake)
    needs_gpu = ["learner.num_gpus=1", "sampler.num_workers=1", "cluster.wait_s=90"]
    done = train(tmp_path, home, address, *needs_gpu)
    assert done.returncode == 0, done.stderr
    assert (
        "the cluster has to grow, for up to 90 s (cluster.wait_s): the run needs 1 GPUs (learner 1 x 1)" in done.stderr
    )
    Path(home["HOME"], "ray_bootstrap_config.yaml").write_text(file.read_text())
    refused = train(tmp_path, home, address, "run.name=y", "learner.num_gpus=4")
    assert refused.returncode == 1
    assert "the run needs 4 GPUs" in last_line(refused)


FULL = """
import asyncio, sys
from nft_ray.cli.cluster import cluster
from nft_ray.cli.failures import quiet
from actors.roles import ray_roles
from deployments.build import deploy
from deployments.plane import delete
from nft_ray.cli.failures import explained
from nft_ray.prompts.draw import epoch_requests, experiment_prompts
from tests.fakes import FakeLearnerCore, FakeSamplerCore, fake_config, fake_load_reward

config = fake_config(
    model={"height": 1024, "width": 1024},
    prompts={"groups_per_epoch": 16, "images_per_group": 8},
    sampler={"num_workers": 1, "num_steps": 10, "num_times": 9},
    learner={"num_workers": 1},
    rewards={"jpeg_compressibility": {"num_replicas": 1, "num_cpus": 0.1}},
)

async def main():
    names = await deploy(config, fake_load_reward)
    train, _ = experiment_prompts(config)
    async with ray_roles(config, FakeSamplerCore, FakeLearnerCore) as roles:
        await roles.samplers.load((await roles.learners.adapters())[0])
        kept = []
        for request in epoch_requests(train, config, epoch=0, policy_version=0):
            rollout = await roles.samplers.rollout(request)
            kept.append((rollout, await roles.scorers.score(request, rollout.images)))
        print("spilled")

quiet()
try:
    with cluster(config, sys.argv[1], print):
        asyncio.run(main())
except Exception as error:
    print(explained(error))
"""


@contextmanager
def tmpfs(folder: Path, mib: int) -> Iterator[None]:
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "none", folder], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.full
@pytest.mark.parametrize("mib", [1000, 20])
def test_what_the_store_does_not_hold_is_spilled_until_the_disk_is_full(
    mib: int, home: dict[str, str], tmp_path: Path
) -> None:
    with tmpfs(tmp_path / "spill", mib):
        address = head(home, f"--object-spilling-directory={tmp_path / 'spill'}", "--num-cpus=2")
        done = subprocess.run(
            [sys.executable, "-c", FULL, address],
            env=environment(tmp_path, home),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        kill(processes(home))
    said = done.stdout.splitlines()[-1]
    if mib == 20:
        assert "the disk of a node is full" in said, done.stdout + done.stderr
    else:
        assert said == "spilled", done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
