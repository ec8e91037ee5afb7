"""One experiment = one YAML = one ExperimentConfig: checked completely before any process or GPU starts.

Every default stands once, on its field, with its unit. Nothing is changed after loading; what follows from other
fields is a property. `rewards` and `algorithm.name` name files (nft_ray/rewards/NAME.py); each checks its own section.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, model_validator

from nft_ray.algorithms.base import AlgorithmConfig, config_class
from nft_ray.config.composition import WORKERS, stage_data
from nft_ray.config.errors import explained
from nft_ray.config.sections import (
    ClusterConfig,
    EvaluationConfig,
    LearnerConfig,
    ModelConfig,
    PromptsConfig,
    RunConfig,
    SamplerConfig,
    ScorersConfig,
    Section,
    StageConfig,
    TrackingConfig,
)
from nft_ray.rewards.base import RewardConfig, reward_config


def _of_its_algorithm(section: Any) -> Any:
    """`algorithm` is checked by the Config of the algorithm that it names."""
    if not isinstance(section, Mapping):
        return section
    own = config_class(section)
    try:
        return own.model_validate(section)
    except ValidationError as error:
        raise ValueError(explained(own, error, "algorithm")) from None


class ExperimentConfig(Section):
    run: RunConfig
    cluster: ClusterConfig = ClusterConfig()
    model: ModelConfig = ModelConfig()
    prompts: PromptsConfig = PromptsConfig()
    sampler: SamplerConfig = SamplerConfig()
    learner: LearnerConfig = LearnerConfig()
    algorithm: Annotated[SerializeAsAny[AlgorithmConfig], BeforeValidator(_of_its_algorithm)] = Field(
        default_factory=lambda: config_class({})()
    )
    rewards: Annotated[dict[str, Any], Field(min_length=1)]
    """Reward name -> its section: weight, eval_only, num_replicas, ... and what the reward's own Config adds."""
    scorers: ScorersConfig = ScorersConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()
    stages: tuple[StageConfig, ...] = ()
    """Parts of the run, one after the other; none = the experiment itself is the whole run."""

    @model_validator(mode="before")
    @classmethod
    def _num_epochs_of_stages(cls, data: Any) -> Any:
        """Where the run does not say how many epochs it has, its stages do."""
        if not isinstance(data, Mapping) or not isinstance(data.get("run"), Mapping):
            return data
        stages = data.get("stages")
        if not stages or not isinstance(stages, list | tuple):
            return data
        counts = [stage.get("num_epochs") if isinstance(stage, Mapping) else None for stage in stages]
        if "num_epochs" in data["run"] or not all(type(count) is int for count in counts):
            return data
        return {**data, "run": {**data["run"], "num_epochs": sum(counts)}}

    @model_validator(mode="after")
    def _across_fields(self) -> "ExperimentConfig":
        if self.sampler.num_times > self.sampler.num_steps:
            raise ValueError(
                f"sampler.num_times = {self.sampler.num_times}: training times are drawn from the sampler's "
                f"{self.sampler.num_steps} sigmas without replacement; use at most {self.sampler.num_steps}"
            )
        self._between_least_and_most()
        if self.cluster.placement == "colocated":
            self._can_share_devices()
        if self.model.tuning == "full" and self.sampler.lora != "auto":
            raise ValueError(f"sampler.lora = {self.sampler.lora}: model.tuning: full has no LoRA; leave it out")
        num_samples = self.prompts.groups_per_epoch * self.prompts.images_per_group
        if self.learner.optimizer_steps > num_samples:
            raise ValueError(
                f"learner.optimizer_steps = {self.learner.optimizer_steps}: each needs a sample and an epoch has "
                f"{num_samples}; use at most {num_samples}"
            )
        for name, config in self.reward_configs.items():
            deadline_s, (field, longest_s) = getattr(config, "deadline_s", 0.0), self.deadline_of(name)
            if deadline_s >= longest_s:
                raise ValueError(
                    f"rewards.{name}.deadline_s = {deadline_s:g}: what is scored by then is lost unless it is below "
                    f"scorers.{field} = {longest_s:g}; lower it, or raise that"
                )
        if not any(config.weight and not config.eval_only for config in self.reward_configs.values()):
            raise ValueError("rewards: none has a weight to train on; give one of them `weight: 1` without eval_only")
        return self

    def _between_least_and_most(self) -> None:
        """sampler.min_workers <= sampler.num_workers <= sampler.max_workers; colocated, every learner needs its own."""
        count = self.sampler.num_workers
        for name, value, rule, fits in (
            ("min_workers", self.sampler.min_workers, "at most", lambda value: value <= count),
            ("max_workers", self.sampler.max_workers, "at least", lambda value: value >= count),
        ):
            if value is not None and not fits(value):
                raise ValueError(f"sampler.{name} = {value}: it is {rule} sampler.num_workers = {count}; use {count}")
            if value is not None and value != count and self.cluster.placement == "colocated":
                raise ValueError(
                    f"sampler.{name} = {value}: with cluster.placement = 'colocated' each of the {count} samplers "
                    f"shares a device with a learner; use {count}, or leave it out"
                )

    def _can_share_devices(self) -> None:
        samplers, learners = self.sampler.num_workers, self.learner.num_workers
        if samplers != learners:
            raise ValueError(
                f"cluster.placement = 'colocated': each sampler shares a device with a learner, and "
                f"sampler.num_workers = {samplers}, learner.num_workers = {learners}; make them equal"
            )
        if self.run.max_staleness:
            raise ValueError(
                f"run.max_staleness = {self.run.max_staleness}: with cluster.placement = 'colocated' samplers and "
                "learners take turns, so nothing can overlap; use 0"
            )
        if self.learner.sharding == "fsdp":
            raise ValueError(
                "learner.sharding = 'fsdp': with cluster.placement = 'colocated' learners leave their device between "
                "updates, which sharded weights cannot; use ddp, or cluster.placement: disaggregated"
            )
        together = self.sampler.num_gpus + self.learner.num_gpus
        if together > 1:
            raise ValueError(
                f"sampler.num_gpus + learner.num_gpus = {together:g}: with cluster.placement = 'colocated' both are "
                "shares of one card; use at most 1 in all, such as 0.5 each"
            )

    @model_validator(mode="after")
    def _across_stages(self) -> "ExperimentConfig":
        names = [stage.name for stage in self.stages]
        total = sum(stage.num_epochs for stage in self.stages)
        for number, stage in enumerate(self.stages):
            if names.index(stage.name) < number:
                raise ValueError(f"stages.{number}.name = {stage.name!r}: an earlier stage has it; choose another")
            for role, section in (("sampler", stage.sampler), ("learner", stage.learner)):
                for key in section.keys() & set(WORKERS):
                    raise ValueError(f"stages.{number}.{role}.{key}: workers are the whole run's; set {role}.{key}")
        if self.stages and self.run.num_epochs != total:
            raise ValueError(
                f"run.num_epochs = {self.run.num_epochs}: the stages have {total}; leave it out, or change a stage, "
                f"such as stages.{len(names) - 1}.num_epochs"
            )
        assert self.stage_configs  # every stage is a whole experiment and is checked as one
        return self

    @property
    def stage_configs(self) -> tuple["ExperimentConfig", ...]:
        """The experiment of every stage, `run.num_epochs` counted through; without stages, the experiment itself."""
        data, found = self.model_dump(), []
        for number, stage in enumerate(self.stages):
            try:
                found.append(ExperimentConfig.model_validate(stage_data(data, number)))
            except ValidationError as error:
                problem = explained(ExperimentConfig, error)
                raise ValueError(f"stages.{number} ({stage.name}): {problem}") from None
        return tuple(found) or (self,)

    @property
    def reward_configs(self) -> dict[str, RewardConfig]:
        """Reward name -> its checked configuration."""
        return {name: reward_config(name, {} if section is None else section) for name, section in self.rewards.items()}

    def deadline_of(self, reward: str) -> tuple[str, float]:
        """The field of `scorers` that ends a call of this reward, and its seconds."""
        field = "timeout_s" if reward in self.trained_weights else "monitor_timeout_s"
        return field, float(getattr(self.scorers, field))

    @property
    def trained_weights(self) -> dict[str, float]:
        """Reward name -> weight, of the rewards that train."""
        return {
            name: config.weight
            for name, config in self.reward_configs.items()
            if config.weight and not config.eval_only
        }
