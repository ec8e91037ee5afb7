"""One file that somebody publishes: where it comes from, and what its content must be.

Weights of rewards, prompt sets and parts of pipelines are such files; `fetch.py` brings them to where `cache.py` says.
"""

from dataclasses import dataclass

HUB = "https://huggingface.co"


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedFile:
    """One published file.

    path: below the folder of its kind; of a Hub file `OWNER/REPOSITORY/NAME`. url: where it is published, None for the
    Hub. sha256: published checksum; None = `git_sha1`, git's own sum of the file in its repository, where we have not
    seen the content; None as well = the Hub's own record of the file is compared. mib: about how large.
    """

    path: str
    url: str | None = None
    revision: str = "main"
    sha256: str | None = None
    git_sha1: str | None = None
    mib: float = 0.1

    @property
    def digest(self) -> str | None:
        """The checksum that we know before we ask anybody."""
        return self.sha256 or self.git_sha1

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
