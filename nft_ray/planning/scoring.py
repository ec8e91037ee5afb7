"""What a reward's replica takes, in seconds and bytes: its `cost` (rewards/base.py) on a device.

A reward with a model runs on the card if its replica has a share of one, else on its CPUs; the host's part of an image
(resize, read, judge) is added, since a replica resizes a micro-batch and then computes it.
"""

from dataclasses import dataclass

from nft_ray.planning.devices import Device, device_named
from nft_ray.rewards.base import Cost, RewardConfig, TorchRewardConfig, reward_cost

REQUEST_S = 0.012
"""One call through Serve: benchmarks/results/rewards.json, 10 to 14 ms per group of 24 images above the same in one
process."""
ASSUMED_S = 0.05
"""An image of a reward that does not say what it takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """Of one replica alone: seconds per image and per request of one prompt; peak bytes on its card, 0 without one."""

    image_s: float
    request_s: float
    device_bytes: int
    source: str


def scoring(name: str, config: RewardConfig, device: Device) -> Scoring:
    """On `device`, or on its CPUs where it has no share of a card."""
    cost = reward_cost(name, config)
    if cost is None:
        return Scoring(image_s=ASSUMED_S, request_s=REQUEST_S, device_bytes=0, source="assumed: it has no `cost`")
    threads = max(1.0, config.num_cpus)
    on_card = config.num_gpus > 0 and cost.flops > 0 and device.kind == "cuda"
    where = device if on_card else device_named("cpu")
    dtype = config.dtype if isinstance(config, TorchRewardConfig) else "float32"
    speed = 1.0 if on_card else threads
    wait_s = config.batch_wait_s if config.batch_size > 1 else 0.0
    return Scoring(
        image_s=where.flops_s(cost.flops, dtype, "scoring") / speed + cost.host_s / threads,
        request_s=REQUEST_S + wait_s + where.flops_s(cost.prompt_flops, dtype, "scoring") / speed,
        device_bytes=_device_bytes(cost, config, device) if on_card else 0,
        source=cost.source,
    )


def _device_bytes(cost: Cost, config: RewardConfig, device: Device) -> int:
    """Weights, the activations of a micro-batch, and the runtime."""
    if not isinstance(config, TorchRewardConfig):
        return device.runtime_bytes
    width = 2 if config.dtype == "bfloat16" else 4
    activations = config.micro_batch_size * cost.activation_bytes * width // 4
    return device.runtime_bytes + cost.parameters * width + activations
