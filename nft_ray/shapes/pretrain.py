"""Pretrains nano-sd3 from nothing: first the VAE, then the transformer and both text encoders together.

    python -m nft_ray.cli.pretrain [--output runs/nano_sd3]

What counts as right is not known here: the command passes GenEval's rule in, for rewards know of shapes.

Time and machine: about 26 minutes on one core of a 2-core AMD EPYC (Zen 4) that others used too, torch 2.13, float32:
6.4 for the VAE (100 images/s), 2 to draw and encode 60,000 scenes, 17.5 for the flow with its evaluations (155 images/s
over all; 250 while the machine was free). The packaged weights are the EMA of step 1250 of a schedule of 2000, as the
defaults say, made in two runs (the second with --vae). Their strict GenEval on the 480 test lines at 10 steps is 0.525
without guidance and 0.656 with guidance 3.

Only train lines are drawn (see grammar). The flow is trained through the pipeline's own `encode_prompt`, with
gradients, and through the VAE's shift and scale; its times are logit-normal; some prompts are replaced by the empty
one, which diffusers takes for the negative prompt. What is saved are EMA weights. Training stops where the model is
half good, its learning rate at three quarters: reinforcement learning must have something to learn. Steps, not
seconds, end each stage, so the same seed gives the same weights on the same machine and thread count.
"""

import argparse
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline

from nft_ray.seeding import evaluation_seed, mix, noise
from nft_ray.shapes import pipeline as nano
from nft_ray.shapes.detector import Detections, ShapesDetector
from nft_ray.shapes.grammar import TAGS, Metadata, pretraining_lines, test_lines
from nft_ray.shapes.world import render, sample_scene

log = logging.getLogger(__name__)

Judge = Callable[[Detections, Metadata], bool]
"""(what was found in an image, its line) -> whether it is exactly what the line asks for."""

NUM_SCENES = 60_000
NUM_SAMPLING_STEPS = 10
GUIDANCE = 3.0
WARMUP_STEPS = 100
PROMPT_DROPOUT = 0.1
KL_WEIGHT = 1e-6
EDGE_WEIGHT = 0.5
VAE_LEARNING_RATE = 3e-3
MUON_LEARNING_RATE = 3e-3
ADAM_LEARNING_RATE = 1.8e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenes:
    """N drawn scenes: images f32 (N, 3, 32, 32) in [-1, 1] on demand, and for each the number of its prompt."""

    pixels: torch.Tensor
    """uint8 (N, 3, 32, 32)."""
    prompt_ids: torch.Tensor
    """int64 (N,)."""
    prompts: list[str]
    """The distinct train prompts."""

    def images(self, chosen: torch.Tensor) -> torch.Tensor:
        """chosen int64 (B,) -> f32 (B, 3, 32, 32) in [-1, 1]."""
        return self.pixels[chosen].float() / 127.5 - 1


class Ema:
    """A moving average of parameters that starts quickly: after n steps its rate is at most (1 + n) / (10 + n)."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], max_decay: float) -> None:
        self._parameters = list(parameters)
        self._average = [parameter.detach().clone() for parameter in self._parameters]
        self._max_decay = max_decay
        self._num_steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters after an optimizer step."""
        self._num_steps += 1
        decay = min(self._max_decay, (1 + self._num_steps) / (10 + self._num_steps))
        torch._foreach_lerp_(self._average, [parameter.detach() for parameter in self._parameters], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average and the parameters; a second call undoes it."""
        for parameter, average in zip(self._parameters, self._average, strict=True):
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)


def draw_scenes(num_scenes: int, seed: int) -> Scenes:
    """Scenes of train lines only, every line equally often."""
    lines = pretraining_lines()
    prompts = list(dict.fromkeys(line["prompt"] for line in lines))
    numbers = {prompt: number for number, prompt in enumerate(prompts)}
    rng = Random(mix("scenes", seed))
    drawn = [lines[index % len(lines)] for index in range(num_scenes)]
    pixels = np.stack([render(sample_scene(line, rng)) for line in drawn])
    return Scenes(
        pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        prompt_ids=torch.tensor([numbers[line["prompt"]] for line in drawn]),
        prompts=prompts,
    )


def train_vae(vae: AutoencoderKL, scenes: Scenes, *, num_steps: int, batch_size: int, seed: int) -> None:
    """L1 on pixels and on their differences, hardly any KL; sets the VAE's shift and scale in the end. In place."""
    generator = torch.Generator().manual_seed(mix("vae", seed))
    vae.train().to(memory_format=torch.channels_last)
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0)
    ema = Ema(parameters, max_decay=0.995)
    progress = Progress("vae", num_steps, batch_size, every=250)
    for step in range(num_steps):
        x = scenes.images(torch.randint(len(scenes.pixels), (batch_size,), generator=generator))
        posterior = vae.encode(x.contiguous(memory_format=torch.channels_last)).latent_dist
        error = vae.decode(posterior.sample(generator)).sample - x
        l1 = error.abs().mean()
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        loss = l1 + EDGE_WEIGHT * edges + KL_WEIGHT * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        set_learning_rate(optimizer, VAE_LEARNING_RATE * schedule(step, num_steps))
        optimizer.step()
        ema.update()
        progress.log(step, l1=l1)
    ema.swap()
    vae.eval().requires_grad_(False)
    latents = encode(vae, scenes, limit=4096)
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    log.info("vae: latents %.3f +- %.3f, per channel %s", latents.mean(), latents.std(), latents.std((0, 2, 3)))


@torch.no_grad()
def encode(vae: AutoencoderKL, scenes: Scenes, limit: int | None = None) -> torch.Tensor:
    """The scenes' latents by the VAE's shift and scale: the posterior's mode, f32 (N, 8, 8, 8)."""
    chunks = torch.arange(len(scenes.pixels))[:limit].split(256)
    modes = torch.cat([vae.encode(scenes.images(chunk)).latent_dist.mode() for chunk in chunks])
    return (modes - vae.config.shift_factor) * vae.config.scaling_factor


def train_flow(
    pipeline: StableDiffusion3Pipeline,
    scenes: Scenes,
    *,
    num_steps: int,
    stop_after: int,
    batch_size: int,
    seed: int,
    evaluate_every: int,
    snapshot: Callable[[int], None],
) -> None:
    """Flow matching of transformer and text encoders, in place: mean((v - (noise - x0))^2) over logit-normal times.

    The learning rate's schedule is made for `num_steps`; training ends after `stop_after` of them. Every
    `evaluate_every` steps, and after the last, `snapshot(step)` is called with the EMA weights in the pipeline.
    """
    generator = torch.Generator().manual_seed(mix("flow", seed))
    latents = encode(pipeline.vae, scenes)
    modules = (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2)
    parameters = [parameter for module in modules for parameter in module.train().parameters()]
    matrices, others = split_for_muon(modules)
    optimizers = {
        torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"): MUON_LEARNING_RATE,
        torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.0): ADAM_LEARNING_RATE,
    }
    ema = Ema(parameters, max_decay=0.999)
    progress = Progress("flow", stop_after, batch_size, every=50)
    prompts = [*scenes.prompts, ""]
    for step in range(stop_after):
        chosen = torch.randint(len(latents), (batch_size,), generator=generator)
        dropped = torch.rand(batch_size, generator=generator) < PROMPT_DROPOUT
        prompt_ids = torch.where(dropped, len(prompts) - 1, scenes.prompt_ids[chosen])
        embeds, pooled = encode_prompts(pipeline, prompts, prompt_ids)

        x0 = latents[chosen]
        t = torch.sigmoid(torch.randn(batch_size, generator=generator))
        eps = torch.randn(x0.shape, generator=generator)
        x_t = torch.lerp(x0, eps, t[:, None, None, None])
        (v,) = pipeline.transformer(
            hidden_states=x_t,
            timestep=t * pipeline.scheduler.config.num_train_timesteps,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            return_dict=False,
        )
        loss = (v - (eps - x0)).square().mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, learning_rate in optimizers.items():
            set_learning_rate(optimizer, learning_rate * schedule(step, num_steps))
            optimizer.step()
        ema.update()
        progress.log(step, loss=loss)
        if (step + 1) % evaluate_every == 0 or step + 1 == stop_after:
            ema.swap()
            snapshot(step + 1)
            ema.swap()
    ema.swap()


def encode_prompts(
    pipeline: StableDiffusion3Pipeline, prompts: Sequence[str], ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Text features by the pipeline's own `encode_prompt`, each distinct prompt once.

    ids int64 (B,) into prompts -> embeds f32 (B, 14, 128), pooled f32 (B, 128), both with gradients.
    """
    distinct, index = ids.unique(return_inverse=True)
    embeds, _, pooled, _ = pipeline.encode_prompt(
        [prompts[number] for number in distinct],
        None,
        None,
        do_classifier_free_guidance=False,
        max_sequence_length=0,
    )
    return embeds[index], pooled[index]


def split_for_muon(
    modules: Iterable[torch.nn.Module],
) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """(matrices inside of blocks, everything else): embeddings, norms, biases, first and last layers are not Muon's."""
    named = [item for module in modules for item in module.named_parameters()]
    is_matrix = [p.ndim == 2 and ("transformer_blocks" in name or ".layers." in name) for name, p in named]
    matrices = [p for (_, p), matrix in zip(named, is_matrix, strict=True) if matrix]
    others = [p for (_, p), matrix in zip(named, is_matrix, strict=True) if not matrix]
    return matrices, others


@torch.no_grad()
def strict_accuracy(
    pipeline: StableDiffusion3Pipeline,
    lines: Sequence[Metadata],
    judge: Judge,
    *,
    guidance: float,
    batch_size: int = 96,
) -> dict[str, float]:
    """Share of lines that the judge accepts, per tag and as `all`; line i's noise depends on i only."""
    detector = ShapesDetector()
    accepted: dict[str, list[bool]] = {}
    shape = (nano.LATENT_CHANNELS, nano.LATENT_SIZE, nano.LATENT_SIZE)
    for start in range(0, len(lines), batch_size):
        batch = lines[start : start + batch_size]
        images = pipeline(
            [line["prompt"] for line in batch],
            num_inference_steps=NUM_SAMPLING_STEPS,
            guidance_scale=guidance,
            max_sequence_length=0,
            latents=noise([evaluation_seed(0, start + i) for i in range(len(batch))], shape),
            output_type="np",
        ).images
        for image, line in zip((images * 255).round().astype(np.uint8), batch, strict=True):
            accepted.setdefault(line["tag"], []).append(judge(detector.detect(image), line))
    shares = {tag: float(np.mean(accepted[tag])) for tag in TAGS if tag in accepted}
    return {"all": float(np.mean([one for tag in accepted.values() for one in tag])), **shares}


def schedule(step: int, num_steps: int) -> float:
    """Factor of the learning rate: a short rise, flat, and from the middle on a line down to a fiftieth."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * min(1.0, max(0.02, 2 * (1 - step / num_steps)))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set it for every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


class Progress:
    """Logs a smoothed value and the throughput every `every` steps."""

    def __init__(self, stage: str, num_steps: int, batch_size: int, every: int) -> None:
        self._stage, self._num_steps, self._batch_size, self._every = stage, num_steps, batch_size, every
        self._started_s = time.perf_counter()
        self._values: list[torch.Tensor] = []

    def log(self, step: int, **value: torch.Tensor) -> None:
        """Take in one step's value; its name is the keyword."""
        ((name, number),) = value.items()
        self._values.append(number.detach())
        if (step + 1) % self._every == 0 or step + 1 == self._num_steps:
            seconds = time.perf_counter() - self._started_s
            log.info(
                "%s %d/%d: %s %.4f, %.0f s, %.0f images/s",
                *(self._stage, step + 1, self._num_steps, name, torch.stack(self._values).mean(), seconds),
                (step + 1) * self._batch_size / seconds,
            )
            self._values.clear()


def main(judge: Judge, arguments: Sequence[str] | None = None) -> None:
    """Train both stages, evaluate and save a snapshot now and then, and at the end."""
    parser = argparse.ArgumentParser(description="Pretrain nano-sd3.")
    parser.add_argument("--output", type=Path, default=Path("runs/nano_sd3"), help="folder for the snapshots")
    parser.add_argument("--vae-steps", type=int, default=2400)
    parser.add_argument("--vae-batch", type=int, default=16)
    parser.add_argument("--vae", type=Path, help="take the VAE of this pipeline instead of training one")
    parser.add_argument("--steps", type=int, default=2000, help="length of the flow's learning rate schedule")
    parser.add_argument("--stop-after", type=int, default=1250, help="end the flow after that many of its steps")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--evaluate-every", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if not 0 < options.stop_after <= options.steps:
        parser.error(f"--stop-after {options.stop_after}: must lie in 1..{options.steps}, the number of --steps")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(1)

    pipeline = nano.build(options.seed)
    pipeline.set_progress_bar_config(disable=True)
    scenes = draw_scenes(NUM_SCENES, options.seed)
    log.info("%d scenes of %d prompts drawn", len(scenes.pixels), len(scenes.prompts))
    trained = options.vae
    if trained is None:
        trained = options.output / "vae_only"
        train_vae(pipeline.vae, scenes, num_steps=options.vae_steps, batch_size=options.vae_batch, seed=options.seed)
        nano.save(pipeline, trained)
    # From its file in either case: weights that lie elsewhere in memory give other last bits, thus another flow.
    pipeline.register_modules(vae=AutoencoderKL.from_pretrained(trained, subfolder="vae").requires_grad_(False))

    lines = test_lines()

    def snapshot(step: int) -> None:
        path = options.output / f"step_{step}"
        nano.save(pipeline, path)
        for guidance in (1.0, GUIDANCE):
            accuracy = strict_accuracy(pipeline, lines, judge, guidance=guidance)
            shown = ", ".join(f"{name} {share:.3f}" for name, share in accuracy.items())
            log.info("%s, guidance %.0f: strict %s", path, guidance, shown)

    train_flow(
        pipeline,
        scenes,
        num_steps=options.steps,
        stop_after=options.stop_after,
        batch_size=options.batch,
        seed=options.seed,
        evaluate_every=options.evaluate_every,
        snapshot=snapshot,
    )
