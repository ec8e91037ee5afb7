"""What one worker does, on one device: draw samples, learn from them, hand weights over. torch only.

Lives here: the sampler, the learner, what a learner trains, and what both share: devices, parking, publishing.
Does not: Ray, rewards, files of a run, the epoch loop. Actors hold these classes; so does one process (local.py).
"""
