"""ONE generic Serve deployment around any reward: it batches, and gives every request its own rows back.

A request is one rollout (one group of images). `batch_size` counts REQUESTS: a replica scores at most that many
groups in one call of the reward, and waits at most `batch_wait_s` for others to come. Which reward it is, its model,
its resources and its replicas come from the YAML; a reward knows nothing of Serve. Over HTTP (http_api.py) the images
of one POST are one request per image size.

Failure policy: none here. An exception of the reward fails the request that caused it, not its neighbours in the
batch, and reaches the caller, who retries (actors/scorers.py) or is told (HTTP 400 for a wrong input, 500 otherwise);
a replica that dies is replaced by Serve, its requests are the caller's to send again.
"""

import asyncio
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ray import serve
from ray.serve import Application
from ray.serve.schema import LoggingConfig
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse

from deployments.http_api import HttpError, answer, check_head, parse, read
from nft_ray.rewards.base import Reward, RewardConfig, Scores
from nft_ray.rewards.unique import Unique

logger = logging.getLogger("ray.serve")

Load = Callable[[str, Mapping[str, Any]], Reward]
Request = tuple[np.ndarray, Sequence[str], Sequence[Mapping[str, Any]]]


class RewardReplica:
    """One process that holds one reward. `description` is what it says of itself: see build.describe."""

    def __init__(
        self,
        load: Load,
        name: str,
        section: Mapping[str, Any],
        config: RewardConfig,
        description: Mapping[str, Any],
        token: str | None,
    ) -> None:
        self._name, self._description, self._token = name, description, token
        self._bound = (section, config, token)
        self._reward = Unique(name, load(name, section))
        if "torch" in sys.modules:  # most rewards do without: 0.2 GiB and seconds less per replica
            sys.modules["torch"].set_num_threads(max(1, int(config.num_cpus)))
        self._score_batch.set_max_batch_size(config.batch_size)  # type: ignore[attr-defined]
        self._score_batch.set_batch_wait_timeout_s(config.batch_wait_s)  # type: ignore[attr-defined]

    async def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """One group of images of one size, by a handle. Raises what the reward raises."""
        found = await self._score_batch((images, prompts, metadata))
        if isinstance(found, Exception):
            raise found
        return found

    async def describe(self) -> Mapping[str, Any]:
        """Which reward this is, with which configuration."""
        return self._description

    async def bound(self) -> tuple[Mapping[str, Any], RewardConfig, str | None]:
        """What it was made of: (section, config, token). For who deploys it again with other bounds."""
        return self._bound

    async def __call__(self, request: HttpRequest) -> JSONResponse:
        """HTTP: see http_api."""
        try:
            check_head(request.method, request.headers, self._token)
            parts = await asyncio.to_thread(parse, await read(request.stream()))
            scores = await asyncio.gather(*(self.score(*part[1:]) for part in parts))
        except HttpError as error:
            return JSONResponse({"error": error.reason}, error.status)
        except ValueError as error:
            return JSONResponse({"error": " ".join(str(error).split())}, 400)
        except Exception as error:
            logger.exception("reward %s failed", self._name)
            return JSONResponse({"error": f"{self._name}: {type(error).__name__}: {' '.join(str(error).split())}"}, 500)
        rows = [part[0] for part in parts]
        return JSONResponse(answer(self._name, sum(map(len, rows)), list(zip(rows, scores, strict=True))))

    @serve.batch
    async def _score_batch(self, requests: list[Request]) -> list[Scores | Exception]:
        """In a thread, so that the replica goes on answering: the next batch fills while this one is scored."""
        return await asyncio.to_thread(score_requests, self._reward, requests)


def score_requests(reward: Reward, requests: Sequence[Request]) -> list[Scores | Exception]:
    """All requests of one image size in one call of the reward; a request's own exception where that call fails.

    An image's score does not depend on its batch: see Reward. So what one bad request breaks is scored again, one by
    one, and only the bad one fails.
    """
    answers: dict[int, Scores | Exception] = {}
    by_size: dict[tuple[int, ...], list[int]] = {}
    for index, request in enumerate(requests):
        by_size.setdefault(request[0].shape[1:], []).append(index)
    for indices in by_size.values():
        together = [requests[index] for index in indices]
        try:
            answers |= dict(zip(indices, _score_together(reward, together), strict=True))
        except Exception as error:  # noqa: BLE001 - the caller's to raise, whatever it is
            alone = [error] if len(together) == 1 else [score_requests(reward, [one])[0] for one in together]
            answers |= dict(zip(indices, alone, strict=True))
    return [answers[index] for index in range(len(requests))]


def _score_together(reward: Reward, requests: Sequence[Request]) -> list[Scores]:
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


def application(
    name: str,
    section: Mapping[str, Any],
    config: RewardConfig,
    load: Load,
    description: Mapping[str, Any],
    token: str | None = None,
) -> Application:
    """The Serve application of one reward. A replica holds two batches: one in work, one that fills."""
    environment = dict(config.runtime_env or {})
    if config.py_executable:
        environment["py_executable"] = config.py_executable
    options: dict[str, Any] = {"num_cpus": config.num_cpus, "num_gpus": config.num_gpus}
    replicas: dict[str, Any] = {"num_replicas": config.num_replicas}
    if config.autoscaling:
        replicas = {"autoscaling_config": config.autoscaling.model_dump()}
    deployment = serve.deployment(
        name=name,
        **replicas,
        max_ongoing_requests=2 * config.batch_size,
        ray_actor_options=options | ({"runtime_env": environment} if environment else {}),
        max_constructor_retry_count=2,
        graceful_shutdown_timeout_s=2,
        graceful_shutdown_wait_loop_s=0.2,
        logging_config=LoggingConfig(enable_access_log=False),
    )
    return deployment(RewardReplica).bind(load, name, section, config, description, token)
