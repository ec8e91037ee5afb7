"""What kind of failure an exception is: one place for the words that Ray and torch use. Imports neither.

    device_failure   a GPU, its driver or its memory: the same call may succeed in another process or on another card
    out_of_memory    of these, the device's memory: a smaller micro-batch may succeed
    lost             an object that is gone with its node or its owner: what made it can make it again
    store_full       no room for an object in shared memory, nor on the disk behind it

Whatever is none of these is the code's own exception: it would be the same anywhere. A failure is looked for in the
exception, in what Ray wrapped (`cause`) and in what it was raised from.
"""

import re
from collections.abc import Iterator

OUT_OF_MEMORY = frozenset({"torch.OutOfMemoryError", "torch.cuda.OutOfMemoryError"})
DEVICE = OUT_OF_MEMORY | {
    "torch.AcceleratorError",
    "torch.cuda.CudaError",
    "torch.cuda.DeferredCudaCallError",
    "torch.distributed.DistBackendError",
}
LOST = frozenset({"ray.exceptions.ObjectLostError"})
STORE_FULL = frozenset({"ray.exceptions.ObjectStoreFullError", "ray.exceptions.OutOfDiskError"})
NO_MEMORY = re.compile(
    r"(CUDA|HIP) out of memory|(CUBLAS|CUDNN|CUSOLVER)_STATUS_ALLOC_FAILED|CUDA error: out of memory"
)
BROKEN = re.compile(
    r"(CUDA|HIP|cuDNN|cuBLAS|cuSOLVER|cuFFT|NCCL) error|(CUBLAS|CUDNN|CUSOLVER)_STATUS_|device-side assert|"
    r"No CUDA GPUs are available|Found no NVIDIA driver|CUDA (driver|unknown|initialization)|"
    r"Unexpected error from cuda|\b(ECC|Xid)\b"
)
"""How they arrive where torch has no class of its own for them: as RuntimeErrors."""


def device_failure(error: BaseException | None) -> bool:
    """A failure of the device that the work ran on: kill the process, for its context is lost, and try another."""
    return any(_is_a(one, DEVICE) or _says(one, NO_MEMORY) or _says(one, BROKEN) for one in _chain(error))


def out_of_memory(error: BaseException | None) -> bool:
    """The device's memory was too small; not the host's, for which Ray kills a worker."""
    return any(_is_a(one, OUT_OF_MEMORY) or _says(one, NO_MEMORY) for one in _chain(error))


def lost(error: BaseException | None) -> bool:
    """An object is gone: with its node, its owner, or because nothing was allowed to make it again."""
    return any(_is_a(one, LOST) for one in _chain(error))


def store_full(error: BaseException | None) -> bool:
    """A result found no room where it was made."""
    return any(_is_a(one, STORE_FULL) for one in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The exception and what is behind it, each once: Ray's wrapper and its cause name each other."""
    waiting, seen = [error], set[int]()
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        wrapped = vars(one).get("cause")  # of ray.exceptions.RayTaskError, whose own text is a whole traceback
        if isinstance(wrapped, BaseException):
            waiting.append(wrapped)
        else:
            yield one
        waiting.append(one.__cause__)


def _is_a(error: BaseException, names: frozenset[str]) -> bool:
    return any(f"{kind.__module__}.{kind.__qualname__}" in names for kind in type(error).__mro__)


def _says(error: BaseException, words: re.Pattern[str]) -> bool:
    """Of a RuntimeError only: a ValueError about a prompt may hold any word."""
    return isinstance(error, RuntimeError) and words.search(str(error)) is not None
