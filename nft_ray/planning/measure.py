"""A device profile of the device at hand, in under a minute: what a plan multiplies its counts with.

Measured: matrix product per data type, memory bandwidth, copies from the host, launching an operation, checksum, copy
in host memory. Not measured, and said so: links, network, and which share of the matrix product a model reaches, which
is what `benchmarks/gpu.py` measures. On a CPU everything is of ONE thread, as a worker with `num_threads: 1` has it,
and in seconds of that CPU: what else runs on the machine does not count.
"""

import hashlib
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

REPEATS = 5
MATMUL = {"cuda": 8192, "cpu": 1024}
CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COPIED = {"cuda": 1 << 30, "cpu": 1 << 27}
"""Bytes of what is copied within the device's memory: more than any cache holds."""
HOST_COPIED = 1 << 28
OPERATIONS, SMALL = 2000, 64
NANO_BATCHES = (8, 64)
CUDA_UTILISATION = {"sampling": 0.55, "learning": 0.55, "decoding": 0.4, "encoding": 0.5, "scoring": 0.7}
CUDA_SOURCE = "assumed, of a measured matrix product, which is itself 0.65 to 0.8 of a data sheet's"
LEARNING = 0.85
"""Of a CPU's share in sampling: nano-sd3's update takes 2.43 ms per pair with 2.4 times the FLOPs of a forward."""


def measured(name: str, kind: str) -> dict[str, Any]:
    """A Device as plain data. ValueError where there is no such device here."""
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: this process sees no GPU; measure --device cpu")
    device, threads = torch.device(kind), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _profile(name, device)
    finally:
        torch.set_num_threads(threads)


def _profile(name: str, device: torch.device) -> dict[str, Any]:
    cuda, here = device.type == "cuda", f"measured here: nft-ray profile, {_model(device)}"
    runtime, rates = _runtime_bytes(device), {_name(dtype): _matmul_per_s(device, dtype) for dtype in _dtypes(device)}
    if cuda:
        operation_s, utilisation, shares = _operation_s(device), CUDA_UTILISATION, CUDA_SOURCE
    else:
        operation_s, share = _nano_s(rates["float32"])
        utilisation = dict.fromkeys(("sampling", "encoding", "scoring"), share)
        utilisation |= {"learning": LEARNING * share, "decoding": 1.0}
        shares = f"{here}: nano-sd3 in micro-batches of {NANO_BATCHES}; learning {LEARNING} of it; convolutions as fast"
    memcpy = HOST_COPIED / _host_memcpy_s()
    pinned, pageable = (HOST_COPIED / _upload_s(device, pinned=pinned) if cuda else memcpy for pinned in (True, False))
    return {
        "name": name,
        "kind": device.type,
        "memory_bytes": _memory_bytes(device),
        "runtime_bytes": runtime,
        "matmul_per_s": rates,
        "memory_bytes_per_s": 2 * COPIED[device.type] / _copy_s(device),
        "host_copy_bytes_per_s": pinned,
        "pageable_copy_bytes_per_s": pageable,
        "link_bytes_per_s": pinned / 2 if cuda else memcpy,
        "network_bytes_per_s": 1.0e9,
        "object_store_bytes_per_s": memcpy / 2,
        "checksum_bytes_per_s": HOST_COPIED / _checksum_s(),
        "operation_s": operation_s,
        "utilisation": utilisation,
        "sources": {
            "memory_bytes": here,
            "runtime_bytes": here,
            "matmul_per_s": f"{here}, n = {MATMUL[device.type]}" + ("" if cuda else ", one thread"),
            "memory_bytes_per_s": f"{here}, a copy read and written",
            "host_copy_bytes_per_s": here if cuda else "not used on a CPU",
            "pageable_copy_bytes_per_s": here if cuda else "not used on a CPU",
            "link_bytes_per_s": "assumed: through the host, half of host_copy" if cuda else "a copy in host memory",
            "network_bytes_per_s": "assumed, 10 Gbit/s with its overhead",
            "object_store_bytes_per_s": "half of a measured copy in host memory: the arrays are written, pages are new",
            "checksum_bytes_per_s": here,
            "operation_s": f"{here}, linear layers of {SMALL} x {SMALL}" if cuda else f"{here}, nano-sd3",
            "utilisation": shares,
        },
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    return CUDA_DTYPES if device.type == "cuda" else (torch.float32,)


def _best_s(work: Callable[[], Any], device: torch.device | None = None) -> float:
    """The fastest of REPEATS runs after one that warms up; without a device, or on a CPU, in CPU seconds."""
    found, clock = [], time.perf_counter if device is not None and device.type == "cuda" else time.process_time
    for _ in range(REPEATS + 1):
        _wait(device)
        started = clock()
        work()
        _wait(device)
        found.append(clock() - started)
    return min(found[1:])


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def _matmul_per_s(device: torch.device, dtype: torch.dtype) -> float:
    n = MATMUL[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return float(2 * n**3 / _best_s(lambda: a @ b, device))


def _copy_s(device: torch.device) -> float:
    source = torch.ones(COPIED[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return _best_s(lambda: target.copy_(source), device)


def _upload_s(device: torch.device, *, pinned: bool) -> float:
    source = torch.ones(HOST_COPIED // 4)
    source = source.pin_memory() if pinned else source
    target = torch.empty(HOST_COPIED // 4, device=device)
    return _best_s(lambda: target.copy_(source, non_blocking=pinned), device)


def _host_memcpy_s() -> float:
    source = np.ones(HOST_COPIED // 4, np.float32)
    target = np.empty_like(source)
    return _best_s(lambda: np.copyto(target, source))


def _checksum_s() -> float:
    data = np.ones(HOST_COPIED // 4, np.float32).data
    return _best_s(lambda: hashlib.sha256(data).digest())


def _operation_s(device: torch.device) -> float:
    """Of a card, where the host only launches."""
    layer, x = torch.nn.Linear(SMALL, SMALL, device=device), torch.ones(1, SMALL, device=device)

    @torch.no_grad()
    def launch() -> None:
        for _ in range(OPERATIONS):
            layer(x)

    return _best_s(launch, device) / OPERATIONS


def _nano_s(matmul_per_s: float) -> tuple[float, float]:
    """Of a CPU: nano-sd3 at two sizes of a micro-batch. (Seconds per operation, share of the matrix product.)"""
    from nft_ray.config import ModelConfig
    from nft_ray.models.base import load_model, quiet_libraries
    from nft_ray.planning import costs

    quiet_libraries()
    config = ModelConfig()
    model, item = load_model(config, torch.device("cpu"), transformer_only=True), costs.forward(config)
    x, t, conditioning = model.probe()
    seconds = []
    with torch.no_grad():
        for batch in NANO_BATCHES:
            rows = {name: value.expand(batch, *value.shape[1:]) for name, value in conditioning.items()}
            inputs = x.expand(batch, *x.shape[1:]), t.expand(batch), rows
            seconds.append(min(_best_s(partial(model.velocity, *inputs)) for _ in range(2)))
    per_item = (seconds[1] - seconds[0]) / (NANO_BATCHES[1] - NANO_BATCHES[0])
    operation_s = max(seconds[0] - NANO_BATCHES[0] * per_item, 0.0) / item.operations
    return operation_s, min(item.flops / per_item / matmul_per_s, 1.0)


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _runtime_bytes(device: torch.device) -> int:
    """What is taken before the first tensor: of a card all that is not free (others' too), of a CPU this process."""
    if device.type == "cuda":
        torch.ones(1, device=device)
        free, total = torch.cuda.mem_get_info(device)
        return int(total - free)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _model(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else "a CPU"
