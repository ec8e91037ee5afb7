"""What one device can do: a small YAML, packaged (`devices/NAME.yaml`), measured (`nft-ray profile`) or by hand.

A number that nobody has measured says so in `sources`. Rates are of the device's own matrix product and memory; how
much of them a part of an epoch reaches is `utilisation`: an assumption until `benchmarks/gpu.py` has run there.
"""

import difflib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from yaml import YAMLError

from nft_ray.config.errors import explained

FOLDER = Path(__file__).parent / "devices"
DType = Literal["float32", "bfloat16", "float16"]
Part = Literal["sampling", "learning", "decoding", "encoding", "scoring"]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]


class Utilisation(BaseModel):
    """Of the rate of a large matrix product, by what is done."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    sampling: Share
    """Forwards of the transformer, in micro-batches."""
    learning: Share
    """Forwards and backwards of the transformer."""
    decoding: Share
    """The VAE: convolutions."""
    encoding: Share
    """Text encoders, one prompt at a time."""
    scoring: Share
    """Reward models."""

    def of(self, part: Part) -> float:
        """One of them."""
        return float(getattr(self, part))


class Device(BaseModel):
    """One card, or one CPU thread, with the host and the network around it. SI units: bytes, seconds, FLOP/s."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: Annotated[str, Field(min_length=1)]
    """What a plan calls it."""
    kind: Literal["cuda", "cpu"] = "cuda"
    """A CPU's "device memory" is the host's; copies there and back cost nothing."""
    memory_bytes: Annotated[int, Field(gt=0)]
    """Of the device; of a CPU the host's."""
    runtime_bytes: Annotated[int, Field(ge=0)]
    """What a process holds of that before its first tensor: a CUDA context with its kernels; of a CPU the interpreter
    with torch."""
    matmul_per_s: dict[DType, Rate]
    """FLOP/s of a large matrix product by data type; one that is not here works at the rate of float32."""
    memory_bytes_per_s: Rate
    """Bandwidth of the device's memory."""
    host_copy_bytes_per_s: Rate
    """Between pinned host memory and the device, one way."""
    pageable_copy_bytes_per_s: Rate
    """The same for memory that is not pinned."""
    link_bytes_per_s: Rate
    """Between two devices of one node, one way."""
    network_bytes_per_s: Rate
    """Between two nodes, one way."""
    object_store_bytes_per_s: Rate
    """A worker's arrays into the object store of its node: a copy in host memory."""
    checksum_bytes_per_s: Rate
    """SHA-256 on one core of the host."""
    operation_s: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """What every operation takes besides its arithmetic: launching it."""
    utilisation: Utilisation
    """Shares of `matmul_per_s` that are reached."""
    price_per_hour: Annotated[float, Field(ge=0)] | None = None
    """Money for an hour of one; null = nobody said."""
    host_memory_bytes: Annotated[int, Field(gt=0)] | None = None
    """Of a node; null = not known."""
    cpus: Annotated[int, Field(gt=0)] | None = None
    """Of a node; null = not known."""
    sources: dict[str, str]
    """Field -> where its number comes from."""

    def flops_s(self, flops: float, dtype: str, part: Part) -> float:
        """Seconds of so many FLOPs, as a part of an epoch gets them."""
        rates: Mapping[Any, float] = self.matmul_per_s
        return flops / (rates.get(dtype, rates["float32"]) * self.utilisation.of(part))

    def operations_s(self, operations: float) -> float:
        """Seconds of launching so many."""
        return operations * self.operation_s

    def host_copy_s(self, num_bytes: float, *, pinned: bool = True) -> float:
        """Seconds to bring bytes to the device or back."""
        if self.kind == "cpu":
            return 0.0
        return num_bytes / (self.host_copy_bytes_per_s if pinned else self.pageable_copy_bytes_per_s)


def device_names() -> list[str]:
    """The packaged ones."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


@lru_cache(32)
def device_named(name: str) -> Device:
    """A packaged device, or a YAML file; ValueError with one line, and the nearest name, where it is neither."""
    packaged = FOLDER / f"{name}.yaml"
    if name in device_names():
        return _read(packaged)
    if Path(name).expanduser().is_file():
        return _read(Path(name).expanduser())
    close = difflib.get_close_matches(name, device_names(), 1)
    hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(device_names())}"
    raise ValueError(f"device {name!r}: no such profile and no such file; {hint}, or measure one: nft-ray profile")


def _read(path: Path) -> Device:
    try:
        data: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, OSError, AssertionError) as error:
        raise ValueError(f"device {path}: {' '.join(str(error).split())}") from None
    try:
        device = Device.model_validate(data)
    except ValidationError as error:
        raise ValueError(f"device {path}: {explained(Device, error)}") from None
    if "float32" not in device.matmul_per_s:
        raise ValueError(f"device {path}: matmul_per_s: float32 is missing; it is the rate of what has none")
    return device
