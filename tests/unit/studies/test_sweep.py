"""What a worker does about others: those that are lost, those that only seem so, and those that took its trial over."""

from __future__ import annotations

import fcntl
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import optuna
import pytest

from image_classifier.errors import RunError, SettingsError
from image_classifier.reporter import Reporter
from image_classifier.settings import RunSettings
from image_classifier.studies.plan import Plan
from image_classifier.studies.space import Parameter, Space
from image_classifier.studies.storage import Storage, parse_storage
from image_classifier.studies.sweep import MAX_LOST, Work, Worker, find_start, judge
from tests.tiny import make_settings, write_tiny_dataset

SPACE = Space((Parameter(name="momentum", choices=(0.5, 0.9)),))
ELSEWHERE = {"host": "another machine", "pid": 1, "started": "1", "name": "other"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny", num_train=60, num_test=20)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(parse_storage(None, tmp_path / "tiny"), "tiny")


def make_worker(storage: Storage, dataset: Path, tmp_path: Path, grace_s: float = 60, **reporting: Any) -> Worker:
    def build(values: Mapping[str, Any], run_name: str) -> RunSettings:
        settings = make_settings(tmp_path, dataset, run_name, num_epochs=2, validation_fraction=0.2, **values)
        return make_settings(
            tmp_path,
            dataset,
            run_name,
            **values,
            num_epochs=2,
            validation_fraction=0.2,
            resume=settings.run_folder.exists(),
        )

    work = Work(
        plan=Plan(SPACE, "grid", "none", 0, 1, 2),
        num_trials=1,
        max_failures=0,
        identity={"space": SPACE.describe()},
        allowed=(),
        build_settings=build,
        **{"open_reporter": lambda settings: nullcontext(Reporter()), **reporting},
    )
    return Worker(storage, work, beat_s=0.05, grace_s=grace_s)


def give_to(storage: Storage, worker: dict[str, Any] | None, beat: int = 0, num_lost: int = 0) -> None:
    """Let a worker have taken the first trial."""

    def change(study: optuna.Study) -> None:
        entry: dict[str, Any] = {"labels": {"momentum": 0.5}, "worker": worker, "beat": beat, "num_lost": num_lost}
        entry |= {"accuracies": [], "started_at": "2026-01-02T03:04:05", "result": None}
        study.set_user_attr("sweep", {"space": SPACE.describe()})
        study.set_user_attr("running", {"0": entry})

    storage.change(change)


@contextmanager
def beside(work: Callable[[], None]) -> Iterator[None]:
    thread = threading.Thread(target=work)
    thread.start()
    yield
    thread.join()


def test_a_worker_elsewhere_is_lost_when_it_gives_no_sign_of_life(
    storage: Storage, dataset: Path, tmp_path: Path
) -> None:
    """While it does, its trial is left to it, however long that takes."""
    give_to(storage, ELSEWHERE)
    lived: list[float] = []

    def live() -> None:
        for beat in range(1, 9):
            time.sleep(0.25)
            assert not (tmp_path / "tiny" / "trial-0000").exists()
            give_to(storage, ELSEWHERE, beat)
        lived.append(time.monotonic())

    with beside(live):
        (trial,) = make_worker(storage, dataset, tmp_path, grace_s=1).run()
    assert trial.state.name == "COMPLETE" and time.monotonic() - lived[0] > 1


def test_a_worker_that_still_trains_is_waited_for(storage: Storage, dataset: Path, tmp_path: Path) -> None:
    give_to(storage, None)
    folder = tmp_path / "tiny" / "trial-0000"
    folder.mkdir(parents=True)
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    seen: list[list[str]] = []

    def train() -> None:
        time.sleep(1)
        seen.append(os.listdir(folder))
        os.close(descriptor)

    with beside(train):
        (trial,) = make_worker(storage, dataset, tmp_path).run()
    assert seen == [[]] and trial.state.name == "COMPLETE"


def test_a_worker_whose_trial_was_taken_over_leaves_it(storage: Storage, dataset: Path, tmp_path: Path) -> None:
    taken: list[int] = []

    class Thief(Reporter):
        def epoch(self, line: dict[str, Any]) -> None:
            if not taken:
                give_to(storage, ELSEWHERE)
                taken.append(line["step"])
                time.sleep(0.5)  # in which the worker hears of it

    worker = make_worker(storage, dataset, tmp_path, grace_s=1, open_reporter=lambda settings: nullcontext(Thief()))
    started = time.monotonic()
    (trial,) = worker.run()
    assert taken and time.monotonic() - started > 1  # it was given up, and taken again when its thief was lost
    assert trial.state.name == "COMPLETE" and len(trial.intermediate_values) == 2


def test_a_trial_that_loses_all_its_workers_fails(storage: Storage, dataset: Path, tmp_path: Path) -> None:
    process = {"host": "", "pid": 2**22 + 1, "started": "1", "name": "killed"}
    worker = make_worker(storage, dataset, tmp_path)
    process["host"] = worker._id["host"]
    give_to(storage, process, num_lost=MAX_LOST)
    with pytest.raises(RunError, match=f"{MAX_LOST + 1} workers were lost before an epoch was done"):
        worker.run()


def test_what_was_claimed_and_not_heard_of_is_claimed_again(storage: Storage, dataset: Path, tmp_path: Path) -> None:
    """As where the connection is lost after the claim was written."""
    worker = make_worker(storage, dataset, tmp_path)
    storage.change(worker._join)
    _, first = storage.change(worker._take)
    _, again = storage.change(worker._take)
    assert first and again and (first.number, first.labels, 0) == (again.number, again.labels, again.num_lost)


def test_a_study_of_others_is_refused(storage: Storage, dataset: Path, tmp_path: Path) -> None:
    storage.change(lambda study: study.add_trial(optuna.create_trial(value=1.0)))
    with pytest.raises(SettingsError, match="has a study 'tiny' that is not a sweep of this package"):
        make_worker(storage, dataset, tmp_path).run()


def test_a_process_is_known_by_its_start() -> None:
    assert find_start(os.getpid()) == find_start(os.getpid()) is not None
    assert find_start(2**22 + 1) is None
    with subprocess.Popen(["true"]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert find_start(child.pid) is None  # it has ended, and nobody has asked for its status


def test_what_is_judged_are_the_weights_that_are_kept() -> None:
    assert judge([0.1, 0.5, 0.3], "last") == 0.3
    assert judge([0.1, 0.5, 0.3], "best") == 0.5
