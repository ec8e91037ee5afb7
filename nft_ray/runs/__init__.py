"""The folder of a run and what is told of it: checkpoints, stages, metrics, held-out figures, pictures, the export.

Lives here: everything that is written under RUNS/NAME, and who may go on in it.
Does not: the loop that makes it (trainer.py), how it is evaluated (evaluation/), Ray.
"""
