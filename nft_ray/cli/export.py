"""`nft-ray export RUN`: a checkpoint's EMA policy for plain diffusers, with its card; merged and pushed on request.

    DIR/pytorch_lora_weights.safetensors    the LoRA: float32, alpha in its metadata
    DIR/README.md, reward_curve.png         the model card
    DIR/config.yaml                         the experiment
    DIR/transformer/                        with --merge, beside the LoRA; of model.tuning: full, instead of it

What can be known to fail (no checkpoint, no token) fails before anything is written.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors.numpy import load_file

from nft_ray.cli.train import shared_tags
from nft_ray.config import ExperimentConfig, dump, load
from nft_ray.downloads.pipelines import FAILURES
from nft_ray.models.full import export_transformer
from nft_ray.models.lora import export_lora
from nft_ray.prompts.draw import load_prompts
from nft_ray.runs import report
from nft_ray.runs.checkpoint import whole_checkpoints, write_atomically
from nft_ray.runs.evaluations import evaluated_epochs, load_evaluation
from nft_ray.runs.export import export_merged, model_card, shareable
from nft_ray.runs.stages import stage_at
from nft_ray.runs.tracking import read_metrics

TRANSFORMER = "transformer"
LORA = "pytorch_lora_weights.safetensors"
BESIDE = ("README.md", "reward_curve.png", "config.yaml")


def export_command(args: argparse.Namespace) -> int:
    """Write the export, and push it where that is asked; returns the exit status."""
    run = Path(args.run).expanduser()
    if not (run / "config.yaml").is_file():
        raise ValueError(f"export {args.run}: holds no config.yaml; name the folder of a run, such as runs/quickstart")
    config = load(run / "config.yaml")
    full = config.model.tuning == "full"
    token = _token(args.push) if args.push else None
    checkpoint = _checkpoint(run, args.checkpoint)
    state = json.loads((checkpoint / "state.json").read_text())
    epoch, versions = state["epoch"], state["packages"]
    target = Path(args.output).expanduser() if args.output else run / f"export-{checkpoint.name}"
    if (target / TRANSFORMER).exists() and not (args.merge or full):
        raise ValueError(f"--output {target}: holds a merged transformer; add --merge, or choose another folder")
    target.mkdir(parents=True, exist_ok=True)
    weights, merged_dtype = load_file(checkpoint / "ema.safetensors"), None
    if full:  # all of it is trained: there is nothing to merge
        export_transformer(weights, config.model, target / TRANSFORMER)
    else:
        export_lora(weights, config.model, target)
        merged_dtype = export_merged(weights, config.model, target / TRANSFORMER) if args.merge else None
    report.reward_curve([line for line in read_metrics(run) if line["epoch"] <= epoch], target / "reward_curve.png")
    write_atomically(target / "config.yaml", dump(shareable(config)))
    card = model_card(
        shareable(config),
        epoch=epoch,
        figures=_figures(run, config, epoch),
        versions=versions,
        hub_id=args.push,
        merged_dtype=merged_dtype,
    )
    write_atomically(target / "README.md", card)
    written = [*([] if full else [LORA]), *BESIDE, *([TRANSFORMER] if full or args.merge else [])]
    for name in written:
        sys.stdout.write(f"{target / name}\n")
    if token:
        sys.stdout.write(f"{push(target, args.push, token, written)}\n")
    return 0


def push(folder: Path, hub_id: str, token: str, written: Sequence[str]) -> str:
    """Upload these files and folders of an export in one commit, to a repository that is made private if it is not
    there; returns its URL.

    ValueError where the Hub refuses, RuntimeError where it cannot be reached, with one line.
    """
    api = HfApi(token=token)
    patterns = [f"{name}/*" if (folder / name).is_dir() else name for name in written]
    try:
        url = api.create_repo(hub_id, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=hub_id, folder_path=folder, allow_patterns=patterns, commit_message="exported by nft_ray"
        )
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise ValueError(
                f"--push {hub_id}: the Hub refuses HF_TOKEN ({status}): it needs write access to that repository; "
                "see https://huggingface.co/settings/tokens"
            ) from None
        raise RuntimeError(f"--push {hub_id}: {_cause(error)}; {folder} is whole: push again") from None
    except FAILURES as error:
        raise RuntimeError(f"--push {hub_id}: {_cause(error)}; {folder} is whole: push again") from None
    return str(url)


def _token(hub_id: str) -> str:
    try:
        validate_repo_id(hub_id)
    except HFValidationError:
        raise ValueError(f"--push {hub_id}: is no Hub id; write owner/name") from None
    if hub_id.count("/") != 1:
        raise ValueError(f"--push {hub_id}: is no Hub id; write owner/name")
    token = os.environ.get("HF_TOKEN")
    if not token:
        raise ValueError(
            f"--push {hub_id}: HF_TOKEN is not set; make one with write access at https://huggingface.co/settings/tokens"
        )
    return token


def _checkpoint(run: Path, epoch: int | None) -> Path:
    whole = whole_checkpoints(run / "checkpoints")
    if not whole:
        raise ValueError(f"export {run}: holds no checkpoint yet")
    if epoch is None:
        return whole[-1]
    found = {int(path.name.removeprefix("epoch-")): path for path in whole}
    if epoch not in found:
        raise ValueError(f"--checkpoint {epoch}: not in {run}; there are: {', '.join(map(str, found))}")
    return found[epoch]


def _figures(run: Path, config: ExperimentConfig, epoch: int) -> str:
    """The held-out table of the newest evaluation up to this epoch."""
    stage = stage_at(config, epoch)
    folder, config = stage.results(run), stage.config
    evaluated = max((found for found in evaluated_epochs(folder) if found <= epoch), default=0)
    if evaluated == 0:
        return "not evaluated since training began"
    try:
        tags = shared_tags(load_prompts(config.prompts.train), load_prompts(config.prompts.test))
        note = ""
    except ValueError as error:
        tags, note = set(), f"\nprompts that are trained on, too, are not marked: {error}"
    base, trained = load_evaluation(folder, 0), load_evaluation(folder, evaluated)
    table = report.table(base.metrics, trained.metrics, trained.counts, shared_tags=tags)
    return f"after {evaluated} epochs\n\n{table}{note}"


def _cause(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
