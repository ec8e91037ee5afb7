"""OCR: does the text that the prompt puts in quotes stand in the image?

    image --engine--> recognised texts --text_similarity--> 1 - edit distance / length of the wanted text

The wanted text lies between the first pair of double quotes. A prompt without one cannot be scored: `check_line`
says so before anything starts. An image without any text scores 0: it was read and nothing was found, so nothing is
missing.

Source: the OCR reward of Flow-GRPO (Liu et al. 2025, arXiv 2505.05470), which DiffusionNFT uses. It reads with
PaddleOCR, English, without the orientation classifier, and crashes on a prompt without quotes. Here `rapidocr` is the
default: models of the same family (PP-OCR) on onnxruntime, in its wheel. Figures of two engines are not comparable.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from nft_ray.rewards.base import Cost, MemoryGib, Reward, RewardConfig, Scores, check_batch

MIN_CONFIDENCE = 0.5
"""Texts that are recognised with less are no texts; PaddleOCR 2's `drop_score`, which the published reward keeps."""
RAPIDOCR_MODELS = {"Det": "PP-OCRv6_det_small.onnx", "Rec": "PP-OCRv6_rec_small.onnx"}
"""The models of rapidocr 3.10's wheel, by name: another release's defaults would be another reward."""
MAX_SIDE_RATIO = 4
"""More elongated images are padded to this: rapidocr scales the SHORT side up to 736 px (1x600: 11 GB, 2 minutes)."""

_QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')


class Config(RewardConfig):
    """Section `rewards.ocr`."""

    engine: Literal["rapidocr", "paddleocr"] = "rapidocr"
    """What reads: `rapidocr`, which is installed, or `paddleocr` (release 3), in an environment of its own."""
    memory_gib: MemoryGib = 0.6


class Engine(Protocol):
    """Reads the texts in one image, uint8 (H, W, 3) RGB, in the order in which it finds them."""

    def read(self, image: np.ndarray) -> list[str]: ...


class Ocr:
    """The reward: `values` is `text_similarity`, in [0, 1]; the detail `exact` is 1 where that is 1."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        """See Reward.score. Raises ValueError where a prompt has no quoted text."""
        check_batch(images, prompts, metadata)
        for prompt in prompts:
            quoted_text(prompt)  # all of them before the slow part
        similarities = [
            text_similarity(prompt, self._engine.read(image)) for image, prompt in zip(images, prompts, strict=True)
        ]
        values = np.array(similarities, dtype=np.float32)
        return Scores(values=values, details={"exact": (values == 1).astype(np.float32)})


def cost(config: Config) -> Cost:
    """Of one image."""
    return Cost(host_s=0.247, source="rapidocr on one core: benchmarks/results/rewards.json, 988 ms for 4 of 512 px")


def build(config: Config) -> Reward:
    """Load the engine. Raises ValueError where it, or one of its models, is not installed."""
    num_threads = max(1, min(math.floor(config.num_cpus), os.cpu_count() or 1))
    if config.engine == "rapidocr":
        return Ocr(_RapidOcr(num_threads))
    return Ocr(_PaddleOcr(num_threads, on_gpu=config.num_gpus > 0))


def check_line(prompt: str, metadata: Mapping[str, Any], config: Config | None) -> None:
    """ValueError where the prompt has no quoted text; any metadata will do."""
    quoted_text(prompt)


def text_similarity(prompt: str, texts: Sequence[str]) -> float:
    """How much of the prompt's quoted text the recognised `texts`, joined in their order, hold: in [0, 1].

    Without spaces and case: 1 where the wanted text is contained, else 1 - edit distance / its length, at least 0.
    Raises ValueError where the prompt has no quoted text.
    """
    wanted, found = _plain(quoted_text(prompt)), _plain("".join(texts))
    distance = 0 if wanted in found else min(edit_distance(wanted, found), len(wanted))
    return 1 - distance / len(wanted)


def quoted_text(prompt: str) -> str:
    """What stands between the first pair of double quotes, "straight" or “curly”.

    Raises ValueError where there is no pair, or nothing but spaces in it.
    """
    match = _QUOTED.search(prompt)
    if match is None:
        raise ValueError('no text between double quotes; it says what the image shall read, as in: a sign "OPEN"')
    text = match[1] if match[1] is not None else match[2]
    if not _plain(text):
        raise ValueError("the first pair of double quotes is empty")
    return text


def edit_distance(a: str, b: str) -> int:
    """Levenshtein: the least number of characters to insert, delete or replace that makes b of a."""
    row = list(range(len(b) + 1))  # row[j]: distance of what has been read of a to b[:j]
    for i, left in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def _plain(text: str) -> str:
    return "".join(text.split()).casefold()


class _RapidOcr:
    """rapidocr 3 on onnxruntime, with the models that lie in its wheel."""

    def __init__(self, num_threads: int) -> None:
        _installed("rapidocr", "rapidocr==3.10.0 onnxruntime")
        import rapidocr
        from rapidocr.utils.output import RapidOCROutput

        folder = Path(rapidocr.__file__).parent / "models"
        options: dict[str, Any] = {
            "Global.log_level": "error",  # a warning per image without text otherwise
            "Global.text_score": MIN_CONFIDENCE,
            "Global.use_cls": False,
            "EngineConfig.onnxruntime.intra_op_num_threads": num_threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
        for step, name in RAPIDOCR_MODELS.items():
            if not (folder / name).is_file():  # rapidocr would download it
                raise ValueError(
                    f"rewards.ocr: {folder / name} is missing: install rapidocr==3.10.0, whose wheel holds it"
                )
            options[f"{step}.model_path"] = str(folder / name)
        self._output = RapidOCROutput
        self._engine = rapidocr.RapidOCR(params=options)
        # It loads a model when it needs one, and a blank image needs no recogniser: load both now, not at step 1.
        blank = np.zeros((48, 48, 3), np.uint8)
        self._engine(blank, use_det=False, use_rec=True)
        self._engine(blank, use_det=True, use_rec=True)

    def read(self, image: np.ndarray) -> list[str]:
        result = self._engine(_for_engine(image), use_det=True, use_rec=True)
        texts = result.txts if isinstance(result, self._output) else None  # another type where nothing is recognised
        return list(texts or ())  # None where no text is found


class _PaddleOcr:
    """PaddleOCR 3 (paddleocr.ai/latest/version3.x/pipeline_usage/OCR.html); it downloads its models by itself."""

    def __init__(self, num_threads: int, *, on_gpu: bool) -> None:
        _installed("paddleocr", "paddlepaddle paddleocr")
        from paddleocr import PaddleOCR

        self._engine = PaddleOCR(
            lang="en",
            use_doc_orientation_classify=False,
            use_doc_unwarping=False,
            use_textline_orientation=False,
            text_rec_score_thresh=MIN_CONFIDENCE,
            device="gpu" if on_gpu else "cpu",
            cpu_threads=num_threads,
        )

    def read(self, image: np.ndarray) -> list[str]:
        results = self._engine.predict(_for_engine(image))
        return [text for result in results for text in result["rec_texts"]]


def _for_engine(image: np.ndarray) -> np.ndarray:
    """RGB -> BGR, as both engines take arrays; where it is too elongated, its last row or column is repeated.

    Black instead makes rapidocr miss text that it reads otherwise.
    """
    height, width = image.shape[:2]
    below = max(0, -(-width // MAX_SIDE_RATIO) - height)
    right = max(0, -(-height // MAX_SIDE_RATIO) - width)
    return np.ascontiguousarray(np.pad(image[..., ::-1], ((0, below), (0, right), (0, 0)), mode="edge"))


def _installed(module: str, packages: str) -> None:
    if find_spec(module) is None:
        raise ValueError(
            f"rewards.ocr: engine {module} is not installed in this environment: `pip install {packages}`, or name the "
            "Python of one that holds it, and nft_ray, as py_executable"
        )
