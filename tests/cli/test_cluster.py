"""What is known of this machine before a Ray is started on it."""

import pytest
from ray._private.accelerators import NvidiaGPUAcceleratorManager

from nft_ray.cli import cluster


@pytest.mark.parametrize(("visible", "counted"), [(None, 4), ("", 0), ("0,2", 2), ("0,1,2,3,4,5", 4)])
def test_gpus_are_counted_as_ray_will_count_them(
    visible: str | None, counted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NvidiaGPUAcceleratorManager, "get_current_node_num_accelerators", staticmethod(lambda: 4))
    monkeypatch.setattr(cluster, "get_accelerator_manager_for_resource", {"GPU": NvidiaGPUAcceleratorManager}.get)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert cluster._gpus() == counted
