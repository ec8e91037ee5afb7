"""Image models, one file per ARCHITECTURE, and the LoRA in and out of any of them.

Lives here: base (the Protocol; the name of a file is the registry), the families, conditioning, LoRA and full tuning;
parts (which files of a pipeline are needed), layers (what its transformer is made of), resolve (what an experiment
takes from files). Only conditioning, lora and full import torch at the top: a driver loads none of them.
Does not: who samples or trains (cores/), the solver (flow/), where weights are downloaded (downloads/).
"""
