"""ONE generic Serve deployment around any reward: it batches, and gives every request its own rows back.

A request is one rollout (one group of images). `batch_size` counts REQUESTS: a replica scores at most that many
groups in one call of the reward, and waits at most `batch_wait_s` for others to come. Which reward it is, its model,
its resources and its replicas come from the YAML; a reward knows nothing of Serve. Over HTTP (http_api.py) the images
of one POST are one request per image size.

Failure policy: an exception of the reward fails the request that caused it, not its neighbours in the batch, and
reaches the caller, who retries (actors/scorers.py) or is told (HTTP 400 for a wrong input, 500 otherwise). One of the
device (nft_ray/failures.py) is answered like that too, and then the process ends, for what it has on the device is
lost. A replica that dies or does not answer is replaced by Serve, its requests are the caller's to send again.

A reward that asks a server which was started for it (sglang_server.py) is loaded again where that server is now: on
another node, after its own was lost. Until there is one, a request raises ConnectionError.
"""

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import ray
from pydantic import SecretStr
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.schema import LoggingConfig
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse

from deployments.claims import NAMESPACE
from deployments.http_api import HttpError, answer, check_head, parse, read
from deployments.variables import for_ray, set_rest
from nft_ray.config import HttpConfig
from nft_ray.failures import device_failure, out_of_memory
from nft_ray.rewards.base import Reward, RewardConfig, Scores
from nft_ray.rewards.unique import Unique

logger = logging.getLogger("ray.serve")

Load = Callable[[str, Mapping[str, Any]], Reward]
Request = tuple[np.ndarray, Sequence[str], Sequence[Mapping[str, Any]]]
LAST_WORDS_S = 0.2
"""What a replica with a broken device takes for the answers that say so."""
HEALTH_S, HEALTH_TIMEOUT_S = 5.0, 20.0
"""Serve's checks. Three in a row without an answer, as of a stopped process, and it starts another replica."""
SERVER_KEY = "NFT_RAY_SERVER_KEY"
"""The variable of this process with the key of the server that was started for the reward."""
LOOK_S = 10.0


class RewardReplica:
    """One process that holds one reward. `description` is what it says of itself: see build.describe."""

    def __init__(
        self,
        load: Load,
        name: str,
        section: Mapping[str, Any],
        config: RewardConfig,
        description: Mapping[str, Any],
        http: HttpConfig | None,
        server: str | None,
    ) -> None:
        set_rest(config.runtime_env)
        self._name, self._description, self._http = name, description, http or HttpConfig()
        self._bound = (section, config, http)
        self._load, self._section, self._server = load, section, server
        self._url: str | None = None
        self._broken: BaseException | None = None
        self._reward: Reward | None = None if server else Unique(name, load(name, section))
        if "torch" in sys.modules:  # most rewards do without: 0.2 GiB and seconds less per replica
            sys.modules["torch"].set_num_threads(max(1, int(config.num_cpus)))
        self._score_batch.set_max_batch_size(config.batch_size)  # type: ignore[attr-defined]
        self._score_batch.set_batch_wait_timeout_s(config.batch_wait_s)  # type: ignore[attr-defined]

    async def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """One group of images of one size, by a handle. Raises what the reward raises."""
        if self._server and self._reward is None:
            await self._follow_server()
        found = await self._score_batch((images, prompts, metadata))
        if isinstance(found, Exception):
            if device_failure(found):
                self._end(found)
            raise found
        return found

    async def describe(self) -> Mapping[str, Any]:
        """Which reward this is, with which configuration."""
        return self._description

    async def bound(self) -> tuple[Mapping[str, Any], RewardConfig, HttpConfig | None]:
        """What it was made of: (section, config, http). For who deploys it again with other bounds."""
        return self._bound

    async def check_health(self) -> None:
        """Serve asks every HEALTH_S; what is raised here has it start another replica."""
        if self._broken is not None:
            raise RuntimeError(f"reward {self._name}: {type(self._broken).__name__} of the device")
        if self._server:
            await self._follow_server()

    async def _follow_server(self) -> None:
        """Load the reward for where its server is now, if that is not where it was."""
        assert self._server is not None
        url: str | None
        key: SecretStr | None
        try:
            actor = ray.get_actor(self._server, namespace=NAMESPACE)
            url, key = await asyncio.wait_for(actor.access.remote(), LOOK_S)
        except (RayError, ValueError, TimeoutError):  # it is being started again: what is known stays
            return
        if url is None or url == self._url:
            return
        if key is not None:
            os.environ[SERVER_KEY] = key.get_secret_value()
        asks = {"server": None, "urls": [url], "api_key_env": SERVER_KEY, "api_key_file": None}
        reward = await asyncio.to_thread(self._load, self._name, {**self._section, **asks})
        if self._url is not None:
            logger.warning("reward %s: its server is at %s now, no longer at %s", self._name, url, self._url)
        self._reward, self._url = Unique(self._name, reward), url

    def _end(self, error: Exception) -> None:
        """Leave the device, once those who wait have their answer: a process cannot get a lost context back."""
        if self._broken is None:
            self._broken = error
            advice = "; lower micro_batch_size of this reward" if out_of_memory(error) else ""
            said = " ".join(str(error).split())[:300]
            logger.error("reward %s: %s; this replica is replaced%s", self._name, said, advice)
            asyncio.get_running_loop().call_later(LAST_WORDS_S, os._exit, 1)

    async def __call__(self, request: HttpRequest) -> JSONResponse:
        """HTTP: see http_api."""
        try:
            check_head(request.method, request.headers, self._http)
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
        if self._reward is None:
            return [ConnectionError(f"reward {self._name}: its server is being started") for _ in requests]
        return await asyncio.to_thread(score_requests, self._reward, requests)


def score_requests(reward: Reward, requests: Sequence[Request]) -> list[Scores | Exception]:
    """All requests of one image size in one call of the reward; a request's own exception where that call fails.

    An image's score does not depend on its batch: see Reward. So what one bad request breaks is scored again, one by
    one, and only the bad one fails. Where the device is broken, all do.
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
            lost = device_failure(error) and not out_of_memory(error)  # this process scores no more
            alone = (
                [error] * len(together)
                if lost or len(together) == 1
                else [score_requests(reward, [one])[0] for one in together]
            )
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
    http: HttpConfig | None = None,
    server: str | None = None,
) -> Application:
    """The Serve application of one reward; `server`: the actor of the server that it asks, if one was started for it.

    A replica holds two batches: one in work, one that fills.
    """
    environment = for_ray(config.runtime_env)
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
        health_check_period_s=HEALTH_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=2,
        graceful_shutdown_wait_loop_s=0.2,
        logging_config=LoggingConfig(enable_access_log=False),
    )
    return deployment(RewardReplica).bind(load, name, section, config, description, http, server)
