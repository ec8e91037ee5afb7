"""The mathematics of a flow: the straight path between image and noise, its solvers, at which times is trained.

Lives here: the one time convention (t in [0, 1], 1 = noise; v = noise - x0). Pure functions of tensors.
Does not: the number 1000, latents and schedules of a family (models/), losses (algorithms/).
"""
