"""Single images of a snapshot: read alone, checked alone, and what was corrected between two versions proved alone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from image_classifier.data.dataset import load_snapshot
from image_classifier.data.export import write_snapshot
from image_classifier.data.levels import TREE_FILE
from image_classifier.data.partial_snapshot import Change, Entry, PartialSnapshot
from image_classifier.data.proof import Entries, Proof, check_proof, find_corrections, parse_proof, serialize_proof
from image_classifier.data.snapshot import Snapshot, compute_digest
from image_classifier.errors import DataError, SettingsError, StorageError
from image_classifier.progress import Task
from image_classifier.remote.ranges import RangeReader
from tests.datasets import make_arrays, write_cifar10_python
from tests.mutate import change_bytes

WANTED = {"train": range(100, 140)}
IMAGE_BYTES = 3072
FLIP = 1


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 300 images to train and 20 to test with."""
    folder = tmp_path_factory.mktemp("partial") / "data"
    write_cifar10_python(folder, make_arrays(num_train=300, num_test=20))
    return folder


@pytest.fixture(scope="module")
def snapshot(source: Path) -> Snapshot:
    """Its snapshot in the store."""
    return load_snapshot(source)


@pytest.fixture(scope="module")
def exported(snapshot: Snapshot, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same snapshot, written out."""
    folder = tmp_path_factory.mktemp("exported") / "snapshot"
    write_snapshot(snapshot, folder)
    return folder


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


class Noting(RangeReader):
    """Notes which bytes were read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.reads: list[tuple[str, int, int]] = []

    def read(self, name: str, start: int, size: int) -> bytes:
        self.reads.append((name, start, size))
        return super().read(name, start, size)


def read(folder: Path, digest: str | None, places: Any = WANTED) -> list[tuple[int, int, Any]]:
    """Read and check some images."""
    return iterate(PartialSnapshot(RangeReader(folder), digest), places)


def iterate(partial: PartialSnapshot, places: Any = WANTED) -> list[tuple[int, int, Any]]:
    """Read and check some images: number, label and pixels."""
    images = partial.iterate(partial.list_entries(places), Task(""))
    return [(partial.get_number(entry), entry.label, pixels) for entry, pixels in images]


def relabel(snapshot: Snapshot, labels: dict[int, int], **values: Any) -> Snapshot:
    """Make another version with other labels."""
    changed = replace(snapshot, labels=snapshot.labels.copy(), **values)
    for number, label in labels.items():
        changed.labels[number] = label
    arrays = changed.images, changed.labels, changed.classes, changed.num_train, changed.num_validation
    return replace(changed, digest=compute_digest(*arrays))


def test_a_range_is_read_alone_and_is_right(snapshot: Snapshot, exported: Path) -> None:
    folder = Noting(exported)
    partial = PartialSnapshot(folder, snapshot.digest)
    assert partial.header == Entries(snapshot).prove([0]).header
    images = iterate(partial, {"train": range(100, 140), "test": [3, 5]})
    assert [number for number, _, _ in images] == [*range(100, 140), 303, 305]
    for number, label, pixels in images:
        assert label == snapshot.labels[number] and np.array_equal(pixels, snapshot.images[number])
    # the images and labels, entries to the next 16 of each run, nodes, heads and the record
    assert folder.num_bytes < 42 * (IMAGE_BYTES + 8) + (48 + 20) * 40 + 3000 < partial.num_bytes / 6
    assert folder.num_bytes == sum(size for _, _, size in folder.reads)


def test_the_store_has_the_same_files(source: Path, snapshot: Snapshot, exported: Path) -> None:
    stored = source / ".snapshots" / snapshot.digest
    assert {path.name for path in stored.iterdir()} == {path.name for path in exported.iterdir()}
    assert (stored / TREE_FILE).read_bytes() == (exported / TREE_FILE).read_bytes()
    assert len(read(stored, snapshot.digest)) == 40


def test_proofs_are_those_that_data_prove_makes(snapshot: Snapshot, exported: Path) -> None:
    partial = PartialSnapshot(RangeReader(exported), snapshot.digest)
    proof = partial.prove(partial.list_entries({"train": [0, 17, 299], "test": [4]}))
    assert serialize_proof(proof) == serialize_proof(Entries(snapshot).prove([0, 17, 299, 304]))
    check_proof(parse_proof(serialize_proof(proof)), snapshot.digest)


def test_a_validation_part_counts(snapshot: Snapshot, tmp_path: Path) -> None:
    other = relabel(snapshot, {}, num_train=200, num_validation=100)
    write_snapshot(other, tmp_path / "out")
    partial = PartialSnapshot(RangeReader(tmp_path / "out"), other.digest)
    (number, label, _), (last, _, _) = iterate(partial, {"validation": [50], "test": [1]})
    assert (number, label, last) == (250, snapshot.labels[250], 301)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= FLIP
    path.write_bytes(content)


def test_every_flipped_byte_of_what_is_read_is_found(snapshot: Snapshot, copy: Path) -> None:
    folder = Noting(copy)
    iterate(PartialSnapshot(folder, snapshot.digest))
    places = [(name, at) for name, start, size in folder.reads for at in range(start, start + size)]
    by_name = {name: sorted({at for each, at in places if each == name}) for name in {name for name, _ in places}}
    assert by_name.keys() == {"images.npy", "labels.npy", TREE_FILE, "snapshot.json"}
    chance = Random(0)
    for name, found in by_name.items():
        for at in chance.sample(found, 60):
            flip(copy / name, at)
            with pytest.raises(DataError) as got:
                read(copy, snapshot.digest)
            assert "\n" not in str(got.value)
            what = {"images.npy": ("pixels", 128, IMAGE_BYTES), "labels.npy": ("labels", 128, 8)}.get(name)
            if what is not None and at >= what[1]:
                image = (at - what[1]) // what[2]
                assert f"is damaged: the {what[0]} in the train part of image {image} differ from" in str(got.value)
            flip(copy / name, at)
    assert len(read(copy, snapshot.digest)) == 40


def test_what_is_not_read_does_not_matter(snapshot: Snapshot, copy: Path) -> None:
    for image in (5, 99, 140, 319):
        flip(copy / "images.npy", 128 + image * IMAGE_BYTES)
    assert len(read(copy, snapshot.digest)) == 40
    with pytest.raises(DataError, match="is damaged: the pixels in the train part of image 5, 99, 140 differ from"):
        read(copy, snapshot.digest, {"train": range(300)})
    flip(copy / "labels.npy", 128 + 8 * 305)
    with pytest.raises(
        DataError, match="the labels in the test part of image 5; the pixels in the test part of image 19 differ"
    ):
        read(copy, snapshot.digest, {"test": range(20)})


def test_mutated_files_are_refused_or_give_the_same_images(snapshot: Snapshot, copy: Path) -> None:
    chance, num_refused = Random(0), 0
    for name in ("snapshot.json", TREE_FILE, "labels.npy"):
        content = (copy / name).read_bytes()
        for _ in range(200):
            (copy / name).write_bytes(change_bytes(chance, content))
            try:
                images = read(copy, snapshot.digest)
            except DataError as error:
                num_refused += 1
                assert "\n" not in str(error)
            else:
                assert [(number, label) for number, label, _ in images] == [
                    (number, snapshot.labels[number]) for number in WANTED["train"]
                ]
                assert all(np.array_equal(pixels, snapshot.images[number]) for number, _, pixels in images)
        (copy / name).write_bytes(content)
    assert num_refused > 300


def edit(**values: Any) -> Callable[[Path], None]:
    """Change what snapshot.json says."""

    def apply(folder: Path) -> None:
        path = folder / "snapshot.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda folder: (folder / TREE_FILE).unlink(), "no tree.bin; `image_classifier data export --format snapshot`"),
        (lambda folder: (folder / "images.npy").unlink(), "there is no images.npy"),
        (shutil.rmtree, "there is no snapshot.json"),
        (edit(format_version=1), "it has format_version 1 instead of 2; `image_classifier data export"),
        (edit(format_version=3), "it has format_version 3 instead of 2"),
        (edit(format_version="2"), "format_version is a string instead of a whole number"),
        (edit(digest="0" * 64), "holds data of the digest 000000000000, not"),
        (edit(digest="x"), "has classes or a digest in another form"),
        (edit(classes=["a"] * 10), "does not lead to the digest .* the roots are not what it is of"),
        (edit(classes=["a"] * 1001), "has classes or a digest in another form"),
        (edit(classes=[""]), "has classes or a digest in another form"),
        (edit(num_train=299, num_test=21), "does not lead to the digest|is not the tree of 320 images"),
        (edit(num_train=301), "tree.bin is not the tree of 321 images"),
        (edit(num_train=2**62), "has parts of an impossible size"),
        (edit(num_train=-1), "has parts of an impossible size"),
        (edit(num_train=0, num_test=320), "has parts of an impossible size"),
        (edit(num_train=True), "num_train is true or false instead of a whole number"),
        (edit(shape=[3, 64, 64]), "images.npy is not the array of 320 images"),
        (edit(shape=[3, 32, 31]), "snapshot.json has images of another shape"),
        (edit(shape=[]), "snapshot.json has images of another shape"),
        (lambda folder: (folder / "snapshot.json").write_bytes(b"[" * 9999), "nested deeper"),
        (lambda folder: (folder / "snapshot.json").write_bytes(b" " * 2**21), "more than the 1,048,576 bytes"),
        (lambda folder: os.truncate(folder / "images.npy", 9), "images.npy is no array of NumPy"),
        (lambda folder: os.truncate(folder / "labels.npy", 2000), "labels.npy is not the array of 320 images"),
        (lambda folder: os.truncate(folder / TREE_FILE, 2000), "tree.bin is not the tree of 320 images"),
        (lambda folder: shutil.copy(folder / "labels.npy", folder / "images.npy"), "images.npy is not the array"),
    ],
)
def test_what_is_no_such_snapshot_is_refused(
    change: Callable[[Path], object], words: str, snapshot: Snapshot, copy: Path
) -> None:
    change(copy)
    with pytest.raises(DataError, match=words) as got:
        read(copy, snapshot.digest)
    assert "\n" not in str(got.value)


def test_a_range_that_is_not_there_is_refused(exported: Path) -> None:
    partial = PartialSnapshot(RangeReader(exported))
    assert partial.find_indices("test", 19, 20) == range(19, 20)
    for start, stop in ((290, 301), (300, 301), (5, 5), (6, 5)):
        with pytest.raises(SettingsError, match=f"--images: the train part of .* has images 0 to 299.*got: {start}:"):
            partial.find_indices("train", start, stop)
    with pytest.raises(SettingsError, match="--part: .* has no validation part; it has train, test"):
        partial.find_indices("validation", 0, 1)


def test_a_snapshot_is_not_written_over_another_nor_in_part(snapshot: Snapshot, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="exists already"):
        write_snapshot(snapshot, exported)
    with pytest.raises(DataError, match="changed while it was written"):
        write_snapshot(replace(snapshot, digest="0" * 64), tmp_path / "out")
    assert not list(tmp_path.iterdir())


# Corrections


@pytest.fixture(scope="module")
def corrected(snapshot: Snapshot, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A version in which three labels were corrected."""
    labels = {number: (int(snapshot.labels[number]) + 1) % 10 for number in (17, 18, 250)}
    folder = tmp_path_factory.mktemp("corrected") / "snapshot"
    write_snapshot(relabel(snapshot, labels), folder)
    return folder


def prove_both(old: Path, new: Path) -> list[Proof]:
    """Prove what differs between two snapshots, in each of them."""
    proofs = []
    for this, other in ((old, new), (new, old)):
        partial = PartialSnapshot(RangeReader(this))
        changes = partial.find_changes(PartialSnapshot(RangeReader(other)))
        proofs.append(partial.prove(partial.list_entries({"train": [each.index for each in changes]})))
    return proofs


def test_what_a_correction_changed_is_found_and_read_alone(snapshot: Snapshot, exported: Path, corrected: Path) -> None:
    partial = PartialSnapshot(RangeReader(corrected))
    before = PartialSnapshot(RangeReader(exported), snapshot.digest)
    changes = partial.find_changes(before)
    digests = Entries(snapshot)
    assert changes == [
        Change("train", number, Entry("train", number, int(snapshot.labels[number]), digests.get_digest(number)))
        for number in (17, 18, 250)
    ]
    images = iterate(partial, {"train": [17, 18, 250]})
    assert [label for _, label, _ in images] == [(int(snapshot.labels[number]) + 1) % 10 for number in (17, 18, 250)]
    assert partial.folder.num_bytes < 3 * IMAGE_BYTES + 5000 and before.folder.num_bytes < 5000
    assert before.find_changes(PartialSnapshot(RangeReader(exported))) == []


def test_added_images_are_changes_too(snapshot: Snapshot, exported: Path, tmp_path: Path) -> None:
    shorter = replace(snapshot, images=snapshot.images[5:], labels=snapshot.labels[5:], num_train=290)
    write_snapshot(relabel(shorter, {}), tmp_path / "out")
    smaller = PartialSnapshot(RangeReader(tmp_path / "out"))
    grown = PartialSnapshot(RangeReader(exported))
    changes = grown.find_changes(smaller)
    assert [(each.part, each.was is None) for each in changes].count(("train", True)) == 10
    other = relabel(snapshot, {}, classes=tuple("abcdefghij"))
    write_snapshot(other, tmp_path / "other")
    with pytest.raises(DataError, match="of another size or other classes than .*: compare versions of one data set"):
        grown.find_changes(PartialSnapshot(RangeReader(tmp_path / "other")))


def test_a_label_that_is_no_class_is_refused(snapshot: Snapshot, exported: Path, tmp_path: Path) -> None:
    for label in (10, -1):
        hostile = tmp_path / str(label)
        write_snapshot(relabel(snapshot, {17: label}), hostile)
        with pytest.raises(DataError, match="has an image of a class that the data set does not have"):
            read(hostile, None, {"train": [17]})
        with pytest.raises(DataError, match=f"{hostile} has an image of a class"):
            PartialSnapshot(RangeReader(exported)).find_changes(PartialSnapshot(RangeReader(hostile)))


def test_a_damaged_tree_hides_no_correction(copy: Path, corrected: Path) -> None:
    folder = Noting(copy)
    PartialSnapshot(RangeReader(corrected)).find_changes(PartialSnapshot(folder))
    at = next(start for name, start, size in folder.reads if name == TREE_FILE and size > 32)
    flip(copy / TREE_FILE, at)
    with pytest.raises(DataError, match="does not lead to its digest: level . is wrong at images .* of the train part"):
        PartialSnapshot(RangeReader(corrected)).find_changes(PartialSnapshot(RangeReader(copy)))


def test_two_proofs_show_that_nothing_but_labels_was_corrected(exported: Path, corrected: Path) -> None:
    pairs = find_corrections(*prove_both(exported, corrected))
    assert [pair.after.index for pair in pairs] == [17, 18, 250]
    assert all((pair.after.label - pair.before.label) % 10 == 1 for pair in pairs)


@pytest.mark.parametrize(
    "labels, values, words",
    [
        ({30: 0, 299: 0}, {}, "differ in more images than the proofs are about"),
        ({310: 0}, {}, "in their classes, their size or another part"),
        ({}, {"classes": tuple("abcdefghij")}, "in their classes, their size or another part"),
        ({}, {"num_train": 299}, "in their classes, their size or another part"),
        ({}, {"images": 17}, "image 17 of the train part has other pixels, not only a label"),
    ],
)
def test_another_difference_is_no_correction(
    labels: dict[int, int], values: dict[str, Any], words: str, snapshot: Snapshot, exported: Path
) -> None:
    places = [17, 18, 250]
    if "images" in values:
        images = snapshot.images.copy()
        images[values["images"], 0, 0, 0] ^= 1
        values = {"images": images}
    changes = {number: (int(snapshot.labels[number]) + 1) % 10 for number in [*places, *labels]}
    before, after = (Entries(each).prove(places) for each in (snapshot, relabel(snapshot, changes, **values)))
    with pytest.raises(ValueError, match=words):
        find_corrections(before, after)
    with pytest.raises(ValueError, match="not about the same places"):
        find_corrections(before, Entries(snapshot).prove([17, 18]))


def test_mutated_proofs_prove_no_correction(snapshot: Snapshot, exported: Path, corrected: Path) -> None:
    before, after = prove_both(exported, corrected)
    document, chance = json.loads(serialize_proof(after)), Random(0)
    digest = after.digest
    for _ in range(500):
        changed = json.loads(json.dumps(document))
        level = chance.choice(chance.choice(changed["images"])["path"])
        at = chance.randrange(len(level))
        place = chance.randrange(len(level[at]))
        level[at] = level[at][:place] + format(int(level[at][place], 16) ^ 1, "x") + level[at][place + 1 :]
        with pytest.raises(ValueError, match="does not lead to the root"):
            check_proof(parse_proof((json.dumps(changed, sort_keys=True, indent=1) + "\n").encode()), digest)
