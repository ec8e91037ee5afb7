"""Lets `import torchvision` work where torch is built for the CPU and torchvision's wheel for CUDA.

That wheel's compiled operators do not load there, and torchvision refuses to start over two of them that it knows by
name only. `make_env.py` puts this file into an environment and has Python import it at start-up; it waits until
torchvision is imported, so that nothing else pays for it. The operators stay without a body: transforms need none, and
calling one is torch's own error.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

OPERATORS = ("nms", "qnms")


class Declare:
    """A finder that finds nothing: it only hears that torchvision is about to be imported."""

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == "torchvision":
            sys.meta_path.remove(self)  # type: ignore[arg-type]
            declare()
        return None


def declare() -> None:
    """Declare the operators, unless torch is built for CUDA and can load the wheel's own."""
    import torch

    if torch.version.cuda is None:
        for operator in OPERATORS:
            torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")


sys.meta_path.insert(0, Declare())  # type: ignore[arg-type]
