"""The rule against the published one, and the real engine on text that Pillow draws."""

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from nft_ray.rewards.base import Reward, check_lines, load_reward, reward_config
from nft_ray.rewards.ocr import RAPIDOCR_MODELS, Ocr, build, edit_distance, quoted_text, text_similarity

WORDS = ["HELLO", "Hello World", "SALE 50%", "Don't Panic", "ok", "OPEN 24\nHOURS"]


def sign(
    text: str, *, width: int = 512, height: int = 512, font_size: int = 60, at: tuple[int, int] = (40, 180)
) -> np.ndarray:
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).text(at, text, fill="black", font=ImageFont.load_default(size=font_size))
    return np.array(image)


@pytest.fixture(scope="module")
def reward() -> Reward:
    return load_reward("ocr", {})


def test_the_published_scores(goldens: Path) -> None:
    cases = json.loads((goldens / "ocr.json").read_text())
    assert len(cases) == 55
    ours = [text_similarity(case["prompt"], case["texts"]) for case in cases]
    assert ours == [case["score"] for case in cases]


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ('a sign "OPEN" and "SHUT"', "OPEN"),
        ("a sign “OPEN” and “SHUT”", "OPEN"),
        ('“he said "no"” on a wall', 'he said "no"'),
        ('"Don\'t" on a mug', "Don't"),
    ],
)
def test_the_first_pair_of_double_quotes_is_wanted(prompt: str, wanted: str) -> None:
    assert quoted_text(prompt) == wanted


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("a red circle", "no text between double quotes"),
        ("a 'single' quote", "no text between double quotes"),
        ('a 5" pipe', "no text between double quotes"),
        ('an empty "" sign', "the first pair of double quotes is empty"),
        ("a blank “ ” sign", "the first pair of double quotes is empty"),
    ],
)
def test_a_prompt_without_quoted_text_is_refused_at_load_and_at_score(reward: Reward, prompt: str, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"rewards\.ocr: prompt .*: {reason}"):
        check_lines("ocr", [('a sign "OPEN"', {}), (prompt, {})], None)
    with pytest.raises(ValueError, match=reason):
        reward.score(np.zeros((1, 8, 8, 3), np.uint8), [prompt], [{}])


def test_case_and_every_kind_of_space_do_not_matter() -> None:
    assert text_similarity('"Straße 7"', ["STRASSE\u3000", " 7\n"]) == 1
    assert text_similarity('"ab"', ["AxB"]) == 0.5


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("ab", "ba", 2), ("abc", "abc", 0)],
)
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_the_real_engine_reads_what_is_drawn_and_nothing_else(reward: Reward) -> None:
    images = np.stack([sign(text) for text in WORDS] + [sign("")])
    prompts = [f'a sign "{text}"' for text in WORDS] + ['a sign "HELLO"']
    scores = reward.score(images, prompts, [{}] * 7)
    assert scores.values.dtype == scores.details["exact"].dtype == np.float32
    assert scores.values.tolist() == [1] * 6 + [0]
    assert scores.details["exact"].tolist() == [1] * 6 + [0]

    others = prompts[1:6] + prompts[:1]  # what is drawn is not what is wanted
    wrong = reward.score(images[:6], others, [{}] * 6)
    assert (wrong.values < 0.6).all()
    assert wrong.details["exact"].tolist() == [0] * 6


def test_a_misspelt_word_earns_a_part(reward: Reward) -> None:
    values = reward.score(sign("HELO WORLD")[None], ['"HELLO WORLD"'], [{}]).values
    assert values.tolist() == pytest.approx([0.9])


def test_an_array_reaches_rapidocr_as_it_takes_them_blue_first(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build(reward_config("ocr", {}))._engine  # type: ignore[arg-type,attr-defined]
    seen: list[np.ndarray] = []
    monkeypatch.setattr(engine._engine, "load_img", lambda image: seen.append(image) or image)
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 255
    assert engine.read(red) == []
    assert seen[0][0, 0].tolist() == [0, 0, 255]


def test_an_elongated_image_is_read_in_little_time(reward: Reward) -> None:
    """Unpadded, 600x1 pixels take the engine 11 GB and two minutes."""
    banner = sign("Wide open", width=1200, height=80, font_size=56, at=(500, 5))
    column = sign("UP", width=80, height=900, font_size=40, at=(8, 400))
    assert reward.score(banner[None], ['"Wide open"'], [{}]).values.tolist() == [1]
    assert reward.score(column[None], ['"UP"'], [{}]).values.tolist() == [1]
    assert reward.score(np.full((1, 600, 1, 3), 255, np.uint8), ['"UP"'], [{}]).values.tolist() == [0]


def test_the_engine_gets_as_many_threads_as_the_replica_has_cpus_and_says_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    heard = logging.getLogger("RapidOCR")  # it does not propagate
    monkeypatch.setattr(heard, "handlers", [caplog.handler])
    for num_cpus, num_threads in ((0.25, 1), (64, 2)):
        ocr = build(reward_config("ocr", {"num_cpus": num_cpus}))  # type: ignore[arg-type]
        engine = ocr._engine._engine  # type: ignore[attr-defined]
        for step in (engine.text_det, engine.text_rec):
            session = step.session.session
            assert session.get_session_options().intra_op_num_threads == num_threads
            assert session.get_session_options().inter_op_num_threads == 1
    ocr.score(sign("")[None], ['"HELLO"'], [{}])
    assert not caplog.records


def test_a_model_that_is_not_in_the_wheel_is_an_error_not_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RAPIDOCR_MODELS, "Rec", "PP-OCRv9_rec.onnx")
    with pytest.raises(ValueError, match=r"models/PP-OCRv9_rec\.onnx is missing: install rapidocr==3\.10\.0"):
        load_reward("ocr", {})


def test_paddleocr_that_is_not_installed_is_one_line() -> None:
    with pytest.raises(ValueError, match="engine paddleocr is not installed in this environment") as caught:
        load_reward("ocr", {"engine": "paddleocr"})
    assert "\n" not in str(caught.value)


PADDLEOCR = '''
"""A stand-in with the documented interface of PaddleOCR 3; it "reads" the first pixel, which must be blue-green-red."""
class PaddleOCR:
    def __init__(self, *, lang=None, use_doc_orientation_classify=None, use_doc_unwarping=None,
                 use_textline_orientation=None, text_rec_score_thresh=None, device=None, cpu_threads=None):
        PaddleOCR.options = dict(locals())
    def predict(self, input):
        assert input.flags["C_CONTIGUOUS"] and input.dtype.name == "uint8"
        texts = ["Hello", "World"] if input[0, 0].tolist() == [0, 0, 255] else []
        return [{"rec_texts": texts, "rec_scores": [0.9] * len(texts)}]
'''


def test_paddleocr_by_a_stand_in_of_the_documented_shape(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "paddleocr.py").write_text(PADDLEOCR)
    monkeypatch.syspath_prepend(tmp_path)
    reward = build(reward_config("ocr", {"engine": "paddleocr", "num_gpus": 0.5}))  # type: ignore[arg-type]
    assert isinstance(reward, Ocr)
    images = np.zeros((2, 8, 8, 3), np.uint8)
    images[1, ..., 0] = 255
    assert reward.score(images, ['"Hello World"'] * 2, [{}] * 2).values.tolist() == [0, 1]
    options = sys.modules["paddleocr"].PaddleOCR.options
    assert (options["lang"], options["device"], options["cpu_threads"]) == ("en", "gpu", 1)
    assert options["use_textline_orientation"] is False
    assert options["text_rec_score_thresh"] == 0.5
    monkeypatch.delitem(sys.modules, "paddleocr")
