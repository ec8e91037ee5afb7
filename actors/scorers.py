"""The reward plane as the driver sees it: Serve applications called by NAME, images by reference, all at once.

    rollout.images (reference) ──► reward-A ──► Scores ─┐
                               └─► reward-B ──► Scores ─┴─► Rewards; None where one could not be had

Failure policy
- Serve retries a request only until a replica accepts it; from there the retries are ours. Whatever befalls a replica
  (it died, is unreachable, raised, or let the deadline pass) is tried again, `scorers.max_attempts` times in all, and
  the call that was given up is cancelled. After that the reward of this rollout is missing: NaN and counted, never 0,
  and logged once per cause. The trainer decides how much may be missing.
- A ValueError of the reward says that the input is wrong, or what it returned: the user's mistake, raised at once. (Its
  subclasses, such as JSONDecodeError, are the world's doing and are retried.)
- One call scores one rollout. Its deadline, `scorers.timeout_s`, includes waiting for a replica to be free.

Who deploys the applications, and what runs in them, is not known here.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ray import serve
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from actors.pool import DeadlineError, Pending, one_line, together
from nft_ray.config import ExperimentConfig
from nft_ray.rewards.base import Scores
from nft_ray.rewards.combine import assemble
from nft_ray.types import Rewards, Rollout, RolloutRequest

logger = logging.getLogger(__name__)

STORE_FULL = (ObjectStoreFullError, OutOfDiskError)
"""The images were drawn, and there was no room for them: no missing reward, for the next ones find none, too."""
BACKOFF_S = 0.2
"""Pause before the second attempt; doubled for each further one."""


class ServeScorers:
    """roles.Scorers over Serve applications `reward-NAME`; `num_missing` counts rollouts by (reward, cause)."""

    def __init__(self, config: ExperimentConfig) -> None:
        self._config = config.scorers
        self._weights = config.trained_weights
        self._handles = {name: _handle(name) for name in config.rewards}
        self._room = {name: asyncio.Semaphore(self._config.max_in_flight) for name in config.rewards}
        self._pending = Pending(lambda count: f"{count} calls of {', '.join(config.rewards)}")
        self.num_missing: Counter[tuple[str, str]] = Counter()

    async def score(self, request: RolloutRequest, rollout: Rollout) -> Rewards:
        prompts = [item.prompt for item in request.items for _ in range(item.num_images)]
        texts, metadata = [prompt.text for prompt in prompts], [prompt.metadata for prompt in prompts]
        scores = await together([self._score(name, rollout.images, texts, metadata) for name in self._handles])
        return assemble(dict(zip(self._handles, scores, strict=True)), request.num_images, self._weights)

    async def close(self) -> None:
        """Stop the handles' background work; the applications live on."""
        await asyncio.gather(*(handle.shutdown_async() for handle in self._handles.values()), return_exceptions=True)

    async def _score(
        self, name: str, images: Any, texts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Scores | None:
        """One reward of one rollout, or None when it could not be had."""
        failure: BaseException | None = None
        for attempt in range(self._config.max_attempts):
            if attempt:
                await asyncio.sleep(BACKOFF_S * 2 ** (attempt - 1))
            try:
                async with self._room[name]:
                    with self._pending.one():
                        return await self._call(name, images, texts, metadata)
            except RayTaskError as error:
                if type(error.cause) is ValueError:
                    raise ValueError(str(error.cause)) from error
                failure = error.cause
            except (RayError, RayServeException, DeadlineError) as error:
                failure = error
            if isinstance(failure, STORE_FULL):
                raise failure
        self._note(name, failure)
        return None

    async def _call(self, name: str, *arguments: Any) -> Scores:
        response = self._handles[name].score.remote(*arguments)
        try:
            async with asyncio.timeout(self._config.timeout_s):
                return await response
        except TimeoutError:
            response.cancel()
            raise DeadlineError(f"reward {name}: no scores within {self._config.timeout_s:g} s") from None
        except asyncio.CancelledError:
            response.cancel()
            raise

    def _note(self, name: str, failure: BaseException | None) -> None:
        cause = (name, type(failure).__name__)
        self.num_missing[cause] += 1
        if self.num_missing[cause] == 1:
            logger.warning(
                "reward %s is missing for a rollout after %d attempts: %s (further ones are only counted)",
                name,
                self._config.max_attempts,
                one_line(failure),
            )


def _handle(name: str) -> DeploymentHandle:
    application = f"reward-{name}"  # the interface to deployments/build.py
    try:
        return serve.get_app_handle(application)
    except RayServeException as error:
        raise RuntimeError(f"Serve application {application} does not run on this cluster: deploy it first") from error
