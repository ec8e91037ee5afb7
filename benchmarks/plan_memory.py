"""Is the memory that a plan traces the memory that is used? Peaks measured on this CPU beside `nft_ray/planning`'s.

    python benchmarks/plan_memory.py [--size small|middle] [--part forward|decode|training|checkpointing]

SD3's architecture with random weights (random_sd3.py) at two sizes, float32, one thread. Each measurement is a process
of its own: after a first run of the same work its resident memory is noted, the kernel's high-water mark is reset
(/proc/self/clear_refs), the work is done again, and what the mark is above before is the peak. malloc gives every block
back at once (MALLOC_ variables), as a plan assumes that a tensor that is gone takes no memory.
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[1]
PARTS = ("forward", "decode", "training", "checkpointing")
BATCHES = {"small": 16, "middle": 8}
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
TOKENS = 128
BOUND = 0.2


def pipeline_size(name: str) -> Any:
    """6 layers of 384 at 128 pixels; 8 layers of 512 at 256 pixels. 205 text tokens, as SD3.5's."""
    from random_sd3 import Size, _transformer

    layers, heads, pixels = {"small": (6, 6, 128), "middle": (8, 8, 256)}[name]
    return Size(
        transformer=_transformer(layers=layers, heads=heads, head=64, dual=layers // 2, context=128, pooled=128),
        vae_channels=(32, 64, 128, 128),
        clip_widths=(64, 64),
        t5_width=128,
        t5_tokens=TOKENS,
        pixels=pixels,
        images_per_group=4,
        groups_per_epoch=1,
    )


def peak(work: Callable[[], Any]) -> int:
    """Bytes above what is resident before."""
    work()
    gc.collect()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    work()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


def measure(size_name: str, part: str, batch: int, folder: Path) -> dict[str, Any]:
    """One part at one size, in this process."""
    import torch
    from random_sd3 import save_pipeline

    from nft_ray.config import ModelConfig
    from nft_ray.models.base import load_model, quiet_libraries
    from nft_ray.models.lora import attach
    from nft_ray.planning import costs

    torch.set_num_threads(1)
    quiet_libraries()
    size, device = pipeline_size(size_name), torch.device("cpu")
    save_pipeline(size, folder, device, torch.float32)
    config = ModelConfig(path=str(folder), height=size.pixels, width=size.pixels, max_sequence_length=TOKENS)
    model = load_model(config, device)
    shape = costs.latent_shape(config)
    x, t = torch.randn(batch, *shape), torch.rand(batch)
    conditioning = {
        "prompt_embeds": torch.randn(batch, 77 + TOKENS, 128),
        "pooled_prompt_embeds": torch.randn(batch, 128),
    }
    if part in ("training", "checkpointing"):
        parameters = attach(model.transformer, config.lora, model.lora_targets, seed=0)
        if part == "checkpointing":
            model.transformer.enable_gradient_checkpointing()

        def work() -> None:
            model.velocity(x, t, conditioning).pow(2).mean().backward()
            for value in parameters.values():
                value.grad = None

        traced = costs.training(config, checkpointing=part == "checkpointing")
    else:
        traced = costs.forward(config) if part == "forward" else costs.decode(config)

        @torch.no_grad()
        def work() -> None:
            model.velocity(x, t, conditioning) if part == "forward" else model.decode(x)

    measured = peak(work)
    return {
        "size": size_name,
        "part": part,
        "batch": batch,
        "measured_mib": round(measured / 2**20, 1),
        "traced_mib": round(batch * traced.bytes / 2**20, 1),
        "traced / measured": round(batch * traced.bytes / measured, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(BATCHES))
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--batch", type=int, help="of the micro-batch (default: 16 small, 8 middle)")
    parser.add_argument("--here", action="store_true", help="in this process, one line of JSON")
    parser.add_argument("--output", type=Path, default=REPO / "benchmarks" / "results" / "plan_memory.json")
    args = parser.parse_args()
    if args.here:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(args.size, args.part, args.batch, Path(folder))))
        return
    rows = []
    for size in [args.size] if args.size else BATCHES:
        for part in [args.part] if args.part else PARTS:
            batch = str(args.batch or BATCHES[size])
            command = [sys.executable, __file__, "--here", "--size", size, "--part", part, "--batch", batch]
            environment = os.environ | ALLOCATOR | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    record = {
        "what": "peak memory of one micro-batch, measured in a CPU process and traced: benchmarks/plan_memory.py",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft", "nft_ray")},
        "bound": BOUND,
        "rows": rows,
    }
    if not args.size and not args.part and not args.batch:
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    worst = max(abs(row["traced / measured"] - 1) for row in rows)
    print(f"largest difference {worst:.1%} (bound {BOUND:.0%})")


if __name__ == "__main__":
    main()
