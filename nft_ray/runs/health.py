"""Does the training still learn? Counted from epoch to epoch; what goes on for too long ends the run, or takes it back.

no reward differs within any group      ─► no step; `run.max_epochs_without_signal` in a row: the run stops
a gradient, or most images, not finite  ─► left out; `run.max_skipped_epochs` in a row: back to the last good epoch,
                                           and when that does not help, the run stops and names prompts
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from nft_ray.config import RunConfig
from nft_ray.types import Batch, ScoredGroup, UpdateResult

_log = logging.getLogger(__name__)
FLAT = "reward/groups_without_signal"
NAMED = 3
"""Prompts that an error names, at most."""


class NotFiniteError(RuntimeError):
    """So many epochs in a row had something that is not finite. `last_good`: the epoch before the first of them."""

    def __init__(self, message: str, *, epoch: int, last_good: int) -> None:
        super().__init__(message)
        self.epoch, self.last_good = epoch, last_good


class Health:
    """What the last epochs had in common."""

    def __init__(self, run: RunConfig) -> None:
        self._run = run
        self.begin()

    def begin(self, lines: Sequence[Mapping[str, Any]] = ()) -> None:
        """The run begins, goes on or goes back, with these lines of metrics.jsonl. RuntimeError as `check`."""
        self._flat = self._skipped = 0
        for line in lines:
            self._flat = self._flat + 1 if line.get(FLAT) == 1 else 0
        if lines and lines[-1]["epoch"] < self._run.num_epochs:
            self._check_signal(lines[-1]["epoch"])

    def check(self, epoch: int, groups: Sequence[ScoredGroup], batch: Batch, update: UpdateResult) -> bool:
        """After `epoch` finished epochs: whether this one was good. RuntimeError where the run should not go on.

        NotFiniteError is the one of them that a caller may answer by going back.
        """
        bad = not_finite(groups, update)
        flat = batch.metrics.get(FLAT) == 1 and not bad
        self._flat = self._flat + 1 if flat else 0
        self._skipped = self._skipped + 1 if bad else 0
        if update.skipped_steps:
            scales = [value for name, value in update.metrics.items() if name.endswith("/loss_scale")]
            now = "".join(f"; float16's loss scale is {scale:g} of what it began with" for scale in scales)
            _log.warning("epoch %d: left out, for a gradient was not finite: %s%s", epoch, bad, now)
        if self._skipped >= self._run.max_skipped_epochs:
            first, self._skipped = epoch - self._skipped + 1, 0
            raise NotFiniteError(
                f"epochs {first} to {epoch}: a gradient, x0 or velocity was not finite in each ({bad}); "
                "the learning rate may be too high, or the model may leave the range of model.dtype",
                epoch=epoch,
                last_good=first - 1,
            )
        self._check_signal(epoch)
        return not bad

    def _check_signal(self, epoch: int) -> None:
        limit = self._run.max_epochs_without_signal
        if limit is not None and self._flat >= limit:
            raise RuntimeError(
                f"epochs {epoch - self._flat + 1} to {epoch}: in no group did the reward differ between images, so "
                "nothing is learned: the policy may have collapsed, or the reward gives everything the same. Begin "
                "another run with a lower learner.learning_rate, or go on all the same with "
                f"run.max_epochs_without_signal=null (it is {limit})"
            )


def not_finite(groups: Sequence[ScoredGroup], update: UpdateResult) -> str:
    """What was not finite in an epoch, in words; empty where nothing was, or only images of which most were not: they
    cost no more than themselves.
    """
    prompts = {group.request.items[0].group_id: group.request.items[0].prompt for group in groups}
    drawn = [group.request.items[0].group_id for group in groups if group.info.non_finite]
    lost, images = (sum(counts) for counts in zip(*map(_lost, groups), strict=True))
    parts = []
    if 2 * lost > images:
        parts.append(f"{lost} of {images} images, of {_named([prompts[number].text for number in drawn])}")
    if update.skipped_steps:
        culprits = [prompts[number].text for number in update.culprits if number in prompts]
        parts.append(f"{update.skipped_steps} steps" + (f", by {_named(culprits)}" if culprits else ""))
    return "; ".join(parts)


def _lost(group: ScoredGroup) -> tuple[int, int]:
    return len(group.info.non_finite), group.request.num_images


def _named(prompts: Sequence[str]) -> str:
    more = f" and {len(prompts) - NAMED} more" if len(prompts) > NAMED else ""
    return ", ".join(repr(prompt) for prompt in prompts[:NAMED]) + more
