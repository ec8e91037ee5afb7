"""Who serves and who is tried again when, with actors that are plain objects and pauses of hundredths of a second."""

import asyncio
import logging
from typing import Any

import pytest
import torch
from ray.exceptions import ObjectLostError

from actors import seats
from tests.actors.stand_ins import READY, World, died, send, until, world_without_ray

BROKEN = torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return world_without_ray(monkeypatch)


class Room:
    """Nobody beyond so many has a place; the others wait for one."""

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch, places: int) -> None:
        self.world, self.places = world, places
        monkeypatch.setattr(world, "spawn", self.spawn)

    def spawn(self, name: str, seat: int) -> Any:
        actor = World.spawn(self.world, name, seat)
        ready = actor.call

        async def placed() -> Any:
            while sum(one.alive for one in self.world.actors if getattr(one, "placed", False)) >= self.places:
                await asyncio.sleep(0.005)
            actor.placed = True  # type: ignore[attr-defined]
            return await ready()

        actor.__ray_ready__.remote = placed
        return actor


def test_seats_that_have_no_place_for_long_are_taken_when_there_is_room_again(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A node with two of three workers is away for ten times as long as a replacement waits for a place."""
    room = Room(world, monkeypatch, 3)

    async def main() -> None:
        world.scripts = [[READY], [READY, died()], [READY, died()]]
        workers = world.pool(3, place_s=0.03, max_attempts=2)
        await workers.start()
        room.places = 1
        assert await workers.broadcast("load", send) == ["w-0"]
        for _ in range(10):
            await asyncio.sleep(0.03)
            assert (await workers.call("work", send))[0] == "w-0"  # the pool goes on
        assert len(world.actors) > 3 + 2 * 2  # far more tries than attempts
        room.places = 3
        await until(lambda: len(workers.names) == 3)
        workers.close()

    with caplog.at_level(logging.INFO):
        asyncio.run(main())
    said = [line for line in caplog.messages if "serve" in line]
    assert [line.partition(":")[0] for line in said[:2]] == [
        "w-1 failed and is replaced; 2 of 3 ws serve",
        "w-2 failed and is replaced; 1 of 3 ws serve",
    ]
    assert sum("it joins when there is room" in line for line in said) == 2  # once each, not once per try
    assert [line.partition(" serves; ")[2] for line in said[-2:]] == ["2 of 3 ws serve", "3 of 3 ws serve"]
    assert len(said) == 6


def test_a_call_waits_for_a_worker_only_so_long(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    room = Room(world, monkeypatch, 1)

    async def main() -> None:
        world.scripts = [[READY, died()]]
        workers = world.pool(1, place_s=0.6)
        await workers.start()
        room.places = 0
        with pytest.raises(
            RuntimeError, match=r"^w: no worker is left of 1, and none could start within 0\.6 s; last: "
        ):
            await workers.call("work", send)
        calls = asyncio.create_task(workers.call("work", send))  # and one that comes later waits as long
        await asyncio.sleep(0.05)
        room.places = 1
        assert (await calls)[0].startswith("w-0.")
        workers.close()

    asyncio.run(main())


def test_a_call_waits_for_a_worker_that_is_being_prepared(world: World) -> None:
    """A model that takes longer to load than a place to be found."""
    slow = asyncio.Event()

    async def prepare(actor: Any) -> None:
        if actor.name == "w-0.1":
            await slow.wait()

    async def main() -> None:
        world.scripts = [[READY, died()]]
        workers = world.pool(1, place_s=0.05, prepare=prepare)
        await workers.start()
        call = asyncio.create_task(workers.call("work", send))
        await asyncio.sleep(0.2)
        assert not call.done()
        slow.set()
        assert (await call)[0] == "w-0.1"

    asyncio.run(main())


def test_weights_that_are_lost_are_waited_for(world: World) -> None:
    """A replacement cannot load what is gone with a node; the next version, or the next try, may be there."""
    tries = []

    async def prepare(actor: Any) -> None:
        tries.append(actor.name)
        if actor.name in ("w-1.1", "w-1.2"):
            raise ObjectLostError("ab", None, "")

    async def main() -> None:
        world.scripts = [[READY], [READY, died()]]
        workers = world.pool(2, prepare=prepare)
        await workers.start()
        await workers.broadcast("load", send)
        await until(lambda: len(workers.names) == 2)
        assert tries == ["w-0", "w-1", "w-1.1", "w-1.2", "w-1.3"]

    asyncio.run(main())


def test_a_start_returns_with_the_least_and_the_rest_joins(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    room = Room(world, monkeypatch, 2)

    async def main() -> None:
        workers = world.pool(3, least=2)
        await workers.start()
        assert workers.names == ["w-0", "w-1"]
        room.places = 3
        await until(lambda: len(workers.names) == 3)

    with caplog.at_level(logging.INFO):
        asyncio.run(main())
    assert caplog.messages == [
        "w: 2 of 3 ws serve; the others join when there is room",
        "w-2 serves; 3 of 3 ws serve",
    ]


def test_a_start_without_the_least_says_what_it_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    Room(world, monkeypatch, 1)

    async def main() -> None:
        workers = world.pool(3, least=2, place_s=0.05)
        with pytest.raises(RuntimeError, match=r"^w-\d to start: no answer within 0\.05 s$"):
            await workers.start()
        workers.close()
        assert not any(actor.alive for actor in world.actors)

    asyncio.run(main())


def test_a_device_that_fails_at_every_start_ends_it_with_one_line(world: World) -> None:
    async def main() -> None:
        world.scripts = [[READY], [BROKEN], [BROKEN], [BROKEN]]
        workers = world.pool(2)
        with pytest.raises(RuntimeError, match=r"^w: AcceleratorError: CUDA error: uncorrectable ECC"):
            await workers.start()
        workers.close()

    asyncio.run(main())


def test_a_device_that_fails_once_at_the_start_delays_it(world: World) -> None:
    async def main() -> None:
        world.scripts = [[READY], [BROKEN]]
        workers = world.pool(2)
        await workers.start()
        assert sorted(workers.names) == ["w-0", "w-1.1"]

    asyncio.run(main())


def test_room_is_grown_into_and_given_up_without_a_word(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seats, "GROWN_PLACE_S", 0.03)
    room = Room(world, monkeypatch, 3)

    async def main() -> None:
        workers = world.pool(2, most=5)
        await workers.start()
        workers.grow(2)
        await until(lambda: len(workers.names) == 3)
        await asyncio.sleep(0.1)
        assert [one.name for one in world.actors if one.alive] == ["w-0", "w-1", "w-2"]  # who found no place has left
        workers.grow(0)
        room.places = 9
        workers.grow(9)
        await until(lambda: len(workers.names) == 5)
        workers.grow(9)
        await asyncio.sleep(0.02)
        assert len(workers.names) == 5

    asyncio.run(main())


def test_nobody_is_added_while_a_seat_of_the_run_is_empty(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    room = Room(world, monkeypatch, 2)

    async def main() -> None:
        world.scripts = [[READY], [READY, died()]]
        workers = world.pool(2, most=3)
        await workers.start()
        room.places = 1
        await workers.broadcast("load", send)
        workers.grow(1)
        room.places = 3
        await until(lambda: len(workers.names) == 2)
        assert "w-2" not in [actor.name for actor in world.actors]

    asyncio.run(main())


def test_an_added_worker_that_cannot_serve_stops_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A new node without the model's folder: the run knows nodes that have it."""

    async def prepare(actor: Any) -> None:
        if actor.name == "w-1":
            raise ValueError("model.path = /models/sd3: no such folder")

    async def main() -> None:
        workers = world.pool(1, most=2, prepare=prepare)
        await workers.start()
        workers.grow(1)
        await until(lambda: len(world.actors) == 2 and not world.actors[1].alive)
        await asyncio.sleep(0.02)
        assert workers.most == 1
        assert (await workers.call("work", send))[0] == "w-0"

    asyncio.run(main())
    assert caplog.messages == ["w-1 did not come up: ValueError: model.path = /models/sd3: no such folder"]


def test_settling_waits_for_who_is_being_prepared_and_not_for_a_place(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = Room(world, monkeypatch, 2)
    loaded = asyncio.Event()

    async def prepare(actor: Any) -> None:
        if "." in actor.name:
            await loaded.wait()

    async def main() -> None:
        world.scripts = [[READY, died()], [READY, died()]]
        workers = world.pool(2, prepare=prepare)
        await workers.start()
        room.places = 1
        await workers.broadcast("load", send)
        await until(lambda: sum(hasattr(actor, "placed") for actor in world.actors) == 3)
        settled = asyncio.create_task(workers.settle())
        await asyncio.sleep(0.02)
        assert not settled.done()
        loaded.set()
        await asyncio.wait_for(settled, 1)
        assert len(workers.names) == 1
        workers.close()

    asyncio.run(main())
