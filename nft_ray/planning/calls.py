"""Seconds of one call of one worker, from its Work: what the simulated epoch and sleeping cores on a real Ray share."""

from collections.abc import Sequence
from dataclasses import dataclass

from nft_ray.planning.work import Work
from nft_ray.types import RolloutRequest, Split


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutCall:
    """Seconds of the parts of one rollout, in their order; `velocities` is 0 in an evaluation."""

    request: float
    encode: float
    draw: float
    decode: float
    velocities: float

    @property
    def images(self) -> float:
        """Until the images exist."""
        return self.request + self.encode + self.draw + self.decode

    @property
    def total(self) -> float:
        return self.images + self.velocities


def rollout_call(work: Work, *, images: int, prompts: int, split: Split) -> RolloutCall:
    """So many images of so many prompts that were not encoded before."""
    train = split == "train"
    return RolloutCall(
        request=work.request_s,
        encode=work.lend_s + prompts * work.encode_s,
        draw=images * (work.draw_s if train else work.draw_eval_s),
        decode=images * work.decode_s,
        velocities=images * work.velocities_s if train else 0.0,
    )


def rollout_s(work: Work, request: RolloutRequest) -> float:
    """One rollout request, its prompts new."""
    call = rollout_call(work, images=request.num_images, prompts=len(request.items), split=request.split)
    return call.total


def score_s(work: Work, reward: str, images: int) -> float:
    """One batch of images of one reward, on one replica."""
    return work.score_request_s[reward] + images * work.score_s[reward]


def update_s(work: Work, samples_per_step: Sequence[int]) -> float:
    """The optimizer steps of one rank alone, with so many samples of its own in each; without publishing."""
    return sum(samples_per_step) * work.update_s + len(samples_per_step) * work.step_s


def transfer_s(work: Work, num_bytes: float) -> float:
    """From one node to another."""
    return num_bytes / work.transfer_bytes_per_s
