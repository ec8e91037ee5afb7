"""`nft-ray evaluate` in this process: what counts, what is refused, what is asked for again."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from PIL import Image

import nft_ray.local
from nft_ray.cli.evaluate import experiment_of
from nft_ray.cli.main import main, parser
from nft_ray.config import LoraConfig, ModelConfig
from nft_ray.cores.publish import announced
from nft_ray.cores.sampler import SamplerCore
from nft_ray.models.base import load_model
from nft_ray.models.lora import export_lora, peft_config, random_weights, read_lora
from nft_ray.models.sd3 import LORA_TARGETS
from nft_ray.rewards.base import Scores
from nft_ray.seeding import evaluation_seed
from nft_ray.types import AdapterWeights, Prompt, RolloutItem, RolloutRequest
from tests.examples import QUICKSTART, SMALL, example_config
from tests.models.tiny import numpy_weights

SETTINGS = [part for setting in SMALL for part in ("--set", setting)]
TEXTS = ["a photo of a circle", "a photo of two crosses", "a photo of a red square", "a photo of a blue star", "x"]


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(TEXTS))
    return str(file)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LoRA of rank 6 as peft writes it, in the published layout: checkpoint-40/lora."""
    folder = tmp_path_factory.mktemp("published") / "checkpoint-40"
    transformer = load_model(ModelConfig(), torch.device("cpu"), transformer_only=True).transformer
    model = peft.get_peft_model(transformer, peft_config(LoraConfig(rank=6, alpha=9), LORA_TARGETS))
    parameters = {name: value for name, value in model.named_parameters() if ".lora_" in name}
    weights = random_weights(numpy_weights(parameters), seed=3)
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(torch.from_numpy(0.5 * weights[name]))
    model.save_pretrained(str(folder / "lora"))
    return folder


def run(prompts: str, output: Path, *arguments: str) -> int:
    rewards = ("--rewards", "jpeg_compressibility", "--set", "evaluation.batch_size=2")
    command = ["evaluate", str(QUICKSTART), "--local", "--dataset", prompts, "--output", str(output), *SETTINGS]
    return main([*command, *rewards, *arguments])


def refused(capsys: pytest.CaptureFixture[str], status: int) -> str:
    assert status == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1, errors
    return errors[0]


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


def settings(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / "evaluation.json").read_text())["identity"])


def test_the_base_model_on_a_file(prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(prompts, tmp_path / "out", "--save-images") == 0
    found = lines(tmp_path / "out")
    assert [line["prompt"] for line in found] == TEXTS
    assert [line["seed"] for line in found] == [evaluation_seed(0, line) for line in range(5)]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    scores = [line["scores"]["jpeg_compressibility"] for line in found]
    assert summary.keys() == {"jpeg_compressibility"}
    assert summary["jpeg_compressibility"]["mean"] == float(np.mean(scores))
    assert summary["jpeg_compressibility"]["low"] < np.mean(scores) < summary["jpeg_compressibility"]["high"]
    assert "jpeg_compressibility" in capsys.readouterr().out
    images = sorted((tmp_path / "out" / "images").iterdir())
    assert [path.name for path in images] == [f"00000{line}.png" for line in range(5)]
    items = tuple(
        RolloutItem(group_id=i, prompt=Prompt(id=i, text=text), seeds=(evaluation_seed(0, i),))
        for i, text in enumerate(TEXTS[:2])
    )
    request = RolloutRequest(epoch=0, items=items, adapter="reference", policy_version=0, split="eval")
    wanted = SamplerCore(example_config()).rollout(request)[1]
    np.testing.assert_array_equal(np.stack([np.asarray(Image.open(path)) for path in images[:2]]), wanted)
    assert min(Image.open(tmp_path / "out" / "contact_sheet.png").size) > 150


def test_a_lora_of_the_published_layout_with_its_own_rank(prompts: str, tmp_path: Path, published: Path) -> None:
    """CONFIG says rank 4 and alpha 8; the file says 6 and 9."""
    assert run(prompts, tmp_path / "out", "--lora", str(published), "--save-images") == 0
    assert settings(tmp_path / "out")["lora"] | {"checksum": ""} == {"checksum": "", "rank": 6, "alpha": 9}
    weights, lora = read_lora(published)
    config = example_config("model.lora.rank=6", "model.lora.alpha=9")
    core = SamplerCore(config.model_copy(update={"model": config.model.model_copy(update={"lora": lora})}))
    core.load(announced(weights), AdapterWeights(old=weights, ema=weights))
    items = tuple(
        RolloutItem(group_id=i, prompt=Prompt(id=i, text=TEXTS[i]), seeds=(evaluation_seed(0, i),)) for i in (2, 3)
    )
    request = RolloutRequest(epoch=0, items=items, adapter="ema", policy_version=0, split="eval")
    images = [np.asarray(Image.open(tmp_path / "out" / "images" / f"00000{line}.png")) for line in (2, 3)]
    np.testing.assert_array_equal(np.stack(images), core.rollout(request)[1])


def test_the_options_are_the_settings(prompts: str, tmp_path: Path) -> None:
    options = ["--guidance", "2.5", "--steps", "3", "--solver", "dpm2", "--resolution", "16", "--precision", "bf16"]
    assert run(prompts, tmp_path / "out", *options, "--seed", "5") == 0
    found = settings(tmp_path / "out")
    asked = {"guidance": 2.5, "num_steps": 3, "solver": "dpm2", "seed": 5}
    assert found["evaluation"] | asked == found["evaluation"]
    assert (found["model"]["dtype"], found["model"]["height"], found["model"]["width"]) == ("bfloat16", 16, 16)
    assert Image.open(tmp_path / "out" / "images" / "000000.png").size == (16, 16)
    assert lines(tmp_path / "out")[1]["seed"] == evaluation_seed(5, 1)


def test_two_evaluations_are_not_mixed(prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(prompts, tmp_path / "out") == 0
    before = lines(tmp_path / "out")
    capsys.readouterr()
    line = refused(capsys, run(prompts, tmp_path / "out", "--seed", "1"))
    assert "evaluation.seed = 0 there" in line
    assert "--overwrite" in line
    assert lines(tmp_path / "out") == before
    assert run(prompts, tmp_path / "out", "--seed", "1", "--overwrite") == 0
    assert lines(tmp_path / "out") != before


def test_a_finished_evaluation_draws_nothing_again(
    prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(prompts, tmp_path / "out") == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    monkeypatch.setattr(nft_ray.local, "SamplerCore", None)
    assert run(prompts, tmp_path / "out") == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()} == before


class Flaky:
    """A reward that cannot score images of one prompt, as long as `away` says so."""

    away = True

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Scores:
        values = [
            np.nan if self.away and prompt == "x" else float(image.mean())
            for image, prompt in zip(images, prompts, strict=True)
        ]
        return Scores(values=np.array(values, np.float32))


def test_a_missing_reward_is_null_and_asked_for_again(
    prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nft_ray.local, "load_reward", lambda name, section: Flaky())
    some = ("--set", "scorers.max_missing_fraction=0.5")
    line = refused(capsys, run(prompts, tmp_path / "out"))
    assert "1 of 5 lines miss a reward" in line
    assert run(prompts, tmp_path / "out", *some) == 0
    assert "1 of 5 lines miss a reward" in capsys.readouterr().out
    assert [line["scores"]["jpeg_compressibility"] is None for line in lines(tmp_path / "out")] == [False] * 4 + [True]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["jpeg_compressibility"]["count"], summary["jpeg_compressibility"]["missing"]) == (4, 1)
    monkeypatch.setattr(Flaky, "away", False)
    assert run(prompts, tmp_path / "out") == 0
    assert None not in [line["scores"]["jpeg_compressibility"] for line in lines(tmp_path / "out")]
    assert run(prompts, tmp_path / "whole") == 0
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == (tmp_path / "whole" / "results.jsonl").read_bytes()


def test_comparing(prompts: str, tmp_path: Path, published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    assert run(prompts, a) == 0
    assert run(prompts, b, "--lora", str(published)) == 0
    capsys.readouterr()
    assert main(["evaluate", "--compare", str(a), str(b)]) == 0
    shown = capsys.readouterr().out
    assert "they differ in: lora" in shown
    found = json.loads((b / "compare.json").read_text())["metrics"]["jpeg_compressibility"]
    change = [
        y["scores"]["jpeg_compressibility"] - x["scores"]["jpeg_compressibility"]
        for x, y in zip(lines(a), lines(b), strict=True)
    ]
    assert found["difference"] == float(np.mean(change))
    assert (found["better"], found["worse"]) == (sum(c > 0 for c in change), sum(c < 0 for c in change))
    assert run(prompts, tmp_path / "c", "--seed", "9") == 0
    line = refused(capsys, main(["evaluate", "--compare", str(a), str(tmp_path / "c")]))
    assert "line 0: seed is" in line


def test_what_is_not_finished_is_not_compared(prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(prompts, tmp_path / "a") == 0
    file = tmp_path / "a" / "results.jsonl"
    found = file.read_text().splitlines(keepends=True)
    file.write_text("".join(found[::-1]))  # killed at its very end: whole, in the order of arrival
    assert main(["evaluate", "--compare", str(tmp_path / "a"), str(tmp_path / "a")]) == 0
    file.write_text(found[4] + found[0] + found[1][:20])
    capsys.readouterr()
    line = refused(capsys, main(["evaluate", "--compare", str(tmp_path / "a"), str(tmp_path / "a")]))
    assert "has 2 of 5 lines: run its command again" in line


def rewards(*arguments: str, config: Path = QUICKSTART) -> dict[str, Any]:
    args = parser().parse_args(["evaluate", str(config), "--output", "x", *arguments])
    return dict(experiment_of(args).rewards)


def test_a_data_set_has_its_rewards_and_the_experiment_their_sections() -> None:
    urls = (*UNIFIED, "--set", "rewards.hpsv2.num_gpus=0.25")
    six = {"pickscore", "clipscore", "hpsv2", "aesthetic", "imagereward", "unified_reward"}
    for dataset in ("drawbench", "small/drawbench", "pickscore/test"):
        found = rewards("--dataset", dataset, *urls)
        assert found.keys() == six
        assert found["hpsv2"]["num_gpus"] == 0.25
    assert rewards("--dataset", "geneval")["geneval"]["detector"] == "shapes", "as the experiment says"
    elsewhere = QUICKSTART.with_name("rewards.yaml")
    assert rewards("--dataset", "small/geneval", config=elsewhere)["geneval"]["detector"] == "mask2former"
    assert rewards("--dataset", "ocr").keys() == {"ocr"}
    assert rewards("--dataset", "ocr", "--rewards", "ocr, aesthetic").keys() == {"ocr", "aesthetic"}
    only_measured = ("--set", "rewards.jpeg_compressibility.eval_only=true")
    assert rewards(*only_measured).keys() == {"geneval", "jpeg_compressibility"}
    assert rewards("--dataset", "my/ocr/lines.txt").keys() == {"geneval"}


UNIFIED = ("--set", "rewards.unified_reward.urls=[http://127.0.0.1:1/v1]")


def places(preset: str, *arguments: str) -> dict[str, tuple[int, float]]:
    """Reward -> (replicas, GPUs each)."""
    found = rewards(*arguments, config=QUICKSTART.with_name(preset))
    return {name: (section.get("num_replicas", 1), section.get("num_gpus", 0)) for name, section in found.items()}


@pytest.mark.parametrize("profile", ["one_gpu", "eight_gpus", "thirty_two_gpus"])
def test_rewards_that_the_yaml_does_not_name_share_the_cards_of_those_it_names(profile: str) -> None:
    """Not one CPU core each: UnifiedReward is a server elsewhere, the other five have models."""
    cards = {"one_gpu": 0.2, "eight_gpus": 1.0, "thirty_two_gpus": 8.0}[profile]
    options = ("--set", f"cluster={profile}", "--dataset", "small/drawbench", *UNIFIED)
    found = places("sd3_geneval.yaml", *options)
    assert found.pop("unified_reward") == (1, 0)
    assert set(found.values()) == {(1, min(1.0, cards / 5))}
    assert places("sd3_multi_reward.yaml", "--set", f"cluster={profile}", "--dataset", "geneval") == {
        "geneval": (int(max(1, cards)), pytest.approx(min(1.0, cards), abs=1e-4))
    }
    wide = places("sd3_multi_reward.yaml", *options)
    assert sum(replicas * gpus for replicas, gpus in wide.values()) <= cards + 1e-9, "those that it names as well"


def test_where_every_reward_has_a_place_it_stays() -> None:
    assert places("sd3_multi_reward.yaml") == {"pickscore": (1, 0.34), "hpsv2": (1, 0.33), "clipscore": (1, 0.33)}
    measured = ("--rewards", "pickscore,jpeg_compressibility")
    assert places("sd3_multi_reward.yaml", *measured) == {"pickscore": (1, 0.34), "jpeg_compressibility": (1, 0)}
    by_hand = ("--rewards", "pickscore,aesthetic", "--set", "rewards.aesthetic.num_gpus=0.5")
    assert places("sd3_multi_reward.yaml", *by_hand) == {"pickscore": (1, 0.34), "aesthetic": (1, 0.5)}
    on_cpu = ("--rewards", "aesthetic", "--set", "rewards.aesthetic.device=cpu")
    assert places("sd3_multi_reward.yaml", *on_cpu) == {"aesthetic": (1, 0)}
    other = ("--rewards", "aesthetic", "--set", "rewards.aesthetic.dtype=bfloat16")
    assert places("sd3_multi_reward.yaml", *other) == {"aesthetic": (1, 1.0)}, "that says nothing of a place"


def test_a_setting_that_says_nothing_of_a_place_takes_none_away() -> None:
    asked = ("--rewards", "geneval,pickscore")
    strict = ("--set", "rewards.geneval.credit=strict")
    assert places("sd3_geneval.yaml", *asked, *strict) == places("sd3_geneval.yaml", *asked) != {}
    whole = ("--set", "rewards.pickscore={num_gpus: 0.25}")
    assert places("sd3_geneval.yaml", *asked, *whole) == {"geneval": (1, 1.0), "pickscore": (1, 0.25)}
    twice = ("--set", "rewards.geneval.num_gpus=0.4", "--set", "rewards.geneval.num_replicas=2")
    assert places("sd3_geneval.yaml", *asked, *twice, *whole) == {"geneval": (2, 0.4), "pickscore": (1, 0.25)}
    with pytest.raises(ValueError, match=r"say it: --set rewards.pickscore.num_gpus=0.2"):
        places("sd3_geneval.yaml", *asked, *twice)


def test_without_gpus_everything_runs_on_cpus() -> None:
    assert places("quickstart.yaml", "--rewards", "pickscore,geneval") == {"pickscore": (1, 0), "geneval": (1, 0)}


def test_where_no_reward_has_a_card_to_share_it_is_refused_with_what_to_write() -> None:
    with pytest.raises(ValueError, match=r"--set rewards.pickscore.num_gpus=0.2 --set rewards.aesthetic.num_gpus=0.2"):
        places("sd3_ocr.yaml", "--rewards", "ocr,pickscore,aesthetic")
    said = [f"--set rewards.{name}.num_gpus=0.2".split() for name in ("pickscore", "aesthetic")]
    found = places("sd3_ocr.yaml", "--rewards", "ocr,pickscore,aesthetic", *said[0], *said[1])
    assert found == {"ocr": (found["ocr"][0], 0), "pickscore": (1, 0.2), "aesthetic": (1, 0.2)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "small/drawbench", "--rewards", ""], "rewards.unified_reward"),
        (["--rewards", "jpeg_compresibility"], "did you mean 'jpeg_compressibility'"),
        (["--rewards", "geneval"], "not GenEval metadata"),
        (["--dataset", "small/geneval", "--rewards", "geneval"], "detector shapes never finds it"),
        (["--dataset", "/nowhere.txt"], "/nowhere.txt: no such file"),
        (["--dataset", "shapes/tset"], "did you mean shapes/test"),
        (["--lora", "/nowhere"], "/nowhere: no such file or folder"),
        (["--guidance", "0.5"], "evaluation.guidance = 0.5"),
        (["--solver", "eular"], "evaluation.solver = 'eular'"),
        (["--set", "evaluation.sed=1"], "did you mean seed?"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    arguments: list[str], message: str, prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, run(prompts, tmp_path / "out", *arguments))
    assert not (tmp_path / "out").exists()


def test_a_lora_that_changes_nothing_is_refused(
    prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformer = load_model(ModelConfig(), torch.device("cpu"), transformer_only=True).transformer
    peft.get_peft_model(transformer, peft_config(LoraConfig(), LORA_TARGETS)).save_pretrained(str(tmp_path / "fresh"))
    line = refused(capsys, run(prompts, tmp_path / "out", "--lora", str(tmp_path / "fresh")))
    assert "every lora_B is 0" in line


def test_a_lora_of_another_model_is_refused(
    prompts: str, tmp_path: Path, published: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, lora = read_lora(published)
    config = ModelConfig(lora=lora)
    for name, change, message in (
        (
            "deeper",
            {"transformer_blocks.99.attn.to_q": (64, 64)},
            "has no linear layer transformer_blocks.99.attn.to_q",
        ),
        ("wider", {"transformer_blocks.0.attn.to_q": (64, 999)}, "has 999 outputs there and"),
    ):
        other = dict(weights)
        for layer, (_, width) in change.items():
            inputs = weights["transformer_blocks.0.attn.to_q.lora_A.weight"].shape[1]
            other[f"{layer}.lora_A.weight"] = np.ones((6, inputs), np.float32)
            other[f"{layer}.lora_B.weight"] = np.ones((width, 6), np.float32)
        export_lora(other, config, tmp_path / name)
        assert message in refused(capsys, run(prompts, tmp_path / "out", "--lora", str(tmp_path / name)))
    assert not (tmp_path / "out").exists()


def test_what_must_be_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert "needs CONFIG and --output DIR" in refused(capsys, main(["evaluate", str(QUICKSTART)]))


def test_a_run_without_a_checkpoint(prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("run: {name: x}")
    assert "no checkpoint is there yet" in refused(
        capsys, run(prompts, tmp_path / "o", "--lora", str(tmp_path / "run"))
    )
