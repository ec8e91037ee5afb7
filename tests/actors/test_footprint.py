"""What an epoch takes, against what a sampler and a checkpoint really are; and what is said where it does not fit."""

from pathlib import Path

import pytest

from actors.footprint import Footprint, Stores, disk_warnings, footprint, memory_warnings, store_warnings, usable
from nft_ray.cores.learner import LearnerCore
from nft_ray.cores.sampler import SamplerCore
from nft_ray.prompts.draw import epoch_requests, load_prompts
from nft_ray.runs.folder import RunFolder
from tests.examples import example_config
from tests.fakes import fake_config

GIB = 2**30
PLAN = Footprint(group=GIB // 10, images=0, epoch=4 * GIB, checkpoint=GIB)


def test_a_group_is_as_large_as_a_sampler_makes_it() -> None:
    config = example_config("algorithm.kl_weight=0.01")
    plan, core = footprint(config), SamplerCore(config)
    assert plan is not None
    learner = LearnerCore(config)
    ((adapters, weights),) = learner.adapters()
    assert weights is not None
    core.load(adapters, weights)
    request = epoch_requests(load_prompts(config.prompts.train), config, epoch=0, policy_version=0)[0]
    _, images, samples = core.rollout(request)
    assert samples is not None
    assert samples.v_ref is not None
    assert plan.group == samples.nbytes
    assert plan.images == images.nbytes


def test_a_checkpoint_is_as_large_as_it_is_written(tmp_path: Path) -> None:
    config = example_config("run.max_staleness=1")
    plan, folder = footprint(config), RunFolder(tmp_path / "run")
    assert plan is not None
    folder.claim(config)
    state = LearnerCore(config).state()
    assert state is not None
    versions = {number: state.versions[0] for number in (0, 1)}
    moments = {f"{kind}/{name}": value for kind in ("exp_avg", "exp_avg_sq") for name, value in state.policy.items()}
    path = folder.save(1, type(state)(**{**_fields(state), "versions": versions, "optimizer": moments}))
    written = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    assert plan.checkpoint == pytest.approx(written, rel=0.25)  # headers are much of so small a LoRA
    assert plan.checkpoint < written


def _fields(state: object) -> dict[str, object]:
    return {name: getattr(state, name) for name in type(state).__dataclass_fields__}  # type: ignore[attr-defined]


def test_the_published_recipe_is_the_architectures_budget() -> None:
    """48 x 24 images of 512 px, 9 times: 2.7 GB of velocities and x0, 0.9 GB of images (SD3.5 has 16 channels)."""
    from math import prod

    latent, pairs = prod((16, 64, 64)), 48 * 24
    assert pairs * latent * (4 + 2 * 9 * 2) / 1e9 == pytest.approx(3.0, rel=0.02)


def test_what_fits_is_not_talked_of() -> None:
    assert store_warnings(PLAN, Stores(object_store=5 * GIB, shm=5 * GIB)) == []
    assert disk_warnings(PLAN, 2, 4 * GIB, "/runs") == []


def test_what_is_spilled_is_a_warning_with_both_numbers() -> None:
    (line,) = store_warnings(PLAN, Stores(object_store=GIB, spill=9 * GIB))
    assert "one epoch puts 4.0 GiB into the object store" in line
    assert "the cluster's object store has 1.0 GiB: the rest is spilled" in line
    assert "--object-store-memory" in line


def test_a_disk_too_small_for_the_rest_is_refused() -> None:
    with pytest.raises(ValueError, match=r"puts 4\.0 GiB .* has 1\.0 GiB, .* 2\.0 GiB free: lower prompts\.groups_per"):
        store_warnings(PLAN, Stores(object_store=GIB, spill=2 * GIB))


def test_the_64_mib_of_a_container_are_told() -> None:
    (line,) = store_warnings(PLAN, Stores(object_store=5 * GIB, shm=64 * 2**20))
    assert "/dev/shm has 64.0 MiB" in line
    assert "--shm-size" in line


def test_the_disk_of_the_run() -> None:
    (line,) = disk_warnings(PLAN, 2, 3 * GIB, "/runs")
    assert "the disk of /runs has 3.0 GiB free and the checkpoints of this run will take 4.0 GiB" in line
    assert disk_warnings(PLAN, 2, 3 * GIB, "/runs", kept=2) == [], "what is there already is not written again"
    with pytest.raises(ValueError, match=r"the disk of /runs has 512\.0 MiB free and a checkpoint takes 1\.0 GiB"):
        disk_warnings(PLAN, 2, GIB // 2, "/runs")


def test_the_memory_of_the_nodes() -> None:
    config = fake_config(sampler={"memory_gib": 8})
    assert memory_warnings(config, [32.0]) == []
    assert memory_warnings(config, [None, 4.0]) == [], "not known"
    (line,) = memory_warnings(config, [8.0, 4.0])
    assert "need 18.9 GiB" in line
    assert "has 12.0" in line


def test_ray_fills_a_disk_to_95_percent() -> None:
    assert usable(100, 1000) == 50
    assert usable(10, 1000) == 0
