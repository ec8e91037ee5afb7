"""The config loader: any text, any value in any place, any override. An experiment or one line, and nothing else."""

from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from nft_ray.config import ExperimentConfig, dump, load, parse, resolved
from tests.examples import QUICKSTART
from tests.fuzz.strategies import LEAVES, changed, damaged, one_line

pytestmark = pytest.mark.slow
WHOLE = yaml.safe_load(QUICKSTART.read_text())
STAGED = yaml.safe_load((QUICKSTART.parent / "sd3_staged.yaml").read_text())
RESOLVED = resolved(load(QUICKSTART))


def dotted(tree: dict, prefix: str = "") -> list[str]:
    """a.b.c of every place in it."""
    found = []
    for key, value in tree.items():
        found += [f"{prefix}{key}", *(dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else [])]
    return found


def loads_or_says_why(path: Path, *overrides: str) -> None:
    try:
        config = load(path, overrides)
    except Exception as error:  # noqa: BLE001 - which one is the question
        one_line(error)
    else:
        assert isinstance(config, ExperimentConfig)
        assert resolved(parse(yaml.safe_load(dump(config)))) == resolved(config)


@given(damaged(QUICKSTART.read_bytes()))
@example(b"")
@example(b"\x00")
@example(b"run: &a [*a]")
@example(b"? {a: 1}\n: 2")
@example(b"run: !!python/object/apply:os.system [true]")
@example(b"1: 2\n2: 3")
@example(b"run: {name: a}\nrewards: {geneval: ${rewards}}")
@example(b"run: " + b"[" * 3000)
def test_any_text(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "any.yaml").write_bytes(text)
    loads_or_says_why(tmp_path / "any.yaml")


@pytest.mark.parametrize("whole", [WHOLE, STAGED, RESOLVED], ids=["quickstart", "staged", "resolved"])
def test_any_value_in_any_place(whole: dict, tmp_path: Path) -> None:
    @given(changed(whole))
    def check(tree: object) -> None:
        file = tmp_path / "any.yaml"
        file.write_text(yaml.safe_dump(tree, allow_unicode=True))
        loads_or_says_why(file)
        if isinstance(tree, dict):
            try:
                parse(tree)
            except Exception as error:  # noqa: BLE001
                one_line(error)

    check()


@given(
    st.sampled_from(dotted(RESOLVED)) | st.text(max_size=12),
    st.sampled_from(["=", "", "==", ".x="]),
    LEAVES.map(str) | st.text(max_size=12),
)
@example("cluster", "=", "eight_gpus")
@example("stages.0.name", "=", "x")
@example("run", "=", "[")
@example("run.name", "=", "../x")
@example("rewards.geneval", "=", "null")
@example("a" * 3000, "=", "1")
def test_any_override(key: str, sign: str, value: str) -> None:
    loads_or_says_why(QUICKSTART, f"{key}{sign}{value}")
