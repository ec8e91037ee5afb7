"""The pool's rules with actors that are plain objects: Ray itself is replaced by two functions that take notes."""

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from actors import pool
from actors.pool import DeadlineError, WorkerPool, together, waiting


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
        return WorkerPool("w", num_workers, spawn=self.spawn, prepare=self.prepare, place="to start", **limits)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    def kill(actor: Actor) -> None:
        actor.alive = False

    monkeypatch.setattr(pool, "ray", SimpleNamespace(kill=kill, cancel=lambda ref: None))
    return World()


def send(actor: Actor) -> list[Any]:
    return [asyncio.ensure_future(actor.call())]


def died() -> Exception:
    return ActorDiedError()


READY = "ready"


def test_requests_are_bounded_and_spread(world: World) -> None:
    async def main() -> None:
        workers = world.pool(2, max_in_flight=2)
        await workers.start()
        for actor in world.actors:
            actor.gate.clear()
        calls = [asyncio.create_task(workers.call("work", send)) for _ in range(7)]
        await asyncio.sleep(0.01)
        assert [actor.running for actor in world.actors] == [2, 2]
        for actor in world.actors:
            actor.gate.set()
        names = [name for name, _ in await asyncio.gather(*calls)]
        assert set(names) == {"w-0", "w-1"}
        assert [actor.peak for actor in world.actors] == [2, 2]

    asyncio.run(main())


def test_a_dead_worker_is_replaced_and_its_request_retried(world: World) -> None:
    async def main() -> None:
        world.scripts = [[READY, died()]]
        workers = world.pool(1)
        await workers.start()
        name, _ = await workers.call("work", send)
        assert name == "w-0.1"
        assert [actor.alive for actor in world.actors] == [False, True]
        assert world.prepared == ["w-0", "w-0.1"]

    asyncio.run(main())


def test_the_cores_own_exception_is_not_retried(world: World) -> None:
    async def main() -> None:
        world.scripts = [[READY, KeyError("x")]]
        workers = world.pool(1)
        await workers.start()
        with pytest.raises(KeyError, match="x"):
            await workers.call("work", send)
        assert world.actors[0].alive
        assert (await workers.call("work", send))[0] == "w-0"

    asyncio.run(main())


def test_a_hanging_worker_is_replaced(world: World) -> None:
    async def main() -> None:
        workers = world.pool(1, timeout_s=0.05)
        await workers.start()
        world.actors[0].gate.clear()
        assert (await workers.call("work", send))[0] == "w-0.1"

    asyncio.run(main())


def test_a_request_gives_up_after_max_attempts(world: World) -> None:
    async def main() -> None:
        world.scripts = [[READY, died()] for _ in range(3)]
        workers = world.pool(1)
        await workers.start()
        with pytest.raises(RuntimeError, match=r"^w: work failed on 3 workers; last: ActorDiedError"):
            await workers.call("work", send)

    asyncio.run(main())


def test_the_pool_goes_on_with_who_is_left_and_then_says_that_nobody_is(world: World) -> None:
    async def main() -> None:
        world.scripts = [[READY, died()], [READY, "kept", died()], *[[died()] for _ in range(6)]]
        workers = world.pool(2)
        await workers.start()
        assert (await workers.call("work", send))[0] == "kept"
        with pytest.raises(RuntimeError, match=r"^w: no worker is left of 2"):
            await workers.call("work", send)
        assert not any(actor.alive for actor in world.actors)

    asyncio.run(main())


def test_a_replacement_that_cannot_be_prepared_stops_the_pool(world: World) -> None:
    async def main() -> None:
        world.scripts = [[READY, died()]]
        workers = world.pool(1)
        await workers.start()

        async def mismatch(actor: Actor) -> None:
            raise RuntimeError("w-0.1: another velocity")

        workers._prepare = mismatch
        with pytest.raises(RuntimeError, match="another velocity"):
            await workers.call("work", send)

    asyncio.run(main())


def test_a_broadcast_reaches_everyone_who_serves(world: World) -> None:
    async def main() -> None:
        world.scripts = [[READY], [READY, died()]]
        workers = world.pool(2)
        await workers.start()
        assert await workers.broadcast("load", send) == ["w-0"]
        await asyncio.gather(*workers._replacing)
        assert sorted(await workers.broadcast("load", send)) == ["w-0", "w-1.1"]

    asyncio.run(main())


def test_a_start_that_fails_kills_who_was_started(world: World) -> None:
    async def main() -> None:
        world.scripts = [[READY], [ValueError("no model")]]
        workers = world.pool(2)
        with pytest.raises(ValueError, match="no model"):
            await workers.start()
        workers.close()
        assert not any(actor.alive for actor in world.actors)

    asyncio.run(main())


def test_close_fails_those_who_wait(world: World) -> None:
    async def main() -> None:
        workers = world.pool(1, max_in_flight=1)
        await workers.start()
        world.actors[0].gate.clear()
        calls = [asyncio.create_task(workers.call("work", send)) for _ in range(2)]
        await asyncio.sleep(0.01)
        workers.close()
        with pytest.raises(RuntimeError, match="closed"):
            await calls[1]
        calls[0].cancel()
        assert not world.actors[0].alive

    asyncio.run(main())


def test_a_wait_says_what_it_waits_for(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(pool, "REPORT_S", 0.01)
    with caplog.at_level(logging.INFO), pytest.raises(DeadlineError, match=r"^a place: no answer within 0\.05 s$"):
        asyncio.run(waiting(asyncio.sleep(60), "a place", 0.05, lambda: "and the cluster has 1 free"))
    assert caplog.messages[0] == "waiting for a place (0 s) and the cluster has 1 free"


def test_a_pool_that_finishes_nothing_says_so(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pool, "REPORT_S", 0.01)

    async def main() -> None:
        workers = world.pool(1, timeout_s=0.1, max_attempts=1)
        await workers.start()
        world.actors[0].gate.clear()
        with pytest.raises(RuntimeError, match="no answer within"):
            await workers.call("work", send)

    with caplog.at_level(logging.INFO):
        asyncio.run(main())
    assert "waiting for w: 1 calls outstanding, 1 of 1 workers serve" in caplog.messages


def test_the_first_failure_cancels_the_rest() -> None:
    cancelled = []

    async def slow() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def fast() -> None:
        raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        asyncio.run(_together(slow, fast))
    assert cancelled == [True]


async def _together(*work: Any) -> None:
    await together([item() for item in work])
