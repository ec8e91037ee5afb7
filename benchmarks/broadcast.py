"""What does publishing a LoRA cost? 19 million float32 parameters from the object store to 1, 4 and 16 samplers.

    python benchmarks/broadcast.py [--samplers 1 4 16] [--repeats 7]

The real SamplerPool.load on one node: the weights by reference, every sampler's checksums, receipts verified. The cores
have no model: they check and copy the old policy's tensors, as a sampler that puts them into its transformer does.
A run announces two sets (old and EMA): both travel and both are checked. Beside it, one memcpy of the same bytes.
Writes benchmarks/results/broadcast.json: medians over the repeats, in seconds.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO))
os.environ["PYTHONPATH"] = str(REPO)  # the workers import this file's cores
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import ray

from actors.samplers import SamplerPool
from nft_ray.config import ExperimentConfig
from nft_ray.cores.publish import checksum
from nft_ray.types import (
    Adapters,
    AdapterWeights,
    CleanSamples,
    LoadReceipt,
    RolloutInfo,
    RolloutRequest,
    Weights,
)
from tests.fakes import fake_config

LAYERS, WIDTH, RANK, TARGETS = 24, 1536, 32, 8
"""SD3.5-medium with the published LoRA: 24 blocks of 8 layers, less one in the last block."""
PROBE = np.ones(1, dtype=np.float32)


class WeightsOnlyCore:
    """Does with a new version what SamplerCore does with its tensors, and nothing else."""

    def __init__(self, config: ExperimentConfig, worker: str) -> None:
        self._worker = worker
        self._held: Weights = {}

    def load(self, adapters: Adapters, weights: AdapterWeights) -> LoadReceipt:
        self._held = self._held or {name: np.empty_like(value) for name, value in weights.old.items()}
        for name, value in weights.old.items():
            np.copyto(self._held[name], value)
        return LoadReceipt(
            worker=self._worker,
            version=adapters.version,
            num_tensors=len(weights.old),
            checksums={"old": checksum(weights.old), "ema": checksum(weights.ema)},
            probe=PROBE,
            probe_base=PROBE,
        )

    def draw(self, request: RolloutRequest) -> np.ndarray:
        raise AssertionError("nobody rolls out here")

    def clean(self) -> tuple[RolloutInfo, CleanSamples | None]:
        raise AssertionError("nobody rolls out here")


def lora(seed: int) -> Weights:
    rng = np.random.default_rng(seed)
    names = [f"transformer_blocks.{i}.attn.{j}" for i in range(LAYERS) for j in range(TARGETS)][:-1]
    shapes = {"lora_A": (RANK, WIDTH), "lora_B": (WIDTH, RANK)}
    return {
        f"{name}.{kind}.weight": rng.standard_normal(shape, dtype=np.float32)
        for name in names
        for kind, shape in shapes.items()
    }


def announce(version: int) -> tuple[Adapters, float]:
    """A version in the object store, and the seconds that the learner's side of it takes: checksums and `put`."""
    weights = AdapterWeights(old=lora(2 * version), ema=lora(2 * version + 1))
    started = time.perf_counter()
    checksums = {"old": checksum(weights.old), "ema": checksum(weights.ema)}
    reference = ray.put(weights)
    took = time.perf_counter() - started
    return Adapters(
        version=version,
        weights=reference,
        num_tensors=len(weights.old),
        checksums=checksums,
        probe=PROBE,
        probe_base=PROBE,
    ), took


async def broadcast(num_samplers: int, repeats: int) -> dict[str, float]:
    config = fake_config(
        run={"name": f"broadcast-{num_samplers}"},
        sampler={"num_workers": num_samplers, "num_cpus": 0.05, "timeout_s": 300},
        cluster={"wait_s": 300},
    )
    pool, loads, puts = SamplerPool(config, WeightsOnlyCore), [], []
    await pool.start()
    try:
        for version in range(repeats + 1):
            adapters, put = announce(version)
            started = time.perf_counter()
            await pool.load(adapters)
            loads.append(time.perf_counter() - started)
            puts.append(put)
    finally:
        pool.close()
    return {
        "announce_s": round(statistics.median(puts[1:]), 3),
        "load_s": round(statistics.median(loads[1:]), 3),  # the first version makes the samplers' buffers
        "slowest_load_s": round(max(loads[1:]), 3),
    }


def one_process(repeats: int) -> dict[str, float]:
    """One memcpy of old and EMA together, and one sampler's checksums, without Ray."""
    weights = [lora(0), lora(1)]
    source = np.concatenate([value.ravel() for part in weights for value in part.values()])
    target = np.empty_like(source)
    np.copyto(target, source)  # the pages are there
    copies, sums = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        np.copyto(target, source)
        copies.append(time.perf_counter() - started)
        started = time.perf_counter()
        for part in weights:
            checksum(part)
        sums.append(time.perf_counter() - started)
    return {
        "parameters_each": source.size // 2,
        "bytes_of_both": source.nbytes,
        "memcpy_s": round(statistics.median(copies), 4),
        "checksums_s": round(statistics.median(sums), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samplers", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    record: dict[str, Any] = {
        "what": "seconds to publish a LoRA (old and EMA) of 19 M float32 parameters each to samplers on one node",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "versions": {name: version(name) for name in ("ray", "numpy", "nft_ray")},
        "one_process": one_process(args.repeats),
    }
    print(record["one_process"], flush=True)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=2**30)
    try:
        for count in args.samplers:
            record[f"samplers {count}"] = asyncio.run(broadcast(count, args.repeats))
            print(count, record[f"samplers {count}"], flush=True)
    finally:
        ray.shutdown()
    (REPO / "benchmarks" / "results" / "broadcast.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
