"""A folder with a package `sglang` that is stand_in_sglang.py, and what a test asks of its server."""

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nft_ray.rewards.servers import SglangConfig

QUICK = {
    "health_interval_s": 0.2,
    "health_timeout_s": 1.0,
    "health_failures": 2,
    "backoff_s": 0.05,
    "stop_timeout_s": 0.3,
    "start_timeout_s": 20.0,
}


class StandIn:
    """A folder that holds a package `sglang`, and what its server is told and has written down."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        package = folder / "path" / "sglang"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        shutil.copy(Path(__file__).with_name("stand_in_sglang.py"), package / "launch_server.py")
        self.set()

    def set(self, **settings: float) -> None:
        (self.folder / "settings.json").write_text(json.dumps(settings))

    def config(self, **fields: Any) -> SglangConfig:
        env = {"PYTHONPATH": str(self.folder / "path"), "STAND_IN": str(self.folder)}
        return SglangConfig(**{"model_path": "some/Model-7B", "python": sys.executable, "env": env, **QUICK, **fields})

    @property
    def starts(self) -> list[dict[str, Any]]:
        file = self.folder / "started.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]  # it may be writing the last one

    def alive(self) -> list[int]:
        return [pid for start in self.starts for pid in (start["pid"], start["worker"]) if is_alive(pid)]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def until(condition: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    end = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)
    return found
