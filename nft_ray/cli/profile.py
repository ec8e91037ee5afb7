"""`nft-ray profile`: measure the device at hand and write the YAML that `nft-ray plan --device FILE` reads."""

import argparse
import time
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nft_ray.cli.console import say


def add_parser(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser("profile", help="measure this machine's GPU, or one CPU thread, for `nft-ray plan`")
    command.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is a GPU")
    command.add_argument("--name", help="what plans call it (default: the name of the file)")
    command.add_argument("--output", metavar="FILE", default="device.yaml", help="default: device.yaml")


def profile(args: argparse.Namespace) -> int:
    """Measure, write, say what was found; returns the exit status."""
    import torch

    from nft_ray.planning.devices import device_named
    from nft_ray.planning.measure import measured

    output = Path(args.output)
    if not output.parent.is_dir():
        raise ValueError(f"--output {output}: no such folder; name a file in one that is there")
    started = time.perf_counter()
    data = measured(args.name or output.stem, args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    output.write_text(f"# nft-ray plan CONFIG --device {output}\n{OmegaConf.to_yaml(OmegaConf.create(data))}")
    device = device_named(str(output))  # what was written is what is read
    rates = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in device.matmul_per_s.items())
    say(f"matrix product, TFLOP/s: {rates}; memory {device.memory_bytes_per_s / 1e9:.3g} GB/s")
    say(f"written in {time.perf_counter() - started:.0f} s: {output}")
    return 0
