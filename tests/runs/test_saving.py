"""When a checkpoint is made, that the training does not wait for it, and what is kept however the run ends."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from nft_ray.config import RunConfig
from nft_ray.runs.saving import Finished, Saving

STATE: Any = object()


class SlowFolder:
    """Stands in for RunFolder: a save lasts until it is let go, and fails if it should."""

    def __init__(self, error: Exception | None = None) -> None:
        self.saved: list[int] = []
        self.begun, self.go, self.error = threading.Event(), threading.Event(), error

    def save(self, epoch: int, state: Any) -> Path:
        assert state is STATE
        self.begun.set()
        assert self.go.wait(10)
        if self.error is not None:
            raise self.error
        self.saved.append(epoch)
        return Path()


def saving(folder: Any, *, now: list[float] | None = None, **run: Any) -> Saving:
    return Saving(folder, RunConfig(name="x", num_epochs=20, **run), clock=lambda: now[0] if now else 0.0)


def test_epochs_minutes_and_the_end_make_a_checkpoint() -> None:
    now = [0.0]
    due = saving(SlowFolder(), now=now, checkpoint_every=6, checkpoint_minutes=2)
    made = []
    for epoch in range(1, 21):
        if due.due(epoch) and epoch != 12:  # in which a gradient was not finite: the next good one is kept instead
            made.append(epoch)
            due.saved(epoch)
    assert made == [6, 13, 18, 20]
    due.saved(6)
    now[0] = 119
    assert not due.due(7)
    now[0] = 120
    assert due.due(7)
    due.saved(7)
    assert not due.due(8)


def test_the_training_does_not_wait_for_a_save_and_two_are_never_written_at_once() -> None:
    folder = SlowFolder()

    async def run() -> None:
        save = saving(folder)
        await asyncio.wait_for(save.start(Finished(epoch=1, state=STATE)), 1)
        second = asyncio.create_task(save.start(Finished(epoch=2, state=STATE)))
        await asyncio.sleep(0.02)
        assert not second.done()
        folder.go.set()
        await second
        await save.done()

    asyncio.run(run())
    assert folder.saved == [1, 2]


def test_a_save_that_fails_is_raised_by_the_next_call() -> None:
    async def run() -> None:
        save = saving(folder)
        await save.start(Finished(epoch=1, state=STATE))
        with pytest.raises(OSError, match="the disk is full"):
            await save.done()

    folder = SlowFolder(OSError("the disk is full"))
    folder.go.set()
    asyncio.run(run())


def test_a_save_that_failed_is_tried_again_by_who_ends_the_run() -> None:
    folder = SlowFolder(OSError("the disk is full"))
    folder.go.set()

    async def run(last: int) -> None:
        save = saving(folder)
        await save.start(Finished(epoch=1, state=STATE))
        await asyncio.sleep(0.05)
        folder.error = None
        await save.keep(Finished(epoch=last, state=STATE))

    for last in (1, 2):
        folder.error = OSError("the disk is full")
        asyncio.run(run(last))
    assert folder.saved == [1, 2]


def test_another_thread_keeps_what_is_finished_once_and_after_what_is_being_written() -> None:
    folder = SlowFolder()

    async def run() -> None:
        save = saving(folder)
        await save.start(Finished(epoch=1, state=STATE))
        while not folder.begun.is_set():
            await asyncio.sleep(0.01)
        asyncio.get_running_loop().call_later(0.05, folder.go.set)
        await asyncio.to_thread(save.keep_now, Finished(epoch=2, state=STATE), 5.0)
        await save.keep(Finished(epoch=2, state=STATE))

    asyncio.run(run())
    assert folder.saved == [1, 2]


@pytest.mark.parametrize(("started", "kept"), [(None, [3]), (2, [2, 3]), (3, [3])])
def test_what_is_finished_is_kept_by_who_is_cancelled(started: int | None, kept: list[int]) -> None:
    folder = SlowFolder()

    async def run() -> None:
        save = saving(folder)
        try:
            if started:
                await save.start(Finished(epoch=started, state=STATE))
            await asyncio.sleep(10)
        finally:
            await save.keep(Finished(epoch=3, state=STATE))

    async def stopped() -> None:
        task = asyncio.create_task(run())
        await asyncio.sleep(0.02)
        task.cancel()
        folder.go.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(stopped())
    assert folder.saved == kept
