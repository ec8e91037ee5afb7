"""May a sampler be fast? The gradient with its v_old against the one with an unmerged float32 sampler's, on one batch.

    python benchmarks/merge_gradient.py [--late 10] [--seed 0]

nano-sd3 with its trained weights, by the quickstart's recipe and by the published one, on the CPU. Early: the policy
has made one optimizer step. Late: `--late` epochs of them. Each time a whole epoch's batch is sampled and scored as in
a run; then every kind of sampler (data type x how it holds the LoRA x how velocities travel) evaluates v_old on it, and
every kind of learner (data type of the frozen weights) makes its gradient with that. Two cosines: to the gradient of
the same learner with an unmerged float32 sampler's v_old, and to the one with everything in float32; the bar is 0.99.
They differ, since a 16-bit learner's own rounding is in v and cancels in v - v_old only against the same arithmetic.
Writes benchmarks/results/merge_gradient.json.
"""

import argparse
import asyncio
import dataclasses
import json
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nft_ray.algorithms.batch import make_batch
from nft_ray.config import ExperimentConfig, load
from nft_ray.cores.learner import LearnerCore
from nft_ray.cores.publish import verify
from nft_ray.cores.sampler import SamplerCore
from nft_ray.local import LocalLearners, LocalSamplers, LocalScorers
from nft_ray.prompts.draw import epoch_requests, load_prompts
from nft_ray.types import Adapters, Batch, CleanSamples, LearnerState, ScoredGroup, TrainGroup

REPO = Path(__file__).parents[1]
RECIPES = {
    "quickstart": [],
    "published": [
        "algorithm.beta=1",
        "algorithm.kl_weight=1e-4",
        "algorithm.old_policy_decay=linear",
        "learner.learning_rate=3e-4",
    ],
}
"""On nano-sd3 both; the second as published for GenEval: a smaller first step, a stronger pull towards v_old."""
DTYPES = ("float32", "bfloat16", "float16")
FIELDS = ("model.dtype", "sampler.lora", "sampler.velocity_dtype")
EXACT = ("float32", "unmerged", "float32")
KINDS = (EXACT, *product(DTYPES, ("merged", "unmerged"), ("float16",)))
BAR = 0.99


@dataclasses.dataclass
class Moment:
    """A point of a run: the learner's state, the adapters that sampled, and the batch that it would train on."""

    state: LearnerState
    adapters: Adapters
    batch: Batch


async def moments(config: ExperimentConfig, epochs: Sequence[int]) -> list[Moment]:
    """Train in this process, float32; a Moment after each of the given numbers of finished epochs."""
    samplers, scorers, learners = LocalSamplers(config), LocalScorers(config), LocalLearners(config)
    prompts, found = load_prompts(config.prompts.train), []
    await samplers.load((await learners.adapters())[-1])
    for epoch in range(max(epochs) + 1):
        groups = []
        for request in epoch_requests(prompts, config, epoch=epoch, policy_version=epoch):
            rollout = await samplers.rollout(request)
            rewards = await scorers.score(request, rollout.images)
            groups.append(ScoredGroup(request=request, info=rollout.info, samples=rollout.samples, rewards=rewards))
        batch = make_batch(groups, config, num_shards=1)
        if epoch in epochs:
            found.append(Moment(await learners.state(), (await learners.adapters())[-1], batch))
        update = await learners.update(batch)
        await samplers.load(update.adapters)
        print(f"epoch {epoch}: reward {batch.metrics['reward/total']:.3f}", flush=True)
    return found


def v_old(core: SamplerCore, moment: Moment, texts: dict[int, str]) -> list[np.ndarray]:
    """What this sampler says of every pair of the batch, group by group."""
    verify(moment.adapters, core.load(moment.adapters, moment.adapters.weights), core.config.model.dtype)
    found = []
    for group in moment.batch.shards[0]:
        samples: CleanSamples = group.samples
        conditioning = core.model.encode([texts[group.group_id]])
        found.append(core.velocities(torch.from_numpy(samples.x0), samples.t, samples.noise_seeds, conditioning)())
    return found


def gradient(config: ExperimentConfig, moment: Moment, velocities: Sequence[np.ndarray]) -> torch.Tensor:
    """Of the LoRA, flat, f64: one optimizer step of the whole batch by a fresh learner in the moment's state."""
    core = LearnerCore(config)
    core.restore(moment.state)
    groups: tuple[TrainGroup, ...] = moment.batch.shards[0]
    samples = [dataclasses.replace(group.samples, v_old=v) for group, v in zip(groups, velocities, strict=True)]
    core.update(core.version, groups, samples, moment.batch.samples_per_step)
    return torch.cat([value.grad.double().flatten() for value in core.policy.values()])


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def experiment(args: argparse.Namespace, recipe: str, *more: str) -> ExperimentConfig:
    """One optimizer step per epoch, so that a gradient is a whole epoch's and "early" is after exactly one step."""
    own = ["learner.optimizer_steps=1", "learner.num_workers=1", f"run.seed={args.seed}", "sampler.lora=unmerged"]
    return load(REPO / "configs" / "quickstart.yaml", [*own, *RECIPES[recipe], *more])


def measure(args: argparse.Namespace, recipe: str, moment: Moment) -> list[dict[str, Any]]:
    """A row per kind of learner and sampler; no run mixes two 16-bit types."""
    prompts = load_prompts(experiment(args, recipe).prompts.train)
    texts = {prompt.id: prompt.text for prompt in prompts.lines}
    found = {}
    for kind in KINDS:
        settings = [f"{key}={value}" for key, value in zip(FIELDS, kind, strict=True)]
        found[kind] = v_old(SamplerCore(experiment(args, recipe, *settings)), moment, texts)
    truth, rows = gradient(experiment(args, recipe), moment, found[EXACT]), []
    size = np.linalg.norm(np.concatenate(found[EXACT]))
    for learner in DTYPES:
        config = experiment(args, recipe, f"model.dtype={learner}")
        exact = gradient(config, moment, found[EXACT])
        for kind in KINDS:
            if kind[0] not in (learner, *(DTYPES if learner == "float32" else ())) and kind != EXACT:
                continue
            fast = exact if kind == EXACT else gradient(config, moment, found[kind])
            error = np.linalg.norm(np.concatenate(found[kind]) - np.concatenate(found[EXACT])) / size
            row = {"learner": learner, **dict(zip(("sampler", "lora", "velocities"), kind, strict=True))}
            row |= {"cosine": round(cosine(fast, exact), 5), "cosine_to_all_float32": round(cosine(fast, truth), 5)}
            rows.append(row | {"v_old_error": float(f"{error:.2e}")})
            print(rows[-1], flush=True)
    return rows


def effect(moment: Moment) -> float:
    """|v_old - v_ref| / |v_ref| on the probe: how much the LoRA does at all."""
    probe, base = moment.adapters.probe, moment.adapters.probe_base
    return float(f"{np.linalg.norm(probe - base) / np.linalg.norm(base):.2e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--late", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=REPO / "benchmarks" / "results" / "merge_gradient.json")
    args = parser.parse_args()
    record: dict[str, Any] = {
        "what": "cosine of the LoRA's gradient with this sampler's v_old to that with the unmerged float32 sampler's",
        "bar": BAR,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft", "nft_ray")},
    }
    for recipe in RECIPES:
        epochs = asyncio.run(moments(experiment(args, recipe), (1, args.late)))
        record[recipe] = {"settings": RECIPES[recipe]}
        for name, moment in zip(("early", "late"), epochs, strict=True):
            record[recipe][name] = {
                "optimizer_steps": moment.state.optimizer_step,
                "lora_effect": effect(moment),
                "pairs": sum(group.samples.t.size for group in moment.batch.shards[0]),
                "rows": measure(args, recipe, moment),
            }
    args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
