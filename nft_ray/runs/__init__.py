"""The folder of a run and what is told of it: checkpoints, stages, metrics, pictures, the export.

Lives here: everything that is written under RUNS/NAME, and who may go on in it.
Does not: the loop that makes it (trainer.py), evaluations (evaluation/), Ray.
"""
