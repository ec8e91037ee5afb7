"""`nft-ray evaluate`: any LoRA, or the base model, on every line of a prompt set; and two evaluations compared.

The experiment's file says model, samplers and rewards; the LoRA brings its own rank, alpha and layers. Samplers and
reward applications are those of training; no learner is started. Everything is checked before anything is.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from omegaconf import OmegaConf

from nft_ray.cli.console import Screen
from nft_ray.cli.place import STOPPED, Interrupted, Place, run_until_stopped
from nft_ray.cli.watch import Ending
from nft_ray.config import ExperimentConfig, load
from nft_ray.cores.publish import announced, checksum
from nft_ray.evaluation.asked import asked_experiment, with_policy
from nft_ray.evaluation.comparison import compare_folders, comparison_table
from nft_ray.evaluation.evaluator import evaluate, open_requests, spaced
from nft_ray.evaluation.report import write_report
from nft_ray.evaluation.results import COMPARISON, RESULTS, SHEET, SUMMARY, EvaluationFolder, about, identity
from nft_ray.models.base import check_model
from nft_ray.models.resolve import resolve
from nft_ray.prompts.draw import PromptSet, check_scorable, evaluation_requests, load_prompts
from nft_ray.types import Adapter, Weights

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def evaluate_command(args: argparse.Namespace) -> int:
    """Run one evaluation to its end, or what is left of it, or compare two; returns the exit status."""
    if args.compare:
        return _compare(args)
    if not args.config or not args.output:
        raise ValueError("evaluate: needs CONFIG and --output DIR, or --compare A B")
    config = experiment_of(args)
    check_model(config.model)
    config, weights = with_policy(config, args.lora)
    prompts = load_prompts(config.prompts.test)
    check_scorable(prompts, config)
    folder = EvaluationFolder(Path(args.output).expanduser())
    lora = config.model.lora if weights is not None and config.model.tuning == "lora" else None
    what = identity(config, prompts, lora, checksum(weights) if weights is not None else None)
    with folder.claim(what, about(config, args.lora), overwrite=args.overwrite):
        return _run(args, config, prompts, folder, weights)


def experiment_of(args: argparse.Namespace) -> ExperimentConfig:
    """The experiment with the command's options in it; its rewards are those to ask."""
    options = {
        "evaluation.guidance": args.guidance,
        "evaluation.num_steps": args.steps,
        "evaluation.solver": args.solver,
        "evaluation.seed": args.seed,
        "model.height": args.resolution,
        "model.width": args.resolution,
        "model.dtype": DTYPES[args.precision] if args.precision else None,
    }
    given = [f"{key}={value}" for key, value in options.items() if value is not None]
    return asked_experiment(
        resolve(load(args.config, [*args.set, *given])),
        dataset=args.dataset,
        rewards=[name.strip() for name in args.rewards.split(",")] if args.rewards else (),
        touched=reward_fields(args.set),
    )


def reward_fields(settings: Sequence[str]) -> dict[str, set[str]]:
    """Reward name -> the fields that --set says of it: `rewards.NAME.field=...`, or `rewards.NAME={field: ...}`."""
    sections = OmegaConf.from_dotlist([one for one in settings if one.startswith("rewards.")]).get("rewards") or {}
    return {name: set(section) if OmegaConf.is_dict(section) else set() for name, section in sections.items()}


def _run(
    args: argparse.Namespace,
    config: ExperimentConfig,
    prompts: PromptSet,
    folder: EvaluationFolder,
    weights: Weights | None,
) -> int:
    screen, shown = Screen(), spaced(len(prompts))
    place = Place(local=args.local, address=args.address, say=screen.say, owner=str(folder.path.absolute()))
    pictures = frozenset(range(len(prompts)) if args.save_images else shown)
    adapter: Adapter = "reference" if weights is None else "ema"
    requests = evaluation_requests(prompts, config, epoch=0, policy_version=0, adapter=adapter)
    left, kept = open_requests(requests, folder, pictures)

    async def work(dashboard_url: str | None) -> None:
        async with place.evaluation_roles(config, dashboard_url) as roles:
            if weights is not None:
                await roles.samplers.load(announced(weights))
            progress = partial(screen.progress, "lines")
            await evaluate(config, roles, folder, requests, pictures=pictures, progress=progress)

    if left and kept:
        screen.say(f"going on: {len(kept)} of {len(prompts)} lines are in {folder.path}")
    if left:
        place.check(config, training=False)
        kept_lines = partial(_kept, folder, len(prompts))
        try:
            with place.ray(config, Ending(kept=kept_lines, close=lambda: None)) as dashboard_url:
                place.check_connected([config], training=False)
                run_until_stopped(work(dashboard_url))
        except STOPPED:
            raise Interrupted(f"interrupted: {kept_lines()}") from None
    screen.say(f"\n{write_report(folder, config, shown)}\n")
    if missing := sum(bool(result.missing) for result in folder.results()):
        screen.say(f"{missing} of {len(prompts)} lines miss a reward: run the same command again to ask for it")
    for name in (SUMMARY, RESULTS, SHEET):
        screen.say(f"{folder.path / name}")
    return 0


def _kept(folder: EvaluationFolder, total: int) -> str:
    """What a stopped evaluation has left, for the line that says why it stopped."""
    return f"{len(folder.results())} of {total} lines are kept in {folder.path}; run the same command to go on"


def _compare(args: argparse.Namespace) -> int:
    a, b = (Path(name).expanduser() for name in args.compare)
    target = Path(args.output).expanduser() if args.output else b
    changed, pairs = compare_folders(a, b, (args.compare[0], args.compare[1]), target)
    sys.stdout.write(f"A: {args.compare[0]}\nB: {args.compare[1]}\n")
    sys.stdout.write(f"they differ in: {', '.join(changed) or 'nothing'}\n\n{comparison_table(pairs)}\n\n")
    sys.stdout.write(f"{target / COMPARISON}\n")
    return 0
