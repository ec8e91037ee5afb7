"""What does the control plane cost? The real trainer, pools, Serve and object store around cores that cost nothing.

    python benchmarks/control_plane.py [--epochs 12] [--groups 48] [--images 24] [--pixels 64]

Prints seconds per epoch (median, without the first two) and where they go; writes
benchmarks/results/control_plane.json. Rollouts and scores overlap: their seconds are wall-clock seconds in which at
least one of them was outstanding.
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
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO))
os.environ["PYTHONPATH"] = str(REPO)  # the workers import the fakes, too

import ray

from actors.roles import ray_roles
from deployments.build import deploy
from deployments.plane import delete
from nft_ray.config import ExperimentConfig
from nft_ray.prompts.draw import PromptSet
from nft_ray.roles import Roles
from nft_ray.runs.folder import RunFolder
from nft_ray.trainer import Trainer
from nft_ray.types import EvalResult, Prompt
from tests.fakes import FakeLearnerCore, FakeSamplerCore, fake_config, fake_load_reward


class Clock:
    """Wall-clock seconds in which at least one call of a kind was outstanding."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: dict[str, int] = defaultdict(int)
        self._since: dict[str, float] = {}

    @contextmanager
    def on(self, kind: str) -> Iterator[None]:
        if not self._open[kind]:
            self._since[kind] = time.perf_counter()
        self._open[kind] += 1
        try:
            yield
        finally:
            self._open[kind] -= 1
            if not self._open[kind]:
                self.seconds[kind] += time.perf_counter() - self._since[kind]

    def take(self) -> dict[str, float]:
        """What each kind took since the last time; what is outstanding counts up to now."""
        now = time.perf_counter()
        for kind, count in self._open.items():
            if count:
                self.seconds[kind] += now - self._since[kind]
                self._since[kind] = now
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken


class Timed:
    """A role whose coroutines are on the clock."""

    def __init__(self, role: Any, clock: Clock, kinds: dict[str, str]) -> None:
        self._role, self._clock, self._kinds = role, clock, kinds

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._role, name)
        if name not in self._kinds:
            return method

        async def timed(*arguments: Any) -> Any:
            with self._clock.on(self._kinds[name]):
                return await method(*arguments)

        return timed


class EpochTimes:
    """A tracker that keeps what each epoch took."""

    def __init__(self, clock: Clock) -> None:
        self.epochs: list[dict[str, float]] = []
        self._clock, self._last = clock, time.perf_counter()

    def log_epoch(self, epoch: int, metrics: dict[str, float], steps: tuple[dict[str, float], ...]) -> None:
        now = time.perf_counter()
        self.epochs.append({"epoch": now - self._last, **self._clock.take()})
        self._last = now
        print(f"epoch {epoch}: {self.epochs[-1]['epoch']:.2f} s", flush=True)

    def log_evaluation(self, epoch: int, result: EvalResult) -> None:
        self._clock.take()
        self._last = time.perf_counter()

    def log_late(self, epoch: int, metrics: dict[str, float]) -> None:
        """Not measured."""

    def rewind(self, epoch: int) -> None:
        """Nothing is kept."""

    def log_progress(self, what: str, done: int, total: int) -> None:
        """Nobody watches."""


def experiment(args: argparse.Namespace, staleness: int) -> ExperimentConfig:
    return fake_config(
        run={"num_epochs": args.epochs, "checkpoint_every": 10**6, "max_staleness": staleness},
        model={"height": args.pixels, "width": args.pixels},
        prompts={"groups_per_epoch": args.groups, "images_per_group": args.images},
        sampler={"num_workers": 2, "num_cpus": 0.5, "num_times": 9, "num_steps": 10},
        learner={"num_workers": 1, "num_cpus": 0.5},
        rewards={"jpeg_compressibility": {"num_replicas": 1, "num_cpus": 0.5, "batch_size": 1}},
        evaluation={"every": 10**6, "batch_size": 64},
    )


async def measure(config: ExperimentConfig, clock: Clock, folder: Path) -> list[dict[str, float]]:
    lines = tuple(Prompt(id=i, text=f"prompt {i}") for i in range(4 * config.prompts.groups_per_epoch))
    tracker = EpochTimes(clock)
    async with ray_roles(config, FakeSamplerCore, FakeLearnerCore) as roles:
        timed: Any = Roles(
            samplers=Timed(roles.samplers, clock, {"rollout": "rollout", "load": "publish"}),
            scorers=Timed(roles.scorers, clock, {"score": "score"}),
            learners=Timed(roles.learners, clock, {"update": "update"}),
        )
        trainer = Trainer(
            config, timed, RunFolder(folder), tracker, PromptSet(lines=lines), PromptSet(lines=lines[:64])
        )
        await trainer.run()
    return tracker.epochs


def summarise(epochs: list[dict[str, float]]) -> dict[str, float]:
    """Median of each part over the epochs, without the first two, which warm up, and the last."""
    kept = epochs[2:-1] or epochs
    kinds = sorted({kind for epoch in kept for kind in epoch})
    return {kind: round(statistics.median(epoch.get(kind, 0.0) for epoch in kept), 4) for kind in kinds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--groups", type=int, default=48)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--pixels", type=int, default=64)
    args = parser.parse_args()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=500 * 2**20)
    record: dict[str, Any] = {
        "what": f"seconds per epoch, {args.groups} groups x {args.images} images, {args.pixels} px, cores cost nothing",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "versions": {name: version(name) for name in ("ray", "torch", "nft_ray")},
    }
    try:
        for staleness in (0, 1):
            config = experiment(args, staleness)
            names = asyncio.run(deploy(config, fake_load_reward))
            try:
                with tempfile.TemporaryDirectory() as folder:
                    epochs = asyncio.run(measure(config, Clock(), Path(folder)))
            finally:
                delete(list(names.values()))
            record[f"max_staleness {staleness}"] = summarise(epochs)
    finally:
        ray.shutdown()
    (REPO / "benchmarks" / "results" / "control_plane.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
