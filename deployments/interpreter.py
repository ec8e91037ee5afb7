"""`rewards.NAME.py_executable`: whether that Python can hold a replica. Serve would wait for ever, in silence."""

import os
import subprocess

import ray
from ray.exceptions import RayError

from nft_ray.rewards.base import RewardConfig

PROBE_S = 60.0


def check_py_executable(name: str, config: RewardConfig) -> None:
    """ValueError where `py_executable` is not a Python with this Ray and nft_ray: Serve would wait for ever, silently.

    Looked at on this machine; where the file is not here, on a worker of the cluster.
    """
    if config.py_executable is None:
        return
    if os.path.exists(config.py_executable):
        problem = _probe(config.py_executable)
    else:
        try:
            problem = ray.get(ray.remote(num_cpus=0)(_probe).remote(config.py_executable), timeout=2 * PROBE_S)
        except RayError as error:
            problem = f"could not be looked at: {type(error).__name__}"
    if problem:
        raise ValueError(f"rewards.{name}.py_executable = {config.py_executable!r}: {problem}")


def _probe(executable: str) -> str | None:
    """What is wrong with a Python, or None."""
    code = "import ray, nft_ray; print(ray.__version__)"
    try:
        done = subprocess.run([executable, "-c", code], capture_output=True, text=True, timeout=PROBE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"cannot be run: {error}"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return f"cannot import ray and nft_ray ({last}); install both into that environment"
    if (found := done.stdout.split()[-1]) != ray.__version__:
        return f"has ray {found}, this cluster {ray.__version__}; install ray=={ray.__version__} there"
    return None
