"""What the rewards that only monitor said of an epoch's groups, as means; it may come after the epoch has ended."""

from collections.abc import Sequence

import numpy as np

from nft_ray.rewards.base import Scores


class Monitored:
    """Scores by epoch, reward and group: a group that is scored again replaces what it was."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._epochs: dict[int, dict[str, dict[int, tuple[int, Scores | None]]]] = {}

    def add(self, epoch: int, name: str, group_id: int, num_images: int, scores: Scores | None) -> None:
        """Of one group; None = it could not be had."""
        rewards = self._epochs.setdefault(epoch, {name: {} for name in self._names})
        rewards[name][group_id] = (num_images, scores)

    def take(self, epochs: Sequence[int]) -> dict[int, dict[str, float]]:
        """The metrics of these epochs, which are then forgotten; those without any group are left out."""
        return {epoch: _metrics(self._epochs.pop(epoch)) for epoch in epochs if epoch in self._epochs}

    def epochs(self) -> list[int]:
        """Those that something is known of, the oldest first."""
        return sorted(self._epochs)


def _metrics(rewards: dict[str, dict[int, tuple[int, Scores | None]]]) -> dict[str, float]:
    """`reward/NAME` and `reward/NAME/DETAIL`: means over what there is, as of trained rewards; `reward/missing/NAME`:
    the part of the images that it is not there for.
    """
    metrics: dict[str, float] = {}
    for name, groups in rewards.items():
        found = [scores for _, scores in groups.values() if scores is not None]
        columns = {name: [scores.values for scores in found]}
        for detail in sorted({detail for scores in found for detail in scores.details}):
            columns[f"{name}/{detail}"] = [scores.details[detail] for scores in found if detail in scores.details]
        there = 0
        for column, parts in columns.items():
            values = np.concatenate([np.asarray(part, np.float64) for part in parts]) if parts else np.empty(0)
            finite = values[np.isfinite(values)]
            there = len(finite) if column == name else there
            if len(finite):
                metrics[f"reward/{column}"] = float(finite.mean())
        if num_images := sum(count for count, _ in groups.values()):
            metrics[f"reward/missing/{name}"] = 1 - there / num_images
    return metrics
