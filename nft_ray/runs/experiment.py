"""The experiment that a run folder holds, and how another one differs from it.

RUN/config.yaml, and where a kill or a full disk left nothing of it, the newest of RUN/configs/.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nft_ray.config import ExperimentConfig, differences, mark_of, parse, resolved
from nft_ray.types import Mark

CONFIG = "config.yaml"
_log = logging.getLogger(__name__)


def experiment_of(run: Path, *, tell: bool = True) -> dict[str, Any]:
    """The resolved experiment in the folder of a run. ValueError, one line, where it cannot be read.

    tell: where it is taken from its history, a line in the log says so.
    """
    for path in [run / CONFIG, *sorted((run / "configs").glob("*.yaml"), reverse=True)]:
        if found := experiment_in(_text(path)):
            if path.name != CONFIG and tell:
                _log.warning("%s cannot be read: %s is taken for it", run / CONFIG, path)
            return found
    raise ValueError(
        f"{run / CONFIG}: holds no experiment (it is empty or was cut off); put it back, or begin anew with "
        "--overwrite, which keeps what is there"
    )


def experiment_in(text: str) -> dict[str, Any] | None:
    """The resolved experiment that a text is; None for one that is no mapping with a `run`."""
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    return completed(found) if isinstance(found, dict) and isinstance(found.get("run"), dict) else None


def completed(before: dict[str, Any]) -> dict[str, Any]:
    """A run's resolved experiment with the defaults of fields that came later: they say what was done before them."""
    try:
        return resolved(parse(before))
    except ValueError:  # of a field that is gone, say: what differs is listed
        return before


def differing(before: Mapping[str, Any], config: ExperimentConfig, mark: Mark = Mark.RESULT) -> list[str]:
    """The keys with this mark that are other ones now."""
    return [key for key in differences(before, resolved(config)) if mark_of(config, key) is mark]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
