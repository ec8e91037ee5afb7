"""`nft-ray data`: the prompt sets. Needs no Ray and no torch.

fetch [NAMES]                      download the published prompt sets: geneval, ocr, pickscore, drawbench
make geneval --output FILE         write prompts by GenEval's template rules, with their metadata
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from nft_ray.cli.console import say
from nft_ray.prompts.geneval import lines
from nft_ray.prompts.sets import DATASETS, data_root, dataset_files


def add_parser(commands: Any) -> None:
    """`data` and what comes after it."""
    root = commands.add_parser("data", help="fetch or make prompt sets").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    fetch = root.add_parser("fetch", help="download the published prompt sets")
    fetch.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(DATASETS)} (default: all)")
    fetch.add_argument("--data", help="folder (default: NFT_RAY_DATA, or ~/.cache/nft_ray/data)")
    fetch.set_defaults(command_function=_fetch)

    make = root.add_parser("make", help="write prompts by template rules")
    make.add_argument("kind", choices=["geneval"])
    make.add_argument("--output", type=Path, required=True, metavar="FILE", help="a .jsonl file")
    make.add_argument("--seed", type=int, default=0)
    make.add_argument("--per-tag", type=int, default=100, metavar="N", help="prompts of each of the six tags, at most")
    make.add_argument("--overwrite", action="store_true", help="replace the file")
    make.set_defaults(command_function=_make)


def data(args: argparse.Namespace) -> int:
    """Run one action; returns the exit status."""
    status: int = args.command_function(args)
    return status


def _fetch(args: argparse.Namespace) -> int:
    from nft_ray.downloads.fetch import fetch

    files, root = dataset_files(args.names), data_root(args.data)
    say(f"{len(files)} files, about {sum(file.mib for file in files):.1f} MiB, into {root}")
    fetch(files, root, say)
    return 0


def _make(args: argparse.Namespace) -> int:
    target: Path = args.output.expanduser()
    if target.suffix != ".jsonl":
        raise ValueError(f"--output {target}: must end in .jsonl: each line is a JSON object with its metadata")
    if args.per_tag < 1:
        raise ValueError(f"--per-tag {args.per_tag}: must be at least 1")
    if target.exists() and not args.overwrite:
        raise ValueError(f"--output {target}: exists; name another file, or add --overwrite")
    if not target.parent.is_dir():
        raise ValueError(f"--output {target}: there is no folder {target.parent}")
    made = lines(args.seed, args.per_tag)
    target.write_text("".join(json.dumps(line) + "\n" for line in made))
    counts = Counter(line["tag"] for line in made)
    say(f"{target}: {len(made)} prompts ({', '.join(f'{tag} {count}' for tag, count in counts.items())})")
    return 0
