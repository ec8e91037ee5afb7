"""Image models, one file per ARCHITECTURE, and the LoRA in and out of any of them.

Lives here: base (the Protocol; the name of a file is the registry), the families, conditioning, LoRA and full tuning;
parts (which files of a pipeline are needed), resolve (what an experiment takes from files).
Does not: who samples or trains (cores/), the solver (flow/), where weights are downloaded (downloads/).
"""
