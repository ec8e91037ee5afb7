"""The records that cross a process. Frozen, NumPy on the wire; G = images of one prompt, T = training times.

Two kinds of reference appear as `Any`: in one process they ARE the object, on Ray they are an ObjectRef to it. Only the
roles that made them (roles.py) know which; the trainer passes them on and never looks inside.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, Literal

import numpy as np

Adapter = Literal["old", "ema", "reference"]
Split = Literal["train", "eval"]
Solver = Literal["euler", "ddim", "dpm1", "dpm2", "heun"]
Weights = dict[str, np.ndarray]  # the trained tensors, of a LoRA or of the whole transformer, by name, float32


class Mark(StrEnum):
    """What another value of a setting changes; stands on its field, `Annotated[int, Mark.PLACEMENT]`, and only there.

    A field without one is RESULT, so a mark that was forgotten is safe.
    """

    PLACEMENT = "placement"
    """Where, how long and in what pieces things run, what is waited for, what is kept: no setting of the method."""
    ROUNDING = "rounding"
    """The last bits of numbers that are otherwise the same."""
    RESULT = "result"
    """What comes out: with another value it is another experiment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One line of a prompt set. `id` is the line index: the group key, whatever the text says."""

    id: int
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutItem:
    """`num_images` images of one prompt; `seeds` holds one 32-bit seed per image."""

    group_id: int
    prompt: Prompt
    seeds: tuple[int, ...]

    @property
    def num_images(self) -> int:
        return len(self.seeds)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRequest:
    """What a sampler is asked for: one group for training, many prompts for evaluation.

    It names the adapter and the policy version, so a request that is redone gives the same group.
    """

    epoch: int
    items: tuple[RolloutItem, ...]
    adapter: Adapter
    policy_version: int
    split: Split

    @property
    def num_images(self) -> int:
        return sum(item.num_images for item in self.items)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutInfo:
    """What the driver learns of a rollout: scalars. `num_bytes` goes through the object store: images and samples.

    non_finite: the images, by their place in the request, of which an x0 or a velocity was NaN or infinite. What is
    sent of them is 0.
    """

    epoch: int
    policy_version: int
    worker: str
    seconds: float
    num_bytes: int
    non_finite: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanSamples:
    """What the learner needs of one group; made by the sampler while the frozen weights are loaded.

    x0 f32 (G, *latent); t f32 (G, T) in [0, 1]; noise_seeds i64 (G, T); v_old f16 or f32 (G, T, *latent);
    v_ref like v_old; None for a velocity that the algorithm does not need; conditioning: name -> (1, ...) arrays, once
    per group. ref_times i64 (G, K): which of its T times each v_ref (G, K, *latent) is of; None = of all.
    """

    x0: np.ndarray
    t: np.ndarray
    noise_seeds: np.ndarray
    v_old: np.ndarray | None
    v_ref: np.ndarray | None
    conditioning: dict[str, np.ndarray]
    ref_times: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        """Of all arrays, as NumPy's own `nbytes`."""
        return sum(_nbytes(getattr(self, own.name)) for own in fields(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A sampler's answer: `images` (uint8 (N, H, W, 3), for scorers) and `samples` (CleanSamples or None) are refs."""

    info: RolloutInfo
    images: Any
    samples: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewards:
    """Scores of one rollout's N images. A reward that could not be had is NaN and `missing`, never 0.

    raw: reward name -> f32 (N,); details: "reward/detail" -> f32 (N,); total f32 (N,), NaN where a trained reward is
    missing; missing: reward name -> bool (N,); infinite: rewards of which some are missing because they were infinite
    or beyond float32: asked again, they would be so again.
    """

    raw: dict[str, np.ndarray]
    details: dict[str, np.ndarray]
    total: np.ndarray
    missing: dict[str, np.ndarray]
    infinite: frozenset[str] = frozenset()

    def values(self, name: str) -> np.ndarray:
        """A reward or a detail, f64 (N,); all NaN where a reward that could not be had left no such detail."""
        found = (self.raw | self.details).get(name)
        return np.full(len(self.total), np.nan) if found is None else found.astype(np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """A finished rollout on the driver: who was asked, what came back, what it earned."""

    request: RolloutRequest
    info: RolloutInfo
    samples: Any
    rewards: Rewards


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainGroup:
    """One group as a learner gets it. weight f32 (G,): what the algorithm made of each sample's rewards; step i32 (G,):
    the optimizer step of each sample, -1 = dropped.
    """

    group_id: int
    samples: Any
    weight: np.ndarray
    step: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One epoch's update: a shard of groups per learner and, per optimizer step, the global number of samples.

    No sample teaches anything: no step. remarks: what a person should know of the rewards and images, one line each,
    by what it is about; a run says each of them once.
    """

    epoch: int
    shards: tuple[tuple[TrainGroup, ...], ...]
    samples_per_step: tuple[int, ...]
    metrics: dict[str, float]
    remarks: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterWeights:
    """The trained tensors of one policy version: what samplers load."""

    old: Weights
    ema: Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapters:
    """A versioned announcement of AdapterWeights (`weights` is a ref) with what a loader must prove.

    checksums: adapter name -> hex digest; probe: the old policy's velocity on the model's fixed probe input, f32;
    probe_base: the same with the LoRA off. Both are None where the weights come from a file: there is no learner to
    compare with, and a loader then shows that its own velocity moved.
    """

    version: int
    weights: Any
    num_tensors: int
    checksums: dict[str, str]
    probe: np.ndarray | None
    probe_base: np.ndarray | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReceipt:
    """A sampler's acknowledgement of Adapters: the same facts, taken from what it actually loaded.

    probe_base: its velocity on the probe before it ever loaded anything.
    """

    worker: str
    version: int
    num_tensors: int
    checksums: dict[str, str]
    probe: np.ndarray
    probe_base: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """After one epoch's update: `version` counts finished updates, `steps` one dict of metrics per optimizer step.

    skipped_steps: those that were left out because their gradient was not finite; neither `steps` nor
    num_optimizer_steps counts them. culprits: ids of the groups, of all ranks, whose loss was not finite then; none
    where every loss was finite and only the gradient was not.
    """

    version: int
    num_optimizer_steps: int
    metrics: dict[str, float]
    steps: tuple[dict[str, float], ...]
    adapters: Adapters
    skipped_steps: int = 0
    culprits: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerState:
    """Everything a learner needs to go on. `versions`: old-policy weights by version, `max_staleness + 1` of them.

    optimizer: "exp_avg/NAME", "exp_avg_sq/NAME" -> f32 arrays and "step/NAME" -> f32 scalar. loss_scale: of float16
    gradients, relative to what it begins with (cores/loss_scale.py); None = as it begins.
    """

    version: int
    optimizer_step: int
    policy: Weights
    ema: Weights
    versions: dict[int, AdapterWeights]
    optimizer: dict[str, np.ndarray]
    loss_scale: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """Metric name -> mean over the test lines; `counts` the lines behind each; images by line for the pictures.

    right: of those lines, whether the image is exactly what was asked for, where a reward has a `strict` detail.
    """

    metrics: dict[str, float]
    counts: dict[str, int]
    images: dict[int, np.ndarray]
    seconds: float
    right: dict[int, bool] = field(default_factory=dict)


def _nbytes(value: np.ndarray | Mapping[str, Any] | None) -> int:
    """Of an array, or of the arrays below names."""
    if isinstance(value, Mapping):
        return sum(map(_nbytes, value.values()))
    return 0 if value is None else value.nbytes
