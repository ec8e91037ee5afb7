"""What a prompt file may hold, and what an epoch asks for: functions of (file, seeds, epoch) and of nothing else."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from nft_ray.prompts.draw import PromptSet, check_prompts, epoch_requests, evaluation_requests, load_prompts
from nft_ray.seeding import evaluation_seed, image_seed
from nft_ray.types import Prompt
from tests.examples import example_config

LINES = PromptSet(lines=tuple(Prompt(id=i, text="the same text") for i in range(20)))


def written(folder: Path, name: str, text: str | bytes) -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


class TestFiles:
    @pytest.mark.parametrize(("name", "lines"), [("shapes/train", 2880), ("shapes/test", 480)])
    def test_the_packaged_sets_load(self, name: str, lines: int) -> None:
        prompts = load_prompts(name)
        assert len(prompts) == lines
        assert [prompt.id for prompt in prompts.lines] == list(range(lines))
        assert all(prompt.metadata["prompt"] == prompt.text for prompt in prompts.lines)
        tags = Counter(prompt.metadata["tag"] for prompt in prompts.lines)
        assert set(tags) == {"single_object", "two_object", "counting", "colors", "position", "color_attr"}
        assert min(tags.values()) >= 80

    def test_a_text_file_is_a_prompt_per_line(self, tmp_path: Path) -> None:
        prompts = load_prompts(written(tmp_path, "a.txt", "  a red circle\r\n\n \t\na cat\na red circle"))
        assert [prompt.text for prompt in prompts.lines] == ["a red circle", "a cat", "a red circle"]
        assert [prompt.id for prompt in prompts.lines] == [0, 1, 2]  # equal texts stay two groups
        assert all(prompt.metadata == {} for prompt in prompts.lines)

    def test_the_whole_json_object_is_the_metadata(self, tmp_path: Path) -> None:
        objects = [{"prompt": "one", "tag": "colors", "include": [{"class": "circle", "count": 1}]}, {"prompt": "two"}]
        path = written(tmp_path, "a.jsonl", "\n\n".join(map(json.dumps, objects)) + "\n")
        prompts = load_prompts(path).lines
        assert [(prompt.id, prompt.text, prompt.metadata) for prompt in prompts] == [
            (0, "one", objects[0]),
            (1, "two", objects[1]),
        ]

    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
    def test_only_a_newline_ends_a_line(self, tmp_path: Path, name: str) -> None:
        text = "a red\u2028circle\u0085"  # valid within JSON text, and line ends for str.splitlines
        line = text if name == "a.txt" else json.dumps({"prompt": text}, ensure_ascii=False)
        (prompt,) = load_prompts(written(tmp_path, name, line)).lines
        assert prompt.text == (text.strip() if name == "a.txt" else text)

    @pytest.mark.parametrize(("name", "text"), [("a.txt", "a cat"), ("a.jsonl", '{"prompt": "a cat"}')])
    def test_a_byte_order_mark_is_no_part_of_the_prompt(self, tmp_path: Path, name: str, text: str) -> None:
        (prompt,) = load_prompts(written(tmp_path, name, b"\xef\xbb\xbf" + text.encode())).lines
        assert prompt.text == "a cat"

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("a.txt", "", "the file is empty"),
            ("a.txt", " \n\n", "the file is empty"),
            ("a.jsonl", "\n", "the file is empty"),
            ("a.txt", b"\xff\xfe", "cannot be read as UTF-8"),
            ("a.jsonl", '{"prompt": "x"}\n\n{"prompt": \n', "line 3: is no JSON: Expecting value at character 1"),
            ("a.jsonl", '{"prompt": "x"}\n["x"]', 'line 2: needs an object with a text under "prompt"'),
            ("a.jsonl", '{"text": "x"}', 'line 1: needs an object with a text under "prompt"'),
            ("a.jsonl", '{"prompt": 3}', 'line 1: needs an object with a text under "prompt"'),
            ("a.jsonl", '{"prompt": "x"}\n{"prompt": " "}', 'line 2: needs an object with a text under "prompt"'),
            ("a.csv", "x", "must be a .jsonl or .txt file"),
        ],
    )
    def test_a_bad_file_is_named_with_its_line(
        self, tmp_path: Path, name: str, text: str | bytes, message: str
    ) -> None:
        path = written(tmp_path, name, text)
        with pytest.raises(ValueError, match=f"^prompts {re.escape(path)}[,:] .*{re.escape(message)}") as error:
            load_prompts(path)
        assert "\n" not in str(error.value)

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"^prompts .*none\.txt: no such file$"):
            load_prompts(str(tmp_path / "none.txt"))
        (tmp_path / "folder.txt").mkdir()
        with pytest.raises(ValueError, match=r"folder\.txt: cannot be read"):
            load_prompts(str(tmp_path / "folder.txt"))

    def test_a_misspelt_packaged_set_gets_the_nearest(self) -> None:
        with pytest.raises(ValueError, match=r"^prompts shapes/trian: .*did you mean shapes/train\?$"):
            load_prompts("shapes/trian")
        with pytest.raises(ValueError, match=r"known by name: shapes/train, .*small/ocr, .*ocr/train, .*drawbench$"):
            load_prompts("zzz")


class TestEpochs:
    config = example_config("prompts.groups_per_epoch=7", "prompts.images_per_group=3", "run.seed=5")

    def test_one_request_per_group_of_the_pinned_version(self) -> None:
        requests = epoch_requests(LINES, self.config, epoch=4, policy_version=3)
        assert len(requests) == 7
        for request in requests:
            (item,) = request.items
            assert (request.epoch, request.policy_version, request.adapter, request.split) == (4, 3, "old", "train")
            assert item.prompt is LINES.lines[item.group_id]
            assert item.seeds == tuple(image_seed(5, 4, item.group_id, image) for image in range(3))

    def test_lines_are_drawn_without_replacement(self) -> None:
        for epoch in range(5):
            assert len(set(self.drawn(epoch))) == 7
        everything = example_config("prompts.groups_per_epoch=20", "run.seed=5")
        drawn = [r.items[0].group_id for r in epoch_requests(LINES, everything, epoch=0, policy_version=0)]
        assert sorted(drawn) == list(range(20)) != drawn

    def test_an_epoch_is_a_function_of_seed_and_epoch(self) -> None:
        again = epoch_requests(LINES, self.config, epoch=2, policy_version=2)
        assert epoch_requests(LINES, self.config, epoch=2, policy_version=2) == again
        assert len({tuple(self.drawn(epoch)) for epoch in range(5)}) == 5
        other = example_config("prompts.groups_per_epoch=7", "prompts.images_per_group=3", "run.seed=6")
        assert [r.items[0].group_id for r in epoch_requests(LINES, other, epoch=2, policy_version=2)] != self.drawn(2)

    def test_staleness_changes_neither_prompts_nor_noise(self) -> None:
        fresh = epoch_requests(LINES, self.config, epoch=3, policy_version=3)
        stale = epoch_requests(LINES, self.config, epoch=3, policy_version=2)
        assert [request.items for request in fresh] == [request.items for request in stale]

    def test_every_line_has_its_turn(self) -> None:
        assert {line for epoch in range(30) for line in self.drawn(epoch)} == set(range(20))

    def test_more_groups_than_lines_is_an_error_that_says_both(self) -> None:
        check_prompts(LINES, example_config("prompts.groups_per_epoch=20"))
        message = (
            r"^prompts\.groups_per_epoch = 21: drawn without replacement from the 20 lines of shapes/train; .*most 20$"
        )
        with pytest.raises(ValueError, match=message):
            check_prompts(LINES, example_config("prompts.groups_per_epoch=21"))

    def drawn(self, epoch: int) -> list[int]:
        requests = epoch_requests(LINES, self.config, epoch=epoch, policy_version=epoch)
        return [request.items[0].group_id for request in requests]


class TestEvaluation:
    @pytest.mark.parametrize(("size", "sizes"), [(8, [8, 8, 4]), (20, [20]), (10, [10, 10]), (64, [20]), (1, [1] * 20)])
    def test_each_line_once_in_order_the_last_batch_shorter(self, size: int, sizes: list[int]) -> None:
        config = example_config(f"evaluation.batch_size={size}")
        requests = evaluation_requests(LINES, config, epoch=6, policy_version=6, adapter="ema")
        assert [request.num_images for request in requests] == sizes
        assert [item.prompt for request in requests for item in request.items] == list(LINES.lines)
        assert [item.group_id for request in requests for item in request.items] == list(range(20))
        assert {(r.epoch, r.policy_version, r.adapter, r.split) for r in requests} == {(6, 6, "ema", "eval")}

    def test_the_noise_of_a_line_is_the_same_in_every_run(self) -> None:
        expected = [evaluation_seed(0, line) for line in range(20)]
        assert self.seeds() == expected
        assert self.seeds("run.seed=9", "evaluation.batch_size=3", "prompts.groups_per_epoch=5") == expected
        assert self.seeds(epoch=8) == expected
        assert self.seeds("evaluation.seed=1") == [evaluation_seed(1, line) for line in range(20)] != expected

    def seeds(self, *overrides: str, epoch: int = 0) -> list[int]:
        config = example_config(*overrides)
        requests = evaluation_requests(LINES, config, epoch=epoch, policy_version=epoch, adapter="reference")
        return [seed for request in requests for item in request.items for seed in item.seeds]
