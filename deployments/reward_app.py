"""ONE generic Serve deployment around any reward: it batches, and gives every request its own rows back.

A request is one rollout (one group of images). `batch_size` counts REQUESTS: a replica scores at most that many
groups in one call of the reward, and waits at most `batch_wait_s` for others to come. Which reward it is, its model,
its resources and its replicas come from the YAML; a reward knows nothing of Serve.

Failure policy: none here. An exception of the reward fails every request of its batch and reaches the caller, who
retries (actors/scorers.py); a replica that dies is replaced by Serve, its requests are the caller's to send again.
"""

import asyncio
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ray import serve
from ray.serve import Application
from ray.serve.schema import LoggingConfig

from nft_ray.rewards.base import Reward, RewardConfig, Scores

Load = Callable[[str, Mapping[str, Any]], Reward]
Request = tuple[np.ndarray, Sequence[str], Sequence[Mapping[str, Any]]]


class RewardReplica:
    """One process that holds one reward."""

    def __init__(self, load: Load, name: str, section: Mapping[str, Any], config: RewardConfig) -> None:
        self._reward = load(name, section)
        if "torch" in sys.modules:  # most rewards do without: 0.2 GiB and seconds less per replica
            sys.modules["torch"].set_num_threads(max(1, int(config.num_cpus)))
        self._score_batch.set_max_batch_size(config.batch_size)  # type: ignore[attr-defined]
        self._score_batch.set_batch_wait_timeout_s(config.batch_wait_s)  # type: ignore[attr-defined]

    async def __call__(
        self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Scores:
        return await self._score_batch((images, prompts, metadata))

    @serve.batch
    async def _score_batch(self, requests: list[Request]) -> list[Scores]:
        """In a thread, so that the replica goes on answering: the next batch fills while this one is scored."""
        return await asyncio.to_thread(score_requests, self._reward, requests)


def score_requests(reward: Reward, requests: Sequence[Request]) -> list[Scores]:
    """All requests in one call of the reward. An image's score does not depend on its batch: see Reward."""
    if len(requests) == 1:
        return [reward.score(*requests[0])]
    images = np.concatenate([request[0] for request in requests])
    prompts = [prompt for request in requests for prompt in request[1]]
    metadata = [line for request in requests for line in request[2]]
    scores = reward.score(images, prompts, metadata)
    cuts = np.cumsum([len(request[0]) for request in requests])[:-1]
    details = {name: np.split(values, cuts) for name, values in scores.details.items()}
    return [
        Scores(values=values, details={name: parts[i] for name, parts in details.items()})
        for i, values in enumerate(np.split(scores.values, cuts))
    ]


def application(name: str, section: Mapping[str, Any], config: RewardConfig, load: Load) -> Application:
    """The Serve application of one reward. A replica holds two batches: one in work, one that fills."""
    deployment = serve.deployment(
        name=name,
        num_replicas=config.num_replicas,
        max_ongoing_requests=2 * config.batch_size,
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
        max_constructor_retry_count=2,
        graceful_shutdown_timeout_s=2,
        graceful_shutdown_wait_loop_s=0.2,
        logging_config=LoggingConfig(enable_access_log=False),
    )
    return deployment(RewardReplica).bind(load, name, section, config)
