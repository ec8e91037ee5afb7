"""Peak bytes of each worker, by rule: what it holds (counted) plus the activations of its largest micro-batch (traced).

    sampler   transformer + what holds the LoRA + VAE + text encoders + max(forward, decode, encode) + runtime
    learner   transformer + trained x (weights, gradients, two moments, EMA) + forward and backward + runtime
    host      the process + policies that are kept + prompts that are kept + whatever waits there while others have the
              card (colocated), or is only lent to it (text_encoders: offload)

What is traced is the eager program. docs/planning.md compares the rule with measured peaks.
"""

from dataclasses import dataclass
from math import ceil

from nft_ray.config import ExperimentConfig
from nft_ray.planning import costs
from nft_ray.planning.devices import Device
from nft_ray.planning.payloads import Payloads, payloads
from nft_ray.planning.scoring import scoring
from nft_ray.planning.work import Footprint

FLOAT = 4
TRAINED_COPIES = 5
"""Of what is trained, on a learner's device: weights, gradients, two moments, EMA."""
PROCESS_BYTES, CUDA_PROCESS_BYTES = 1_000_000_000, 3_000_000_000
"""Host memory of a Ray actor with torch and diffusers imported; with CUDA's libraries and its context. Assumed: the
quickstart's workers take 0.6 GiB, and CUDA's libraries are 2 GB more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Bytes that a worker has on its device between two pieces of work: what parking moves."""

    sampler: int
    learner: int
    text: int
    """Of the sampler: text encoders that are lent to the device and otherwise wait on the host."""


def held(config: ExperimentConfig) -> Held:
    """Weights and what belongs to them, of one worker."""
    model = costs.counted(config.model)
    transformer, trained = costs.transformer_size(model).bytes, costs.trained(model)
    text = 0 if config.model.precomputed else costs.text_size(model).bytes
    offloaded = config.model.text_encoders == "offload"
    copies = trained.parameters * FLOAT * (TRAINED_COPIES - 1)  # parking drops gradients
    base = transformer
    if config.model.tuning == "full":  # float32 weights are in the copies; buffers stay
        width = 4 if model.dtype == "float32" else 2
        base = transformer - trained.parameters * width
        ranks = config.learner.num_workers if config.learner.sharding == "fsdp" else 1
        copies = ceil(copies / ranks)
    return Held(
        sampler=transformer + _lora_of_sampler(config) + costs.vae_size(model).bytes + (0 if offloaded else text),
        learner=base + copies,
        text=text if offloaded else 0,
    )


def footprint_of(config: ExperimentConfig, device: Device) -> Footprint:
    """Peak bytes of one worker of each role. ValueError where the model's architecture is not known."""
    model, weights, sent = costs.counted(config.model), held(config), payloads(config)
    assert sent is not None, "costs have found the architecture"
    sampling = weights.sampler + _work_of_sampler(config)
    learning = weights.learner + _work_of_learner(config)
    on_cpu = device.kind == "cpu"
    process = PROCESS_BYTES if on_cpu else CUDA_PROCESS_BYTES
    parked = config.cluster.placement == "colocated" and not on_cpu
    trained = costs.trained(model).parameters * FLOAT
    versions = (config.run.max_staleness + 1) * 2 * sent.adapter
    width = 4 if (config.model.text_encoder_dtype or config.model.dtype) == "float32" else 2  # as encoded, not as sent
    prompts = config.model.conditioning_cache * sent.conditioning * width // FLOAT
    host_sampler = process + versions + prompts + weights.text
    host_learner = process + versions + trained  # a part on the host, to publish
    return Footprint(
        sampler=device.runtime_bytes + sampling,
        learner=device.runtime_bytes + learning,
        rewards={name: scoring(name, one, device).device_bytes for name, one in config.reward_configs.items()},
        host_sampler=host_sampler + (weights.sampler if parked else 0) + (sampling if on_cpu else 0),
        host_learner=host_learner + (weights.learner if parked else 0) + (learning if on_cpu else 0),
    )


def sampler_micro_batch(config: ExperimentConfig) -> int:
    """Images, or pairs, of one forward: never more than a group has, but filled up where blocks are compiled."""
    size, pairs = config.sampler.micro_batch_size, config.prompts.images_per_group * config.sampler.num_times
    return size if config.sampler.compile else min(size, pairs)


def decode_batch(config: ExperimentConfig) -> int:
    """Images of one pass through the VAE."""
    return min(config.sampler.decode_batch_size or config.sampler.micro_batch_size, config.prompts.images_per_group)


def _lora_of_sampler(config: ExperimentConfig) -> int:
    """The pristine copy of what is merged into, or the factors beside the weights."""
    model, trained = costs.counted(config.model), costs.trained(costs.counted(config.model))
    beside = config.model.dtype == "bfloat16" if config.sampler.lora == "auto" else config.sampler.lora == "unmerged"
    if beside and config.model.tuning == "lora":
        return trained.parameters * (4 if model.dtype == "float32" else 2)
    return trained.targets_bytes


def _work_of_sampler(config: ExperimentConfig) -> int:
    """The largest of forward, decode and encode; the group's latents in float32 stay meanwhile."""
    model = costs.counted(config.model)
    channels, height, width = costs.latent_shape(model)
    latents = config.prompts.images_per_group * channels * height * width * FLOAT
    largest = max(
        sampler_micro_batch(config) * costs.forward(model).bytes,
        decode_batch(config) * costs.decode(model).bytes,
        costs.encode(model).bytes + held(config).text,
    )
    return latents + largest


def _work_of_learner(config: ExperimentConfig) -> int:
    """Gradients, and the activations of a micro-batch; all weights: their copy in the arithmetic's data type, too."""
    model, learner = costs.counted(config.model), config.learner
    trained = costs.trained(model).parameters
    activations = costs.training(model, checkpointing=learner.gradient_checkpointing).bytes * learner.micro_batch_size
    casts = trained * 2 if model.tuning == "full" and model.dtype != "float32" else 0
    gradients = trained * FLOAT // (learner.num_workers if learner.sharding == "fsdp" else 1)
    return gradients + casts + activations


def payloads_of(config: ExperimentConfig) -> Payloads:
    """As `payloads`; ValueError where the model's architecture is not known."""
    costs.transformer_size(costs.counted(config.model))
    found = payloads(config)
    assert found is not None
    return found
