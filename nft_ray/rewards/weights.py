"""The published files of the rewards: which they are, where they lie, and what is said when one is not there.

All lie in one folder, a Hub file under REPOSITORY/NAME. `nft-ray rewards fetch` fills it; without a network, so does
anyone with a copy. Nothing here is downloaded at load: a replica that starts reads local files or fails at once.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HUB = "https://huggingface.co"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    """One published file.

    path: below the folder of the weights; of a Hub file `OWNER/REPOSITORY/NAME`. url: where it is published, None for
    the Hub. sha256: published checksum; None = the Hub's own record of the file is compared. mib: about how large.
    """

    path: str
    url: str | None = None
    revision: str = "main"
    sha256: str | None = None
    mib: float = 0.1

    @property
    def repository(self) -> str:
        """OWNER/REPOSITORY of a Hub file."""
        return "/".join(self.path.split("/")[:2])

    @property
    def name(self) -> str:
        """Path of a Hub file inside its repository."""
        return "/".join(self.path.split("/")[2:])

    @property
    def origin(self) -> str:
        """Where a person can download it."""
        return self.url or f"{HUB}/{self.repository}/resolve/{self.revision}/{self.name}"


def weights_root(configured: str | None = None) -> Path:
    """The folder of all published files: as configured, or NFT_RAY_WEIGHTS, or ~/.cache/nft_ray/weights."""
    chosen = configured or os.environ.get("NFT_RAY_WEIGHTS") or "~/.cache/nft_ray/weights"
    return Path(chosen).expanduser().resolve()


def require(reward: str, files: Sequence[WeightFile], root: Path) -> None:
    """ValueError, one line, for the first file that is not there: which one, from where, and the command."""
    absent = [file for file in files if not (root / file.path).is_file()]
    if absent:
        others = f" (and {len(absent) - 1} more)" if absent[1:] else ""
        raise ValueError(
            f"rewards.{reward}: {root / absent[0].path} is missing{others}: run `nft-ray rewards fetch {reward}`, "
            f"or put {absent[0].origin} there"
        )
