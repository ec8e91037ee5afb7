"""What an experiment takes from files: the second step after its YAML was read, before anything starts.

    load (the YAML alone) ──► resolve (the LoRA of `model.lora.start`: its header) ──► an experiment that says it all

The resolved experiment is what a run keeps as config.yaml: it says rank, alpha and targets itself, so nobody reads the
LoRA for them again.
"""

from nft_ray.config import ExperimentConfig, LoraConfig
from nft_ray.models.lora_files import find_lora

OWN = ("rank", "alpha", "targets")
"""Of `model.lora`: what a LoRA to start from says itself."""


def resolve(config: ExperimentConfig) -> ExperimentConfig:
    """The experiment with rank, alpha and targets of the LoRA to start from; a Hub id's is downloaded.

    ValueError with one line where there is no such LoRA, or the YAML says something else of it.
    """
    lora = config.model.lora
    if lora.start is None or (lora.targets is not None and lora.model_fields_set.issuperset(OWN)):
        return config
    own = started(lora)
    return config.model_copy(update={"model": config.model.model_copy(update={"lora": own})})


def started(lora: LoraConfig) -> LoraConfig:
    """`lora` as the LoRA that it starts from makes it; ValueError with one line where what it says differs."""
    assert lora.start is not None
    own = find_lora(lora.start).config
    for name in OWN:
        given, has = getattr(lora, name), getattr(own, name)
        if name not in lora.model_fields_set or given is None:
            continue
        if (set(given) != set(has)) if name == "targets" else given != has:
            raise ValueError(f"model.lora.{name} = {given}: the LoRA to start from has {has}; leave {name} out")
    return own.model_copy(update={"start": lora.start})
