"""One Ray and one undisturbed LoRA that several scenarios share, and the table at the end.

CHAOS_TABLE=FILE    where `make chaos` wants the table; FILE.rows holds its lines while the suite runs
"""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.cluster import Cluster
from tests.chaos.running import Run
from tests.chaos.table import Table, markdown
from tests.command_line import nft_ray_here, sets
from tests.examples import QUICKSTART

WANTED = os.environ.get("CHAOS_TABLE", "")
ROWS = Path(f"{WANTED}.rows")
"""Of all processes (`-n 2`) together."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here is `chaos`; what is not also `slow` is of the quick half, which is slow, too."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("chaos")
            item.add_marker(pytest.mark.timeout(900))  # five injections, on a machine that does other things, too


def pytest_sessionstart() -> None:
    """What a test has started ends with it, also when the whole suite is told to stop."""
    if WANTED and "PYTEST_XDIST_WORKER" not in os.environ:
        ROWS.unlink(missing_ok=True)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: pytest.exit("SIGTERM", 143))


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return Table(ROWS if WANTED else tmp_path_factory.mktemp("table") / "rows")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not WANTED or "PYTEST_XDIST_WORKER" in os.environ or not (rows := Table(ROWS).rows()):
        return
    text = markdown(rows)
    terminalreporter.write_line(f"\n{text}")
    Path(WANTED).write_text(text)
    ROWS.unlink()


MOST_EPOCHS = 500


class Calm:
    """Runs that nothing happens to, one per kind in a session: what the others' checkpoints must be, bit for bit."""

    def __init__(self, folder: Path, table: Table) -> None:
        self._folder, self._table = folder, table
        self._runs: dict[tuple[str, ...], Run] = {}

    def run(self, epochs: int, *settings: str) -> Run:
        """In one process, which has the bits of Ray with one learner; it goes on where it has fewer epochs so far."""
        run = self._of(None, "learner.num_workers=1", *settings)
        if run.epoch < epochs:
            more = sets(*run.settings, f"run.num_epochs={epochs}")
            done = nft_ray_here("train", str(QUICKSTART), "--local", *more, runs=run.runs)
            assert done.returncode == 0, done.stderr
        return run

    def run_on(self, ray: Cluster, epochs: int, *settings: str) -> Run:
        """The same through Ray, for more learners than one."""
        run = self._of(ray.environment, *settings)
        if run.epoch < epochs:
            assert run.on(ray.environment).start(f"run.num_epochs={epochs}").end() == 0, run.said[-3000:]
        return run

    def _of(self, ray: dict[str, str] | None, *settings: str) -> Run:
        if settings not in self._runs:
            kept = f"run.keep_checkpoints={MOST_EPOCHS}"
            self._runs[settings] = Run(f"calm-{len(self._runs)}", self._folder, self._table, ray, kept, *settings)
        return self._runs[settings]


class Scenarios:
    """Makes runs in a folder of the test's own, and ends them with it."""

    def __init__(self, folder: Path, table: Table) -> None:
        self.folder, self.table = folder, table
        self.runs: list[Run] = []

    def run(self, name: str, ray: Cluster | None, *settings: str, mlflow: bool = False) -> Run:
        """One learner, unless `settings` say otherwise."""
        environment = ray.environment if ray else None
        chosen = ("learner.num_workers=1", *settings)
        run = Run(name, self.folder, self.table, environment, *chosen, mlflow=mlflow)
        self.runs.append(run)
        return run


@pytest.fixture(scope="session")
def calm(table: Table, tmp_path_factory: pytest.TempPathFactory) -> Calm:
    return Calm(tmp_path_factory.mktemp("calm"), table)


@pytest.fixture
def scenarios(tmp_path: Path, table: Table) -> Iterator[Scenarios]:
    made = Scenarios(tmp_path, table)
    yield made
    for run in made.runs:
        run.kill()


class Shared:
    """A head and a node `a`, of 8 logical CPUs each, for as long as they are as they were."""

    def __init__(self) -> None:
        self._now: Cluster | None = None

    def get(self) -> Cluster:
        """The one that runs; another one where a test that failed has left something on it."""
        if self._now is not None and not self._usable(self._now):
            self.end()
        if self._now is None:
            self._now = Cluster()
            self._now.add("a")
        return self._now

    def end(self) -> None:
        if self._now is not None:
            self._now.end()
        self._now = None

    def _usable(self, one: Cluster) -> bool:
        try:
            one.nothing_left(5)
        except (AssertionError, OSError):
            return False
        return len(one.alive_nodes()) == 2 and not list(one.faults.glob("[!h]*"))


@pytest.fixture(scope="session")
def shared() -> Iterator[Shared]:
    one = Shared()
    yield one
    one.end()


@pytest.fixture
def ray_cluster(shared: Shared) -> Cluster:
    """Of several tests, which leave it as it was."""
    return shared.get()
