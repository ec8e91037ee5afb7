"""Where runs lie: the folder of all of them, on this machine or on the head node of a cluster."""

import getpass
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from nft_ray.config import ExperimentConfig
from nft_ray.runs.checkpoint import PARTIAL

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


def check_place(run: Path, marks: Collection[str], *, overwrite: bool = False, is_copy: bool = False) -> None:
    """ValueError, one line, where RUN cannot be the folder of a run, or is the folder of something else.

    marks: files of which a run has one. is_copy: it may be one that was just being fetched from a URL, without them.
    """
    there = next(path for path in (run, *run.parents) if path.exists())
    if there != run and not there.is_dir():
        raise ValueError(
            f"run.root: {there} is a file, so no run can lie below it; choose another folder, or move it away"
        )
    advice = "choose another name with --set run.name=..., or move it away"
    option = "--overwrite: " if overwrite else f"run.name = {run.name!r}: "
    if not run.exists():
        return
    if not run.is_dir():
        raise ValueError(f"{option}{run} is no run: it is a file; {advice}")
    inside = sorted(file.name for file in run.iterdir() if not file.name.endswith(PARTIAL))  # of a killed first start
    if inside and not is_copy and not set(marks).intersection(inside):
        shown = f"{', '.join(inside[:3])}{', ...' if inside[3:] else ''}"
        raise ValueError(f"{option}{run} is no run: it holds no {sorted(marks)[0]} (but {shown}); {advice}")
    if (run / "checkpoints").exists() and not (run / "checkpoints").is_dir() and not overwrite:
        raise ValueError(f"{option}{run / 'checkpoints'} is a file, where a run has a folder; {advice}")


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
