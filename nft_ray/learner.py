"""The core of one learner rank: clean samples and optimalities in, a new policy out. Torch only; one adapter.

Plain regression on (x0, t, noise seed, v_old, v_ref, r): the frozen policies were evaluated by the sampler. An
optimizer step accumulates over flat (sample, time) pairs in micro-batches of any size and divides by the GLOBAL number
of pairs, so any number of ranks, with any share of the pairs (none, too), gives the same update.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from nft_ray.algorithms.nft import nft_loss_per_pair
from nft_ray.algorithms.schedules import ema_decay, old_policy_decay
from nft_ray.config import ExperimentConfig
from nft_ray.device import Copies, compile_blocks
from nft_ray.flow.path import x0_from_velocity
from nft_ray.models.base import Conditioning, FlowModel, load_model
from nft_ray.models.lora import assign, assign_start, attach, checksum, numpy_weights, random_weights
from nft_ray.pairs import gather, micro_batches
from nft_ray.parking import Parking, tensors_of
from nft_ray.sampler import probe_velocity
from nft_ray.types import Adapters, AdapterWeights, CleanSamples, LearnerState, TrainGroup, UpdateResult, Weights

PROBE_VERSION = -1
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class _Velocity(torch.nn.Module):
    """What DistributedDataParallel wraps: the transformer as a module whose forward is the model's velocity."""

    def __init__(self, model: FlowModel) -> None:
        super().__init__()
        self.transformer = model.transformer
        self._velocity = model.velocity

    def forward(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        return self._velocity(x, t, conditioning)


class LearnerCore:
    """The trained policy with its optimizer, its old policy and its EMA, on one device."""

    def __init__(self, config: ExperimentConfig, rank: int = 0, world_size: int = 1) -> None:
        torch.set_num_threads(config.learner.num_threads)
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self.device = torch.device("cuda" if config.learner.num_gpus and torch.cuda.is_available() else "cpu")
        self.model = load_model(config.model, self.device, transformer_only=True)
        self._dtype = next(self.model.transformer.parameters()).dtype
        self._probe_base = probe_velocity(self.model)
        self.policy = attach(self.model.transformer, config.model.lora, self.model.lora_targets, config.run.seed)
        assign_start(self.policy, config.model.lora)
        self.ema = {name: value.detach().clone() for name, value in self.policy.items()}
        self.optimizer = torch.optim.AdamW(
            self.policy.values(),
            lr=config.learner.learning_rate,
            betas=config.learner.betas,
            weight_decay=config.learner.weight_decay,
            fused=self.device.type == "cuda",
        )
        if config.learner.gradient_checkpointing:
            self.model.transformer.enable_gradient_checkpointing()  # type: ignore[operator]  # diffusers' own method
        if config.learner.compile:
            compile_blocks(self.model.transformer)
        self._copies = Copies(self.device)
        self._parking = Parking(self._tensors, self.device)
        self.version = 0
        self.optimizer_step = 0
        start = numpy_weights(self.policy)
        self._versions = {0: AdapterWeights(old=start, ema=start)}
        velocity = _Velocity(self.model)
        self._velocity = DistributedDataParallel(velocity, forward_sync_buffers=False) if world_size > 1 else velocity

    def park(self) -> None:
        """Give the device's memory to somebody else; nothing but `wake` may come next."""
        self.optimizer.zero_grad(set_to_none=True)
        self._parking.park()

    def wake(self) -> None:
        self._parking.wake()

    def _tensors(self) -> Iterator[torch.Tensor]:
        """All that is on the device between two updates."""
        yield from tensors_of([self.model.transformer])
        yield from self.ema.values()
        for moments in self.optimizer.state.values():
            yield from moments.values()

    def update(
        self,
        epoch: int,
        groups: Sequence[TrainGroup],
        samples: Sequence[CleanSamples],
        samples_per_step: tuple[int, ...],
    ) -> tuple[UpdateResult, AdapterWeights]:
        """One epoch's optimizer steps over this rank's groups; samples_per_step counts the samples of all ranks."""
        assert epoch == self.version, f"epoch {epoch} updates version {epoch}, this learner is at {self.version}"
        started = time.perf_counter()
        old = {name: torch.from_numpy(np.array(value)) for name, value in self._versions[self.version].old.items()}
        steps = tuple(self._step(s, groups, samples, count) for s, count in enumerate(samples_per_step))
        decay = old_policy_decay(self.optimizer_step, self.config.algorithm.old_policy_decay)
        for name, value in self.policy.items():
            old[name].lerp_(value.detach().cpu(), 1 - decay)
        self.version += 1
        self._versions[self.version] = AdapterWeights(old=numpy_weights(old), ema=numpy_weights(self.ema))
        for version in sorted(self._versions)[: -(self.config.run.max_staleness + 1)]:
            del self._versions[version]
        adapters, weights = self.adapters()[-1]
        metrics = {name: float(np.mean([step[name] for step in steps])) for name in steps[0]} if steps else {}
        metrics |= {"nft/old_policy_decay": decay, "time/update_s": time.perf_counter() - started}
        return UpdateResult(
            version=self.version,
            num_optimizer_steps=len(steps),
            metrics=metrics,
            steps=steps,
            adapters=adapters,
        ), weights

    def adapters(self) -> tuple[tuple[Adapters, AdapterWeights], ...]:
        """The last `max_staleness + 1` versions, oldest first."""
        return tuple((self._announce(version, weights), weights) for version, weights in sorted(self._versions.items()))

    def probe(self) -> tuple[Adapters, AdapterWeights]:
        """A random LoRA as version -1: what a sampler must be able to load before version 0, which is a no-op."""
        weights = random_weights(numpy_weights(self.policy), self.config.run.seed)
        adapters = AdapterWeights(old=weights, ema=weights)
        return self._announce(PROBE_VERSION, adapters), adapters

    def state(self) -> LearnerState:
        """Everything that a resumed learner needs, as arrays. The data position and all noise follow from `version`."""
        optimizer = {}
        for name, value in self.policy.items():
            for moment, tensor in self.optimizer.state.get(value, {}).items():
                optimizer[f"{moment}/{name}"] = tensor.detach().float().cpu().numpy().copy()
        return LearnerState(
            version=self.version,
            optimizer_step=self.optimizer_step,
            policy=numpy_weights(self.policy),
            ema=numpy_weights(self.ema),
            versions=dict(self._versions),
            optimizer=optimizer,
        )

    def restore(self, state: LearnerState) -> None:
        """Go on from a state, bit for bit."""
        assign(self.policy, state.policy)
        assign(self.ema, state.ema)
        self.version, self.optimizer_step = state.version, state.optimizer_step
        self._versions = dict(state.versions)
        for name, value in self.policy.items() if state.optimizer else ():
            self.optimizer.state[value] = {
                moment: torch.from_numpy(np.array(state.optimizer[f"{moment}/{name}"])).to(
                    "cpu" if moment == "step" else self.device
                )
                for moment in MOMENTS
            }

    def _announce(self, version: int, weights: AdapterWeights) -> Adapters:
        return Adapters(
            version=version,
            weights=None,
            num_tensors=len(weights.old),
            checksums={"old": checksum(weights.old), "ema": checksum(weights.ema)},
            probe=self._probe_of(weights.old),
            probe_base=self._probe_base,
        )

    def _probe_of(self, weights: Weights) -> np.ndarray:
        """The probe velocity under other weights; the policy is put back bit for bit."""
        kept = numpy_weights(self.policy)
        assign(self.policy, weights)
        velocity = probe_velocity(self.model)
        assign(self.policy, kept)
        return velocity

    def _step(
        self, step: int, groups: Sequence[TrainGroup], samples: Sequence[CleanSamples], num_samples: int
    ) -> dict[str, float]:
        """One optimizer step; returns its metrics, summed over ranks."""
        num_pairs = num_samples * self.config.sampler.num_times
        totals = torch.zeros(3, device=self.device)
        chunks = list(micro_batches(step, groups, samples, self.config.learner.micro_batch_size))
        self.optimizer.zero_grad(set_to_none=True)
        for i, chunk in enumerate(chunks):
            with self._reduction(last=i == len(chunks) - 1):
                totals += self._backward(chunk, groups, samples, num_pairs)
        if not chunks:
            self._join_without_pairs()
        norm = torch.nn.utils.clip_grad_norm_(self.policy.values(), self.config.learner.max_grad_norm)
        if not torch.isfinite(norm):
            raise RuntimeError(f"gradient norm is {norm.item()} at optimizer step {self.optimizer_step + 1}")
        self.optimizer.step()
        self.optimizer_step += 1
        self._follow()
        if self.world_size > 1:
            dist.all_reduce(totals)
        policy, kl, x0_norm = (totals / num_pairs).tolist()
        return {
            "nft/policy_loss": policy,
            "nft/kl": kl,
            "nft/loss": policy + self.config.algorithm.kl_weight * kl,
            "nft/grad_norm": norm.item(),
            "nft/x0_norm": x0_norm,
            "nft/optimizer_step": float(self.optimizer_step),
        }

    def _backward(
        self, pairs: np.ndarray, groups: Sequence[TrainGroup], samples: Sequence[CleanSamples], num_pairs: int
    ) -> torch.Tensor:
        """Forward and backward of one micro-batch of (group, sample, time) rows; returns the sums of its metrics.

        They stay on the device: nothing in here waits for it, so the host prepares the next micro-batch meanwhile.
        """
        algorithm, learner = self.config.algorithm, self.config.learner
        batch = gather(
            pairs,
            groups,
            samples,
            self._copies,
            dtype=self._dtype,
            with_reference=algorithm.kl_weight > 0,
            size=learner.micro_batch_size if learner.compile else None,
        )
        v = self._velocity(batch.x_t, batch.t, batch.conditioning)
        policy, kl = nft_loss_per_pair(
            v,
            batch.v_old,
            batch.x0,
            batch.x_t,
            batch.t,
            batch.optimality,
            beta=algorithm.beta,
            scale=algorithm.advantage_clip,
            v_ref=batch.v_ref,
        )
        policy, kl = policy * batch.weight, kl * batch.ref_weight
        loss = (policy + algorithm.kl_weight * kl).sum() / num_pairs
        # DistributedDataParallel averages over ranks; the loss is already divided by the pairs of all of them
        (loss * self.world_size).backward()
        x0_norm = x0_from_velocity(batch.x_t, v.detach(), batch.t).flatten(1).pow(2).mean(1).sqrt() * batch.weight
        return torch.stack([policy.detach().sum(), kl.detach().sum(), x0_norm.sum()]).float()

    def _reduction(self, *, last: bool) -> AbstractContextManager[None]:
        """Gradients are reduced over the ranks once per optimizer step: in its last backward."""
        module = self._velocity
        return module.no_sync() if isinstance(module, DistributedDataParallel) and not last else nullcontext()

    def _join_without_pairs(self) -> None:
        """Take part in the reduction with a zero gradient; alone, the gradient IS zero."""
        x, t, conditioning = self.model.probe()
        with torch.compiler.set_stance("force_eager"):  # its shape is not that of any micro-batch
            (self._velocity(x, t, conditioning).sum() * 0.0).backward()

    @torch.no_grad()
    def _follow(self) -> None:
        decay = ema_decay(self.optimizer_step, self.config.algorithm.ema_decay)
        for name, value in self.policy.items():
            self.ema[name].lerp_(value.detach(), 1 - decay)
