"""One function run on the meta device: what it multiplies, what it holds, what it launches. No number is computed.

    Trace.of(lambda: model(...))     flops       by the formulas of torch's FlopCounterMode
                                     peak_bytes  memory that operations allocate and that is alive at the same time:
                                                 what autograd keeps for a backward, and what is on its way
                                     operations  dispatched to the device, views left out

Parameters and inputs are there before and count nowhere here. Attention is traced as ONE fused operation that keeps no
matrix of probabilities, as it runs on a GPU; on the meta device torch itself would take it apart and keep them. (Its
function is replaced while the trace lasts: a mode would not reach what a checkpoint computes again in the backward.)
FlopCounterMode itself is not used: its hooks keep what a checkpoint has computed again, and memory would be wrong.
Traced is the eager program: compiled blocks fuse, launch less and keep somewhat less.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """See the module."""

    flops: int
    peak_bytes: int
    operations: int

    @staticmethod
    def of(work: Callable[[], Any]) -> "Trace":
        """Run `work`, whose tensors are all on the meta device; what it returns stays alive to the end."""
        seen = _Seen()
        with patch.object(F, "scaled_dot_product_attention", _fused), seen:
            kept = work()
        del kept
        return Trace(flops=seen.flops, peak_bytes=seen.peak, operations=seen.operations)


class _Seen(TorchDispatchMode):
    """FLOPs, operations, and bytes of the storages that were made since it began and are still referred to."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.operations = self.now = self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        before = {id(storage) for storage in _storages((args, kwargs))}
        made = [storage for storage in _storages(out) if id(storage) not in before]
        self.operations += bool(made) or func._schema.is_mutable
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        for storage in made:
            self._watch(storage)
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return
        self._known[key] = weakref.ref(storage, lambda _: self._gone(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """scaled_dot_product_attention as the one kernel that GPUs run; the arguments are its own."""
    if enable_gqa:
        key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], dim=1) for one in (key, value))
    bias = None
    if attn_mask is not None:
        bias = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    found: torch.Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]
    return found
