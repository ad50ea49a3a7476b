"""Data sets in a real PostgreSQL and in SQLite, by the same tests: what goes in, what comes out, what is refused."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
import threading
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError

from image_classifier.access import DatabaseAccess, Reading
from image_classifier.credentials import Secret
from image_classifier.data import revision as revisions
from image_classifier.data.connection import Database, build_tls_options
from image_classifier.data.content import Batch
from image_classifier.data.corrections import Correction, correct_labels
from image_classifier.data.database import (
    find_dataset,
    find_selection,
    list_datasets,
    load_version_snapshot,
    open_content,
)
from image_classifier.data.dataset import load_snapshot
from image_classifier.data.freezing import freeze_snapshot
from image_classifier.data.ingest import Ingested, Listener, ingest
from image_classifier.data.place import load_place
from image_classifier.data.revision import open_database, upgrade, upgrade_database
from image_classifier.data.schema import REVISION, metadata
from image_classifier.data.snapshot import Snapshot, compute_digest, compute_flat_digest
from image_classifier.errors import DatabaseError, DataError, ImageClassifierError, SettingsError, StorageError
from image_classifier.experiment import run
from image_classifier.references import Reference
from tests.conftest import PROJECT, find_port, require_program, require_real_data, run_program
from tests.databases import Home, make_home, make_home_in, swap_label, write_source
from tests.datasets import OURS, encode, make_arrays, write_image_folder, write_parquet
from tests.postgres import PASSWORD, Cluster
from tests.tiny import make_settings


def load(home: Home, version: int | None = None, name: str = "birds") -> Snapshot:
    return load_version_snapshot(Reference(name, version), home.access)


def fill(home: Home, folder: Path, name: str = "birds", **values: Any) -> tuple[Path, Ingested]:
    """Ingest random images; return the source and what came of it."""
    source = write_source(folder, **values)
    return source, ingest(source, name, home.access, chunk_size=4)


def count(home: Home) -> int:
    return int(home.ask("SELECT count(*) FROM samples"))


# What goes in comes out.


def test_what_was_ingested_is_the_snapshot_of_the_files_to_the_bit(home: Home, tmp_path: Path) -> None:
    source, ingested = fill(home, tmp_path / "source")
    files, snapshot = load_snapshot(source), load(home)
    assert snapshot.digest == ingested.version.digest == files.digest
    assert np.array_equal(snapshot.images, files.images) and np.array_equal(snapshot.labels, files.labels)
    assert (snapshot.classes, snapshot.num_train) == (files.classes, files.num_train)
    assert (snapshot.name, snapshot.database) == ("birds", "birds@1")
    assert (ingested.added.num_added, ingested.added.num_present, ingested.findings) == (30, 0, None)


@pytest.mark.parametrize("layout", ["folder", "parquet"])
def test_every_source_of_the_trainer_goes_in(layout: str, home: Home, tmp_path: Path) -> None:
    write = write_image_folder if layout == "folder" else write_parquet
    write(tmp_path / "source", make_arrays(), OURS)
    ingested = ingest(tmp_path / "source", "birds", home.access)
    assert ingested.version.digest == load_snapshot(tmp_path / "source").digest


def test_a_data_set_has_images_of_one_size_and_is_read_in_any(home: Home, tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    read = partial(ingest, source, "birds", home.access)
    ingested = read(reading=Reading(image_size=64), chunk_size=4)
    files = load_snapshot(source, reading=Reading(image_size=64))
    assert ingested.version.digest == files.digest == load(home).digest
    assert ingested.findings is not None and ingested.findings.num_fitted == 30
    assert home.ask("SELECT length(image) FROM samples LIMIT 1") == 3 * 64**2
    again = read(reading=Reading(image_size=64))
    assert (again.added.num_added, again.version) == (0, ingested.version)
    refuse(DataError, "has images of 64 x 64 pixels instead of 32 x 32: give --image_size 64", read)
    assert count(home) == 30

    for size, expected in ((64, files.images), (96, None)):
        reading = Reading(image_size=size)  # type: ignore[arg-type]  # of a loop
        snapshot = load_snapshot(Path("db:birds"), home.access, reading)
        assert (snapshot.database, snapshot.image_size) == ("birds@1", size)
        if expected is None:
            pixels = [
                Image.fromarray(image.transpose(1, 2, 0)).resize((size, size), Image.Resampling.BICUBIC)
                for image in files.images
            ]
            expected = np.stack([np.asarray(image) for image in pixels]).transpose(0, 3, 1, 2)
            assert snapshot.findings is not None and snapshot.findings.sizes == {"64 x 64": 30}
        assert np.array_equal(snapshot.images, expected) and np.array_equal(snapshot.labels, files.labels)
    assert load_snapshot(Path("db:birds"), home.access).digest == files.digest


def test_a_validation_part_goes_in_and_comes_out(home: Home, tmp_path: Path) -> None:
    write_image_folder(tmp_path / "source", make_arrays(), OURS)
    write_image_folder(tmp_path / "more", make_arrays(seed=1), OURS)
    (tmp_path / "more" / "train").rename(tmp_path / "source" / "validation")
    ingested = ingest(tmp_path / "source", "birds", home.access)
    files, snapshot = load_snapshot(tmp_path / "source"), load(home)
    assert snapshot.digest == ingested.version.digest == files.digest
    assert (snapshot.num_train, snapshot.num_validation, snapshot.num_test) == (23, 23, 7)
    assert np.array_equal(snapshot.images, files.images)
    version = ingested.version
    assert (version.num_train, version.num_validation, version.num_test) == (23, 23, 7)
    with open_database(home.access) as database:  # images are numbered as in the snapshot
        corrected, _ = correct_labels(database, version.reference, [Correction(45, "cat"), Correction(46, "cat")], "")
    labels = files.labels.copy()
    labels[[45, 46]] = files.classes.index("cat")
    assert np.array_equal(load(home, corrected.number).labels, labels)


def test_the_same_source_adds_nothing_twice(home: Home, tmp_path: Path) -> None:
    source, first = fill(home, tmp_path / "source")
    second = ingest(source, "birds", home.access)
    assert (second.added.num_added, second.added.num_present) == (0, 30)
    assert second.version == first.version and count(home) == 30


def test_what_a_source_holds_twice_is_kept_twice(home: Home, tmp_path: Path) -> None:
    arrays = make_arrays()
    arrays.images[[1, 2, 9, 25]] = arrays.images[0]  # in one chunk, in another one, and in the test set
    source = write_source(tmp_path / "source", arrays)
    for _ in range(2):
        assert ingest(source, "birds", home.access, chunk_size=4).version.digest == load_snapshot(source).digest
    assert count(home) == 30


def test_a_data_set_grows_and_its_earlier_version_stays(home: Home, tmp_path: Path) -> None:
    source, first = fill(home, tmp_path / "source")
    more, second = fill(home, tmp_path / "more", seed=1)
    assert (first.version.number, second.version.number) == (1, 2)
    old, new = load(home, 1), load(home)
    assert old.digest == load_snapshot(source).digest and new.database == "birds@2"
    both = [load_snapshot(source), load_snapshot(more)]
    expected = [images for part in ("train", "test") for snapshot in both for images in getattr(snapshot, part)[0]]
    assert np.array_equal(new.images, np.stack(expected))


def test_one_more_image_is_hashed_on_from_the_version_before(home: Home, tmp_path: Path) -> None:
    arrays = make_arrays()
    write_image_folder(tmp_path / "source", arrays, OURS)
    ingest(tmp_path / "source", "birds", home.access)
    one = next((tmp_path / "source" / "train").rglob("*.png"))
    image = Image.open(one).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image.save(one.with_name("~last.png"))
    whole = tmp_path / "whole"
    added = ingest(tmp_path / "source", "birds", home.access)
    assert (added.added.num_added, added.version.number) == (1, 2)
    load(home)
    home.change(
        "DELETE FROM versions WHERE number = 2", "UPDATE samples SET digest = substr(image, 1, 32) WHERE position < 30"
    )
    again = freeze_snapshot("birds", home.elsewhere(whole), conditions={})  # no row of before is looked at
    assert (again.digest, again.database) == (added.version.digest, "birds@2")
    assert compute_digest(again.images, again.labels, again.classes, again.num_train) == again.digest
    for trees in ("'{}'", "'[1]'", """'{"train": {"num_entries": 1, "rest": ["x"]}}'"""):
        home.change("DELETE FROM versions WHERE number = 2", f"UPDATE versions SET trees = {trees}")
        with pytest.raises(DataError, match="rows of birds were changed by another program"):
            freeze_snapshot("birds", home.access, conditions={})
    home.change("DELETE FROM versions")
    with pytest.raises(DataError, match="rows were changed since"):  # here each row is, and the images tell
        freeze_snapshot("birds", home.elsewhere(tmp_path / "other"), conditions={})


def test_a_version_of_before_keeps_its_digest_and_the_next_one_has_that_of_the_files(
    home: Home, tmp_path: Path
) -> None:
    source, ingested = fill(home, tmp_path / "source")
    files = load_snapshot(source)
    older = compute_flat_digest(files.images, files.labels, files.classes, files.num_train)
    home.change(f"UPDATE versions SET digest = '{older}', trees = NULL")
    for _ in range(2):  # read, then found
        snapshot = load_version_snapshot(Reference("birds", 1), home.elsewhere(tmp_path / "elsewhere"))
        assert snapshot.digest == files.digest == ingested.version.digest
        assert snapshot.recognize(older).digest == older
        assert [path.name for path in (tmp_path / "elsewhere" / ".snapshots").iterdir() if path.is_dir()] == [older]
    second = write_source(tmp_path / "second", seed=1)
    assert ingest(second, "birds", home.access).version.digest == load(home).digest != files.digest


def test_an_image_that_is_there_under_another_label_is_counted_and_stays(home: Home, tmp_path: Path) -> None:
    source, first = fill(home, tmp_path / "source")
    arrays = make_arrays()
    arrays.labels[3] = (arrays.labels[3] + 1) % 10
    second = ingest(write_source(tmp_path / "other", arrays), "birds", home.access)
    assert (second.added.num_present, second.added.num_other_label) == (30, 1)
    assert second.version == first.version


def test_labels_are_mapped_by_the_names_of_the_classes(home: Home, tmp_path: Path) -> None:
    fill(home, tmp_path / "source")
    arrays, names = make_arrays(seed=3, num_classes=2), ["truck", "cat"]
    write_image_folder(tmp_path / "two", arrays, names)
    ingest(tmp_path / "two", "birds", home.access)
    added = load(home).train[1][23:]
    two = load_snapshot(tmp_path / "two")
    assert [OURS[label] for label in added] == [two.classes[label] for label in two.train[1]]


def test_a_class_that_the_data_set_does_not_have_is_refused(home: Home, tmp_path: Path) -> None:
    fill(home, tmp_path / "source")
    write_image_folder(tmp_path / "two", make_arrays(num_classes=2), ["cat", "zebra"])
    refuse(DataError, "zebra is not a class of the data set birds", ingest, tmp_path / "two", "birds", home.access)
    assert count(home) == 30


def test_who_added_what_from_where_and_when_is_kept(home: Home, tmp_path: Path) -> None:
    before = datetime.now(UTC) - timedelta(seconds=1)
    source, _ = fill(home, tmp_path / "source")
    assert home.ask("SELECT DISTINCT source FROM samples") == str(source)
    if home.cluster:
        assert home.ask("SELECT DISTINCT added_by FROM samples") == "owner"
    with open_database(home.access) as database:
        (summary,) = list_datasets(database)
    assert before < summary.versions[0].added_at < datetime.now(UTC) + timedelta(seconds=1)
    assert (summary.num_samples, summary.num_corrections, summary.versions[0].num_train) == (30, 0, 23)


# Bad images.


def make_bad_folder(folder: Path) -> Path:
    """One image that cannot be read, and one of another size, among good ones."""
    write_image_folder(folder, make_arrays(), OURS)
    (folder / "train" / "cat" / "bad.png").write_bytes(b"no image")
    (folder / "train" / "cat" / "large.png").write_bytes(encode(np.zeros((3, 40, 30), np.uint8)))
    return folder


def test_bad_images_end_the_ingest_and_mended_it_goes_on(home: Home, tmp_path: Path) -> None:
    folder = make_bad_folder(tmp_path / "source")
    refuse(DataError, "1 of the images cannot be read.*bad.png", ingest, folder, "birds", home.access)
    (folder / "train" / "cat" / "bad.png").unlink()
    ingested = ingest(folder, "birds", home.access)
    assert ingested.version.digest == load_snapshot(folder).digest


def test_bad_images_are_left_out_when_asked_for_and_named(home: Home, tmp_path: Path) -> None:
    folder = make_bad_folder(tmp_path / "source")
    ingested = ingest(folder, "birds", home.access, reading=Reading(fit="refuse", skip_bad=True))
    assert ingested.findings is not None and ingested.added.num_added == 30
    bad, large = ingested.findings.left_out
    assert "bad.png: not a PNG" in bad and "large.png: 30 x 40 pixels instead of 32 x 32" in large
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no image")
    read = partial(ingest, folder, "fish", home.access, reading=Reading(skip_bad=True))
    refuse(DataError, "source has no readable image, such as .*not a PNG, JPEG, WEBP or BMP image", read)


# Versions.


def relabel(home: Home, image: int, label: str, version: int | None = None) -> str:
    with open_database(home.access) as database:
        made, _ = correct_labels(database, Reference("birds", version), [Correction(image, label)], "looks so")
    return str(made.reference)


def test_a_corrected_label_makes_a_version_and_the_old_one_stays(home: Home, tmp_path: Path) -> None:
    fill(home, tmp_path / "source")
    old = load(home)
    was, wanted = swap_label(old.labels, 25)  # an image of the test set
    assert relabel(home, 25, wanted) == "birds@2"
    new = load(home)
    assert new.classes[new.labels[25]] == wanted and new.digest != old.digest
    assert np.flatnonzero(new.labels != old.labels).tolist() == [25]
    again = load_version_snapshot(Reference("birds", 1), home.elsewhere(tmp_path / "again"))
    assert again.digest == old.digest and again.classes[again.labels[25]] == was

    assert relabel(home, 25, was) == "birds@3"
    assert load(home).digest == old.digest  # the same content, by another way
    assert relabel(home, 25, was) == "birds@3"  # is its label already
    assert count(home) == 30 and home.ask("SELECT count(*) FROM corrections") == 2


def test_a_label_that_is_no_class_and_an_image_that_is_none_are_refused(home: Home, tmp_path: Path) -> None:
    fill(home, tmp_path / "source")
    for image, label, words in ((3, "zebra", "zebra is not a class"), (30, "cat", "has no image 30: it has 0 to 29")):
        with pytest.raises(DataError, match=words):
            relabel(home, image, label)
    assert home.ask("SELECT count(*) FROM corrections") == 0


def test_a_part_can_be_frozen_and_is_the_same_ever_after(home: Home, tmp_path: Path) -> None:
    fill(home, tmp_path / "source", num_train=60, num_test=60)
    whole = load(home)
    part = freeze_snapshot("birds", home.access, conditions={"class": ["dog", "cat"]})
    chosen = np.isin(whole.labels, [OURS.index("cat"), OURS.index("dog")])
    assert part.database == "birds@2"
    assert np.array_equal(part.images, whole.images[chosen]) and np.array_equal(part.labels, whole.labels[chosen])
    fill(home, tmp_path / "more", seed=1)
    again = load_version_snapshot(Reference("birds", 2), home.elsewhere(tmp_path / "again"))
    assert again.digest == part.digest
    with pytest.raises(DataError, match="0 test images; it needs at least one"):
        freeze_snapshot("birds", home.access, conditions={"split": ["train"]})
    with pytest.raises(DataError, match="has no class 'zebra'"):
        freeze_snapshot("birds", home.access, conditions={"class": ["zebra"]})


def test_what_was_there_at_a_time_can_be_frozen(home: Home, tmp_path: Path) -> None:
    source, first = fill(home, tmp_path / "source")
    old = load(home)
    _, wanted = swap_label(old.labels, 5)
    relabel(home, 5, wanted)
    fill(home, tmp_path / "more", seed=1)
    then = freeze_snapshot("birds", home.access, as_of=first.version.added_at, conditions={})
    assert then.database == "birds@1" and then.digest == load_snapshot(source).digest
    with pytest.raises(DataError, match="0 training images"):
        freeze_snapshot("birds", home.access, as_of=first.version.added_at - timedelta(days=1), conditions={})


def test_a_version_is_the_same_whatever_order_the_rows_are_kept_in(home: Home, tmp_path: Path) -> None:
    source, _ = fill(home, tmp_path / "source")
    columns = "dataset_id, position, split, label, digest, occurrence, source, added_at, added_by, image"
    home.change(
        f"CREATE TABLE shuffled AS SELECT {columns} FROM samples ORDER BY digest",
        "DELETE FROM samples",
        f"INSERT INTO samples ({columns}) SELECT {columns} FROM shuffled",
    )
    assert load(home).digest == load_snapshot(source).digest


def test_a_snapshot_is_found_again_without_reading_an_image(home: Home, tmp_path: Path) -> None:
    fill(home, tmp_path / "source")
    first = load(home)
    home.change("DELETE FROM samples")  # nothing could be read
    second = load(home)
    assert second.digest == first.digest and second.database == "birds@1"


def test_rows_that_were_changed_behind_its_back_are_noticed(home: Home, tmp_path: Path) -> None:
    fill(home, tmp_path / "source")
    home.change("UPDATE samples SET label = 1 - label WHERE label < 2")
    refuse(DataError, "version birds@1 has the digest .* restore the database", load, home)
    store = home.access.dataset_folder / ".snapshots"
    assert not store.exists(), list(store.iterdir())


def test_a_data_set_that_grows_while_it_is_read_is_seen_as_it_was(home: Home, tmp_path: Path) -> None:
    source, _ = fill(home, tmp_path / "source")
    more = write_source(tmp_path / "more", seed=1)
    with open_database(home.access) as database:
        dataset = find_dataset(database, "birds")
        selection = find_selection(database, dataset, None, {})
        with database.reading() as connection:
            before = connection.execute(text("SELECT count(*) FROM samples")).scalar_one()
            writer = threading.Thread(target=ingest, args=(more, "birds", home.access))
            writer.start()
            if home.cluster:  # SQLite lets the writer wait instead
                writer.join()
            assert connection.execute(text("SELECT count(*) FROM samples")).scalar_one() == before
        writer.join()
        with open_content(database, dataset, selection) as content:
            assert sum(len(labels) for _, labels in content.parts["train"]) == 23
    assert count(home) == 60


# Training.


def test_training_from_the_database_ends_with_the_bits_of_training_from_the_files(home: Home, tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", num_train=200, num_test=60)
    ingest(source, "birds", home.access)
    values: dict[str, Any] = {"dataset": source, "num_epochs": 1}
    files = run(make_settings(tmp_path / "files", **values))
    access = home.access
    reached = {"database": "birds", "db_config": access.config, "db_password": access.password}
    values = {"dataset": access.dataset_folder, "num_epochs": 1, **reached}
    first = run(make_settings(tmp_path / "first", **values))
    assert first.weights_digest == files.weights_digest

    image = 7
    _, wanted = swap_label(load(home).labels, image)
    relabel(home, image, wanted)
    newest = run(make_settings(tmp_path / "newest", **values))
    assert newest.weights_digest != first.weights_digest
    old = run(make_settings(tmp_path / "old", **{**values, "database": "birds@1"}))
    assert old.weights_digest == first.weights_digest


@pytest.mark.timeout(600)
def test_all_of_cifar10_trains_to_the_same_bits_from_files_and_database(home: Home, tmp_path: Path) -> None:
    real = require_real_data("IMAGE_CLASSIFIER_CIFAR10")
    ingested = ingest(real, "cifar10", home.access)
    assert ingested.added.num_added == 60_000
    files = load_snapshot(real)
    assert ingested.version.digest == files.digest
    snapshot = load(home, name="cifar10")
    assert snapshot.digest == files.digest
    access = home.access
    reached: dict[str, Any] = {"database": "cifar10", "db_config": access.config, "db_password": access.password}
    training: dict[str, Any] = {"num_epochs": 1, "batch_size": 1000, "digest_every": 10}
    results = [
        run(make_settings(tmp_path / "files", dataset=real, **training)),
        run(make_settings(tmp_path / "database", dataset=access.dataset_folder, **training, **reached)),
    ]
    assert results[0].weights_digest == results[1].weights_digest
    assert results[0].evaluation == results[1].evaluation


# Faults.


def refuse(error: type[ImageClassifierError], words: str, function: object, *arguments: object) -> None:
    """A refusal is one line, with the remedy."""
    assert callable(function)
    with pytest.raises(error, match=words) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message and PASSWORD not in message
    assert caught.value.__cause__ is None or PASSWORD not in str(caught.value.__cause__)


def test_an_unknown_data_set_and_version_are_refused_with_what_there_is(home: Home, tmp_path: Path) -> None:
    fill(home, tmp_path / "source")
    refuse(DatabaseError, "has no data set fish: it has birds", load, home, None, "fish")
    refuse(DatabaseError, "birds has no version 7: it has 1 to 1", load, home, 7)


def test_a_data_set_without_a_version_is_refused(home: Home, tmp_path: Path) -> None:
    fill(home, tmp_path / "source")
    home.change("DELETE FROM versions")
    refuse(DatabaseError, "birds has no version yet: finish its ingest, or", load, home)


def test_a_database_without_tables_is_refused_with_the_command_that_makes_them(home: Home) -> None:
    words = "no tables of image_classifier( in its search_path)?: create them with `image_classifier data upgrade`"
    refuse(
        DatabaseError,
        words if home.cluster else "there is no database .*: create it with `image_classifier data ingest`",
        load,
        home,
    )
    assert not list(home.access.dataset_folder.iterdir())
    assert upgrade_database(home.access) == (None, "0004")
    refuse(DatabaseError, "it has none yet; `image_classifier data ingest` adds one", load, home)


def test_a_lost_table_is_refused(home: Home, tmp_path: Path) -> None:
    fill(home, tmp_path / "source")
    home.change("DROP TABLE versions")
    refuse(DatabaseError, "lacks .*table.*: create (it|them) with `image_classifier data upgrade`", load, home)


def test_older_tables_are_refused_and_brought_up_with_what_is_in_them(home: Home, tmp_path: Path) -> None:
    revisions._prepare_file(home.access.dataset_folder / "database.sqlite", make=True)
    database = Database(load_place(home.access), home.access)
    upgrade(database, "0001")
    database.close()
    words = (
        r"of an older version \(0001\) than this one reads \(0004\): migrate them with `image_classifier data upgrade`"
    )
    source = write_source(tmp_path / "source")
    refuse(DatabaseError, words, ingest, source, "birds", home.access)
    refuse(DatabaseError, words, load, home)
    assert upgrade_database(home.access) == ("0001", "0004") and upgrade_database(home.access) == ("0004", "0004")
    ingest(source, "birds", home.access)
    assert load(home).digest == load_snapshot(source).digest


def test_samples_and_versions_survive_the_copy_into_new_tables(home: Home, tmp_path: Path) -> None:
    revisions._prepare_file(home.access.dataset_folder / "database.sqlite", make=True)
    database = Database(load_place(home.access), home.access)
    upgrade(database, "0002")
    rows = [
        f"(1, {position}, 'train', 0, '{position:032}', 0, 's', '2026-01-01', 'me', 'pixels')" for position in range(3)
    ]
    with database.adding() as connection:
        for command in (
            "INSERT INTO datasets VALUES (1, 'birds', '[\"a\"]', '[3, 32, 32]', '2026-01-01', 'me')",
            f"INSERT INTO samples VALUES {', '.join(rows)}",
            "INSERT INTO corrections VALUES (1, 0, 2, 0, '', '2026-01-01', 'me')",
            "INSERT INTO versions VALUES (1, 1, 3, 1, '{}', 2, 1, 'digest', '2026-01-01', 'me')",
        ):
            connection.exec_driver_sql(command)
    database.close()
    assert upgrade_database(home.access) == ("0002", "0004")
    assert home.ask("SELECT count(*) FROM samples WHERE image = 'pixels' AND split = 'train'") == 3
    assert home.ask("SELECT num_train + 10 * num_validation + 100 * num_test FROM versions") == 102
    for split, is_taken in (("validation", True), ("else", False)):
        row = rows[0].replace("(1, 0, 'train'", f"(1, 3, '{split}'")
        with nullcontext() if is_taken else pytest.raises(DatabaseError):
            home.change(f"INSERT INTO samples VALUES {row}")
    with pytest.raises(DatabaseError):  # the other constraints are there, too
        home.change(f"INSERT INTO samples VALUES {rows[1].replace('(1, 1,', '(1, 4,')}")


def test_tables_of_a_later_version_are_refused(home: Home, tmp_path: Path) -> None:
    fill(home, tmp_path / "source")
    home.change("UPDATE alembic_version SET version_num = '9999'")
    refuse(DatabaseError, "of a later version .*: use a later version of image_classifier", load, home)
    refuse(DatabaseError, "of a later version", upgrade_database, home.access)


def test_the_migrations_make_the_tables_that_the_package_reads(home: Home) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    upgrade_database(home.access)
    with open_database(home.access) as database, database.reading() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
    scripts = ScriptDirectory(str(Path(revisions.__file__).with_name("migrations")))
    assert scripts.get_heads() == [REVISION]


def test_two_ingests_at_once_are_refused(home: Home, tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")

    class Second(Listener):
        def commit(self, num_images: int) -> None:
            refuse(DatabaseError, "another process ingests into birds already", ingest, source, "birds", home.access)

    ingest(source, "birds", home.access, listener=Second())
    assert count(home) == 30
    ingest(source, "birds", home.access)  # which the first one's end lets in


def test_a_disk_that_fills_is_one_line_and_what_was_acknowledged_stays(home: Home, tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", num_train=400, num_test=100)
    small = write_source(tmp_path / "small", seed=1)
    ingest(small, "birds", home.access)
    if home.cluster:  # the server itself says what it says when its disk is full
        home.change(
            "CREATE FUNCTION fill() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'could not extend file' USING ERRCODE = 'disk_full'; END $$",
            "CREATE TRIGGER fill BEFORE INSERT ON samples FOR EACH ROW WHEN (NEW.position >= 50) "
            "EXECUTE FUNCTION fill()",
        )
        refuse(StorageError, "the disk of the database .* is full", ingest_in_tens, source, home)
        home.change("DROP TRIGGER fill ON samples")
    else:
        room = home.ask("PRAGMA page_size") * (home.ask("PRAGMA page_count") + 20)
        script = (
            "import sys; from pathlib import Path; from tests.integration.test_database import *\n"
            "ingest(Path(sys.argv[1]), 'birds', DatabaseAccess(dataset_folder=Path(sys.argv[2])), chunk_size=10)"
        )
        result = subprocess.run(
            [sys.executable, "-c", script, str(source), str(home.access.dataset_folder)],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": os.getcwd()},
        )
        assert "StorageError: the disk of the database" in result.stderr, result.stderr
    assert 30 < count(home) < 530
    assert ingest(source, "birds", home.access).added.num_present > 0
    assert count(home) == 530


def test_a_disk_that_is_too_small_for_a_snapshot_is_one_line_and_nothing_of_it_is_left(
    home: Home, tmp_path: Path
) -> None:
    fill(home, tmp_path / "source", num_train=2500)
    elsewhere = home.elsewhere(tmp_path / "elsewhere")
    command = [sys.executable, "-W", "error", "-m", "image_classifier", "data", "snapshot", "--dataset", "birds"]
    result = subprocess.run(
        [*command, "--dataset_folder", elsewhere.dataset_folder, "--db_config", str(elsewhere.config)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, 4_000_000)),
        capture_output=True,
        text=True,
        cwd=PROJECT,
        env=os.environ | home.environment,
    )
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert "File too large; raise the limit on the size of files" in result.stderr
    assert {path.name for path in elsewhere.dataset_folder.iterdir()} <= {"sqlite.yaml"}


def ingest_in_tens(source: Path, home: Home) -> None:
    ingest(source, "birds", home.access, chunk_size=10)


# Of PostgreSQL alone.


@pytest.fixture
def remote(tmp_path: Path, request: pytest.FixtureRequest) -> Home:
    """A database in PostgreSQL."""
    return make_home("postgresql", tmp_path, request)


def refuse_load(home: Home, words: str, **values: object) -> None:
    """Write another configuration; what it leads to is refused."""
    assert home.cluster is not None and home.access.config is not None
    config = home.cluster.write_config(home.access.config.with_name("other.yaml"), home.database, **values)
    refuse(DatabaseError, words, load, replace(home, access=replace(home.access, config=config)))


def test_a_server_that_is_down_is_refused(remote: Home) -> None:
    refuse_load(remote, "the connection to test_.* cannot be made .*refused.*: start the server", port=find_port())


def test_a_database_and_a_role_that_do_not_exist_are_refused(remote: Home) -> None:
    refuse_load(remote, "nowhere at 127.0.0.1:.* does not exist on the server", database="nowhere")
    refuse_load(remote, "refuses the password of nobody: correct DB_PASSWORD", user="nobody")


def test_a_wrong_password_and_none_are_refused(remote: Home) -> None:
    wrong = replace(remote, access=replace(remote.access, password=Secret("wrong")))
    refuse(DatabaseError, "refuses the password of owner: correct DB_PASSWORD", load, wrong)
    none = replace(remote, access=replace(remote.access, password=None))
    refuse(DatabaseError, "asks for the password of owner: give it as DB_PASSWORD", load, none)


def test_a_person_is_asked_for_a_password_that_nobody_gave(remote: Home, tmp_path: Path) -> None:
    fill(remote, tmp_path / "source")
    asked = replace(remote.access, password=None, ask=lambda: Secret(PASSWORD))
    assert load_version_snapshot(Reference("birds"), asked).database == "birds@1"


def test_a_role_that_may_read_can_train_and_no_more(remote: Home, tmp_path: Path) -> None:
    source, _ = fill(remote, tmp_path / "source")
    assert remote.cluster is not None
    roles = re.findall(r"```sql\n(.*?)```", (PROJECT / "docs" / "database.md").read_text(), flags=re.DOTALL)
    number = remote.database.removeprefix("test_")
    for sql in roles:
        sql = sql.replace("image_classifier_", f"image_classifier_{number}_").replace(
            "DATABASE images", f"DATABASE {remote.database}"
        )
        remote.cluster.execute(remote.database, *filter(str.strip, sql.replace("a-password", PASSWORD).split(";")))
    accesses = {}
    for role in ("trainer", "writer"):
        config = remote.cluster.write_config(
            tmp_path / f"{role}.yaml", remote.database, user=f"image_classifier_{number}_{role}"
        )
        (tmp_path / role).mkdir()
        accesses[role] = replace(remote.access, config=config, dataset_folder=tmp_path / role)
    assert load_version_snapshot(Reference("birds"), accesses["trainer"]).digest == load_snapshot(source).digest
    more = write_source(tmp_path / "more", seed=1)
    refuse(
        DatabaseError,
        "does not allow image_classifier_.*_trainer to do this",
        ingest,
        more,
        "birds",
        accesses["trainer"],
    )
    assert count(remote) == 30

    assert ingest(more, "birds", accesses["writer"]).version.number == 2
    with open_database(accesses["writer"]) as database:
        correct_labels(database, Reference("birds"), [Correction(0, swap_label(load(remote).labels, 0)[1])], "")
        for command in ("UPDATE samples SET label = 0", "DELETE FROM versions", "UPDATE corrections SET label = 0"):
            with pytest.raises(ProgrammingError, match="permission denied"), database.adding() as connection:
                connection.execute(text(command))
    assert load(remote).database == "birds@3"


def break_connections(home: Home) -> None:
    """End every connection to the database, as an administrator would."""
    assert home.cluster is not None
    query = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = '{}'"
    home.cluster.execute("postgres", query.format(home.database))


def test_an_ingest_survives_the_loss_of_its_connection(
    remote: Home, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Breaker(Listener):
        def commit(self, num_images: int) -> None:
            if count(remote) in (9, 19, 30):
                break_connections(remote)

    source = write_source(tmp_path / "source")
    ingested = ingest(source, "birds", remote.access, chunk_size=4, listener=Breaker())
    assert ingested.version.digest == load_snapshot(source).digest and count(remote) == 30
    assert [record.getMessage().partition(" was lost")[1] for record in caplog.records] == [" was lost"] * 3


def test_a_snapshot_survives_the_loss_of_its_connection(remote: Home, tmp_path: Path) -> None:
    source, _ = fill(remote, tmp_path / "source", num_train=2500)
    with open_database(remote.access) as database:
        dataset = find_dataset(database, "birds")
        batches: list[Batch] = []
        with open_content(database, dataset, find_selection(database, dataset, None, {})) as content:
            for batch in content.parts["train"]:
                break_connections(remote)
                batches.append(batch)
    assert len(batches) == 3
    assert np.array_equal(np.concatenate([images for images, _ in batches]), load_snapshot(source).train[0])


def test_the_server_is_verified_unless_it_is_the_local_one(remote: Home, tmp_path: Path) -> None:
    for host, mode in (("localhost", "prefer"), ("/run/postgresql", "prefer"), ("db.example.org", "verify-full")):
        place = replace(load_place(remote.access), host=host)
        assert build_tls_options(place)["sslmode"] == mode


def make_certificate(folder: Path, name: str) -> None:
    """Make a key and a certificate that is signed with it."""
    words = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"]
    alternative = ["-addext", f"subjectAltName=DNS:{name}"]
    files = ["-keyout", "server.key", "-out", "server.crt"]
    run_program(require_program("openssl"), *words, *alternative, *files, cwd=folder)


def test_a_server_whose_certificate_does_not_verify_is_refused(tmp_path: Path) -> None:
    make_certificate(tmp_path, "localhost")
    cluster = Cluster("-cssl=on")
    try:
        for name in ("server.key", "server.crt"):
            shutil.copy(tmp_path / name, cluster.folder / "data" / name)
            shutil.chown(cluster.folder / "data" / name, cluster.folder.owner())
            (cluster.folder / "data" / name).chmod(0o600)
        cluster.start()
        home = make_home_in(cluster, tmp_path, tmp_path)
        upgrade_database(home.access)
        with pytest.raises(DatabaseError, match=r"cannot be trusted \(.*certificate"):
            reach(home, host="localhost", tls="verify-full")
        with pytest.raises(DatabaseError, match=r"cannot be trusted \(.*127.0.0.1"):
            reach(home, host="127.0.0.1", tls="verify-full", tls_root=str(tmp_path / "server.crt"))
        assert reach(home, host="localhost", tls="verify-full", tls_root=str(tmp_path / "server.crt")) is True
        assert reach(home, host="localhost") is True  # the local one, which is asked for TLS and not verified
        assert reach(home, host="localhost", tls="disable") is False
    finally:
        cluster.remove()


def reach(home: Home, **values: str) -> bool:
    """Reach the database by another configuration; return whether the connection is encrypted."""
    assert home.cluster is not None and home.access.config is not None
    config = home.cluster.write_config(home.access.config.with_name("tls.yaml"), home.database, **values)
    query = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
    return bool(replace(home, access=replace(home.access, config=config)).ask(query))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("driver: oracle", "driver takes sqlite or postgresql, got: 'oracle'"),
        ("port: many", "port takes a whole number from 1 to 65535, got: 'many'"),
        ("passwort: x", "has the unknown key 'passwort'; it may have driver, database"),
        ("password: x", "has a password, which does not belong there: put it into DB_PASSWORD"),
        ("- a", "must contain keys and values"),
        ("a: [", "cannot be read as YAML"),
        ("driver: postgresql", "needs the key database"),
        ("tls: maybe", "tls takes null or one of disable"),
    ],
)
def test_a_configuration_that_is_wrong_is_refused(content: str, words: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(content)
    refuse(SettingsError, f"--db_config: .*{words}", load_place, DatabaseAccess(config=config))


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "database.sqlite").write_bytes(b"this is no database of SQLite, but a text of some length " * 100)
    access = DatabaseAccess(dataset_folder=tmp_path)
    refuse(DatabaseError, "is not a complete SQLite database", load_version_snapshot, Reference("birds"), access)


def test_sqlite_is_read_where_nothing_can_be_written(tmp_path: Path) -> None:
    folder = tmp_path / "home"
    folder.mkdir()
    home = Home(DatabaseAccess(dataset_folder=folder))
    source, _ = fill(home, tmp_path / "source")
    for path in (folder / "database.sqlite", folder):
        path.chmod(0o555)
    code = (
        "import sys; from pathlib import Path\n"
        "from image_classifier.access import DatabaseAccess, Reading\n"
        "from image_classifier.references import Reference\n"
        "from image_classifier.data.database import load_version_snapshot\n"
        "print(load_version_snapshot(Reference('birds'), DatabaseAccess(dataset_folder=Path(sys.argv[1]))).digest)"
    )
    environment = os.environ | {"IMAGE_CLASSIFIER_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(PROJECT)}
    without_rights = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    command = [*without_rights, sys.executable, "-c", code, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    folder.chmod(0o755)
    assert result.stdout.strip() == load_snapshot(source).digest, result.stderr
