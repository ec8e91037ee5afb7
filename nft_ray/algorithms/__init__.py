"""What an algorithm is, one file each: which records it needs of a sampler, weights from rewards, the loss per pair.

Lives here: base (the Protocol; the name of a file is the registry), the algorithms, and what they share: advantages,
schedules, batch, signal, remarks. Pure functions, tensors in, tensors out.
Does not: how an image is drawn (flow/, cores/), what it earns (rewards/), when a step is taken (cores/learner.py).
"""
