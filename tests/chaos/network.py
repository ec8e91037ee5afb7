"""Network namespaces: nodes with addresses of their own, whose cable can be pulled. Needs root and `ip`."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """One namespace: its name, its address, and how a command is run inside."""

    name: str
    address: str
    cable: str
    """The bridge's end of its cable."""

    @property
    def inside(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.name)

    def unplug(self) -> None:
        """Nothing arrives any more, and nobody is told: as with a switch that fails."""
        _ip("link", "set", self.cable, "down")

    def plug(self) -> None:
        _ip("link", "set", self.cable, "up")

    @property
    def plugged(self) -> bool:
        return Path(f"/sys/class/net/{self.cable}/flags").read_text().strip().endswith(("1", "3"))  # IFF_UP


class Network:
    """A bridge, 10.N.0.1 on this side, and the namespaces that hang on it."""

    def __init__(self, number: int) -> None:
        self._bridge, self._prefix = f"nr{number}", f"10.{number}.0"
        self.places: dict[str, Place] = {}
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("addr", "add", f"{self.gateway}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")

    @property
    def gateway(self) -> str:
        return f"{self._prefix}.1"

    def place(self, name: str) -> Place:
        """The namespace of that name, made where there is none yet."""
        return self.places.get(name) or self._made(name)

    def _made(self, name: str) -> Place:
        number = len(self.places) + 2
        space, ours, theirs = f"{self._bridge}-{number}", f"{self._bridge}o{number}", f"{self._bridge}i{number}"
        _ip("netns", "add", space)
        _ip("link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", space)
        _ip("link", "set", ours, "master", self._bridge, "up")
        _ip("-n", space, "link", "set", "lo", "up")
        _ip("-n", space, "addr", "add", f"{self._prefix}.{number}/24", "dev", theirs)
        _ip("-n", space, "link", "set", theirs, "up")
        self.places[name] = Place(space, f"{self._prefix}.{number}", ours)
        return self.places[name]

    def end(self) -> None:
        for place in self.places.values():
            _ip("netns", "del", place.name)
        _ip("link", "del", self._bridge)


def possible() -> bool:
    """Whether this machine lets us make namespaces."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"nr-try-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return False
    _ip("netns", "del", name)
    return True


@contextmanager
def network() -> Iterator[Network]:
    """A network while the body runs; its numbers come from the process's, so that two suites do not meet."""
    one = Network(100 + os.getpid() % 100)
    try:
        yield one
    finally:
        one.end()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
