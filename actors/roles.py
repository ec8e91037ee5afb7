"""The three planes of one run on Ray: placed, built, handed over, and taken down again whatever happens.

Failure policy: what cannot fit the cluster fails before anything is started; a failure while starting, or in the
body, kills every actor that was started. Serve applications are not ours: the caller deploys them before and deletes
them after.
"""

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from logging import getLogger

from ray.util import remove_placement_group

from actors.answers import together
from actors.bundles import reserve
from actors.learners import LearnerGroup
from actors.nodes import cluster_now
from actors.placement import check
from actors.rank import LearnerFactory, learner_core
from actors.samplers import SamplerFactory, SamplerPool, sampler_core
from actors.scorers import ServeScorers
from nft_ray.config import ExperimentConfig
from nft_ray.cores.phases import alternate
from nft_ray.roles import EvaluationRoles, Roles

logger = getLogger(__name__)


@asynccontextmanager
async def ray_roles(
    config: ExperimentConfig,
    make_sampler: SamplerFactory = sampler_core,
    make_learner: LearnerFactory = learner_core,
    *,
    applications: Mapping[str, str] | None = None,
) -> AsyncIterator[Roles]:
    """Roles whose workers are ready. Needs a connected Ray and the rewards' applications; cores are picklable."""
    check(config, cluster_now())
    started = time.monotonic()
    scorers = ServeScorers(config, applications)
    colocated, bundles = config.cluster.placement == "colocated", reserve(config)
    samplers = SamplerPool(config, make_sampler, bundles if colocated else None)
    learners = LearnerGroup(config, bundles, make_learner)
    try:
        if colocated:  # one after the other: both may not fit the device
            await learners.start()
            await learners.park()
            await samplers.start()
        else:
            await together([samplers.start(), learners.start()])
        seconds = time.monotonic() - started
        logger.info("%d samplers and %d learners are ready after %.1f s", samplers.size, learners.size, seconds)
        shown = alternate(samplers, learners) if colocated else (samplers, learners)
        yield Roles(samplers=shown[0], scorers=scorers, learners=shown[1])
    finally:
        samplers.close()
        learners.close()
        remove_placement_group(bundles)
        await scorers.close()


@asynccontextmanager
async def ray_evaluation_roles(
    config: ExperimentConfig,
    make_sampler: SamplerFactory = sampler_core,
    *,
    applications: Mapping[str, str] | None = None,
) -> AsyncIterator[EvaluationRoles]:
    """Samplers and scorers as in `ray_roles`; no learner is placed.

    Colocated, a sampler keeps its learner's share to itself: two halves of two cards could else be of one card.
    """
    check(config, cluster_now(), training=False)
    scorers = ServeScorers(config, applications)
    bundles = reserve(config) if config.cluster.placement == "colocated" else None
    samplers = SamplerPool(config, make_sampler, bundles)
    try:
        await samplers.start()
        yield EvaluationRoles(samplers=samplers, scorers=scorers)
    finally:
        samplers.close()
        if bundles is not None:
            remove_placement_group(bundles)
        await scorers.close()
