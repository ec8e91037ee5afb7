"""A Ray of real processes that can be hurt: a head and further nodes by `ray start`, with own folder, token and ports.

    Cluster ── Node "head" ── ray start --block ── gcs_server, raylet, dashboard, ...
           └── Node "a"    ── ray start --block ── raylet ── workers (the run's actors, Serve's replicas)

Every process is known by its environment (the token's path) and every worker by the node whose raylet is above it, so
nothing of another Ray on this machine is ever touched. Nodes may live in network namespaces of their own (`apart`).
"""

import contextlib
import json
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

from tests.chaos.network import Network
from tests.command_line import REPO
from tests.conftest import free_port

T = TypeVar("T")
RAY = str(Path(sys.executable).with_name("ray"))
SABOTAGE = Path(__file__).with_name("sabotage")
SAMPLER, LEARNER, REPLICA = "ray::SamplerActor", "ray::LearnerActor", "ray::ServeReplica"
STORE_BYTES = 200 * 2**20
QUICK_HEALTH = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "12",
}
"""A lost node is found within 5 s, a lost head within 12 s, instead of a minute each: the same path, only sooner."""


def until(what: str, found: Callable[[], T], timeout_s: float = 120.0, every_s: float = 0.05) -> T:
    """The first true value of `found()`; AssertionError where there is none within `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not (value := found()):
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(every_s)
    return value


def kill(pids: Sequence[int], number: int = signal.SIGKILL) -> None:
    """Send a signal to each; who is gone already is none."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


@dataclass(eq=False)
class Node:
    """One `ray start --block` and what it started. `place`: its network namespace, or nothing."""

    name: str
    process: subprocess.Popen[bytes]
    place: str = ""
    metrics_port: int = 0

    def find(self, program: str) -> int:
        """The process id of its raylet or gcs_server."""
        (pid,) = [one.pid for one in psutil.Process(self.process.pid).children() if one.name() == program]
        return pid

    def kill(self, program: str = "raylet") -> None:
        """What the kernel does to it: no goodbye."""
        os.kill(self.find(program), signal.SIGKILL)

    def end(self) -> None:
        """Every process of the node, whatever state it is in."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
        self.process.wait()


class Cluster:
    """A running Ray. `environment` is what a process needs to join it; `faults` is where sabotage is ordered."""

    def __init__(
        self, *, cpus: float = 8, store_bytes: int = STORE_BYTES, network: Network | None = None, **variables: str
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="nr-", dir="/tmp"))  # Ray's socket paths have a limit
        self.faults = self.folder / "faults"
        self.faults.mkdir()
        (self.folder / "token").write_text(secrets.token_hex(32))
        self.host = network.gateway if network else "127.0.0.1"
        self._network, self._store_bytes = network, store_bytes
        self.port, dashboard = free_port(), free_port()
        self.dashboard = f"{self.host}:{dashboard}"
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        self.environment = kept | QUICK_HEALTH | variables
        self.environment |= {
            "HOME": str(self.folder),
            "RAY_AUTH_TOKEN_PATH": f"{self.folder}/token",
            "RAY_AUTH_MODE": "token",
            "RAY_ADDRESS": f"{self.host}:{self.port}",
            "RAY_API_SERVER_ADDRESS": f"http://{self.dashboard}",
            "NFT_RAY_FAULTS": str(self.faults),
            "PYTHONPATH": f"{SABOTAGE}{os.pathsep}{REPO}",
            "OMP_NUM_THREADS": "1",
        }
        self.nodes: dict[str, Node] = {}
        head = ["--head", f"--port={self.port}", f"--dashboard-port={dashboard}", f"--temp-dir={self.folder}/ray"]
        self._start("head", cpus, [*head, f"--dashboard-host={self.host}", f"--ray-client-server-port={free_port()}"])
        until("the head answers", self._answers, 90)

    @property
    def head(self) -> Node:
        return self.nodes["head"]

    def add(self, name: str, cpus: float = 8, *, apart: bool = False) -> Node:
        """A further node, when it is known to the cluster; `apart`: in a network namespace of its own."""
        known = len(self.alive_nodes())
        node = self._start(name, cpus, [f"--address={self.host}:{self.port}"], apart=apart)
        until(f"node {name} joins", lambda: len(self.alive_nodes()) > known, 60)
        return node

    def start_node(self, name: str, cpus: float = 8) -> None:
        """As `add`, without waiting for it."""
        self._start(name, cpus, [f"--address={self.host}:{self.port}"])

    def far(self) -> list[Node]:
        """The nodes in network namespaces."""
        return [node for node in self.nodes.values() if node.place]

    def unplug(self, name: str) -> None:
        assert self._network is not None
        self._network.places[name].unplug()

    def replug(self, name: str) -> None:
        """Its network is back, and with it a new node: Ray ends one that it had given up."""
        assert self._network is not None
        self.nodes.pop(name).end()
        self._network.places[name].plug()
        known = len(self.alive_nodes())
        self._start(name, 2, [f"--address={self.host}:{self.port}"], apart=True)
        until(f"node {name} joins again", lambda: len(self.alive_nodes()) > known, 60)

    def plugged(self, name: str) -> bool:
        assert self._network is not None
        return self._network.places[name].plugged

    def lose(self, name: str) -> None:
        """A node's raylet is killed; its workers end with it."""
        self.nodes.pop(name).kill()

    def end(self) -> None:
        """Every process, and the folder."""
        for node in self.nodes.values():
            node.end()
        for one in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def processes(self, title: str = "") -> list[psutil.Process]:
        """Those of this Ray whose command line begins so (Ray names a worker `ray::CLASS`), oldest first."""
        found = []
        for one in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if (
                    " ".join(one.cmdline()).startswith(title)
                    and one.environ().get("HOME") == str(self.folder)
                    and one.status() != psutil.STATUS_ZOMBIE
                ):
                    found.append((one.create_time(), one.pid, one))
        return [one for _, _, one in sorted(found, key=lambda row: row[:2])]

    def pids(self, title: str) -> list[int]:
        return [one.pid for one in self.processes(title)]

    def ready(self, title: str) -> list[int]:
        """Those that are not starting: Ray puts the method that runs behind the title."""
        starting = tuple(f"{title}.{method}" for method in ("__init__", "__ray_ready__", "download", "build", "join"))
        found = []
        for one in self.processes(title):
            with contextlib.suppress(psutil.Error):
                if not " ".join(one.cmdline()).startswith(starting):
                    found.append(one.pid)
        return found

    def some(self, title: str, count: int, chosen: random.Random) -> list[int]:
        """`count` of the workers that serve, or none where there are not so many."""
        found = self.ready(title)
        return chosen.sample(found, count) if len(found) >= count else []

    def node_of(self, pid: int) -> str:
        """Whose worker that is."""
        above = {one.pid for one in psutil.Process(pid).parents()}
        return next(name for name, node in self.nodes.items() if node.process.pid in above)

    def store_mib(self) -> float:
        """What is in the object stores of the nodes, as each tells Prometheus; a node that does not answer has none."""
        total = 0.0
        for node in self.nodes.values():
            with contextlib.suppress(OSError):
                with urllib.request.urlopen(f"http://{self.host}:{node.metrics_port}/metrics", timeout=5) as answer:
                    text = answer.read().decode()
                total += sum(
                    float(used) for used in re.findall(r"^ray_object_store_used_memory{.*} (\S+)$", text, re.M)
                )
        return total / 2**20

    def ask(self, path: str, below: str = "api/", tell: Mapping[str, Any] | None = None) -> Any:
        """What the dashboard's REST interface says, or says to what it is told."""
        data = None if tell is None else json.dumps(tell).encode()
        request = urllib.request.Request(f"http://{self.dashboard}/{below}{path}", data=data)
        request.add_header("Authorization", f"Bearer {(self.folder / 'token').read_text()}")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def states(self, kind: str) -> list[dict[str, Any]]:
        """Of the state API: actors, placement_groups, nodes, jobs."""
        found: list[dict[str, Any]] = self.ask(f"v0/{kind}?limit=10000&detail=1")["data"]["result"]["result"]
        return found

    def alive_nodes(self) -> list[dict[str, Any]]:
        return [node for node in self.states("nodes") if node["state"] == "ALIVE"]

    def applications(self) -> list[str]:
        """Serve's."""
        try:
            return list(self.ask("serve/applications/")["applications"])
        except urllib.error.HTTPError:
            return []

    def left(self) -> list[str]:
        """What a run that has ended would leave: actors (Serve's own apart), applications, placement groups."""
        actors = [
            f"actor {actor['name'] or actor['class_name']}"
            for actor in self.states("actors")
            if actor["state"] not in ("DEAD",) and actor["ray_namespace"] != "serve"
        ]
        groups = [f"group {group['name']}" for group in self.states("placement_groups") if group["state"] != "REMOVED"]
        workers = [f"process {pid}" for title in (SAMPLER, LEARNER) for pid in self.pids(title)]
        return [*actors, *groups, *workers, *(f"application {name}" for name in self.applications())]

    def nothing_left(self, timeout_s: float = 30.0) -> None:
        """AssertionError with what is still there: what was killed is gone a moment later."""
        deadline = time.monotonic() + timeout_s
        while (found := self.left()) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not found, f"left on the cluster: {found}"

    def order(self, fault: str, times: int = 1) -> None:
        """The next so many calls that `sabotage` knows as `fault` go wrong."""
        for _ in range(times):
            (self.faults / f"{fault}.{secrets.token_hex(4)}").touch()

    def ordered(self, fault: str) -> int:
        """How many of them have not happened yet."""
        return len(list(self.faults.glob(f"{fault}.*")))

    def _start(self, name: str, cpus: float, more: Sequence[str], *, apart: bool = False) -> Node:
        place = self._network.place(name) if apart and self._network else None
        host = place.address if place else self.host
        command = [*(place.inside if place else ()), RAY, "start", "--block", "--disable-usage-stats", *more]
        command += [f"--num-cpus={cpus:g}", f"--object-store-memory={self._store_bytes}", f"--node-ip-address={host}"]
        ports = {kind: free_port() for kind in ("dashboard-agent-listen", "metrics-export", "runtime-env-agent")}
        command += [f"--{kind}-port={port}" for kind, port in ports.items()]
        log = (self.folder / f"{name}.log").open("ab")
        process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        log.close()
        self.nodes[name] = Node(name, process, place.name if place else "", ports["metrics-export"])
        return self.nodes[name]

    def _answers(self) -> bool:
        assert self.head.process.poll() is None, (self.folder / "head.log").read_text()[-2000:]
        try:
            return bool(self.alive_nodes())
        except (OSError, KeyError, TypeError, ValueError):
            return False


@contextmanager
def cluster(**options: Any) -> Iterator[Cluster]:
    """A Ray while the body runs; what its head wrote last goes to stderr where the body fails."""
    one = Cluster(**options)
    try:
        yield one
    except BaseException:
        for file in (one.folder / "head.log", *one.folder.glob("ray/session_2*/logs/gcs_server.*")):
            if file.exists():
                print(f"{file.name}: {file.read_text(errors='replace')[-2000:]}", file=sys.stderr)  # noqa: T201
        raise
    finally:
        one.end()
