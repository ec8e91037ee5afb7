"""What a YAML says of a server of a vision-language model that is started for a reward: `rewards.NAME.server`."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from nft_ray.types import Mark

LOOPBACK = ("127.0.0.1", "localhost", "::1")
OWNED = {
    *("--model-path", "--model", "--host", "--port", "--api-key", "--config", "--chat-template"),
    *("--mem-fraction-static", "--max-running-requests"),
    *("--data-parallel-size", "--dp-size", "--dp", "--tensor-parallel-size", "--tp-size", "--tp"),
}
"""Arguments that have a field of their own."""
Seconds = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class SglangConfig(BaseModel):
    """One server. Flags that are null are not given, and sglang decides."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    model_path: str = Field(min_length=1)
    """Folder or Hub name of the model."""
    python: Annotated[str, Mark.PLACEMENT] = Field(examples=["python3"])
    """Python of the environment that holds sglang."""
    name: Annotated[str | None, Mark.PLACEMENT] = None
    """Of the actor; null = sglang-MODEL."""
    host: Annotated[str | None, Mark.PLACEMENT] = None
    """Address to listen on; null = that of its node, which replicas on other nodes reach, with a key that is made for
    it where none is named. Anything else but loopback needs a key."""
    port: Annotated[int | None, Mark.PLACEMENT] = Field(default=None, ge=1, le=65535)
    """null = one that is free; it stays the same over restarts."""
    api_key_env: Annotated[str | None, Mark.PLACEMENT] = None
    """Name of the environment variable that holds the key, where `serve_sglang` is called."""
    api_key_file: Annotated[Path | None, Mark.PLACEMENT] = None
    """File that holds the key, where `serve_sglang` is called."""
    chat_template: str | None = None
    """Name or file; null = the model's."""
    mem_fraction_static: Annotated[float | None, Mark.PLACEMENT] = Field(default=None, gt=0, lt=1)
    """Part of the GPU's memory for weights and KV cache."""
    max_running_requests: Annotated[Count | None, Mark.PLACEMENT] = None
    """Requests in one batch, at most."""
    data_parallel_size: Annotated[Count, Mark.PLACEMENT] = 1
    """Copies of the model."""
    tensor_parallel_size: Annotated[Count, Mark.ROUNDING] = 1
    """GPUs that one copy is spread over."""
    extra_args: tuple[str, ...] = ()
    """Further arguments of sglang, one word each."""
    env: dict[str, str] = {}
    """Further environment variables of the server. No secrets: a configuration is shown."""
    num_cpus: Annotated[float, Mark.PLACEMENT] = Field(default=1.0, ge=0)
    """CPUs of the actor."""
    num_gpus: Annotated[float | None, Mark.PLACEMENT] = Field(default=None, ge=0)
    """GPUs of the actor; null = data_parallel_size * tensor_parallel_size."""
    start_timeout_s: Annotated[Seconds, Mark.PLACEMENT] = 1800.0
    """From the launch to the first answer; also the longest wait for free GPUs."""
    health_interval_s: Annotated[Seconds, Mark.PLACEMENT] = 10.0
    """Pause between two health checks."""
    health_timeout_s: Annotated[Seconds, Mark.PLACEMENT] = 30.0
    """sglang takes up to 20 s to find itself unhealthy (SGLANG_HEALTH_CHECK_TIMEOUT)."""
    health_failures: Annotated[Count, Mark.PLACEMENT] = 3
    """So many failed checks in a row mean a restart."""
    max_restarts: Annotated[int, Mark.PLACEMENT] = Field(default=3, ge=0)
    """Restarts within the window; after them the server is given up."""
    restart_window_s: Annotated[Seconds, Mark.PLACEMENT] = 3600.0
    """That window."""
    backoff_s: Annotated[Seconds, Mark.PLACEMENT] = 1.0
    """Pause before a restart; doubles with each within the window, up to a minute."""
    stop_timeout_s: Annotated[Seconds, Mark.PLACEMENT] = 10.0
    """From SIGTERM to SIGKILL."""

    @field_validator("extra_args")
    @classmethod
    def _not_owned(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        if twice := sorted({word.split("=")[0] for word in words} & OWNED):
            raise ValueError(f"{', '.join(twice)}: use the field of that name")
        return words

    @model_validator(mode="after")
    def _guarded(self) -> "SglangConfig":
        if self.api_key_env is not None and self.api_key_file is not None:
            raise ValueError("give api_key_env or api_key_file, not both")
        if self.host not in (None, *LOOPBACK) and self.api_key_env is None and self.api_key_file is None:
            raise ValueError(f"host {self.host} is open to others and there is no key; use 127.0.0.1, or api_key_env")
        return self

    @property
    def actor_name(self) -> str:
        """`name`, or sglang- and the last part of the model's path."""
        return self.name or f"sglang-{self.model_path.rstrip('/').split('/')[-1]}"

    @property
    def gpus(self) -> float:
        """GPUs of the actor."""
        return self.data_parallel_size * self.tensor_parallel_size if self.num_gpus is None else self.num_gpus
