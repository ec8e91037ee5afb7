"""`nft-ray rewards`: the reward plane by itself: its files, its replicas, one picture.

fetch [NAMES]                download the published weights                     no Ray
serve CONFIG                 deploy the rewards of an experiment; they stay     `--address`, or a Ray of its own
status [--json]              what is deployed, with how many replicas
scale NAME --replicas N      more or fewer replicas, while a run goes on; or --min A --max B
delete NAMES                 take deployed rewards away
score --reward NAME IMAGE    one picture; the last line of stdout is a JSON object

A deployed reward is RUN/REWARD, or shared/REWARD; REWARD alone will do where that says which.
"""

import argparse
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nft_ray.cli import scoring, serving
from nft_ray.cli.console import say
from nft_ray.rewards.base import reward_config, reward_files, reward_names
from nft_ray.rewards.weights import named_root, weights_root

NAME_HELP = "RUN/REWARD or shared/REWARD, as status shows it; REWARD where that says which"


def add_parser(commands: Any) -> None:
    """`rewards` and what comes after it."""
    root = commands.add_parser("rewards", help="fetch, serve, scale and try out rewards").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    address = argparse.ArgumentParser(add_help=False)
    address.add_argument("--address", help="the Ray cluster (default: RAY_ADDRESS, or the one on this machine)")

    fetch = root.add_parser("fetch", help="download the published weights")
    fetch.add_argument("names", nargs="*", metavar="NAME", help="rewards (default: all)")
    fetch.add_argument("--weights", help="folder (default: NFT_RAY_WEIGHTS, or the Hub's cache)")
    fetch.add_argument("--set", action="append", default=[], metavar="NAME.a=b", help="a field of a reward's section")
    fetch.set_defaults(command_function=_fetch)

    serve = root.add_parser("serve", parents=[address], help="deploy the rewards of an experiment, without training")
    serve.add_argument("config", help="the experiment, such as configs/quickstart.yaml")
    serve.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override a field")
    serve.set_defaults(command_function=serving.serve)

    status = root.add_parser("status", parents=[address], help="what is deployed")
    status.add_argument("--json", action="store_true", help="a list of objects, one per reward")
    status.set_defaults(command_function=serving.status)

    scale = root.add_parser("scale", parents=[address], help="change the number of replicas while a run goes on")
    scale.add_argument("name", help=NAME_HELP)
    scale.add_argument("--replicas", type=int, help="a fixed number")
    scale.add_argument("--min", type=int, help="autoscaling: fewest replicas (replaces every replica)")
    scale.add_argument("--max", type=int, help="autoscaling: most replicas (replaces every replica)")
    scale.set_defaults(command_function=serving.scale)

    delete = root.add_parser("delete", parents=[address], help="take deployed rewards away")
    delete.add_argument("names", nargs="+", metavar="NAME", help=NAME_HELP)
    delete.set_defaults(command_function=serving.delete)

    score = root.add_parser("score", help="score one picture, in this process or (--address) by a deployed reward")
    score.add_argument("image", type=Path)
    score.add_argument("--reward", required=True, metavar="NAME")
    score.add_argument("--prompt", default="")
    score.add_argument("--metadata", default="{}", help="a JSON object, such as GenEval's")
    score.add_argument("--set", action="append", default=[], metavar="a=b", help="a field of the reward's section")
    score.add_argument("--address", help="ask the reward that is deployed on this Ray cluster instead")
    score.set_defaults(command_function=scoring.score)


def rewards(args: argparse.Namespace) -> int:
    """Run one action; returns the exit status."""
    status: int = args.command_function(args)
    return status


def _fetch(args: argparse.Namespace) -> int:
    from nft_ray.downloads.cache import hub_cache
    from nft_ray.downloads.fetch import fetch

    sections: Any = OmegaConf.to_container(OmegaConf.from_dotlist(list(args.set)))
    root, named = weights_root(args.weights), named_root(args.weights)
    files: dict[str, Any] = {}
    for name in args.names or reward_names():
        section = sections.get(name, {}) if args.names or name in sections else _defaults(name)
        if section is not None:
            files |= {file.path: file for file in reward_files(name, reward_config(name, section))}
    if not files:
        say("nothing to download: these rewards need no published files")
        return 0
    size = sum(file.mib for file in files.values()) / 1024
    say(f"{len(files)} files, about {size:.1f} GiB, into {named or hub_cache()}")
    fetch(list(files.values()), root, say, into_hub_cache=named is None)
    return 0


def _defaults(name: str) -> dict[str, Any] | None:
    """An empty section, or None where the reward has no meaning without a choice of the user."""
    try:
        reward_config(name, {})
    except ValueError:
        return None
    return {}
