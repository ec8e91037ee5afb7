"""What kind of failure an exception is: with the real classes of torch and Ray, alone and wrapped."""

import subprocess
import sys

import pytest
import torch
from ray.core.generated.common_pb2 import ActorDiedErrorContext, ErrorType
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ObjectLostError,
    ObjectReconstructionFailedError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    OwnerDiedError,
    RayTaskError,
    ReferenceCountingAssertionError,
    WorkerCrashedError,
)
from torch.distributed import DistBackendError

from nft_ray.failures import death, device_failure, lost, out_of_memory, store_full

OOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
DEVICE = (
    OOM,
    torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
    DistBackendError("NCCL error in: ProcessGroupNCCL.cpp"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    RuntimeError("No CUDA GPUs are available"),
    RuntimeError("Unexpected error from cudaGetDeviceCount(). Error 804"),
)
LOST = (
    ObjectLostError("ab", None, ""),
    OwnerDiedError("ab", None, ""),
    ReferenceCountingAssertionError("ab", None, ""),
    ObjectReconstructionFailedError("ab", None, "", ErrorType.OBJECT_UNRECONSTRUCTABLE_RETRIES_DISABLED),
)
FULL = (ObjectStoreFullError("full"), OutOfDiskError("full"))
OWN = (
    ValueError("prompt 'CUDA error' has no tag"),
    RuntimeError("v_old of 'a REACTION with ECCentric Xidents' is not finite"),
    AssertionError("CUDA error"),
    KeyError("x"),
)
KINDS = (device_failure, out_of_memory, lost, store_full)


def kinds(error: BaseException | None) -> list[str]:
    return [kind.__name__ for kind in KINDS if kind(error)]


def wrapped(error: Exception) -> RayTaskError:
    return RayTaskError("rollout", "Traceback: CUDA error, as a text", error)


@pytest.mark.parametrize("error", DEVICE, ids=str)
def test_a_device_failure_is_one_alone_and_wrapped(error: Exception) -> None:
    expected = ["device_failure", "out_of_memory"] if error is OOM else ["device_failure"]
    assert kinds(error) == kinds(wrapped(error)) == kinds(wrapped(error).as_instanceof_cause()) == expected


@pytest.mark.parametrize("error", LOST, ids=lambda error: type(error).__name__)
def test_a_lost_object_is_one_alone_and_wrapped(error: Exception) -> None:
    assert kinds(error) == kinds(wrapped(error)) == kinds(wrapped(error).as_instanceof_cause()) == ["lost"]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_full_store_is_one(error: Exception) -> None:
    assert kinds(error) == kinds(wrapped(error)) == ["store_full"]


@pytest.mark.parametrize("error", OWN, ids=str)
def test_an_exception_of_ones_own_is_none(error: Exception) -> None:
    assert kinds(error) == kinds(wrapped(error)) == kinds(wrapped(error).as_instanceof_cause()) == []


def test_a_death_of_a_process_and_the_hosts_memory_are_rays_to_tell() -> None:
    assert [kinds(error) for error in (ActorDiedError(), OutOfMemoryError("low on memory"), None)] == [[], [], []]


def test_what_it_was_raised_from_counts_and_a_circle_ends() -> None:
    error = RuntimeError("the rollout failed")
    error.__cause__ = wrapped(OOM)
    OOM.__cause__ = error.__cause__  # as `raise error.cause from error` leaves it
    try:
        assert kinds(error) == kinds(OOM) == ["device_failure", "out_of_memory"]
    finally:
        OOM.__cause__ = None


def test_cublas_without_memory_is_out_of_memory() -> None:
    assert out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert out_of_memory(torch.AcceleratorError("CUDA error: out of memory"))


def test_it_needs_neither_torch_nor_ray() -> None:
    code = "import sys, nft_ray.failures; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def died(message: str, pid: int = 9451) -> ActorDiedError:
    """As Ray makes it."""
    return ActorDiedError(
        ActorDiedErrorContext(
            class_name="SamplerActor",
            actor_id=bytes(16),
            pid=pid,
            name="quickstart/sampler-1",
            ray_namespace="c56dc23a-800a-4839-9ee4-fa046ddb2a06",
            node_ip_address="10.0.0.7" if pid else "",
            error_message=message,
        )
    )


EXITS = "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: "
CRASH = (
    "Worker unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the "
    "process was killed by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the "
    "worker crashed unexpectedly due to SIGSEGV or another unexpected error."
)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (died(EXITS + CRASH), "its process was killed or crashed (pid 9451 on 10.0.0.7)"),
        (died(EXITS + "Worker exits with an exit code 1."), "its process ended with status 1 (pid 9451 on 10.0.0.7)"),
        (died("The actor died because its node has died. Node Id: 3f" + 50 * "a", 0), "its node has died"),
        (
            died(EXITS.replace("SYSTEM_ERROR", "NODE_OUT_OF_MEMORY") + "Task was killed"),
            "its node ran low on memory, so Ray killed it (pid 9451 on 10.0.0.7)",
        ),
        (died("The actor is dead because it was killed by `ray.kill`.", 0), "it was killed by ray.kill"),
        (ActorDiedError(), "The actor died, and Ray does not say why"),
        (ActorUnavailableError("RpcError: " + 300 * "x", bytes(16)), "its process or its node cannot be reached"),
        (OutOfMemoryError("Task was killed due to " + 500 * "x"), "its node ran low on memory, so Ray killed it"),
        (WorkerCrashedError(), "its process has died"),
        (ValueError("its node has died"), ""),
        (None, ""),
    ],
)
def test_of_a_death_is_said_what_a_person_needs(error: BaseException | None, line: str) -> None:
    assert death(error) == line
    assert len(line) <= 100
