"""The sections of an experiment's YAML. Every default stands once, on its field, with its unit; nothing is read from a
file. What spans sections is checked in experiment.py.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from nft_ray.types import Mark, Solver

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A frozen section of the YAML in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class RunConfig(Section):
    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$"), Mark.PLACEMENT]
    """Folder of the run under `root` (so never `..`), and its name in MLflow."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Every prompt, noise and permutation is a function of this."""
    num_epochs: Annotated[Positive, Mark.PLACEMENT] = 100
    """Epochs of collect + update; may be raised, or lowered to what is finished, when a run goes on."""
    max_staleness: Annotated[int, Field(ge=0, le=1)] = 0
    """0: the published algorithm. 1: the rollouts of the next epoch overlap this epoch's update."""
    root: Annotated[str, Mark.PLACEMENT] = "runs"
    """Folder of all runs; NFT_RAY_RUNS overrides it. Made absolute; see `nft_ray.runs.checkpoint.run_root`."""
    checkpoint_every: Annotated[Positive, Mark.PLACEMENT] = 1
    """Epochs between checkpoints, which are what a killed run can lose; the last epoch always makes one. Written beside
    the next rollouts."""
    checkpoint_minutes: Annotated[Annotated[float, Field(gt=0)] | None, Mark.PLACEMENT] = None
    """An epoch that ends so long after the last checkpoint makes one, too; null = only `checkpoint_every` counts."""
    keep_checkpoints: Annotated[Positive, Mark.PLACEMENT] = 2
    """Newest checkpoints that stay, beside the best one that was evaluated."""
    checkpoint_url: Annotated[str | None, Mark.PLACEMENT] = None
    """Where checkpoints, metrics and figures are copied to as well, for a machine that goes: a folder, s3://BUCKET/RUNS
    or whatever fsspec knows, without a password in it; the copy lies under the run's name. A run whose folder is empty
    goes on from there. null = nowhere."""
    max_epochs_without_signal: Annotated[Positive | None, Mark.PLACEMENT] = 5
    """Epochs in a row in which all images of every group earn the same before the run stops; null = it goes on."""
    max_skipped_epochs: Annotated[Positive, Mark.PLACEMENT] = 3
    """Epochs in a row with a gradient, or most images, that are not finite before the run goes back to the last good
    one; the next time it stops."""


class ClusterConfig(Section):
    num_cpus: Annotated[Positive | None, Mark.PLACEMENT] = None
    """CPUs of the local Ray that `nft-ray train` starts when no --address is given; null = those of the machine."""
    dashboard_port: Annotated[Annotated[int, Field(ge=1, le=65535)] | None, Mark.PLACEMENT] = None
    """Dashboard port of that local Ray; null = 8265 or the next free one. A port in use is an error."""
    wait_s: Annotated[float, Field(gt=0), Mark.PLACEMENT] = 300.0
    """Seconds to wait for the workers of the run to be placed."""
    placement: Annotated[Literal["disaggregated", "colocated"], Mark.PLACEMENT] = "disaggregated"
    """disaggregated: samplers and learners have GPUs of their own. colocated: sampler i and learner i share one, in
    turns, and the one that waits is in host memory."""


class LoraConfig(Section):
    rank: Positive = 32
    """Rank of every layer's update."""
    alpha: Positive = 64
    """The update is multiplied by alpha / rank."""
    targets: tuple[str, ...] | None = None
    """Names of the linear layers; null = what the model family recommends."""
    start: str | None = None
    """An existing LoRA to start the policy from: a file or folder of diffusers or peft, or a Hub id. Rank, alpha and
    targets are its own (models/resolve.py reads them): null here, or left out. Policy, old policy and EMA start there;
    the reference of the KL term stays the base model."""

    @model_validator(mode="before")
    @classmethod
    def _left_to_its_start(cls, data: Any) -> Any:
        """With a LoRA to start from, null is the same as left out."""
        if not isinstance(data, Mapping) or not data.get("start"):
            return data
        return {name: value for name, value in data.items() if value is not None}


class ModelConfig(Section):
    family: str = "sd3"
    """File nft_ray/models/FAMILY.py."""
    path: str = "nano-sd3"
    """Folder in diffusers format, Hub id, or `nano-sd3`: the pipeline that comes with this package."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id. A commit is the same on every node and on every day."""
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], Mark.ROUNDING] = "float32"
    """Data type of the frozen weights. The LoRA is float32 always. float16 keeps the gradient of float32 best, bfloat16
    has the wider range (docs/decisions/0003)."""
    text_encoder_dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, Mark.ROUNDING] = None
    """Data type of the text encoders; null = `dtype`."""
    text_encoders: Annotated[Literal["resident", "offload"], Mark.PLACEMENT] = "resident"
    """offload: on the GPU only while prompts are encoded, in host memory otherwise."""
    conditioning_cache: Annotated[int, Field(ge=0), Mark.PLACEMENT] = 512
    """Encoded prompts that a sampler keeps in host memory (SD3.5 with 128 T5 tokens in 16 bit: 1.7 MB each)."""
    precomputed: Annotated[str | None, Mark.PLACEMENT] = None
    """Folder of encoded prompts, shared by all samplers; `nft-ray encode` fills it. With all prompts there, no text
    encoder is loaded; one that is missing is encoded and added."""
    height: Positive = 32
    """Pixels."""
    width: Positive = 32
    """Pixels."""
    max_sequence_length: Annotated[int, Field(ge=0)] = 0
    """Tokens of the long text encoder (SD3, FLUX: T5; Sana: Gemma). SD3 with 0 runs, and is loaded, without T5."""
    distilled_guidance: Annotated[float, Field(ge=0)] | None = None
    """What FLUX.1-dev's guidance embedding is told, in training and sampling alike; null = 3.5 there. It is not
    classifier-free guidance."""
    tuning: Literal["lora", "full"] = "lora"
    """What is trained: a LoRA beside the frozen weights, or all weights of the transformer in float32, which work in
    `dtype`. Full fine-tuning takes far more memory: see nft_ray/models/full.py."""
    lora: LoraConfig = LoraConfig()

    @model_validator(mode="after")
    def _tunable(self) -> "ModelConfig":
        if self.tuning == "full" and self.dtype == "float16":
            raise ValueError(
                "dtype = float16: gradients of all weights underflow in it; use bfloat16 with tuning: full"
            )
        if self.tuning == "full" and self.lora.start is not None:
            raise ValueError(
                f"lora.start = {self.lora.start}: tuning: full has no LoRA; merge it (nft-ray export --merge) and "
                "name a pipeline with that transformer in path"
            )
        return self


class PromptsConfig(Section):
    train: str = "shapes/train"
    """A .jsonl file (GenEval's format), a .txt file (a prompt per line), or `shapes/train`."""
    test: str = "shapes/test"
    """The held-out lines: each is evaluated once."""
    groups_per_epoch: Positive = 48
    """Prompts drawn per epoch, without replacement."""
    images_per_group: Annotated[int, Field(ge=2)] = 24
    """Images drawn for each of them."""


class WorkersConfig(Section):
    num_workers: Annotated[Positive, Mark.PLACEMENT] = 1
    """Ray actors."""
    num_cpus: Annotated[float, Field(ge=0), Mark.PLACEMENT] = 1.0
    """Ray CPUs reserved per worker (a fraction is fine)."""
    num_gpus: Annotated[float, Field(ge=0), Mark.PLACEMENT] = 0.0
    """Ray GPUs reserved per worker."""
    num_threads: Annotated[Positive, Mark.PLACEMENT] = 1
    """torch threads per worker."""
    memory_gib: Annotated[float, Field(gt=0), Mark.PLACEMENT] = 1.0
    """Expected host memory per worker, shown by --dry-run."""
    timeout_s: Annotated[float, Field(gt=0), Mark.PLACEMENT] = 600.0
    """Deadline of one call."""


class SamplerConfig(WorkersConfig):
    min_workers: Annotated[Positive | None, Mark.PLACEMENT] = None
    """The run starts, and goes on, with so many; the others join when there is room. null = it starts with all."""
    max_workers: Annotated[Positive | None, Mark.PLACEMENT] = None
    """Room that there is when an epoch ends is used from the next on, up to so many workers. null = `num_workers`."""
    solver: Solver = "euler"
    """Solver of training rollouts."""
    num_steps: Positive = 10
    """Points of the sigma schedule (the solver's own stages come on top)."""
    guidance: Annotated[float, Field(ge=1)] = 1.0
    """Classifier-free guidance of training rollouts; 1 = off."""
    num_times: Positive = 9
    """Training times per sample, out of the sampler's sigmas without replacement."""
    micro_batch_size: Annotated[Positive, Mark.PLACEMENT] = 24
    """Images (or (sample, time) pairs) of one forward; with guidance, half as many images."""
    decode_batch_size: Annotated[Positive | None, Mark.PLACEMENT] = None
    """Images of one pass through the VAE, which needs more memory than the transformer; null = micro_batch_size."""
    shrink_on_oom: Annotated[bool, Mark.PLACEMENT] = True
    """A worker whose GPU memory was too small for a rollout is replaced by one with half of both (images may round
    differently then, as with any micro-batch); false = by one like it, until `max_attempts` have failed."""
    lora: Annotated[Literal["auto", "merged", "unmerged"], Mark.ROUNDING] = "auto"
    """A LoRA added to the weights, or beside them: slower, rounds less. auto: beside bfloat16 (docs/decisions/0003)."""
    compile: Annotated[bool, Mark.PLACEMENT] = False
    """Compile the transformer's blocks (torch.compile) for forwards of exactly `micro_batch_size`."""
    velocity_dtype: Annotated[Literal["float16", "float32"], Mark.ROUNDING] = "float16"
    """Data type in which v_old and v_ref travel to the learners."""
    max_in_flight: Annotated[Positive, Mark.PLACEMENT] = 2
    """Requests a worker holds at once: one in work, the others queued."""
    max_attempts: Annotated[Positive, Mark.PLACEMENT] = 3
    """How often a request is tried, each time on another worker if there is one."""


class LearnerConfig(WorkersConfig):
    min_workers: Annotated[Positive | None, Mark.PLACEMENT] = None
    """With so many the group may start again where a node is gone; any number gives the same update to 1e-5.
    null = `num_workers`."""
    max_restarts: Annotated[int, Field(ge=0), Mark.PLACEMENT] = 3
    """How often within `restart_window_s` the group may start again before the run stops."""
    restart_window_s: Annotated[float, Field(gt=0), Mark.PLACEMENT] = 3600.0
    """Seconds after which a restart is forgotten."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    """Of AdamW."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Of AdamW."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Of AdamW."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this norm."""
    optimizer_steps: Positive = 1
    """Optimizer steps per epoch; they partition the epoch's samples."""
    micro_batch_size: Annotated[Positive, Mark.PLACEMENT] = 16
    """(sample, time) pairs of one forward and backward; it changes memory and speed, not the update."""
    shrink_on_oom: Annotated[bool, Mark.PLACEMENT] = False
    """Where GPU memory was too small twice within `restart_window_s`, start again with half of `micro_batch_size`: the
    update is the same but for its last bits. false = start again as before, until `max_restarts`."""
    sharding: Annotated[Literal["ddp", "fsdp"], Mark.ROUNDING] = "ddp"
    """ddp: every learner holds all weights. fsdp: each holds its part of them, of gradients, moments and EMA (FSDP2);
    whole are one block at a time, and what is sent or saved. With one learner both are the same."""
    gradient_checkpointing: Annotated[bool, Mark.PLACEMENT] = False
    """Keep only each block's input and compute the rest again in the backward: a third slower, far less memory."""
    compile: Annotated[bool, Mark.PLACEMENT] = False
    """Compile the transformer's blocks (torch.compile) for micro-batches of exactly `micro_batch_size`."""

    @model_validator(mode="after")
    def _enough(self) -> "LearnerConfig":
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(
                f"min_workers = {self.min_workers}: it is at most num_workers = {self.num_workers}; "
                f"use {self.num_workers}"
            )
        return self


class HttpConfig(Section):
    """Where rewards answer over HTTP. The proxy belongs to the whole cluster: its first user decides."""

    host: Annotated[str, Mark.PLACEMENT] = "127.0.0.1"
    """Address to listen on, on the head node; anything but loopback needs a token."""
    port: Annotated[int, Field(ge=1, le=65535), Mark.PLACEMENT] = 8000
    """TCP port."""
    token: Annotated[SecretStr | None, Mark.PLACEMENT] = None
    """Required of every request as `Authorization: Bearer TOKEN`; write ${oc.env:NAME}, not the token itself."""

    @model_validator(mode="after")
    def _guarded(self) -> "HttpConfig":
        if self.host not in ("127.0.0.1", "localhost", "::1") and self.token is None:
            raise ValueError(
                f"host {self.host} is open to others and there is no token; use 127.0.0.1, "
                "or set token: ${oc.env:NAME}"
            )
        return self


class ScorersConfig(Section):
    attach: Annotated[bool, Mark.PLACEMENT] = False
    """Share rewards: use `shared/REWARD` if it is deployed from the same configuration, and deploy it for others, too,
    if it is not. false = applications of this run alone, `RUN/REWARD`."""
    http: Annotated[HttpConfig | None, Mark.PLACEMENT] = None
    """Serve the rewards over HTTP too; null = not while training (`nft-ray rewards serve`: on loopback)."""
    max_missing_fraction: Annotated[Fraction, Mark.PLACEMENT] = 0.1
    """More missing samples than this in one epoch stop the run."""
    timeout_s: Annotated[float, Field(gt=0), Mark.PLACEMENT] = 120.0
    """Deadline of one call of one reward."""
    max_attempts: Annotated[Positive, Mark.PLACEMENT] = 3
    """How often a call is made before the reward is missing."""
    max_in_flight: Annotated[Positive, Mark.PLACEMENT] = 16
    """Calls per reward at once (a call scores one group)."""
    monitor_timeout_s: Annotated[float, Field(gt=0), Mark.PLACEMENT] = 120.0
    """Deadline of one call of a reward that is `eval_only`; training waits for none of them."""
    combine: Literal["sum", "normalized"] = "sum"
    """Advantages are of the weighted sum of the rewards, or the weighted mean of each reward's own."""


class EvaluationConfig(Section):
    every: Annotated[Positive, Mark.PLACEMENT] = 10
    """Epochs between evaluations; the base and the last epoch are always evaluated."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Noise of line i is a function of this and i only."""
    solver: Solver = "euler"
    """Solver of evaluations."""
    num_steps: Positive = 40
    """Points of its sigma schedule."""
    guidance: Annotated[float, Field(ge=1)] = 1.0
    """Classifier-free guidance; 1 = off."""
    batch_size: Annotated[Positive, Mark.ROUNDING] = 16
    """Lines per request; fixed, so that the figures do not depend on the number of workers."""
    picture_lines: tuple[Annotated[int, Field(ge=0)], ...] = (0, 1, 2, 3, 4, 5, 6, 7)
    """Test lines shown in before_after.png and in MLflow."""


class TrackingConfig(Section):
    uri: Annotated[str | None, Mark.PLACEMENT] = None
    """MLflow tracking URI; null = ROOT/mlflow.db, shared by all runs."""
    experiment: Annotated[str, Mark.PLACEMENT] = "nft_ray"
    """Name of the MLflow experiment."""


class StageConfig(Section):
    """A part of the run, and what it changes of the experiment; see nft_ray/config/composition.py."""

    name: Annotated[str, Field(pattern=r"^\w[\w-]*$")]
    """Shown in the console; names the folder of the stage's evaluations."""
    num_epochs: Positive
    """Epochs of this stage."""
    prompts: dict[str, Any] = {}
    """What is different in `prompts`."""
    sampler: dict[str, Any] = {}
    """What is different in `sampler`."""
    learner: dict[str, Any] = {}
    """What is different in `learner`."""
    algorithm: dict[str, Any] = {}
    """What is different in `algorithm`."""
    rewards: Annotated[dict[str, Any], Field(min_length=1)] | None = None
    """Exactly the rewards of this stage, each over its section in the experiment; null = all of the experiment's."""
    scorers: dict[str, Any] = {}
    """What is different in `scorers`."""
    evaluation: dict[str, Any] = {}
    """What is different in `evaluation`."""

    @field_validator("rewards", mode="before")
    @classmethod
    def _named_only(cls, rewards: Any) -> Any:
        """`pickscore:` alone is a section that says nothing more of it."""
        if not isinstance(rewards, Mapping):
            return rewards
        return {name: {} if section is None else section for name, section in rewards.items()}
