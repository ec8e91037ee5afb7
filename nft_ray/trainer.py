"""The whole system in one screen: roll out, score, learn, publish. Verbs only; the roles hide where each one runs.

    collect(e + staleness) ──► rollouts (oldest first) ──► update(e) ──► load(version e + 1) ──► collect ...

`max_staleness: 0` is the published algorithm; `1` overlaps the rollouts of epoch e + 1 with the update of e. Rollouts
of epoch e are pinned to policy version max(0, e - max_staleness), so both are reproducible. The trainer sees references
and scalars; it knows no Ray and no torch.
"""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from functools import partial

from nft_ray.algorithms.base import build_algorithm
from nft_ray.algorithms.batch import make_batch
from nft_ray.config import ExperimentConfig
from nft_ray.evaluation.held_out import evaluate_epoch
from nft_ray.prompts.draw import PromptSet, epoch_requests
from nft_ray.roles import Roles, Tracker
from nft_ray.runs.checkpoint import RunFolder
from nft_ray.runs.evaluations import evaluated_epochs
from nft_ray.types import Adapters, Batch, RolloutRequest, ScoredGroup


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
        self.train, self.test = train, test

    async def run(self) -> None:
        start = next_epoch = await self.restore()  # finished epochs; 0 when fresh
        rollouts: deque[asyncio.Task[list[ScoredGroup]]] = deque()
        if start == self.first_epoch:
            await self.evaluate(0, None)
        if start == self.cfg.run.num_epochs and start not in evaluated_epochs(self.folder.results):
            await self.evaluate(start, (await self.learners.adapters())[-1])  # it was to go on, and ends here
        try:
            for epoch in range(start, self.cfg.run.num_epochs):
                started = time.perf_counter()
                while next_epoch < self.cfg.run.num_epochs and len(rollouts) <= self.cfg.run.max_staleness:
                    rollouts.append(asyncio.create_task(self.collect(next_epoch)))
                    next_epoch += 1
                groups = await rollouts.popleft()  # oldest first; the others keep sampling
                collected = time.perf_counter()
                batch = self.make_batch(groups)
                update = await self.learners.update(batch)
                await self.samplers.load(update.adapters)  # by reference, acknowledged by checksum
                times = {"time/collect_s": collected - started, "time/epoch_s": time.perf_counter() - started}
                await self.maybe_evaluate(epoch + 1, update.adapters)
                metrics = rollout_metrics(groups) | batch.metrics | update.metrics | times
                self.tracker.log_epoch(epoch + 1, metrics, update.steps)
                await self.maybe_save(epoch + 1)  # a checkpoint is a finished epoch
        finally:
            for task in rollouts:
                task.cancel()
            await asyncio.gather(*rollouts, return_exceptions=True)

    async def restore(self) -> int:
        """Go on from the latest checkpoint; publish what rollouts may ask for, after proof that a load is felt."""
        checkpoint = self.folder.latest()
        if checkpoint is not None:
            await self.learners.restore(checkpoint.state)
        await self.samplers.load(await self.learners.probe())
        for adapters in await self.learners.adapters():
            await self.samplers.load(adapters)
        return checkpoint.epoch if checkpoint else 0

    async def collect(self, epoch: int) -> list[ScoredGroup]:
        """Every group of an epoch, sampled with its pinned policy version and scored as soon as it is there.

        In the order of the requests. The first failure cancels the rest: nothing goes on behind it.
        """
        version, done = max(0, epoch - self.cfg.run.max_staleness), 0
        requests = epoch_requests(self.train, self.cfg, epoch=epoch, policy_version=version)

        async def roll_out_and_score(request: RolloutRequest) -> ScoredGroup:
            nonlocal done
            rollout = await self.samplers.rollout(request)
            rewards = await self.scorers.score(request, rollout)
            done += 1
            self.tracker.log_progress(f"epoch {epoch + 1}: roll out and score", done, len(requests))
            return ScoredGroup(request=request, info=rollout.info, samples=rollout.samples, rewards=rewards)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(roll_out_and_score(request)) for request in requests]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def maybe_evaluate(self, epoch: int, adapters: Adapters) -> None:
        if epoch % self.cfg.evaluation.every == 0 or epoch == self.cfg.run.num_epochs:
            await self.evaluate(epoch, adapters)

    async def evaluate(self, epoch: int, adapters: Adapters | None) -> None:
        """The EMA policy that was just published (None: the base model) on the held-out lines, each once."""
        progress = partial(self.tracker.log_progress, f"evaluate after {epoch} epochs")
        result = await evaluate_epoch(
            self.cfg,
            self.roles,
            self.test,
            self.folder.results,
            epoch=epoch,
            adapters=adapters,
            progress=progress,
        )
        self.tracker.log_evaluation(epoch, result)

    def make_batch(self, groups: Sequence[ScoredGroup]) -> Batch:
        """The update of one epoch: what each sample weighs, in which optimizer step, on which learner."""
        return make_batch(
            groups,
            self.algorithm,
            weights=self.cfg.trained_weights,
            combine=self.cfg.scorers.combine,
            max_missing_fraction=self.cfg.scorers.max_missing_fraction,
            num_steps=self.cfg.learner.optimizer_steps,
            run_seed=self.cfg.run.seed,
            num_shards=self.learners.size,
        )

    async def maybe_save(self, epoch: int) -> None:
        if epoch % self.cfg.run.checkpoint_every == 0 or epoch == self.cfg.run.num_epochs:
            state = await self.learners.state()
            await asyncio.to_thread(self.folder.save, epoch, state)


def rollout_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """What the samplers did in one epoch."""
    infos = [group.info for group in groups]
    return {
        "rollout/images": float(sum(group.request.num_images for group in groups)),
        "rollout/worker_s": sum(info.seconds for info in infos),
        "rollout/mib": sum(info.num_bytes for info in infos) / 2**20,
        "rollout/staleness": float(infos[0].epoch - infos[0].policy_version),
    }
