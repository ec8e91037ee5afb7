"""`nft-ray rewards score`: one picture, in this process or by a deployed reward; the last line of stdout is JSON."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from PIL import Image, UnidentifiedImageError

from nft_ray.cli.connection import dashboard_of
from nft_ray.cli.console import say
from nft_ray.rewards.base import Scores, check_lines, load_reward, reward_config
from nft_ray.rewards.unique import Unique, blamed

SCORE_S = 600.0
"""Deadline of one picture: a reward that is scaled to nothing has to load its model first."""


def score(args: argparse.Namespace) -> int:
    """Score it and print it."""
    images, prompts, metadata = _read_image(args.image)[None], [args.prompt], [_metadata(args.metadata)]
    section: Any = OmegaConf.to_container(OmegaConf.from_dotlist(list(args.set)))
    config = reward_config(args.reward, section) if args.address is None else None
    check_lines(args.reward, zip(prompts, metadata, strict=True), config)
    if args.address is None:
        reward = Unique(args.reward, load_reward(args.reward, section))
        with blamed(args.reward):
            scores = reward.score(images, prompts, metadata)
    else:
        scores = _score_deployed(args, images, prompts, metadata)
    details = {name: _number(values[0]) for name, values in scores.details.items()}
    say(json.dumps({"reward": args.reward, "score": _number(scores.values[0]), "details": details}))
    return 0


def _score_deployed(
    args: argparse.Namespace, images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
) -> Scores:
    from ray import serve

    from deployments.plane import find

    if args.set:
        raise ValueError("rewards score: --set has no effect on a deployed reward; leave out --address or --set")
    with dashboard_of(args.address) as dashboard:
        handle = serve.get_app_handle(find(dashboard, args.reward).name)
        scores: Scores = handle.score.remote(images, prompts, metadata).result(timeout_s=SCORE_S)
    return scores


def _read_image(path: Path) -> np.ndarray:
    """uint8 (H, W, 3)."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path}: is no image that Pillow can read") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None


def _metadata(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--metadata {text}: is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"--metadata {text}: must be a JSON object")
    return value


def _number(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
