"""What others get of a trained policy, all of it loading in plain diffusers.

    DIR/pytorch_lora_weights.safetensors    the LoRA: float32, alpha in its metadata
    DIR/README.md, reward_curve.png         the model card (card.py)
    DIR/config.yaml                         the experiment
    DIR/transformer/                        merged, beside the LoRA; of model.tuning: full, instead of it

The LoRA file itself is written by `nft_ray.models.lora.export_lora`, as at the end of every run. Torch is imported
where it is written: the driver of a run needs it for nothing else.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np

from nft_ray.config import ExperimentConfig, ModelConfig, dump, load
from nft_ray.models.base import family, load_model
from nft_ray.models.parts import prepare
from nft_ray.prompts.draw import load_prompts, shared_tags
from nft_ray.runs import report
from nft_ray.runs.card import model_card, shareable
from nft_ray.runs.checkpoint import newest_whole, read_ema, whole_checkpoints, write_atomically
from nft_ray.runs.evaluations import evaluated_epochs, load_evaluation
from nft_ray.runs.metrics import read_metrics
from nft_ray.runs.stages import stage_at
from nft_ray.types import Weights

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""As safetensors spells them."""


TRANSFORMER = "transformer"
LORA = "pytorch_lora_weights.safetensors"
BESIDE = ("README.md", "reward_curve.png", "config.yaml")


def export_run(
    run: Path, output: Path | None, *, epoch: int | None, merge: bool, hub_id: str | None = None
) -> tuple[Path, list[str]]:
    """Write the export of a run's checkpoint after `epoch` epochs (None: the newest); (folder, what was written).

    `hub_id`: where it will be pushed to, for the card. ValueError with one line before anything is written.
    """
    if not (run / "config.yaml").is_file():
        raise ValueError(f"export {run}: holds no config.yaml; name the folder of a run, such as runs/quickstart")
    config = load(run / "config.yaml")
    full = config.model.tuning == "full"
    checkpoint = _checkpoint(run, epoch)
    weights = read_ema(checkpoint)
    state = json.loads((checkpoint / "state.json").read_text())
    target = output or run / f"export-{checkpoint.name}"
    if (target / TRANSFORMER).exists() and not (merge or full):
        raise ValueError(f"--output {target}: holds a merged transformer; add --merge, or choose another folder")
    target.mkdir(parents=True, exist_ok=True)
    _write(weights, config.model, lora=target, transformer=target / TRANSFORMER)
    merge = merge and not full  # all of it is trained: there is nothing to merge
    merged_dtype = export_merged(weights, config.model, target / TRANSFORMER) if merge else None
    lines = [line for line in read_metrics(run) if line["epoch"] <= state["epoch"]]
    report.reward_curve(lines, target / "reward_curve.png")
    write_atomically(target / "config.yaml", dump(shareable(config)))
    card = model_card(
        shareable(config),
        epoch=state["epoch"],
        figures=held_out_figures(run, config, state["epoch"]),
        versions=state["packages"],
        hub_id=hub_id,
        merged_dtype=merged_dtype,
    )
    write_atomically(target / "README.md", card)
    return target, [*([] if full else [LORA]), *BESIDE, *([TRANSFORMER] if full or merge else [])]


def held_out_figures(run: Path, config: ExperimentConfig, epoch: int) -> str:
    """The held-out table of the newest evaluation up to this epoch, or why there is none."""
    stage = stage_at(config, epoch)
    folder, prompts = stage.results(run), stage.config.prompts
    evaluated = max((found for found in evaluated_epochs(folder) if found <= epoch), default=0)
    if evaluated == 0:
        return "not evaluated since training began"
    if 0 not in evaluated_epochs(folder):
        return f"after {evaluated} epochs; the base model's figures are lost: the training command works them out again"
    try:
        tags = shared_tags(load_prompts(prompts.train), load_prompts(prompts.test))
        note = ""
    except ValueError as error:
        tags, note = set(), f"\nprompts that are trained on, too, are not marked: {error}"
    base, trained = load_evaluation(folder, 0), load_evaluation(folder, evaluated)
    table = report.table(base.metrics, trained.metrics, trained.counts, shared_tags=tags)
    return f"after {evaluated} epochs\n\n{table}{note}"


def export_policy(weights: Weights, config: ModelConfig, folder: Path) -> Path:
    """Write what a run has trained for plain diffusers: FOLDER/lora, or with full fine-tuning FOLDER/transformer."""
    return _write(weights, config, lora=folder / "lora", transformer=folder / TRANSFORMER)


def export_merged(weights: Weights, config: ModelConfig, folder: Path) -> str:
    """Write the transformer with the LoRA in it, in diffusers' format; returns its data type: that of the base's files.

    As a sampler merges: W + alpha / r * B A in float32, rounded once.
    """
    import torch

    from nft_ray.models.lora import merged

    source = prepare(config, (), transformer_only=True)
    dtype = stored_dtype(source / "transformer")
    base = config.model_copy(update={"dtype": dtype})
    transformer = load_model(base, torch.device("cpu"), transformer_only=True).transformer
    moved = merged(transformer, config.lora, family(config).LORA_TARGETS)(weights)
    assert moved == len(weights), f"{moved} of {len(weights)} LoRA tensors were merged"
    transformer.save_pretrained(str(folder))  # type: ignore[operator]  # a diffusers ModelMixin
    return dtype


def stored_dtype(folder: Path) -> str:
    """The data type of most values in a folder's weights (files without a variant in their name)."""
    values: Counter[str] = Counter()
    for path in sorted(folder.glob("*.safetensors")):
        if path.name.count(".") > 1:
            continue
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                values[entry["dtype"]] += int(np.prod(entry["shape"], dtype=np.int64))
    if not values or (most := values.most_common(1)[0][0]) not in DTYPES:
        raise ValueError(f"{folder}: weights of type {', '.join(values) or 'none'}; known: {', '.join(DTYPES)}")
    return DTYPES[most]


def _write(weights: Weights, config: ModelConfig, *, lora: Path, transformer: Path) -> Path:
    """Write a LoRA into the one folder, or of full fine-tuning the transformer into the other; returns which."""
    from nft_ray.models.full import export_transformer
    from nft_ray.models.lora import export_lora

    if config.tuning == "full":
        export_transformer(weights, config, transformer)
        return transformer
    export_lora(weights, config, lora)
    return lora


def _checkpoint(run: Path, epoch: int | None) -> Path:
    whole = whole_checkpoints(run / "checkpoints")
    if not whole:
        raise ValueError(f"export {run}: holds no checkpoint yet")
    if epoch is None:
        newest = newest_whole(run / "checkpoints")
        if newest is None:
            raise ValueError(f"export {run}: every checkpoint there is damaged")
        return newest
    found = {int(path.name.removeprefix("epoch-")): path for path in whole}
    if epoch not in found:
        raise ValueError(f"--checkpoint {epoch}: not in {run}; there are: {', '.join(map(str, found))}")
    return found[epoch]
