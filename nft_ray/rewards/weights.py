"""The published files of the rewards: which they are, where they lie, and what is said when one is not there.

All lie in one folder, a Hub file under REPOSITORY/NAME. `nft-ray rewards fetch` fills it; without a network, so does
anyone with a copy. Nothing here is downloaded at load: a replica that starts reads local files or fails at once.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from nft_ray.downloads.published import PublishedFile
from nft_ray.rewards.base import RewardConfig, TorchRewardConfig, reward_files


def weights_root(configured: str | None = None) -> Path:
    """The folder of all published files: as configured, or NFT_RAY_WEIGHTS, or ~/.cache/nft_ray/weights."""
    chosen = configured or os.environ.get("NFT_RAY_WEIGHTS") or "~/.cache/nft_ray/weights"
    return Path(chosen).expanduser().resolve()


def require(reward: str, files: Sequence[PublishedFile], root: Path) -> None:
    """ValueError, one line, for the first file that is not there: which one, from where, and the command."""
    absent = [file for file in files if not (root / file.path).is_file()]
    if absent:
        others = f" (and {len(absent) - 1} more)" if absent[1:] else ""
        raise ValueError(
            f"rewards.{reward}: {root / absent[0].path} is missing{others}: run `nft-ray rewards fetch {reward}`, "
            f"or put {absent[0].origin} there"
        )


def missing_weights(rewards: Mapping[str, RewardConfig]) -> list[str]:
    """A line for each of these rewards whose published files are not here."""
    lines = []
    for name, reward in rewards.items():
        if isinstance(reward, TorchRewardConfig):
            try:
                require(name, reward_files(name, reward), weights_root(reward.weights))
            except ValueError as error:
                lines.append(str(error))
    return lines
