"""The weights that one rank trains, a LoRA or the whole transformer, and its share of every copy of them.

    Part: this rank's tensors by wire name            whole arrays by wire name
      ddp: all of every tensor           ─ whole() ─►   for samplers and checkpoints
      fsdp: some rows of every tensor    ◄─ part_of() ─

With `fsdp` whatever runs the model or makes tensors whole is collective: every rank calls it, in the same order.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from nft_ray.config import ExperimentConfig
from nft_ray.cores.device import blocks_of, compile_blocks
from nft_ray.cores.parking import tensors_of
from nft_ray.models.base import Conditioning, FlowModel, load_model, probe_velocity
from nft_ray.models.full import random_change, train_all
from nft_ray.models.lora import assign_start, attach, random_weights

Part = dict[str, torch.Tensor]


class _Velocity(torch.nn.Module):
    """What DistributedDataParallel wraps: the transformer as a module whose forward is the model's velocity."""

    def __init__(self, model: FlowModel) -> None:
        super().__init__()
        self.transformer = model.transformer
        self._velocity = model.velocity

    def forward(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        return self._velocity(x, t, conditioning)


class Policy:
    """The trained parameters of one rank with the model they belong to, on one device."""

    def __init__(self, config: ExperimentConfig, device: torch.device, world_size: int) -> None:
        self._config, self._device = config, device
        self._full = config.model.tuning == "full"
        self._sharded = config.learner.sharding == "fsdp" and world_size > 1
        self._arithmetic = getattr(torch, config.model.dtype)
        kept = config.model.model_copy(update={"dtype": "float32"}) if self._full else config.model
        self.model = load_model(kept, device, transformer_only=True)
        transformer = self.model.transformer
        self.dtype: torch.dtype = next(transformer.parameters()).dtype
        with self._precision():
            self.probe_base = probe_velocity(self.model)
        if self._full:
            self.parameters = train_all(transformer)
        else:
            self.parameters = attach(transformer, config.model.lora, self.model.lora_targets, config.run.seed)
            assign_start(self.parameters, config.model.lora)
        if config.learner.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()  # type: ignore[operator]  # diffusers' own method
        if config.learner.compile:
            compile_blocks(transformer)
        if self._sharded:
            self._shard(transformer, world_size)
        velocity = _Velocity(self.model)
        wrap = world_size > 1 and not self._sharded
        self._module = DistributedDataParallel(velocity, forward_sync_buffers=False) if wrap else velocity

    def velocity(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """v(x_t, t) of the policy, f32 (B, *latent); its gradient reaches the parameters only."""
        with self._precision():
            v: torch.Tensor = self._module(x, t, conditioning)
        return v

    def reduction(self, *, last: bool) -> AbstractContextManager[None]:
        """Around a backward. Gradients are reduced over the ranks once per optimizer step: in its last backward.

        All weights' gradients under fsdp are reduced in every one: kept whole, they would undo the sharding.
        """
        if isinstance(self.model.transformer, FSDPModule):
            self.model.transformer.set_requires_gradient_sync(last or self._full)
        return (
            self._module.no_sync() if isinstance(self._module, DistributedDataParallel) and not last else nullcontext()
        )

    def turns(self, num_micro_batches: int) -> int:
        """How many forwards and backwards this rank takes part in, at least 1; with fsdp all take equally many."""
        count = torch.tensor(max(num_micro_batches, 1), device=self._device)
        if self._sharded:
            dist.all_reduce(count, dist.ReduceOp.MAX)
        return int(count)

    def join(self) -> None:
        """A forward and backward with a zero gradient: for a rank without pairs where others have some."""
        x, t, conditioning = self.model.probe()
        with torch.compiler.set_stance("force_eager"):  # its shape is not that of any micro-batch
            (self.velocity(x, t, conditioning).sum() * 0.0).backward()

    def scale_gradients(self, factor: float) -> None:
        """Multiply the gradients of all parameters in place."""
        gradients = [value.grad for value in self.parameters.values() if value.grad is not None]
        if factor != 1:
            torch._foreach_mul_(gradients, factor)

    def clip(self, max_norm: float) -> torch.Tensor:
        """Scale the gradients of all ranks down to a norm; returns what it was, a scalar on the device."""
        parameters = self.parameters.values()
        norm = torch.nn.utils.get_total_norm([value.grad for value in parameters if value.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def tensors(self) -> Iterator[torch.Tensor]:
        """All that is on the device between two updates."""
        return tensors_of([self.model.transformer])

    def part(self) -> Part:
        """The parameters as they are: no copies, on the device."""
        return {name: local(value.detach()) for name, value in self.parameters.items()}

    def whole(self, part: Part) -> Iterator[tuple[str, np.ndarray]]:
        """Name by name, in order, the whole tensors of a part, float32 on the host. Collective with fsdp."""
        for name, value in part.items():
            if self._sharded:
                value = self._like(name, value.to(self._device)).full_tensor()
            yield name, value.detach().float().cpu().numpy()

    def part_of(self, weights: Mapping[str, np.ndarray]) -> Part:
        """This rank's own copy of its part of whole weights, on the host. Names and shapes must be the policy's."""
        assert weights.keys() == self.parameters.keys(), "names of weights differ from the policy's"
        return {name: self.own(name, weights[name]) for name in self.parameters}

    def own(self, name: str, array: np.ndarray) -> torch.Tensor:
        """This rank's part of one whole tensor in the shape of a parameter, on the host."""
        like, value = self.parameters[name], torch.from_numpy(np.array(array))
        assert like.shape == value.shape, f"{name}: {tuple(like.shape)} is not {tuple(value.shape)}"
        if not isinstance(like, DTensor):
            return value
        shared = distribute_tensor(value.to(self._device), like.device_mesh, like.placements, src_data_rank=None)
        return shared.to_local().cpu()

    def moment(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """A part on the device as the optimizer wants to see it: sharded as the parameter is."""
        return self._like(name, part.to(self._device)) if self._sharded else part.to(self._device)

    @torch.no_grad()
    def assign(self, part: Part) -> None:
        """Copy a part into the parameters."""
        for name, value in self.parameters.items():
            local(value).copy_(part[name])

    def random(self, seed: int) -> Part:
        """Random weights whose velocity is another, on the host: what a sampler must be able to load."""
        if self._full:
            return {
                name: self.own(name, random_change(name, tuple(self.parameters[name].shape), seed)) + value.cpu()
                for name, value in self.part().items()
            }
        shapes = {name: np.broadcast_to(np.float32(0), tuple(value.shape)) for name, value in self.parameters.items()}
        return self.part_of(random_weights(shapes, seed))

    def probe(self, part: Part | None = None) -> np.ndarray:
        """The probe velocity, of other weights for a part: then the policy is put back bit for bit.

        Collective with fsdp.
        """
        kept = {name: value.detach().clone() for name, value in self.part().items()} if part is not None else None
        if part is not None:
            self.assign(part)
        with self._precision():
            velocity = probe_velocity(self.model)
        if kept is not None:
            self.assign(kept)
        return velocity

    def _precision(self) -> AbstractContextManager[None]:
        """float32 weights work in `model.dtype`. A cast is kept for one forward, with fsdp not even that."""
        if self.dtype == self._arithmetic:
            return nullcontext()
        return torch.autocast(self._device.type, self._arithmetic, cache_enabled=not self._sharded)

    def _shard(self, transformer: torch.nn.Module, world_size: int) -> None:
        """Every block's weights, and those outside of blocks, over the ranks; whole only while they are needed."""
        of = {value: path for path, value in transformer.named_parameters()}
        paths = {name: of[value] for name, value in self.parameters.items()}
        mesh = init_device_mesh(self._device.type, (world_size,))
        dtypes = (self._arithmetic, torch.float32) if self.dtype != self._arithmetic else (None, None)
        policy = MixedPrecisionPolicy(param_dtype=dtypes[0], reduce_dtype=dtypes[1], cast_forward_inputs=False)
        for module in [*blocks_of(transformer), transformer]:
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        self.parameters = {name: transformer.get_parameter(path) for name, path in paths.items()}

    def _like(self, name: str, part: torch.Tensor) -> DTensor:
        like = self.parameters[name]
        assert isinstance(like, DTensor)
        return DTensor.from_local(
            part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )


def local(value: torch.Tensor) -> torch.Tensor:
    """This rank's part of a parameter, sharing its memory."""
    return value.to_local() if isinstance(value, DTensor) else value
