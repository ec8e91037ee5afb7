"""Does the quickstart's recipe LAST? The same YAML for four times its epochs, several seeds, one process each.

    python benchmarks/nano_stability.py [--seeds 0 1 2] [--parallel 2] [--set a.b=c ...] [--name nano_stability]

Each run is `nft-ray train configs/quickstart.yaml --local` with more epochs: the same algorithm to the last bit as on
Ray with one learner. An interrupted benchmark goes on where it stopped. Writes benchmarks/results/NAME.json and .png:
held-out strict GenEval accuracy (all 480 lines, no guidance, EMA policy) by epoch, and per seed the best and last.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from nft_ray.config import load

REPO = Path(__file__).parents[1]
RECIPE = REPO / "configs" / "quickstart.yaml"
METRIC = "eval/geneval/strict"
FACTOR = 4
TOLERANCE = 0.05


def run(seed: int, args: argparse.Namespace) -> list[dict[str, float]]:
    """One seed to its end; returns the evaluated epochs: {epoch, strict, reward}."""
    quickstart = load(RECIPE, args.set)
    epochs = FACTOR * quickstart.run.num_epochs
    name = f"{args.name}-seed{seed}"
    settings = [f"run.name={name}", f"run.seed={seed}", f"run.num_epochs={epochs}", "learner.num_workers=1", *args.set]
    command = [sys.executable, "-m", "nft_ray", "train", str(RECIPE), "--local"]
    for setting in settings:
        command += ["--set", setting]
    environment = os.environ | {"NFT_RAY_RUNS": str(args.root), "OMP_NUM_THREADS": "1"}
    with (args.root / f"{name}.log").open("a") as log:
        subprocess.run(command, cwd=REPO, env=environment, stdout=log, stderr=log, check=True)
    lines = [json.loads(line) for line in (args.root / name / "metrics.jsonl").read_text().splitlines()]
    print(f"seed {seed}: done", flush=True)
    return [
        {"epoch": line["epoch"], "strict": line[METRIC], "reward": line.get("reward/geneval")}
        for line in lines
        if METRIC in line
    ]


def summary(curve: list[dict[str, float]]) -> dict[str, float | bool]:
    """Base, best and last accuracy of one seed, and whether it lasted."""
    values = [point["strict"] for point in curve]
    best, last = max(values), values[-1]
    return {"base": values[0], "best": best, "last": last, "lasts": last >= best - TOLERANCE}


def draw(curves: dict[int, list[dict[str, float]]], quickstart_epochs: int, path: Path) -> None:
    """Accuracy by epoch, a line per seed; the quickstart ends at the dashed one."""
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    for seed, curve in curves.items():
        axes.plot([p["epoch"] for p in curve], [p["strict"] for p in curve], marker=".", label=f"seed {seed}")
    axes.axvline(quickstart_epochs, color="gray", linestyle="--", linewidth=1)
    axes.text(quickstart_epochs, 0.02, " the quickstart ends here", color="gray", transform=axes.get_xaxis_transform())
    axes.set(xlabel="epoch", ylabel="strict GenEval accuracy, 480 held-out lines", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, a core each")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="try another recipe")
    parser.add_argument("--name", default="nano_stability")
    parser.add_argument("--root", type=Path, default=REPO / "runs" / "stability")
    args = parser.parse_args()
    args.root.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.parallel) as pool:
        curves = dict(zip(args.seeds, pool.map(lambda seed: run(seed, args), args.seeds), strict=True))
    quickstart = load(RECIPE, args.set)
    results = REPO / "benchmarks" / "results"
    record = {
        "what": f"configs/quickstart.yaml for {FACTOR} times its {quickstart.run.num_epochs} epochs, {METRIC}",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, one thread per run",
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft", "nft_ray")},
        "overrides": args.set,
        "seeds": {str(seed): summary(curve) for seed, curve in curves.items()},
        "curves": {str(seed): curve for seed, curve in curves.items()},
    }
    (results / f"{args.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(curves, quickstart.run.num_epochs, results / f"{args.name}.png")
    print(json.dumps(record["seeds"], indent=1))


if __name__ == "__main__":
    main()
