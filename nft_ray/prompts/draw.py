"""Prompt sets and what an epoch asks for: pure functions of (file, seeds, epoch). Knows no model.

The unit is a LINE: its index is the group key, whatever the text says, so equal prompts on two lines are two groups.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nft_ray.config import ExperimentConfig
from nft_ray.prompts.sets import prompt_file
from nft_ray.rewards.base import check_lines
from nft_ray.seeding import evaluation_seed, image_seed, permutation
from nft_ray.types import Adapter, Prompt, RolloutItem, RolloutRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """The lines of one file, in its order."""

    lines: tuple[Prompt, ...]

    def __len__(self) -> int:
        return len(self.lines)


def load_prompts(spec: str) -> PromptSet:
    """A .jsonl file in GenEval's format (`prompt`, and the whole object as metadata), a .txt file, or a set's name.

    Raises ValueError with one line for a set that must be fetched first, a file that is missing or empty, a line that
    is no prompt.
    """
    path = prompt_file(spec)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"prompts {spec}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts {spec}: cannot be read as UTF-8 text: {error}") from None
    parse = _json_lines if path.suffix == ".jsonl" else _text_lines
    lines = tuple(
        Prompt(id=i, text=prompt, metadata=metadata) for i, (prompt, metadata) in enumerate(parse(spec, text))
    )
    if not lines:
        raise ValueError(f"prompts {spec}: the file is empty; write one prompt per line")
    return PromptSet(lines=lines)


def experiment_prompts(config: ExperimentConfig) -> tuple[PromptSet, PromptSet]:
    """(train, test); ValueError with one line where they are not there, too few, or not what a reward needs."""
    train, test = load_prompts(config.prompts.train), load_prompts(config.prompts.test)
    check_prompts(train, config)
    for prompts in (train, test):
        check_scorable(prompts, config)
    return train, test


def check_scorable(prompts: PromptSet, config: ExperimentConfig) -> None:
    """ValueError for the first line that a reward of the experiment cannot score, naming both."""
    for name, reward in config.reward_configs.items():
        check_lines(name, ((line.text, line.metadata) for line in prompts.lines), reward)


def check_prompts(train: PromptSet, config: ExperimentConfig) -> None:
    """ValueError where an epoch draws more groups than there are lines to draw from, without replacement."""
    wanted = config.prompts.groups_per_epoch
    if wanted > len(train):
        raise ValueError(
            f"prompts.groups_per_epoch = {wanted}: drawn without replacement from the {len(train)} lines of "
            f"{config.prompts.train}; use at most {len(train)}"
        )


def shared_tags(train: PromptSet, test: PromptSet) -> set[str]:
    """Tags with a test prompt that is also trained on: their figures are not held out."""
    trained = {prompt.text for prompt in train.lines}
    return {str(prompt.metadata["tag"]) for prompt in test.lines if prompt.text in trained and "tag" in prompt.metadata}


def epoch_requests(
    prompts: PromptSet, config: ExperimentConfig, *, epoch: int, policy_version: int
) -> tuple[RolloutRequest, ...]:
    """One request per group: the epoch's lines, drawn without replacement by (run seed, epoch), old policy."""
    seed, drawn = config.run.seed, permutation(len(prompts), "prompts", config.run.seed, epoch)
    requests = []
    for line in drawn[: config.prompts.groups_per_epoch].tolist():
        seeds = tuple(image_seed(seed, epoch, line, image) for image in range(config.prompts.images_per_group))
        items = (RolloutItem(group_id=line, prompt=prompts.lines[line], seeds=seeds),)
        requests.append(
            RolloutRequest(epoch=epoch, items=items, adapter="old", policy_version=policy_version, split="train")
        )
    return tuple(requests)


def evaluation_requests(
    prompts: PromptSet, config: ExperimentConfig, *, epoch: int, policy_version: int, adapter: Adapter
) -> tuple[RolloutRequest, ...]:
    """Every line once, one image each, in batches of `evaluation.batch_size`, the last one shorter, never padded."""
    size, seed = config.evaluation.batch_size, config.evaluation.seed
    items = [
        RolloutItem(group_id=prompt.id, prompt=prompt, seeds=(evaluation_seed(seed, prompt.id),))
        for prompt in prompts.lines
    ]
    return tuple(
        RolloutRequest(
            epoch=epoch,
            items=tuple(items[start : start + size]),
            adapter=adapter,
            policy_version=policy_version,
            split="eval",
        )
        for start in range(0, len(items), size)
    )


def _text_lines(spec: str, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for line in text.split("\n"):  # not splitlines: a prompt may hold U+2028
        if line.strip():
            yield line.strip(), {}


def _json_lines(spec: str, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"prompts {spec}, line {number}: is no JSON: {error.msg} at character {error.colno}"
            ) from None
        except (ValueError, RecursionError) as error:  # a number of 5000 digits, brackets without end
            raise ValueError(f"prompts {spec}, line {number}: is no JSON that can be read: {error}") from None
        if not isinstance(data, dict) or not isinstance(data.get("prompt"), str) or not data["prompt"].strip():
            raise ValueError(f'prompts {spec}, line {number}: needs an object with a text under "prompt"')
        yield data["prompt"], data
