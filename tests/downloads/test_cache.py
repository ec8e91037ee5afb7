"""One cache: what the Hub's own client brought is used, and what we bring is found by it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download, snapshot_download

from nft_ray.downloads.cache import located
from nft_ray.downloads.fetch import fetch
from nft_ray.downloads.published import PublishedFile
from nft_ray.rewards.weights import named_root, require, weights_root
from tests.models.stand_in_hub import COMMIT, Hub, stand_in_hub

NAME = "owner/scorer"
CONTENT = {"config.json": b'{"a": 1}', "sub/model.safetensors": bytes(range(256)) * 1024}
FILES = [PublishedFile(path=f"{NAME}/{name}") for name in CONTENT]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with one repository, and a cache of this test's own."""
    for name, content in CONTENT.items():
        (tmp_path / "repository" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "repository" / name).write_bytes(content)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for variable in ("HF_TOKEN", "NFT_RAY_WEIGHTS"):
        monkeypatch.delenv(variable, raising=False)
    with stand_in_hub() as running:
        running.repositories[NAME] = tmp_path / "repository"
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield running


def brought(root: Path, *, into_hub_cache: bool = True) -> list[str]:
    said: list[str] = []
    fetch(FILES, root, said.append, into_hub_cache=into_hub_cache)
    return said


def test_what_others_brought_is_used_and_not_fetched_again(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = Path(snapshot_download(NAME, cache_dir=constants.HF_HUB_CACHE))
    hub.sent.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert brought(tmp_path / "ours") == ["2 of 2 files are there"]
    places = require("scorer", FILES, tmp_path / "ours")
    assert places[NAME] == snapshot
    assert {path: places[path].read_bytes() for path in places if path != NAME} == {
        f"{NAME}/{name}": content for name, content in CONTENT.items()
    }
    assert not hub.sent
    assert not (tmp_path / "ours").exists()


def test_what_we_bring_is_found_by_everybody(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [line.split(": ")[0] for line in brought(tmp_path / "ours")] == [
        f"[{number}/2] {file.path}" for number, file in enumerate(FILES, 1)
    ]
    assert not (tmp_path / "ours").exists()
    assert set(hub.sent.values()) == {1}
    hub.sent.clear()
    for name, content in CONTENT.items():
        assert Path(hf_hub_download(NAME, name, cache_dir=constants.HF_HUB_CACHE)).read_bytes() == content
    assert not hub.sent
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = Path(snapshot_download(NAME, cache_dir=constants.HF_HUB_CACHE, local_files_only=True))
    assert (snapshot.name, snapshot) == (COMMIT, located(FILES, tmp_path / "ours")[NAME])
    assert not list((tmp_path / "hub").rglob("*.part*"))


def test_a_folder_of_ones_own_is_filled_from_the_cache(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brought(tmp_path / "ours")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = brought(tmp_path / "mine", into_hub_cache=False)
    assert said == [f"[{number}/2] {file.path}: copied from the Hub's cache" for number, file in enumerate(FILES, 1)]
    assert located(FILES, tmp_path / "mine")[NAME] == tmp_path / "mine" / NAME  # it goes before the cache
    assert brought(tmp_path / "mine", into_hub_cache=False) == ["2 of 2 files are there"]


def test_a_repository_is_used_from_one_place(hub: Hub, tmp_path: Path) -> None:
    config, model = FILES
    fetch([config], tmp_path / "ours", lambda _: None, into_hub_cache=True)
    fetch([model], tmp_path / "ours", lambda _: None)
    assert located(FILES, tmp_path / "ours") == {}
    with pytest.raises(ValueError, match=r"scorer/config\.json is missing: run `nft-ray rewards fetch scorer`, or put"):
        require("scorer", FILES, tmp_path / "ours")
    brought(tmp_path / "ours")
    assert located(FILES, tmp_path / "ours")[NAME] == tmp_path / f"hub/models--owner--scorer/snapshots/{COMMIT}"


def test_a_pinned_sum_is_what_counts(hub: Hub, tmp_path: Path) -> None:
    brought(tmp_path / "ours")
    other = PublishedFile(path=FILES[0].path, sha256="0" * 64)
    assert located([other], tmp_path / "ours") == {}


def test_without_a_hub_it_says_where_a_file_of_it_may_lie(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=rf"put it at {tmp_path}/ours/{NAME}/config\.json \(and 1 more, said above\)"):
        brought(tmp_path / "ours")


def test_the_folder_that_is_looked_into_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NFT_RAY_WEIGHTS", raising=False)
    assert (named_root(), weights_root()) == (None, Path("~/.cache/nft_ray/weights").expanduser().resolve())
    monkeypatch.setenv("NFT_RAY_WEIGHTS", str(tmp_path))
    assert (named_root(), weights_root()) == (str(tmp_path), tmp_path)
    assert weights_root(str(tmp_path / "other")) == tmp_path / "other"
