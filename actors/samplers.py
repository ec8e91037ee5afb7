"""The sampler plane: a pool of actors, each holding one SamplerCore and `max_staleness + 1` adapter versions.

    request ──► pool ──► SamplerActor.draw ──► images (reference), at once
                                     .clean ──► info (driver) · samples (reference)
    adapters ──► every SamplerActor.load, weights by reference ──► receipts, verified

Failure policy
- As in pool.py; a replacement builds the model, loads the kept versions and is verified before it serves, so a
  request that is redone gives the same group.
- A rollout for which the device's memory is too small: with `sampler.shrink_on_oom` the replacement, and those after
  it, work with half the micro-batch, which the log says once per size; else the lines say which fields to lower.
- Ray's own restarts and task retries are off: a restarted actor would come back without adapters. What a worker
  returned outlives it (the driver owns it), but not the node that holds it: then it is ObjectsLostError.
- A receipt that does not match what the learner announced stops the run with both values.
"""

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup

from actors.answers import answer, one_line
from actors.bundles import in_bundle
from actors.downloads import download
from actors.pool import WorkerPool
from nft_ray.config import ExperimentConfig, SamplerConfig
from nft_ray.cores.publish import verify
from nft_ray.failures import lost, out_of_memory, store_full
from nft_ray.roles import ObjectsLostError, Seen
from nft_ray.types import (
    Adapters,
    AdapterWeights,
    CleanSamples,
    LoadReceipt,
    Rollout,
    RolloutInfo,
    RolloutRequest,
)

logger = getLogger(__name__)
T = TypeVar("T")


class SamplerLike(Protocol):
    """What an actor needs of a core: SamplerCore, or a fake that costs nothing."""

    def load(self, adapters: Adapters, weights: AdapterWeights) -> LoadReceipt: ...

    def draw(self, request: RolloutRequest) -> np.ndarray: ...

    def clean(self) -> tuple[RolloutInfo, CleanSamples | None]: ...

    def park(self) -> None: ...

    def wake(self) -> None: ...


SamplerFactory = Callable[[ExperimentConfig, str], SamplerLike]


def sampler_core(config: ExperimentConfig, name: str) -> SamplerLike:
    """The real one. Imported where it is built: a process that holds another one loads no torch."""
    from nft_ray.cores.sampler import SamplerCore

    return SamplerCore(config, name)


class SamplerActor:
    """One core in one process, one call at a time. `build` is not `__init__`: placed and loaded are two waits."""

    def __init__(self, make: SamplerFactory, config: ExperimentConfig, name: str) -> None:
        self._make = lambda: make(config, name)
        self._model = config.model
        self._failure: Exception | None = None

    def download(self, token: str | None) -> Iterator[str]:
        from nft_ray.models.base import fetch_model

        yield from fetch_model(self._model, token)

    def build(self) -> None:
        check_card(bool(ray.get_gpu_ids()))
        self._core = self._make()

    def load(self, adapters: Adapters, weights: AdapterWeights) -> LoadReceipt:
        return self._core.load(adapters, weights)

    def draw(self, request: RolloutRequest) -> tuple[np.ndarray, None]:
        """The images, and a word that they are there; `clean` is called right behind it."""
        self._failure = None
        try:
            return self._core.draw(request), None
        except Exception as error:
            self._failure = error
            raise

    def clean(self) -> tuple[CleanSamples | None, RolloutInfo]:
        """The samples, and what the driver learns: large things first, so that a store without room fails both."""
        failure, self._failure = self._failure, None
        if failure is not None:  # of the drawing: it is the failure of the rollout
            raise failure
        info, samples = self._core.clean()
        return samples, info

    def park(self) -> None:
        self._core.park()

    def wake(self) -> None:
        self._core.wake()


def check_card(has_gpu: bool, driver: Path = Path("/proc/driver/nvidia/version")) -> None:
    """RuntimeError, a device failure, where a card has fallen off its bus: the worker would use the CPU."""
    if not (has_gpu and driver.exists()):
        return
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError(
            f"No CUDA GPUs are available on {ray.util.get_node_ip_address()}, which has a driver for them"
        )


class SamplerPool:
    """roles.Samplers over Ray actors."""

    def __init__(
        self, config: ExperimentConfig, make: SamplerFactory = sampler_core, bundles: PlacementGroup | None = None
    ) -> None:
        self._config, self._make, self._bundles = config, make, bundles
        self._awake = asyncio.Event()
        self._awake.set()
        self._kept: dict[int, Adapters] = {}
        sampler = self._batches = config.sampler
        self._spawned: dict[str, SamplerConfig] = {}  # by name: what each works with
        self._pool = WorkerPool(
            f"{config.run.name}/sampler",
            sampler.num_workers,
            spawn=self._spawn,
            prepare=self._prepare,
            place=f"to start with {sampler.num_cpus:g} CPUs and {sampler.num_gpus:g} GPUs",
            place_s=config.cluster.wait_s,
            timeout_s=sampler.timeout_s,
            max_in_flight=sampler.max_in_flight,
            max_attempts=sampler.max_attempts,
            least=sampler.min_workers,
            most=sampler.max_workers,
            mend=self._shrink,
            advice=self._advice,
        )

    @property
    def size(self) -> int:
        """Those that serve now."""
        return len(self._pool.names)

    async def start(self) -> None:
        """`sampler.min_workers` samplers placed, their models loaded; by default all."""
        await self._pool.start()

    def close(self) -> None:
        """Kill the actors."""
        self._pool.close()

    async def park(self) -> None:
        """Every worker's device memory is free: what fails to park is killed. Replacements wait until `wake`.

        Parked already: replacements may be in preparation, which need `wake` to come to an end.
        """
        if self._awake.is_set():
            await self._pool.settle()
        self._awake.clear()
        await self._pool.broadcast("park", lambda actor: [actor.park.remote()])

    async def wake(self) -> None:
        self._awake.set()
        await self._pool.broadcast("wake up", lambda actor: [actor.wake.remote()])

    async def load(self, adapters: Adapters) -> None:
        """Kept before it is sent: a worker that is being replaced meanwhile gets it from `_prepare`.

        ObjectsLostError: the weights are gone with the node of the learner. Room that there is now is used.
        """
        if isinstance(adapters.weights, AdapterWeights):  # read from a file by the driver, not made by a learner
            adapters = dataclasses.replace(adapters, weights=self._put(adapters.weights))
        self._kept.pop(adapters.version, None)  # the newest stands last, a restored version too
        self._kept[adapters.version] = adapters
        for version in list(self._kept)[: -(self._config.run.max_staleness + 1)]:
            del self._kept[version]
        what = f"load version {adapters.version}"
        for receipt in await self._told(
            self._pool.broadcast(what, lambda actor: _load(actor, adapters)),
            f"the weights of version {adapters.version}",
        ):
            verify(adapters, receipt, self._config.model.dtype)
        if self.size < self._pool.most:
            free = await asyncio.to_thread(ray._private.state.available_resources_per_node)  # type: ignore[attr-defined]
            self._pool.grow(room(free.values(), self._config.sampler))

    async def rollout(self, request: RolloutRequest, seen: Seen | None = None) -> Rollout:
        """Two calls of one worker, sent at once: nothing can come between them."""

        draws: list[Any] = []

        def send(actor: Any) -> Sequence[Any]:
            images, drawn = actor.draw.options(num_returns=2).remote(request)
            draws.append(drawn)
            if seen is not None:
                asyncio.ensure_future(drawn).add_done_callback(partial(_tell, seen, images))
            samples, info = actor.clean.options(num_returns=2).remote()
            return info, images, samples

        what = f"rollout of {_when(request)}, prompt {request.items[0].prompt.id}"
        try:
            info, (_, images, samples) = await self._pool.call(what, send)
        except asyncio.CancelledError:
            for drawn in draws:  # which may still wait; `clean` is cancelled by the pool
                ray.cancel(drawn)
            raise
        return Rollout(info=info, images=images, samples=samples)

    async def images(self, rollout: Rollout) -> np.ndarray:
        """ObjectsLostError where they are gone with the node that drew them."""
        images = answer(rollout.images, "images of a rollout", self._config.sampler.timeout_s)
        return await self._told(images, "the images of a rollout")

    def _put(self, weights: AdapterWeights) -> Any:
        try:
            return ray.put(weights)
        except RayError as error:
            raise RuntimeError(f"weights for the samplers: {one_line(error)}; {self._advice(error)}") from error

    async def _told(self, work: Awaitable[T], what: str) -> T:
        """Ray's own errors, which run over many lines, as one line of ours."""
        try:
            return await work
        except RayError as error:
            if lost(error):
                raise ObjectsLostError(f"{what} are lost with their node: {one_line(error)}") from error
            raise RuntimeError("; ".join(filter(None, (f"{what}: {one_line(error)}", self._advice(error))))) from error

    def _shrink(self, name: str, error: BaseException) -> str:
        """Half the micro-batch for whoever is started from now on, if `name` ran out of memory with today's."""
        had = self._spawned[name]
        if not (out_of_memory(error) and had.shrink_on_oom):
            return ""
        smaller = shrunk(had)
        if smaller == had:
            return ""
        if had == self._batches:
            self._batches = smaller
            logger.warning(
                "out of GPU memory: samplers that start from now on work with %s; set that (was %s)",
                *(_sizes(sampler) for sampler in (smaller, had)),
            )
        return f"its replacement works with {_sizes(self._batches)}"

    def _advice(self, error: BaseException) -> str:
        if out_of_memory(error):
            return f"lower {_sizes(self._batches)}"
        if store_full(error):
            return "give Ray more object_store_memory, or its disk more room"
        return ""

    def _spawn(self, name: str, seat: int) -> Any:
        sampler = self._spawned[name] = self._batches
        actor = ray.remote(SamplerActor).options(  # type: ignore[attr-defined]
            name=name,
            num_cpus=sampler.num_cpus,
            num_gpus=sampler.num_gpus,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="DEFAULT" if self._bundles is None else in_bundle(self._bundles, seat),
        )
        return actor.remote(self._make, self._config.model_copy(update={"sampler": sampler}), name)

    async def _prepare(self, actor: Any) -> None:
        """The model, then every kept version, oldest first; again while new ones arrive."""
        timeout_s, loaded = self._config.sampler.timeout_s, list[Adapters]()
        await self._awake.wait()  # while samplers are parked their devices belong to the learners
        await download(actor, self._config.model, "a sampler")
        await answer(actor.build.remote(), "a sampler's model to load", timeout_s)
        while missing := [kept for kept in self._kept.values() if not any(kept is done for done in loaded)]:
            adapters = missing[0]
            receipt = await answer(_load(actor, adapters)[0], f"load version {adapters.version}", timeout_s)
            verify(adapters, receipt, self._config.model.dtype)
            loaded.append(adapters)


def shrunk(sampler: SamplerConfig) -> SamplerConfig:
    """Half the images of a forward and of a pass through the VAE; the same where both are 1."""
    decode = sampler.decode_batch_size
    half = {
        "micro_batch_size": max(1, sampler.micro_batch_size // 2),
        "decode_batch_size": None if decode is None else max(1, decode // 2),
    }
    return sampler.model_copy(update=half)


def room(nodes: Iterable[Mapping[str, float]], sampler: SamplerConfig) -> int:
    """How many more samplers the nodes have room for, each with so much free; at most `sampler.max_workers`."""
    most, found = sampler.max_workers or 0, 0
    for free in nodes:
        each = [(free.get("CPU", 0.0), sampler.num_cpus), (free.get("GPU", 0.0), sampler.num_gpus)]
        found += int(min((have / needs + 1e-4 for have, needs in each if needs), default=most))
    return min(found, most)


def _when(request: RolloutRequest) -> str:
    return f"epoch {request.epoch + 1}" if request.split == "train" else "an evaluation"


def _sizes(sampler: SamplerConfig) -> str:
    decode = sampler.decode_batch_size
    also = f", sampler.decode_batch_size = {decode}" if decode else ""
    return f"sampler.micro_batch_size = {sampler.micro_batch_size}{also}"


def _tell(seen: Seen, images: Any, done: "asyncio.Future[None]") -> None:
    """Images that do not come are the business of the call."""
    if not done.cancelled() and done.exception() is None:
        seen(images)


def _load(actor: Any, adapters: Adapters) -> Sequence[Any]:
    """The weights travel as a top-level reference: straight from the object store, never through the driver."""
    return [actor.load.remote(dataclasses.replace(adapters, weights=None), adapters.weights)]
