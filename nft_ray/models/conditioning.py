"""What the transformer needs to know of a prompt: encoded once, alone, kept, and shared.

    prompt ──► memory (the last `size` prompts) ──► folder (if there is one) ──► text encoders
                     ▲                                   ▲                            │
                     └───────────────────────────────────┴── kept on the host ◄───────┘

A prompt is encoded in a batch of its own: which prompts were asked for with it cannot change a bit of it, and what is
kept is what the encoder gave. This file knows no family: it is given a function that loads its encoders.
"""

import hashlib
import json
import logging
import os
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nft_ray.config import ModelConfig
from nft_ray.models.base import Conditioning, family

logger = logging.getLogger(__name__)

SAMPLES, SAMPLE_BYTES = 64, 4096
"""A weights file is known by its size, its header and this many places of this many bytes, evenly spread."""


class TextEncoders(Protocol):
    """A family's text encoders, on the host or on the device."""

    @property
    def modules(self) -> Sequence[torch.nn.Module]: ...

    def __call__(self, prompt: str, device: torch.device) -> Conditioning:
        """Conditioning of one prompt, batch 1."""
        ...


class Conditioner:
    """Encodes prompts; holds the text encoders only where it must."""

    def __init__(
        self,
        load: Callable[[], TextEncoders],
        *,
        identity: str,
        device: torch.device,
        dtype: torch.dtype,
        size: int,
        resident: bool,
        folder: Path | None,
    ) -> None:
        self._load = load
        self._identity = identity
        self._device, self._dtype = device, dtype
        self._size, self._resident, self._folder = size, resident, folder
        self._kept: OrderedDict[str, Conditioning] = OrderedDict()
        self._encoders: TextEncoders | None = None
        if folder is None:  # else perhaps no prompt needs them
            self._need_encoders()

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of the prompts on the device, batch len(prompts); floats in the transformer's data type."""
        found = {prompt: self._known(prompt) for prompt in dict.fromkeys(prompts)}
        missing = [prompt for prompt, value in found.items() if value is None]
        if missing:
            encoders = self._need_encoders()
            with lent(encoders.modules, self._device, keep=self._resident):
                for prompt in missing:
                    found[prompt] = _to(encoders(prompt, self._device), torch.device("cpu"))
            for prompt in missing:
                self._write(prompt, found[prompt] or {})
        parts = [found[prompt] or {} for prompt in prompts]
        for prompt, value in found.items():
            self._keep(prompt, value or {})
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return _to(joined, self._device, self._dtype)

    def absent(self, prompts: Sequence[str]) -> list[str]:
        """The prompts that the folder does not hold, each once."""
        paths = {prompt: self._path(prompt) for prompt in dict.fromkeys(prompts)}
        return [prompt for prompt, path in paths.items() if path is None or not path.exists()]

    @property
    def loaded(self) -> bool:
        """Whether the text encoders were needed so far."""
        return self._encoders is not None

    @property
    def modules(self) -> Sequence[torch.nn.Module]:
        """The text encoders, if they were needed so far."""
        return () if self._encoders is None else self._encoders.modules

    def _known(self, prompt: str) -> Conditioning | None:
        if prompt in self._kept:
            self._kept.move_to_end(prompt)
            return self._kept[prompt]
        path = self._path(prompt)
        if path is None or not path.exists():
            return None
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            logger.warning("%s is made again: %s", path, " ".join(str(error).split()))
            return None

    def _keep(self, prompt: str, value: Conditioning) -> None:
        self._kept[prompt] = value
        while len(self._kept) > self._size:
            self._kept.popitem(last=False)

    def _write(self, prompt: str, value: Conditioning) -> None:
        """Whole or not at all, whoever else writes it at the same time."""
        path = self._path(prompt)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
        save_file({name: tensor.contiguous() for name, tensor in value.items()}, partial, metadata={"prompt": prompt})
        partial.chmod(0o644)  # safetensors makes files that only their owner may read
        partial.replace(path)

    def _path(self, prompt: str) -> Path | None:
        key = hashlib.blake2b(json.dumps([prompt, self._identity]).encode(), digest_size=20).hexdigest()
        return None if self._folder is None else self._folder / key[:2] / f"{key}.safetensors"

    def _need_encoders(self) -> TextEncoders:
        if self._encoders is None:
            self._encoders = self._load()
            for module in self._encoders.modules:
                module.requires_grad_(False).eval()
        return self._encoders


def conditioner(config: ModelConfig, folder: Path, device: torch.device) -> Conditioner:
    """The prompts' encoder that a configuration asks for, of the pipeline in `folder`."""
    module, name = family(config), config.text_encoder_dtype or config.dtype
    settings = (config.family, config.max_sequence_length, name)
    return Conditioner(
        lambda: module.load_text(config, folder, getattr(torch, name)),
        identity=identity(folder, module.text_parts(config), settings) if config.precomputed else "",
        device=device,
        dtype=getattr(torch, config.dtype),
        size=config.conditioning_cache,
        resident=config.text_encoders == "resident",
        folder=Path(config.precomputed).expanduser() if config.precomputed else None,
    )


@contextmanager
def lent(modules: Sequence[torch.nn.Module], device: torch.device, *, keep: bool) -> Iterator[None]:
    """The modules on the device; afterwards, unless `keep`, back in the very host memory that they came from."""
    home = [] if keep else [(held, name, value, value.data) for held, name, value in _held(modules)]
    for module in modules:
        module.to(device)
    try:
        yield
    finally:
        for held, name, value, data in home:  # `to` may have put another tensor there, or other data into this one
            value.data = data
            held[name] = value


def identity(folder: Path, parts: Sequence[str], settings: Sequence[str | int]) -> str:
    """A digest of text encoders and tokenizers (subfolders of a pipeline) with the settings of their use.

    Small files count whole; of weights the header and places spread over them: enough to tell any two apart that were
    not made to be confused, in milliseconds.
    """
    digest = hashlib.blake2b(json.dumps(list(settings)).encode(), digest_size=20)
    for file in sorted(file for part in parts for file in (folder / part).rglob("*") if file.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)} {size}".encode())
        with file.open("rb") as handle:
            for place in range(SAMPLES) if size > SAMPLES * SAMPLE_BYTES else range(1):
                handle.seek(place * (size - SAMPLE_BYTES) // (SAMPLES - 1) if place else 0)
                digest.update(handle.read(SAMPLE_BYTES if size > SAMPLES * SAMPLE_BYTES else size))
    return digest.hexdigest()


def _held(modules: Sequence[torch.nn.Module]) -> Iterator[tuple[dict[str, Any], str, torch.Tensor]]:
    """(where it is held, its name there, the tensor) of every parameter and buffer."""
    for module in (part for whole in modules for part in whole.modules()):
        for held in (module._parameters, module._buffers):
            for name, value in held.items():
                if value is not None:
                    yield held, name, value


def _to(conditioning: Conditioning, device: torch.device, dtype: torch.dtype | None = None) -> Conditioning:
    return {
        name: value.to(device, dtype if value.is_floating_point() else None) for name, value in conditioning.items()
    }
