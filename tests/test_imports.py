"""Who may import whom: nft_ray knows no Ray, actors and deployments are siblings, the command line knows all three."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(package: str) -> list[Path]:
    found = sorted((REPO / package).rglob("*.py"))
    assert found
    return found


def is_composition_root(file: Path) -> bool:
    return file.relative_to(REPO).as_posix() == "nft_ray/__main__.py" or "nft_ray/cli/" in file.as_posix()


def uses(file: Path, packages: tuple[str, ...]) -> list[str]:
    return [name for name in imports(file) if any(f"{name}.".startswith(f"{package}.") for package in packages)]


@pytest.mark.parametrize("file", [f for f in files("nft_ray") if not is_composition_root(f)], ids=str)
def test_nft_ray_imports_no_ray_and_nothing_above_it(file: Path) -> None:
    assert uses(file, ("ray", "actors", "deployments", "nft_ray.cli", "nft_ray.__main__")) == []


@pytest.mark.parametrize(("package", "sibling"), [("actors", "deployments"), ("deployments", "actors")])
def test_siblings_do_not_import_each_other_or_the_command_line(package: str, sibling: str) -> None:
    for file in files(package):
        assert uses(file, (sibling, "nft_ray.cli", "nft_ray.__main__")) == [], file


def test_the_trainer_and_the_local_roles_load_without_ray() -> None:
    script = "import sys, nft_ray.trainer, nft_ray.local, nft_ray.runs.tracking; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], cwd=REPO, check=True)


def test_a_configuration_is_read_in_a_moment() -> None:
    """Commands that only look at a YAML do not wait for torch."""
    script = "import sys, nft_ray.config; assert not {'torch', 'diffusers', 'transformers', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=REPO, check=True)
