"""`nft-ray evaluate`: any LoRA, or the base model, on every line of a prompt set; and two evaluations compared.

The experiment's file says model, samplers and rewards; the LoRA brings its own rank, alpha and layers. Samplers and
reward applications are those of training; no learner is started. Everything is checked before anything is.
"""

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from nft_ray.cli.console import Screen
from nft_ray.cli.lora_source import find_source
from nft_ray.cli.train import Interrupted
from nft_ray.config import ExperimentConfig, differences, load, parse
from nft_ray.cores.publish import announced, checksum
from nft_ray.evaluation.bootstrap import COVERAGE
from nft_ray.evaluation.comparison import compare, comparison_table
from nft_ray.evaluation.evaluator import evaluate, open_requests, spaced
from nft_ray.evaluation.results import (
    COMPARISON,
    SHEET,
    SUMMARY,
    EvaluationFolder,
    LineResult,
    about,
    identity,
    read_identity,
    read_results,
)
from nft_ray.evaluation.summary import headline, summarise_results
from nft_ray.models.base import check_model
from nft_ray.models.full import check_weights, read_full
from nft_ray.models.lora import check_layers, read_lora
from nft_ray.prompts.draw import PromptSet, evaluation_requests, load_prompts
from nft_ray.prompts.sets import DATASETS, PACKAGED, PUBLISHED
from nft_ray.rewards.base import check_lines, reward_config
from nft_ray.roles import EvaluationRoles
from nft_ray.runs import report
from nft_ray.runs.checkpoint import write_atomically
from nft_ray.types import Adapter, RolloutRequest, Weights

PREFERENCE = ("pickscore", "clipscore", "hpsv2", "aesthetic", "imagereward", "unified_reward")
DATASET_REWARDS = {"geneval": ("geneval",), "ocr": ("ocr",), "pickscore": PREFERENCE, "drawbench": PREFERENCE}
"""The rewards that a data set is scored with; any other prompts: those of the experiment."""
SECTIONS: dict[str, dict[str, Any]] = {"geneval": {"detector": "mask2former"}}
"""Where the experiment says nothing about a reward of a data set and it has a field without a default."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def evaluate_command(args: argparse.Namespace) -> int:
    """Run one evaluation to its end, or what is left of it, or compare two; returns the exit status."""
    if args.compare:
        return _compare(args)
    if not args.config or not args.output:
        raise ValueError("evaluate: needs CONFIG and --output DIR, or --compare A B")
    config = resolve(args)
    check_model(config.model)
    source = find_source(args.lora) if args.lora else None
    weights, lora = read_full(source) if source else None, None
    if weights is not None:  # of a run with model.tuning: full
        check_weights(weights, config.model, args.lora)
        config = config.model_copy(update={"model": config.model.model_copy(update={"tuning": "full"})})
    elif source:
        weights, lora = read_lora(source)
        _check_effect(weights, args.lora)
        check_layers(weights, config.model, args.lora)
        config = config.model_copy(update={"model": config.model.model_copy(update={"lora": lora, "tuning": "lora"})})
    prompts = load_prompts(config.prompts.test)
    for name, reward in config.reward_configs.items():
        check_lines(name, ((line.text, line.metadata) for line in prompts.lines), reward)
    folder = EvaluationFolder(Path(args.output).expanduser())
    what = identity(config, prompts, lora, checksum(weights) if weights is not None else None)
    with folder.claim(what, about(config, args.lora), overwrite=args.overwrite):
        return _run(args, config, prompts, folder, weights)


def resolve(args: argparse.Namespace) -> ExperimentConfig:
    """The experiment with the command's options in it, checked as a whole; its rewards are those to ask."""
    options = {
        "evaluation.guidance": args.guidance,
        "evaluation.num_steps": args.steps,
        "evaluation.solver": args.solver,
        "evaluation.seed": args.seed,
        "model.height": args.resolution,
        "model.width": args.resolution,
        "model.dtype": DTYPES[args.precision] if args.precision else None,
    }
    config = load(args.config, [*args.set, *(f"{key}={value}" for key, value in options.items() if value is not None)])
    names = (
        [name.strip() for name in args.rewards.split(",")]
        if args.rewards
        else rewards_of(args.dataset) or tuple(config.rewards)
    )
    sections = {name: config.rewards.get(name) or SECTIONS.get(name) or {} for name in names}
    asked = {name: {**section, "weight": 1.0, "eval_only": False} for name, section in sections.items()}
    for name, section in asked.items():
        _check_reward(name, section, by_dataset=not args.rewards and name not in config.rewards)
    tree = config.model_dump()
    if args.dataset:
        tree["prompts"] = {**tree["prompts"], "test": args.dataset}
    return parse({**tree, "stages": (), "rewards": asked})


def rewards_of(dataset: str | None) -> tuple[str, ...]:
    """The rewards of a data set that has a name (`geneval`, `geneval/train`, `small/geneval`); none for a file."""
    if dataset not in (*PACKAGED, *PUBLISHED, *DATASETS):
        return ()
    return next((DATASET_REWARDS[part] for part in dataset.split("/") if part in DATASET_REWARDS), ())


def _check_reward(name: str, section: dict[str, Any], *, by_dataset: bool) -> None:
    try:
        reward_config(name, section)
    except ValueError as error:
        if not by_dataset:
            raise
        raise ValueError(
            f"{error}; the data set asks for {name}: write its section with --set rewards.{name}.KEY=VALUE, or name "
            "the rewards that are wanted with --rewards"
        ) from None


def _check_effect(weights: Weights, lora: str) -> None:
    if not any(weights[name].any() for name in weights if ".lora_B." in name):
        raise ValueError(f"--lora {lora}: every lora_B is 0: it changes nothing; leave --lora out for the base model")


def _run(
    args: argparse.Namespace,
    config: ExperimentConfig,
    prompts: PromptSet,
    folder: EvaluationFolder,
    weights: Weights | None,
) -> int:
    screen, shown = Screen(), spaced(len(prompts))
    pictures = frozenset(range(len(prompts)) if args.save_images else shown)
    adapter: Adapter = "reference" if weights is None else "ema"
    requests = evaluation_requests(prompts, config, epoch=0, policy_version=0, adapter=adapter)
    left, kept = open_requests(requests, folder, pictures)
    if left and kept:
        screen.say(f"going on: {len(kept)} of {len(prompts)} lines are in {folder.path}")
    if left:
        try:
            _draw_and_score(args, config, folder, screen, requests, weights, pictures)
        except (KeyboardInterrupt, asyncio.CancelledError):
            done = len(folder.results())
            raise Interrupted(
                f"interrupted: {done} of {len(prompts)} lines are kept in {folder.path}; run the same command to go on"
            ) from None
    _report(config, folder, screen, shown)
    return 0


def _draw_and_score(
    args: argparse.Namespace,
    config: ExperimentConfig,
    folder: EvaluationFolder,
    screen: Screen,
    requests: Sequence[RolloutRequest],
    weights: Weights | None,
    pictures: frozenset[int],
) -> None:
    context: Any = nullcontext()
    if not args.local:
        from nft_ray.cli.cluster import check_before_start, cluster

        check_before_start(config, args.address, training=False)
        context = cluster(config, args.address, screen.say)

    async def work(dashboard_url: str | None) -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        async with _roles(args, config, screen.say, dashboard_url) as roles:
            if weights is not None:
                await roles.samplers.load(announced(weights))
            progress = partial(screen.progress, "lines")
            await evaluate(config, roles, folder, requests, pictures=pictures, progress=progress)

    with context as dashboard_url:
        asyncio.run(work(dashboard_url))


@asynccontextmanager
async def _roles(
    args: argparse.Namespace, config: ExperimentConfig, say: Callable[[str], None], dashboard_url: str | None
) -> AsyncIterator[EvaluationRoles]:
    if args.local:
        from nft_ray.local import local_evaluation_roles

        yield local_evaluation_roles(config)
        return
    from nft_ray.cli.cluster import evaluation_planes

    async with evaluation_planes(config, say, dashboard_url) as roles:
        yield roles


def _report(config: ExperimentConfig, folder: EvaluationFolder, screen: Screen, shown: Sequence[int]) -> None:
    results = folder.replace(folder.results())  # in order, even where it was killed at its very end
    summary = summarise_results(results)
    write_atomically(folder.path / SUMMARY, json.dumps(summary, indent=1) + "\n")
    metric = headline(config)
    captions = {line: [results[line].prompt, _caption(results[line], metric)] for line in shown}
    strict = {line: results[line].details.get("geneval/strict") for line in shown}
    report.captioned_sheet(
        {line: folder.image(line) for line in shown},
        captions,
        folder.path / SHEET,
        right={line: value == 1 for line, value in strict.items() if value is not None},
    )
    screen.say(f"\n{report.evaluation_table(summary)}\n")
    if missing := sum(bool(result.missing) for result in results):
        screen.say(f"{missing} of {len(results)} lines miss a reward: run the same command again to ask for it")
    for name in (SUMMARY, "results.jsonl", SHEET):
        screen.say(f"{folder.path / name}")


def _caption(result: LineResult, metric: str) -> str:
    value = result.scores.get(metric, result.details.get(metric))
    return f"{metric} {'missing' if value is None else f'{value:.3f}'}"


def _finished(folder: Path) -> list[LineResult]:
    """Every line of an evaluation, in order; ValueError where it is not finished: two halves compare other prompts."""
    found, wanted = read_results(folder, whole=False), read_identity(folder)["prompts"]["lines"]
    if len(found) != wanted:
        raise ValueError(f"{folder}: has {len(found)} of {wanted} lines: run its command again to finish it")
    return sorted(found, key=lambda result: result.line)  # killed at its very end, it is not in order yet


def _compare(args: argparse.Namespace) -> int:
    folders = [Path(name).expanduser() for name in args.compare]
    results, identities = [_finished(folder) for folder in folders], [read_identity(folder) for folder in folders]
    pairs = compare(results[0], results[1], (args.compare[0], args.compare[1]))
    changed = differences(identities[0], identities[1])
    target = Path(args.output).expanduser() if args.output else folders[1]
    target.mkdir(parents=True, exist_ok=True)
    found = {
        "a": args.compare[0],
        "b": args.compare[1],
        "differs_in": changed,
        "coverage": COVERAGE,
        "metrics": {name: asdict(pair) for name, pair in pairs.items()},
    }
    write_atomically(target / COMPARISON, json.dumps(found, indent=1) + "\n")
    sys.stdout.write(f"A: {args.compare[0]}\nB: {args.compare[1]}\n")
    sys.stdout.write(f"they differ in: {', '.join(changed) or 'nothing'}\n\n{comparison_table(pairs)}\n\n")
    sys.stdout.write(f"{target / COMPARISON}\n")
    return 0
