"""Draw and score every line of a prompt set once, on any roles, and keep each batch as soon as it is done.

    request ──► samplers.rollout ──► scorers.score ──► pictures, then lines ──► folder
       (at most so many at once: images wait for no one in the object store)

A batch that is in the folder, whole and with every score, is not drawn again. The trainer (held_out.py) and `nft-ray
evaluate` both end here. It knows no Ray and no torch.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence

import numpy as np

from nft_ray.algorithms.remarks import not_finite
from nft_ray.config import ExperimentConfig
from nft_ray.evaluation.results import EvaluationFolder, LineResult, line_results
from nft_ray.redo import while_lost
from nft_ray.roles import EvaluationRoles
from nft_ray.types import Rewards, RolloutInfo, RolloutRequest

PICTURES = 24
_log = logging.getLogger(__name__)
Progress = Callable[[int, int], None]
"""Told (lines that are done, lines of the whole set)."""


def open_requests(
    requests: Sequence[RolloutRequest], folder: EvaluationFolder, pictures: Collection[int]
) -> tuple[tuple[RolloutRequest, ...], list[LineResult]]:
    """(what is left to do, what is done): batches stay whole, for an image may depend on its neighbours' number."""
    results = {result.line: result for result in folder.results()}

    def done(line: int) -> bool:
        found = results.get(line)
        if found is None or found.missing:
            return False
        return line not in pictures or folder.has_image(line)

    batches = [([item.prompt.id for item in request.items], request) for request in requests]
    left = tuple(request for lines, request in batches if not all(map(done, lines)))
    kept = [results[line] for lines, _ in batches if all(map(done, lines)) for line in lines]
    return left, kept


async def evaluate(
    config: ExperimentConfig,
    roles: EvaluationRoles,
    folder: EvaluationFolder,
    requests: Sequence[RolloutRequest],
    *,
    pictures: Collection[int],
    progress: Progress,
) -> list[LineResult]:
    """Work off what the folder lacks of the requests (those of the whole set); returns every line, in order.

    `pictures`: lines whose image is kept. RuntimeError once more lines miss a reward than
    `scorers.max_missing_fraction` allows, or all do; what was scored by then is kept.
    """
    left, kept = open_requests(requests, folder, pictures)
    folder.replace(kept)
    room = asyncio.Semaphore(pipeline_depth(config))
    trained = config.trained_weights.keys()  # a reward that is only measured stops nothing, as in training
    num_lines, done, missing = sum(request.num_images for request in requests), len(kept), 0
    infinite: set[str] = set()
    infos: list[tuple[RolloutRequest, RolloutInfo]] = []

    async def one(request: RolloutRequest) -> None:
        nonlocal done, missing

        async def drawn() -> tuple[RolloutInfo, Rewards]:
            rollout = await roles.samplers.rollout(request)
            rewards = await roles.scorers.score(request, rollout.images)
            wanted = [i for i, item in enumerate(request.items) if item.prompt.id in pictures]
            if wanted:
                images = await roles.samplers.images(rollout)
                await asyncio.to_thread(_save, folder, request, images, wanted)
            return rollout.info, rewards

        async with room:
            info, rewards = await while_lost(drawn, config.sampler.max_attempts)
        infos.append((request, info))
        lines = line_results(request, rewards)
        folder.append(lines)
        done += len(lines)
        infinite.update(rewards.infinite & trained)
        missing += sum(not trained.isdisjoint(line.missing) for line in lines)
        progress(done, num_lines)
        if missing > config.scorers.max_missing_fraction * num_lines or missing == num_lines:
            raise RuntimeError(
                f"{missing} of {num_lines} lines miss a reward ({_named(lines)} in the last batch); "
                f"scorers.max_missing_fraction allows {config.scorers.max_missing_fraction:.0%}; "
                f"{_advice(infinite, {name for line in lines for name in line.missing} & trained)}"
            )

    try:
        async with asyncio.TaskGroup() as group:
            for request in left:
                group.create_task(one(request))
    except ExceptionGroup as failures:
        first = failures.exceptions[0]
        raise first from first.__cause__  # without the group, but with what it came from
    if any(info.non_finite for _, info in infos):
        _log.warning("evaluation: %s; they are drawn grey, and count", not_finite(infos))
    return folder.replace(folder.results())


def pipeline_depth(config: ExperimentConfig) -> int:
    """Requests that keep every sampler and every reward busy: so many are between a sampler and the folder."""
    sampler = config.sampler
    return (sampler.max_workers or sampler.num_workers) * sampler.max_in_flight + config.scorers.max_in_flight


def spaced(num_lines: int, count: int = PICTURES) -> list[int]:
    """At most `count` lines, evenly over the set: what the contact sheet shows."""
    return sorted({round(line) for line in np.linspace(0, num_lines - 1, min(count, num_lines))})


def _save(folder: EvaluationFolder, request: RolloutRequest, images: np.ndarray, rows: Sequence[int]) -> None:
    for row in rows:
        folder.save_image(request.items[row].prompt.id, images[row])


def _advice(infinite: Collection[str], missing: Collection[str]) -> str:
    """What helps, of the rewards that are missing now. `infinite`: those that were, and would be again."""
    again = "what was scored is kept: run the same command again to go on"
    if not infinite:
        return again
    names = ", ".join(sorted(infinite))
    gave = f"{names} gave infinite scores, or some beyond float32, and would again: mend what it computes"
    return gave if set(missing) <= set(infinite) else f"{gave}; {again}"


def _named(lines: Sequence[LineResult]) -> str:
    return ", ".join(sorted({name for line in lines for name in line.missing}))
