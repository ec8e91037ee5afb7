"""The model card of an exported policy: where it comes from, what it scored, how to load it. Pure: text out."""

import inspect
from collections.abc import Mapping

import yaml

from nft_ray.config import ExperimentConfig, dump, parse, shared
from nft_ray.downloads.pipelines import NANO, location
from nft_ray.models.base import family, pipeline_class
from nft_ray.runs.stages import stage_at, stages_of


def model_card(
    config: ExperimentConfig,
    *,
    epoch: int,
    figures: str,
    versions: Mapping[str, str],
    hub_id: str | None = None,
    merged_dtype: str | None = None,
) -> str:
    """README.md of an exported policy, with the Hub's header. `figures`: the held-out table, or why there is none."""
    name, model = config.run.name, config.model
    algorithms = {part.algorithm.TAG: part.algorithm for _, _, part in _parts(config, epoch)}
    trained_with = " and ".join(f"[{one.TITLE}]({one.PAPER})" for one in algorithms.values())
    full = model.tuning == "full"
    header = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": [*([] if full else ["lora"]), "diffusers", "text-to-image", "reinforcement-learning", *algorithms],
    }
    if location(model.path) is None:
        header["base_model"] = model.path
    commit = versions.get("commit")
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {name}: {'all weights of the transformer of' if full else 'a LoRA for'} {model.path}",
        f"Trained online with {trained_with} by nft_ray "
        f"{versions.get('nft_ray', 'of unknown version')}{f', commit {commit}' if commit else ''}. It is the EMA of "
        f"the policy after {epoch} epochs.",
        _facts(config, epoch),
        f"## Rewards\n\n{_rewards(config, epoch)}",
        f"## Held-out figures\n\n```\n{figures}\n```\n\n{_how_evaluated(stage_at(config, epoch).config)}",
        "![training and held-out reward against the epoch](reward_curve.png)",
        f"## Loading it\n\n```python\n{loading_code(config, hub_id or '.')}\n```",
    ]
    if not full:
        parts.append("The file's metadata holds alpha: loaders that ignore it scale the LoRA wrongly.")
    if merged_dtype:
        parts.append(
            f"`transformer/` is the whole transformer with the LoRA merged in ({merged_dtype}): "
            f"`{family(model).PIPELINE}.from_pretrained(BASE, transformer=...)`, without load_lora_weights."
        )
    parts += [
        "The licence of the base model applies.",
        f"## The experiment\n\n```yaml\n{dump(config).strip()}\n```",
        "Versions: " + ", ".join(f"{package} {version}" for package, version in versions.items()),
    ]
    return "\n\n".join(parts) + "\n"


def shareable(config: ExperimentConfig) -> ExperimentConfig:
    """Without what concerns the machines that it ran on only: folders, addresses, numbers of workers."""
    return parse(shared(config))


def loading_code(config: ExperimentConfig, where: str) -> str:
    """Python that draws an image in plain diffusers; only the packaged nano-sd3 is asked of this package."""
    module, model = family(config.model), config.model
    pipeline, used = pipeline_class(model), module.text_parts(model)
    unused = [
        name
        for name in inspect.signature(pipeline.__init__).parameters
        if name.startswith(("text_encoder", "tokenizer")) and name not in used
    ]
    base = 'str(location("nano-sd3"))' if model.path == NANO else repr(model.path)
    loaded = "".join(f", {name}=None" for name in unused)
    options: dict[str, float] = {
        "height": model.height,
        "width": model.width,
        "num_inference_steps": config.evaluation.num_steps,
    }
    if hasattr(module, "DISTILLED_GUIDANCE"):
        given = model.distilled_guidance
        options["guidance_scale"] = module.DISTILLED_GUIDANCE if given is None else given
        options |= {"true_cfg_scale": config.evaluation.guidance} if config.evaluation.guidance > 1 else {}
    else:
        options["guidance_scale"] = config.evaluation.guidance
    if "max_sequence_length" in inspect.signature(pipeline.__call__).parameters:
        options["max_sequence_length"] = model.max_sequence_length
    call = ", ".join(f"{name}={value:g}" for name, value in options.items())
    full, dtype = model.tuning == "full", f"torch_dtype=torch.{model.dtype}"
    lines = ["import torch", f"from diffusers import {'AutoModel, ' if full else ''}{pipeline.__name__}"]
    lines += ["from nft_ray.downloads.pipelines import location"] if model.path == NANO else []
    lines += [""]
    if full:
        lines += [f'transformer = AutoModel.from_pretrained("{where}", subfolder="transformer", {dtype})']
        loaded = f", transformer=transformer{loaded}"
    lines += [f"pipeline = {pipeline.__name__}.from_pretrained({base}, {dtype}{loaded})"]
    lines += [] if full else [f'pipeline.load_lora_weights("{where}")']
    lines += [f'image = pipeline("a photo of a cup", {call}).images[0]']
    return "\n".join(lines)


def _facts(config: ExperimentConfig, epoch: int) -> str:
    model, parts = config.model, _parts(config, epoch)
    drawn = [(last - first, part.prompts) for first, last, part in parts]
    images = sum(epochs * of.groups_per_epoch * of.images_per_group for epochs, of in drawn)
    trained = ", then ".join(f"`{of.train}`{f' ({epochs} epochs)' if len(drawn) > 1 else ''}" for epochs, of in drawn)
    counts = " + ".join(f"{n} epochs x {of.groups_per_epoch} prompts x {of.images_per_group} images" for n, of in drawn)
    rows = {
        "base model": f"{model.path}{f' @ {model.revision}' if model.revision else ''}, {model.dtype}",
        "resolution": f"{model.width} x {model.height} pixels",
        "trained": "all weights of the transformer, float32"
        if model.tuning == "full"
        else f"a LoRA of rank {model.lora.rank}, alpha {model.lora.alpha}, float32",
        "data": f"prompts {trained}; no images but the policy's own",
        "drawn in training": f"{images} images: {counts}",
        "held out": f"prompts `{parts[-1][2].prompts.test}`",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _rewards(config: ExperimentConfig, epoch: int) -> str:
    rows = [
        f"| {first + 1} to {last} | {name} | "
        f"{'only measured' if reward.eval_only or not reward.weight else f'{reward.weight:g}'} |"
        for first, last, part in _parts(config, epoch)
        for name, reward in part.reward_configs.items()
    ]
    return "\n".join(["| epochs | reward | weight |", "|---|---|---|", *rows])


def _parts(config: ExperimentConfig, epoch: int) -> list[tuple[int, int, ExperimentConfig]]:
    """(epochs finished before, epochs finished after, experiment) of what made the policy; without stages, one part."""
    stages = [stage for stage in stages_of(config) if stage.first_epoch < epoch]
    ends = [*(stage.last_epoch for stage in stages[:-1]), epoch]
    return [(stage.first_epoch, end, stage.config) for stage, end in zip(stages, ends, strict=True)]


def _how_evaluated(config: ExperimentConfig) -> str:
    evaluation = config.evaluation
    return (
        f"Every held-out prompt once, {evaluation.num_steps} steps of {evaluation.solver}, guidance "
        f"{evaluation.guidance:g}, seed {evaluation.seed}."
    )
