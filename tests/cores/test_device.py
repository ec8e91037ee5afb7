"""Where blocks are compiled: a node that cannot is told so before anything is drawn."""

from pathlib import Path

import pytest
import torch

from nft_ray.cores import device
from nft_ray.cores.device import check_compiler, compile_blocks
from nft_ray.models.base import load_model
from tests.examples import example_config


def test_here_blocks_can_be_compiled() -> None:
    check_compiler()


def test_a_node_without_a_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "which", lambda name: None)
    transformer = load_model(example_config().model, torch.device("cpu"), transformer_only=True).transformer
    with pytest.raises(ValueError, match=r"compile = true: this node has no g\+\+; .*sampler\.compile=false"):
        compile_blocks(transformer)


def test_a_node_without_pythons_headers_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match=r"no .*Python\.h \(python3-dev\)"):
        check_compiler()
    (tmp_path / "Python.h").touch()
    check_compiler()


def test_workers_of_a_node_share_its_cores_when_they_compile() -> None:
    transformer = load_model(example_config().model, torch.device("cpu"), transformer_only=True).transformer
    assert compile_blocks(transformer) == len(device.blocks_of(transformer))
    assert torch._inductor.config.compile_threads == torch.get_num_threads()
