"""How fast are the sampler and the learner on one device, beside the published loop on the same one? No Ray.

    python benchmarks/gpu.py [--size sd35m|tiny] [--part all|sampler|learner|baseline|gradient] [--set a.b=c ...]

SD3.5-medium's architecture with random weights (random_sd3.py), 512 px, 205 text tokens, the published recipe: 48
prompts x 24 images, 10 dpm2 steps without guidance, 9 training times, KL. Our side is SamplerCore and LearnerCore with
a configuration (`--set` changes it); the baseline is published_loop.py. A few groups are measured after a warm-up, the
epoch is scaled from them. Parts may run one by one: --output is added to, the table is of all it holds.

    utilisation   operations that the algorithm needs (counted on one forward; a backward through frozen weights is one
                  more; no recomputation) over seconds and over the machine's own rate of a large matrix product
    epoch, 8      samples divided evenly over 8 such devices, all of them sampling and then all learning; what each
                  update costs once (optimizer, announcing the LoRA) is not divided. Without rewards, the all-reduce of
                  75 MB per optimizer step and the broadcast (benchmarks/broadcast.py)
"""

import argparse
import gc
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import SD3Transformer2DModel
from published_loop import BATCH, STEPS, TIMES, PublishedLoop
from random_sd3 import CLIP_TOKENS, PROMPT, SIZES, Size, save_pipeline, vae
from torch.utils.flop_counter import FlopCounterMode

from nft_ray.config import ExperimentConfig, load
from nft_ray.cores.learner import LearnerCore
from nft_ray.cores.publish import verify
from nft_ray.cores.sampler import SamplerCore
from nft_ray.models.base import quiet_libraries
from nft_ray.models.resolve import resolve
from nft_ray.seeding import image_seed
from nft_ray.types import AdapterWeights, CleanSamples, Prompt, RolloutItem, RolloutRequest, TrainGroup, Weights

REPO = Path(__file__).parents[1]
PARTS = ("sampler", "learner", "baseline", "gradient")
DEVICES = 8
LORA_SIZES = {"early": 1.4e-3, "late": 0.14}
"""About |alpha/r B A| / |W| of the LoRAs whose gradients are compared."""


def experiment(args: argparse.Namespace, *more: str) -> ExperimentConfig:
    """Our side's configuration: the published recipe on this device."""
    size, cuda = SIZES[args.size], args.device.type == "cuda"
    worker = {"num_gpus": int(cuda), "num_threads": torch.get_num_threads(), "compile": cuda}
    tree = {
        "run": {"name": "gpu"},
        "model": {
            "path": str(args.pipeline),
            "dtype": "float16" if cuda else "float32",  # as the presets
            "height": size.pixels,
            "width": size.pixels,
            "max_sequence_length": size.t5_tokens,
        },
        "prompts": {"groups_per_epoch": size.groups_per_epoch, "images_per_group": size.images_per_group},
        "sampler": worker
        | {"solver": "dpm2", "num_steps": STEPS, "num_times": TIMES, "micro_batch_size": 24, "decode_batch_size": 8},
        "learner": worker | {"micro_batch_size": 16},
        "evaluation": {"solver": "dpm2", "num_steps": STEPS},
        "rewards": {"jpeg_compressibility": {"weight": 1}},  # a configuration needs one; none is asked here
    }
    file = args.pipeline / "gpu.yaml"
    file.write_text(json.dumps(tree))  # which is YAML, too
    return resolve(load(file, [*args.set, *more]))


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device: torch.device, work: Callable[[], Any]) -> float:
    wait(device)
    started = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - started


def fresh(device: torch.device) -> None:
    """What an earlier part held is gone, and the peak counts from here."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float:
    """Of the device; on a CPU, of the process since it started."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def matmul_rate(device: torch.device) -> float:
    """Operations per second of a large matrix product of random numbers: 16 bit, on a CPU float32."""
    cuda = device.type == "cuda"
    n, dtype = (8192, torch.float16) if cuda else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    repeats = 20 if cuda else 3
    times = [seconds(device, lambda: [a @ b for _ in range(repeats)]) / repeats for _ in range(8)]
    return 2 * n**3 / statistics.median(times[3:])


def operations(size: Size) -> dict[str, float]:
    """Of one sample's forward and one image's decoding: counted on the meta device, the LoRA left out."""
    latent = (1, 16, size.pixels // 8, size.pixels // 8)
    with torch.device("meta"), torch.no_grad():
        transformer, decoder = SD3Transformer2DModel(**size.transformer), vae(size)
        tokens = CLIP_TOKENS + size.t5_tokens
        with FlopCounterMode(display=False) as forward:
            transformer(
                hidden_states=torch.empty(latent),
                timestep=torch.empty(1),
                encoder_hidden_states=torch.empty(1, tokens, size.transformer["joint_attention_dim"]),
                pooled_projections=torch.empty(1, size.transformer["pooled_projection_dim"]),
            )
        with FlopCounterMode(display=False) as decoding:
            decoder.decode(torch.empty(latent))
    return {"forward": float(forward.get_total_flops()), "decode": float(decoding.get_total_flops())}


def request(config: ExperimentConfig, group: int, num_images: int, split: str = "train") -> RolloutRequest:
    seeds = tuple(image_seed(0, 0, group, image) for image in range(num_images))
    item = RolloutItem(group_id=group, prompt=Prompt(id=group, text=PROMPT), seeds=seeds)
    return RolloutRequest(epoch=0, items=(item,), adapter="old", policy_version=-1, split=split)  # type: ignore[arg-type]


def measure_sampler(args: argparse.Namespace, needs: dict[str, float]) -> dict[str, Any]:
    """Groups as a training epoch asks for them (images, v_old, v_ref), and images alone."""
    config, device = experiment(args), args.device
    adapters, weights = LearnerCore(experiment(args, "learner.compile=false")).probe()
    fresh(device)
    core = SamplerCore(config)
    verify(adapters, core.load(adapters, weights), config.model.dtype)
    count = config.prompts.images_per_group
    first = seconds(device, lambda: core.rollout(request(config, 0, count)))
    core.rollout(request(config, 0, count, "eval"))
    groups = [seconds(device, lambda g=g: core.rollout(request(config, g, count))) for g in range(args.groups)]
    alone = [seconds(device, lambda g=g: core.rollout(request(config, g, count, "eval"))) for g in range(args.groups)]
    group, only = statistics.median(groups), statistics.median(alone)
    return {
        "images_per_s": count / only,
        "samples_per_s": count / group,
        "operations_per_s": count * (needs["forward"] * (STEPS + 2 * TIMES) + needs["decode"]) / group,
        "first_call_s": first - group,
        "peak_gib": peak_gib(device),
        "config": config.sampler.model_dump(mode="json") | {"dtype": config.model.dtype},
    }


def random_samples(config: ExperimentConfig, size: Size, core: LearnerCore, group: int) -> CleanSamples:
    """A group in the shapes of a rollout's: how long an update takes does not depend on the numbers."""
    rng, count = np.random.default_rng(group), config.prompts.images_per_group
    latent, tokens = core.model.latent_shape, CLIP_TOKENS + size.t5_tokens
    widths = {
        "prompt_embeds": (1, tokens, size.transformer["joint_attention_dim"]),
        "pooled_prompt_embeds": (1, size.transformer["pooled_projection_dim"]),
    }
    v_old, v_ref = (rng.standard_normal((count, TIMES, *latent), dtype=np.float32).astype(np.float16) for _ in range(2))
    return CleanSamples(
        x0=rng.standard_normal((count, *latent), dtype=np.float32),
        t=np.tile(core.model.sigmas(STEPS).numpy()[:TIMES], (count, 1)).astype(np.float32),
        noise_seeds=rng.integers(0, 2**32, size=(count, TIMES)),
        v_old=v_old,
        v_ref=v_ref,
        conditioning={name: rng.standard_normal(shape, dtype=np.float32) for name, shape in widths.items()},
    )


def train_group(group: int, count: int) -> TrainGroup:
    """Optimalities of advantages that are standard normal, clipped at 5; all in the first optimizer step."""
    r = np.random.default_rng(group).standard_normal(count).clip(-5, 5) / 10 + 0.5
    return TrainGroup(group_id=group, samples=None, weight=r.astype(np.float32), step=np.zeros(count, np.int32))


def update(core: LearnerCore, samples: Sequence[CleanSamples]) -> None:
    """One epoch's update of the given groups."""
    groups = [train_group(g, len(part.x0)) for g, part in enumerate(samples)]
    core.update(core.version, groups, samples, (sum(len(part.x0) for part in samples),))


def measure_learner(args: argparse.Namespace, needs: dict[str, float]) -> dict[str, Any]:
    """Updates of one group and of some more: their difference is what samples cost, the rest is paid once."""
    config, size, device = experiment(args), SIZES[args.size], args.device
    fresh(device)
    core, count = LearnerCore(config), config.prompts.images_per_group
    samples = [random_samples(config, size, core, group) for group in range(1 + args.groups)]
    first = seconds(device, lambda: update(core, samples[:1]))
    one = min(seconds(device, lambda: update(core, samples[:1])) for _ in range(2))
    more = seconds(device, lambda: update(core, samples))
    per_sample = max(more - one, 0.0) / (count * args.groups) or one / count
    return {
        "samples_per_s": 1 / per_sample,
        "once_per_update_s": max(one - count * per_sample, 0.0),
        "operations_per_s": 2 * TIMES * needs["forward"] / per_sample,
        "first_call_s": first - one,
        "peak_gib": peak_gib(device),
        "config": config.learner.model_dump(mode="json") | {"dtype": config.model.dtype},
    }


def measure_baseline(args: argparse.Namespace, needs: dict[str, float]) -> dict[str, Any]:
    """Batches of 9 after one that warms up; the largest peak is that of training."""
    size, device = SIZES[args.size], args.device
    fresh(device)
    previous, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True  # as published
    try:
        loop = PublishedLoop(str(args.pipeline), size.pixels, device)
        widths = {
            "prompt_embeds": (BATCH, CLIP_TOKENS + size.t5_tokens, size.transformer["joint_attention_dim"]),
            "pooled_prompt_embeds": (BATCH, size.transformer["pooled_projection_dim"]),
        }
        conditioning = {name: torch.randn(shape, device=device) for name, shape in widths.items()}
        x0, _ = loop.sample(conditioning)
        sampling = statistics.median(seconds(device, lambda: loop.sample(conditioning)) for _ in range(3))
        r = torch.rand(BATCH, device=device)
        loop.train(x0, r, conditioning)
        training = statistics.median(seconds(device, lambda: loop.train(x0, r, conditioning)) for _ in range(3))
        once = seconds(device, loop.step)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = previous
    return {
        "images_per_s": BATCH / sampling,
        "samples_per_s": BATCH / training,
        "once_per_update_s": once,
        "sampling_operations_per_s": BATCH * (needs["forward"] * STEPS + needs["decode"]) / sampling,
        "training_operations_per_s": BATCH * TIMES * 4 * needs["forward"] / training,
        "peak_gib": peak_gib(device),
    }


def measure_gradient(args: argparse.Namespace, needs: dict[str, float]) -> dict[str, Any]:
    """Cosine of the LoRA's gradient with this sampler's v_old to that with an unmerged float32 sampler's."""
    fast = experiment(args)
    exact = experiment(
        args, "model.dtype=float32", "sampler.lora=unmerged", "sampler.compile=false", "sampler.velocity_dtype=float32"
    )
    learner = LearnerCore(experiment(args, "learner.compile=false"))
    state, (adapters, random) = learner.state(), learner.probe()
    del learner
    found: dict[str, Any] = {}
    for name, share in LORA_SIZES.items():
        old, policy = (scaled(random.old, factor * share) for factor in (1.0, 1.1))
        announced, weights = replace(adapters, probe=None, probe_base=None), AdapterWeights(old=old, ema=old)
        here = replace(state, policy=policy, ema=policy, versions={0: weights})
        samples, gradients = None, []
        for config in (fast, exact):
            fresh(args.device)
            sampler = SamplerCore(config)
            sampler.load(announced, weights)
            if samples is None:
                _, _, samples = sampler.rollout(request(config, 0, args.gradient_images))
            conditioning = sampler.model.encode([PROMPT])
            x0 = torch.from_numpy(samples.x0).to(args.device)
            sampler._use("old", announced.version)
            v_old = sampler.velocities(x0, samples.t, samples.noise_seeds, conditioning)()
            del sampler
            fresh(args.device)
            core = LearnerCore(experiment(args, "learner.compile=false", "learner.micro_batch_size=8"))
            core.restore(here)
            update(core, [replace(samples, v_old=v_old)])
            gradients.append(torch.cat([value.grad.double().flatten().cpu() for value in core.policy.values()]))
            del core
        a, b = gradients
        found[name] = float(a @ b / (a.norm() * b.norm()))
    return {"cosine": found, "images": args.gradient_images, "pairs": args.gradient_images * TIMES}


def scaled(weights: Weights, share: float) -> Weights:
    """A random LoRA (nft_ray.models.lora.random_weights) made about `share` of freshly initialised weights.

    Its B A has variance 1/in per element, torch's linear layers 1/(3 in); alpha / rank is 2.
    """
    factor = np.float32(share / (2 * np.sqrt(3)))
    return {name: value * factor if ".lora_B." in name else value for name, value in weights.items()}


def epochs(record: dict[str, Any]) -> dict[str, Any]:
    """Seconds per epoch, of whatever parts the record holds."""
    size, parts, found = SIZES[record["size"]], record["parts"], {}
    samples = size.groups_per_epoch * size.images_per_group
    sides: dict[str, tuple[float, float]] = {}
    if "sampler" in parts and "learner" in parts:
        each = 1 / parts["sampler"]["samples_per_s"] + 1 / parts["learner"]["samples_per_s"]
        sides["ours"] = (each, parts["learner"]["once_per_update_s"])
    if "baseline" in parts:
        each = 1 / parts["baseline"]["images_per_s"] + 1 / parts["baseline"]["samples_per_s"]
        sides["baseline"] = (each, parts["baseline"]["once_per_update_s"])
    for side, (each, once) in sides.items():
        found[side] = {"one_s": samples * each + once, f"projected_on_{DEVICES}_s": samples / DEVICES * each + once}
    if len(found) == 2:
        found["speedup"] = found["baseline"]["one_s"] / found["ours"]["one_s"]
    return {"samples": samples, **found}


def table(record: dict[str, Any]) -> str:
    parts, rate = record["parts"], record["matmul_operations_per_s"]
    ours = {**{f"s.{k}": v for k, v in parts.get("sampler", {}).items()}}
    ours |= {f"l.{k}": v for k, v in parts.get("learner", {}).items()}
    base, epoch = parts.get("baseline", {}), record["epoch"]

    def row(name: str, a: float | None, b: float | None, digits: int = 3) -> str:
        cells = ["-" if value is None else f"{value:.{digits}f}" for value in (a, b)]
        ratio = f"{a / b:.2f}" if a is not None and b else ""
        return f"{name:44}{cells[0]:>12}{cells[1]:>12}{ratio:>8}"

    def use(value: float | None) -> float | None:
        return None if value is None else value / rate

    lines = [f"{record['device']}; matrix product {rate / 1e12:.3g} TFLOP/s", f"{'':44}{'ours':>12}{'baseline':>12}"]
    lines += [
        row("images/s, images alone", ours.get("s.images_per_s"), base.get("images_per_s")),
        row("samples/s sampled (ours: with v_old, v_ref)", ours.get("s.samples_per_s"), base.get("images_per_s")),
        row("samples/s trained", ours.get("l.samples_per_s"), base.get("samples_per_s")),
        row("utilisation, sampler", use(ours.get("s.operations_per_s")), use(base.get("sampling_operations_per_s"))),
        row("utilisation, learner", use(ours.get("l.operations_per_s")), use(base.get("training_operations_per_s"))),
        row("peak GiB, sampler", ours.get("s.peak_gib"), None, 2),
        row("peak GiB, learner", ours.get("l.peak_gib"), base.get("peak_gib"), 2),
        row("first call beyond the later ones, sampler, s", ours.get("s.first_call_s"), None, 1),
        row("first call beyond the later ones, learner, s", ours.get("l.first_call_s"), None, 1),
    ]
    for key, name in (("one_s", "epoch, one device, s"), (f"projected_on_{DEVICES}_s", f"epoch on {DEVICES}, s")):
        lines.append(row(name, *(epoch.get(side, {}).get(key) for side in ("ours", "baseline")), 1))
    if "speedup" in epoch:
        lines.append(f"the epoch is {epoch['speedup']:.2f} times as fast as the baseline's")
    if "gradient" in parts:
        lines.append(f"gradient cosine: {parts['gradient']['cosine']}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="sd35m")
    parser.add_argument("--part", choices=("all", *PARTS), default="all")
    parser.add_argument("--device", type=torch.device, default=None)
    parser.add_argument("--groups", type=int, default=2, help="groups that are measured")
    parser.add_argument("--gradient-images", type=int, default=8)
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c")
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args()
    args.device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = args.device.type == "cuda"
    output = args.output or REPO / "benchmarks" / "results" / f"gpu_{args.size}_{args.device.type}.json"
    record: dict[str, Any] = {
        "what": "sampler and learner on one device beside the published loop: benchmarks/gpu.py",
        "size": args.size,
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(args.device) if cuda else f"CPU ({torch.get_num_threads()} threads)",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft", "transformers")},
        "matmul_operations_per_s": matmul_rate(args.device),
        "operations_per_sample": operations(SIZES[args.size]),
        "parts": {},
    }
    if output.exists():
        earlier = json.loads(output.read_text())
        same = ("size", "device", "versions")
        if all(earlier[key] == record[key] for key in same):
            record["parts"] = earlier["parts"]
    measures = (measure_sampler, measure_learner, measure_baseline, measure_gradient)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        args.pipeline = Path(folder)
        save_pipeline(SIZES[args.size], args.pipeline, args.device, torch.float16 if cuda else torch.float32)
        for name, measure in zip(PARTS, measures, strict=True):
            if args.part in ("all", name):
                started = time.perf_counter()
                record["parts"][name] = measure(args, record["operations_per_sample"])
                print(f"{name}: measured in {time.perf_counter() - started:.0f} s", flush=True)
                record["epoch"] = epochs(record)
                output.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


if __name__ == "__main__":
    main()
