"""What others publish, brought to this machine: weights of rewards, prompt sets, pipelines, LoRAs.

Lives here: published (one file), cache (where it lies), transfer (its bytes), fetch (all of it), pipelines.
Does not: which files a reward or a model needs (rewards/, models/, prompts/ say so), nor what is in them.
"""
