"""The core of one sampler: prompts and seeds in, images and clean samples out. Torch only; no Ray, no reward.

Everything that depends on a frozen policy is computed here, while its weights are loaded: x0 with the old policy, then
v_old (and v_ref where the KL weight is above 0) at each sample's training times. What a request gets is a function of
the request and the adapter version that it names, never of the worker or of what the worker did before.
"""

import time

import numpy as np
import torch

from nft_ray.config import EvaluationConfig, ExperimentConfig, SamplerConfig
from nft_ray.flow.path import interpolate
from nft_ray.flow.solvers import solve
from nft_ray.flow.times import training_times
from nft_ray.models.base import Conditioning, FlowModel, load_model, repeat
from nft_ray.models.lora import checksum, merged, unmerged
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

PROBE_FLOOR = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}
"""Largest |difference| / |velocity| that rounding explains between two processes; measured in tests/test_sampler.py."""


class SamplerCore:
    """A frozen model on one device and the adapter versions that requests may name."""

    def __init__(self, config: ExperimentConfig, worker: str = "local") -> None:
        torch.set_num_threads(config.sampler.num_threads)
        self.config = config
        self.worker = worker
        self.device = torch.device("cuda" if config.sampler.num_gpus and torch.cuda.is_available() else "cpu")
        self.model = load_model(config.model, self.device)
        self._probe_base = probe_velocity(self.model)
        hold = merged if config.model.dtype == "float32" else unmerged
        self._use_lora = hold(self.model.transformer, config.model.lora, self.model.lora_targets)
        self._versions: dict[int, AdapterWeights] = {}
        self._loaded: tuple[Adapter, int] | None = None
        self._null = self.model.encode([""]) if max(config.sampler.guidance, config.evaluation.guidance) > 1 else None

    def load(self, adapters: Adapters, weights: AdapterWeights) -> LoadReceipt:
        """Keep this version (and `max_staleness` before it) and say what was loaded: counts, checksums, the probe."""
        self._versions[adapters.version] = weights
        for version in sorted(self._versions)[: -(self.config.run.max_staleness + 1)]:
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

    @torch.no_grad()
    def rollout(self, request: RolloutRequest) -> tuple[RolloutInfo, np.ndarray, CleanSamples | None]:
        """Images uint8 (N, H, W, 3) of all items in order and, for split "train" (one item), their clean samples."""
        started = time.perf_counter()
        self._use(request.adapter, request.policy_version)
        settings = self.config.sampler if request.split == "train" else self.config.evaluation
        conditioning = self.model.encode([item.prompt.text for item in request.items])
        index = torch.repeat_interleave(torch.tensor([item.num_images for item in request.items]))
        seeds = [seed for item in request.items for seed in item.seeds]
        x0 = self._draw(noise(seeds, self.model.latent_shape), repeat(conditioning, index), settings)
        images = np.concatenate([self.model.decode(part) for part in x0.split(self._chunk)])
        samples = self._clean_samples(x0, conditioning, request) if request.split == "train" else None
        info = RolloutInfo(
            epoch=request.epoch,
            policy_version=request.policy_version,
            worker=self.worker,
            seconds=time.perf_counter() - started,
            num_bytes=images.nbytes + (samples.v_old.nbytes if samples else 0),
        )
        return info, images, samples

    @property
    def _chunk(self) -> int:
        return self.config.sampler.micro_batch_size

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
        num_tensors = self._use_lora(self._weights(adapter, version))
        self._loaded = (adapter, version)
        return num_tensors

    def _draw(
        self, x: torch.Tensor, conditioning: Conditioning, settings: SamplerConfig | EvaluationConfig
    ) -> torch.Tensor:
        """x0 f32 (N, *latent) on the device, from noise (N, *latent): the whole schedule, chunk by chunk."""
        sigmas, guidance, parts = self.model.sigmas(settings.num_steps), settings.guidance, []
        for rows in torch.arange(len(x)).split(self._chunk):
            part = repeat(conditioning, rows)

            def velocity(x_t: torch.Tensor, sigma: float | torch.Tensor, part: Conditioning = part) -> torch.Tensor:
                t = torch.full((len(x_t),), float(sigma), device=self.device)
                v = self.model.velocity(x_t, t, part)
                if guidance == 1:
                    return v
                null = repeat(self._null or {}, torch.zeros(len(x_t), dtype=torch.int64))
                v_null = self.model.velocity(x_t, t, null)
                return v_null + guidance * (v - v_null)

            parts.append(solve(settings.solver, velocity, x[rows].to(self.device), sigmas))
        return torch.cat(parts)

    def _clean_samples(self, x0: torch.Tensor, conditioning: Conditioning, request: RolloutRequest) -> CleanSamples:
        """v_old and v_ref of every (sample, time) pair of the one group, each with its own noise."""
        (item,) = request.items
        seeds = np.array(item.seeds, dtype=np.int64)
        sigmas = self.model.sigmas(self.config.sampler.num_steps).numpy()
        t = training_times(sigmas, self.config.sampler.num_times, seeds)
        noise_seeds = np.array([[mix("noise", int(s), k) for k in range(t.shape[1])] for s in seeds], dtype=np.int64)
        v_old = self._velocities(x0, t, noise_seeds, conditioning)
        v_ref = None
        if self.config.algorithm.kl_weight:
            self._use("reference", request.policy_version)
            v_ref = self._velocities(x0, t, noise_seeds, conditioning)
        return CleanSamples(
            x0=x0.cpu().numpy(),
            t=t,
            noise_seeds=noise_seeds,
            v_old=v_old,
            v_ref=v_ref,
            conditioning={name: value.float().cpu().numpy() for name, value in conditioning.items()},
        )

    def _velocities(
        self, x0: torch.Tensor, t: np.ndarray, noise_seeds: np.ndarray, conditioning: Conditioning
    ) -> np.ndarray:
        """(G, T, *latent) in `sampler.velocity_dtype`, at x_t = (1-t) x0 + t noise; flat pairs, chunk by chunk."""
        (num_samples, num_times), parts = t.shape, []
        for rows in torch.arange(num_samples * num_times).split(self._chunk):
            sample, k = rows // num_times, rows % num_times
            t_rows = torch.from_numpy(t[sample, k]).to(self.device)
            e = noise(noise_seeds[sample, k], self.model.latent_shape).to(self.device)
            x_t = interpolate(x0[sample.to(self.device)], e, t_rows)
            v = self.model.velocity(x_t, t_rows, repeat(conditioning, torch.zeros_like(rows)))
            parts.append(v.cpu().numpy().astype(self.config.sampler.velocity_dtype))
        return np.concatenate(parts).reshape(num_samples, num_times, *self.model.latent_shape)


@torch.no_grad()
def probe_velocity(model: FlowModel) -> np.ndarray:
    """The model's velocity on its fixed probe, f32 (*latent)."""
    return model.velocity(*model.probe())[0].cpu().numpy()


def verify(adapters: Adapters, receipt: LoadReceipt, dtype: str) -> None:
    """RuntimeError with both values where a worker did not load what was announced.

    Counts and checksums must be equal; the probe velocity may differ by max(floor |v|, 0.1 |v - v_base|): less than
    what a LoRA that was not loaded would make it differ. Announced from a file, it must differ from the worker's own
    before.
    """
    for what in ("version", "num_tensors", "checksums"):
        announced, loaded = getattr(adapters, what), getattr(receipt, what)
        if announced != loaded:
            raise RuntimeError(f"{receipt.worker}: adapter {what} differs: learner {announced}, sampler {loaded}")
    if adapters.probe is None or adapters.probe_base is None:
        if np.array_equal(receipt.probe, receipt.probe_base):
            raise RuntimeError(f"{receipt.worker}: the LoRA is loaded and the velocity is the base model's: no effect")
        return
    norm = np.linalg.norm
    allowed = max(PROBE_FLOOR[dtype] * norm(adapters.probe), 0.1 * norm(adapters.probe - adapters.probe_base))
    difference = norm(adapters.probe - receipt.probe)
    if not difference <= allowed:
        raise RuntimeError(
            f"{receipt.worker}: version {adapters.version} gives another velocity: "
            f"|learner| {norm(adapters.probe):.6g}, |sampler| {norm(receipt.probe):.6g}, "
            f"|difference| {difference:.3g} > {allowed:.3g}"
        )
