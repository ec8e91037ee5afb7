"""Where a command's roles run: in this process with --local, else on a Ray that is started or joined.

Ray is imported only where it is used: `--local` needs none. What stops a command on its way is here, too.
"""

import asyncio
import os
import signal
import stat
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from nft_ray.cli.watch import Ending
from nft_ray.config import ExperimentConfig
from nft_ray.roles import EvaluationRoles, Roles


class Terminated(BaseException):
    """SIGTERM, outside of an event loop; see `sigterm_raises`."""


PREEMPTED = (Terminated, SystemExit)
"""How SIGTERM arrives; while Ray starts, by a handler of Ray's own."""
STOPPED = (KeyboardInterrupt, *PREEMPTED)
"""How Ctrl-C and SIGTERM arrive."""


class Interrupted(Exception):  # noqa: N818
    """Ctrl-C or SIGTERM; the message says what was kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What --local and --address say; `say` is told what is started.

    owner: stays the same when the command is started again; see deployments.build.deploy.
    """

    local: bool
    address: str | None
    say: Callable[[str], None]
    owner: str | None = None

    def check(self, config: ExperimentConfig, *, training: bool = True) -> None:
        """ValueError for what is known to fail there, before a process starts."""
        if self.local:
            return
        from nft_ray.cli.cluster import check_before_start

        check_before_start(config, self.address, training=training)

    @contextmanager
    def ray(self, config: ExperimentConfig, ending: Ending) -> Iterator[str | None]:
        """A connected Ray while the body runs, unless it is local; gives its dashboard's host:port.

        A cluster that goes away ends this process with what `ending` says, and the status that means: try again.
        """
        if self.local:
            yield None
            return
        from nft_ray.cli.cluster import cluster

        with cluster(config, self.address, self.say, ending) as dashboard_url:
            yield dashboard_url

    def check_connected(self, configs: Sequence[ExperimentConfig], *, training: bool = True) -> None:
        """ValueError for what is known to fail in any part of the run, now that the cluster can be asked."""
        if self.local:
            return
        from nft_ray.cli.cluster import check_connected

        check_connected(configs, self.address, training=training)

    @asynccontextmanager
    async def roles(self, config: ExperimentConfig, dashboard_url: str | None) -> AsyncIterator[Roles]:
        """Samplers, scorers and learners, gone when the body ends."""
        if self.local:
            from nft_ray.local import local_roles

            yield local_roles(config)
            return
        from nft_ray.cli.cluster import planes

        async with planes(config, self.say, dashboard_url, self.owner) as roles:
            yield roles

    @asynccontextmanager
    async def evaluation_roles(
        self, config: ExperimentConfig, dashboard_url: str | None
    ) -> AsyncIterator[EvaluationRoles]:
        """The same without learners."""
        if self.local:
            from nft_ray.local import local_evaluation_roles

            yield local_evaluation_roles(config)
            return
        from nft_ray.cli.cluster import evaluation_planes

        async with evaluation_planes(config, self.say, dashboard_url, self.owner) as roles:
            yield roles


def run_until_stopped(work: Coroutine[Any, Any, None]) -> None:
    """Run it to its end. The first SIGTERM cancels it, as Ctrl-C does; one of STOPPED is raised then."""
    stopped = False

    async def main() -> None:
        task = asyncio.current_task()
        assert task is not None

        def stop() -> None:
            nonlocal stopped
            if not stopped:  # it may be writing a checkpoint by now
                stopped = task.cancel()

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
        await work

    before = signal.getsignal(signal.SIGTERM)
    try:
        asyncio.run(main())
    except asyncio.CancelledError:
        if stopped:
            raise Terminated from None
        raise RuntimeError("the work was cancelled, and nobody asked for it") from None
    finally:
        # the loop leaves the default, which ends the process on the spot
        signal.signal(signal.SIGTERM, signal.SIG_IGN if stopped else before)


def no_more_sigterm() -> None:
    """From here on SIGTERM is ignored: what is being put in order is not to be cut off."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def hung_up(*_: object) -> None:
    """SIGHUP, of a closed terminal: as SIGTERM; what would be printed goes nowhere, as it would else fail."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        with suppress(OSError):
            kind = os.fstat(stream).st_mode
            if stat.S_ISCHR(kind) or stat.S_ISFIFO(kind):  # the terminal, or who reads a pipe and ends with it
                os.dup2(nowhere, stream)
    os.close(nowhere)
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def sigterm_raises() -> Iterator[Callable[[], None]]:
    """In the body, SIGTERM raises Terminated, once; what it gives sets that up again, behind what changed it.

    A closed terminal is taken for SIGTERM, unless the command was started with nohup.
    """

    def stop(*_: object) -> None:
        no_more_sigterm()
        raise Terminated

    def set_up() -> None:
        signal.signal(signal.SIGTERM, stop)

    before, terminal = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)
    set_up()
    if terminal != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, hung_up)
    try:
        yield set_up
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGHUP, terminal)
