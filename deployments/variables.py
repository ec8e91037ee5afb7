"""The `env_vars` of a reward's runtime_env, past Ray: its agent writes every runtime environment into its logs.

A replica sets them itself before it loads its reward. Only what a process reads while it starts, and what Ray itself
reads, has to be there before: that is left to Ray, and stands in its logs.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

EARLY = re.compile(
    r"(PATH|HOME|USER|SHELL|LANG|TZ|TMPDIR|HOSTNAME)$|((LC|LD|MALLOC|GLIBC|OMP|MKL|OPENBLAS|CUDA|NVIDIA|NCCL|RAY)_|PYTHON)"
)
"""Names that are read before the first line of a replica runs."""


def for_ray(runtime_env: Mapping[str, Any] | None) -> dict[str, Any]:
    """The runtime environment that Ray is given."""
    given = dict(runtime_env or {})
    early = {name: value for name, value in given.pop("env_vars", {}).items() if EARLY.match(name)}
    return given | ({"env_vars": early} if early else {})


def set_rest(runtime_env: Mapping[str, Any] | None) -> None:
    """In a replica: the variables that `for_ray` left out."""
    variables = (runtime_env or {}).get("env_vars", {})
    os.environ.update({name: value for name, value in variables.items() if not EARLY.match(name)})
