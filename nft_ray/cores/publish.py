"""Adapters from learner to sampler: what is announced, what a loader must prove, and whether it has.

    learner: checksum + probe velocity ──► Adapters ──► sampler: the same of what it loaded ──► LoadReceipt ──► verify

Both sides use these functions, and neither knows the other.
"""

import hashlib
from collections.abc import Iterable

import numpy as np

from nft_ray.types import Adapters, AdapterWeights, LoadReceipt, Weights

PROBE_FLOOR = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}
"""Largest |difference| / |velocity| that rounding explains between two processes; see tests/cores/test_sampler.py."""

OUT_OF_RANGE = "the model may leave the range of float16; model.dtype = bfloat16 has a wider one"
NOT_PUBLISHED = "no sampler gets it, and checkpoints are of before"


def checksum(weights: Weights) -> str:
    """A digest over names, shapes and the exact float32 bytes: SHA-256, which processors have instructions for."""
    return digest(sorted(weights.items()))


def digest(tensors: Iterable[tuple[str, np.ndarray]]) -> str:
    """The checksum of tensors that come in the order of their names, one after the other."""
    digest = hashlib.sha256()
    for name, value in tensors:
        digest.update(f"{name}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value, dtype=np.float32).data)
    return digest.hexdigest()[:32]


def announced(weights: Weights) -> Adapters:
    """A policy from a file as version 0: no learner vouches for it, so each sampler shows that it felt it."""
    found = checksum(weights)
    return Adapters(
        version=0,
        weights=AdapterWeights(old=weights, ema=weights),
        num_tensors=len(weights),
        checksums={"old": found, "ema": found},
        probe=None,
        probe_base=None,
    )


def check_healthy(velocity: np.ndarray, when: str, dtype: str) -> None:
    """RuntimeError, on one line, where a policy's probe velocity is not finite."""
    if not np.isfinite(velocity).all():
        hint = f", or {OUT_OF_RANGE}" if dtype == "float16" else ""
        raise RuntimeError(
            f"the policy has blown up: its velocity is not finite after {when}; {NOT_PUBLISHED}: choose a lower "
            f"learner.learning_rate{hint}"
        )


def verify(adapters: Adapters, receipt: LoadReceipt, dtype: str) -> None:
    """RuntimeError with both values where a worker did not load what was announced.

    Counts and checksums must be equal; the probe velocity may differ by max(floor |v|, 0.1 |v - v_base|): less than
    what a LoRA that was not loaded would make it differ. Announced from a file, it must differ from the worker's own
    before.
    """
    for what in ("version", "num_tensors", "checksums"):
        announced, loaded = getattr(adapters, what), getattr(receipt, what)
        if announced != loaded:
            raise RuntimeError(f"{receipt.worker}: adapter {what} differs: learner {announced}, sampler {loaded}")
    if not np.isfinite(receipt.probe).all():
        hint = f": {OUT_OF_RANGE}" if dtype == "float16" else ": its weights are of no use"
        raise RuntimeError(f"{receipt.worker}: the velocity of version {adapters.version} is not finite{hint}")
    if adapters.probe is None or adapters.probe_base is None:
        if np.array_equal(receipt.probe, receipt.probe_base):
            raise RuntimeError(f"{receipt.worker}: the LoRA is loaded and the velocity is the base model's: no effect")
        return
    norm = np.linalg.norm
    allowed = max(PROBE_FLOOR[dtype] * norm(adapters.probe), 0.1 * norm(adapters.probe - adapters.probe_base))
    difference = norm(adapters.probe - receipt.probe)
    if not difference <= allowed:
        raise RuntimeError(
            f"{receipt.worker}: version {adapters.version} gives another velocity: "
            f"|learner| {norm(adapters.probe):.6g}, |sampler| {norm(receipt.probe):.6g}, "
            f"|difference| {difference:.3g} > {allowed:.3g}"
        )
