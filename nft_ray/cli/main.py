"""The command line: arguments in, exit status out. A mistake is one clear line, the last one, and never a traceback.

    0 done    1 failed    2 usage    130 interrupted (the last checkpoint is kept)

NFT_RAY_DEBUG=1 shows the traceback as well.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from nft_ray.cli.rewards import add_parser, rewards

FAILURES = (ValueError, RuntimeError, OSError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", stream=sys.stderr)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # or each start says twice that torchvision is absent
    for name in ("nft_ray", "actors", "deployments"):
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        return rewards(args) if args.command == "rewards" else _train(args)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except FAILURES as error:
        if os.environ.get("NFT_RAY_DEBUG"):
            logging.getLogger("nft_ray").exception("traceback, for NFT_RAY_DEBUG")
        return _fail(f"nft-ray: {' '.join(str(error).split()) or type(error).__name__}", 1)


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    root = argparse.ArgumentParser(prog="nft-ray", description="DiffusionNFT on Ray.")
    root.add_argument("--version", action="version", version=f"nft_ray {version('nft_ray')}")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("train", help="run the experiment in a YAML file, or go on with it")
    command.add_argument("config", help="the experiment, such as configs/quickstart.yaml")
    command.add_argument(
        "--set", action="append", default=[], metavar="a.b=c", help="override a field; may be given several times"
    )
    command.add_argument("--address", help="join this Ray cluster (`auto` finds a local one) instead of starting one")
    command.add_argument("--local", action="store_true", help="everything in this process, without Ray")
    command.add_argument(
        "--dry-run", action="store_true", help="print the resolved YAML and the placement; start nothing"
    )
    command.add_argument("--overwrite", action="store_true", help="replace a run of the same name")
    add_parser(commands)
    return root


def _train(args: argparse.Namespace) -> int:
    from nft_ray.cli.train import Interrupted, train  # brings torch: seconds that no other command should wait

    try:
        return train(args)
    except Interrupted as error:
        return _fail(str(error), 130)


def _fail(line: str, status: int) -> int:
    sys.stdout.flush()
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
    return status
