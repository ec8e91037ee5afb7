"""What every test shares: threads that suit a small machine, one local Ray per test process, and who runs what.

With several processes (pytest-xdist) a file is never split, and all files that need the shared Ray go to one of them,
first: while they wait for processes, the other one computes.
"""

import os
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


TOKEN = secrets.token_hex(32)
"""One for all Rays of this process: Ray reads it once."""
GOLDENS = Path(os.environ.get("NFT_RAY_GOLDENS", Path(__file__).parents[2] / "shared" / "goldens"))
PROCESSES = 2
TOGETHER = {
    "ray": (
        "actors/test_colocation.py",
        "actors/test_downloads.py",
        "actors/test_learners.py",
        "actors/test_nodes.py",
        "actors/test_samplers.py",
        "actors/test_scorers.py",
        "deployments/test_ownership.py",
        "deployments/test_plane.py",
        "deployments/test_sglang_actor.py",
        "e2e/test_evaluate.py",
        "e2e/test_presets.py",
        "e2e/test_rewards.py",
        "e2e/test_run.py",
        "test_roles.py",
    ),
    "workers": tuple(f"chaos/test_{name}.py" for name in ("workers", "faults", "sharing", "files")),
    "drivers": tuple(f"chaos/test_{name}.py" for name in ("driver", "cluster_gone", "limits", "jobs")),
    "ranks": ("cores/test_learner.py", "cores/test_policy.py"),
}
"""Files that share what is dear to start, and so a process: the fixture `local_ray`, the processes of `on_ranks`."""
GROUP_OF = {f"tests/{file}": group for group, files in TOGETHER.items() for file in files}


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two for a whole suite; who names files wants them at once, in this process."""
    named = config.invocation_params.args
    return 0 if any(str(argument).partition("::")[0].endswith(".py") for argument in named) else PROCESSES


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file, or a group of files, goes to one process as a whole (xdist's `loadgroup` has no effect in pytest 9.2)."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return GROUP_OF.get(file, file)

    return Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files first, so that all processes end together."""
    for item in items:
        if "local_ray" in getattr(item, "fixturenames", ()) and GROUP_OF.get(_file(item)) != "ray":
            raise pytest.UsageError(f"{_file(item)} uses local_ray: name it in TOGETHER of tests/conftest.py")
    order = {group: index for index, group in enumerate(TOGETHER)}
    items.sort(key=lambda item: (order.get(GROUP_OF.get(_file(item), ""), len(order)), "/e2e/" not in _file(item)))


def _file(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0]


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Folder with the numbers of the published implementation; it comes with the task, not with the repository."""
    if not GOLDENS.is_dir():
        pytest.skip(f"no goldens at {GOLDENS}; set NFT_RAY_GOLDENS")
    return GOLDENS


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `tiny_model` keeps the tiny pipelines, made once per session, whichever process needs one first."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny"
    folder.mkdir(exist_ok=True)
    return folder


@dataclass(frozen=True, kw_only=True)
class LocalRay:
    """A running Ray: its dashboard's host:port, the port of Serve's proxy, and what a process needs to join it."""

    dashboard: str
    http_port: int
    environment: dict[str, str]


@pytest.fixture(scope="session")
def local_ray() -> Iterator[LocalRay]:
    """The one Ray of this process, of 2 logical CPUs and 2 GPUs that nobody looks at, with Serve on loopback.

    A file that uses it leaves no application and no named actor behind, which is checked.
    """
    with own_ray(num_gpus=2, include_dashboard=True, dashboard_port=free_port()) as ray:
        yield ray


@pytest.fixture(autouse=True, scope="module")
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After a file's last test: no named actor of it is on the shared Ray, and no Serve application."""
    yield
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return
    from ray import serve
    from ray.util import list_named_actors

    def left() -> list[str]:
        named = [one["name"] for one in list_named_actors(all_namespaces=True) if one["namespace"] != "serve"]
        return [*named, *serve.status().applications]

    deadline = time.monotonic() + 15  # who was killed is gone a moment later
    while (found := left()) and time.monotonic() < deadline:
        time.sleep(0.1)
    if found:
        for name in serve.status().applications:  # or every file after this one would fail, too
            serve.delete(name)
        pytest.fail(f"{request.node.name} leaves on the shared Ray: {found}")


@pytest.fixture(params=["aot_eager", pytest.param("inductor", marks=pytest.mark.large)])
def compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What compiles: one that only traces, which is where ours can be wrong, or torch's own, which takes a minute."""
    import torch

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=request.param))


def free_port() -> int:
    """A port of loopback that nobody listens on just now, and that neither the system nor Ray gives away by itself."""
    while True:
        port = 20_000 + secrets.randbelow(10_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@contextmanager
def own_ray(**options: Any) -> Iterator[LocalRay]:
    """A local Ray with its own folder and token, and with Serve."""
    import ray
    from ray import serve

    folder = tempfile.mkdtemp(prefix="nr-", dir="/tmp")  # short: Ray's socket paths have a limit
    with pytest.MonkeyPatch.context() as patch:
        (Path(folder) / "token").write_text(TOKEN)
        patch.setenv("RAY_AUTH_TOKEN_PATH", f"{folder}/token")
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # workers import the fakes
        patch.delenv("RAY_ADDRESS", raising=False)
        context = ray.init(
            num_cpus=2, object_store_memory=200 * 2**20, log_to_driver=False, _temp_dir=folder, **options
        )
        try:
            http_port = free_port()
            serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": http_port})
            join = {"RAY_ADDRESS": context.address_info["address"], "RAY_AUTH_MODE": "token", "HOME": folder}
            environment = {"RAY_AUTH_TOKEN_PATH": f"{folder}/token", **join}
            yield LocalRay(dashboard=context.dashboard_url, http_port=http_port, environment=environment)
        finally:
            serve.shutdown()  # or this process goes on looking for this cluster's controller
            ray.shutdown()
            os.environ.pop("RAY_AUTH_MODE", None)  # ray.init sets it, and it would outlive the token
            shutil.rmtree(folder, ignore_errors=True)
