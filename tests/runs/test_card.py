"""The card of an exported policy says where it comes from, and its code loads it."""

from typing import Any

import yaml
from diffusers import FluxPipeline

from nft_ray.config import differences, dump, mark_of, parse, resolved
from nft_ray.runs.card import loading_code, model_card, shareable
from nft_ray.types import Mark
from tests.examples import example_config


def card(*overrides: str, hub_id: str | None = None, algorithm: dict[str, Any] | None = None) -> str:
    figures = "metric  base  trained"
    versions = {"nft_ray": "0.1.0", "commit": "a" * 40}
    config = example_config(*overrides, algorithm=algorithm)
    return model_card(config, epoch=7, figures=figures, versions=versions, hub_id=hub_id)


def test_the_card_has_the_hubs_header_and_says_what_was_done() -> None:
    text = card("model.path=stabilityai/stable-diffusion-3.5-medium", "model.revision=abc")
    header = yaml.safe_load(text.split("---")[1])
    assert header["base_model"] == "stabilityai/stable-diffusion-3.5-medium"
    assert {header["library_name"], header["pipeline_tag"]} == {"diffusers", "text-to-image"}
    for part in (
        "a" * 40,
        "stable-diffusion-3.5-medium @ abc",
        "rank 4, alpha 8",
        "84 images: 7 epochs x 3 prompts x 4 images",
        "prompts `shapes/train`",
        "| geneval | 1 |",
        "metric  base  trained",
        "4 steps of euler, guidance 1, seed 0",
        "(reward_curve.png)",
        "groups_per_epoch: 3",
    ):
        assert part in text


def test_of_a_run_in_stages_the_card_tells_each_that_trained_it() -> None:
    second = "{name: b, num_epochs: 9, rewards: {jpeg_compressibility: }, evaluation: {num_steps: 3}, "
    prompts = "prompts: {train: small/geneval, test: small/ocr, groups_per_epoch: 2}}"
    text = card(
        "run.num_epochs=14", f"stages=[{{name: a, num_epochs: 4}}, {second}{prompts}, {{name: c, num_epochs: 1}}]"
    )
    for part in (
        "prompts `shapes/train` (4 epochs), then `small/geneval` (3 epochs); no images",
        "72 images: 4 epochs x 3 prompts x 4 images + 3 epochs x 2 prompts x 4 images",
        "| held out | prompts `small/ocr` |",
        "| 1 to 4 | geneval | 1 |",
        "| 5 to 7 | jpeg_compressibility | 1 |",
        "Every held-out prompt once, 3 steps",
    ):
        assert part in text
    assert "8 to" not in text


def test_what_concerns_the_machines_is_not_shared_and_the_rest_loads() -> None:
    """By the marks: no folder, address or key of here; in stages and in what a reward cannot do without, too."""
    here = "/home/me/here"
    server = {"model_path": "a/model", "python": f"{here}/bin/python", "api_key_file": f"{here}/key"}
    places = {"weights": here, "py_executable": here, "num_gpus": 0.5, "runtime_env": {"pip": [here]}}
    stage = {"name": "one", "num_epochs": 8, "sampler": {"micro_batch_size": 7}, "scorers": {"timeout_s": 654}}
    config = parse(
        {
            "run": {"name": "mine", "root": here},
            "cluster": {"num_cpus": 77, "placement": "colocated"},
            "model": {"precomputed": here, "dtype": "bfloat16"},
            "prompts": {"train": "mine/train.txt"},
            "algorithm": {"old_policy_decay": {"flat_steps": 1, "rate": 0.1, "max": 0.5}},
            "rewards": {
                "pickscore": {"weight": 0.5, **places},
                "unified_reward": {"urls": ["http://10.9.8.7:1/v1"], "api_key_file": f"{here}/key", "model": "judge"},
            },
            "scorers": {"http": {"port": 9999, "token": here}},
            "tracking": {"uri": f"sqlite:///{here}"},
            "stages": [
                stage,
                {"name": "two", "num_epochs": 1, "rewards": {"pickscore": {"weights": here, "weight": 2}}},
                {"name": "three", "num_epochs": 2, "rewards": {"unified_reward": {"server": server, "urls": []}}},
            ],
        }
    )
    text = dump(shared := shareable(config))
    assert not [word for word in (here, "10.9.8.7", "77", "9999", "654", "colocated") if word in text]
    again = parse(yaml.safe_load(text))
    assert dump(again) == text == dump(shareable(shared))
    assert (again.run.name, again.run.num_epochs, again.model.dtype) == ("mine", 11, "bfloat16")
    before, after = resolved(config), resolved(again)
    assert {mark_of(config, key) for key in differences(before, after)} == {Mark.PLACEMENT}
    assert again.stage_configs[1].trained_weights == {"pickscore": 2}


def test_the_card_names_the_algorithm_that_trained_it_each_once() -> None:
    def said(text: str) -> tuple[list[str], str]:
        tags = yaml.safe_load(text.split("---")[1])["tags"]
        return tags[tags.index("reinforcement-learning") + 1 :], text[text.index("Trained online") :].split(" by ")[0]

    nft = "[DiffusionNFT](https://arxiv.org/abs/2509.16117)"
    awm = "[Advantage-weighted matching](https://arxiv.org/abs/2509.25050)"
    assert said(card()) == (["diffusion-nft"], f"Trained online with {nft}")
    assert said(card(algorithm={"name": "awm"})) == (["awm"], f"Trained online with {awm}")
    stages = (
        "stages=[{name: a, num_epochs: 3}, {name: b, num_epochs: 3, algorithm: {name: awm}}, {name: c, num_epochs: 8}]"
    )
    assert said(card("run.num_epochs=14", stages)) == (["diffusion-nft", "awm"], f"Trained online with {nft} and {awm}")


def test_a_folder_is_no_base_model_of_the_hub() -> None:
    assert "base_model" not in yaml.safe_load(card().split("---")[1])


def test_the_code_loads_what_was_trained() -> None:
    sd3 = loading_code(example_config("model.path=a/b", "evaluation.guidance=4.5"), "me/lora")
    assert "StableDiffusion3Pipeline.from_pretrained('a/b'" in sd3
    assert "text_encoder_3=None" in sd3
    assert 'load_lora_weights("me/lora")' in sd3
    assert "guidance_scale=4.5, max_sequence_length=0" in sd3
    with_t5 = loading_code(example_config("model.path=a/b", "model.max_sequence_length=128"), "me/lora")
    assert "text_encoder_3" not in with_t5
    assert "max_sequence_length=128" in with_t5
    flux = loading_code(
        example_config("model.family=flux", "model.path=a/b", "model.max_sequence_length=256"), "me/lora"
    )
    assert f"{FluxPipeline.__name__}.from_pretrained('a/b', torch_dtype=torch.float32)" in flux
    assert "guidance_scale=3.5" in flux
    assert "true_cfg_scale" not in flux
