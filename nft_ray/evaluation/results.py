"""The folder of one evaluation: a line per prompt, appended as it is scored: a kill loses only what was in work.

    DIR/evaluation.json      what was evaluated: settings, prompts, LoRA; another evaluation is refused
    DIR/results.jsonl        line, prompt, seed, scores, details; in the order of lines once it is complete
    DIR/images/000123.png    the pictures that were asked for
    DIR/summary.json         metric -> mean, 95 % interval, count, missing

A batch is written after its pictures, whole: resumed, every other batch is drawn again exactly as it was, so killed
and resumed with the same settings on the same hardware gives the same bytes. Nothing in results.jsonl depends on time,
worker or order of arrival. With other placement (nft_ray.types.Mark: micro-batches, compile, another GPU) it goes on as
well, and the lines that are left may differ in their last bits. Other rounding is another evaluation: half of one in
float16 would be neither.
"""

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nft_ray.config import ExperimentConfig, LoraConfig, changes, differences, essence
from nft_ray.prompts.draw import PromptSet
from nft_ray.rewards.base import RewardUse
from nft_ray.runs.checkpoint import PARTIAL, package_versions, write_atomically
from nft_ray.types import Rewards, RolloutRequest

_log = logging.getLogger(__name__)
IDENTITY, RESULTS, SUMMARY, SHEET, COMPARISON = (
    "evaluation.json",
    "results.jsonl",
    "summary.json",
    "contact_sheet.png",
    "compare.json",
)
SHOWN = 4
"""Settings that the error about another evaluation names, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LineResult:
    """One line of results.jsonl. A score or detail that could not be had is None, never 0."""

    line: int
    prompt: str
    tag: str
    seed: int
    scores: dict[str, float | None]
    details: dict[str, float | None]

    @property
    def missing(self) -> list[str]:
        """The rewards that could not be had."""
        return [name for name, score in self.scores.items() if score is None]


class EvaluationFolder:
    """Results of one evaluation, and only of that one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def claim(self, identity: Mapping[str, Any], about: Mapping[str, Any], *, overwrite: bool) -> Iterator[None]:
        """Make the folder this evaluation's, or see that it is, and keep others out until the end.

        ValueError lists what differs where it holds another evaluation, or says that one is at work there. `overwrite`:
        what is there goes, whatever it is.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{self.path}: another evaluation is at work there") from None
            except OSError as error:  # some network file systems have no locks
                _log.warning("%s: two evaluations at once would not be noticed there: %s", self.path, error)
            if overwrite:
                self._clear()
            self._check(identity)
            text = json.dumps({"identity": identity, "about": about}, indent=1)
            write_atomically(self.path / IDENTITY, text + "\n")
            yield

    def holds(self, identity: Mapping[str, Any]) -> bool:
        """Is what is there of this evaluation, so that it may go on?"""
        try:
            return not differences(read_identity(self.path), identity)
        except ValueError:
            return False

    def results(self) -> list[LineResult]:
        """Every whole line, in the order of the file; what is left out is evaluated again."""
        return read_results(self.path, whole=False)

    def append(self, batch: Iterable[LineResult]) -> None:
        """Add the lines of a finished batch."""
        with (self.path / RESULTS).open("a", encoding="utf-8") as file:
            file.write("".join(map(_encoded, batch)))

    def replace(self, results: Iterable[LineResult]) -> list[LineResult]:
        """Write the file anew, in the order of lines; returns them."""
        lines = sorted(results, key=lambda result: result.line)
        write_atomically(self.path / RESULTS, "".join(map(_encoded, lines)))
        return lines

    def image_path(self, line: int) -> Path:
        return self.path / "images" / f"{line:06d}.png"

    def save_image(self, line: int, image: np.ndarray) -> None:
        """uint8 (H, W, 3), whole or not at all."""
        path = self.image_path(line)
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(path.name + PARTIAL)
        with partial.open("wb") as file:
            Image.fromarray(image).save(file, format="png")
            file.flush()
            os.fsync(file.fileno())  # else a machine that loses its power keeps the name, and no picture
        partial.replace(path)

    def has_image(self, line: int) -> bool:
        """Is the picture there, and whole? By the sums in it: its pixels are not unpacked."""
        try:
            with Image.open(self.image_path(line)) as image:
                image.verify()
        except (OSError, SyntaxError, ValueError):  # what PIL says of a damaged one
            return False
        return True

    def image(self, line: int) -> np.ndarray:
        with Image.open(self.image_path(line)) as image:
            return np.asarray(image.convert("RGB"))

    def _check(self, identity: Mapping[str, Any]) -> None:
        if (self.path / IDENTITY).exists():
            before = read_identity(self.path)
            if changed := differences(before, identity):
                raise ValueError(
                    f"--output {self.path}: holds another evaluation (differs in: "
                    f"{changes(before, identity, changed, most=SHOWN)}): choose another folder, or replace it with "
                    "--overwrite"
                )
        elif (self.path / RESULTS).exists():
            raise ValueError(f"--output {self.path}: holds {RESULTS} without {IDENTITY}; choose another folder")

    def _clear(self) -> None:
        """Remove what an evaluation writes, and nothing else: the folder may hold other things."""
        images = self.path.glob("images/*.png")
        for path in [*(self.path / name for name in (RESULTS, SUMMARY, SHEET, IDENTITY)), *images]:
            path.unlink(missing_ok=True)


def read_results(folder: Path, *, whole: bool = True) -> list[LineResult]:
    """The lines of FOLDER/results.jsonl. One that is damaged: ValueError if it has to be `whole`, else it is left out,
    with one warning for all of them; of what a kill cut off at the end, with none.
    """
    path = folder / RESULTS
    if not path.exists():
        if whole:
            raise ValueError(f"{folder}: holds no {RESULTS}; name the folder of an evaluation")
        return []
    found: list[LineResult] = []
    damaged: list[int] = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            if line:
                found.append(LineResult(**json.loads(line)))
        except (ValueError, TypeError):
            if whole:
                raise ValueError(f"{path}, line {number}: is no result; the file was changed or damaged") from None
            if number < len(lines):
                damaged.append(number)
    if damaged:
        _log.warning("%s: %d damaged lines are left out (the first: line %d)", path, len(damaged), damaged[0])
    return found


def read_identity(folder: Path) -> dict[str, Any]:
    """What FOLDER/evaluation.json says was evaluated."""
    try:
        identity: dict[str, Any] = json.loads((folder / IDENTITY).read_text())["identity"]
    except FileNotFoundError:
        raise ValueError(f"{folder}: holds no {IDENTITY}; name the folder of an evaluation") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder / IDENTITY}: cannot be read; the file was changed or damaged") from None
    return identity


def identity(
    config: ExperimentConfig, prompts: PromptSet, lora: LoraConfig | None, checksum: str | None
) -> dict[str, Any]:
    """Everything that a result depends on, as plain data: two evaluations are one where this is equal.

    What the marks call placement is not in it, nor the training; of `sampler` an evaluation takes only how it is placed
    and its LoRA.
    """
    trained: dict[str, Any] | None = None if checksum is None else {"checksum": checksum}  # alone: all weights
    if trained is not None and lora is not None:
        trained |= {"rank": lora.rank, "alpha": lora.alpha}
    rewards = config.reward_configs
    return {
        "model": essence(config.model, exclude={"lora", "tuning"}),
        "lora": trained,
        "prompts": {"lines": len(prompts), "checksum": _digest(prompts)},
        "evaluation": essence(config.evaluation, exclude={"picture_lines"}),  # they show, and change no figure
        "sampler": {"lora": config.sampler.lora},
        "rewards": {name: essence(section, exclude=RewardUse.model_fields) for name, section in rewards.items()},
    }


def about(config: ExperimentConfig, source: str | None) -> dict[str, Any]:
    """What a person wants to know besides: names and versions."""
    return {"prompts": config.prompts.test, "lora": source, "versions": package_versions()}


def line_results(request: RolloutRequest, rewards: Rewards) -> list[LineResult]:
    """One evaluation request (one image per item) with its scores, as lines."""
    return [
        LineResult(
            line=item.prompt.id,
            prompt=item.prompt.text,
            tag=str(item.prompt.metadata.get("tag", "")),
            seed=item.seeds[0],
            scores={name: _number(values[i]) for name, values in sorted(rewards.raw.items())},
            details={name: _number(values[i]) for name, values in sorted(rewards.details.items())},
        )
        for i, item in enumerate(request.items)
    ]


def _number(value: np.floating) -> float | None:
    return float(value) if np.isfinite(value) else None


def _encoded(result: LineResult) -> str:
    return json.dumps(asdict(result), ensure_ascii=False) + "\n"


def _digest(prompts: PromptSet) -> str:
    lines = [[prompt.text, dict(prompt.metadata)] for prompt in prompts.lines]
    return hashlib.blake2b(json.dumps(lines, sort_keys=True).encode(), digest_size=16).hexdigest()
