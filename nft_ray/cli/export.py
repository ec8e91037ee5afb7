"""`nft-ray export RUN`: a checkpoint's EMA policy for plain diffusers, with its card; merged and pushed on request.

What can be known to fail (no checkpoint, no token) fails before anything is written.
"""

import argparse
import sys
from pathlib import Path

from nft_ray.runs.export import export_run
from nft_ray.runs.push import push, push_token


def export_command(args: argparse.Namespace) -> int:
    """Write the export, and push it where that is asked; returns the exit status."""
    run, output = Path(args.run).expanduser(), Path(args.output).expanduser() if args.output else None
    token = push_token(args.push) if args.push else None
    folder, written = export_run(run, output, epoch=args.checkpoint, merge=args.merge, hub_id=args.push)
    for name in written:
        sys.stdout.write(f"{folder / name}\n")
    if token:
        sys.stdout.write(f"{push(folder, args.push, token, written)}\n")
    return 0
