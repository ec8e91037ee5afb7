"""One rank of the learner group: a thin Ray actor around a core, and what it says of itself when it is slow."""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import ray

import nft_ray
from nft_ray.config import ExperimentConfig
from nft_ray.types import Adapters, AdapterWeights, CleanSamples, LearnerState, TrainGroup, UpdateResult

if TYPE_CHECKING:
    import torch.distributed as dist

HEALTH = "health"
"""The concurrency group, of one thread, that answers while a rank works or waits."""
OURS = f"{Path(nft_ray.__file__).parent}/"
PEERS = ("/torch/distributed/", "/torch/nn/parallel/", "/torch/autograd/graph.py")
"""Where a rank waits for the others: in a collective, or in the backward that reduces gradients."""


class LearnerLike(Protocol):
    """What an actor needs of a core: LearnerCore, or a fake that costs nothing. Weights and state: of rank 0 only."""

    def restore(self, state: LearnerState) -> None: ...

    def state(self) -> LearnerState | None: ...

    def probe(self) -> tuple[Adapters, AdapterWeights | None]: ...

    def adapters(self) -> tuple[tuple[Adapters, AdapterWeights | None], ...]: ...

    def park(self) -> None: ...

    def wake(self) -> None: ...

    def update(
        self,
        epoch: int,
        groups: Sequence[TrainGroup],
        samples: Sequence[CleanSamples],
        samples_per_step: tuple[int, ...],
    ) -> tuple[UpdateResult, AdapterWeights | None]: ...


LearnerFactory = Callable[[ExperimentConfig, int, int], LearnerLike]


def learner_core(config: ExperimentConfig, rank: int, world_size: int) -> LearnerLike:
    """The real one. Imported where it is built: a process that holds another one loads no diffusers."""
    from nft_ray.cores.learner import LearnerCore

    return LearnerCore(config, rank, world_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Doing:
    """Where a rank is: a line of code, and whether it waits there for its peers."""

    where: str
    waits: bool


class LearnerActor:
    """One rank in one process. `samples` arrive as top-level references: read in place from the object store."""

    def __init__(self, make: LearnerFactory, config: ExperimentConfig) -> None:
        self._make, self._config = make, config
        self._thread = 0

    def open_store(self, world_size: int) -> tuple[str, int]:
        """Rank 0 only: port 0 lets the system choose, so no two groups ever race for one."""
        self._store = self._tcp_store(ray.util.get_node_ip_address(), 0, world_size, master=True)
        return self._store.host, self._store.port

    def join(self, rank: int, world_size: int, host: str, port: int) -> None:
        """Enter the process group; returns when every rank has."""
        import torch
        import torch.distributed as dist

        if rank > 0:
            self._store = self._tcp_store(host, port, world_size, master=False)
        on_gpu = self._config.learner.num_gpus and torch.cuda.is_available()  # as the core decides its device
        backend = "nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=self._store, rank=rank, world_size=world_size, timeout=self._timeout)

    def download(self, token: str | None) -> Iterator[str]:
        from nft_ray.models.base import fetch_model

        yield from fetch_model(self._config.model, token, transformer_only=True)

    def build(self, rank: int, world_size: int) -> None:
        self._thread = threading.get_ident()
        self._core = self._make(self._config, rank, world_size)

    def park(self) -> None:
        self._core.park()

    def wake(self) -> None:
        self._core.wake()

    def restore(self, state: LearnerState) -> None:
        self._core.restore(state)

    def state(self) -> LearnerState | None:
        return self._core.state()

    def probe(self) -> tuple[Adapters, AdapterWeights | None]:
        return self._core.probe()

    def adapters(self, num_returns: int) -> list[Adapters | AdapterWeights | None]:
        """(announcement, weights) of every version, flat: each is a return value of its own; None fills up."""
        flat = [part for pair in self._core.adapters() for part in pair]
        return [*flat, *[None] * (num_returns - len(flat))]

    def update(
        self,
        epoch: int,
        groups: Sequence[TrainGroup],
        samples_per_step: tuple[int, ...],
        with_state: bool,
        *samples: CleanSamples,
    ) -> tuple[UpdateResult, AdapterWeights | None, LearnerState | None]:
        """The update and, `with_state`, what it led to: three return values, each with a reference of its own."""
        result, weights = self._core.update(epoch, groups, samples, samples_per_step)
        return result, weights, self._core.state() if with_state else None

    @ray.method(concurrency_group=HEALTH)
    def doing(self) -> Doing:
        """Answered by another thread: a process that is stopped, or whose node is gone, does not answer."""
        frames = list(_frames(sys._current_frames().get(self._thread)))
        ours = [frame for frame in frames if frame.f_code.co_filename.startswith(OURS)]
        if not frames:
            return Doing(where="waits for its samples", waits=False)
        at = (ours or frames)[0]
        waits = any(part in frame.f_code.co_filename for frame in frames for part in PEERS)
        file = "/".join(at.f_code.co_filename.split("/")[-2:])
        return Doing(where=f"in {file}:{at.f_lineno}, {at.f_code.co_name}", waits=waits)

    @property
    def _timeout(self) -> timedelta:
        """Of the peers for each other. The group gives up after half of it and asks who is late: none may be first."""
        return timedelta(seconds=2 * self._config.learner.timeout_s)

    def _tcp_store(self, host: str, port: int, world_size: int, *, master: bool) -> "dist.TCPStore":
        import torch.distributed as dist

        return dist.TCPStore(host, port, world_size, master, timeout=self._timeout, wait_for_workers=False)


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    """Innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def spawn(make: LearnerFactory, config: ExperimentConfig, name: str, place: Any) -> Any:
    """Start an actor at once. Ray's own restarts are off: one would come back alone and empty."""
    actor = ray.remote(concurrency_groups={HEALTH: 1})(LearnerActor).options(  # type: ignore[attr-defined,call-overload]
        name=name,
        num_cpus=config.learner.num_cpus,
        num_gpus=config.learner.num_gpus,
        max_restarts=0,
        max_task_retries=0,
        scheduling_strategy=place,
    )
    return actor.remote(make, config)
