"""Device profiles: all of them say where their numbers come from; mistakes are one line."""

from pathlib import Path

import pytest

from nft_ray.planning.devices import FOLDER, Device, device_named, device_names


def test_these_are_packaged() -> None:
    assert {"h100", "h200", "a100", "l40s", "4090", "cpu"} <= {*device_names()}


@pytest.mark.parametrize("name", device_names())
def test_every_number_has_a_source(name: str) -> None:
    device = device_named(name)
    assert device.name == name
    numbers = {
        field
        for field in Device.model_fields
        if field not in ("name", "kind", "sources") and getattr(device, field) is not None
    }
    assert numbers == {*device.sources}
    assert (device.kind == "cpu") == (name == "cpu")


def test_seconds() -> None:
    card = device_named("h100")
    assert card.flops_s(989.4e12 * 0.4, "float16", "sampling") == pytest.approx(1.0)
    assert card.flops_s(1e15, "float32", "scoring") > 10 * card.flops_s(1e15, "bfloat16", "scoring")
    assert card.host_copy_s(50e9) == pytest.approx(1.0)
    assert card.host_copy_s(50e9, pinned=False) == pytest.approx(10.0)
    assert card.operations_s(1000) == pytest.approx(2e-3)
    cpu = device_named("cpu")
    assert cpu.host_copy_s(1e12) == 0
    assert cpu.flops_s(1e9, "bfloat16", "learning") == cpu.flops_s(1e9, "float32", "learning")


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    text = (FOLDER / "h100.yaml").read_text().replace("name: h100", "name: mine\nprice_per_hour: 2.5")
    own.write_text(text)
    device = device_named(str(own))
    assert (device.name, device.price_per_hour) == ("mine", 2.5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("memory_bytes_per_s: 3.35e12", "memory_bytes_per_s: -1"), "memory_bytes_per_s = -1.*greater than 0"),
        (("memory_bytes_per_s:", "memory_bytes_per_sec:"), "did you mean memory_bytes_per_s"),
        (("{float32: 66.9e12, ", "{"), "matmul_per_s: float32 is missing"),
        (("name: h100", "name: [h100"), "device .*yaml: "),
    ],
)
def test_a_mistake_in_it_is_one_line(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    own = tmp_path / "own.yaml"
    own.write_text((FOLDER / "h100.yaml").read_text().replace(*change))
    with pytest.raises(ValueError, match=said) as caught:
        device_named(str(own))
    assert "\n" not in str(caught.value)


def test_an_unknown_name_has_a_nearest() -> None:
    with pytest.raises(ValueError, match=r"device 'h10': no such profile and no such file; did you mean h100\?"):
        device_named("h10")
    with pytest.raises(ValueError, match="known: 4090, a100, cpu"):
        device_named("tpu-v5")
