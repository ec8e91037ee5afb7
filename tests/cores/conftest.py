"""Compiled cores without a C++ compiler's minute."""

from functools import partial

import pytest
import torch


@pytest.fixture(params=["aot_eager", pytest.param("inductor", marks=pytest.mark.large)])
def compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What compiles: one that only traces, which is where ours can be wrong, or torch's own, which takes a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=request.param))
