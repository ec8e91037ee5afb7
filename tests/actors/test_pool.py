"""The pool's rules for calls, with actors that are plain objects."""

import asyncio
import logging
from typing import Any

import pytest
import torch
from ray.exceptions import ObjectStoreFullError, RayError

from actors import answers, pool
from tests.actors.stand_ins import READY, World, died, send, until, world_without_ray


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return world_without_ray(monkeypatch)


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
    async def mismatch(actor: Any) -> None:
        if actor.name == "w-0.1":
            raise RuntimeError("w-0.1: another velocity")

    async def main() -> None:
        world.scripts = [[READY, died()]]
        workers = world.pool(1, prepare=mismatch)
        await workers.start()
        with pytest.raises(RuntimeError, match="another velocity"):
            await workers.call("work", send)

    asyncio.run(main())


def test_a_broadcast_reaches_everyone_who_serves(world: World) -> None:
    async def main() -> None:
        world.scripts = [[READY], [READY, died()]]
        workers = world.pool(2)
        await workers.start()
        assert await workers.broadcast("load", send) == ["w-0"]
        await until(lambda: len(workers.names) == 2)
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


def test_a_pool_that_finishes_nothing_says_so(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(answers, "REPORT_S", 0.01)

    async def main() -> None:
        workers = world.pool(1, timeout_s=0.1, max_attempts=1)
        await workers.start()
        world.actors[0].gate.clear()
        with pytest.raises(RuntimeError, match="no answer within"):
            await workers.call("work", send)

    with caplog.at_level(logging.INFO):
        asyncio.run(main())
    assert "waiting for w: 1 calls outstanding, 1 of 1 ws serve" in caplog.messages


OOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
BROKEN = torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")


@pytest.mark.parametrize("failure", [OOM, BROKEN, RuntimeError("CUDA error: device-side assert triggered")], ids=str)
def test_a_worker_whose_device_fails_is_replaced_and_its_request_made_elsewhere(
    world: World, failure: Exception
) -> None:
    async def main() -> None:
        world.scripts = [[READY, failure], [READY, "kept"]]
        workers = world.pool(2)
        await workers.start()
        assert (await workers.call("work", send))[0] == "kept"
        await until(lambda: workers.names == ["w-1", "w-0.1"])
        assert [actor.alive for actor in world.actors] == [False, True, True]

    asyncio.run(main())


def test_a_device_that_fails_everywhere_ends_the_call_with_its_cause_and_advice(world: World) -> None:
    async def main() -> None:
        world.scripts = [[READY, OOM] for _ in range(3)]
        workers = world.pool(1, advice=lambda error: "lower micro_batch_size = 24")
        await workers.start()
        with pytest.raises(
            RuntimeError,
            match=r"^w: work failed on 3 workers; last: OutOfMemoryError: CUDA out .*GiB; lower micro_batch_size = 24$",
        ):
            await workers.call("work", send)

    asyncio.run(main())


def test_a_failure_that_the_replacement_is_made_to_bear_is_not_counted(world: World) -> None:
    async def main() -> None:
        world.scripts = [[READY, OOM] for _ in range(7)]
        told = []
        workers = world.pool(1, mend=lambda name, error: told.append(name) or "it works with less")
        await workers.start()
        assert (await workers.call("work", send))[0] == "w-0.7"
        assert told == ["w-0", *[f"w-0.{life}" for life in range(1, 7)]]

    asyncio.run(main())


def test_a_replacement_whose_device_fails_does_not_stop_the_pool(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        world.scripts = [[READY, died()], [READY, "kept"], [BROKEN], [OOM], [BROKEN], [BROKEN], [READY]]
        workers = world.pool(2)
        await workers.start()
        assert (await workers.call("work", send))[0] == "kept"
        await until(lambda: len(workers.names) == 2)
        assert (await workers.call("work", send))[0] == "w-1"

    with caplog.at_level(logging.INFO):
        asyncio.run(main())
    assert [line.partition(":")[0] for line in caplog.messages] == [
        "w-0 failed and is replaced; 1 of 2 ws serve",
        *["w-0 did not come up"] * 3,
        "w-0 is tried again, at last every 0.04 s",
        "w-0.5 serves; 2 of 2 ws serve",
    ]


def test_who_only_waited_in_the_queue_of_a_dead_worker_is_not_blamed(world: World) -> None:
    """One request kills every worker, three times; the one that is queued behind it each time succeeds."""

    async def main() -> None:
        world.scripts = [[READY, died(), "late"], [READY, died(), "late"], [READY, died(), "late"], [READY]]
        workers = world.pool(1, max_attempts=3)
        await workers.start()
        killer = asyncio.create_task(workers.call("kill", send))
        await asyncio.sleep(0)
        queued = asyncio.create_task(workers.call("work", slow))
        with pytest.raises(RuntimeError, match=r"^w: kill failed on 3 workers"):
            await killer
        assert (await queued)[0] == "w-0.3"

    def slow(actor: Any) -> list[Any]:
        async def later() -> Any:
            await asyncio.sleep(0.3)
            return await actor.call()

        return [asyncio.ensure_future(later())]

    asyncio.run(main())


def test_a_silent_worker_is_overdue_after_one_deadline_however_many_calls_it_holds(world: World) -> None:
    """As a stopped process, or a node that Ray has not yet noticed to be dead."""

    async def main() -> float:
        workers = world.pool(1, timeout_s=0.2, max_in_flight=4)
        await workers.start()
        world.actors[0].gate.clear()
        started = asyncio.get_running_loop().time()
        done = await asyncio.gather(*(workers.call("work", send) for _ in range(4)))
        assert {name for name, _ in done} == {"w-0.1"}
        return asyncio.get_running_loop().time() - started

    assert 0.2 <= asyncio.run(main()) < 0.4


def test_a_queue_that_moves_is_not_overdue(world: World) -> None:
    """Four calls of 0.1 s each, one after the other, under a deadline of 0.25 s: the last one waits for 0.4 s."""

    async def main() -> None:
        workers = world.pool(1, timeout_s=0.25, max_in_flight=4)
        await workers.start()
        turn = asyncio.Lock()

        async def one(actor: Any) -> str:
            async with turn:
                await asyncio.sleep(0.1)
            return actor.name

        def queue(actor: Any) -> list[Any]:
            return [asyncio.ensure_future(one(actor))]

        done = await asyncio.gather(*(workers.call("work", queue) for _ in range(4)))
        assert {name for name, _ in done} == {"w-0"}

    asyncio.run(main())


def test_a_full_object_store_is_waited_for_and_then_told_in_one_line(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "STORE_PAUSE_S", 0.01)
    full = ObjectStoreFullError("Failed to put object\nof size 8")

    async def main() -> None:
        world.scripts = [[READY, full, full, "kept", full, full, full]]
        workers = world.pool(1)
        await workers.start()
        assert (await workers.call("work", send))[0] == "kept"
        assert world.actors[0].alive
        with pytest.raises(RuntimeError, match=r"^w: work failed .*ObjectStoreFullError: Failed to put object of size"):
            await workers.call("work", send)

    asyncio.run(main())


def test_an_error_of_ray_is_one_line_and_a_runtime_error(world: World) -> None:
    async def main() -> None:
        world.scripts = [[READY, RayError("the cause\nis not serializable")]]
        workers = world.pool(1)
        await workers.start()
        with pytest.raises(RuntimeError, match=r"^w-0: work: RayError: the cause is not serializable$"):
            await workers.call("work", send)
        assert world.actors[0].alive

    asyncio.run(main())
