"""The core of one sampler: prompts and seeds in, images and clean samples out. Torch only; no Ray, no reward.

Everything that depends on a frozen policy is computed here, while its weights are loaded: x0 with the old policy, then
at each sample's training times the velocities that the algorithm needs: v_old, v_ref. What a request gets is a
function of the request and the adapter version that it names, never of the worker or of what the worker did before.

An image of which an x0 or a velocity is not finite is said to be (RolloutInfo.non_finite) and sent as zeros: what is
made of that is the driver's to decide, and its neighbours are as good as ever.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from nft_ray.algorithms.base import build_algorithm
from nft_ray.config import EvaluationConfig, ExperimentConfig, SamplerConfig
from nft_ray.cores.device import Copies, compile_blocks
from nft_ray.cores.parking import Parking, tensors_of
from nft_ray.cores.publish import checksum
from nft_ray.flow.path import interpolate
from nft_ray.flow.solvers import Velocity, solve
from nft_ray.flow.times import reference_times, training_times
from nft_ray.models.base import Conditioning, load_model, probe_velocity, repeat
from nft_ray.models.full import replaced
from nft_ray.models.lora import Hold, merged, unmerged
from nft_ray.seeding import mix, noise
from nft_ray.types import (
    Adapter,
    Adapters,
    AdapterWeights,
    CleanSamples,
    LoadReceipt,
    RolloutInfo,
    RolloutRequest,
    Weights,
)


class _Drawn(NamedTuple):
    """What `draw` leaves to `clean`: x0 and conditioning on the device; `bad`: bool (N,), whose x0 was not finite."""

    request: RolloutRequest
    x0: torch.Tensor
    conditioning: Conditioning
    bad: np.ndarray
    num_bytes: int
    seconds: float


class SamplerCore:
    """A frozen model on one device and the adapter versions that requests may name."""

    def __init__(self, config: ExperimentConfig, worker: str = "local") -> None:
        torch.set_num_threads(config.sampler.num_threads)
        self.config = config
        self.worker = worker
        self.device = torch.device("cuda" if config.sampler.num_gpus and torch.cuda.is_available() else "cpu")
        self._needs = build_algorithm(config.algorithm).needs
        self.model = load_model(config.model, self.device)
        self._probe_base = probe_velocity(self.model)
        if config.model.tuning == "full":
            self._use_weights = replaced(self.model.transformer)
        else:
            self._use_weights = hold_of(config)(self.model.transformer, config.model.lora, self.model.lora_targets)
        if config.sampler.compile:
            compile_blocks(self.model.transformer)
        self._copies = Copies(self.device)
        self._parking = Parking(lambda: tensors_of(self.model.modules()), self.device)
        self._versions: dict[int, AdapterWeights] = {}
        self._loaded: tuple[Adapter, int] | None = None
        self._drawn: _Drawn | None = None
        self._null = self.model.encode([""]) if max(config.sampler.guidance, config.evaluation.guidance) > 1 else None

    def load(self, adapters: Adapters, weights: AdapterWeights) -> LoadReceipt:
        """Keep this version (and `max_staleness` before it) and say what was loaded: counts, checksums, the probe."""
        self._versions.pop(adapters.version, None)  # the newest to come stands last: a run may go back
        self._versions[adapters.version] = weights
        for version in list(self._versions)[: -(self.config.run.max_staleness + 1)]:
            del self._versions[version]
        num_tensors = self._use("old", adapters.version, reload=True)
        return LoadReceipt(
            worker=self.worker,
            version=adapters.version,
            num_tensors=num_tensors,
            checksums={"old": checksum(weights.old), "ema": checksum(weights.ema)},
            probe=probe_velocity(self.model),
            probe_base=self._probe_base,
        )

    def park(self) -> None:
        """Give the device's memory to somebody else; nothing but `wake` may come next."""
        self._drawn = None
        self._parking.park()

    def wake(self) -> None:
        self._parking.wake()

    def rollout(self, request: RolloutRequest) -> tuple[RolloutInfo, np.ndarray, CleanSamples | None]:
        """Images uint8 (N, H, W, 3) of all items in order and, for split "train" (one item), their clean samples."""
        images = self.draw(request)
        info, samples = self.clean()
        return info, images, samples

    @torch.no_grad()
    def draw(self, request: RolloutRequest) -> np.ndarray:
        """The images alone: they can be scored while `clean`, the next call, computes the velocities."""
        started, self._drawn = time.perf_counter(), None
        self._use(request.adapter, request.policy_version)
        settings = self.config.sampler if request.split == "train" else self.config.evaluation
        conditioning = self.model.encode([item.prompt.text for item in request.items])
        index = torch.repeat_interleave(torch.tensor([item.num_images for item in request.items]))
        seeds = [seed for item in request.items for seed in item.seeds]
        x0 = self._draw(seeds, conditioning, index, settings)
        finite = x0.isfinite().flatten(1).all(1)
        x0 = x0.masked_fill(~finite.view(-1, *[1] * (x0.ndim - 1)), 0)
        size = self.config.sampler.decode_batch_size or self.config.sampler.micro_batch_size
        parts = [self._copies.download(self.model.decode(part)) for part in x0.split(size)]
        bad = self._copies.download(~finite)
        images = np.concatenate([part() for part in parts])
        seconds = time.perf_counter() - started
        self._drawn = _Drawn(request, x0, conditioning, bad(), images.nbytes, seconds)
        return images

    @torch.no_grad()
    def clean(self) -> tuple[RolloutInfo, CleanSamples | None]:
        """The clean samples of what `draw` drew last, once; None of a split without training."""
        drawn, self._drawn, started = self._drawn, None, time.perf_counter()
        assert drawn is not None, "nothing was drawn"
        request, non_finite, samples = drawn.request, drawn.bad, None
        if request.split == "train":
            self._use(request.adapter, request.policy_version)  # still there, unless something has come between
            samples = self._clean_samples(drawn.x0, drawn.conditioning, request)
            non_finite = _cleared(samples, non_finite)
        return RolloutInfo(
            epoch=request.epoch,
            policy_version=request.policy_version,
            worker=self.worker,
            seconds=drawn.seconds + time.perf_counter() - started,
            num_bytes=drawn.num_bytes + (samples.nbytes if samples else 0),
            non_finite=tuple(np.flatnonzero(non_finite).tolist()),
        ), samples

    def _chunks(self, count: int, size: int) -> Iterator[tuple[torch.Tensor, int]]:
        """Row numbers i64 in parts of `size`, and how many of each part count.

        Compiled blocks know one batch size: there the last part is filled up with its last row.
        """
        for rows in torch.arange(count).split(size):
            missing = size - len(rows) if self.config.sampler.compile else 0
            yield torch.cat([rows, rows[-1:].expand(missing)]), len(rows)

    def _weights(self, adapter: Adapter, version: int) -> Weights | None:
        if adapter == "reference":
            return None
        if version not in self._versions:
            raise RuntimeError(f"{self.worker}: policy version {version} is not loaded; has {sorted(self._versions)}")
        return self._versions[version].old if adapter == "old" else self._versions[version].ema

    def _use(self, adapter: Adapter, version: int, reload: bool = False) -> int:
        """Put an adapter's weights into the transformer; returns the number of tensors moved (0 = already there)."""
        if self._loaded == (adapter, version) and not reload:
            return 0
        self._loaded = None  # a failure half way must not pass for either
        num_tensors = self._use_weights(self._weights(adapter, version))
        self._loaded = (adapter, version)
        return num_tensors

    def _draw(
        self,
        seeds: Sequence[int],
        conditioning: Conditioning,
        index: torch.Tensor,
        settings: SamplerConfig | EvaluationConfig,
    ) -> torch.Tensor:
        """x0 f32 (N, *latent) on the device, for N seeds and rows `index` of a conditioning: chunk by chunk."""
        sigmas, size, parts = self.model.sigmas(settings.num_steps), self.config.sampler.micro_batch_size, []
        if settings.guidance > 1:
            size = max(1, size // 2)  # with and without the prompt stand in one forward
        for rows, count in self._chunks(len(seeds), size):
            x = self._copies.upload(noise([seeds[row] for row in rows], self.model.latent_shape))
            of_rows = repeat(conditioning, self._copies.upload(index[rows]))
            velocity = self._velocity_of(of_rows, len(rows), settings.guidance)
            parts.append(solve(settings.solver, velocity, x, sigmas)[:count])
        return torch.cat(parts)

    def _velocity_of(self, conditioning: Conditioning, count: int, guidance: float) -> Velocity:
        """velocity(x (count, *latent), sigma) under a conditioning (count, ...), guided away from the empty prompt."""
        if guidance == 1:
            return lambda x, sigma: self.model.velocity(x, x.new_full((count,), sigma), conditioning)
        assert self._null is not None
        both = {name: torch.cat([value, self._null[name].expand_as(value)]) for name, value in conditioning.items()}

        def guided(x: torch.Tensor, sigma: float) -> torch.Tensor:
            v, v_null = self.model.velocity(torch.cat([x, x]), x.new_full((2 * count,), sigma), both).chunk(2)
            return v_null + guidance * (v - v_null)

        return guided

    def _clean_samples(self, x0: torch.Tensor, conditioning: Conditioning, request: RolloutRequest) -> CleanSamples:
        """The one group with the velocities that the algorithm needs, each (sample, time) pair with its own noise."""
        (item,) = request.items
        seeds = np.array(item.seeds, dtype=np.int64)
        sigmas = self.model.sigmas(self.config.sampler.num_steps).numpy()
        t = training_times(sigmas, self.config.sampler.num_times, seeds)
        noise_seeds = np.array([[mix("noise", int(s), k) for k in range(t.shape[1])] for s in seeds], dtype=np.int64)
        frozen = self.velocities(x0, t, noise_seeds, conditioning) if self._needs.old else None
        v_ref, chosen = None, None
        if self._needs.reference:
            self._use("reference", request.policy_version)
            chosen = reference_times(t.shape[1], self._needs.reference, seeds)
            t_ref, ref_seeds = (np.take_along_axis(values, chosen, axis=1) for values in (t, noise_seeds))
            v_ref = self.velocities(x0, t_ref, ref_seeds, conditioning)()
        host = {name: self._copies.download(value.float()) for name, value in conditioning.items()}
        clean, v_old = self._copies.download(x0)(), frozen() if frozen else None
        return CleanSamples(
            x0=clean,
            t=t,
            noise_seeds=noise_seeds,
            v_old=v_old,
            v_ref=v_ref,
            ref_times=chosen,
            conditioning={name: value() for name, value in host.items()},
        )

    @torch.no_grad()
    def velocities(
        self, x0: torch.Tensor, t: np.ndarray, noise_seeds: np.ndarray, conditioning: Conditioning
    ) -> Callable[[], np.ndarray]:
        """Of the adapter in use, at x_t = (1-t) x0 + t noise; x0 (G, *latent), t and noise_seeds (G, T).

        Flat pairs, chunk by chunk. Call what returns to wait for (G, T, *latent) in `sampler.velocity_dtype`.
        """
        (num_samples, num_times), parts = t.shape, []
        dtype = getattr(torch, self.config.sampler.velocity_dtype)
        for rows, count in self._chunks(num_samples * num_times, self.config.sampler.micro_batch_size):
            sample, k = rows // num_times, rows % num_times
            chosen = sample.numpy(), k.numpy()  # NumPy takes a tensor of one number for that number
            t_rows = self._copies.upload(torch.from_numpy(t[chosen]))
            e = self._copies.upload(noise(noise_seeds[chosen], self.model.latent_shape))
            x_t = interpolate(x0[self._copies.upload(sample)], e, t_rows)
            of_rows = repeat(conditioning, self._copies.upload(torch.zeros_like(rows)))
            v = self.model.velocity(x_t, t_rows, of_rows)[:count]
            parts.append(self._copies.download(v.to(dtype)))
        shape = (num_samples, num_times, *self.model.latent_shape)
        return lambda: np.concatenate([part() for part in parts]).reshape(shape)


def _cleared(samples: CleanSamples, bad: np.ndarray) -> np.ndarray:
    """Which of them are `bad`, bool (G,), or have a velocity that is not finite: those are set to 0, in place."""
    found = [velocity for velocity in (samples.v_old, samples.v_ref) if velocity is not None]
    for velocity in found:
        bad = bad | ~np.isfinite(velocity).reshape(len(velocity), -1).all(1)
    if bad.any():
        for values in (samples.x0, *found):
            values[bad] = 0
    return bad


def hold_of(config: ExperimentConfig) -> Callable[..., Hold]:
    """`merged` or `unmerged`; docs/decisions/0003 measures what each does to the gradient."""
    beside = config.model.dtype == "bfloat16" if config.sampler.lora == "auto" else config.sampler.lora == "unmerged"
    return unmerged if beside else merged
