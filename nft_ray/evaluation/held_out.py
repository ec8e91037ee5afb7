"""A run's own evaluation: the policy after an epoch, on the run's held-out lines, kept in the folder of the run.

Killed, it goes on where it was, but only for the very policy that it began with: a run that goes on at its last
checkpoint trains anew towards that epoch, and another policy (a checksum says so) begins from nothing.
"""

import time
from pathlib import Path

from nft_ray.config import ExperimentConfig
from nft_ray.evaluation.evaluator import Progress, evaluate
from nft_ray.evaluation.results import EvaluationFolder, about, identity
from nft_ray.evaluation.summary import summarise
from nft_ray.prompts.draw import PromptSet, evaluation_requests
from nft_ray.roles import EvaluationRoles
from nft_ray.runs.evaluations import lines_folder, save_evaluation
from nft_ray.types import Adapter, Adapters, EvalResult


async def evaluate_epoch(
    config: ExperimentConfig,
    roles: EvaluationRoles,
    test: PromptSet,
    results: Path,
    *,
    epoch: int,
    adapters: Adapters | None,
    progress: Progress,
) -> EvalResult:
    """Every test line once, with the EMA of `adapters`, which samplers have loaded; None = the base model.

    Writes RESULTS/evaluations/epoch-N/ as it goes, epoch-N.json and .npz in the end.
    """
    started = time.perf_counter()
    checksum = adapters.checksums["ema"] if adapters else None
    lora = config.model.lora if adapters and config.model.tuning == "lora" else None
    what = identity(config, test, lora, checksum)
    adapter: Adapter = "ema" if adapters else "reference"
    version = adapters.version if adapters else 0
    requests = evaluation_requests(test, config, epoch=epoch, policy_version=version, adapter=adapter)
    pictures = sorted({prompt.id for prompt in test.lines} & set(config.evaluation.picture_lines))
    folder = EvaluationFolder(lines_folder(results, epoch))
    source = f"the EMA after {epoch} epochs of {config.run.name}" if adapters else None
    with folder.claim(what, about(config, source), overwrite=not folder.holds(what)):
        lines = await evaluate(config, roles, folder, requests, pictures=pictures, progress=progress)
    images = {line: folder.image(line) for line in pictures}
    result = summarise(lines, images, seconds=time.perf_counter() - started)
    save_evaluation(results, epoch, result)
    return result
