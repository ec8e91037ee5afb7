"""Prompt sets that have a name: where their files are, and what to do about one that is not there.

    shapes/train, small/geneval      come with this package
    geneval/train, geneval           published; `nft-ray data fetch geneval` brings them into the data root

A published set is never replaced by a packaged one: a run that names it needs it. What is pinned is one commit of the
published repository. Source: NVlabs/DiffusionNFT, dataset/ (Apache-2.0), which has GenEval, OCR and Pick-a-Pic prompts
from Flow-GRPO (arXiv 2505.05470). Its GenEval test lines are GenEval's own 553, each four times; its DrawBench test
lines are DrawBench's 200, each five times: the line is the seed.
"""

import difflib
import os
from pathlib import Path

from nft_ray.downloads.published import PublishedFile

REPOSITORY = "https://raw.githubusercontent.com/NVlabs/DiffusionNFT/24af5554898d85e93efa492f42b5e9cdf4156e9b/dataset"


def _file(path: str, mib: float, sha256: str | None = None, git_sha1: str | None = None) -> PublishedFile:
    return PublishedFile(path=path, url=f"{REPOSITORY}/{path}", sha256=sha256, git_sha1=git_sha1, mib=mib)


PUBLISHED = {
    "geneval/train": _file("geneval/train_metadata.jsonl", 8.0, git_sha1="0b97e8a6802c08fc7537cd00c76ae79c851bddcb"),
    "geneval/test": _file(
        "geneval/test_metadata.jsonl", 0.4, "cec4b24b9fee7bac21c8f787054ecc8dc9ff831674037713a4cd35e0f0a74a28"
    ),
    "ocr/train": _file("ocr/train.txt", 4.5, git_sha1="3ce0521b77b0a9031191d66ecc36ebaaf27a3922"),
    "ocr/test": _file("ocr/test.txt", 0.3, "4dd8caf3ab6ade73bd376c7d14c6ca49b6eacfb1bd321e22c40714ae4a98d4dc"),
    "pickscore/train": _file(
        "pickscore/train.txt", 2.8, "2f425adcbb9a6d0feee7c6c448e1cb83a1f71deca9434b803907e2578eca837f"
    ),
    "pickscore/test": _file(
        "pickscore/test.txt", 0.3, "d75c025fa451866e70f7e36243f7cdd93095523cb51f5f9651f2ce3236d20262"
    ),
    "drawbench/test": _file(
        "drawbench/test.txt", 0.1, "9006b98feabb94b28a2bc0c88de42fd4f31a9ec3c2a19e308a02c5385b7172f0"
    ),
}
"""Name -> its file below the data root. Large ones that we have not read ourselves are pinned by git's sum of them at
that commit."""
DATASETS = tuple(dict.fromkeys(name.partition("/")[0] for name in PUBLISHED))
"""What `nft-ray data fetch` takes. The bare name means the test lines."""
LINES = {
    "geneval/test": 2212,
    "ocr/test": 1018,
    "pickscore/train": 25432,
    "pickscore/test": 2048,
    "drawbench/test": 1000,
}
"""Of sets that need not be here for it, the lines."""
_HERE = Path(__file__).parent
PACKAGED = {
    "shapes/train": _HERE.parent / "shapes" / "prompts" / "train.jsonl",
    "shapes/test": _HERE.parent / "shapes" / "prompts" / "test.jsonl",
    "small/geneval": _HERE / "small" / "geneval.jsonl",
    "small/ocr": _HERE / "small" / "ocr.txt",
    "small/pickscore": _HERE / "small" / "pickscore.txt",
    "small/drawbench": _HERE / "small" / "drawbench.txt",
}
"""Name -> file. `small/...` are ours, for trying things out without a network: too few to learn or to compare from."""
SUFFIXES = (".jsonl", ".txt")


def data_root(configured: str | None = None) -> Path:
    """The folder of the published sets: as configured, or NFT_RAY_DATA, or ~/.cache/nft_ray/data."""
    chosen = configured or os.environ.get("NFT_RAY_DATA") or "~/.cache/nft_ray/data"
    return Path(chosen).expanduser().resolve()


def dataset_files(names: list[str]) -> list[PublishedFile]:
    """The files of the data sets, of all where none is named; ValueError with the nearest for an unknown one."""
    for name in names:
        if name not in DATASETS:
            raise ValueError(f"data set {name!r}: unknown{_nearest(name, DATASETS)}; known: {', '.join(DATASETS)}")
    return [file for name, file in PUBLISHED.items() if name.partition("/")[0] in (names or DATASETS)]


def missing(spec: str) -> str | None:
    """One line about a published set that has not been fetched; None for every other spec."""
    published = _published(spec)
    if published is None:
        return None
    path = data_root() / published.path
    if path.is_file():
        return None
    dataset = spec.partition("/")[0]
    return f"prompts {spec}: {path} is missing: run `nft-ray data fetch {dataset}`, or put {published.origin} there"


def num_lines(spec: str) -> int:
    """Lines of a prompt set: counted where it is here, else as published; ValueError as `prompt_file`."""
    name = f"{spec}/test" if spec in DATASETS else spec
    if missing(spec) is not None and name in LINES:
        return LINES[name]
    return sum(1 for line in prompt_file(spec).read_text(encoding="utf-8-sig").split("\n") if line.strip())


def prompt_file(spec: str) -> Path:
    """The file of a prompt set: packaged, published, or a .jsonl or .txt file of the user.

    Raises ValueError with one line for a published set that is not there, and for a name that is none.
    """
    if spec in PACKAGED:
        return PACKAGED[spec]
    published = _published(spec)
    if published is not None:
        if (line := missing(spec)) is not None:
            raise ValueError(line)
        return data_root() / published.path
    if Path(spec).suffix not in SUFFIXES:
        known = (*PACKAGED, *PUBLISHED, *DATASETS)
        hint = _nearest(spec, known) or f"; known by name: {', '.join(known)}"
        raise ValueError(f"prompts {spec}: must be a .jsonl or .txt file, or a name{hint}")
    return Path(spec)


def _published(spec: str) -> PublishedFile | None:
    return PUBLISHED.get(f"{spec}/test" if spec in DATASETS else spec)


def _nearest(word: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {close[0]}?" if close else ""
