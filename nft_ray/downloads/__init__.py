"""What others publish, brought to this machine: weights of rewards, prompt sets, pipelines, LoRAs.

Lives here: where a published file lies, the downloader, the one cache, the checks of what came.
Does not: which files a reward or a model needs (rewards/, models/, prompts/ say so), nor what is in them.
"""
