"""A learner's state with everything that is hard to keep, and what a run folder holds."""

import numpy as np

from nft_ray.runs.folder import RunFolder
from nft_ray.types import AdapterWeights, LearnerState, Weights


def weights(seed: int) -> Weights:
    rng = np.random.default_rng(seed)
    return {
        "lora_A": rng.standard_normal((4, 8), dtype=np.float32),
        "lora_B": rng.standard_normal((8, 4), dtype=np.float32).T,  # not contiguous
        "odd": np.array([np.nan, np.inf, -0.0, 1e-45, 1 / 3], dtype=np.float32),
    }


def learner_state(version: int = 6) -> LearnerState:
    """As with max_staleness 1: two versions."""
    optimizer: dict[str, np.ndarray] = {"step/lora_A": np.array(12.0, dtype=np.float32)}
    optimizer |= {f"exp_avg/{name}": value * 2 for name, value in weights(3).items()}
    return LearnerState(
        version=version,
        optimizer_step=2 * version,
        policy=weights(1),
        ema=weights(2),
        versions={
            version - 1: AdapterWeights(old=weights(10), ema=weights(11)),
            version: AdapterWeights(old=weights(12), ema=weights(13)),
        },
        optimizer=optimizer,
    )


def names(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in (folder.path / "checkpoints").iterdir())
