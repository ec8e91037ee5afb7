"""Does anything grow that should not? The learner over three sizes of an epoch, the driver over 150 epochs.

    python benchmarks/scaling.py [--epochs 150]

Learner: one update of nano-sd3 over 1, 2 and 4 times as many samples, each in a process of its own: CPU seconds (one
thread: what else runs does not count) and how far the peak memory rose above the loaded learner's. Driver: the real
trainer, pools and Serve around cores that cost nothing, its resident memory after every epoch. Writes
benchmarks/results/scaling.json and scaling.png.
"""

import argparse
import asyncio
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO))
os.environ["PYTHONPATH"] = str(REPO)  # the workers import the fakes, too
os.environ["OMP_NUM_THREADS"] = "1"

import matplotlib
import numpy as np

matplotlib.use("agg")
from matplotlib import pyplot

RESULTS = REPO / "benchmarks" / "results"
MIB = 2**20
SIZES = (24, 48, 96)
"""Groups of an epoch."""
IMAGES, TIMES, PIXELS = 16, 9, 32
STRICT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""glibc gives back what is freed: what is resident is what is in use. It is slower, so seconds are measured without."""
WARM_UP_EPOCHS = 10
"""Of the driver: until caches and pools have their size."""


def resident_mib() -> float:
    """This process's resident memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / MIB


def peak_mib() -> float:
    """The most that was resident since `forget_peak`."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def forget_peak() -> None:
    """Loading a model needs more for a moment than holding it: that moment is not what is measured."""
    Path("/proc/self/clear_refs").write_text("5")


def measure_learner(num_groups: int) -> dict[str, float]:
    """One update of `num_groups` groups, after a small one that warms up; run in a process of its own."""
    from nft_ray.config import load
    from nft_ray.cores.learner import LearnerCore
    from nft_ray.types import TrainGroup

    settings = [f"model.height={PIXELS}", f"model.width={PIXELS}", f"sampler.num_times={TIMES}"]
    settings += ["learner.num_workers=1", "learner.optimizer_steps=1"]
    learner = LearnerCore(load(REPO / "configs" / "quickstart.yaml", settings))

    def update(epoch: int, count: int) -> int:
        samples = [clean_samples(learner.model.latent_shape, learner.model, seed=index) for index in range(count)]
        optimality = np.linspace(0, 1, IMAGES, dtype=np.float32)
        groups = [
            TrainGroup(group_id=i, samples=None, weight=optimality, step=np.zeros(IMAGES, dtype=np.int32))
            for i in range(count)
        ]
        learner.update(epoch, groups, samples, (count * IMAGES,))
        return sum(part.x0.nbytes + part.v_old.nbytes for part in samples)

    update(0, 1)
    forget_peak()
    before, cpu_s, wall_s = resident_mib(), time.process_time(), time.perf_counter()
    num_bytes = update(1, num_groups)
    peak = peak_mib()
    return {
        "samples": num_groups * IMAGES,
        "cpu_s": round(time.process_time() - cpu_s, 2),
        "wall_s": round(time.perf_counter() - wall_s, 2),
        "samples_mib": round(num_bytes / MIB, 2),
        "peak_above_loaded_mib": round(peak - before, 2),
    }


def learner_process(num_groups: int, environment: dict[str, str]) -> dict[str, float]:
    """`measure_learner` in a process of its own."""
    command = [sys.executable, __file__, "--learner", str(num_groups)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def clean_samples(shape: tuple[int, ...], model: Any, seed: int) -> Any:
    """One group of random clean samples, as a sampler would send them."""
    from nft_ray.types import CleanSamples

    rng = np.random.default_rng(seed)
    _, _, conditioning = model.probe()
    return CleanSamples(
        x0=rng.standard_normal((IMAGES, *shape), dtype=np.float32),
        t=rng.uniform(0.1, 0.9, (IMAGES, TIMES)).astype(np.float32),
        noise_seeds=rng.integers(0, 2**32, (IMAGES, TIMES)),
        v_old=rng.standard_normal((IMAGES, TIMES, *shape), dtype=np.float32),
        v_ref=None,
        conditioning={name: value.float().cpu().numpy() for name, value in conditioning.items()},
    )


class DriverMemory:
    """A tracker that keeps the driver's resident memory after every epoch."""

    def __init__(self) -> None:
        self.mib: list[float] = []

    def log_epoch(self, epoch: int, metrics: dict[str, float], steps: tuple[dict[str, float], ...]) -> None:
        self.mib.append(round(resident_mib(), 2))
        print(f"epoch {epoch}: driver {self.mib[-1]:.1f} MiB", flush=True)

    def log_evaluation(self, epoch: int, result: Any) -> None:
        """Not measured."""

    def log_late(self, epoch: int, metrics: dict[str, float]) -> None:
        """Not measured."""

    def rewind(self, epoch: int) -> None:
        """Nothing is kept."""

    def log_progress(self, what: str, done: int, total: int) -> None:
        """Nobody watches."""


def measure_driver(num_epochs: int) -> list[float]:
    """MiB after each epoch of 48 groups x 24 images, with cores that cost nothing."""
    import ray

    from actors.roles import ray_roles
    from deployments.build import deploy
    from deployments.plane import delete
    from nft_ray.prompts.draw import PromptSet
    from nft_ray.runs.folder import RunFolder
    from nft_ray.trainer import Trainer
    from nft_ray.types import Prompt
    from tests.fakes import FakeLearnerCore, FakeSamplerCore, fake_config, fake_load_reward

    config = fake_config(
        run={"num_epochs": num_epochs, "checkpoint_every": 10**6},
        model={"height": 64, "width": 64},
        prompts={"groups_per_epoch": 48, "images_per_group": 24},
        sampler={"num_workers": 2, "num_cpus": 0.5, "num_times": 9, "num_steps": 10},
        learner={"num_workers": 1, "num_cpus": 0.5},
        rewards={"jpeg_compressibility": {"num_replicas": 1, "num_cpus": 0.5, "batch_size": 1}},
        evaluation={"every": 10**6, "batch_size": 64},
    )
    lines = tuple(Prompt(id=i, text=f"prompt {i}") for i in range(192))
    memory = DriverMemory()

    async def train(folder: Path) -> None:
        async with ray_roles(config, FakeSamplerCore, FakeLearnerCore) as roles:
            prompts = PromptSet(lines=lines), PromptSet(lines=lines[:64])
            await Trainer(config, roles, RunFolder(folder), memory, *prompts).run()

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=500 * MIB)
    try:
        names = asyncio.run(deploy(config, fake_load_reward))
        try:
            with tempfile.TemporaryDirectory() as folder:
                asyncio.run(train(Path(folder)))
        finally:
            delete(list(names.values()))
    finally:
        ray.shutdown()
    return memory.mib


def line(x: list[float], y: list[float]) -> tuple[float, float, float]:
    """Least squares y = a + b x: (b, a, R^2)."""
    slope, start = np.polyfit(x, y, 1)
    rest = np.array(y) - (start + slope * np.array(x))
    spread = float(((np.array(y) - np.mean(y)) ** 2).sum())
    return float(slope), float(start), 1 - float((rest**2).sum()) / spread if spread else 1.0


def draw(learner: list[dict[str, float]], driver: list[float], path: Path) -> None:
    figure, (seconds, memory, flat) = pyplot.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    samples = [one["samples"] for one in learner]
    seconds.plot(samples, [one["cpu_s"] for one in learner], "o-")
    seconds.set(title="learner: CPU seconds of an update", xlabel="samples", xlim=0, ylim=0)
    memory.plot(samples, [one["peak_above_loaded_mib"] for one in learner], "o-", label="peak above the loaded learner")
    memory.plot(samples, [one["samples_mib"] for one in learner], "o--", label="the samples themselves")
    memory.set(title="learner: memory, MiB", xlabel="samples", xlim=0, ylim=0)
    memory.legend()
    flat.plot(range(1, len(driver) + 1), driver)
    flat.set(title="driver: resident MiB", xlabel="epoch", ylim=(0, 1.2 * max(driver)))
    for axes in (seconds, memory, flat):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--learner", type=int, help=argparse.SUPPRESS)  # one size, in this process
    args = parser.parse_args()
    if args.learner:
        print(json.dumps(measure_learner(args.learner)))
        return
    learner = []
    for size in SIZES:
        seconds, memory = learner_process(size, {}), learner_process(size, STRICT)
        learner.append(seconds | {"peak_above_loaded_mib": memory["peak_above_loaded_mib"]})
        print(learner[-1], flush=True)
    driver = measure_driver(args.epochs)
    samples = [one["samples"] for one in learner]
    cpu_s = line(samples, [one["cpu_s"] for one in learner])
    peak = line([one["samples_mib"] for one in learner], [one["peak_above_loaded_mib"] for one in learner])
    later = driver[WARM_UP_EPOCHS:] or driver
    growth, _, _ = line([float(epoch) for epoch in range(len(later))], later)
    record = {
        "what": f"learner: nano-sd3 at {PIXELS} px, {TIMES} times; driver: 48 x 24 images per epoch, free cores",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "versions": {name: version(name) for name in ("ray", "torch", "nft_ray")},
        "learner": learner,
        "learner_ms_per_sample": round(1000 * cpu_s[0], 2),
        "learner_seconds_r2": round(cpu_s[2], 5),
        "learner_peak_mib_per_mib_of_samples": round(peak[0], 2),
        "learner_peak_r2": round(peak[2], 5),
        "driver_mib": driver,
        "driver_growth_kib_per_epoch": round(1024 * growth, 1),
    }
    (RESULTS / "scaling.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(learner, driver, RESULTS / "scaling.png")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
