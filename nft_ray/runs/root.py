"""Where runs lie: the folder of all of them, on this machine or on the head node of a cluster."""

import getpass
import json
import re
from collections.abc import Mapping
from pathlib import Path

from nft_ray.config import ExperimentConfig

JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""What Ray's supervisor tells the entrypoint of a job: its runtime environment and metadata, as JSON."""


def run_root(config: ExperimentConfig, environment: Mapping[str, str]) -> Path:
    """The absolute folder of all runs: NFT_RAY_RUNS, else `run.root`.

    Inside a submitted job the working directory is a copy that Ray deletes with the session, so a relative root is
    taken from the home folder there. All jobs of a cluster run as one user: whose they are goes into the path, not
    the job's id, so that the same command, submitted again, goes on.
    """
    root = Path(environment.get("NFT_RAY_RUNS") or config.run.root).expanduser()
    if not root.is_absolute() and in_submitted_job(environment):
        return Path.home() / "nft_ray" / job_user(environment) / root
    return root.absolute()


def in_submitted_job(environment: Mapping[str, str]) -> bool:
    """Whether this process is the entrypoint of `ray job submit` (Ray names its supervisor in the environment)."""
    return JOB in environment


def job_user(environment: Mapping[str, str]) -> str:
    """Whose job this is: `--metadata-json '{"user": "ada"}'` says so, else the user that the job runs as.

    ValueError for a name that is none of a folder.
    """
    user = _metadata(environment).get("user")
    if user is None:
        return getpass.getuser()
    if not re.fullmatch(r"\w[\w.@-]*", user):
        raise ValueError(f"--metadata-json: user = {user!r} is no folder's name; use letters, digits, . - _ and @")
    return user


def job_id(environment: Mapping[str, str]) -> str | None:
    """The submission id of this job; None where this is none."""
    return _metadata(environment).get("job_submission_id")


def _metadata(environment: Mapping[str, str]) -> dict[str, str]:
    try:
        found = json.loads(environment.get(JOB) or "{}").get("metadata") or {}
    except (ValueError, AttributeError):
        return {}
    return {str(key): str(value) for key, value in found.items()}
