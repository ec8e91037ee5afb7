"""Seconds of every piece of work, from counts and a device: `Work` for the simulation of an epoch.

    seconds = FLOPs / (rate x utilisation) + operations x launch        forward, update, decode
              bytes / rate                                              copies, checksums, merging a LoRA

Not counted: compiling (minutes, once per node), Python between two requests, a learner's reading of samples from the
object store (shared memory of its node), what waits for what (that is the simulation's).
"""

from math import ceil

from nft_ray.config import EvaluationConfig, ExperimentConfig, SamplerConfig
from nft_ray.planning import costs
from nft_ray.planning.devices import Device
from nft_ray.planning.memory import FLOAT, decode_batch, footprint_of, held, payloads_of
from nft_ray.planning.payloads import Payloads
from nft_ray.planning.scoring import scoring
from nft_ray.planning.work import Footprint, Work

MERGE_PASSES = 4
"""Times that merging reads or writes the float32 form of a layer: B A made, added, rounded, and the pristine read."""
ADAM_PASSES = 7 + 3 + 3
"""Float32 copies of what is trained that a step moves: fused Adam, the norm with its scaling, the EMA."""
GPUS_PER_NODE = 8


def estimate(config: ExperimentConfig, device: Device) -> tuple[Work, Footprint]:
    """Seconds and bytes; ValueError where the model's architecture is not known.

    The first call for a model counts it (seconds); others are arithmetic.
    """
    return work_of(config, device), footprint_of(config, device)


def work_of(config: ExperimentConfig, device: Device) -> Work:
    """Of one worker alone; see Work."""
    sent, sampler = payloads_of(config), config.sampler
    images = config.prompts.images_per_group
    rewards = {name: scoring(name, section, device) for name, section in config.reward_configs.items()}
    pairs = images * (sent.num_old + sent.num_reference)
    return Work(
        request_s=_request_s(config, device, sent),
        encode_s=encode_s(config, device),
        draw_s=evaluations(sampler) * _forwards_s(config, device, images, sampler.guidance) / images,
        draw_eval_s=_draw_eval_s(config, device),
        decode_s=_decode_s(config, device),
        velocities_s=_forwards_s(config, device, pairs) / images,
        score_s={name: one.image_s for name, one in rewards.items()},
        score_request_s={name: one.request_s for name, one in rewards.items()},
        update_s=_update_s(config, device),
        step_s=_step_s(config, device),
        publish_s=_publish_s(config, device, sent),
        load_s=_load_s(config, device, sent),
        swap_s=swap_s(config, device),
        image_bytes=sent.image,
        sample_bytes=sent.sample,
        group_bytes=sent.conditioning,
        adapter_bytes=2 * sent.adapter,
        transfer_bytes_per_s=device.network_bytes_per_s,
        lend_s=lend_s(config, device),
    )


def evaluations(settings: SamplerConfig | EvaluationConfig) -> int:
    """Velocities of one image: heun takes two per step but for the last."""
    return 2 * settings.num_steps - 1 if settings.solver == "heun" else settings.num_steps


def _forwards_s(config: ExperimentConfig, device: Device, count: int, guidance: float = 1.0) -> float:
    """Velocities of `count` images or pairs, micro-batch by micro-batch; guided: both halves stand in one forward.

    A part that is not full is filled up where blocks are compiled.
    """
    if not count:
        return 0.0
    guided = guidance > 1
    size = max(1, config.sampler.micro_batch_size // 2) if guided else config.sampler.micro_batch_size
    parts = ceil(count / size)
    rows = (parts * size if config.sampler.compile else count) * (2 if guided else 1)
    item = costs.forward(costs.counted(config.model))
    arithmetic_s = device.flops_s(rows * item.flops, config.model.dtype, "sampling")
    return arithmetic_s + parts * device.operations_s(item.operations)


def _draw_eval_s(config: ExperimentConfig, device: Device) -> float:
    """Per line of a full request."""
    lines, settings = config.evaluation.batch_size, config.evaluation
    return evaluations(settings) * _forwards_s(config, device, lines, settings.guidance) / lines


def _decode_s(config: ExperimentConfig, device: Device) -> float:
    item = costs.decode(costs.counted(config.model))
    arithmetic_s = device.flops_s(item.flops, config.model.dtype, "decoding")
    return arithmetic_s + device.operations_s(item.operations) / decode_batch(config)


def encode_s(config: ExperimentConfig, device: Device) -> float:
    """One new prompt: arithmetic or reading the weights, whichever is longer. Precomputed: what a file holds."""
    model, sent = costs.counted(config.model), payloads_of(config)
    if config.model.precomputed:
        return device.host_copy_s(sent.conditioning, pinned=False)
    item, weights = costs.encode(model), costs.text_size(model).bytes
    arithmetic_s = device.flops_s(item.flops, config.model.text_encoder_dtype or config.model.dtype, "encoding")
    return max(arithmetic_s, weights / device.memory_bytes_per_s) + device.operations_s(item.operations)


def lend_s(config: ExperimentConfig, device: Device) -> float:
    """Offloaded text encoders to the card, from memory that is not pinned; on the way back nothing is copied."""
    return device.host_copy_s(held(config).text, pinned=False)


def _request_s(config: ExperimentConfig, device: Device, sent: Payloads) -> float:
    """Once per request: the old policy, then the reference, into the transformer, and the group into the store."""
    group = config.prompts.images_per_group * (sent.sample + sent.image) + sent.conditioning
    swaps = 1.0 if sent.num_reference else 0.0  # back to "old" after the reference, and to the reference
    merge_s = _use_s(config, device) + _restore_s(config, device)
    return group / device.object_store_bytes_per_s + swaps * merge_s


def _use_s(config: ExperimentConfig, device: Device) -> float:
    """An adapter from the host into the transformer of a sampler."""
    trained = costs.trained(costs.counted(config.model))
    upload_s = device.host_copy_s(trained.parameters * FLOAT, pinned=False)
    width = 4 if config.model.dtype == "float32" else 2
    passes = MERGE_PASSES * trained.targets_bytes / width * FLOAT if config.model.tuning == "lora" else 0
    return upload_s + passes / device.memory_bytes_per_s + device.operations_s(8 * trained.layers)


def _restore_s(config: ExperimentConfig, device: Device) -> float:
    """The pristine weights back."""
    trained = costs.trained(costs.counted(config.model))
    return 2 * trained.targets_bytes / device.memory_bytes_per_s + device.operations_s(trained.layers)


def _update_s(config: ExperimentConfig, device: Device) -> float:
    """All pairs of one image, forward and backward."""
    learner = config.learner
    item = costs.training(costs.counted(config.model), checkpointing=learner.gradient_checkpointing)
    pair_s = device.flops_s(item.flops, config.model.dtype, "learning")
    pair_s += device.operations_s(item.operations) / learner.micro_batch_size
    return config.sampler.num_times * pair_s


def _step_s(config: ExperimentConfig, device: Device) -> float:
    """A ring's reduction of the gradients, and the optimizer. The slowest link of the ring counts."""
    trained, ranks = costs.trained(costs.counted(config.model)), config.learner.num_workers
    num_bytes = trained.parameters * FLOAT
    link = device.link_bytes_per_s if ranks <= GPUS_PER_NODE else device.network_bytes_per_s
    reduction_s = 2 * (ranks - 1) / ranks * num_bytes / link
    share = num_bytes / ranks if config.learner.sharding == "fsdp" else num_bytes
    return reduction_s + ADAM_PASSES * share / device.memory_bytes_per_s + device.operations_s(2 * trained.layers)


def _publish_s(config: ExperimentConfig, device: Device, sent: Payloads) -> float:
    """Old policy and EMA to the host, their checksums, two probes, both into the object store."""
    both = 2 * sent.adapter
    copies_s = device.host_copy_s(both, pinned=False) + both / device.object_store_bytes_per_s
    return copies_s + both / device.checksum_bytes_per_s + 2 * _probe_s(config, device)


def _load_s(config: ExperimentConfig, device: Device, sent: Payloads) -> float:
    """Both checksums, the old policy into the transformer, a probe."""
    return 2 * sent.adapter / device.checksum_bytes_per_s + _use_s(config, device) + _probe_s(config, device)


def _probe_s(config: ExperimentConfig, device: Device) -> float:
    """One small forward, never compiled."""
    item = costs.forward(costs.counted(config.model))
    return device.flops_s(item.flops, config.model.dtype, "sampling") + device.operations_s(item.operations)


def swap_s(config: ExperimentConfig, device: Device) -> dict[str, float]:
    """Colocated: one parking, or one waking, of each side."""
    if config.cluster.placement != "colocated":
        return {}
    weights = held(config)
    return {"sampler": device.host_copy_s(weights.sampler), "learner": device.host_copy_s(weights.learner)}
