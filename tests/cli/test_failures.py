"""One line for every failure, whose status says whether it helps to try again, and a traceback that can be found."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nft_ray.cli import failures, main
from nft_ray.cli.failures import NOISY, RunLog, explained, log_to
from nft_ray.roles import ObjectsLostError, RewardError, TryAgainError

BUG = "a fault of nft_ray"


@pytest.fixture(autouse=True)
def no_log_stays() -> Iterator[None]:
    """What `log_to` attaches belongs to the process."""
    yield
    for logger in (logging.getLogger(), *map(logging.getLogger, NOISY)):
        for handler in [one for one in logger.handlers if isinstance(one, RunLog)]:
            logger.removeHandler(handler)
            handler.close()


@pytest.fixture
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(failures.tempfile, "tempdir", str(tmp_path))
    return tmp_path


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:  # noqa: BLE001  to have a traceback
        return caught


def test_a_users_mistake_is_its_own_message() -> None:
    assert explained(raised(ValueError("run.name = 'x':\n  no"))) == ("nft-ray: run.name = 'x': no", 1)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("no signal"), 1),
        (OSError("the disk is full"), 1),
        (TryAgainError("the cluster is gone"), 75),
        (ObjectsLostError("the images are lost"), 75),
        (ExceptionGroup("two", [TryAgainError("the cluster is gone"), ValueError("x")]), 75),
    ],
)
def test_the_status_says_whether_to_try_again(error: Exception, status: int) -> None:
    line, found = explained(raised(error))
    assert found == status
    assert BUG not in line


def test_what_a_failure_came_from_counts() -> None:
    error = RuntimeError("rollout failed on 3 workers")
    error.__cause__ = TryAgainError("no answer within 600 s")
    assert explained(raised(error))[1] == 75


@pytest.mark.parametrize("error", [AssertionError(), TypeError("NoneType is not iterable"), KeyError("a\nb")])
def test_a_fault_of_ours_is_one_line_and_its_traceback_a_file(error: Exception, temp: Path) -> None:
    line, status = explained(raised(error))
    (file,) = temp.glob("nft-ray-*.txt")
    assert status == 1
    assert "\n" not in line
    assert line.startswith(f"nft-ray: {type(error).__name__}")
    assert BUG in line
    assert str(file) in line
    assert "in raised" in file.read_text()


def test_a_damaged_file_is_no_fault_of_ours(temp: Path) -> None:
    from safetensors import SafetensorError

    line, status = explained(raised(SafetensorError("Error while deserializing header: HeaderTooLarge")))
    assert line.startswith("nft-ray: SafetensorError: Error while deserializing header")
    assert BUG not in line
    assert status == 1


def test_what_is_kept_stands_at_the_end_and_the_traceback_in_the_runs_log(tmp_path: Path) -> None:
    log_to(tmp_path)
    error = raised(RuntimeError("25% of the samples miss a reward"))
    error.add_note("epoch 3 is kept in runs/x/checkpoints/epoch-000003")
    line, _ = explained(error)
    assert line == ("nft-ray: 25% of the samples miss a reward; epoch 3 is kept in runs/x/checkpoints/epoch-000003")
    assert "in raised" in (tmp_path / "log.txt").read_text()


def test_a_reward_that_raised_is_named_and_is_no_fault_of_ours(tmp_path: Path) -> None:
    log_to(tmp_path)
    error = RewardError("reward flaky: KeyError: 'x' (flaky.py:7)")
    error.__cause__ = raised(KeyError("x"))
    line, status = explained(raised(error))
    assert line == f"nft-ray: {error}; the traceback is in {tmp_path / 'log.txt'}"
    assert status == 1
    assert "KeyError: 'x'" in (tmp_path / "log.txt").read_text()


def test_rays_errors_are_one_line_each() -> None:
    from ray.exceptions import ActorDiedError, ObjectStoreFullError, OutOfDiskError, RayTaskError

    line, status = explained(raised(ActorDiedError()))
    assert line.startswith("nft-ray: Ray: ActorDiedError: The actor died")
    assert status == 75
    disk, status = explained(raised(OutOfDiskError("a\nlong\nstory")))
    assert "the disk of a node is full" in disk
    assert status == 1
    assert "the object store of a node is full" in explained(raised(ObjectStoreFullError()))[0]
    wrapped = RayTaskError("rollout", "Traceback ...\n" * 9, ValueError("prompt 0 has no tag")).as_instanceof_cause()
    assert explained(raised(wrapped)) == ("nft-ray: prompt 0 has no tag", 1)


def test_the_log_has_what_the_screen_has_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failures.quiet()
    log_to(tmp_path)
    logging.getLogger("asyncio").error("Task exception was never retrieved")
    assert "never retrieved" in (tmp_path / "log.txt").read_text()
    assert capsys.readouterr().err == ""


def test_the_log_follows_the_run(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        log_to(tmp_path / name)
        logging.getLogger("nft_ray").warning("of %s", name)
    assert "of b" in (tmp_path / "b" / "log.txt").read_text()
    assert "of b" not in (tmp_path / "a" / "log.txt").read_text()


def test_any_exception_of_a_command_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], temp: Path
) -> None:
    def broken(args: object) -> int:
        raise AssertionError("rank 0 gave no state")

    monkeypatch.setitem(main.PARSED, "rewards", broken)
    assert main.main(["rewards", "status"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nft-ray: AssertionError: rank 0 gave no state")


def test_after_the_last_line_there_is_nothing(tmp_path: Path) -> None:
    """A task that nobody waits for any more, as Serve's routers leave them, tells its story at the very end."""
    code = """
import asyncio, sys
from nft_ray.cli import main
def leaves_one(args):
    async def fails():
        raise RuntimeError("a replica was stopped")
    loop = asyncio.new_event_loop()
    sys.modules["kept"] = task = loop.create_task(fails())
    loop.run_until_complete(asyncio.wait([task], timeout=1))
    raise RuntimeError("25% of the samples miss a reward")
main.PARSED["rewards"] = leaves_one
status = main.main(["rewards", "status"])
del sys.modules["kept"]
sys.exit(status)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["nft-ray: 25% of the samples miss a reward"]
