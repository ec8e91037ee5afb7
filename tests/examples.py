"""Small experiments on nano-sd3 that tests share."""

from pathlib import Path
from typing import Any

from nft_ray.config import ExperimentConfig, load, parse
from nft_ray.prompts.sets import PACKAGED

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
SMALL = [
    "run.num_epochs=2",
    "prompts.groups_per_epoch=3",
    "prompts.images_per_group=4",
    "sampler.num_steps=4",
    "sampler.num_times=2",
    "evaluation.num_steps=4",
    "evaluation.every=2",
    "model.lora.rank=4",
    "model.lora.alpha=8",
    "learner.num_workers=1",
]
SHORT = {
    "kl_weight": "algorithm.kl_weight",
    "micro_batch_size": "learner.micro_batch_size",
    "weight_decay": "learner.weight_decay",
    "max_staleness": "run.max_staleness",
}


def few_lines(folder: Path, every: int = 10) -> str:
    """The setting for every tenth of the quickstart's 480 held-out lines: 8 of each tag."""
    file = folder / "few.jsonl"
    file.write_text("".join(PACKAGED["shapes/test"].read_text().splitlines(keepends=True)[::every]))
    return f"prompts.test={file}"


def example_config(*overrides: str, algorithm: dict[str, Any] | None = None, **short: Any) -> ExperimentConfig:
    """The quickstart, made small; `short` names a few fields without their section, `algorithm` replaces its own."""
    made = load(QUICKSTART, [*SMALL, *(f"{SHORT[name]}={value}" for name, value in short.items()), *overrides])
    return made if algorithm is None else parse({**made.model_dump(), "algorithm": algorithm})
