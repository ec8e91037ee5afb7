"""What one epoch sends and keeps, in bytes: functions of the experiment and of its model's shapes, nothing else.

The only place that knows how large a sample is: what fits a store (actors/footprint.py) and what a plan moves
(estimate.py) are both read from here.
"""

from dataclasses import dataclass
from math import prod

import numpy as np

from nft_ray.config import ExperimentConfig

FLOAT, TIME_AND_SEED, INDEX = 4, 4 + 8, 8
COPIES = 2 + 2
"""Of what is trained, in a state: policy and EMA, two moments; and per version an old policy and an EMA."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Payloads:
    """Bytes. image: uint8, to the scorers; sample: one clean sample with its velocities, to a learner; conditioning: of
    one prompt, once per group; adapter: one policy in float32; checkpoint: what a finished epoch keeps.

    num_old, num_reference: velocities of a frozen policy that go with one sample.
    """

    image: int
    sample: int
    conditioning: int
    adapter: int
    checkpoint: int
    num_old: int
    num_reference: int


def payloads(config: ExperimentConfig) -> Payloads | None:
    """None where the model's configuration is not at hand, such as a Hub that cannot be reached."""
    from nft_ray.algorithms.base import build_algorithm
    from nft_ray.flow.times import reference_times
    from nft_ray.models.base import sizes
    from nft_ray.models.lora import num_trained
    from nft_ray.planning.architectures import described

    here = described(config.model)
    if here is None:
        return None
    known, trained = sizes(here), num_trained(here)
    assert known is not None
    assert trained is not None
    num_times, latent = config.sampler.num_times, prod(known.latent_shape)
    asked = build_algorithm(config.algorithm).needs
    num_reference = reference_times(num_times, asked.reference, [0]).shape[1] if asked.reference else 0
    num_old = num_times if asked.old else 0
    velocity = latent * np.dtype(config.sampler.velocity_dtype).itemsize
    sample = latent * FLOAT + num_times * TIME_AND_SEED + num_reference * INDEX + (num_old + num_reference) * velocity
    return Payloads(
        image=config.model.height * config.model.width * 3,
        sample=sample,
        conditioning=known.conditioning * FLOAT,
        adapter=trained * FLOAT,
        checkpoint=trained * FLOAT * (COPIES + 2 * (config.run.max_staleness + 1)),
        num_old=num_old,
        num_reference=num_reference,
    )
