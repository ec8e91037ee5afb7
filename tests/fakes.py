"""Cores and rewards that cost nothing: for contract tests, kill tests and benchmarks/control_plane.py. Picklable.

Everything is a plain function of the request, the weights and the seeds, so what a retried call should give is known.
The ones that misbehave do so once: they consume a marker file in `folder` first, so their replacement behaves.
"""

import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nft_ray.rewards.base import Reward, Scores
from nft_ray.types import (
    Adapters,
    AdapterWeights,
    CleanSamples,
    LearnerState,
    LoadReceipt,
    Prompt,
    RolloutInfo,
    RolloutItem,
    RolloutRequest,
    TrainGroup,
    UpdateResult,
    Weights,
)

if TYPE_CHECKING:
    from nft_ray.config import ExperimentConfig  # a reward replica does without

BASE = np.ones(4, dtype=np.float32)
MONITOR = "jpeg_incompressibility"
"""Where a test has a reward that only monitors."""


def fake_config(**sections: Any) -> "ExperimentConfig":
    """An experiment that fits 2 CPUs with 2 samplers, 2 learners and a reward of 3 replicas; sections are merged in."""
    from nft_ray.config import parse

    data: dict[str, Any] = {
        "run": {"name": "fake", "num_epochs": 2},
        "cluster": {"wait_s": 60},
        "prompts": {"groups_per_epoch": 4, "images_per_group": 3},
        "sampler": {"num_workers": 2, "num_cpus": 0.25, "num_steps": 4, "num_times": 2, "timeout_s": 60},
        "learner": {"num_workers": 2, "num_cpus": 0.25, "timeout_s": 60},
        "rewards": {"jpeg_compressibility": {"num_replicas": 3, "num_cpus": 0.25, "batch_size": 2}},
        "scorers": {"timeout_s": 60, "max_attempts": 3},
    }
    for name, section in sections.items():
        data[name] = section if name == "rewards" else {**data.get(name, {}), **section}
    return parse(data)


def fake_request(epoch: int = 0, prompt: int = 0, *, version: int = 0, num_images: int = 3) -> RolloutRequest:
    """One training group of one prompt."""
    seeds = tuple(1000 * epoch + 10 * prompt + image for image in range(num_images))
    item = RolloutItem(group_id=prompt, prompt=Prompt(id=prompt, text=f"prompt {prompt}"), seeds=seeds)
    return RolloutRequest(epoch=epoch, items=(item,), adapter="old", policy_version=version, split="train")


def fake_checksum(weights: Weights) -> str:
    return " ".join(f"{name}:{value.tobytes().hex()}" for name, value in sorted(weights.items()))


def fake_probe(weights: Weights) -> np.ndarray:
    """The "velocity": the base where the weights are zero."""
    return BASE + weights["lora"]


class FakeSamplerCore:
    """Images are filled with their seed; clean samples carry the loaded policy's first weight, so versions tell."""

    def __init__(self, config: "ExperimentConfig", worker: str = "local") -> None:
        self.config, self.worker = config, worker
        self.versions: dict[int, AdapterWeights] = {}
        self.parked = False

    def park(self) -> None:
        self.parked = True

    def wake(self) -> None:
        self.parked = False

    def load(self, adapters: Adapters, weights: AdapterWeights) -> LoadReceipt:
        assert not self.parked
        self.versions.pop(adapters.version, None)
        self.versions[adapters.version] = weights
        for version in list(self.versions)[: -(self.config.run.max_staleness + 1)]:
            del self.versions[version]
        return LoadReceipt(
            worker=self.worker,
            version=adapters.version,
            num_tensors=len(weights.old),
            checksums={"old": fake_checksum(weights.old), "ema": fake_checksum(weights.ema)},
            probe=fake_probe(weights.old),
            probe_base=BASE,
        )

    def rollout(self, request: RolloutRequest) -> tuple[RolloutInfo, np.ndarray, CleanSamples | None]:
        assert not self.parked
        if request.adapter != "reference" and request.policy_version not in self.versions:
            raise RuntimeError(f"version {request.policy_version} is not loaded; has {sorted(self.versions)}")
        model = self.config.model
        seeds = np.array([seed for item in request.items for seed in item.seeds], dtype=np.int64)
        images = np.empty((len(seeds), model.height, model.width, 3), dtype=np.uint8)
        images[:] = (seeds % 251).reshape(-1, 1, 1, 1)
        samples = self._samples(seeds, request.policy_version) if request.split == "train" else None
        num_bytes = images.nbytes + (samples.nbytes if samples else 0)
        info = RolloutInfo(
            epoch=request.epoch,
            policy_version=request.policy_version,
            worker=self.worker,
            seconds=0.0,
            num_bytes=num_bytes,
        )
        return info, images, samples

    def draw(self, request: RolloutRequest) -> np.ndarray:
        """As of a real core: in two calls."""
        info, images, samples = self.rollout(request)
        self._rest = info, samples
        return images

    def clean(self) -> tuple[RolloutInfo, CleanSamples | None]:
        return self._rest

    def _samples(self, seeds: np.ndarray, version: int) -> CleanSamples:
        latent = (4, self.config.model.height // 8, self.config.model.width // 8)
        num_times = self.config.sampler.num_times
        x0 = np.broadcast_to(seeds.astype(np.float32).reshape(-1, 1, 1, 1), (len(seeds), *latent)).copy()
        velocity = float(self.versions[version].old["lora"][0])
        return CleanSamples(
            x0=x0,
            t=np.full((len(seeds), num_times), 0.5, dtype=np.float32),
            noise_seeds=np.zeros((len(seeds), num_times), dtype=np.int64),
            v_old=np.full((len(seeds), num_times, *latent), velocity, dtype=np.float16),
            v_ref=None,
            conditioning={},
        )


class FakeLearnerCore:
    """The "policy" is four numbers; an update adds the weight of the kept samples, summed over ranks."""

    def __init__(self, config: "ExperimentConfig", rank: int = 0, world_size: int = 1) -> None:
        self.config, self.rank, self.world_size = config, rank, world_size
        zero = {"lora": np.zeros(4, dtype=np.float32)}
        self.version, self.versions = 0, {0: AdapterWeights(old=zero, ema=zero)}
        self.parked = False

    def park(self) -> None:
        self.parked = True

    def wake(self) -> None:
        self.parked = False

    def restore(self, state: LearnerState) -> None:
        self.version, self.versions = state.version, dict(state.versions)

    def state(self) -> LearnerState:
        weights = self.versions[self.version]
        return LearnerState(
            version=self.version,
            optimizer_step=self.version,
            policy=weights.old,
            ema=weights.ema,
            versions=dict(self.versions),
            optimizer={},
        )

    def probe(self) -> tuple[Adapters, AdapterWeights]:
        weights = {"lora": np.full(4, 0.5, dtype=np.float32)}
        return self._announce(-1, AdapterWeights(old=weights, ema=weights))

    def adapters(self) -> tuple[tuple[Adapters, AdapterWeights], ...]:
        return tuple(self._announce(version, weights) for version, weights in sorted(self.versions.items()))

    def update(
        self,
        epoch: int,
        groups: Sequence[TrainGroup],
        samples: Sequence[CleanSamples],
        samples_per_step: tuple[int, ...],
    ) -> tuple[UpdateResult, AdapterWeights]:
        assert epoch == self.version
        assert not self.parked
        assert all(group.samples is None for group in groups) or self.world_size == 1
        assert all(len(part.x0) == len(group.step) for group, part in zip(groups, samples, strict=True))
        kept = sum(float(group.weight[group.step >= 0].sum()) for group in groups)
        total = np.float32(self._sum_over_ranks(kept) / max(1, sum(samples_per_step)))
        old = {"lora": self.versions[self.version].old["lora"] + total}
        self.version += 1
        self.versions[self.version] = AdapterWeights(old=old, ema=old)
        for version in sorted(self.versions)[: -(self.config.run.max_staleness + 1)]:
            del self.versions[version]
        adapters, weights = self.adapters()[-1]
        steps = tuple({"nft/loss": float(total)} for _ in samples_per_step)
        return UpdateResult(
            version=self.version,
            num_optimizer_steps=len(steps),
            metrics={"nft/loss": float(total)},
            steps=steps,
            adapters=adapters,
        ), weights

    def _sum_over_ranks(self, value: float) -> float:
        if self.world_size == 1:
            return value
        import torch  # a real reduction: proves that the process group stands

        total = torch.tensor(value, dtype=torch.float64)
        torch.distributed.all_reduce(total)
        return total.item()

    def _announce(self, version: int, weights: AdapterWeights) -> tuple[Adapters, AdapterWeights]:
        adapters = Adapters(
            version=version,
            weights=None,
            num_tensors=len(weights.old),
            checksums={"old": fake_checksum(weights.old), "ema": fake_checksum(weights.ema)},
            probe=fake_probe(weights.old),
            probe_base=BASE,
        )
        return adapters, weights


class FakeReward:
    """Scores an image by its first byte; the detail is its negative."""

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        assert len(images) == len(prompts) == len(metadata)
        values = images[:, 0, 0, 0].astype(np.float32)
        return Scores(values=values, details={"negative": -values})


def fake_load_reward(name: str, section: Mapping[str, Any]) -> Reward:
    return FakeReward()


def consume(marker: Path) -> bool:
    """True for exactly one caller, over all processes, per marker file."""
    try:
        marker.unlink()
    except FileNotFoundError:
        return False
    return True


def die() -> None:
    """As if the kernel had killed this process."""
    os.kill(os.getpid(), signal.SIGKILL)


class MortalSamplerCore(FakeSamplerCore):
    """Dies in a rollout while `folder/die-sampler` is there, hangs for `folder/hang-sampler`."""

    def __init__(self, folder: Path, config: "ExperimentConfig", worker: str) -> None:
        super().__init__(config, worker)
        self.folder = folder

    def rollout(self, request: RolloutRequest) -> tuple[RolloutInfo, np.ndarray, CleanSamples | None]:
        if consume(self.folder / "die-sampler"):
            die()
        if consume(self.folder / "hang-sampler"):
            time.sleep(3600)
        return super().rollout(request)


class MortalLearnerCore(FakeLearnerCore):
    """In an update rank `mortal_rank` dies, stops, fails with its device or has a bug: `folder/{die,stop,...}-learner`.

    What it kept itself is wrong afterwards: only a restored state gives the right sums.
    """

    def __init__(self, folder: Path, mortal_rank: int, config: "ExperimentConfig", rank: int, world_size: int) -> None:
        super().__init__(config, rank, world_size)
        self.folder, self.mortal = folder, rank == mortal_rank

    def update(
        self,
        epoch: int,
        groups: Sequence[TrainGroup],
        samples: Sequence[CleanSamples],
        samples_per_step: tuple[int, ...],
    ) -> tuple[UpdateResult, AdapterWeights]:
        import torch

        if self.mortal and consume(self.folder / "die-learner"):
            die()
        if self.mortal and consume(self.folder / "stop-learner"):
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.mortal and consume(self.folder / "sleep-learner"):
            time.sleep(3600)
        if self.mortal and consume(self.folder / "xid-learner"):
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        if self.mortal and (self.folder / "oom-learner").exists() and self.config.learner.micro_batch_size > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if self.mortal and consume(self.folder / "bug-learner"):
            raise ValueError("a bug")
        return super().update(epoch, groups, samples, samples_per_step)


class MortalReward(FakeReward):
    """Misbehaves while `folder/{die,device,hang,wrong,broken}-WHAT` is there; `die` and `device` are once.

    Every call that comes through leaves a line in `folder/asked-WHAT`.
    """

    def __init__(self, folder: Path, what: str = "reward") -> None:
        self.folder, self.what = folder, what

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        with (self.folder / f"asked-{self.what}").open("a") as stream:
            stream.write(f"{prompts[0]}\n")
        if consume(self.folder / f"die-{self.what}"):
            die()
        if consume(self.folder / f"device-{self.what}"):
            (self.folder / f"device-{self.what}.pid").write_text(str(os.getpid()))
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        while (self.folder / f"hang-{self.what}").exists():
            time.sleep(0.05)
        if (self.folder / f"wrong-{self.what}").exists():
            raise ValueError("prompt 0 has no tag")
        if (self.folder / f"broken-{self.what}").exists():
            raise ConnectionError("the server of the model is away")
        return super().score(images, prompts, metadata)


class MortalRewards:
    """A loader for `deployments.build.deploy`; its markers end in -reward, those of MONITOR in -monitor."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str, section: Mapping[str, Any]) -> Reward:
        return MortalReward(self.folder, "monitor" if name == MONITOR else "reward")


def failing_load_reward(name: str, section: Mapping[str, Any]) -> Reward:
    raise ValueError(f"reward {name}: no weights at /nowhere")


class NamedReward(FakeReward):
    """Beside the fake scores it tells which process gave them, takes `slow` seconds per call, refuses the prompt "bad".

    Its details: `process`, an id that float32 can hold, and `calls`, how often it has been asked.
    """

    def __init__(self, slow: float) -> None:
        self.slow, self.calls = slow, 0

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        if "bad" in prompts:
            raise ValueError("the prompt is bad")
        self.calls += 1
        time.sleep(self.slow)
        scores = super().score(images, prompts, metadata)
        details = {"process": np.full(len(images), os.getpid() % 2**20, np.float32)}
        details["calls"] = np.full(len(images), self.calls, np.float32)
        return Scores(values=scores.values, details=scores.details | details)


class NamedRewards:
    """A loader for `deployments.build.deploy`."""

    def __init__(self, slow: float = 0.0) -> None:
        self.slow = slow

    def __call__(self, name: str, section: Mapping[str, Any]) -> Reward:
        return NamedReward(self.slow)
