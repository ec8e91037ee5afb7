"""`nft-ray rewards`: the reward plane by itself: its files, its replicas, one picture.

fetch [NAMES]                download the published weights                     no Ray
serve CONFIG                 deploy the rewards of an experiment; they stay     `--address`, or a Ray of its own
status [--json]              what is deployed, with how many replicas
scale NAME --replicas N      more or fewer replicas, while a run goes on; or --min A --max B
delete NAMES                 take deployed rewards away
score --reward NAME IMAGE    one picture; the last line of stdout is a JSON object
"""

import argparse
import asyncio
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from PIL import Image, UnidentifiedImageError

from nft_ray.rewards.base import (
    Autoscaling,
    Scores,
    check_lines,
    load_reward,
    reward_config,
    reward_files,
    reward_names,
)
from nft_ray.rewards.unique import Unique
from nft_ray.rewards.weights import weights_root

SCORE_S = 600.0
"""Deadline of one picture: a reward that is scaled to nothing has to load its model first."""
SETTLED_S = 300.0


def add_parser(commands: Any) -> None:
    """`rewards` and what comes after it."""
    root = commands.add_parser("rewards", help="fetch, serve, scale and try out rewards").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    address = argparse.ArgumentParser(add_help=False)
    address.add_argument("--address", help="the Ray cluster (default: RAY_ADDRESS, or the one on this machine)")

    fetch = root.add_parser("fetch", help="download the published weights")
    fetch.add_argument("names", nargs="*", metavar="NAME", help="rewards (default: all)")
    fetch.add_argument("--weights", help="folder (default: NFT_RAY_WEIGHTS, or ~/.cache/nft_ray/weights)")
    fetch.add_argument("--set", action="append", default=[], metavar="NAME.a=b", help="a field of a reward's section")
    fetch.set_defaults(command_function=_fetch)

    serve = root.add_parser("serve", parents=[address], help="deploy the rewards of an experiment, without training")
    serve.add_argument("config", help="the experiment, such as configs/quickstart.yaml")
    serve.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override a field")
    serve.set_defaults(command_function=_serve)

    status = root.add_parser("status", parents=[address], help="what is deployed")
    status.add_argument("--json", action="store_true", help="a list of objects, one per reward")
    status.set_defaults(command_function=_status)

    scale = root.add_parser("scale", parents=[address], help="change the number of replicas while a run goes on")
    scale.add_argument("name")
    scale.add_argument("--replicas", type=int, help="a fixed number")
    scale.add_argument("--min", type=int, help="autoscaling: fewest replicas (replaces every replica)")
    scale.add_argument("--max", type=int, help="autoscaling: most replicas (replaces every replica)")
    scale.set_defaults(command_function=_scale)

    delete = root.add_parser("delete", parents=[address], help="take deployed rewards away")
    delete.add_argument("names", nargs="+", metavar="NAME")
    delete.set_defaults(command_function=_delete)

    score = root.add_parser("score", help="score one picture, in this process or (--address) by a deployed reward")
    score.add_argument("image", type=Path)
    score.add_argument("--reward", required=True, metavar="NAME")
    score.add_argument("--prompt", default="")
    score.add_argument("--metadata", default="{}", help="a JSON object, such as GenEval's")
    score.add_argument("--set", action="append", default=[], metavar="a=b", help="a field of the reward's section")
    score.add_argument("--address", help="ask the reward that is deployed on this Ray cluster instead")
    score.set_defaults(command_function=_score)


def rewards(args: argparse.Namespace) -> int:
    """Run one action; returns the exit status."""
    status: int = args.command_function(args)
    return status


def _fetch(args: argparse.Namespace) -> int:
    from nft_ray.downloads.fetch import fetch

    sections: Any = OmegaConf.to_container(OmegaConf.from_dotlist(list(args.set)))
    root = weights_root(args.weights)
    files: dict[str, Any] = {}
    for name in args.names or reward_names():
        section = sections.get(name, {}) if args.names or name in sections else _defaults(name)
        if section is not None:
            files |= {file.path: file for file in reward_files(name, reward_config(name, section))}
    if not files:
        _say("nothing to download: these rewards need no published files")
        return 0
    _say(f"{len(files)} files, about {sum(file.mib for file in files.values()) / 1024:.1f} GiB, into {root}")
    fetch(list(files.values()), root, _say)
    return 0


def _defaults(name: str) -> dict[str, Any] | None:
    """An empty section, or None where the reward has no meaning without a choice of the user."""
    try:
        reward_config(name, {})
    except ValueError:
        return None
    return {}


def _serve(args: argparse.Namespace) -> int:
    from deployments.build import check_port, deploy
    from deployments.plane import Dashboard, reward_states
    from nft_ray.cli.cluster import cluster
    from nft_ray.cli.connection import joins
    from nft_ray.config import HttpConfig, load

    config = load(args.config, args.set)
    http = config.scorers.http or HttpConfig()
    config = config.model_copy(update={"scorers": config.scorers.model_copy(update={"http": http, "attach": True})})
    stays = joins(args.address)
    if not stays:
        check_port(http)
    with cluster(config, args.address, _say) as url:
        _say(f"deploying {', '.join(f'reward-{name}' for name in config.rewards)} on Ray Serve")
        asyncio.run(deploy(config, dashboard_url=url))
        _print_states(reward_states(Dashboard(url)) if url else [])
        host = f"[{http.host}]" if ":" in http.host else http.host
        for name in config.rewards:
            _say(f"POST http://{host}:{http.port}/{name}")
        if not stays:
            _say("serving; Ctrl-C ends it")
            _until_interrupted()
    return 0


def _status(args: argparse.Namespace) -> int:
    from deployments.plane import reward_states

    with _dashboard(args.address) as dashboard:
        states = reward_states(dashboard)
    if args.json:
        _say(json.dumps([asdict(state) for state in states]))
    else:
        _print_states(states)
    return 0


def _scale(args: argparse.Namespace) -> int:
    from deployments.plane import find, scale

    if (args.replicas is None) == (args.max is None):
        raise ValueError("rewards scale: give either --replicas N, or --max B (and --min A)")
    with _dashboard(args.address) as dashboard:
        state = find(dashboard, args.name)
        if args.replicas is not None:
            scale(dashboard, state.name, args.replicas)
            _say(f"{state.name}: {state.target} -> {args.replicas} replicas asked for; `nft-ray rewards status` shows")
            return 0
        from deployments.build import rebound

        bounds = Autoscaling(min_replicas=1 if args.min is None else args.min, max_replicas=args.max)
        _say(f"{state.name}: replacing its replicas; from {bounds.min_replicas} to {bounds.max_replicas} of them")
        asyncio.run(rebound(state.name, bounds, routed=state.route is not None, wait_s=SETTLED_S))
        _say(f"{state.name}: done")
    return 0


def _delete(args: argparse.Namespace) -> int:
    from deployments.plane import PREFIX, delete, find

    with _dashboard(args.address) as dashboard:
        names = [find(dashboard, name).name for name in args.names]
        delete([f"{PREFIX}{name}" for name in names])
    _say(f"deleted: {', '.join(names)}")
    return 0


def _score(args: argparse.Namespace) -> int:
    images, prompts, metadata = _read_image(args.image)[None], [args.prompt], [_metadata(args.metadata)]
    section: Any = OmegaConf.to_container(OmegaConf.from_dotlist(list(args.set)))
    config = reward_config(args.reward, section) if args.address is None else None
    check_lines(args.reward, zip(prompts, metadata, strict=True), config)
    if args.address is None:
        scores = Unique(args.reward, load_reward(args.reward, section)).score(images, prompts, metadata)
    else:
        scores = _score_deployed(args, images, prompts, metadata)
    details = {name: _number(values[0]) for name, values in scores.details.items()}
    _say(json.dumps({"reward": args.reward, "score": _number(scores.values[0]), "details": details}))
    return 0


def _score_deployed(
    args: argparse.Namespace, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
) -> Scores:
    from ray import serve

    from deployments.plane import PREFIX, find

    if args.set:
        raise ValueError("rewards score: --set has no effect on a deployed reward; leave out --address or --set")
    with _dashboard(args.address) as dashboard:
        handle = serve.get_app_handle(f"{PREFIX}{find(dashboard, args.reward).name}")
        scores: Scores = handle.score.remote(images, prompts, metadata).result(timeout_s=SCORE_S)
    return scores


@contextmanager
def _dashboard(address: str | None) -> Iterator[Any]:
    """A connected Ray and its dashboard."""
    from deployments.plane import Dashboard
    from nft_ray.cli.connection import joined

    with joined(address) as url:
        if url is None:
            raise RuntimeError("this Ray cluster runs without its dashboard, which Serve is asked through")
        yield Dashboard(url)


def _print_states(states: list[Any]) -> None:
    rows = [("reward", "running", "target", "CPUs", "GPUs", "state")]
    for state in states:
        target = f"{state.target} (auto)" if state.autoscaled else str(state.target)
        cells = (state.name, str(state.running), target, f"{state.num_cpus:g}", f"{state.num_gpus:g}")
        rows.append((*cells, f"{state.status} {state.message}".strip()))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        _say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if not states:
        _say("none is deployed")


def _read_image(path: Path) -> np.ndarray:
    """uint8 (H, W, 3)."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path}: is no image that Pillow can read") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None


def _metadata(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--metadata {text}: is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"--metadata {text}: must be a JSON object")
    return value


def _number(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _until_interrupted() -> None:
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        return


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
