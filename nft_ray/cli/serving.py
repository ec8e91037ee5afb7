"""`nft-ray rewards serve | status | scale | delete`: the rewards that are deployed on a Ray cluster."""

import argparse
import asyncio
import json
import time
from dataclasses import asdict
from typing import Any

from nft_ray.cli.connection import dashboard_of
from nft_ray.cli.console import say
from nft_ray.rewards.applications import SHARED, application
from nft_ray.rewards.base import Autoscaling

SETTLED_S = 300.0


def serve(args: argparse.Namespace) -> int:
    """Deploy the rewards of an experiment; on a Ray of its own, until Ctrl-C."""
    from deployments.build import deploy
    from deployments.plane import Dashboard, reward_states
    from deployments.proxy import check_port
    from nft_ray.cli.cluster import cluster
    from nft_ray.cli.connection import joins
    from nft_ray.config import HttpConfig, load

    config = load(args.config, args.set)
    http = config.scorers.http or HttpConfig()
    config = config.model_copy(update={"scorers": config.scorers.model_copy(update={"http": http, "attach": True})})
    stays = joins(args.address)
    if not stays:
        check_port(http)
    with cluster(config, args.address, say) as url:
        say(f"deploying {', '.join(application(SHARED, name) for name in config.rewards)} on Ray Serve")
        asyncio.run(deploy(config, owner="nft-ray rewards serve", dashboard_url=url, stays=True))
        _print_states(reward_states(Dashboard(url)) if url else [])
        host = f"[{http.host}]" if ":" in http.host else http.host
        for name in config.rewards:
            say(f"POST http://{host}:{http.port}/{name}")
        if not stays:
            say("serving; Ctrl-C ends it")
            _until_interrupted()
    return 0


def status(args: argparse.Namespace) -> int:
    """Show what is deployed."""
    from deployments.plane import reward_states

    with dashboard_of(args.address) as dashboard:
        states = reward_states(dashboard)
    if args.json:
        say(json.dumps([asdict(state) for state in states]))
    else:
        _print_states(states)
    return 0


def scale(args: argparse.Namespace) -> int:
    """Change the number of replicas, or its bounds."""
    from deployments import plane

    if (args.replicas is None) == (args.max is None):
        raise ValueError("rewards scale: give either --replicas N, or --max B (and --min A)")
    with dashboard_of(args.address) as dashboard:
        state = plane.find(dashboard, args.name)
        if args.replicas is not None:
            plane.scale(dashboard, state.name, args.replicas)
            say(f"{state.name}: {state.target} -> {args.replicas} replicas asked for; `nft-ray rewards status` shows")
            return 0
        from deployments.build import rebound

        bounds = Autoscaling(min_replicas=1 if args.min is None else args.min, max_replicas=args.max)
        say(f"{state.name}: replacing its replicas; from {bounds.min_replicas} to {bounds.max_replicas} of them")
        asyncio.run(rebound(state.name, bounds, wait_s=SETTLED_S))
        say(f"{state.name}: done")
    return 0


def delete(args: argparse.Namespace) -> int:
    """Take deployed rewards away."""
    from deployments import plane

    with dashboard_of(args.address) as dashboard:
        names = [plane.find(dashboard, name).name for name in args.names]
        plane.delete(names)
    say(f"deleted: {', '.join(names)}")
    return 0


def _print_states(states: list[Any]) -> None:
    rows = [("reward", "running", "target", "CPUs", "GPUs", "state")]
    for state in states:
        target = f"{state.target} (auto)" if state.autoscaled else str(state.target)
        cells = (state.name, str(state.running), target, f"{state.num_cpus:g}", f"{state.num_gpus:g}")
        rows.append((*cells, f"{state.status} {state.message}".strip()))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if not states:
        say("none is deployed")


def _until_interrupted() -> None:
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        return
