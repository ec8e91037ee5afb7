"""The reward plane as the driver sees it: Serve applications called by NAME, images by reference, all at once.

    rollout.images (reference) ──► RUN/A ──► Scores ─┐
                               ├─► RUN/B ──► Scores ─┴─► Rewards; None where one could not be had
                               └─► RUN/C, which only monitors ──► beside the loop: `monitored` says it later

Failure policy
- Serve retries a request only until a replica accepts it; from there the retries are ours. Whatever befalls a replica
  (it died, is unreachable, raised, or let the deadline pass) is tried again, `scorers.max_attempts` times in all, and
  the call that was given up is cancelled. After that the reward of this rollout is missing: NaN and counted, never 0,
  and logged once per cause. The trainer decides how much may be missing.
- A ValueError of the reward says that the input is wrong, or what it returned: the user's mistake, raised at once. (Its
  subclasses, such as JSONDecodeError, are the world's doing and are retried.)
- Images that are lost with a node are no missing reward: ObjectsLostError, and whoever drew them draws them again.
- One call scores one rollout. Its deadline, `scorers.timeout_s`, includes waiting for a replica to be free.
- Training waits for no reward that only monitors: it is asked once, beside the loop, within
  `scorers.monitor_timeout_s`. While it is down (nft_ray/rewards/outage.py) only one call in a while asks it. An
  evaluation waits for it, and tries again, within that deadline, so one that is down costs it one deadline at most.

Who deploys the applications, and what runs in them, is not known here.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from ray import serve
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from actors.answers import DeadlineError, Pending, one_line, together
from nft_ray.config import ExperimentConfig
from nft_ray.failures import lost, out_of_memory
from nft_ray.rewards.applications import application
from nft_ray.rewards.base import Scores
from nft_ray.rewards.combine import assemble
from nft_ray.rewards.monitored import Monitored
from nft_ray.rewards.outage import Outage
from nft_ray.roles import ObjectsLostError
from nft_ray.types import Rewards, RolloutRequest

logger = logging.getLogger(__name__)

STORE_FULL = (ObjectStoreFullError, OutOfDiskError)
"""The images were drawn, and there was no room for them: no missing reward, for the next ones find none, too."""
BACKOFF_S = 0.2
"""Pause before the second attempt; doubled for each further one."""


@dataclass(frozen=True, slots=True)
class _Question:
    """What a reward is asked: a rollout's images, by reference, with a prompt and its metadata for each."""

    images: Any
    texts: list[str]
    metadata: list[Mapping[str, Any]]


class ServeScorers:
    """roles.Scorers over Serve applications; `num_missing` counts rollouts by (reward, cause).

    applications: reward -> application, as `deployments.build.deploy` gives them; null = `RUN/REWARD` for all.
    """

    def __init__(self, config: ExperimentConfig, applications: Mapping[str, str] | None = None) -> None:
        self._config = config.scorers
        self._weights = config.trained_weights
        named = applications or {name: application(config.run.name, name) for name in config.rewards}
        self._handles = {name: _handle(named[name]) for name in config.rewards}
        self._room = {name: asyncio.Semaphore(self._config.max_in_flight) for name in config.rewards}
        self._pending = {name: Pending(partial(_calls, name)) for name in config.rewards}
        self._outages = {name: Outage(name) for name in config.rewards if name not in self._weights}
        self._monitored = Monitored(list(self._outages))
        self._beside: dict[asyncio.Task[None], int] = {}  # calls of rewards that only monitor, and their epoch
        self.num_missing: Counter[tuple[str, str]] = Counter()

    async def score(self, request: RolloutRequest, images: Any) -> Rewards:
        prompts = [item.prompt for item in request.items for _ in range(item.num_images)]
        question = _Question(images, [one.text for one in prompts], [one.metadata for one in prompts])
        work = {name: self._train(name, question) for name in self._weights}
        if request.split == "train":
            for name in self._outages:
                task = asyncio.create_task(self._monitor(name, request, question))
                self._beside[task] = request.epoch
                task.add_done_callback(self._beside.pop)
        else:
            work |= {name: self._evaluate(name, question) for name in self._outages}
        scores = await together(list(work.values()))
        return assemble(dict(zip(work, scores, strict=True)), request.num_images, self._weights)

    def monitored(self, epoch: int) -> dict[int, dict[str, float]]:
        open_epochs = set(self._beside.values())
        return self._monitored.take([e for e in self._monitored.epochs() if e <= epoch and e not in open_epochs])

    async def drained(self) -> dict[int, dict[str, float]]:
        if self._beside:
            await asyncio.wait(self._beside, timeout=self._config.monitor_timeout_s)
        await self._leave()
        return self._monitored.take(self._monitored.epochs())

    async def close(self) -> None:
        """Stop the handles' background work; the applications live on."""
        await self._leave()
        await asyncio.gather(*(handle.shutdown_async() for handle in self._handles.values()), return_exceptions=True)

    async def _leave(self) -> None:
        """Wait no longer for what only monitors: it is missing."""
        tasks = list(self._beside)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _train(self, name: str, question: _Question) -> Scores | None:
        """One reward that trains, of one rollout, or None when it could not be had."""
        attempts = self._config.max_attempts
        scores = await self._attempts(name, question, attempts, self._config.timeout_s, self._room[name])
        if isinstance(scores, Scores):
            return scores
        self._note(name, scores, attempts)
        return None

    async def _evaluate(self, name: str, question: _Question) -> Scores | None:
        """One that only monitors, waited for."""
        async with self._room[name]:
            with self._pending[name].one():
                end = asyncio.get_running_loop().time() + self._config.monitor_timeout_s
                return await self._unless_down(name, question, self._config.max_attempts, end)

    async def _monitor(self, name: str, request: RolloutRequest, question: _Question) -> None:
        """One that only monitors, beside the loop: it holds the images no longer than its deadline."""
        end, scores = asyncio.get_running_loop().time() + self._config.monitor_timeout_s, None
        try:
            async with asyncio.timeout_at(end):
                await self._room[name].acquire()
            try:
                scores = await self._unless_down(name, question, 1, end)
            finally:
                self._room[name].release()
        except (TimeoutError, ObjectsLostError, *STORE_FULL):  # a group whose images are lost is drawn again
            pass
        except ValueError as error:
            self._note(name, error, 1)
        finally:
            self._monitored.add(request.epoch, name, request.items[0].group_id, request.num_images, scores)

    async def _unless_down(self, name: str, question: _Question, attempts: int, end: float) -> Scores | None:
        outage = self._outages[name]
        if not outage.ask():
            return None
        try:
            async with asyncio.timeout_at(end):
                scores = await self._attempts(name, question, attempts, self._config.monitor_timeout_s)
        except TimeoutError:
            scores = DeadlineError(f"no scores within {self._config.monitor_timeout_s:g} s")
        if not isinstance(scores, Scores):
            self.num_missing[name, type(scores).__name__] += 1
            outage.failed(one_line(scores))
            return None
        if np.isfinite(scores.values).any():
            outage.answered()
        else:
            outage.failed("it answers, and every score is missing")
        return scores

    async def _attempts(
        self,
        name: str,
        question: _Question,
        attempts: int,
        timeout_s: float,
        room: contextlib.AbstractAsyncContextManager[Any] | None = None,
    ) -> Scores | BaseException | None:
        """The scores, or what the last attempt failed with; each attempt waits for room."""
        failure: BaseException | None = None
        for attempt in range(attempts):
            if attempt:
                await asyncio.sleep(BACKOFF_S * 2 ** (attempt - 1))
            try:
                async with room or contextlib.nullcontext():
                    with self._pending[name].one() if room else contextlib.nullcontext():
                        return await self._call(name, question, timeout_s)
            except (RayError, RayServeException, DeadlineError) as error:
                if lost(error):
                    raise ObjectsLostError(f"reward {name}: the images are lost: {one_line(error)}") from error
                failure = error.cause if isinstance(error, RayTaskError) else error
                if type(failure) is ValueError:
                    raise ValueError(str(failure)) from error
            if isinstance(failure, STORE_FULL):
                raise failure
        return failure

    async def _call(self, name: str, question: _Question, timeout_s: float) -> Scores:
        response = self._handles[name].score.remote(question.images, question.texts, question.metadata)
        try:
            async with asyncio.timeout(timeout_s):
                return await response
        except TimeoutError:
            response.cancel()
            raise DeadlineError(f"reward {name}: no scores within {timeout_s:g} s") from None
        except asyncio.CancelledError:
            response.cancel()
            raise

    def _note(self, name: str, failure: BaseException | None, attempts: int) -> None:
        cause = (name, type(failure).__name__)
        self.num_missing[cause] += 1
        if self.num_missing[cause] == 1:
            logger.warning(
                "reward %s is missing for a rollout after %d attempts: %s%s (further ones are only counted)",
                name,
                attempts,
                one_line(failure),
                f"; lower rewards.{name}.micro_batch_size" if out_of_memory(failure) else "",
            )


def _calls(name: str, count: int) -> str:
    return f"{count} calls of {name}"


def _handle(name: str) -> DeploymentHandle:
    try:
        return serve.get_app_handle(name)
    except RayServeException as error:
        raise RuntimeError(f"Serve application {name} does not run on this cluster: deploy it first") from error
