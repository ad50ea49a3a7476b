"""`image_classifier data` as its users type it."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from image_classifier.cli.data import ACTIONS
from image_classifier.data.dataset import load_snapshot
from image_classifier.data.sample import locked_dataset
from tests.conftest import PROJECT, find_port
from tests.datasets import (
    OURS,
    assert_refused,
    encode,
    make_arrays,
    run_data,
    write_archive,
    write_cifar10_python,
    write_cifar100_python,
    write_image_folder,
)


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[str]:
    """The address of a server with a small cifar-10-python.tar.gz and cifar-100-python.tar.gz."""
    folder = tmp_path / "mirror"
    write_cifar10_python(folder / "cifar-10-batches-py", make_arrays())
    write_cifar100_python(folder / "cifar-100-python", make_arrays(), [f"fine_{number}" for number in range(100)])
    write_archive(folder / "cifar-10-python.tar.gz", folder / "cifar-10-batches-py")
    write_archive(folder / "cifar-100-python.tar.gz", folder / "cifar-100-python")
    handler = partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, format: str, *words: object) -> None:
        pass


def compute_md5(tmp_path: Path, name: str) -> str:
    return hashlib.md5((tmp_path / "mirror" / name).read_bytes()).hexdigest()


@pytest.mark.parametrize("words", [[], ["--source", "cifar10"]])
def test_prepare_downloads_cifar10_once(mirror: str, tmp_path: Path, words: list[str]) -> None:
    name = "cifar-10-python.tar.gz"
    options = [*words, "--dataset_folder", "data/cifar_dataset", "--digest", compute_md5(tmp_path, name)]
    first = run_data("prepare", *options, "--url", f"{mirror}/{name}", cwd=tmp_path)
    assert (first.returncode, first.stdout) == (0, "data/cifar_dataset\n"), first.stderr
    assert (
        f"downloading {mirror}/{name}" in first.stderr and "cifar10: 23 training images, 7 test images" in first.stderr
    )
    folder = tmp_path / "data" / "cifar_dataset"
    assert sorted(os.listdir(folder)) == [".snapshots", name, "metadata.json"]
    assert json.loads((folder / "metadata.json").read_bytes()) == {
        "format_version": 1,
        "name": "cifar10",
        "classes": OURS,
    }
    np.testing.assert_array_equal(load_snapshot(folder).images, make_arrays().images)
    second = run_data("prepare", *options, "--url", f"http://127.0.0.1:{find_port()}/", cwd=tmp_path)
    assert (second.returncode, second.stdout) == (0, "data/cifar_dataset\n")
    assert "is there already" in second.stderr and "downloading" not in second.stderr


def test_prepare_downloads_cifar100(mirror: str, tmp_path: Path) -> None:
    name = "cifar-100-python.tar.gz"
    options = ["--source", "cifar100", "--url", f"{mirror}/{name}", "--digest", compute_md5(tmp_path, name)]
    assert run_data("prepare", *options, "--dataset_folder", tmp_path / "fine").returncode == 0
    snapshot = load_snapshot(tmp_path / "fine")
    assert (snapshot.name, len(snapshot.classes), snapshot.classes[3]) == ("cifar100", 100, "fine_3")


def test_prepare_checks_the_published_digest_unless_told_another(mirror: str, tmp_path: Path) -> None:
    result = run_data("prepare", "--url", f"{mirror}/cifar-10-python.tar.gz", "--dataset_folder", tmp_path / "data")
    assert_refused(result, "instead of c58f30108f718f92721af3b95e74349a: it was removed")
    assert not (tmp_path / "data").exists()


def test_prepare_takes_no_data_set_that_another_process_still_writes(tmp_path: Path) -> None:
    options = ("--source", "sample", "--num_train", "20", "--num_test", "10", "--dataset_folder", tmp_path)
    with locked_dataset(tmp_path):
        (tmp_path / "data_batch_1.bin").write_bytes(bytes(3073))
        result = run_data("prepare", *options)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == (f"error: another process writes a data set to {tmp_path}; wait for it")
    (tmp_path / "data_batch_1.bin").unlink()
    assert run_data("prepare", *options).returncode == 0


def test_prepare_draws_the_sample_set(tmp_path: Path) -> None:
    options = [
        "--source",
        "sample",
        "--num_train",
        30,
        "--num_test",
        20,
        "--seed",
        4,
        "--dataset_folder",
        tmp_path / "a b",
    ]
    first = run_data("prepare", *options)
    assert (first.returncode, first.stdout) == (0, f"{tmp_path / 'a b'}\n"), first.stderr
    assert "sample: 30 training images, 20 test images" in first.stderr
    assert load_snapshot(tmp_path / "a b").name == "sample"
    second = run_data("prepare", *options)
    assert second.stdout == first.stdout and "is there already" in second.stderr


def test_prepare_takes_what_is_there(tmp_path: Path) -> None:
    write_cifar10_python(tmp_path / "cifar-10-batches-py", make_arrays())
    result = run_data("prepare", "--dataset_folder", tmp_path)
    assert (result.returncode, result.stdout) == (0, f"{tmp_path}\n")
    assert f"digest {load_snapshot(tmp_path).digest}" in result.stderr


def test_prepare_puts_no_second_data_set_into_a_folder(tmp_path: Path) -> None:
    write_cifar10_python(tmp_path, make_arrays())
    result = run_data("prepare", "--dataset_folder", tmp_path, "--source", "sample")
    assert_refused(result, "holds cifar10 already: leave --source out to take it, or choose another --dataset_folder")


def test_an_unreachable_address_is_an_error_unless_the_sample_set_may_stand_in(mirror: str, tmp_path: Path) -> None:
    nowhere = f"http://127.0.0.1:{find_port()}/cifar.tar.gz"
    options = ["--dataset_folder", tmp_path / "cifar_dataset", "--num_tries", 1, "--num_train", 30, "--num_test", 10]
    assert_refused(run_data("prepare", *options, "--url", nowhere), f"{nowhere} cannot be reached (Connection refused)")
    assert not (tmp_path / "cifar_dataset").exists()

    for _ in range(2):  # the second time it is there already
        result = run_data("prepare", *options, "--url", nowhere, "--sample_if_unreachable")
        assert (result.returncode, result.stdout) == (0, f"{tmp_path / 'sample_dataset'}\n"), result.stderr
        assert "cannot be reached" in result.stderr and "generated sample set: this is not CIFAR" in result.stderr
    assert load_snapshot(tmp_path / "sample_dataset").name == "sample"
    assert not (tmp_path / "cifar_dataset").exists()

    name = "cifar-10-python.tar.gz"  # once it can be reached, the real data come into their own folder
    options += ["--url", f"{mirror}/{name}", "--digest", compute_md5(tmp_path, name)]
    result = run_data("prepare", *options, "--sample_if_unreachable")
    assert (result.returncode, result.stdout) == (0, f"{tmp_path / 'cifar_dataset'}\n"), result.stderr
    assert load_snapshot(tmp_path / "cifar_dataset").name == "cifar10"


def test_the_sample_set_stands_in_for_no_other_failure(mirror: str, tmp_path: Path) -> None:
    for url, complaint in ((f"{mirror}/none", "HTTP status 404"), (f"{mirror}/cifar-10-python.tar.gz", "instead of")):
        result = run_data("prepare", "--url", url, "--dataset_folder", tmp_path / "data", "--sample_if_unreachable")
        assert_refused(result, complaint)
    assert not (tmp_path / "sample_dataset").exists()


def test_info_shows_each_class_and_split(tmp_path: Path) -> None:
    arrays = make_arrays()
    arrays.labels[arrays.labels == 6] = 5
    write_cifar10_python(tmp_path, arrays)
    result = run_data("info", "--dataset_folder", tmp_path, "--output", tmp_path / "sheet.png")
    assert (result.returncode, result.stderr) == (0, f"the picture is {tmp_path / 'sheet.png'}\n")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[:2] == [["name", "cifar10"], ["digest", load_snapshot(tmp_path).digest]]
    table = {line[0]: line[1:] for line in lines if len(line) == 4}
    train, test = (np.bincount(labels, minlength=10) for _, labels in arrays.splits)
    for label, name in enumerate(OURS):
        assert table[name] == [str(train[label]), str(test[label]), str(train[label] + test[label])]
    assert table["frog"] == ["0", "0", "0"] and table["total"] == ["23", "7", "30"]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG" and sheet.width > 1000


def test_prune_says_how_much_it_removes(tmp_path: Path) -> None:
    write_cifar10_python(tmp_path, make_arrays())
    load_snapshot(tmp_path)
    size = sum(path.stat().st_size for path in (tmp_path / ".snapshots").rglob("*") if path.is_file())
    cache = str(tmp_path / "cache")
    first = run_data("prune", "--dataset_folder", tmp_path, IMAGE_CLASSIFIER_CACHE=cache)
    assert (first.returncode, first.stdout) == (0, f"removed {size:,} bytes of snapshots\n")
    assert not (tmp_path / ".snapshots").exists() and (tmp_path / "data_batch_1").exists()
    assert (
        run_data("prune", "--dataset_folder", tmp_path, IMAGE_CLASSIFIER_CACHE=cache).stdout
        == "removed 0 bytes of snapshots\n"
    )


def test_what_was_found_in_images_is_said_and_what_was_left_out_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    write_image_folder(folder, make_arrays(60, 10, num_classes=2), ["cat", "dog"])
    (folder / "test").rename(folder / "valid")
    (folder / "train" / "cat" / "bad.png").write_bytes(b"no image")
    (folder / "train" / "owl").mkdir()
    (folder / "train" / "owl" / "wide.png").write_bytes(encode(np.zeros((3, 30, 60), np.uint8)))
    words = ["--dataset_folder", folder]
    assert_refused(run_data("prepare", *words), "or leave them out with --skip_bad: ")
    for action, status in (("prepare", 5), ("info", 0)):
        result = run_data(action, *words, "--skip_bad", "--fit", "crop")
        assert result.returncode == status, result.stderr
        said = result.stderr if action == "prepare" else result.stdout
        for line in (
            "note: 1 image was resized to 32 x 32, from 60 x 30; up to 50% of one was cut off",
            f"note: 1 image was left out because it could not be read: {folder}/train/cat/bad.png: not a PNG,",
            "warning: fewer than 10 training images: owl (1)",
            "warning: no test image: owl",
            "warning: classes differ in size by",
        ):
            assert f"\n{line}" in said
        assert said.count("\nnote: ") == 3 and "has no test split: its validation split is used for the test" in said
        assert ("\nleft out: " in result.stderr) == (action == "prepare")


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["prepare", "--sauce", "sample"], "--sauce"),
        (["prepare", "--source", "mnist"], "mnist"),
        (["prepare", "--source", "sample", "--num_train", "many"], "--num_train takes a whole number, got: many"),
        (["prepare", "--source", "sample", "--num_train", "0"], "--num_train takes a whole number from 1"),
        (["prepare", "--url", "ftp://example.org/a"], "--url takes a URL that begins with https://"),
        (["prepare", "--digest", "abc"], "--digest takes 32 (md5) or 64 (sha256)"),
        (["prepare", "--num_tries", "0"], "--num_tries"),
        (
            ["info"],
            "no data set at data/cifar_dataset: there is neither a folder nor a file; name your data with ",
        ),
        (["info", "--dataset_folder"], "--dataset_folder"),
        (["shuffle"], "'shuffle' is no action; the actions are prepare, info, prune, ingest"),
    ],
)
def test_bad_input_gets_one_line_and_writes_nothing(words: list[str], complaint: str, tmp_path: Path) -> None:
    assert_refused(run_data(*words, cwd=tmp_path), complaint)
    assert list(tmp_path.iterdir()) == []


def test_options_come_from_the_environment_too(tmp_path: Path) -> None:
    result = run_data("info", IMAGE_CLASSIFIER_DATASET_FOLDER=str(tmp_path / "from_environment"))
    assert_refused(result, "from_environment")


@pytest.mark.parametrize("words", [[], ["--help"], *([action, "--help"] for action in ACTIONS)])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    script = (
        "import sys; from image_classifier.__main__ import main\n"
        "try: main(['data', *sys.argv[1:]])\n"
        "except SystemExit: pass\n"
        "print({'torch', 'matplotlib', 'pyarrow', 'numpy', 'PIL', 'sqlalchemy', 'psycopg'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=PROJECT, capture_output=True, text=True, timeout=60
    )
    assert result.stdout.startswith("usage: image_classifier data") and result.stdout.endswith("set()\n")
