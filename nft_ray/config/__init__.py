"""The experiment: one YAML, checked completely before any process or GPU starts.

Lives here: the sections and their defaults, profiles and stages, loading and dumping, what a user is told of a mistake.
Does not: what a reward's or an algorithm's own section may say (rewards/, algorithms/), anything that needs a file.
"""

from nft_ray.config.experiment import ExperimentConfig
from nft_ray.config.loading import changes, differences, dump, load, parse, profiles, resolved
from nft_ray.config.marks import essence, mark_of, shared
from nft_ray.config.secrets import lost, masked, masked_text, masked_uri, without_userinfo
from nft_ray.config.sections import (
    ClusterConfig,
    EvaluationConfig,
    HttpConfig,
    LearnerConfig,
    LoraConfig,
    ModelConfig,
    PromptsConfig,
    RunConfig,
    SamplerConfig,
    ScorersConfig,
    StageConfig,
    TrackingConfig,
)

__all__ = [
    "ClusterConfig",
    "EvaluationConfig",
    "ExperimentConfig",
    "HttpConfig",
    "LearnerConfig",
    "LoraConfig",
    "ModelConfig",
    "PromptsConfig",
    "RunConfig",
    "SamplerConfig",
    "ScorersConfig",
    "StageConfig",
    "TrackingConfig",
    "changes",
    "differences",
    "dump",
    "essence",
    "load",
    "lost",
    "mark_of",
    "masked",
    "masked_text",
    "masked_uri",
    "parse",
    "profiles",
    "resolved",
    "shared",
    "without_userinfo",
]
