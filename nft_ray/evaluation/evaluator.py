"""Draw and score every line of a prompt set once, on any roles, and keep each batch as soon as it is done.

    request ──► samplers.rollout ──► scorers.score ──► pictures, then lines ──► folder
       (at most so many at once: images wait for no one in the object store)

A batch that is in the folder, whole and with every score, is not drawn again. It knows no Ray and no torch.
"""

import asyncio
from collections.abc import Callable, Collection, Sequence

import numpy as np

from nft_ray.config import ExperimentConfig
from nft_ray.evaluation.results import EvaluationFolder, LineResult, line_results
from nft_ray.prompts.draw import PromptSet, evaluation_requests
from nft_ray.roles import EvaluationRoles
from nft_ray.types import Adapter, RolloutRequest

PICTURES = 24
Progress = Callable[[str, int, int], None]


def open_requests(
    prompts: PromptSet, config: ExperimentConfig, adapter: Adapter, folder: EvaluationFolder, pictures: Collection[int]
) -> tuple[tuple[RolloutRequest, ...], list[LineResult]]:
    """(what is left to do, what is done): batches stay whole, for an image may depend on its neighbours' number."""
    requests = evaluation_requests(prompts, config, epoch=0, policy_version=0, adapter=adapter)
    results = {result.line: result for result in folder.results()}

    def done(line: int) -> bool:
        found = results.get(line)
        if found is None or found.missing:
            return False
        return line not in pictures or folder.image_path(line).exists()

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
    num_lines: int,
    pictures: Collection[int],
    at_once: int,
    progress: Progress,
) -> None:
    """Work off the requests. RuntimeError once more lines miss a reward than `scorers.max_missing_fraction` allows.

    What was scored by then is kept. `num_lines`: of the whole prompt set; `progress(what, done, of)` is told.
    At most `at_once` requests are anywhere between a sampler and the folder.
    """
    room = asyncio.Semaphore(at_once)
    done, missing = num_lines - sum(request.num_images for request in requests), 0

    async def one(request: RolloutRequest) -> None:
        nonlocal done, missing
        async with room:
            rollout = await roles.samplers.rollout(request)
            rewards = await roles.scorers.score(request, rollout)
            wanted = [i for i, item in enumerate(request.items) if item.prompt.id in pictures]
            if wanted:
                images = await roles.samplers.images(rollout)
                await asyncio.to_thread(_save, folder, request, images, wanted)
        lines = line_results(request, rewards)
        folder.append(lines)
        done += len(lines)
        missing += sum(bool(line.missing) for line in lines)
        progress("lines", done, num_lines)
        if missing > config.scorers.max_missing_fraction * num_lines:
            raise RuntimeError(
                f"{missing} of {num_lines} lines miss a reward ({_named(lines)} in the last batch); "
                f"scorers.max_missing_fraction allows {config.scorers.max_missing_fraction:.0%}; what was scored is "
                "kept: run the same command again to go on"
            )

    try:
        async with asyncio.TaskGroup() as group:
            for request in requests:
                group.create_task(one(request))
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None


def pipeline_depth(config: ExperimentConfig) -> int:
    """Requests that keep every sampler and every reward busy."""
    return config.sampler.num_workers * config.sampler.max_in_flight + config.scorers.max_in_flight


def spaced(num_lines: int, count: int = PICTURES) -> list[int]:
    """At most `count` lines, evenly over the set: what the contact sheet shows."""
    return sorted({round(line) for line in np.linspace(0, num_lines - 1, min(count, num_lines))})


def _save(folder: EvaluationFolder, request: RolloutRequest, images: np.ndarray, rows: Sequence[int]) -> None:
    for row in rows:
        folder.save_image(request.items[row].prompt.id, images[row])


def _named(lines: Sequence[LineResult]) -> str:
    return ", ".join(sorted({name for line in lines for name in line.missing}))
