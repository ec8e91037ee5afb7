"""The same examples in every run, quick ones; and a watch over what is written while they are tried."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "here",
    derandomize=True,  # the same examples everywhere: a failure is one for everybody
    database=None,
    deadline=None,
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "60")),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("here")


class Watch:
    """Every path that Python opens for writing, makes, renames or removes while `on`."""

    def __init__(self) -> None:
        self.on = False
        self.paths: list[str] = []
        sys.addaudithook(self._saw)

    def _saw(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, mode, flags = arguments
            written = any(c in mode for c in "wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            written, path = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"), arguments[:1]
            path = path[0] if path else ""
        inside = event in ("os.remove", "os.rmdir") and arguments[1] not in (-1, None)  # a name within a seen rmtree
        if written and not inside and isinstance(path, str | os.PathLike):
            self.paths.append(os.fspath(path))

    def outside(self, folder: Path) -> list[str]:
        return [path for path in self.paths if not Path(path).absolute().is_relative_to(folder)]


WATCH = Watch()
OWN = ("__pycache__", ".hypothesis", "/dev/")
"""What Python and hypothesis keep for themselves."""


@pytest.fixture(autouse=True)
def writes_nothing_outside(tmp_path: Path) -> Iterator[None]:
    """Whatever is read, nothing is written but the test's own files (OWN apart)."""
    WATCH.paths, WATCH.on = [], True
    yield
    WATCH.on = False
    outside = [path for path in WATCH.outside(tmp_path) if not any(name in path for name in OWN)]
    assert not outside, f"written outside {tmp_path}: {outside}"
