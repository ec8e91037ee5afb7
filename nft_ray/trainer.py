"""The whole system in one screen: roll out, score, learn, publish. Verbs only; the roles hide where each one runs.

    collect(e + staleness) ──► rollouts (oldest first) ──► update(e) ──► load(version e + 1) ──► collect ...

`max_staleness: 0` is the published algorithm; `1` overlaps the rollouts of epoch e + 1 with the update of e. Rollouts
of epoch e are pinned to policy version max(0, e - max_staleness), so both are reproducible. The trainer sees references
and scalars; it knows no Ray and no torch.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, overload

from nft_ray.algorithms.base import build_algorithm
from nft_ray.algorithms.batch import make_batch
from nft_ray.config import ExperimentConfig
from nft_ray.evaluation.held_out import evaluate_epoch
from nft_ray.prompts.draw import PromptSet, epoch_requests
from nft_ray.redo import while_lost
from nft_ray.roles import ObjectsLostError, Roles, StateLostError, Tracker
from nft_ray.runs.evaluations import evaluated_epochs
from nft_ray.runs.folder import RunFolder
from nft_ray.runs.health import Health, NotFiniteError
from nft_ray.runs.metrics import read_metrics
from nft_ray.runs.saving import Finished, Saving
from nft_ray.types import Adapters, Batch, Rewards, Rollout, RolloutRequest, ScoredGroup, UpdateResult

logger = logging.getLogger(__name__)
T = TypeVar("T")
U = TypeVar("U")


class Trainer:
    """One run, or a stage of one that goes on at `first_epoch`: with the base model on its own lines, to compare with.

    `run()` returns when the last epoch is finished, evaluated, logged and saved.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        roles: Roles,
        folder: RunFolder,
        tracker: Tracker,
        train: PromptSet,
        test: PromptSet,
        *,
        first_epoch: int = 0,
    ) -> None:
        self.cfg, self.roles, self.first_epoch = config, roles, first_epoch
        self.algorithm = build_algorithm(config.algorithm)
        self.samplers, self.scorers, self.learners = roles.samplers, roles.scorers, roles.learners
        self.folder, self.tracker = folder, tracker
        self.train_prompts, self.test_prompts = train, test
        self.saving, self.health = Saving(folder, config.run), Health(config.run)
        self.finished: Finished | None = None  # the newest epoch whose state is here
        self.good: Finished | None = None  # the newest in which everything was finite
        self.went_back_from = -1
        self.told: set[str] = set()  # what was remarked of a batch; each once

    async def run(self) -> None:
        begin: Callable[[], Awaitable[int]] = self.restore
        try:
            while True:
                try:
                    epoch = await begin()
                    await self.evaluate_what_is_missing(epoch)
                    await self.train(epoch)
                    break
                except StateLostError as lost:  # bounded by learner.max_restarts
                    begin = partial(self.recover, str(lost))  # the error itself holds the epoch that it ended
                except NotFiniteError as bad:
                    begin = partial(self.go_back, str(bad), bad.epoch)
            late = await self.scorers.drained()
            self.folder.check_lock()
            self.log_late(late)
            await self.saving.done()
        except BaseException:
            await self.saving.keep(self.good)  # SIGTERM, too: what is finished is not lost
            raise

    async def train(self, start: int) -> None:
        """Every epoch that is left after `start` finished ones."""
        rollouts: deque[asyncio.Task[list[ScoredGroup]]] = deque()
        next_epoch = start
        try:
            for epoch in range(start, self.cfg.run.num_epochs):
                started = time.perf_counter()
                while next_epoch < self.cfg.run.num_epochs and len(rollouts) <= self.cfg.run.max_staleness:
                    rollouts.append(asyncio.create_task(self.collect(next_epoch)))
                    next_epoch += 1
                await asyncio.wait((rollouts[0],))  # oldest first; the others keep sampling
                collected = time.perf_counter()
                groups, batch, update = await self.update(rollouts.popleft().result())
                # the state first, in turns: it may need the devices that the samplers get then
                finished, _ = await asyncio.gather(self.take_state(epoch + 1), self.load(update.adapters))
                times = {"time/collect_s": collected - started, "time/epoch_s": time.perf_counter() - started}
                late = self.scorers.monitored(epoch)
                metrics = rollout_metrics(groups) | batch.metrics | late.pop(epoch, {}) | update.metrics | times
                self.folder.check_lock()  # of a process that slept: another may have taken the run over
                self.tracker.log_epoch(epoch + 1, metrics, update.steps)
                self.log_late(late)
                self.finished = finished or self.finished
                good = self.health.check(epoch + 1, groups, batch, update)
                if good or epoch + 1 == self.cfg.run.num_epochs:
                    self.good = self.finished
                    await self.maybe_save(epoch + 1)  # a checkpoint is a finished epoch in which all was finite
                await self.maybe_evaluate(epoch + 1, update.adapters)
        finally:
            for task in rollouts:
                task.cancel()
            await asyncio.gather(*rollouts, return_exceptions=True)

    def log_late(self, late: Mapping[int, dict[str, float]]) -> None:
        """What rewards that only monitor said after their epoch was logged."""
        for epoch, metrics in late.items():
            self.tracker.log_late(epoch + 1, metrics)

    async def restore(self) -> int:
        """Go on from the newest checkpoint; nothing is one, too. Returns the number of finished epochs."""
        await self.saving.done()
        checkpoint = await asyncio.to_thread(self.folder.latest)
        if checkpoint is not None:
            await self.learners.restore(checkpoint.state)
        epoch = checkpoint.epoch if checkpoint else 0
        self.saving.saved(epoch)
        return await self.publish(epoch)

    async def recover(self, lost: str) -> int:
        """To the newest finished epoch, whose state is here or in a checkpoint; without one to the beginning."""
        logger.warning("%s; the run goes back to epoch %d", lost, self.finished.epoch if self.finished else 0)
        await self.saving.keep(self.good)
        if self.finished is None:
            return await self.restore()
        await self.learners.restore(self.finished.state)
        return await self.publish(self.finished.epoch)

    async def go_back(self, bad: str, epoch: int) -> int:
        """To the last good epoch, with float16's loss scale as it is by now. A second time at one place is the last."""
        if self.good is None or self.finished is None or epoch <= self.went_back_from:
            raise RuntimeError(bad)  # not to be answered by going back
        logger.warning("%s; the run goes back to epoch %d, once", bad, self.good.epoch)
        self.went_back_from = epoch
        await self.saving.done()
        await asyncio.to_thread(self.folder.drop_after, self.good.epoch)
        await self.learners.restore(replace(self.good.state, loss_scale=self.finished.state.loss_scale))
        return await self.publish(self.good.epoch)

    async def publish(self, epoch: int) -> int:
        """What rollouts may ask for after so many finished epochs, once it is proved that a load is felt."""
        self.tracker.rewind(epoch)
        self.health.begin(read_metrics(self.folder.path))
        probe, versions = await self.learners.probe(), await self.learners.adapters()
        self.finished = self.good = await self.take_state(epoch)
        for adapters in (probe, *versions):  # learners first, then samplers: they may share devices
            await self.load(adapters)
        return epoch

    async def load(self, adapters: Adapters) -> None:
        """By reference, acknowledged by checksum. Weights that went with a learner's node are asked for again."""
        try:
            await self.samplers.load(adapters)
        except ObjectsLostError as lost:
            again = [found for found in await self.learners.adapters() if found.version == adapters.version]
            if not again:
                raise
            logger.warning("%s; the learners are asked for them again", lost)
            await self.samplers.load(again[0])

    async def take_state(self, epoch: int) -> Finished | None:
        """The learners' state after every epoch. Of a whole transformer it is tens of GB: only where it is saved."""
        if self.cfg.model.tuning == "lora" or self.saving.due(epoch):
            return Finished(epoch=epoch, state=await self.learners.state())
        return None

    async def collect(self, epoch: int) -> list[ScoredGroup]:
        """Every group of an epoch, sampled with its pinned policy version and scored as soon as it is there.

        In the order of the requests. The first failure cancels the rest: nothing goes on behind it.
        """
        version, done = max(0, epoch - self.cfg.run.max_staleness), 0
        requests = epoch_requests(self.train_prompts, self.cfg, epoch=epoch, policy_version=version)

        async def one(request: RolloutRequest) -> ScoredGroup:
            nonlocal done
            group = await self.roll_out_and_score(request)
            done += 1
            self.tracker.log_progress(f"epoch {epoch + 1}: roll out and score", done, len(requests))
            return group

        return list(await together([one(request) for request in requests]))

    async def roll_out_and_score(self, request: RolloutRequest) -> ScoredGroup:
        """One group. A sample that is lost before it is scored is no missing reward."""

        async def drawn() -> ScoredGroup:
            images: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

            def seen(reference: Any) -> None:
                if not images.done():
                    images.set_result(reference)

            async def roll_out() -> Rollout:
                rollout = await self.samplers.rollout(request, seen)
                seen(rollout.images)
                return rollout

            async def score() -> Rewards:  # while the velocities are computed
                return await self.scorers.score(request, await images)

            rollout, rewards = await together((roll_out(), score()))
            if rollout.images is not images.result():  # drawn anew by another worker: these are what is learnt
                rewards = await self.scorers.score(request, rollout.images)
            return ScoredGroup(request=request, info=rollout.info, samples=rollout.samples, rewards=rewards)

        return await while_lost(drawn, self.cfg.sampler.max_attempts)

    async def update(self, groups: Sequence[ScoredGroup]) -> tuple[Sequence[ScoredGroup], Batch, UpdateResult]:
        """One epoch's update, with the groups that it was made of: those that are lost are drawn and scored again."""

        async def updated() -> tuple[Sequence[ScoredGroup], Batch, UpdateResult]:
            nonlocal groups
            batch = self.make_batch(groups)
            try:
                update = await self.learners.update(batch)
            except ObjectsLostError as lost:
                gone = [group for group in groups if group.request.items[0].group_id in lost.group_ids]
                again = await together([self.roll_out_and_score(group.request) for group in gone])
                made = {id(old): new for old, new in zip(gone, again, strict=True)}
                groups = [made.get(id(group), group) for group in groups]
                raise
            # what is kept of them are figures: the samples may leave the object store
            return [replace(group, samples=None) for group in groups], replace(batch, shards=()), update

        return await while_lost(updated, self.cfg.sampler.max_attempts)

    async def evaluate_what_is_missing(self, epoch: int) -> None:
        """The base model, and the epoch that the run goes on from, where they have no figures (any more)."""
        there = evaluated_epochs(self.folder.results)
        if epoch == self.first_epoch or 0 not in there:
            await self.evaluate(0, None)
        if epoch > self.first_epoch and epoch not in there:
            await self.maybe_evaluate(epoch, (await self.learners.adapters())[-1])

    async def maybe_evaluate(self, epoch: int, adapters: Adapters) -> None:
        if epoch % self.cfg.evaluation.every == 0 or epoch == self.cfg.run.num_epochs:
            await self.evaluate(epoch, adapters)

    async def evaluate(self, epoch: int, adapters: Adapters | None) -> None:
        """The EMA policy that was just published (None: the base model) on the held-out lines, each once."""
        self.folder.check_lock()
        progress = partial(self.tracker.log_progress, f"evaluate after {epoch} epochs")
        result = await evaluate_epoch(
            self.cfg,
            self.roles,
            self.test_prompts,
            self.folder.results,
            epoch=epoch,
            adapters=adapters,
            progress=progress,
        )
        self.tracker.log_evaluation(epoch, result)

    def make_batch(self, groups: Sequence[ScoredGroup]) -> Batch:
        """The update of one epoch: what each sample weighs, in which optimizer step, on which learner."""
        batch = make_batch(
            groups,
            self.algorithm,
            weights=self.cfg.trained_weights,
            combine=self.cfg.scorers.combine,
            max_missing_fraction=self.cfg.scorers.max_missing_fraction,
            num_steps=self.cfg.learner.optimizer_steps,
            run_seed=self.cfg.run.seed,
            num_shards=self.learners.size,
        )
        for about, line in batch.remarks.items():
            if about not in self.told:
                logger.warning("%s", line)
        self.told |= batch.remarks.keys()
        return batch

    async def maybe_save(self, epoch: int) -> None:
        if self.finished is not None and self.finished.epoch == epoch and self.saving.due(epoch):
            await self.saving.start(self.finished)


@overload
async def together(work: tuple[Coroutine[Any, Any, T], Coroutine[Any, Any, U]]) -> tuple[T, U]: ...


@overload
async def together(work: Sequence[Coroutine[Any, Any, T]]) -> Sequence[T]: ...


async def together(work: Any) -> Any:
    """All results in order. The first failure cancels the rest and is raised as itself."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except ExceptionGroup as failures:
        first = failures.exceptions[0]
        raise first from first.__cause__  # without the group, but with what it came from
    return tuple(task.result() for task in tasks)


def rollout_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """What the samplers did in one epoch."""
    infos = [group.info for group in groups]
    return {
        "rollout/images": float(sum(group.request.num_images for group in groups)),
        "rollout/worker_s": sum(info.seconds for info in infos),
        "rollout/mib": sum(info.num_bytes for info in infos) / 2**20,
        "rollout/staleness": float(infos[0].epoch - infos[0].policy_version),
    }
