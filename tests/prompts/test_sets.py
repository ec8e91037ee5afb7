"""Sets by name: ours load and fit their task offline, published ones say how to get them."""

import re
from collections import Counter
from pathlib import Path

import pytest

from nft_ray.prompts.draw import load_prompts
from nft_ray.prompts.geneval import lines
from nft_ray.prompts.sets import DATASETS, PACKAGED, PUBLISHED, data_root, dataset_files, missing, prompt_file
from nft_ray.rewards.base import check_lines, reward_config


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NFT_RAY_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


class TestSmall:
    @pytest.mark.parametrize("dataset", DATASETS)
    def test_each_data_set_has_one_of_ours_that_is_enough_for_an_epoch(self, dataset: str) -> None:
        prompts = load_prompts(f"small/{dataset}")
        assert len(prompts) >= 48
        assert len({prompt.text for prompt in prompts.lines}) == len(prompts)

    def test_its_task_can_score_every_line(self) -> None:
        for name, section in {"geneval": {"detector": "mask2former"}, "ocr": {}}.items():
            lines = ((line.text, line.metadata) for line in load_prompts(f"small/{name}").lines)
            check_lines(name, lines, reward_config(name, section))

    def test_geneval_is_what_the_rules_make(self) -> None:
        prompts = load_prompts("small/geneval").lines
        assert [prompt.metadata for prompt in prompts] == lines(0, 16)
        assert len(Counter(prompt.metadata["tag"] for prompt in prompts)) == 6


class TestPublished:
    @pytest.mark.parametrize("name", [*PUBLISHED, *DATASETS])
    def test_a_set_that_is_not_there_says_which_command_brings_it(self, name: str, root: Path) -> None:
        with pytest.raises(ValueError) as error:
            load_prompts(name)
        message = str(error.value)
        assert "\n" not in message
        assert message.startswith(f"prompts {name}: {root}/")
        assert f"run `nft-ray data fetch {name.partition('/')[0]}`, or put https://raw" in message
        assert missing(name) == message

    def test_once_there_it_loads_and_the_bare_name_means_the_test_lines(self, root: Path) -> None:
        for file, text in (("ocr/train.txt", 'a "A"\n'), ("ocr/test.txt", 'a "B"\na "C"')):
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_text(text)
        assert [line.text for line in load_prompts("ocr/train").lines] == ['a "A"']
        assert load_prompts("ocr") == load_prompts("ocr/test")
        assert len(load_prompts("ocr")) == 2
        assert missing("ocr/test") is None

    def test_every_file_is_pinned_to_a_commit_and_a_checksum(self) -> None:
        for name, file in PUBLISHED.items():
            assert file.url is not None
            assert re.fullmatch(r"https://raw\.githubusercontent\.com/[\w-]+/\w+/[0-9a-f]{40}/dataset/\S+", file.url)
            assert file.url.endswith(file.path)
            assert re.fullmatch("[0-9a-f]{64}", file.sha256 or "") or re.fullmatch("[0-9a-f]{40}", file.git_sha1 or "")
            assert file.path.startswith(name.partition("/")[0])

    def test_files_of_data_sets(self) -> None:
        assert dataset_files(["ocr"]) == [PUBLISHED["ocr/train"], PUBLISHED["ocr/test"]]
        assert dataset_files([]) == list(PUBLISHED.values())
        with pytest.raises(ValueError, match=r"^data set 'genevall': unknown; did you mean geneval\?; known: geneval,"):
            dataset_files(["genevall"])

    def test_a_file_of_the_user_is_his_to_look_after(self, tmp_path: Path) -> None:
        assert missing(str(tmp_path / "none.txt")) is None
        assert missing("small/ocr") is None
        assert prompt_file(str(tmp_path / "none.txt")) == tmp_path / "none.txt"


def test_the_data_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NFT_RAY_DATA", raising=False)
    assert data_root() == Path("~/.cache/nft_ray/data").expanduser().resolve()
    monkeypatch.setenv("NFT_RAY_DATA", str(tmp_path))
    assert data_root() == tmp_path
    assert data_root(str(tmp_path / "other")) == tmp_path / "other"


def test_packaged_files_are_there() -> None:
    assert all(path.is_file() for path in PACKAGED.values())
