"""Places in the cluster: one bundle per learner and, where samplers share its device, per sampler and learner."""

from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from nft_ray.config import ExperimentConfig

TINY = 1e-4
"""Ray's smallest amount: a bundle of nothing is refused."""


def reserve(config: ExperimentConfig) -> PlacementGroup:
    """Ask for the bundles of a run; returns at once, whoever is placed in one waits for it.

    Two fractions of a GPU are of the same card for certain only within one bundle.
    """
    learner, sampler = config.learner, config.sampler
    cpus, gpus = learner.num_cpus, learner.num_gpus
    if config.cluster.placement == "colocated":
        cpus, gpus = round(cpus + sampler.num_cpus, 4), round(gpus + sampler.num_gpus, 4)
    place = {"CPU": cpus or TINY} | ({"GPU": gpus} if gpus else {})
    return placement_group([place] * learner.num_workers, strategy="PACK", name=f"{config.run.name}/learner")


def in_bundle(bundles: PlacementGroup, index: int) -> PlacementGroupSchedulingStrategy:
    """Where worker `index` belongs."""
    return PlacementGroupSchedulingStrategy(bundles, placement_group_bundle_index=index)
