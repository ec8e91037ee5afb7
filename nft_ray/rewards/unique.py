"""The same image of the same prompt is scored once: a Reward in front of a Reward, with a memory of its scores.

Every path to a reward leads through here (one process, Serve, HTTP), so this is where what it returns is checked, and
where its ValueErrors get its name.

An evaluation repeated after a crash, a retried request, two jobs that share a reward and a batch that holds a picture
twice all ask what has been answered before. A missing score is not remembered: it is asked for again.

Recognising an image must cost less than scoring it, and the cheapest rewards take a millisecond. A sketch, one row in
32, tells at once that an image is NEW; only one whose sketch is known is hashed before it is scored. New ones are
hashed in a second thread while they are scored.
"""

import hashlib
import json
import traceback
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from nft_ray.rewards.base import Reward, Scores, check_batch, check_scores
from nft_ray.roles import RewardError

CAPACITY = 16384
"""Scores remembered: some hundred bytes each."""
STRIDE = 32
"""Whole rows: a pixel here and there takes ten times as long to gather."""

Row = tuple[float, dict[str, float]]


@contextmanager
def blamed(name: str) -> Iterator[None]:
    """In here the reward is asked where no other replica can be: what it raises is a RewardError that names it.

    Not so a ValueError, which `Unique` has named.
    """
    try:
        yield
    except Exception as error:
        if type(error) is ValueError:
            raise
        message = " ".join(str(error).split())[:300]
        what = f"{type(error).__name__}: {message}" if message else type(error).__name__
        raise RewardError(f"reward {name}: {what}{_where(error)}") from error


class Unique:
    """A Reward that asks another one only for (image, prompt, metadata) that it has not just seen. Not thread-safe.

    Raises ValueError "reward NAME: ..." where the other one does, or returns anything but a number per image.
    """

    def __init__(self, name: str, reward: Reward, capacity: int = CAPACITY) -> None:
        self._name, self._reward, self._capacity = name, reward, capacity
        self._known: OrderedDict[bytes, tuple[bytes, Row]] = OrderedDict()  # digest -> (sketch, scores)
        self._sketches: Counter[bytes] = Counter()
        self._hasher = ThreadPoolExecutor(1, "hash")

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """See Reward.score."""
        try:
            return self._score(images, prompts, metadata)
        except ValueError as error:
            if type(error) is not ValueError:  # JSONDecodeError and the like are the world's doing
                raise
            raise ValueError(f"reward {self._name}: {error}") from error

    def _score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        check_batch(images, prompts, metadata)
        lines = [
            json.dumps(pair, sort_keys=True, default=repr).encode() for pair in zip(prompts, metadata, strict=True)
        ]
        sketches = [_sketch(image, line) for image, line in zip(images, lines, strict=True)]
        here = Counter(sketches)
        new = [index for index, sketch in enumerate(sketches) if sketch not in self._sketches and here[sketch] == 1]
        hashed = self._hasher.submit(_digests, images, lines, new)
        suspects = _digests(images, lines, sorted({*range(len(images))} - {*new}))
        rows = {digest: self._known[digest][1] for digest in suspects.values() if digest in self._known}
        first = {digest: index for index, digest in reversed(suspects.items())}
        asked = [
            index
            for index in range(len(images))
            if index not in suspects or (first[suspects[index]] == index and suspects[index] not in rows)
        ]
        whole = len(asked) == len(images)
        scores = self._ask(images, prompts, metadata, asked, whole=whole) if asked or whole else None
        of = suspects | hashed.result()
        digests = [of[index] for index in range(len(images))]
        if scores is not None:
            rows |= self._remember([digests[index] for index in asked], [sketches[index] for index in asked], scores)
            if whole:
                return scores
        return _assembled([rows[digest] for digest in digests])

    def _ask(
        self,
        images: np.ndarray,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]],
        asked: list[int],
        *,
        whole: bool,
    ) -> Scores:
        if not whole:  # else as it came, without a copy
            images, prompts, metadata = images[asked], [prompts[i] for i in asked], [metadata[i] for i in asked]
        return check_scores(self._reward.score(images, prompts, metadata), len(images))

    def _remember(self, digests: Sequence[bytes], sketches: Sequence[bytes], scores: Scores) -> dict[bytes, Row]:
        rows: dict[bytes, Row] = {}
        for i, (digest, sketch) in enumerate(zip(digests, sketches, strict=True)):
            row = (float(scores.values[i]), {name: float(detail[i]) for name, detail in scores.details.items()})
            rows[digest] = row
            if np.isfinite(row[0]) and digest not in self._known:
                self._known[digest] = (sketch, row)
                self._sketches[sketch] += 1
        while len(self._known) > self._capacity:
            _, (sketch, _) = self._known.popitem(last=False)
            self._sketches[sketch] -= 1
            if not self._sketches[sketch]:
                del self._sketches[sketch]
        return rows


def _where(error: Exception) -> str:
    """The line of the reward's own file at which it was; empty where it was not reached."""
    frames = traceback.extract_tb(error.__traceback__)
    last = max((place for place, frame in enumerate(frames) if frame.filename == __file__), default=len(frames))
    within = frames[last + 1 :]
    at = next((frame for frame in reversed(within) if frame.filename == within[0].filename), None)
    return f" ({Path(at.filename).name}:{at.lineno})" if at else ""


def _assembled(rows: Sequence[Row]) -> Scores:
    names = dict.fromkeys(name for _, details in rows for name in details)
    return Scores(
        values=np.array([value for value, _ in rows], dtype=np.float32),
        details={name: np.array([row.get(name, np.nan) for _, row in rows], dtype=np.float32) for name in names},
    )


def _sketch(image: np.ndarray, line: bytes) -> bytes:
    """Equal for equal pairs, and hardly ever for others; a hundredth of the cost of a digest."""
    digest = hashlib.sha256(repr(image.shape).encode() + line)
    digest.update(image[STRIDE // 2 :: STRIDE].tobytes() if len(image) > STRIDE else image.tobytes())
    return digest.digest()


def _digests(images: np.ndarray, lines: Sequence[bytes], indices: Sequence[int]) -> dict[int, bytes]:
    return {index: _digest(images[index], lines[index]) for index in indices}


def _digest(image: np.ndarray, line: bytes) -> bytes:
    """Equal for equal pairs only. SHA-256, which processors have an instruction for; it runs without Python's lock."""
    digest = hashlib.sha256(repr(image.shape).encode() + line)
    digest.update(np.ascontiguousarray(image).data)
    return digest.digest()
