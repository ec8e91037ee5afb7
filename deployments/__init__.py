"""Ray Serve around the rewards of nft_ray: one generic deployment, and who deploys, scales and deletes it.

Lives here: the deployment, the plane of all of them, HTTP, the sglang server of a reward.
Does not: what a reward computes (nft_ray/rewards/), who asks it in a run (actors/scorers.py).
"""
