"""The published files of the rewards: where they lie, and what is said when one is not there.

A Hub file lies in the Hub's cache, as everybody's, or under REPOSITORY/NAME in a folder that somebody named; the rest
in that folder always. `nft-ray rewards fetch` brings them; without a network, so does anyone with a copy. Nothing is
downloaded at load: a replica that starts reads local files or fails at once.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from nft_ray.downloads.cache import located
from nft_ray.downloads.published import PublishedFile
from nft_ray.rewards.base import RewardConfig, TorchRewardConfig, reward_files


def weights_root(configured: str | None = None) -> Path:
    """The folder that is looked into first: as configured, or NFT_RAY_WEIGHTS, or ~/.cache/nft_ray/weights."""
    return Path(named_root(configured) or "~/.cache/nft_ray/weights").expanduser().resolve()


def named_root(configured: str | None = None) -> str | None:
    """The folder that somebody chose for all of them; None = files of the Hub go to the Hub's cache."""
    return configured or os.environ.get("NFT_RAY_WEIGHTS") or None


def require(reward: str, files: Sequence[PublishedFile], root: Path) -> dict[str, Path]:
    """Where each file is, by its path, and each repository's folder, by its name.

    ValueError, one line, for the first file that is not there: which one, from where, and the command.
    """
    places = located(files, root)
    absent = [file for file in files if file.path not in places and not (root / file.path).is_file()]
    if absent:
        others = f" (and {len(absent) - 1} more)" if absent[1:] else ""
        raise ValueError(
            f"rewards.{reward}: {root / absent[0].path} is missing{others}: run `nft-ray rewards fetch {reward}`, "
            f"or put {absent[0].origin} there"
        )
    return places


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
