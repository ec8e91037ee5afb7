"""Actors that are plain objects, for pools without Ray: two of its functions are replaced by ones that take notes."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from actors import answers, seats
from actors.pool import WorkerPool


class Actor:
    """Answers as it is told: `script` holds what each further call gives (an exception is raised)."""

    def __init__(self, name: str, script: list[Any]) -> None:
        self.name, self.script, self.alive, self.running, self.peak = name, script, True, 0, 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.__ray_ready__ = SimpleNamespace(remote=self.call)

    async def call(self) -> Any:
        self.running += 1
        self.peak = max(self.peak, self.running)
        await self.gate.wait()
        self.running -= 1
        given = self.script.pop(0) if self.script else self.name
        if isinstance(given, Exception):
            raise given
        return given


class World:
    """Every actor that a pool has spawned; `scripts` are taken by the next ones."""

    def __init__(self) -> None:
        self.actors: list[Actor] = []
        self.scripts: list[list[Any]] = []
        self.prepared: list[str] = []

    def spawn(self, name: str, seat: int) -> Actor:
        self.actors.append(Actor(name, self.scripts.pop(0) if self.scripts else []))
        return self.actors[-1]

    async def prepare(self, actor: Actor) -> None:
        self.prepared.append(actor.name)

    def pool(self, num_workers: int, **limits: Any) -> WorkerPool:
        limits = {"timeout_s": 5.0, "place_s": 5.0, "max_in_flight": 2, "max_attempts": 3, **limits}
        return WorkerPool("w", num_workers, spawn=self.spawn, place="to start", **{"prepare": self.prepare, **limits})


def world_without_ray(monkeypatch: pytest.MonkeyPatch) -> World:
    """Pauses are a hundredth of what they are."""

    def kill(actor: Actor) -> None:
        actor.alive = False

    ray = SimpleNamespace(kill=kill, cancel=lambda ref: None, available_resources=dict)
    monkeypatch.setattr(seats, "ray", ray)
    monkeypatch.setattr(answers, "ray", ray)
    monkeypatch.setattr(seats, "PAUSE_S", 0.01)
    monkeypatch.setattr(seats, "LONGEST_PAUSE_S", 0.04)
    return World()


def send(actor: Actor) -> list[Any]:
    return [asyncio.ensure_future(actor.call())]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what takes no more than a few turns of the loop."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


def died() -> Exception:
    return ActorDiedError()


READY = "ready"
