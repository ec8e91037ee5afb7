"""Checkpoints beside the training: which epochs make one, written in a thread, one at a time.

epoch finished ──► due? ──► start(epoch, state) ─► thread: RunFolder.save
                                 │ the next epoch's rollouts go on meanwhile
however the run ends ──► keep(last): what is finished is on the disk
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from nft_ray.config import RunConfig
from nft_ray.runs.folder import RunFolder
from nft_ray.types import LearnerState


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The learners after so many finished epochs. A state is never changed, so it may be written while they go on."""

    epoch: int
    state: LearnerState


class Saving:
    """Writes the checkpoints of one run. An error of a write is raised by the next call, once."""

    def __init__(self, folder: RunFolder, run: RunConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._run, self._clock = folder, run, clock
        self._writing: asyncio.Task[None] | None = None
        self._one = threading.Lock()  # of the threads that write
        self.saved(0)

    def saved(self, epoch: int) -> None:
        """The run goes on from a checkpoint, or from nothing (0)."""
        self._begun = self._written = epoch
        self._last_time = self._clock()

    def due(self, epoch: int) -> bool:
        """Whether the end of this epoch makes a checkpoint."""
        minutes = self._run.checkpoint_minutes
        return (
            epoch == self._run.num_epochs
            or epoch // self._run.checkpoint_every > self._begun // self._run.checkpoint_every  # or one was left out
            or (minutes is not None and self._clock() - self._last_time >= 60 * minutes)
        )

    async def start(self, finished: Finished) -> None:
        """Begin to write it; waits for the one before."""
        await self.done()
        self._begun, self._last_time = finished.epoch, self._clock()
        self._writing = asyncio.create_task(asyncio.to_thread(self._write, finished))

    async def done(self) -> None:
        """Return when nothing is being written. Who is cancelled meanwhile leaves it going: a thread cannot be."""
        if self._writing is None:
            return
        writing = self._writing
        try:
            await asyncio.shield(writing)
        finally:
            if writing.done():
                self._writing, self._begun = None, self._written

    async def keep(self, finished: Finished | None) -> None:
        """Write what is finished and not written, for a run that ends here; what failed before is tried again."""
        with contextlib.suppress(OSError):
            await self.done()
        if finished is not None and finished.epoch > self._begun:
            await self.start(finished)
            await self.done()

    def keep_now(self, finished: Finished | None, timeout_s: float) -> None:
        """The same from another thread, for a process that is about to end; waits so long for a write under way."""
        if finished is not None and self._one.acquire(timeout=timeout_s):
            self._one.release()
            self._write(finished)

    def _write(self, finished: Finished) -> None:
        with self._one:
            if finished.epoch > self._written:
                self._folder.save(finished.epoch, finished.state)
                self._written = finished.epoch
