"""What of a reward's variables Ray is given, whose logs keep it, and what its replica sets itself."""

import os

import pytest

from deployments.variables import for_ray, set_rest

VARIABLES = {"API_KEY": "secret", "LD_LIBRARY_PATH": "/x", "OMP_NUM_THREADS": "2", "HF_HOME": "/y"}
GIVEN = {"pip": ["x"], "env_vars": VARIABLES}


def test_together_they_are_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert for_ray(GIVEN) == {"pip": ["x"], "env_vars": {"LD_LIBRARY_PATH": "/x", "OMP_NUM_THREADS": "2"}}
    monkeypatch.setattr(os, "environ", {"OMP_NUM_THREADS": "1"})
    set_rest(GIVEN)
    assert os.environ == {"OMP_NUM_THREADS": "1", "API_KEY": "secret", "HF_HOME": "/y"}
    assert "API_KEY" in VARIABLES


@pytest.mark.parametrize("runtime_env", [None, {}, {"env_vars": {}}, {"env_vars": {"LDAP_PASSWORD": "secret"}}])
def test_without_early_ones_ray_is_given_none(runtime_env: dict[str, dict[str, str]] | None) -> None:
    assert for_ray(runtime_env) == {}
