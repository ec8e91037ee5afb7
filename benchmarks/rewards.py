"""What does Ray Serve cost a reward? The same batches scored in this process and by one replica, in one run.

    python benchmarks/rewards.py [NAME ...] [--rounds 5]

Overhead: rounds of fresh batches, in-process and through Serve in turn, two calls in flight; the median of the rounds'
ratios. Both sides have one thread. A batch is one group of 24 images of 512 px (OCR: 4; clipscore: 8). clipscore has
the size of CLIP's ViT-B/32 and random weights: its own, ViT-L/14, takes 4 s per image on a CPU.
Batching: 1, 8 and 64 callers that each send one image at a time to a reward with `batch_size: 16`; images/s, and how
many images a call of the model held. Writes benchmarks/results/rewards.json.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO))

import numpy as np
import ray
import torch
from PIL import Image, ImageDraw, ImageFont
from ray import serve

from deployments.build import deploy
from deployments.plane import delete
from nft_ray.config import ExperimentConfig, parse
from nft_ray.rewards.base import Reward, Scores, load_reward
from nft_ray.shapes.grammar import test_lines
from nft_ray.shapes.world import render, sample_scene
from tests.rewards.clip_files import sizes, write_clip, write_tokenizer

SIZE = 512
IN_FLIGHT = 2
CALLERS = (1, 8, 64)
BATCHED = "clipscore"
CLIP_B = sizes((768, 12, 12), (512, 12, 8), 512, image_size=224, patch_size=32)
NUM_IMAGES = {"ocr": 4, "clipscore": 8}
SECTIONS: dict[str, dict[str, Any]] = {"geneval": {"detector": "shapes"}}
NAMES = ("jpeg_compressibility", "geneval", "ocr", "clipscore")
WORDS = ("OPEN", "SALE 50%", "HELLO WORLD", "EXIT", "COFFEE")

Batch = tuple[np.ndarray, list[str], list[dict[str, Any]]]


class Counted:
    """A reward that also says how many images its call held."""

    def __init__(self, reward: Reward) -> None:
        self._reward = reward

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        scores = self._reward.score(images, prompts, metadata)
        return Scores(values=scores.values, details={"held": np.full(len(images), len(images), np.float32)})


def load_counted(name: str, section: Mapping[str, Any]) -> Reward:
    return Counted(load_reward(name, section))


def batch(name: str, num_images: int, seed: int) -> Batch:
    """Images that nobody has scored yet, of the kind that the reward is for."""
    rng = np.random.default_rng(seed)
    if name == "geneval":
        lines = [test_lines()[int(index)] for index in rng.integers(len(test_lines()), size=num_images)]
        scenes = [render(sample_scene(line, Random(1000 * seed + i))) for i, line in enumerate(lines)]
        images = [np.asarray(Image.fromarray(scene).resize((SIZE, SIZE))) for scene in scenes]
        return np.stack(images), [str(line["prompt"]) for line in lines], lines
    if name == "ocr":
        texts = [WORDS[int(index)] for index in rng.integers(len(WORDS), size=num_images)]
        return (
            np.stack([_sign(text, rng) for text in texts]),
            [f'a sign that says "{text}"' for text in texts],
            [{}] * num_images,
        )
    coarse = rng.integers(0, 256, (num_images, 24, 24, 3)).astype(np.uint8)
    images = [np.asarray(Image.fromarray(one).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for one in coarse]
    return np.stack(images), ["a cat"] * num_images, [{}] * num_images


def _sign(text: str, rng: np.random.Generator) -> np.ndarray:
    image = Image.new("RGB", (SIZE, SIZE), tuple(int(value) for value in rng.integers(180, 256, 3)))
    draw = ImageDraw.Draw(image)
    draw.text((40, int(rng.integers(100, 350))), text, fill=(10, 10, 10), font=ImageFont.load_default(size=60))
    return np.asarray(image)


def experiment(name: str, **section: Any) -> ExperimentConfig:
    return parse({"run": {"name": "rewards"}, "rewards": {name: SECTIONS.get(name, {}) | section}})


async def through_serve(name: str, batches: Sequence[Batch]) -> float:
    """Seconds for all batches, put into the object store beforehand as a sampler's are."""
    handle = serve.get_app_handle(f"rewards/{name}")
    refs = [(ray.put(images), prompts, metadata) for images, prompts, metadata in batches]
    room = asyncio.Semaphore(IN_FLIGHT)

    async def one(arguments: tuple[Any, ...]) -> None:
        async with room:
            await handle.score.remote(*arguments)

    started = time.perf_counter()
    await asyncio.gather(*(one(arguments) for arguments in refs))
    return time.perf_counter() - started


def overhead(name: str, rounds: int) -> dict[str, float]:
    """Images/s on both sides."""
    num_images = NUM_IMAGES.get(name, 24)
    config = experiment(name)
    reward = load_reward(name, config.rewards[name])
    seeds = iter(range(10**6))
    reward.score(*batch(name, num_images, next(seeds)))
    started = time.perf_counter()
    reward.score(*batch(name, num_images, next(seeds)))
    calls = max(4, round(2 / (time.perf_counter() - started)))  # about two seconds a round
    names = asyncio.run(deploy(config))
    ratios, alone, served = [], [], []
    try:
        asyncio.run(through_serve(name, [batch(name, num_images, next(seeds))]))
        for _ in range(rounds):
            batches = [batch(name, num_images, next(seeds)) for _ in range(calls)]
            started = time.perf_counter()
            for one in batches:
                reward.score(*one)
            alone.append(time.perf_counter() - started)
            served.append(asyncio.run(through_serve(name, batches)))
            ratios.append(served[-1] / alone[-1])
    finally:
        delete(list(names.values()))
    images = calls * num_images
    return {
        "images_per_batch": num_images,
        "in_process_ms_per_batch": round(1000 * statistics.median(alone) / calls, 1),
        "in_process_images_per_s": round(images / statistics.median(alone), 1),
        "serve_images_per_s": round(images / statistics.median(served), 1),
        "overhead": round(statistics.median(ratios) - 1, 3),
    }


async def callers(name: str, num_callers: int, requests: Sequence[Batch]) -> tuple[float, float]:
    """Images/s and the mean number of images per call of the model, for so many callers of one image at a time."""
    handle = serve.get_app_handle(f"rewards/{name}")
    waiting, held = list(requests), []

    async def caller() -> None:
        while waiting:
            scores = await handle.score.remote(*waiting.pop())
            held.append(float(scores.details["held"][0]))

    started = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(num_callers)))
    return len(held) / (time.perf_counter() - started), len(held) / sum(1 / one for one in held)


def batching() -> dict[str, dict[str, float]]:
    """Dynamic batching by the number of concurrent callers."""
    names = asyncio.run(deploy(experiment(BATCHED, batch_size=16, batch_wait_s=0.02), load_counted))
    found = {}
    try:
        for number in CALLERS:
            one = [batch(BATCHED, 1, 10**6 + 1000 * number + i) for i in range(max(8, min(2 * number, 64)))]
            per_s, held = asyncio.run(callers(BATCHED, number, one))
            found[str(number)] = {"images_per_s": round(per_s, 2), "images_per_call": round(held, 2)}
            print(f"{number:>3} callers: {per_s:.2f} images/s, {held:.1f} images per call of the model", flush=True)
    finally:
        delete(list(names.values()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NFT_RAY_WEIGHTS"] = folder
        os.environ["PYTHONPATH"] = str(REPO)
        write_clip(Path(folder) / "openai/clip-vit-large-patch14", CLIP_B)
        write_tokenizer(Path(folder) / "openai/clip-vit-large-patch14")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        rewards = {}
        for name in args.names:
            rewards[name] = overhead(name, args.rounds)
            print(f"{name}: {rewards[name]}", flush=True)
        record = {
            "what": "images/s of a reward in this process and through one Serve replica, the same batches, one thread",
            "date": datetime.now(UTC).date().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
            "versions": {name: version(name) for name in ("ray", "torch", "transformers", "rapidocr", "nft_ray")},
            "rewards": rewards,
            f"batching of {BATCHED}, by the number of callers": batching(),
        }
        ray.shutdown()
    (REPO / "benchmarks" / "results" / "rewards.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
