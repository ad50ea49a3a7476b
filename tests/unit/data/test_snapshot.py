"""Snapshots: the same bits from each source, found again without reading it, whole or made again."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from image_classifier.access import Reading
from image_classifier.choices import Fit
from image_classifier.data.dataset import load_snapshot
from image_classifier.data.findings import Findings
from image_classifier.data.snapshot import (
    Snapshot,
    compute_digest,
    compute_fingerprint,
    find_stored,
    find_stores,
    prune,
    resize_snapshot,
)
from image_classifier.data.source import find_source
from image_classifier.errors import DataError, SettingsError, StorageError
from image_classifier.image_sizes import IMAGE_SIZES, ImageSize
from tests.conftest import PROJECT, require_real_data
from tests.datasets import (
    OURS,
    PUBLISHED,
    Arrays,
    encode,
    make_arrays,
    write_archive,
    write_cifar10_binary,
    write_cifar10_python,
    write_image_folder,
    write_parquet,
)

LOAD = "import sys; from pathlib import Path; from image_classifier.data.dataset import load_snapshot\n"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("IMAGE_CLASSIFIER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "snapshots"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset folder."""
    write_cifar10_python(tmp_path / "dataset", make_arrays())
    return tmp_path / "dataset"


def run_python(script: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own."""
    command = [sys.executable, "-W", "error", "-c", script, *map(str, words)]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)


def list_files(folder: Path) -> list[str]:
    """List all files and folders below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def compute_digest_again(arrays: Arrays, classes: list[str]) -> str:
    """Compute a digest as the documentation of `merkle` has it."""
    entries = [
        int(label).to_bytes(8, "little", signed=True) + hashlib.sha256(image.tobytes()).digest()
        for image, label in zip(arrays.images, arrays.labels, strict=True)
    ]
    num_test = len(arrays.labels) - arrays.num_train
    train, test = (compute_root_again(part) for part in (entries[: arrays.num_train], entries[arrays.num_train :]))
    names = ",".join(json.dumps(name) for name in classes)
    header = (
        f'{{"classes":[{names}],"format":"image_classifier snapshot 2","num_test":{num_test},'
        f'"num_train":{arrays.num_train},"roots":{{"test":"{test}","train":"{train}"}},"shape":[3,32,32]}}\n'
    )
    return hashlib.sha256(b"\2" + header.encode()).hexdigest()


def compute_root_again(nodes: list[bytes], kind: bytes = b"\0") -> str:
    """Compute the root of a part."""
    groups = [nodes[start : start + 16] for start in range(0, len(nodes), 16)]
    parents = [hashlib.sha256(kind + b"".join(group)).digest() for group in groups]
    return parents[0].hex() if len(parents) == 1 else compute_root_again(parents, b"\1")


def compute_flat_digest_again(arrays: Arrays, classes: list[str]) -> str:
    """Compute a digest of format 1, as the documentation of `compute_flat_digest` has it."""
    num_test = len(arrays.labels) - arrays.num_train
    names = ",".join(json.dumps(name) for name in classes)
    header = (
        f'{{"classes":[{names}],"format":"image_classifier snapshot 1","num_test":{num_test},'
        f'"num_train":{arrays.num_train},"shape":[3,32,32]}}\n'
    )
    labels = b"".join(int(label).to_bytes(8, "little", signed=True) for label in arrays.labels)
    return hashlib.sha256(header.encode() + arrays.images.tobytes() + labels).hexdigest()


@contextmanager
def write_denied(folder: Path) -> Iterator[None]:
    """Deny writing to a folder, to root too."""
    mode = stat.S_IMODE(folder.stat().st_mode)
    parents = [
        parent for parent in folder.parents if os.stat(parent).st_uid == os.getuid() and not os.stat(parent).st_mode & 1
    ]
    for parent in parents:
        parent.chmod(stat.S_IMODE(parent.stat().st_mode) | 0o011)
    folder.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # nobody; takes root's rights over files away until it is taken back
    try:
        with pytest.raises(PermissionError):
            (folder / "proof").touch()
        yield
    finally:
        os.seteuid(user)
        folder.chmod(mode)
        for parent in parents:
            parent.chmod(stat.S_IMODE(parent.stat().st_mode) & ~0o011)


def test_what_is_loaded_is_what_was_written(dataset: Path) -> None:
    arrays = make_arrays()
    snapshot = load_snapshot(dataset)
    assert snapshot.images.dtype == np.uint8 and snapshot.labels.dtype == np.int64
    np.testing.assert_array_equal(snapshot.images, arrays.images)
    np.testing.assert_array_equal(snapshot.labels, arrays.labels)
    assert (snapshot.num_train, snapshot.name, list(snapshot.classes)) == (arrays.num_train, "cifar10", OURS)
    for (images, labels), (expected_images, expected_labels) in zip(
        (snapshot.train, snapshot.test), arrays.splits, strict=True
    ):
        np.testing.assert_array_equal(images, expected_images)
        np.testing.assert_array_equal(labels, expected_labels)


def test_the_digest_is_as_documented(dataset: Path) -> None:
    snapshot, older = load_snapshot(dataset), compute_flat_digest_again(make_arrays(), OURS)
    assert snapshot.digest == compute_digest_again(make_arrays(), OURS)
    recognized = snapshot.recognize(older)
    assert (recognized.digest, recognized.digest_format, snapshot.digest_format) == (older, 1, 2)
    for digest in (None, snapshot.digest, "0" * 64, "none"):
        assert snapshot.recognize(digest) is snapshot


def write_format_1(dataset: Path, store: Path) -> Path:
    """Write a snapshot of a data set into a store, as an earlier version did."""
    arrays = make_arrays()
    folder = store / compute_flat_digest_again(arrays, OURS)
    folder.mkdir(parents=True)
    np.save(folder / "images.npy", arrays.images)
    np.save(folder / "labels.npy", arrays.labels.astype(np.int64))
    counts = {"num_train": arrays.num_train, "num_test": len(arrays.labels) - arrays.num_train}
    record = {"format_version": 1, "digest": folder.name, "classes": OURS, **counts, "shape": [3, 32, 32]}
    (folder / "snapshot.json").write_text(json.dumps(record), encoding="utf-8")
    (store / "index").mkdir()
    fingerprint = compute_fingerprint(find_source(dataset), dataset / "metadata.json", Reading(), reader=2)
    entry = {"format_version": 1, "digest": folder.name, "name": "cifar10", "findings": None}
    (store / "index" / f"{fingerprint}.json").write_text(json.dumps(entry), encoding="utf-8")
    return folder


def test_a_snapshot_of_format_1_is_found_checked_and_left_as_it_is(
    dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_format_1(dataset, dataset / ".snapshots")
    before = list_files(dataset)
    snapshot = load_snapshot(dataset)
    assert snapshot.digest == compute_digest_again(make_arrays(), OURS) and list_files(dataset) == before
    assert find_stored([dataset / ".snapshots"], folder.name, "cifar10") is not None
    flip_bit(folder / "images.npy")
    assert load_snapshot(dataset).digest == snapshot.digest
    assert "damaged" in caplog.text and len(list_files(dataset)) > len(before)


def test_each_source_of_the_same_images_has_the_same_digest(tmp_path: Path) -> None:
    arrays = make_arrays()
    # A folder of images is in the order of its classes' names, so for it to be the same data set the others are too.
    cut = arrays.num_train
    splits = [
        sorted(part, key=OURS.__getitem__) for part in (arrays.labels[:cut].tolist(), arrays.labels[cut:].tolist())
    ]
    labels = np.array(splits[0] + splits[1])
    arrays = Arrays(arrays.images, labels, cut)
    write_cifar10_python(tmp_path / "python" / "cifar-10-batches-py", arrays)
    write_cifar10_python(tmp_path / "again", arrays, protocol=4)
    write_cifar10_binary(tmp_path / "binary" / "cifar-10-batches-bin", arrays)
    write_archive(tmp_path / "python.tar.gz", tmp_path / "python" / "cifar-10-batches-py")
    (tmp_path / "packed").mkdir()
    write_archive(tmp_path / "packed" / "cifar-10-binary.tar.gz", tmp_path / "binary" / "cifar-10-batches-bin")
    write_parquet(tmp_path / "parquet" / "plain_text", arrays, PUBLISHED)
    write_image_folder(tmp_path / "folder", arrays, OURS)
    (tmp_path / "folder" / "metadata.json").write_text(json.dumps({"classes": OURS}), encoding="utf-8")
    digests = {
        name: load_snapshot(tmp_path / name).digest
        for name in ("python", "again", "binary", "python.tar.gz", "packed", "parquet", "folder")
    }
    assert digests == dict.fromkeys(digests, compute_digest_again(arrays, OURS))


def test_digest_differs_with_each_thing_it_is_over() -> None:
    arrays, classes = make_arrays(), tuple(OURS)
    digest = compute_digest(arrays.images, arrays.labels, classes, 23)
    images, labels = arrays.images.copy(), arrays.labels.copy()
    images[5, 1, 2, 3] ^= 1
    labels[5] += 1
    others = {
        compute_digest(images, arrays.labels, classes, 23),
        compute_digest(arrays.images, labels, classes, 23),
        compute_digest(arrays.images, arrays.labels, classes, 22),
        compute_digest(arrays.images, arrays.labels, (*classes, "boat"), 23),
        compute_digest(arrays.images, arrays.labels, (*classes[:9], "boat"), 23),
    }
    assert len(others) == 5 and digest not in others


def test_the_second_load_does_not_read_the_source(dataset: Path) -> None:
    script = LOAD + (
        "opened = []\n"
        "sys.addaudithook(lambda event, words: opened.append(str(words[0])) if event == 'open' else None)\n"
        "print(load_snapshot(Path(sys.argv[1])).digest, *opened, sep='\\n')\n"
    )
    first, second = (run_python(script, dataset).stdout.splitlines() for _ in range(2))
    source = {str(path) for path in dataset.iterdir() if path.is_file()}
    assert len(source) == 7 and source <= set(first)
    assert second[0] == first[0] and not source & set(second)


def test_a_mapped_snapshot_makes_tensors_without_a_warning_and_protects_the_disk(dataset: Path) -> None:
    import torch

    snapshot = load_snapshot(dataset)
    assert not isinstance(snapshot.images, np.memmap) and snapshot.images.base is not None
    tensor = torch.from_numpy(snapshot.images)
    tensor[0] = 7
    assert (load_snapshot(dataset).images[0] == make_arrays().images[0]).all()


def test_a_changed_source_is_read_again(dataset: Path) -> None:
    before = load_snapshot(dataset)
    arrays = make_arrays()
    arrays.images[0, 0, 0, 0] ^= 1
    status = (dataset / "data_batch_1").stat()
    write_cifar10_python(dataset, arrays)
    os.utime(dataset / "data_batch_1", ns=(status.st_atime_ns, status.st_mtime_ns))  # same size, same time
    after = load_snapshot(dataset)
    assert after.digest != before.digest
    assert after.images[0, 0, 0, 0] == arrays.images[0, 0, 0, 0]


def test_changed_metadata_is_used(dataset: Path) -> None:
    before = load_snapshot(dataset)
    classes = [f"class_{number}" for number in range(10)]
    (dataset / "metadata.json").write_text(json.dumps({"name": "mine", "classes": classes}), encoding="utf-8")
    after = load_snapshot(dataset)
    assert (after.name, list(after.classes)) == ("mine", classes) and after.digest != before.digest
    (dataset / "metadata.json").write_text(json.dumps({"name": "other", "classes": classes}), encoding="utf-8")
    assert (load_snapshot(dataset).name, load_snapshot(dataset).digest) == ("other", after.digest)


def test_the_digest_in_metadata_must_be_the_data_s(dataset: Path) -> None:
    digest = load_snapshot(dataset).digest
    (dataset / "metadata.json").write_text(json.dumps({"digest": digest.upper()}), encoding="utf-8")
    assert load_snapshot(dataset).digest == digest
    (dataset / "metadata.json").write_text(json.dumps({"digest": "0" * 64}), encoding="utf-8")
    for _ in range(2):
        with pytest.raises(DataError, match=f"has the digest {digest}, but its metadata.json says {'0' * 64}"):
            load_snapshot(dataset)


@pytest.mark.parametrize("num_train, num_test", [(0, 3), (3, 0)])
def test_both_splits_need_an_image(num_train: int, num_test: int, tmp_path: Path) -> None:
    write_image_folder(tmp_path / "dataset", make_arrays(num_train, num_test, num_classes=2), ["a", "b"])
    with pytest.raises(DataError, match=f"has {num_train} training images and {num_test} test images; it needs"):
        load_snapshot(tmp_path / "dataset")
    assert not (tmp_path / "dataset" / ".snapshots").exists()


def flip_bit(path: Path) -> None:
    """Change the last byte."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def write_head(path: Path, head: bytes) -> None:
    """Write an .npy file of 100 bytes with this head."""
    path.write_bytes(b"\x93NUMPY\1\0" + len(head).to_bytes(2, "little") + head + bytes(100))


@pytest.mark.parametrize(
    "name, damage",
    [
        ("images.npy", flip_bit),
        ("labels.npy", flip_bit),
        ("images.npy", lambda path: os.truncate(path, 4000)),
        ("images.npy", lambda path: os.truncate(path, 0)),
        ("labels.npy", lambda path: os.truncate(path, 100)),
        ("images.npy", Path.unlink),
        ("snapshot.json", Path.unlink),
        ("snapshot.json", lambda path: path.write_bytes(b"{")),
        ("snapshot.json", lambda path: path.write_bytes(b'{"format_version": 1}')),
        ("snapshot.json", lambda path: path.write_bytes(b'{"format_version": 1, "classes": 3, "num_train": 2}')),
        ("images.npy", lambda path: np.save(path, np.array([{}], object), allow_pickle=True)),
        ("images.npy", lambda path: write_head(path, b"{'descr': ('|u1")),
        (
            "images.npy",
            lambda path: write_head(
                path, b"{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999999999999,)}"
            ),
        ),
        ("labels.npy", lambda path: write_head(path, b"{'descr': '<i8', 'fortran_order': False, 'shape': (-9,)}")),
    ],
)
def test_a_damaged_snapshot_is_set_aside_and_made_again(
    name: str, damage: Callable[[Path], None], dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    digest = load_snapshot(dataset).digest
    folder = dataset / ".snapshots" / digest
    damage(folder / name)
    with caplog.at_level(logging.WARNING):
        snapshot = load_snapshot(dataset)
    assert snapshot.digest == digest
    np.testing.assert_array_equal(snapshot.images, make_arrays().images)
    assert "damaged" in caplog.text and (dataset / ".snapshots" / f"damaged-{digest}").is_dir()
    caplog.clear()
    assert load_snapshot(dataset).digest == digest and caplog.text == ""


def write_findings(path: Path, **findings: object) -> None:
    """Put findings into the entry of an index."""
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"findings": findings}))


@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        lambda path: path.write_bytes(b"{"),
        lambda path: path.write_bytes(b"[]"),
        lambda path: write_findings(path, num_fitted=1, sizes=3, largest_ratio=1, left_out=[]),
        lambda path: write_findings(path, num_fitted=1, sizes={"1 x 1": "1"}, largest_ratio=1, left_out=[]),
        lambda path: write_findings(path, num_fitted=[], sizes={}, largest_ratio=1, left_out=[]),
    ],
)
def test_a_damaged_index_is_made_again(damage: Callable[[Path], None], dataset: Path) -> None:
    snapshot = load_snapshot(dataset)
    digest, notes = snapshot.digest, snapshot.describe_notes()
    before = list_files(dataset)
    (entry,) = (dataset / ".snapshots" / "index").iterdir()
    damage(entry)
    snapshot = load_snapshot(dataset)
    assert (snapshot.digest, snapshot.describe_notes()) == (digest, notes)
    assert list_files(dataset) == before


@pytest.mark.parametrize("pattern", ["index/*.json", "*/snapshot.json"])
def test_a_later_format_is_refused(pattern: str, dataset: Path) -> None:
    load_snapshot(dataset)
    (path,) = [path for path in (dataset / ".snapshots").glob(pattern)]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 3}), encoding="utf-8")
    with pytest.raises(
        DataError, match="format_version 3, this version of image_classifier reads 2: use a later version"
    ):
        load_snapshot(dataset)


def test_a_file_s_snapshot_lies_in_the_cache(dataset: Path, cache: Path, tmp_path: Path) -> None:
    write_archive(tmp_path / "archive.tar.gz", dataset)
    snapshot = load_snapshot(tmp_path / "archive.tar.gz")
    assert (cache / snapshot.digest / "images.npy").is_file()
    assert load_snapshot(tmp_path / "archive.tar.gz").digest == snapshot.digest


def test_a_folder_that_cannot_be_written_has_its_snapshot_in_the_cache(dataset: Path, cache: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    with write_denied(dataset):
        snapshot = load_snapshot(dataset)
        assert load_snapshot(dataset).digest == snapshot.digest
    assert (cache / snapshot.digest / "images.npy").is_file() and not (dataset / ".snapshots").exists()


def test_a_snapshot_in_a_folder_that_cannot_be_written_any_more_is_used(dataset: Path, cache: Path) -> None:
    digest = load_snapshot(dataset).digest
    with write_denied(dataset):
        assert load_snapshot(dataset).digest == digest
    assert not cache.exists()


def test_no_place_to_write_is_said(dataset: Path, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("in the way", encoding="utf-8")
    with write_denied(dataset), pytest.raises(StorageError, match=f"nor to {cache} .*; set IMAGE_CLASSIFIER_CACHE"):
        load_snapshot(dataset)


def test_processes_that_start_at_once_make_one_snapshot(dataset: Path) -> None:
    script = LOAD + "sys.stdin.readline(); print(load_snapshot(Path(sys.argv[1])).digest)"
    command = [sys.executable, "-W", "error", "-c", script, str(dataset)]
    processes = [
        subprocess.Popen(
            command, cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    time.sleep(0.5)  # they wait for a line, with everything imported
    outputs = []
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        outputs.append(process.communicate(timeout=60))
    assert outputs == [(f"{compute_digest_again(make_arrays(), OURS)}\n", "")] * 4
    assert sorted(os.listdir(dataset / ".snapshots")) == [".lock", outputs[0][0].strip(), "index"]


def test_processes_that_make_and_prune_at_once_do_not_hinder_each_other(dataset: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from image_classifier.data.dataset import load_snapshot; "
        "from image_classifier.data.snapshot import prune\n"
        "sys.stdin.readline()\n"
        "for _ in range(30):\n"
        "    load_snapshot(Path(sys.argv[1])) if sys.argv[2] == 'load' else prune(Path(sys.argv[1]))\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", script, str(dataset), action],
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for action in ("load", "load", "prune", "prune")
    ]
    time.sleep(0.5)
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, errors


LIMITED = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (50_000, r.RLIM_INFINITY))\n"
UNLIMITED = "r.setrlimit(r.RLIMIT_FSIZE, (r.RLIM_INFINITY, r.RLIM_INFINITY))\n"


def test_no_space_left_leaves_nothing(dataset: Path) -> None:
    before = list_files(dataset)
    # What is written at the process's exit, by coverage, may be longer.
    load = f"try: load_snapshot(Path(sys.argv[1]))\nfinally: {UNLIMITED}"
    result = run_python(LOAD + LIMITED + load, dataset)
    assert re.match(
        r"image_classifier\.errors\.StorageError: cannot write .*File too large", result.stderr.splitlines()[-1]
    )
    assert list_files(dataset) == before


def test_a_process_killed_while_it_writes_leaves_no_trace_in_the_next(dataset: Path) -> None:
    kill = "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n"  # the write over the limit kills
    result = run_python(LOAD + LIMITED + kill + "load_snapshot(Path(sys.argv[1]))", dataset)
    assert result.returncode == -signal.SIGXFSZ
    (images,) = (dataset / ".snapshots").glob(".tmp-*/snapshot/images.npy")
    assert images.stat().st_size == 50_000
    snapshot = load_snapshot(dataset)
    np.testing.assert_array_equal(snapshot.images, make_arrays().images)
    assert sorted(os.listdir(dataset / ".snapshots")) == [".lock", snapshot.digest, "index"]


def test_a_source_that_changes_while_it_is_read_is_refused(dataset: Path) -> None:
    over = threading.Event()

    def change() -> None:
        for time_ns in itertools.count():
            os.utime(dataset / "test_batch", ns=(time_ns, time_ns))
            if over.is_set():
                return

    thread = threading.Thread(target=change)
    thread.start()
    try:
        with pytest.raises(DataError, match="was changed while it was read; start again"):
            load_snapshot(dataset)
    finally:
        over.set()
        thread.join()
    assert load_snapshot(dataset).num_train == 23


def test_prune_removes_snapshots_and_nothing_else(dataset: Path, cache: Path, tmp_path: Path) -> None:
    before = list_files(dataset)
    snapshot = load_snapshot(dataset)
    flip_bit(dataset / ".snapshots" / snapshot.digest / "labels.npy")
    load_snapshot(dataset)  # sets one aside
    write_archive(tmp_path / "archive.tar.gz", dataset)
    load_snapshot(tmp_path / "archive.tar.gz")
    (cache / "notes.txt").write_text("mine", encoding="utf-8")
    (cache.parent / "other").mkdir()
    size = sum(
        path.stat().st_size
        for store in (dataset / ".snapshots", cache)
        for path in store.rglob("*")
        if path.name != "notes.txt" and path.is_file()
    )
    images = load_snapshot(dataset).images
    assert prune(dataset) == size > 0
    assert list_files(dataset) == before
    assert list_files(cache.parent) == ["other", "snapshots", "snapshots/.lock", "snapshots/notes.txt"]
    np.testing.assert_array_equal(images, make_arrays().images)  # still mapped
    assert prune(dataset) == 0


def test_prune_follows_no_link_out_of_the_store(dataset: Path, tmp_path: Path) -> None:
    digest = load_snapshot(dataset).digest
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_bytes(b"1")
    shutil.rmtree(dataset / ".snapshots" / digest)
    (dataset / ".snapshots" / digest).symlink_to(tmp_path / "precious")
    prune(dataset)
    assert (tmp_path / "precious" / "file").exists() and not (dataset / ".snapshots").exists()


def test_stores_follow_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert find_stores(tmp_path) == [tmp_path / ".snapshots", tmp_path / "cache" / "snapshots"]
    monkeypatch.delenv("IMAGE_CLASSIFIER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert find_stores(None) == [tmp_path / "xdg" / "image_classifier" / "snapshots"]
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_stores(None) == [tmp_path / ".cache" / "image_classifier" / "snapshots"]


def compute_published_digest(snapshot: Snapshot) -> str:
    """Compute a digest over pixels and labels, batch by batch, with labels of one byte."""
    size = snapshot.num_train // 5
    starts = [*range(0, snapshot.num_train, size), snapshot.num_train, len(snapshot.labels)]
    digest = hashlib.sha256()
    for start, end in zip(starts, starts[1:]):
        digest.update(snapshot.images[start:end].tobytes() + snapshot.labels[start:end].astype(np.uint8).tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize(
    "variable, digest",
    [
        ("IMAGE_CLASSIFIER_CIFAR10", "161b6a210413e330cb110774430d88f004cb137346bc69717035d5463e495909"),
        ("IMAGE_CLASSIFIER_CIFAR10_ORIGINAL", "23be911656870598d1664b0ca20f4cca4c28c74caca8f693107224715b383c4e"),
    ],
)
def test_real_data_are_read_bit_for_bit(variable: str, digest: str) -> None:
    snapshot = load_snapshot(require_real_data(variable))
    assert compute_published_digest(snapshot) == digest
    assert list(snapshot.classes) == OURS


def test_a_second_run_on_real_data_reads_no_more_than_it_uses() -> None:
    def count_bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    folder = require_real_data("IMAGE_CLASSIFIER_CIFAR10")
    load_snapshot(folder)
    before = count_bytes_read()
    snapshot = load_snapshot(folder)
    assert snapshot.images[:500].sum() > 0
    assert count_bytes_read() - before < snapshot.images.nbytes / 100


def write_odd_folder(folder: Path) -> Path:
    """Write images by class of which one cannot be read and two have another size."""
    write_image_folder(folder, make_arrays(40, 10, num_classes=2), ["cat", "dog"])
    (folder / "train" / "cat" / "bad.png").write_bytes(b"no image")
    for name, shape in (("high.png", (3, 60, 30)), ("wide.png", (3, 40, 80))):
        (folder / "train" / "dog" / name).write_bytes(
            encode(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
        )
    return folder


def test_images_that_cannot_be_read_are_left_out_only_when_asked_for(tmp_path: Path) -> None:
    folder = write_odd_folder(tmp_path / "odd")
    with pytest.raises(
        DataError, match="1 of the images cannot be read; repair .* or leave them out with --skip_bad: "
    ):
        load_snapshot(folder)
    for _ in range(2):  # the second time from the store
        snapshot = load_snapshot(folder, reading=Reading(skip_bad=True))
        assert snapshot.num_train == 42 and snapshot.findings is not None
        (reason,) = snapshot.findings.left_out
        assert reason.startswith(f"{folder}/train/cat/bad.png: not a PNG, JPEG, WEBP or BMP image")
    with pytest.raises(DataError, match="cannot be read"):
        load_snapshot(folder)
    (folder / "train" / "cat" / "bad.png").unlink()
    whole = load_snapshot(folder)
    assert whole.digest == snapshot.digest and whole.findings is not None and whole.findings.left_out == ()


def test_each_way_to_fit_images_has_its_snapshot_and_says_what_it_did(tmp_path: Path) -> None:
    folder = write_odd_folder(tmp_path / "odd")
    (folder / "train" / "cat" / "bad.png").unlink()
    fits: list[Fit] = ["squeeze", "crop", "pad"]
    snapshots = {fit: load_snapshot(folder, reading=Reading(fit=fit)) for fit in fits}
    assert len({snapshot.digest for snapshot in snapshots.values()}) == 3
    for fit, snapshot in snapshots.items():
        assert snapshot.findings == Findings(fit, 2, {"30 x 60": 1, "80 x 40": 1}, 2.0)
        assert load_snapshot(folder, reading=Reading(fit=fit)).digest == snapshot.digest
    with pytest.raises(DataError, match="2 of the images cannot be read.*30 x 60 pixels instead of 32 x 32"):
        load_snapshot(folder, reading=Reading(fit="refuse"))


def test_a_validation_part_is_part_of_the_digest(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "data", make_arrays(), OURS)
    whole = load_snapshot(tmp_path / "data")
    shutil.copytree(tmp_path / "data" / "test", tmp_path / "data" / "val")
    snapshot = load_snapshot(tmp_path / "data")
    assert (snapshot.num_train, snapshot.num_validation, snapshot.num_test) == (23, 7, 7)
    np.testing.assert_array_equal(snapshot.test[0], whole.test[0])
    assert snapshot.digest != whole.digest
    moved = compute_digest(snapshot.images, snapshot.labels, snapshot.classes, 30)  # trained on instead
    assert moved not in (snapshot.digest, whole.digest)
    header = (
        f'{{"classes":{json.dumps(snapshot.classes, separators=(",", ":"))},"format":"image_classifier snapshot 1",'
        '"num_test":7,"num_train":23,"num_validation":7,"shape":[3,32,32]}\n'
    )
    content = header.encode() + snapshot.images.tobytes() + snapshot.labels.astype("<i8").tobytes()
    assert snapshot.recognize(hashlib.sha256(content).hexdigest()).digest_format == 1


def test_how_files_are_read_does_not_go_with_a_database() -> None:
    with pytest.raises(SettingsError, match="--fit and --skip_bad apply only to files; the images of db:birds"):
        load_snapshot(Path("db:birds"), reading=Reading(fit="crop"))


@pytest.mark.parametrize("side", IMAGE_SIZES)
def test_each_image_size_has_its_snapshot_from_whatever_source(side: ImageSize, tmp_path: Path) -> None:
    arrays = make_arrays()
    write_cifar10_python(tmp_path / "python", arrays)
    write_archive(tmp_path / "archive.tar.gz", tmp_path / "python")
    write_cifar10_binary(tmp_path / "binary", arrays)
    write_parquet(tmp_path / "parquet", arrays, OURS)
    reading = Reading(image_size=side)
    snapshots = [load_snapshot(tmp_path / name, reading=reading) for name in ("python", "archive.tar.gz", "binary")]
    snapshots.append(load_snapshot(tmp_path / "parquet", reading=reading))
    first = snapshots[0]
    assert len({snapshot.digest for snapshot in snapshots}) == 1
    assert first.images.shape == (30, 3, side, side) and first.image_size == side
    for image, original in zip(first.images, arrays.images, strict=True):
        pixels = Image.fromarray(original.transpose(1, 2, 0)).resize((side, side), Image.Resampling.BICUBIC)
        assert np.array_equal(image.transpose(1, 2, 0), np.asarray(pixels))
    assert np.array_equal(first.labels, arrays.labels)
    notes = [] if side == 32 else [f"note: 30 images were resized to {side} x {side}, from 32 x 32"]
    assert [note for note in first.describe_notes() if note.startswith("note")] == notes
    assert (first.digest == load_snapshot(tmp_path / "binary").digest) == (side == 32)
    record = json.loads((tmp_path / "binary" / ".snapshots" / first.digest / "snapshot.json").read_text())
    assert record["shape"] == [3, side, side]
    assert isinstance(load_snapshot(tmp_path / "binary", reading=reading).images.base, np.memmap)


def test_a_large_image_in_a_folder_keeps_its_pixels_where_they_are_asked_for(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, 96, 96), dtype=np.uint8)
    for part in ("train", "test"):
        (tmp_path / part / "cat").mkdir(parents=True)
        (tmp_path / part / "cat" / "0.png").write_bytes(encode(image))
    whole = load_snapshot(tmp_path, reading=Reading(image_size=96, fit="refuse"))
    assert np.array_equal(whole.images[0], image) and whole.findings is not None and not whole.findings.num_fitted
    with pytest.raises(DataError, match="96 x 96 pixels instead of 64 x 64"):
        load_snapshot(tmp_path, reading=Reading(image_size=64, fit="refuse"))


def test_a_snapshot_is_resized_once_to_another_size(dataset: Path) -> None:
    snapshot, stores = load_snapshot(dataset), find_stores(dataset)
    resized = resize_snapshot(stores, snapshot, 64)
    assert resized.digest == load_snapshot(dataset, reading=Reading(image_size=64)).digest
    assert (resized.name, resized.num_train, resized.classes) == (snapshot.name, snapshot.num_train, snapshot.classes)
    times = {path: path.stat().st_mtime_ns for path in stores[0].rglob("*")}
    assert resize_snapshot(stores, snapshot, 64).digest == resized.digest
    assert {
        path: path.stat().st_mtime_ns for path in stores[0].rglob("*") if path.name != ".lock"
    }.items() <= times.items()


def test_an_index_of_before_there_were_other_sizes_is_read(tmp_path: Path) -> None:
    snapshot = load_snapshot(write_odd_folder_of_two_sizes(tmp_path))
    (entry,) = (tmp_path / ".snapshots" / "index").iterdir()
    content = json.loads(entry.read_text())
    assert content["findings"].pop("image_size") == 32
    entry.write_text(json.dumps(content))
    again = load_snapshot(tmp_path)
    assert (again.digest, again.findings) == (snapshot.digest, snapshot.findings)
    assert json.loads(entry.read_text()) == content  # and not made anew


def write_odd_folder_of_two_sizes(folder: Path) -> Path:
    """Write one image to train with and a larger one to test with."""
    for part, side in (("train", 32), ("test", 40)):
        (folder / part / "cat").mkdir(parents=True)
        (folder / part / "cat" / "0.png").write_bytes(encode(np.zeros((3, side, side), np.uint8)))
    return folder


def test_the_fingerprint_of_32_pixels_is_what_it_was(dataset: Path) -> None:
    source = find_source(dataset)
    status = [os.stat(dataset / name) for name in source.files]
    lines = ["Reading(fit='squeeze', skip_bad=False)"]
    for name, s in zip(source.files, status, strict=True):
        lines.append(f"{name}\0{s.st_size} {s.st_mtime_ns} {s.st_ino} {s.st_ctime_ns}")
    for reader in (2, 3):
        expected = hashlib.sha256(os.fsencode(f"{reader} " + "\n".join(lines)) + b"\0").hexdigest()
        for reading in (Reading(), Reading(image_size=32)):
            assert compute_fingerprint(source, dataset / "metadata.json", reading, reader) == expected
        assert compute_fingerprint(source, dataset / "metadata.json", Reading(image_size=64), reader) != expected
