"""The parts of one run, in order: which experiment runs from which epoch to which. Most runs have one part.

    epoch   0 ......... 800 ....... 1100 ......... 1300
            preference   geneval     preference-again

Policy, EMA, optimizer state and the counts of epochs and optimizer steps go on from one to the next, through the
checkpoint that ends a stage. Which stage an epoch belongs to follows from its number: a resume remembers nothing.
"""

from dataclasses import dataclass
from pathlib import Path

from nft_ray.config import ExperimentConfig
from nft_ray.runs.evaluations import evaluated_epochs


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Epochs `first_epoch` to `last_epoch` (0 is the base model), with their own experiment."""

    name: str
    """Empty where the run has no stages."""
    first_epoch: int
    config: ExperimentConfig

    @property
    def last_epoch(self) -> int:
        return self.config.run.num_epochs

    def results(self, run: Path) -> Path:
        """The folder, within that of the run, under which its evaluations lie: each stage has test lines of its own."""
        return run / "stages" / self.name if self.name else run

    def is_left(self, run: Path, epoch: int) -> bool:
        """Is there something to train after `epoch` finished epochs, or its base model or its end to evaluate?

        A run that is told to end at a checkpoint which it has has no figures there, unless the epoch had its turn; and
        figures may be lost. Those of a stage that ended earlier cannot be had again: its policy is gone.
        """
        if epoch != self.last_epoch:
            return epoch < self.last_epoch
        return not {0, epoch} <= set(evaluated_epochs(self.results(run)))


def stages_of(config: ExperimentConfig) -> tuple[Stage, ...]:
    """All parts of a run, in order; without stages, the run itself is the only one."""
    configs = config.stage_configs
    names = [stage.name for stage in config.stages] or [""]
    starts = [0, *(one.run.num_epochs for one in configs[:-1])]
    return tuple(
        Stage(name=name, first_epoch=start, config=one) for name, start, one in zip(names, starts, configs, strict=True)
    )


def stage_at(config: ExperimentConfig, epoch: int) -> Stage:
    """The stage that made the policy after `epoch` finished epochs: one that ends there, not the one that begins."""
    stages = stages_of(config)
    return next((stage for stage in stages if epoch <= stage.last_epoch), stages[-1])
