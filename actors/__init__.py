"""Ray actors around the cores of nft_ray: the roles of the trainer on a cluster.

Lives here: pools with retry and replacement, the learner group, placement, the rewards as the driver sees them.
Does not: what a worker computes (nft_ray/cores/), which rewards run and where (deployments/ is reached by NAME only).
"""
