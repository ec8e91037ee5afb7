"""Every YAML is an experiment that loads, and whatever is wrong with one is said in a line before anything starts."""

import builtins
import io
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from nft_ray.algorithms.schedules import CustomDecay
from nft_ray.config import ExperimentConfig, differences, dump, load, parse, resolved
from tests.examples import QUICKSTART, example_config

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def refusal(*overrides: str, path: str | Path = QUICKSTART) -> str:
    """The one line with which an experiment is refused."""
    with pytest.raises(ValueError) as error:
        load(path, overrides)
    message = str(error.value)
    assert message
    assert "\n" not in message
    assert not isinstance(error.value, ValidationError)
    return message


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "experiment.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


class TestFiles:
    @pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
    def test_every_yaml_loads(self, path: Path) -> None:
        config = load(path)
        assert config.run.name
        assert config.trained_weights

    @pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
    def test_every_yaml_says_its_command_and_hardware(self, path: Path) -> None:
        header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
        assert f"configs/{path.relative_to(ROOT / 'configs')}" in header
        assert "hardware:" in header

    def test_the_quickstart_is_among_them(self) -> None:
        assert QUICKSTART in CONFIGS

    def test_a_missing_file_gets_the_nearest(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = written(tmp_path, "")
        missing = tmp_path / "experimant.yaml"
        assert refusal(path=missing) == f"config {missing}: no such file; did you mean {path}?"
        monkeypatch.chdir(ROOT)
        for wrong in ("configs/quickstrat.yaml", "quickstart.yaml"):
            assert refusal(path=wrong).endswith("no such file; did you mean configs/quickstart.yaml?")
        assert refusal(path="zzz") == "config zzz: no such file"

    def test_a_folder_is_no_file(self, tmp_path: Path) -> None:
        assert refusal(path=tmp_path) == f"config {tmp_path}: is a folder; name a .yaml file"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("run: {name: a", "while parsing a flow mapping"),
            ("run:\n\tname: a", "found character that cannot start any token"),
            ("run: {name: a}\nrun: {name: b}", "found duplicate key run"),
            ("run: {name: '${nothing}'}", "Interpolation key 'nothing' not found"),
            (b"run: {name: \xff}", "'utf-8' codec can't decode"),
            ("- a\n- b", "holds no mapping at the top; start with `run:`"),
            ("3", "Invalid loaded object type: int"),
        ],
    )
    @pytest.mark.parametrize("overrides", [(), ("run.seed=1",)], ids=["", "override"])
    def test_bad_yaml(self, tmp_path: Path, text: str | bytes, message: str, overrides: tuple[str, ...]) -> None:
        path = written(tmp_path, text)
        line = refusal(*overrides, path=path)
        assert line.startswith(f"config {path}: ")
        assert message in line

    def test_an_empty_file_lacks_what_has_no_default(self, tmp_path: Path) -> None:
        assert refusal(path=written(tmp_path, "")) == "run: Field required; rewards: Field required"


class TestOverrides:
    def test_they_go_over_the_file(self) -> None:
        config = example_config("run.seed=3", "sampler.solver=heun", "model.lora.targets=[a,b]", "learner.num_gpus=0.5")
        assert (config.run.seed, config.sampler.solver, config.learner.num_gpus) == (3, "heun", 0.5)
        assert config.model.lora.targets == ("a", "b")
        assert example_config("run.seed=3", "run.seed=4").run.seed == 4  # the last one counts

    @pytest.mark.parametrize("override", ["run.seed", "", "=3"])
    def test_one_without_key_or_value_sign(self, override: str) -> None:
        assert refusal(override) == f"--set {override}: write key=value, such as --set run.seed=1"

    def test_one_that_is_no_yaml(self) -> None:
        assert refusal("run.seed=[").startswith(f"config {QUICKSTART}: while parsing a flow node")


class TestKeys:
    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("learnr.num_workers=1", "learnr: unknown key; did you mean learner?"),
            ("run.sede=1", "run.sede: unknown key; did you mean seed?"),
            ("learner.learning_rat=1", "learner.learning_rat: unknown key; did you mean learning_rate?"),
            ("sampler.num_worker=1", "sampler.num_worker: unknown key; did you mean num_workers?"),
            ("model.lora.rnak=1", "model.lora.rnak: unknown key; did you mean rank?"),
            (
                "algorithm.old_policy_decay.flat_step=1",
                "algorithm.old_policy_decay.flat_step: unknown key; did you mean flat_steps?",
            ),
            ("model.lora.zzz=1", "model.lora.zzz: unknown key; known: rank, alpha, targets, start"),
            ("rewards.geneval.wieght=1", "rewards.geneval.wieght: unknown key; did you mean 'weight'?"),
        ],
    )
    def test_an_unknown_key_gets_the_nearest(self, override: str, message: str) -> None:
        assert refusal(override) == message

    def test_several_are_all_named(self) -> None:
        line = refusal("run.sede=1", "model.lora.rnak=1")
        assert line == "run.sede: unknown key; did you mean seed?; model.lora.rnak: unknown key; did you mean rank?"

    def test_a_misspelt_reward_gets_the_nearest(self) -> None:
        assert refusal("rewards.genevall.weight=1").startswith("unknown reward 'genevall'; did you mean 'geneval'?")


class TestValues:
    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("run.seed=x", r"run\.seed = 'x': .*valid integer"),
            ("run.seed=-1", r"run\.seed = -1: .*greater than or equal to 0"),
            ("run.num_epochs=0", r"run\.num_epochs = 0: .*greater than or equal to 1"),
            ("run.max_staleness=2", r"run\.max_staleness = 2: .*less than or equal to 1"),
            ("prompts=3", r"prompts = 3: .*valid dictionary"),
            ("prompts.images_per_group=1", r"prompts\.images_per_group = 1: .*greater than or equal to 2"),
            ("sampler.solver=eular", r"sampler\.solver = 'eular': .*'euler', 'ddim', 'dpm1', 'dpm2' or 'heun'"),
            ("sampler.guidance=0.5", r"sampler\.guidance = 0\.5: .*greater than or equal to 1"),
            ("learner.learning_rate=0", r"learner\.learning_rate = 0: .*greater than 0"),
            ("learner.betas=[0.9]", r"learner\.betas\.1: Field required"),
            ("learner.betas=[0.9,1.5]", r"learner\.betas\.1 = 1\.5: .*less than or equal to 1"),
            ("cluster.dashboard_port=70000", r"cluster\.dashboard_port = 70000: .*65535"),
            ("rewards.geneval.num_replicas=0", r"rewards\.geneval\.num_replicas = 0: .*greater than or equal to 1"),
            ("rewards.geneval=false", r"rewards\.geneval = False: .*valid dictionary"),
        ],
    )
    def test_a_wrong_value_is_named_with_its_rule(self, override: str, message: str) -> None:
        assert re.fullmatch(f"{message}.*", refusal(override))

    @pytest.mark.parametrize("name", ["..", ".", "a/b", ".hidden", "-x", ""])
    def test_a_run_name_is_one_folder_below_the_root(self, name: str) -> None:
        assert refusal(f"run.name='{name}'").startswith(f"run.name = {name!r}: ")

    @pytest.mark.parametrize("name", ["quickstart", "a-1_b.c", "2026-01-01"])
    def test_other_run_names_are_fine(self, name: str) -> None:
        assert example_config(f"run.name='{name}'").run.name == name

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ("linaer", r"algorithm\.old_policy_decay = 'linaer': Input should be 'on_policy', 'linear' or 'delayed'"),
            ("3", r"algorithm\.old_policy_decay = 3: .*dictionary.*"),
            ("{flat_steps: -1}", r"algorithm\.old_policy_decay\.flat_steps = -1: .*greater than or equal to 0"),
            ("{max: 2}", r"algorithm\.old_policy_decay\.max = 2: .*less than or equal to 1"),
            ("{maxx: 1}", r"algorithm\.old_policy_decay\.maxx: unknown key; did you mean max\?"),
        ],
    )
    def test_a_wrong_decay_is_one_message_about_what_was_meant(self, value: str, message: str) -> None:
        line = refusal(f"algorithm.old_policy_decay={value}")
        assert re.fullmatch(message, line)
        assert line.count("old_policy_decay") == 1

    def test_a_decay_is_a_preset_or_a_mapping(self) -> None:
        decay = example_config("algorithm.old_policy_decay={flat_steps: 3, rate: 0.5, max: 0.75}").algorithm
        assert decay.old_policy_decay == CustomDecay(flat_steps=3, rate=0.5, max=0.75)
        assert example_config("algorithm.old_policy_decay=delayed").algorithm.old_policy_decay == "delayed"


class TestAcrossFields:
    def test_no_more_times_than_sigmas(self) -> None:
        assert example_config("sampler.num_times=4", "sampler.num_steps=4").sampler.num_times == 4
        line = refusal("sampler.num_times=5", "sampler.num_steps=4")
        assert line.startswith("sampler.num_times = 5: ")
        assert line.endswith("4 sigmas without replacement; use at most 4")

    def test_no_more_optimizer_steps_than_samples(self) -> None:
        small = ["prompts.groups_per_epoch=2", "prompts.images_per_group=3"]
        assert example_config(*small, "learner.optimizer_steps=6").learner.optimizer_steps == 6
        line = refusal(*small, "learner.optimizer_steps=7")
        assert line.startswith("learner.optimizer_steps = 7: ")
        assert line.endswith("an epoch has 6; use at most 6")

    @pytest.mark.parametrize(
        ("overrides", "line"),
        [
            (["sampler.num_workers=2"], "sampler.num_workers = 2, learner.num_workers = 1; make them equal"),
            (["run.max_staleness=1"], "run.max_staleness = 1: .* use 0"),
            (["sampler.num_gpus=1", "learner.num_gpus=0.5"], "= 1.5: .* use at most 1 in all, such as 0.5 each"),
            (["learner.sharding=fsdp"], "learner.sharding = 'fsdp': .* use ddp"),
        ],
    )
    def test_who_shares_a_device_takes_turns(self, overrides: list[str], line: str) -> None:
        one_pair = ["cluster.placement=colocated", "sampler.num_workers=1", "learner.num_workers=1"]
        assert example_config(*one_pair).cluster.placement == "colocated"
        assert re.search(line, refusal(*one_pair, *overrides))

    @pytest.mark.parametrize(
        ("overrides", "line"),
        [
            (["sampler.min_workers=3"], "sampler.min_workers = 3: it is at most sampler.num_workers = 2; use 2"),
            (["sampler.max_workers=1"], "sampler.max_workers = 1: it is at least sampler.num_workers = 2; use 2"),
            (
                ["sampler.min_workers=1", "cluster.placement=colocated", "learner.num_workers=2"],
                "sampler.min_workers = 1: with cluster.placement = 'colocated' each of the 2 samplers shares a device "
                "with a learner; use 2, or leave it out",
            ),
        ],
    )
    def test_least_and_most_samplers_surround_their_number(self, overrides: list[str], line: str) -> None:
        ok = example_config("sampler.num_workers=2", "sampler.min_workers=1", "sampler.max_workers=5").sampler
        assert (ok.min_workers, ok.max_workers) == (1, 5)
        assert refusal("sampler.num_workers=2", *overrides) == line

    def test_no_more_learners_are_needed_than_there_are(self) -> None:
        with pytest.raises(ValueError, match=r"^learner: min_workers = 3: it is at most num_workers = 2; use 2"):
            load(QUICKSTART, ["learner.num_workers=2", "learner.min_workers=3"])
        assert load(QUICKSTART, ["learner.num_workers=2", "learner.min_workers=1"]).learner.min_workers == 1

    @pytest.mark.parametrize("override", ["rewards.geneval.weight=0", "rewards.geneval.eval_only=true"])
    def test_one_reward_must_train(self, override: str) -> None:
        assert refusal(override).startswith("rewards: none has a weight to train on; ")

    def test_there_must_be_a_reward(self) -> None:
        with pytest.raises(ValueError, match=r"^rewards = \{\}: .*at least 1 item"):
            parse({"run": {"name": "a"}, "rewards": {}})


class TestRewards:
    def test_a_bare_name_has_its_defaults(self, tmp_path: Path) -> None:
        config = load(written(tmp_path, "run: {name: a}\nrewards: {jpeg_compressibility: }"))
        assert config.trained_weights == {"jpeg_compressibility": 1.0}
        assert resolved(config)["rewards"]["jpeg_compressibility"]["num_replicas"] == 1

    def test_only_what_has_a_weight_trains(self) -> None:
        config = example_config(
            "rewards.geneval.weight=-0.5",
            "rewards.jpeg_compressibility.eval_only=true",
            "rewards.jpeg_incompressibility.weight=0",
        )
        assert config.trained_weights == {"geneval": -0.5}
        assert sorted(config.reward_configs) == ["geneval", "jpeg_compressibility", "jpeg_incompressibility"]


class TestReading:
    """A YAML is read, and nothing else: what needs a file is a second step (models/resolve.py)."""

    def test_takes_a_moment(self) -> None:
        """Commands that only look at a YAML do not wait for torch. No contract says it: it is of what runs."""
        heavy = "{'torch', 'diffusers', 'transformers', 'ray'}"
        script = f"import sys, nft_ray.config; assert not {heavy} & set(sys.modules)"
        subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)

    @pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
    def test_opens_no_other_file_and_makes_no_connection(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        overrides = ("model.path=someone/pipeline", "model.lora.start=someone/lora", "prompts.train=/none.txt")
        load(path)  # the modules of its rewards are imported
        opened, plain = list[Path](), io.open

        def noted(file: Any, *arguments: Any, **options: Any) -> Any:
            opened.append(Path(file))
            return plain(file, *arguments, **options)

        def refused(*_arguments: Any, **_options: Any) -> Any:
            raise AssertionError("a connection")

        for module in (io, builtins):
            monkeypatch.setattr(module, "open", noted)
        for name in ("socket", "create_connection", "getaddrinfo"):
            monkeypatch.setattr(socket, name, refused)
        config = load(path, overrides)
        assert opened == [path]
        assert config.model.lora.start == "someone/lora"


class TestPlainData:
    @pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
    def test_what_is_dumped_is_the_same_experiment(self, path: Path) -> None:
        config = load(path)
        self.check(config)

    def test_values_that_yaml_could_read_otherwise(self) -> None:
        config = example_config(
            "run.name='1e3'",
            "run.root='on'",
            "prompts.train='null'",
            "learner.learning_rate=1e-7",
            "evaluation.picture_lines=[]",
            "model.lora.targets=['1', 'no']",
        )
        assert (config.run.name, config.run.root, config.learner.learning_rate) == ("1e3", "on", 1e-7)
        self.check(config)

    @staticmethod
    def check(config: ExperimentConfig) -> None:
        data = yaml.safe_load(dump(config))
        assert data == resolved(config)
        again = parse(data)
        assert resolved(again) == resolved(config)
        assert again.reward_configs == config.reward_configs
        assert again.model_copy(update={"rewards": config.rewards}) == config
        assert parse(yaml.safe_load(dump(again))) == again

    def test_every_default_is_in_the_dump(self) -> None:
        data = yaml.safe_load(dump(example_config()))
        assert data["sampler"]["max_attempts"] == 3
        assert data["cluster"].items() >= {"num_cpus": None, "dashboard_port": None, "wait_s": 300.0}.items()
        assert data["rewards"]["geneval"]["batch_size"] == 1

    def test_a_loaded_experiment_is_not_changed(self) -> None:
        config: Any = example_config()
        with pytest.raises(ValidationError):
            config.run.seed = 1
        assert config.run.seed == 0

    def test_differences_are_dotted_keys(self) -> None:
        old = {"a": 1, "b": {"c": 2, "d": {"e": [1, 2]}}, "gone": {"x": 1}, "kind": "linear", "none": None}
        new = {"a": 1, "b": {"c": 3, "d": {"e": [1, 3]}}, "fresh": 0, "kind": {"rate": 1}, "none": None}
        assert differences(old, new) == ["b.c", "b.d.e", "fresh", "gone", "kind"]
        assert differences(old, old) == []
        one, other = resolved(example_config()), resolved(example_config("run.seed=1", "model.lora.rank=2"))
        assert differences(one, other) == ["model.lora.rank", "run.seed"]


def test_a_deadline_of_a_reward_must_leave_time_to_answer() -> None:
    section = {"urls": ["http://127.0.0.1:1/v1"], "deadline_s": 120}
    with pytest.raises(ValueError, match=r"rewards\.unified_reward\.deadline_s = 120: .* scorers\.timeout_s = 120"):
        parse({"run": {"name": "x"}, "rewards": {"unified_reward": section}})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1"])
def test_http_for_others_needs_a_token(host: str) -> None:
    data = {"run": {"name": "x"}, "rewards": {"jpeg_compressibility": {}}}
    with pytest.raises(ValueError, match=rf"host {host} is open to others and there is no token"):
        parse(data | {"scorers": {"http": {"host": host}}})
    config = parse(data | {"scorers": {"http": {"host": host, "token": "a-secret"}}})
    assert "a-secret" not in dump(config)
    assert "a-secret" not in repr(config)
