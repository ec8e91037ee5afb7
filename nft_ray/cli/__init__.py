"""The command `nft-ray`: the composition root. Only it knows nft_ray, actors and deployments; nobody imports it.

Lives here: parsing, choosing the roles (one process or Ray), printing, exit codes.
Does not: anything that another program could want; that is in the room of its noun.
"""
