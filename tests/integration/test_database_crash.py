"""Ingests that are killed, and the database server under them: nothing acknowledged is lost, nothing is there twice."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from image_classifier.access import DatabaseAccess
from image_classifier.credentials import Secret
from image_classifier.data.database import find_dataset, load_version_snapshot
from image_classifier.data.dataset import load_snapshot
from image_classifier.data.ingest import Listener, ingest
from image_classifier.data.revision import open_database, upgrade_database
from image_classifier.errors import DatabaseError
from image_classifier.references import Reference
from tests.crash import Campaign, Child, call
from tests.databases import Home, make_home_in, write_source
from tests.postgres import PASSWORD, Cluster

NUM_IMAGES = 60
NUM_TRIALS = 50
"""A promise of the project: at least 50 kills of each kind."""


@dataclass(frozen=True)
class Trial:
    """An ingest of a trial's own, and where it notes how many images were acknowledged."""

    source: Path
    config: Path | None
    dataset_folder: Path
    name: str
    notes: Path

    @property
    def access(self) -> DatabaseAccess:
        """The way to the database; a password cannot be handed to another process."""
        return DatabaseAccess(config=self.config, password=Secret(PASSWORD), dataset_folder=self.dataset_folder)

    def read_acknowledged(self) -> int:
        """Read how many images were acknowledged so far."""
        return self.notes.stat().st_size if self.notes.exists() else 0


def ingest_and_note(trial: Trial) -> str:
    """Ingest in tiny chunks, noting each that was acknowledged by a byte an image; return the version's digest."""
    descriptor = os.open(trial.notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    class Notes(Listener):
        def commit(self, num_images: int) -> None:
            os.write(descriptor, b"." * num_images)

    try:
        return ingest(trial.source, trial.name, trial.access, chunk_size=3, listener=Notes()).version.digest
    finally:
        os.close(descriptor)


def count_images(trial: Trial) -> tuple[int, int]:
    """Count the images of a data set, and the different ones among them; none if it was not even begun."""
    try:
        with open_database(trial.access) as database:
            dataset = find_dataset(database, trial.name)
            query = "SELECT count(*), count(DISTINCT digest) FROM samples WHERE dataset_id = :id"
            with database.reading() as connection:
                images, different = connection.execute(text(query), {"id": dataset.id}).one()
                return images, different
    except DatabaseError as error:
        assert any(words in str(error) for words in ("there is no database", "no tables", "no data set")), error
        return 0, 0


def finish(trial: Trial, digest: str) -> int:
    """Examine what a kill left, ingest again, and assert that all is there once; return how many images it left."""
    left, different = count_images(trial)
    acknowledged = trial.read_acknowledged()
    assert acknowledged <= left <= NUM_IMAGES and left == different, (acknowledged, left, different)
    result = ingest(trial.source, trial.name, trial.access)
    assert (result.added.num_present, result.added.num_added) == (left, NUM_IMAGES - left)
    assert count_images(trial) == (NUM_IMAGES, NUM_IMAGES)
    assert result.version.digest == digest == load_version_snapshot(Reference(trial.name), trial.access).digest
    return left


def measure_unharmed(trial: Trial, digest: str) -> float:
    """Ingest without a kill, in a child; return the seconds from its start."""
    started = time.perf_counter()
    assert call(ingest_and_note, trial) == digest
    seconds = time.perf_counter() - started
    assert trial.read_acknowledged() == NUM_IMAGES
    return seconds


def kill_and_finish(trials: list[Trial], digest: str, seed: int, longest_s: float) -> int:
    """Kill an ingest at a random moment, anew where it came too late; then as `finish` says.

    Odd seeds wait for a random number of acknowledged images first: on a quick machine few moments are between chunks.
    """
    generator = random.Random(seed)
    by_progress = seed % 2 == 1
    for trial in trials:
        victim = Child(ingest_and_note, trial)
        if by_progress:
            goal = generator.randrange(NUM_IMAGES)
            while trial.read_acknowledged() < goal and not victim.has_ended():
                time.sleep(0.0005)
        time.sleep(generator.uniform(0, longest_s / 20 if by_progress else longest_s))
        os.kill(victim.pid, signal.SIGKILL)
        status, answer = victim.wait()
        if status == -signal.SIGKILL:
            left: int = call(finish, trial, digest)
            return left
        assert status == 0, answer
    raise AssertionError("every kill came too late")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"), num_train=48, num_test=12)


def make_trial(home: Home, source: Path, folder: Path, number: int) -> Trial:
    """Make a data set's name of its own, and in SQLite a file of its own."""
    dataset_folder = folder / f"home-{number}"
    dataset_folder.mkdir()
    return Trial(source, home.access.config, dataset_folder, f"trial-{number}", folder / f"notes-{number}")


def test_an_ingest_killed_at_random_moments_loses_and_doubles_nothing(
    campaign: Campaign, home: Home, source: Path, tmp_path: Path
) -> None:
    if home.cluster:
        upgrade_database(home.access)
    digest = load_snapshot(source).digest
    trials = (make_trial(home, source, tmp_path, number) for number in range(10**6))
    longest_s = min(campaign.submit(measure_unharmed, next(trials), digest).result() for _ in range(3))
    futures: list[Future[Any]] = [
        campaign.submit(kill_and_finish, [next(trials) for _ in range(20)], digest, seed, longest_s)
        for seed in range(NUM_TRIALS)
    ]
    left = [future.result() for future in futures]
    assert len(left) == NUM_TRIALS
    assert len(set(left)) > 5, f"all were killed in one and the same part of the ingest: {left}"


@pytest.fixture(scope="module")
def mortal() -> Iterator[Cluster]:
    """A server that may be killed."""
    cluster = Cluster("-cfsync=off")  # what a killed process wrote, the kernel has: to sync it takes seconds a restart
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.remove()


def test_a_server_killed_at_random_moments_loses_and_doubles_nothing(
    campaign: Campaign, mortal: Cluster, source: Path, tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir()
    home = make_home_in(mortal, tmp_path, tmp_path / "home")
    assert home.access.config is not None
    mortal.write_config(home.access.config, home.database, num_tries=20)  # a restart may take long on a busy disk
    upgrade_database(home.access)
    digest = load_snapshot(source).digest
    generator = random.Random(0)
    trials = (make_trial(home, source, tmp_path, number) for number in range(10**6))
    longest_s = min(campaign.submit(measure_unharmed, next(trials), digest).result() for _ in range(3))
    ingests: dict[Trial, Future[str]] = {}
    acknowledged: dict[Trial, set[int]] = {}
    for _ in range(NUM_TRIALS):
        running = [trial for trial, future in ingests.items() if not future.done()]
        while len(running) < 2:  # a kill hits both
            running.append(next(trials))
            ingests[running[-1]] = campaign.submit(call, survive, running[-1])
        before = sum(trial.read_acknowledged() for trial in running)
        while sum(trial.read_acknowledged() for trial in running) == before:
            if any(ingests[trial].done() for trial in running):
                break
            time.sleep(0.001)  # none has found the server again
        time.sleep(generator.uniform(0, longest_s))
        mortal.kill()
        for trial in running:
            acknowledged.setdefault(trial, set()).add(trial.read_acknowledged())
        mortal.start()
    outcomes = {trial: future.result() for trial, future in ingests.items()}
    for trial in ingests:
        left = campaign.submit(call, finish, trial, digest).result()
        assert left >= max(acknowledged.get(trial, {0}))
    assert len(set.union(*acknowledged.values())) > 5, "all kills came in one and the same part of the ingest"
    survived = [outcome for outcome in outcomes.values() if outcome == digest]
    assert len(survived) >= len(outcomes) / 2, "an ingest that had begun makes its lost connection again"


def survive(trial: Trial) -> str:
    """Ingest, as a child, while the server may be killed; return the digest, or what was refused in one line."""
    try:
        return ingest_and_note(trial)
    except DatabaseError as error:
        assert "\n" not in str(error) and ": start the server" in str(error), error
        return str(error)


def test_a_server_that_does_not_come_back_is_one_line_and_nothing_half_frozen_is_left(
    mortal: Cluster, source: Path, tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir()
    home = make_home_in(mortal, tmp_path, tmp_path / "home")
    assert home.access.config is not None
    mortal.write_config(home.access.config, home.database, num_tries=2)

    class Killer(Listener):
        def commit(self, num_images: int) -> None:
            mortal.stop()

    words = r"was lost and could not be made again in 2 tries \(.*\): start the server"
    with pytest.raises(DatabaseError, match=words):
        ingest(source, "birds", home.access, chunk_size=3, listener=Killer())
    mortal.start()
    assert ingest(source, "birds", home.access).added.num_present == 3

    mortal.stop()
    with pytest.raises(DatabaseError, match="cannot be made"):
        load_version_snapshot(Reference("birds"), home.access)
    assert list(home.access.dataset_folder.iterdir()) == []
    mortal.start()
    assert load_version_snapshot(Reference("birds"), home.access).digest == load_snapshot(source).digest
