"""What kind of failure an exception is: with the real classes of torch and Ray, alone and wrapped."""

import subprocess
import sys

import pytest
import torch
from ray.core.generated.common_pb2 import ErrorType
from ray.exceptions import (
    ActorDiedError,
    ObjectLostError,
    ObjectReconstructionFailedError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    OwnerDiedError,
    RayTaskError,
    ReferenceCountingAssertionError,
)
from torch.distributed import DistBackendError

from nft_ray.failures import device_failure, lost, out_of_memory, store_full

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
