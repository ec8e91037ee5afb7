"""`nft-ray encode`: the prompts of an experiment, encoded into `model.precomputed` before it starts.

A sampler that finds all its prompts there never loads a text encoder. What is there is left alone, so the command may
be stopped and started again, or run for several experiments with one folder.
"""

import argparse
import time

from nft_ray.cli.console import say
from nft_ray.config import load
from nft_ray.models.base import check_model, family, quiet_libraries
from nft_ray.models.parts import prepare
from nft_ray.models.resolve import resolve
from nft_ray.prompts.draw import load_prompts

BATCH = 16
"""Prompts between two looks at the clock; each is encoded alone."""
REPORT_S = 10.0


def encode(args: argparse.Namespace) -> int:
    """Encode what is missing; returns the exit status."""
    config = resolve(load(args.config, args.set))
    model = config.model
    if model.precomputed is None:
        raise ValueError("model.precomputed = null: encode needs a folder; give --set model.precomputed=FOLDER")
    texts = [line.text for name in (config.prompts.train, config.prompts.test) for line in load_prompts(name).lines]
    if max(config.sampler.guidance, config.evaluation.guidance) > 1:
        texts.append("")
    check_model(model)
    import torch

    from nft_ray.models.conditioning import conditioner

    quiet_libraries()
    folder = prepare(model, family(model).text_parts(model), transformer_only=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = conditioner(model.model_copy(update={"conditioning_cache": 0}), folder, device)
    absent, told = encoder.absent(texts), time.monotonic()
    for start in range(0, len(absent), BATCH):
        encoder.encode(absent[start : start + BATCH])
        if time.monotonic() - told > REPORT_S:
            told = time.monotonic()
            say(f"{min(start + BATCH, len(absent))} of {len(absent)} prompts are encoded")
    there = len(set(texts)) - len(absent)
    say(f"{len(absent)} prompts encoded, {there} were there: {model.precomputed}")
    return 0
