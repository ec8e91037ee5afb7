"""Tensors of one device that wait in host memory while somebody else uses the device.

In place: a parked tensor is the same object without its memory, so modules, optimizers, reductions and compiled blocks
that hold it stay valid. Host memory is pinned and used again: a phase costs a copy there and a copy back.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch


class Parking:
    """Parks and wakes whatever `tensors()` names at that moment; on a CPU the bytes stay where they are."""

    def __init__(self, tensors: Callable[[], Iterable[torch.Tensor]], device: torch.device) -> None:
        self._tensors, self._device = tensors, device
        self._parked: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._host: dict[int, torch.Tensor] = {}

    def park(self) -> int:
        """Give the device's memory back; returns the bytes. Parked already: 0."""
        if self._parked:
            return 0
        found = {id(tensor): tensor for tensor in self._tensors() if tensor.device.type == self._device.type}
        self._host = {key: host for key, host in self._host.items() if key in found}
        self._parked = [(tensor, self._to_host(tensor)) for tensor in found.values()]
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        for tensor, _ in self._parked:
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=self._device)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return sum(host.nbytes for _, host in self._parked)

    def wake(self) -> None:
        """Everything back on the device, bit for bit."""
        for tensor, host in self._parked:
            tensor.data = host.to(self._device, non_blocking=True)  # a stream keeps the order with what follows
        self._parked = []

    def _to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "cpu":
            return tensor.data
        host = self._host.get(id(tensor))
        if host is None or host.shape != tensor.shape or host.dtype != tensor.dtype:
            host = torch.empty_like(tensor.data, device="cpu", pin_memory=True)
            self._host[id(tensor)] = host
        return host.copy_(tensor.data, non_blocking=True)


def tensors_of(modules: Sequence[torch.nn.Module]) -> Iterator[torch.Tensor]:
    """Parameters and buffers."""
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()
