"""The embedded default: a world of coloured shapes in which everything can be tried on a CPU, offline.

Lives here: the grammar of its prompts, its pictures, its detector, nano-sd3 and the script that pretrained it.
Does not: the family that nano-sd3 belongs to (models/sd3.py), the reward that asks the detector (rewards/geneval.py).
"""
