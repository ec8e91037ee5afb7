"""`nft-ray track RUN`: MLflow is given what it lacks of a run, finished or stopped. metrics.jsonl is the truth."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from nft_ray.cli.console import say
from nft_ray.config import ExperimentConfig, load, lost, masked_uri
from nft_ray.runs.closing import CURVE, PICTURES, SUMMARY, closed
from nft_ray.runs.folder import RunFolder
from nft_ray.runs.ledger import is_delivered
from nft_ray.runs.tracking import deliver, tracking_uri

_log = logging.getLogger(__name__)


def track(args: argparse.Namespace) -> int:
    """Compare the folder with MLflow and send the rest, once each; returns the exit status."""
    path = Path(args.run).absolute()
    if not (path / "config.yaml").is_file():
        raise ValueError(f"track {args.run}: holds no config.yaml; name the folder of a run, such as runs/quickstart")
    config = load(path / "config.yaml", args.set)
    if list(lost(config.tracking.uri)):
        raise ValueError(
            f"tracking.uri = {config.tracking.uri!r}: a run keeps no password; give the address again, with "
            "--set 'tracking.uri=${oc.env:NAME}' and the environment variable NAME"
        )
    folder = RunFolder(path)
    with folder.locked():
        run = deliver(path, config, _artifacts(folder, config), finished=closed(folder) is not None).run
    say(f"MLflow at {masked_uri(tracking_uri(config, path.parent))} has all of run {config.run.name}: {run.status}")
    return 0


def catch_up(folder: RunFolder, config: ExperimentConfig) -> None:
    """Deliver what MLflow lacks of a finished run; one warning where it does not take it, nothing where it has all."""
    if is_delivered(folder.path, masked_uri(tracking_uri(config, folder.path.parent))):
        return
    try:
        deliver(folder.path, config, _artifacts(folder, config), finished=True)
    except RuntimeError as error:
        _log.warning("%s; `nft-ray track %s` delivers what it lacks", error, folder.path)


def _artifacts(folder: RunFolder, config: ExperimentConfig) -> Sequence[Path]:
    """What closing a run hands to its tracker."""
    if closed(folder) is None:
        return ()
    small = ["lora"] if config.model.tuning == "lora" else []
    named = [folder.path / name for name in (*small, PICTURES, CURVE, SUMMARY)]
    return [path for path in named if path.exists()]
