"""What an epoch of every preset takes as planned, today and with what could be different. Nothing is measured here.

    python benchmarks/plans.py [--device h100] [--gpus 1 8 32]

Writes benchmarks/results/plans.json: for every preset and its profile for so many cards the seconds of an epoch and
where they go, the bound, the same with each of `SYSTEMS`, and the best layout that was found.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO))

from nft_ray.cli.plan import configured, ground_of, stages_of
from nft_ray.planning.devices import device_named
from nft_ray.planning.forecast import forecast
from nft_ray.planning.layouts import best
from nft_ray.planning.places import default_nodes
from nft_ray.planning.simulation import System
from nft_ray.planning.words import duration

PRESETS = (
    "sd3_geneval",
    "sd3_ocr",
    "sd3_pickscore",
    "sd3_hpsv2",
    "sd3_multi_reward",
    "sd3_staged",
    "flux_pickscore",
    "quickstart",
)
SYSTEMS = {
    "images and samples as one answer": System(images_first=False, frees_early=False),
    "groups in two parts": System(parts=2),
}


def planned(name: str, gpus: int, device: str) -> dict[str, Any]:
    """One preset on so many cards."""
    started = time.process_time()
    config, profile = configured(str(REPO / "configs" / f"{name}.yaml"), [], gpus)
    ground = ground_of(config, default_nodes(gpus), device_named(device))
    stages, trouble = stages_of(config, ground)
    layouts = best(config, ground)
    found: dict[str, Any] = {"preset": name, "gpus": gpus, "profile": profile, "trouble": trouble}
    if stages:
        slowest = max(stages, key=lambda stage: stage.epoch_s)
        found |= {
            "epoch_s": round(slowest.epoch_s, 2),
            "phases_s": {what: round(seconds, 2) for what, seconds in slowest.phases.items()},
            "at_work": {role: round(share, 3) for role, share in slowest.busy.items()},
            "bound": slowest.bound.text,
            "evaluation_s": round(slowest.evaluation_s, 1),
            "run_s": round(sum(stage.seconds for stage in stages)),
            "store_gb": round(max(stage.store for stage in stages) / 1e9, 2),
        }
        for what, system in SYSTEMS.items():
            other = forecast(slowest.config, slowest.work, slowest.seats, num_lines=0, system=system)
            found[f"epoch_s, {what}"] = round(other.epoch_s, 2)
    if layouts:
        found["best"] = {
            "about": layouts[0].about,
            "epoch_s": round(layouts[0].epoch_s, 2),
            "run_s": round(layouts[0].seconds),
            "gpus": layouts[0].gpus,
            "set": layouts[0].lines,
        }
    return found | {"planned_in_cpu_s": round(time.process_time() - started, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="h100")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--output", type=Path, default=REPO / "benchmarks" / "results" / "plans.json")
    args = parser.parse_args()
    rows = []
    for name in PRESETS:
        for gpus in args.gpus:
            row = planned(name, gpus, args.device)
            rows.append(row)
            run = duration(row["run_s"]) if "run_s" in row else "-"
            other = row.get("best", {})
            print(
                f"{name:18} {gpus:3} {row.get('epoch_s', float('nan')):8.1f} s {run:>8}  "
                f"best {other.get('epoch_s', float('nan')):8.1f} s  {row.get('bound', row['trouble'])}",
                flush=True,
            )
    args.output.write_text(json.dumps({"device": args.device, "plans": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
