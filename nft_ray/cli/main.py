"""The command line: arguments in, exit status out. A failure is one clear line, the last one, and never a traceback.

     0  done, or preempted (SIGTERM) with its last epoch kept
     1  failed, and the same command would fail again: a mistake to mend, or a fault of ours
     2  usage
    75  failed for what comes back: the cluster is gone or cannot be reached, a node died once too often, no room came
        in time. Run the same command again (a RayJob's `backoffLimit`, a loop that goes on while the status is 75)
   130  interrupted (the last checkpoint is kept)

Tracebacks are in the run's log.txt; before there is a run, in a file of their own that the line names. NFT_RAY_DEBUG=1
shows them as well.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from nft_ray.cli import data, plan, profile, rewards
from nft_ray.cli.failures import INTERRUPTED, explained, quiet
from nft_ray.cli.place import PREEMPTED, Interrupted
from nft_ray.config import masked_text

PARSED = {"rewards": rewards.rewards, "data": data.data, "profile": profile.profile, "plan": plan.plan}
"""Commands that parse options of their own, so that they are imported anyway."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", stream=sys.stderr)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # or each start says twice that torchvision is absent
    for name in ("nft_ray", "actors", "deployments"):
        logging.getLogger(name).setLevel(logging.INFO)
    quiet()
    try:
        return PARSED.get(args.command, _command)(args)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except Interrupted as error:
        return _fail(str(error), INTERRUPTED)
    except PREEMPTED:
        line = "stopped by SIGTERM: run the same command again"
        return _fail(line, 0 if args.command == "train" else INTERRUPTED)
    except Exception as error:  # noqa: BLE001  whatever it is: one line
        return _fail(*explained(error))


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
    _add_evaluate(commands)
    _add_export(commands)
    command = commands.add_parser("track", help="give MLflow what it lacks of a run that is finished or stopped")
    command.add_argument("run", help="folder of a run, such as runs/quickstart")
    command.add_argument("--set", action="append", default=[], metavar="a.b=c", help="such as tracking.uri=...")
    command = commands.add_parser("encode", help="an experiment's prompts into model.precomputed, before it starts")
    command.add_argument("config", help="the experiment")
    command.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override a field")
    rewards.add_parser(commands)
    data.add_parser(commands)
    profile.add_parser(commands)
    plan.add_parser(commands)
    return root


def _add_evaluate(commands: Any) -> None:
    command = commands.add_parser("evaluate", help="a LoRA, or the base model, on a prompt set; or compare two")
    command.add_argument("config", nargs="?", help="the experiment: its model, samplers and rewards")
    command.add_argument("--lora", help="run, checkpoint, LoRA folder or file, Hub id (default: the base model)")
    command.add_argument("--dataset", help="geneval, ocr, pickscore, drawbench or a file (default: prompts.test)")
    command.add_argument("--rewards", metavar="A,B", help="default: the data set's, else the experiment's")
    command.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override a field")
    command.add_argument("--guidance", type=float, help="default: evaluation.guidance")
    command.add_argument("--steps", type=int, help="default: evaluation.num_steps")
    command.add_argument("--solver", help="default: evaluation.solver")
    command.add_argument("--resolution", type=int, metavar="PX", help="height and width (default: the model's)")
    command.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="default: model.dtype")
    command.add_argument("--seed", type=int, help="noise of line i is a function of this and i (evaluation.seed)")
    command.add_argument("--save-images", action="store_true", help="every image, as DIR/images/000123.png")
    command.add_argument("--output", metavar="DIR", help="where results go, and are gone on with after a kill")
    command.add_argument("--overwrite", action="store_true", help="replace another evaluation in DIR")
    command.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two such folders: B minus A, line by line")
    command.add_argument("--address", help="join this Ray cluster (`auto` finds a local one) instead of starting one")
    command.add_argument("--local", action="store_true", help="everything in this process, without Ray")


def _add_export(commands: Any) -> None:
    command = commands.add_parser("export", help="a run's LoRA for diffusers, with a model card")
    command.add_argument("run", help="folder of a run, such as runs/quickstart")
    command.add_argument("--output", metavar="DIR", help="default: RUN/export-epoch-N")
    command.add_argument("--checkpoint", type=int, metavar="N", help="the one after N epochs (default: the newest)")
    command.add_argument("--merge", action="store_true", help="DIR/transformer as well, the LoRA in it")
    command.add_argument("--push", metavar="HUB_ID", help="upload it, to a repository that is made private (HF_TOKEN)")


def _command(args: argparse.Namespace) -> int:
    """The others, each imported when it is asked for. Torch comes later still: with the first weights."""
    if args.command == "train":
        from nft_ray.cli.train import train

        return train(args)
    if args.command == "export":
        from nft_ray.cli.export import export_command

        return export_command(args)
    if args.command == "track":
        from nft_ray.cli.track import track

        return track(args)
    if args.command == "encode":
        from nft_ray.cli.encode import encode

        return encode(args)
    from nft_ray.cli.evaluate import evaluate_command

    return evaluate_command(args)


def _fail(line: str, status: int) -> int:
    sys.stdout.flush()
    sys.stderr.write(f"{masked_text(line)}\n")
    sys.stderr.flush()
    return status
