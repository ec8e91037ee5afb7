"""A long run under fire: random kills every few seconds, and what must stay flat is measured.

    python -m tests.chaos.soak --minutes 30 --seed 0 --output benchmarks/results/soak

900 tiny epochs, again and again until the time is over. Every few seconds a sampler, a learner, a reward replica or a
node is killed, or a sampler is stopped; now and then the driver, and the same command goes on. Measured, every two
seconds and between kills: the driver's memory and file handles, the objects in the store, the processes of the cluster.
Their slopes per hour are fitted over each life of the driver, from a minute after its first epoch to its last one.
"""

import argparse
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from tests.chaos.cluster import LEARNER, REPLICA, SAMPLER, Cluster, cluster, kill
from tests.chaos.running import Run
from tests.chaos.table import Table, markdown

EPOCHS = 900
DRIVER_S = (480.0, 780.0)
"""Between kills of the driver: long enough for a slope."""
WARM_S = 60.0
MEASURE_S = 2.0
SERIES = ("driver memory MiB", "driver file handles", "driver threads", "objects in the store MiB", "processes")
SETTINGS = (
    f"run.num_epochs={EPOCHS}",
    "run.keep_checkpoints=2",
    "sampler.num_workers=2",
    "sampler.timeout_s=20",
    "learner.num_workers=1",
    "learner.max_restarts=100000",
    "rewards.geneval.num_replicas=2",
    "scorers.timeout_s=20",
)


@dataclass(frozen=True)
class Sample:
    """One look at a driver and its cluster."""

    life: int
    at_s: float
    epoch: int
    values: tuple[float, ...]


def look(run: Run, ray: Cluster, life: int, started: float) -> Sample | None:
    """None where the driver ends meanwhile."""
    try:
        driver = psutil.Process(run.pid)
        memory, handles, threads = driver.memory_info().rss / 2**20, driver.num_fds(), driver.num_threads()
    except psutil.Error:
        return None
    values = (memory, handles, threads, ray.store_mib(), len(ray.processes()))
    return Sample(life, time.monotonic() - started, run.epoch, tuple(float(value) for value in values))


def slopes(samples: list[Sample]) -> dict[str, float]:
    """Per hour: of each series the median over the driver's lives, warmed up, that lasted a minute beyond that."""
    found: dict[str, list[float]] = {name: [] for name in SERIES}
    for life in sorted({sample.life for sample in samples}):
        own = [sample for sample in samples if sample.life == life]
        at_work = [sample for sample in own if own[0].epoch < sample.epoch < own[-1].epoch]
        warm = [sample for sample in at_work if sample.at_s - at_work[0].at_s >= WARM_S]
        if len(warm) < 20 or warm[-1].at_s - warm[0].at_s < WARM_S:
            continue
        hours = np.array([sample.at_s for sample in warm]) / 3600
        for index, name in enumerate(SERIES):
            found[name].append(float(np.polyfit(hours, [sample.values[index] for sample in warm], 1)[0]))
    return {name: statistics.median(values) for name, values in found.items() if values}


def shoot(ray: Cluster, run: Run, chosen: random.Random, events: Counter[str]) -> None:
    """One thing goes wrong."""
    targets: dict[str, Callable[[], bool]] = {
        "a sampler is killed": lambda: shot(ray, SAMPLER, chosen, signal.SIGKILL),
        "a sampler hangs (SIGSTOP)": lambda: shot(ray, SAMPLER, chosen, signal.SIGSTOP),
        "a learner is killed": lambda: shot(ray, LEARNER, chosen, signal.SIGKILL),
        "a reward replica is killed": lambda: shot(ray, REPLICA, chosen, signal.SIGKILL),
        "a node is lost, another comes": lambda: replaced(ray),
    }
    event = chosen.choices(list(targets), weights=(6, 1, 3, 4, 1))[0]
    if targets[event]():
        events[event] += 1


def shot(ray: Cluster, title: str, chosen: random.Random, number: int) -> bool:
    pids = ray.some(title, 1, chosen)
    kill(pids, number)
    return bool(pids)


def replaced(ray: Cluster) -> bool:
    name = next(name for name in ray.nodes if name != "head")
    ray.lose(name)
    ray.start_node(f"n{time.monotonic_ns()}", 4)
    return True


def soak(folder: Path, minutes: float, seed: int, every: tuple[float, float]) -> dict[str, Any]:
    """Run under fire for so long; what happened and what was measured."""
    chosen, table, events = random.Random(seed), Table(folder / "rows.jsonl"), Counter[str]()
    samples: list[Sample] = []
    with cluster(cpus=4) as ray:
        ray.add("n0", 4)
        started, number, life, finished = time.monotonic(), 0, 0, 0
        run = Run(f"soak-{number}", folder, table, ray.environment, *SETTINGS).start()
        next_shot, next_death = 20.0, chosen.uniform(*DRIVER_S)
        while (now := time.monotonic() - started) < minutes * 60:
            if run.process is not None and (status := run.process.poll()) is not None:
                if status == 0:
                    run.whole(EPOCHS)
                    number, finished = number + 1, finished + EPOCHS
                    run = Run(f"soak-{number}", folder, table, ray.environment, *SETTINGS)
                elif status == 75:
                    events["the run ends with status 75, and is repeated"] += 1
                    sys.stdout.write(f"{run.last_line}\n")
                elif status != -signal.SIGKILL:
                    raise AssertionError(f"exit status {status}: {run.said[-3000:]}")
                life += 1
                run.start()
            if (sample := look(run, ray, life, started)) is not None:
                samples.append(sample)
            if now >= next_death:
                run.send(signal.SIGKILL)
                events["the driver is killed"] += 1
                next_death = now + chosen.uniform(*DRIVER_S)
            elif now >= next_shot and run.epoch >= 0:
                shoot(ray, run, chosen, events)
                next_shot = now + chosen.uniform(*every)
            time.sleep(MEASURE_S)
        finished += max(0, run.epoch)
        run.send(signal.SIGTERM)
        status = run.end(90)
        assert status in (0, 75), run.said[-3000:]
        epochs = [line["epoch"] for line in run.lines()]
        assert epochs == list(range(len(epochs))), epochs
        ray.nothing_left()
    for event, count in events.items():
        table.add(event, injected=count)
    return {
        "minutes": minutes,
        "seed": seed,
        "epochs": finished,
        "events": dict(events),
        "slopes_per_hour": slopes(samples),
        "ranges": {
            name: [min(sample.values[index] for sample in samples), max(sample.values[index] for sample in samples)]
            for index, name in enumerate(SERIES)
        },
        "samples": [[sample.life, round(sample.at_s, 1), sample.epoch, *sample.values] for sample in samples],
    }


def picture(found: dict[str, Any], file: Path) -> None:
    """A panel per series, a line per life of the driver."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(SERIES), 1, figsize=(9, 11), sharex=True)
    rows = np.array(found["samples"])
    for index, (name, panel) in enumerate(zip(SERIES, panels, strict=True)):
        for life in np.unique(rows[:, 0]):
            own = rows[rows[:, 0] == life]
            panel.plot(own[:, 1] / 60, own[:, 3 + index], linewidth=1)
        slope = found["slopes_per_hour"].get(name)
        panel.set_title(name if slope is None else f"{name}: {slope:+.1f} per hour", fontsize=9, loc="left")
        panel.set_ylim(bottom=0)
    panels[-1].set_xlabel("minutes")
    figure.tight_layout()
    figure.savefig(file, dpi=100)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--minutes", type=float, default=30.0)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--every", type=float, nargs=2, default=(4.0, 12.0), metavar="S", help="between kills")
    arguments.add_argument("--output", type=Path, help="OUTPUT.json and OUTPUT.png")
    args = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        found = soak(Path(folder), args.minutes, args.seed, tuple(args.every))
        sys.stdout.write(markdown(Table(Path(folder) / "rows.jsonl").rows()))
    for name in SERIES:
        low, high = found["ranges"][name]
        slope = found["slopes_per_hour"].get(name)
        shown = "too short for a slope" if slope is None else f"{slope:+.2f} per hour"
        sys.stdout.write(f"{name}: {low:.0f} to {high:.0f}, {shown}\n")
    sys.stdout.write(f"{found['epochs']} epochs in {args.minutes:g} minutes, none lost\n")
    if args.output:
        args.output.with_suffix(".json").write_text(json.dumps(found) + "\n")
        picture(found, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
