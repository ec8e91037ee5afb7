"""DiffusionNFT: the epoch loop, the roles that it calls, the records between them, and what all of these are made of.

Lives here: types, roles, trainer, local (the roles in one process), seeding; every other noun has a room of its own.
Does not: Ray (actors/) and Serve (deployments/), which only the command line (cli/) knows. This imports without either.
"""
