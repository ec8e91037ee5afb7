"""Every reward, loaded by its real loader from small random weights in the published files."""

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from nft_ray.rewards.base import Reward, load_reward
from tests.rewards import test_aesthetic, test_hpsv2, test_imagereward
from tests.rewards.clip_files import write_clip, write_tokenizer
from tests.rewards.misbehaving_server import MisbehavingServer

SECTIONS: dict[str, dict[str, Any]] = {  # where a reward has fields without a default
    "geneval": {"detector": "shapes"},
    "unified_reward": {"urls": ["http://127.0.0.1:1/v1"]},
}


@contextmanager
def small_reward(name: str, root: Path) -> Iterator[Reward]:
    """The reward; its weights are written below `root`. Skips one whose library is not here."""
    section = SECTIONS.get(name, {}) | ({"weights": str(root)} if name in WRITERS else {})
    if name in WRITERS:
        WRITERS[name](root)
    if name == "hpsv2":
        if importlib.util.find_spec("open_clip") is None:
            pytest.skip("run in the environment openclip by the last test")
        yield test_hpsv2.HpsV2(test_hpsv2.Config(**section), test_hpsv2.SMALL)
    elif name == "imagereward":
        yield test_imagereward.small(root)
    elif name == "unified_reward":
        with MisbehavingServer() as server:
            reward = load_reward(name, {"urls": [server.url]})
            yield reward
            reward.close()  # type: ignore[attr-defined]
    else:
        yield load_reward(name, section)


def _write_pickscore(root: Path) -> None:
    from nft_ray.rewards.pickscore import MODEL, TOKENIZER

    write_clip(root / MODEL)
    write_tokenizer(root / TOKENIZER)


def _write_clip_l(root: Path) -> None:
    from nft_ray.rewards.clipscore import MODEL

    write_clip(root / MODEL)
    write_tokenizer(root / MODEL)


def _write_aesthetic(root: Path) -> None:
    _write_clip_l(root)
    torch.manual_seed(1)
    test_aesthetic.write_head(root, test_aesthetic.published_head(16))


def _write_hpsv2(root: Path) -> None:
    if importlib.util.find_spec("open_clip") is not None:
        test_hpsv2.write_checkpoint(root, test_hpsv2.SMALL)


def _write_imagereward(root: Path) -> None:
    test_imagereward.write_text_files(root, test_imagereward.WORDS, **test_imagereward.SMALL_TEXT)
    text = json.loads((root / test_imagereward.TEXT_CONFIG).read_text())
    test_imagereward.write_checkpoint(root, text, test_imagereward.SMALL)


WRITERS = {
    "pickscore": _write_pickscore,
    "clipscore": _write_clip_l,
    "aesthetic": _write_aesthetic,
    "hpsv2": _write_hpsv2,
    "imagereward": _write_imagereward,
}
