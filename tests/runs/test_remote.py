"""A run whose machine goes: another one, with an empty folder, goes on from the copy at a URL."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from nft_ray.runs import remote as module
from nft_ray.runs.evaluations import evaluated_epochs, load_evaluation, save_evaluation
from nft_ray.runs.folder import RunFolder
from nft_ray.types import EvalResult
from tests.examples import example_config
from tests.runs.states import learner_state

CONFIG = example_config("run.num_epochs=30")


def silent(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    """The environment of a process that reaches moto's server, which has a bucket."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        found = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        with pytest.MonkeyPatch.context() as patch:
            for name, value in found.items():
                patch.setenv(name, value)
            fsspec.filesystem("s3", use_listings_cache=False).mkdir("bucket")
        yield found
    finally:
        server.stop()


@pytest.fixture(params=["memory", "file", pytest.param("s3", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of an empty place."""
    if request.param == "s3":
        for name, value in request.getfixturevalue("s3").items():
            monkeypatch.setenv(name, value)
        return f"s3://bucket/{tmp_path.name}/runs"
    return f"memory://{tmp_path.name}/runs" if request.param == "memory" else f"file://{tmp_path}/shared/runs"


def machine(path: Path, url: str, **options: Any) -> RunFolder:
    """The run `path.name`, begun or gone on with on some machine."""
    folder = RunFolder(path, metric="geneval/strict", url=url, **options)
    folder.claim(CONFIG)
    return folder


def sent(folder: RunFolder) -> None:
    assert folder.remote is not None
    assert folder.remote.finish(folder.path, 60, silent)


def test_another_machine_goes_on_with_everything(tmp_path: Path, url: str) -> None:
    first = machine(tmp_path / "a" / "run", url)
    (first.path / "metrics.jsonl").write_text('{"epoch": 0}\n')
    for epoch in (1, 2, 3):
        first.save(epoch, learner_state(epoch))
    image = np.full((4, 4, 3), 7, dtype=np.uint8)
    save_evaluation(
        first.path, 0, EvalResult(metrics={"geneval/strict": 0.5}, counts={}, images={0: image}, seconds=1.0)
    )
    sent(first)
    second = machine(tmp_path / "b" / "run", url)
    found = second.latest()
    assert found is not None
    assert (found.epoch, second.identity) == (3, first.identity)
    np.testing.assert_array_equal(found.state.policy["lora_B"], learner_state(3).policy["lora_B"])
    assert evaluated_epochs(second.path) == [0]
    np.testing.assert_array_equal(load_evaluation(second.path, 0).images[0], image)
    assert (second.path / "metrics.jsonl").read_text() == '{"epoch": 0}\n'
    second.save(4, learner_state(4))
    sent(second)
    assert second.remote is not None
    assert second.remote.epochs() == [3, 4], "as many as the folder keeps"


def test_the_newest_of_both_places_is_used(tmp_path: Path, url: str) -> None:
    first, second = machine(tmp_path / "a" / "run", url), machine(tmp_path / "b" / "run", url)
    first.remote = None  # cut off
    first.save(5, learner_state(5))
    second.save(6, learner_state(6))
    sent(second)
    again = machine(tmp_path / "a" / "run", url)
    found = again.latest()
    assert found is not None
    assert found.epoch == 6
    again.remote = None
    again.save(7, learner_state(7))
    last = machine(tmp_path / "a" / "run", url).latest()
    assert last is not None
    assert last.epoch == 7


@pytest.mark.parametrize("what", ["changed", "cut", "no facts"])
def test_what_did_not_arrive_whole_is_not_used(
    tmp_path: Path, url: str, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = machine(tmp_path / "a" / "run", url, keep=3)
    for epoch in (1, 2):
        first.save(epoch, learner_state(epoch))
        sent(first)
    fs, root = fsspec.core.url_to_fs(f"{url}/run/checkpoints/epoch-000002")
    whole = fs.cat_file(f"{root}/policy.safetensors")
    if what == "no facts":
        fs.rm_file(f"{root}/state.json")
    else:
        fs.pipe_file(f"{root}/policy.safetensors", whole[:-4] + (b"" if what == "cut" else b"abcd"))
    found = machine(tmp_path / "b" / "run", url).latest()
    assert found is not None
    assert found.epoch == 1
    assert "checkpoint 2 of" in caplog.text


def test_the_best_stays_there_too_though_this_machine_never_had_it(tmp_path: Path, url: str) -> None:
    first = machine(tmp_path / "a" / "run", url, keep=1)
    for epoch, value in ((1, 0.9), (2, 0.1)):
        first.save(epoch, learner_state(epoch))
        metrics = {"geneval/strict": value}
        save_evaluation(first.path, epoch, EvalResult(metrics=metrics, counts={}, images={}, seconds=1.0))
        sent(first)
    second = machine(tmp_path / "b" / "run", url, keep=1)
    for epoch in (3, 4):
        second.save(epoch, learner_state(epoch))
        sent(second)
    assert second.remote is not None
    assert second.remote.epochs() == [1, 2, 4], "1 is the best of all, 2 the best that this machine has"


def test_another_run_of_the_name_is_refused_before_anything_is_written(tmp_path: Path, url: str) -> None:
    first = machine(tmp_path / "a" / "run", url)
    first.save(1, learner_state(1))
    sent(first)
    other = RunFolder(tmp_path / "b" / "run")
    other.claim(CONFIG)
    with pytest.raises(ValueError, match=r"^run\.checkpoint_url: .* holds the checkpoints of another run"):
        RunFolder(tmp_path / "b" / "run", url=url).check(CONFIG)
    with pytest.raises(ValueError, match=r"differs in: run\.seed = 0 there, 1 here"):
        RunFolder(tmp_path / "c" / "run", url=url).check(example_config("run.num_epochs=30", "run.seed=1"))
    assert not (tmp_path / "c").exists()
    begun = RunFolder(tmp_path / "b" / "run", url=url)
    begun.claim(CONFIG, overwrite=True)
    assert begun.latest() is None
    fs, root = fsspec.core.url_to_fs(url, skip_instance_cache=True)
    assert [name for path in fs.ls(root, detail=False) if ".old-" in (name := str(path).rpartition("/")[2])]


def test_who_was_replaced_sends_nothing_more(tmp_path: Path, url: str, caplog: pytest.LogCaptureFixture) -> None:
    first = machine(tmp_path / "a" / "run", url)
    machine(tmp_path / "b" / "run", url)
    first.save(1, learner_state(1))
    assert first.remote is not None
    assert not first.remote.finish(first.path, 60, silent)
    assert "writes there now" in caplog.text
    assert first.remote.epochs() == []


def slowed(monkeypatch: pytest.MonkeyPatch, put: Callable[..., Any]) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    monkeypatch.setattr(MemoryFileSystem, "put_file", put)


def test_a_save_does_not_wait_for_the_copy_and_what_is_sent_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    url, go, put = f"memory://{tmp_path.name}/runs", threading.Event(), MemoryFileSystem.put_file
    folder = machine(tmp_path / "run", url, keep=1)
    slowed(monkeypatch, lambda self, *of, **more: (go.wait(30), put(self, *of, **more))[1])
    started = time.monotonic()
    for epoch in (1, 2, 3):
        folder.save(epoch, learner_state(epoch))
        while epoch == 1 and folder.remote is not None and folder.remote.sending is None:
            time.sleep(0.01)
    assert time.monotonic() - started < 15
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["epoch-000001", "epoch-000003"]
    assert folder.remote is not None
    assert not folder.remote.finish(folder.path, 0.05, silent)
    go.set()
    sent(folder)
    assert folder.remote.epochs() == [1, 3], "2 was overtaken"
    folder.save(4, learner_state(4))
    sent(folder)
    assert folder.remote.epochs() == [4]


def test_a_storage_that_fails_is_one_line_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise OSError("503 Slow\nDown")

    folder = machine(tmp_path / "run", f"memory://{tmp_path.name}/runs")
    with monkeypatch.context() as patch:
        slowed(patch, away)
        folder.save(1, learner_state(1))
        assert folder.remote is not None
        assert not folder.remote.finish(folder.path, 60, silent)
    first = caplog.records[0].getMessage()
    assert "checkpoint epoch-000001 did not reach memory" in first
    assert "503 Slow Down; it is kept here, the next one is sent" in first
    folder.save(2, learner_state(2))
    sent(folder)
    assert 2 in folder.remote.epochs()


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("s3://user:hunter2@bucket/x", r"^run\.checkpoint_url = s3://\.\.\.@bucket: holds a password"),
        ("nosuch://bucket", r"^run\.checkpoint_url = nosuch://bucket: .*nosuch"),
        ("gs://bucket/x", r"^run\.checkpoint_url = gs://bucket/x: .*pip install --constraint constraints\.txt"),
    ],
)
def test_a_url_that_cannot_be_used_is_one_line(tmp_path: Path, url: str, line: str) -> None:
    with pytest.raises(ValueError, match=line) as refused:
        RunFolder(tmp_path / "run", url=url)
    assert "\n" not in str(refused.value)
    assert "hunter2" not in str(refused.value)


@pytest.mark.slow
def test_a_storage_that_does_not_answer_is_one_line_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: dict[str, str]
) -> None:
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(ValueError, match=r"^run\.checkpoint_url: s3://bucket/y/run does not answer: ") as refused:
        RunFolder(tmp_path / "run", url="s3://bucket/y").check(CONFIG)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_the_owner_is_said(tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/runs"
    machine(tmp_path / "run", url)
    fs, root = fsspec.core.url_to_fs(url)
    assert {"host", "pid", "since"} <= json.loads(fs.cat_file(f"{root}/run/{module.OWNER}")).keys()


def test_a_run_that_goes_back_gives_up_the_newer_ones_there_too(tmp_path: Path, url: str) -> None:
    first = machine(tmp_path / "a" / "run", url, keep=3)
    for epoch in (10, 11, 12):
        first.save(epoch, learner_state(epoch))
        sent(first)
    save_evaluation(first.path, 12, EvalResult(metrics={}, counts={}, images={}, seconds=1.0))
    sent(first)
    first.drop_after(10)
    assert first.remote is not None
    assert first.remote.epochs() == [10]
    second = machine(tmp_path / "b" / "run", url)
    found = second.latest()
    assert found is not None
    assert found.epoch == 10
    assert evaluated_epochs(second.path) == []
    fs, root = fsspec.core.url_to_fs(f"{url}/run/checkpoints/epoch-000012.beyond")
    assert {"state.json", "policy.safetensors"} <= {str(path).rpartition("/")[2] for path in fs.ls(root, detail=False)}


def test_what_is_given_up_while_it_is_sent_or_waits_never_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    url, go, put = f"memory://{tmp_path.name}/runs", threading.Event(), MemoryFileSystem.put_file
    folder = machine(tmp_path / "run", url, keep=3)
    folder.save(10, learner_state(10))
    sent(folder)
    slowed(monkeypatch, lambda self, *of, **more: (go.wait(30), put(self, *of, **more))[1])
    monkeypatch.setattr(module, "DROP_S", 0.05)
    assert folder.remote is not None
    folder.save(11, learner_state(11))
    while folder.remote.sending is None:
        time.sleep(0.01)
    folder.save(12, learner_state(12))
    folder.drop_after(10)
    assert "still has what came after epoch 10" in caplog.text
    go.set()
    sent(folder)
    assert folder.remote.epochs() == [10]
    assert "did not reach" not in caplog.text, "nobody misses what was given up"


def test_what_a_kill_kept_from_the_copy_is_sent_by_the_next_start(tmp_path: Path, url: str) -> None:
    first = machine(tmp_path / "a" / "run", url)
    first.save(29, learner_state(29))
    sent(first)
    first.remote = None  # killed between the save and the copy
    first.save(30, learner_state(30))
    again = machine(tmp_path / "a" / "run", url)
    sent(again)
    assert again.remote is not None
    assert again.remote.epochs() == [29, 30]
    assert again.is_sent()
    found = machine(tmp_path / "b" / "run", url).latest()
    assert found is not None
    assert found.epoch == 30


def test_what_is_there_is_not_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"memory://{tmp_path.name}/runs"
    first = machine(tmp_path / "run", url)
    first.save(1, learner_state(1))
    assert not RunFolder(tmp_path / "run", url=f"memory://{tmp_path.name}/elsewhere").is_sent()
    sent(first)
    with monkeypatch.context() as patch:
        patch.setattr(module.Remote, "put", lambda *_: pytest.fail("it is there"))
        assert machine(tmp_path / "run", url).is_sent()
    first.remote = None
    first.save(1, learner_state(7))  # of an epoch that was trained again
    assert not RunFolder(tmp_path / "run", url=url).is_sent()


def test_the_last_one_is_owed_until_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A storage that was away when it was sent is back when the run ends: its small files are not all it gets."""

    def away(*_: Any, **__: Any) -> None:
        raise OSError("503 Slow Down")

    folder = machine(tmp_path / "run", f"memory://{tmp_path.name}/runs")
    assert folder.remote is not None
    with monkeypatch.context() as patch:
        slowed(patch, away)
        folder.save(1, learner_state(1))
        assert not folder.remote.finish(folder.path, 60, silent)
    sent(folder)
    assert folder.is_sent()


def test_another_machine_ends_where_it_is_told_to(tmp_path: Path, url: str) -> None:
    """Ten epochs instead of twenty: the tenth is there, and comes."""
    first = machine(tmp_path / "a" / "run", url)
    for epoch in (10, 20):
        first.save(epoch, learner_state(epoch))
        sent(first)
    for where in ("b", "a"):
        shorter = RunFolder(tmp_path / where / "run", metric="geneval/strict", url=url)
        shorter.check(example_config("run.num_epochs=10"))
        shorter.claim(example_config("run.num_epochs=10"))
        found = shorter.latest()
        assert found is not None
        assert found.epoch == 10
        assert shorter.remote is not None
        assert shorter.remote.epochs() == [10, 20]
        assert shorter.finished() == 10
