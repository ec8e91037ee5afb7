import json
from pathlib import Path

import pytest

from nft_ray.algorithms.schedules import PRESETS, CustomDecay, ema_decay, old_policy_decay


def test_schedules_match_the_goldens(goldens: Path) -> None:
    published = json.loads((goldens / "schedules.json").read_text())
    for i, step in enumerate(published["steps"]):
        for number, preset in enumerate(("on_policy", "linear", "delayed")):
            assert old_policy_decay(step, preset) == pytest.approx(published["decay"][str(number)][i], abs=1e-12)
        assert ema_decay(step) == pytest.approx(published["ema"][i], abs=1e-12)


def test_custom_decay_as_mapping_and_as_record() -> None:
    custom = {"flat_steps": 10, "rate": 0.1, "max": 0.25}
    assert [old_policy_decay(step, custom) for step in (0, 10, 11, 12, 13, 99)] == pytest.approx(
        [0, 0, 0.1, 0.2, 0.25, 0.25]
    )
    assert old_policy_decay(12, CustomDecay(**custom)) == old_policy_decay(12, custom)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_decays_never_fall_and_stay_below_one(preset: str) -> None:
    decays = [old_policy_decay(step, preset) for step in range(2000)]
    assert decays == sorted(decays)
    assert decays[0] == 0
    assert decays[-1] < 1


def test_ema_ceiling() -> None:
    assert ema_decay(10_000, max_decay=0.99) == 0.99
    assert ema_decay(0, max_decay=0.05) == 0.05


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("linaer", r"unknown old-policy decay 'linaer': use on_policy, linear, delayed or .*; nearest: 'linear'"),
        ({"flat_steps": 1, "rate": 0.1}, "max: Field required"),
        ({"flat_steps": 1, "rate": 0.1, "max": 2}, "max: Input should be less than or equal to 1"),
        ({"flat_steps": 1, "rate": 0.1, "max": 1, "maximum": 1}, "maximum: Extra inputs"),
    ],
)
def test_unknown_and_malformed_presets_take_one_line(preset: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        old_policy_decay(1, preset)
    assert "\n" not in str(error.value)


def test_bad_numbers() -> None:
    for call in (lambda: old_policy_decay(-1, "linear"), lambda: ema_decay(-1), lambda: ema_decay(1, 1.5)):
        with pytest.raises(ValueError, match=r"step = -1|max_decay = 1\.5"):
            call()
