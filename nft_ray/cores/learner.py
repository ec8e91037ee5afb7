"""The core of one learner rank: clean samples and their weights in, a new policy out. Torch only.

Plain regression on (x0, t, noise seed, v_old, v_ref, weight): the frozen policies were evaluated by the sampler. An
optimizer step accumulates over flat (sample, time) pairs in micro-batches of any size and divides by the GLOBAL number
of pairs, so any number of ranks, with any share of the pairs (none, too), gives the same update.

A step whose gradient is not finite is left out, on all ranks alike, for they share the norm: weights, moments, EMA and
the count of optimizer steps, which the schedules go by, stay what they were. A policy whose own velocity is not finite
after its steps is published by nobody: RuntimeError.

Every method is called on all ranks, in the same order; weights and states are given by rank 0, by the others None.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from nft_ray.algorithms.base import build_algorithm
from nft_ray.algorithms.schedules import ema_decay, old_policy_decay
from nft_ray.config import ExperimentConfig
from nft_ray.cores.device import Copies
from nft_ray.cores.loss_scale import LossScale
from nft_ray.cores.pairs import gather, micro_batches
from nft_ray.cores.parking import Parking
from nft_ray.cores.policy import Part, Policy, local
from nft_ray.cores.publish import NOT_PUBLISHED, check_healthy, digest
from nft_ray.flow.path import x0_from_velocity
from nft_ray.types import Adapters, AdapterWeights, CleanSamples, LearnerState, TrainGroup, UpdateResult, Weights

PROBE_VERSION = -1
STEP = "step"
MOMENTS = ("exp_avg", "exp_avg_sq", STEP)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """What became of one optimizer step: its metrics, or, where it was skipped, whose losses were not finite."""

    metrics: dict[str, float] | None
    culprits: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Version:
    """This rank's part of one published policy, on the host; never changed."""

    old: Part
    ema: Part


class LearnerCore:
    """The trained policy with its optimizer, its old policy and its EMA, on one device."""

    def __init__(self, config: ExperimentConfig, rank: int = 0, world_size: int = 1) -> None:
        torch.set_num_threads(config.learner.num_threads)
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self.device = torch.device("cuda" if config.learner.num_gpus and torch.cuda.is_available() else "cpu")
        self._algorithm = build_algorithm(config.algorithm)
        self._policy = Policy(config, self.device, world_size)
        self.model, self.policy = self._policy.model, self._policy.parameters
        self.ema = {name: value.detach().clone() for name, value in self._policy.part().items()}
        self.optimizer = torch.optim.AdamW(
            self.policy.values(),
            lr=config.learner.learning_rate,
            betas=config.learner.betas,
            weight_decay=config.learner.weight_decay,
            fused=self.device.type == "cuda",
        )
        self._loss_scale = LossScale(self._policy.dtype, self.model.latent_shape)
        self._copies = Copies(self.device)
        self._parking = Parking(self._tensors, self.device)
        self.version = 0
        self.optimizer_step = 0
        start = _on_host(self.ema)
        self._versions = {0: _Version(old=start, ema=start)}

    def park(self) -> None:
        """Give the device's memory to somebody else; nothing but `wake` may come next."""
        self.optimizer.zero_grad(set_to_none=True)
        self._parking.park()

    def wake(self) -> None:
        self._parking.wake()

    def _tensors(self) -> Iterator[torch.Tensor]:
        """All that is on the device between two updates."""
        yield from self._policy.tensors()
        yield from self.ema.values()
        for moments in self.optimizer.state.values():
            yield from moments.values()

    def update(
        self,
        epoch: int,
        groups: Sequence[TrainGroup],
        samples: Sequence[CleanSamples],
        samples_per_step: tuple[int, ...],
    ) -> tuple[UpdateResult, AdapterWeights | None]:
        """One epoch's optimizer steps over this rank's groups; samples_per_step counts the samples of all ranks.

        Without a step, none asked for or all skipped, only the old policy moves: towards the policy, as in any epoch.
        """
        assert epoch == self.version, f"epoch {epoch} updates version {epoch}, this learner is at {self.version}"
        started = time.perf_counter()
        tried = [self._step(s, groups, samples, count) for s, count in enumerate(samples_per_step)]
        steps = tuple(step.metrics for step in tried if step.metrics is not None)
        if steps:
            rate = self.config.learner.learning_rate
            when = f"epoch {epoch + 1} (optimizer step {self.optimizer_step}, learning rate {rate:g})"
            check_healthy(self._policy.probe(), when, self.config.model.dtype)
        decay = old_policy_decay(self.optimizer_step, self.config.algorithm.old_policy_decay)
        before, now = self._versions[self.version].old, self._policy.part()
        old = {name: value.lerp(now[name].detach().cpu(), 1 - decay) for name, value in before.items()}
        self.version += 1
        self._versions[self.version] = _Version(old=old, ema=_on_host(self.ema))
        for version in sorted(self._versions)[: -(self.config.run.max_staleness + 1)]:
            del self._versions[version]
        adapters, weights = self._announce(self.version, self._versions[self.version])
        skipped = len(tried) - len(steps)
        metrics = {name: float(np.mean([step[name] for step in steps])) for name in steps[0]} if steps else {}
        own = {"old_policy_decay": decay, "skipped_steps": float(skipped)}
        if self._policy.dtype == torch.float16:
            own["loss_scale"] = self._loss_scale.relative
        metrics |= {f"{self._algorithm.name}/{name}": value for name, value in own.items()}
        metrics |= {"time/update_s": time.perf_counter() - started}
        return UpdateResult(
            version=self.version,
            num_optimizer_steps=len(steps),
            metrics=metrics,
            steps=steps,
            adapters=adapters,
            skipped_steps=skipped,
            culprits=tuple(sorted({group for step in tried for group in step.culprits})),
        ), weights

    def adapters(self) -> tuple[tuple[Adapters, AdapterWeights | None], ...]:
        """The last `max_staleness + 1` versions, oldest first."""
        return tuple(self._announce(number, version) for number, version in sorted(self._versions.items()))

    def probe(self) -> tuple[Adapters, AdapterWeights | None]:
        """Random weights as version -1: what a sampler must be able to load before version 0, which is a no-op."""
        part = self._policy.random(self.config.run.seed)
        return self._announce(PROBE_VERSION, _Version(old=part, ema=part))

    def state(self) -> LearnerState | None:
        """Everything that a resumed learner needs, as arrays. The data position and all noise follow from `version`."""
        moments = {name: self.optimizer.state[value] for name, value in self.policy.items() if self.optimizer.state}
        optimizer: Weights = {}
        for moment in MOMENTS if moments else ():
            part = _on_host({name: local(moments[name][moment]) for name in moments})
            tensors = self._arrays(part, scalars=moment == STEP)
            optimizer |= {f"{moment}/{name}": value for name, value in tensors.items()}
        state = LearnerState(
            version=self.version,
            optimizer_step=self.optimizer_step,
            policy=self._arrays(_on_host(self._policy.part())),
            ema=self._arrays(_on_host(self.ema)),
            versions={
                number: AdapterWeights(old=self._arrays(version.old), ema=self._arrays(version.ema))
                for number, version in self._versions.items()
            },
            optimizer=optimizer,
            loss_scale=None if self._loss_scale.relative == 1 else self._loss_scale.relative,
        )
        return state if self.rank == 0 else None

    def restore(self, state: LearnerState) -> None:
        """Go on from a state, bit for bit, whatever was done before. Back at an earlier one the loss scale stays as
        small as it has become since: what did not fit float16 would not fit again.
        """
        self._policy.assign(self._policy.part_of(state.policy))
        for name, value in self._policy.part_of(state.ema).items():
            self.ema[name].copy_(value)
        self.version, self.optimizer_step = state.version, state.optimizer_step
        self._loss_scale.relative = min(self._loss_scale.relative, state.loss_scale or 1.0)
        self._versions = {
            number: _Version(old=self._policy.part_of(weights.old), ema=self._policy.part_of(weights.ema))
            for number, weights in state.versions.items()
        }
        self.optimizer.state.clear()
        for name, value in self.policy.items() if state.optimizer else ():
            self.optimizer.state[value] = {
                moment: self._moment(moment, name, state.optimizer[f"{moment}/{name}"]) for moment in MOMENTS
            }

    def _moment(self, moment: str, name: str, array: np.ndarray) -> torch.Tensor:
        if moment == STEP:  # a scalar, which AdamW keeps on the device only where it is fused
            return torch.from_numpy(np.array(array)).to(self.device if self.optimizer.defaults["fused"] else "cpu")
        return self._policy.moment(name, self._policy.own(name, array))

    def _announce(self, number: int, version: _Version) -> tuple[Adapters, AdapterWeights | None]:
        """What rank 0 sends; the other ranks, whose weights need not travel, make the same announcement."""
        old, old_checksum = self._gathered(version.old)
        ema, ema_checksum = (old, old_checksum) if version.ema is version.old else self._gathered(version.ema)
        adapters = Adapters(
            version=number,
            weights=None,
            num_tensors=len(self.policy),
            checksums={"old": old_checksum, "ema": ema_checksum},
            probe=self._policy.probe(version.old),
            probe_base=self._policy.probe_base,
        )
        return adapters, AdapterWeights(old=old, ema=ema) if self.rank == 0 else None

    def _gathered(self, part: Part) -> tuple[Weights, str]:
        """Whole weights, on rank 0 only, and their checksum: one tensor at a time on the others.

        RuntimeError where one holds a NaN: that is announced to nobody.
        """
        weights: Weights = {}

        def seen() -> Iterator[tuple[str, np.ndarray]]:
            for name, value in self._policy.whole(part):
                if not np.isfinite(value.sum(dtype=np.float64)):
                    raise RuntimeError(f"the policy has blown up: {name} is not finite; {NOT_PUBLISHED}")
                weights.update({name: value} if self.rank == 0 else {})
                yield name, value

        checksum = digest(seen())
        return weights, checksum

    def _arrays(self, part: Part, *, scalars: bool = False) -> Weights:
        """A part on the host as whole arrays, sharing its memory where nothing is sharded; empty but on rank 0."""
        tensors = ((name, value.numpy()) for name, value in part.items()) if scalars else self._policy.whole(part)
        return {name: value for name, value in tensors if self.rank == 0}

    def _step(
        self, step: int, groups: Sequence[TrainGroup], samples: Sequence[CleanSamples], num_samples: int
    ) -> _Step:
        """One optimizer step, or none where its gradient is not finite; its metrics are summed over ranks."""
        num_pairs = num_samples * self.config.sampler.num_times
        totals = torch.zeros(2 + len(self._algorithm.measures), device=self.device)
        chunks = list(micro_batches(step, groups, samples, self.config.learner.micro_batch_size))
        finite: list[torch.Tensor] = []
        self.optimizer.zero_grad(set_to_none=True)
        turns = self._policy.turns(len(chunks))
        for i in range(turns):
            with self._policy.reduction(last=i == turns - 1):
                if i < len(chunks):
                    sums, are_finite = self._backward(chunks[i], groups, samples, num_pairs)
                    totals += sums
                    finite.append(are_finite)
                else:
                    self._policy.join()
        # averaged over the ranks, and the loss was already divided by the pairs of all of them
        self._policy.scale_gradients(self.world_size / self._loss_scale.of(num_pairs))
        norm = self._policy.clip(self.config.learner.max_grad_norm)
        if not torch.isfinite(norm):
            return self._skip(chunks, groups, finite)
        self.optimizer.step()
        self.optimizer_step += 1
        self._loss_scale.stepped(self.optimizer_step)
        self._follow()
        if self.world_size > 1:
            dist.all_reduce(totals)
        names, means = ("loss", "x0_norm", *self._algorithm.measures), (totals / num_pairs).tolist()
        metrics = dict(zip(names, means, strict=True))
        metrics |= {"grad_norm": norm.item(), "optimizer_step": float(self.optimizer_step)}
        return _Step(metrics={f"{self._algorithm.name}/{name}": value for name, value in metrics.items()})

    def _skip(
        self, chunks: Sequence[np.ndarray], groups: Sequence[TrainGroup], finite: Sequence[torch.Tensor]
    ) -> _Step:
        """Leave a step out. Where no loss of any rank explains it, the loss scale may."""
        self.optimizer.zero_grad(set_to_none=True)
        found = {
            groups[row[0]].group_id
            for rows, good in zip(chunks, finite, strict=True)
            for row in rows[~good[: len(rows)].cpu().numpy()]
        }
        culprits = [sorted(found)]
        if self.world_size > 1:
            culprits = [[] for _ in range(self.world_size)]
            dist.all_gather_object(culprits, sorted(found))
        everyones = tuple(sorted({group for of_rank in culprits for group in of_rank}))
        if not everyones:
            self._loss_scale.shrink()
        return _Step(metrics=None, culprits=everyones)

    def _backward(
        self, pairs: np.ndarray, groups: Sequence[TrainGroup], samples: Sequence[CleanSamples], num_pairs: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward and backward of one micro-batch of (group, sample, time) rows; the sums of its metrics, and which
        rows' losses are finite, bool (B,).

        Both stay on the device: nothing in here waits for it, so the host prepares the next micro-batch meanwhile.
        """
        learner = self.config.learner
        batch = gather(
            pairs,
            groups,
            samples,
            self._copies,
            dtype=self._policy.dtype,
            needs=self._algorithm.needs,
            size=learner.micro_batch_size if learner.compile else None,
        )
        of = batch.pairs
        v = self._policy.velocity(of.x_t, of.t, batch.conditioning)
        losses = self._algorithm.loss(v, of)
        loss = (losses.total * batch.filled).sum() / num_pairs
        (loss * self._loss_scale.of(num_pairs)).backward()
        x0_norm = x0_from_velocity(of.x_t, v.detach(), of.t).flatten(1).pow(2).mean(1).sqrt()
        measured = (losses.total, x0_norm, *losses.measured)
        sums = torch.stack([(values.detach() * batch.filled).sum() for values in measured]).float()
        return sums, losses.total.detach().isfinite()

    @torch.no_grad()
    def _follow(self) -> None:
        decay = ema_decay(self.optimizer_step, self.config.algorithm.ema_decay)
        for name, value in self._policy.part().items():
            self.ema[name].lerp_(value, 1 - decay)


def _on_host(part: Part) -> Part:
    """A copy in float32."""
    return {name: value.detach().to("cpu", torch.float32, copy=True) for name, value in part.items()}
