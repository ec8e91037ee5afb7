"""What kind of failure an exception is: one place for the words that Ray and torch use. Imports neither.

    device_failure   a GPU, its driver or its memory: the same call may succeed in another process or on another card
    out_of_memory    of these, the device's memory: a smaller micro-batch may succeed
    lost             an object that is gone with its node or its owner: what made it can make it again
    store_full       no room for an object in shared memory, nor on the disk behind it
    death            what a person needs of Ray's paragraphs on who has died

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
DEATHS = {
    "ActorUnavailableError": "its process or its node cannot be reached",
    "NodeDiedError": "its node has died",
    "WorkerCrashedError": "its process has died",
    "OutOfMemoryError": "its node ran low on memory, so Ray killed it",
    "OwnerDiedError": "the process that owned it has ended",
}
CAUSES = {
    "its node has died": "its node has died",
    "NODE_OUT_OF_MEMORY": "its node ran low on memory, so Ray killed it",
    "running low on memory": "its node ran low on memory, so Ray killed it",
    "killed by `ray.kill`": "it was killed by ray.kill",
    "its owner has died": "the process that started it has ended",
    "references to the actor were removed": "nobody held it any more",
    "its worker process has died": "its process was killed or crashed",
}
"""Of an ActorDiedError, by words of its text, which also lists what else might have been."""
PID, IP = re.compile(r"\bpid: (\d+)"), re.compile(r"\bip: (\S+)")


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


def death(error: BaseException | None) -> str:
    """At most 100 characters on a process, a node or an object that is gone; empty for any other error."""
    found = next((said for kind, said in DEATHS.items() if _is_a(error, frozenset({f"ray.exceptions.{kind}"}))), "")
    if error is None or found or not _is_a(error, frozenset({"ray.exceptions.ActorDiedError"})):
        return found
    text = " ".join(str(error).split())
    if "its creation task" in text:
        return f"its start failed: {str(error).strip().splitlines()[-1].strip()}"[:100]
    said = next((said for words, said in CAUSES.items() if words in text), "The actor died, and Ray does not say why")
    if status := re.search(r"with an exit code (-?\d+)", text):
        said = f"its process ended with status {status[1]}"
    where = [f"{name}{value[1]}" for name, value in (("pid ", PID.search(text)), ("on ", IP.search(text))) if value]
    return f"{said} ({' '.join(where)})"[:100] if where else said


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


def _is_a(error: BaseException | None, names: frozenset[str]) -> bool:
    return any(f"{kind.__module__}.{kind.__qualname__}" in names for kind in type(error).__mro__)


def _says(error: BaseException, words: re.Pattern[str]) -> bool:
    """Of a RuntimeError only: a ValueError about a prompt may hold any word."""
    return isinstance(error, RuntimeError) and words.search(str(error)) is not None
