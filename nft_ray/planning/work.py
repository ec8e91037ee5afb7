"""What one piece of work takes one worker, in seconds and bytes: between the counts and the simulation of an epoch."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Of one experiment on one device, with the micro-batches that its YAML says; seconds of one worker alone.

    A sampler, per rollout request of n images: request_s + lend_s + encode_s (per new prompt) + n (draw_s + decode_s +
    velocities_s). `velocities_s` is what stands between the images and the clean samples, 0 in an evaluation.
    A reward replica, per batch of n images: score_request_s + n score_s. A learner, per image of its shard: update_s
    (all its pairs, forward and backward), and per optimizer step step_s (reduction over the group and Adam).
    """

    request_s: float
    encode_s: float
    draw_s: float
    draw_eval_s: float
    decode_s: float
    velocities_s: float
    score_s: Mapping[str, float]
    score_request_s: Mapping[str, float]
    update_s: float
    step_s: float
    publish_s: float
    """Learner: weights gathered, checksum, probe."""
    load_s: float
    """Sampler: fetch and load one version, probe."""
    swap_s: Mapping[str, float] = field(default_factory=dict)
    """Colocated only: role ("sampler", "learner") -> seconds of parking it, and of waking it."""
    image_bytes: int
    """One image, uint8, through the object store to the scorers."""
    sample_bytes: int
    """One clean sample, through the object store to a learner."""
    group_bytes: int
    """Conditioning of one prompt, once per group."""
    adapter_bytes: int
    """old + EMA, once per version."""
    transfer_bytes_per_s: float
    """Object store to a worker on another node; on the same node nothing is copied."""
    lend_s: float = 0.0
    """Sampler, per request with a prompt that is new: offloaded text encoders to the device and back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Peak bytes of a worker on its device, by role; rewards by name."""

    sampler: int
    learner: int
    rewards: Mapping[str, int]
    host_sampler: int
    host_learner: int
