"""One device at full speed: compiled blocks, and copies that run beside its kernels. Torch only.

    draw noise ──upload──► forward, forward, ... ──download──► arrays
     (pinned)    (queued)     (the device's stream)  (a stream of its own, pinned)

Nothing here waits for the device until an array is asked for, so the host draws the next micro-batch's noise while the
device works on this one: that is all the prefetching there is. On a CPU every copy is a view and every wait is over.
"""

import os
import sysconfig
from collections.abc import Callable
from pathlib import Path
from shutil import which

import numpy as np
import torch
import torch._inductor.config

VARIANTS = 64
"""Graphs kept per block class: its kinds (dual attention, last block) x shapes x with or without gradient."""

COMPILER_HINT = "install it, or --set sampler.compile=false --set learner.compile=false"


class Copies:
    """Copies between the host and one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def upload(self, value: torch.Tensor) -> torch.Tensor:
        """A host tensor on the device, in the order of the device's work, without waiting for it."""
        if self._stream is None:
            return value
        return value.pin_memory().to(self._device, non_blocking=True)

    def download(self, value: torch.Tensor) -> Callable[[], np.ndarray]:
        """Start to copy; call the result to wait for the array. What is queued later does not wait for the copy."""
        if self._stream is None:
            return value.numpy
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            host.copy_(value, non_blocking=True)
            value.record_stream(self._stream)  # its memory is not given away before it is copied
            done = self._stream.record_event()

        def array() -> np.ndarray:
            done.synchronize()
            return host.numpy()

        return array


def blocks_of(transformer: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks that a diffusers transformer repeats."""
    names = set[str](transformer._no_split_modules)  # type: ignore[arg-type]  # diffusers' list of what it repeats
    blocks = [module for module in transformer.modules() if type(module).__name__ in names]
    assert blocks, f"{type(transformer).__name__} has none of its blocks {sorted(names)}"
    return blocks


def check_compiler() -> None:
    """ValueError where torch.compile would fail in the middle of a run: it needs g++ and Python's headers."""
    found = [name for name in (os.environ.get("CXX"), os.environ.get("CC"), "g++", "clang++") if name and which(name)]
    if not found:
        raise ValueError(f"compile = true: this node has no g++; {COMPILER_HINT}")
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        raise ValueError(f"compile = true: this node has no {header} (python3-dev); {COMPILER_HINT}")


def compile_blocks(transformer: torch.nn.Module) -> int:
    """Compile every transformer block in place, for fixed shapes; returns how many there are.

    Blocks, not the whole: equal blocks share one graph, so it is compiled once and not once per layer. Weights are
    inputs of that graph: copying others into them compiles nothing anew. The first forward of each shape compiles.
    A block that cannot be one graph raises at its first forward: going on without would hide the loss. ValueError
    where this node cannot compile at all.
    """
    check_compiler()
    blocks = blocks_of(transformer)
    torch._inductor.config.compile_threads = torch.get_num_threads()  # else 32 processes for each worker of a node
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    for block in blocks:
        # its forward, not the module: hooks such as FSDP's, which gathers the weights, stay outside of the graph
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)  # type: ignore[method-assign]
    return len(blocks)
