"""The three planes of one run on Ray: placed, built, handed over, and taken down again whatever happens.

Failure policy: what cannot fit the cluster fails before anything is started; a failure while starting, or in the
body, kills every actor that was started. Serve applications are not ours: the caller deploys them before and deletes
them after.
"""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from logging import getLogger

import ray

from actors.learners import LearnerFactory, LearnerGroup
from actors.placement import check
from actors.pool import together
from actors.samplers import SamplerFactory, SamplerPool
from actors.scorers import ServeScorers
from nft_ray.config import ExperimentConfig
from nft_ray.learner import LearnerCore
from nft_ray.roles import EvaluationRoles, Roles
from nft_ray.sampler import SamplerCore

logger = getLogger(__name__)


@asynccontextmanager
async def ray_roles(
    config: ExperimentConfig,
    sampler_core: SamplerFactory = SamplerCore,
    learner_core: LearnerFactory = LearnerCore,
) -> AsyncIterator[Roles]:
    """Roles whose workers are ready. Needs a connected Ray and the applications `reward-NAME`; cores are picklable."""
    check(config, ray.cluster_resources())
    started = time.monotonic()
    scorers = ServeScorers(config)
    samplers, learners = SamplerPool(config, sampler_core), LearnerGroup(config, learner_core)
    try:
        await together([samplers.start(), learners.start()])
        seconds = time.monotonic() - started
        logger.info("%d samplers and %d learners are ready after %.1f s", samplers.size, learners.size, seconds)
        yield Roles(samplers=samplers, scorers=scorers, learners=learners)
    finally:
        samplers.close()
        learners.close()
        await scorers.close()


@asynccontextmanager
async def ray_evaluation_roles(
    config: ExperimentConfig, sampler_core: SamplerFactory = SamplerCore
) -> AsyncIterator[EvaluationRoles]:
    """Samplers and scorers as in `ray_roles`; no learner is placed."""
    check(config, ray.cluster_resources(), training=False)
    scorers, samplers = ServeScorers(config), SamplerPool(config, sampler_core)
    try:
        await samplers.start()
        yield EvaluationRoles(samplers=samplers, scorers=scorers)
    finally:
        samplers.close()
        await scorers.close()
