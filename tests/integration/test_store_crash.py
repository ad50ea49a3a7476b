"""The MLflow store's first use, killed or out of space at any moment: the next one finds a store that it can use.

As in `tests/crash.py` the victims are forked from a process that has imported what takes long and opened nothing.
"""

from __future__ import annotations

import errno
import importlib
import logging
import multiprocessing
import os
import random
import resource
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from image_classifier.errors import ImageClassifierError
from image_classifier.storage import TEMPORARY_PREFIX, FaultyDisk
from image_classifier.tracking.store import EMBEDDED, Store
from tests.crash import Child, call, check_no_other_thread, kill_process

NUM_KILLS = 50
NUM_KILLS_IN_PLACE = 12
_FILE = Path("experiments") / EMBEDDED / "mlflow.db"


def prepare() -> None:
    """Import what MLflow imports when it makes a database."""
    for name in ("mlflow", "alembic.command", "mlflow.store.tracking.sqlalchemy_store"):
        importlib.import_module(name)
    logging.disable(logging.WARNING)
    check_no_other_thread()


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OPENBLAS_NUM_THREADS", "1")
        environment.setenv("JE_ARROW_MALLOC_CONF", "background_thread:false")  # of pyarrow, which MLflow imports
        with ProcessPoolExecutor(len(os.sched_getaffinity(0)), context, prepare) as pool:
            yield pool


def use(top: Path, uri: str | None, disk: FaultyDisk | None = None) -> list[tuple[str, Path]]:
    """Use a store as `registry list` and a training do; return the calls to the disk."""
    os.chdir(top)
    disk = disk or FaultyDisk(kill_process, 0)
    store = Store(uri, Path("experiments"), disk)
    with store.open("list the models") as client:
        assert list(client.search_registered_models()) == []
        store.get_experiment_id("an experiment")
    return disk.calls


def use_killed(top: Path, uri: str | None, at_call: int) -> None:
    use(top, uri, FaultyDisk(kill_process, at_call, partly=True))


def use_in_place(top: Path, uri: str | None) -> None:
    """Use a store as before it was made beside its place: MLflow alone."""
    os.chdir(top)
    _FILE.parent.mkdir(parents=True)
    address = uri or f"sqlite:///{_FILE.resolve()}"
    importlib.import_module("mlflow").MlflowClient(address, address).search_registered_models()


def check_use(top: Path, uri: str | None) -> None:
    """Use a store, and see that it is whole and that nothing is left beside it."""
    call(use, top, uri)
    path = top / _FILE if uri is None else Path(uri.removeprefix("sqlite:///"))
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("SELECT count(*) FROM experiments").fetchone() == (2,)
    assert sorted(entry.name for entry in path.parent.iterdir() if entry.name != ".lock") == [path.name]
    assert not list(top.rglob(f"{TEMPORARY_PREFIX}*")) and not (top / "mlruns").exists()


def kill_at_moments(function: Callable[..., Any], top: Path, kind: str, num_trials: int, seed: int) -> tuple[int, int]:
    """Kill first uses at random moments, and use each store afterwards; return how many were killed, and were begun."""
    top.mkdir()
    (top / "whole").mkdir()
    started = time.perf_counter()
    call(function, top / "whole", build_uri(top / "whole", kind))
    longest_s = time.perf_counter() - started
    chance = random.Random(seed)
    num_killed, num_begun, number = 0, 0, 0
    while num_killed < num_trials:
        number += 1
        folder = top / str(number)
        folder.mkdir()
        victim = Child(function, folder, build_uri(folder, kind))
        time.sleep(chance.uniform(0, longest_s))
        os.kill(victim.pid, signal.SIGKILL)
        status, answer = victim.wait()
        assert status in (0, -signal.SIGKILL), answer
        num_killed += status != 0
        num_begun += any(path.name.startswith((TEMPORARY_PREFIX, "mlflow.db")) for path in folder.rglob("*"))
        check_use(folder, build_uri(folder, kind))
    return num_killed, num_begun


def build_uri(folder: Path, kind: str) -> str | None:
    return None if kind == "embedded" else f"sqlite:///{folder}/team/mlflow.db"


@pytest.mark.parametrize("kind", ["embedded", "sqlite"])
def test_a_first_use_killed_at_random_moments_leaves_a_store_that_can_be_used(
    kind: str, pool: ProcessPoolExecutor, tmp_path: Path
) -> None:
    share = NUM_KILLS // 4 + 1
    trials = [pool.submit(kill_at_moments, use, tmp_path / str(seed), kind, share, seed) for seed in range(2)]
    counts = [trial.result() for trial in trials]
    assert sum(num_killed for num_killed, _ in counts) >= NUM_KILLS // 2
    assert all(num_begun > share // 3 for _, num_begun in counts), "hardly any was killed while it made the file"


def test_what_was_begun_in_its_place_is_made_anew(pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    """By a version that let MLflow make the file where it lies: one in three such stores could never be used again."""
    share = NUM_KILLS_IN_PLACE // 2
    trials = [
        pool.submit(kill_at_moments, use_in_place, tmp_path / str(seed), "embedded", share, seed) for seed in range(2)
    ]
    assert sum(trial.result()[0] for trial in trials) >= NUM_KILLS_IN_PLACE


def try_each_call(top: Path, kind: str, what: Callable[[Path, str | None, int], None]) -> int:
    (top / "whole").mkdir(parents=True)
    calls = call(use, top / "whole", build_uri(top / "whole", kind))
    for number in range(1, len(calls) + 1):
        folder = top / str(number)
        folder.mkdir()
        what(folder, build_uri(folder, kind), number)
        check_use(folder, build_uri(folder, kind))
    return len(calls)


def kill_at_call(folder: Path, uri: str | None, number: int) -> None:
    assert Child(use_killed, folder, uri, number).wait()[0] == -signal.SIGKILL


def refuse() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def use_refused(folder: Path, uri: str | None, number: int) -> tuple[str, bool]:
    disk = FaultyDisk(refuse, number)
    message = ""
    try:
        use(folder, uri, disk)
    except ImageClassifierError as error:
        message = str(error)
    return message, disk.calls[-1][0] == "remove"


def refuse_call(folder: Path, uri: str | None, number: int) -> None:
    message, at_removal = call(use_refused, folder, uri, number)
    if not at_removal:  # of the emptied folder, which hinders nobody
        assert "mlflow.db: No space left on device; free some space" in message and "\n" not in message
    assert not list(folder.rglob(f"{TEMPORARY_PREFIX}*"))


@pytest.mark.parametrize(("kind", "what"), [("embedded", kill_at_call), ("sqlite", refuse_call)])
def test_a_first_use_that_ends_at_any_call_to_the_disk_leaves_a_store_that_can_be_used(
    kind: str, what: Callable[[Path, str | None, int], None], pool: ProcessPoolExecutor, tmp_path: Path
) -> None:
    assert pool.submit(try_each_call, tmp_path / "trials", kind, what).result() >= 5


def use_limited(folder: Path, size: int) -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    with pytest.raises(ImageClassifierError) as caught:
        use(folder, None)
    return str(caught.value)


def try_limits(top: Path) -> list[str]:
    messages = []
    for size in (0, 5_000, 100_000, 300_000):
        folder = top / str(size)
        folder.mkdir()
        messages.append(call(use_limited, folder, size))
        assert not list(folder.rglob("mlflow.db*")) and not list(folder.rglob(f"{TEMPORARY_PREFIX}*"))
        check_use(folder, None)
    return messages


def test_a_first_use_without_room_is_one_line_and_leaves_nothing(pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    for message in pool.submit(try_limits, tmp_path).result():
        assert "\n" not in message and "free some space, or check the disk" in message, message


# What is not made anew.


def fill(top: Path, statement: str) -> None:
    """Put something into a whole store, and then break it as a killed migration would."""
    call(use, top, None)
    with closing(sqlite3.connect(top / _FILE)) as connection:
        connection.executescript(statement)
        connection.execute("DELETE FROM alembic_version")
        connection.commit()


def use_broken(top: Path) -> str:
    with pytest.raises(ImageClassifierError) as caught:
        use(top, None)
    return str(caught.value)


def try_kept(top: Path) -> list[str]:
    messages = []
    for number, statement in enumerate(
        (
            "INSERT INTO registered_models (name, workspace) VALUES ('ours', 'default')",
            "INSERT INTO experiments (experiment_id, name) VALUES (7, 'ours')",
            "CREATE TABLE ours (x)",
        )
    ):
        folder = top / str(number)
        folder.mkdir()
        fill(folder, statement)
        content = (folder / _FILE).read_bytes()
        messages.append(call(use_broken, folder))
        with closing(sqlite3.connect(folder / _FILE)) as connection:
            names = str(connection.execute("SELECT name FROM sqlite_master").fetchall())
            rows = [connection.execute(f"SELECT name FROM {table}") for table in ("registered_models", "experiments")]
            assert "ours" in names + str([row.fetchall() for row in rows]), len(content)
    return messages


def test_a_broken_store_that_holds_something_is_kept_and_named(pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    for message in pool.submit(try_kept, tmp_path).result():
        assert "mlflow.db" in message and "\n" not in message
