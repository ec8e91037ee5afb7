"""The shapes of a pipeline without asking the Hub: a local folder's own JSON, or what is kept here of published ones.

What of a model can be counted needs its configuration only. A local pipeline has it; a Hub id that asks for a licence
does not give it to everybody, so `architectures/` keeps the JSON of those that the presets name (its README says the
sources). Any other Hub id is asked for its JSON, as everywhere.
"""

from functools import lru_cache
from pathlib import Path

from nft_ray.config import ModelConfig

FOLDER = Path(__file__).parent / "architectures"
TEXT_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def kept() -> list[str]:
    """The Hub ids whose architectures are here."""
    return sorted(folder.name.replace("--", "/", 1) for folder in FOLDER.iterdir() if folder.is_dir())


@lru_cache(64)
def described(config: ModelConfig) -> ModelConfig | None:
    """The same model with a `path` that is a folder with its JSON; None where nobody here knows it.

    ValueError with one line where there is no such folder, or the Hub says no.
    """
    from nft_ray.downloads import pipelines
    from nft_ray.models.parts import DESCRIPTIONS

    folder: Path | None = FOLDER / config.path.replace("/", "--")
    if config.path == pipelines.NANO or "/" not in config.path or folder is None or not folder.is_dir():
        parts = tuple(f"{part}/config.json" for part in TEXT_PARTS)
        folder = pipelines.location(config.path) or pipelines.described(
            config.path, config.revision, (*DESCRIPTIONS, *parts)
        )
    return None if folder is None else config.model_copy(update={"path": str(folder)})


def known(config: ModelConfig) -> ModelConfig:
    """As `described`; ValueError with one line where nobody knows it."""
    found = described(config)
    if found is None:
        raise ValueError(
            f"model.path = {config.path}: its architecture is not here and the Hub cannot be reached; name a folder, "
            f"or one of {', '.join(kept())}"
        )
    return found
