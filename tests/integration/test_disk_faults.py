"""Whole commands on a disk that fails, under a quota, without locks, and with a clock that goes back."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from PIL import Image

from image_classifier.__main__ import main
from image_classifier.storage import TEMPORARY_PREFIX
from tests.conftest import PROJECT
from tests.shim import Shim

YEAR_S = 365 * 24 * 3600


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Shim:
    return Shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture
def run(published_run: Path, tmp_path: Path) -> Path:
    """A finished and published run that a test may change."""
    return shutil.copytree(published_run.parent, tmp_path / "run")


def call(folder: Path, *words: str | Path, status: int = 0, under: dict[str, str] | None = None) -> str:
    """Run a command in a folder; return its stdout, or where it is to fail its one line on stderr.

    Args:
        under: the environment of a shim, which takes a process of its own; without it this one does, which is quick.
    """
    os.environ["IMAGE_CLASSIFIER_CACHE"] = str(folder / "cache")
    os.chdir(folder)
    if under is None:
        with redirect_stdout(io.StringIO()) as stdout, redirect_stderr(io.StringIO()) as stderr:
            found = main([*map(str, words)])
        out, err = stdout.getvalue(), stderr.getvalue()
    else:
        line = [sys.executable, "-m", "image_classifier", *map(str, words)]
        variables = os.environ | {"PYTHONPATH": str(PROJECT)} | under
        result = subprocess.run(line, env=variables, capture_output=True, text=True, timeout=250)
        found, out, err = result.returncode, result.stdout, result.stderr
    assert found == status, err
    assert "Traceback" not in err
    assert not list(folder.rglob(f"{TEMPORARY_PREFIX}*"))
    last = (err.splitlines() or [""])[-1]
    assert not status or last.startswith("error: ")
    return last if status else out


def build_training(folder: Path, dataset: Path) -> list[str | Path]:
    """Build the command that trained the run of the fixtures."""
    names: list[str | Path] = ["--experiments_folder", folder, "--experiment_name", "experiment", "--run_name", "run"]
    settings = ["--recipe", "notebook", "--views", "mirror", "--batch_size", "20", "--learning_rate", "0.02"]
    return ["train", *names, "--dataset_folder", dataset, *settings, "--num_threads", "1"]


def read_weights(run: Path) -> str:
    return str(json.loads((run / "manifest.json").read_text())["weights_digest"])


def test_a_training_on_a_failing_disk_goes_on_to_the_same_bits_though_the_clock_went_back(
    shim: Shim, sample_dataset: Path, trained_run: Path, tmp_path: Path
) -> None:
    words = build_training(tmp_path / "experiments", sample_dataset)
    line = call(tmp_path, *words, status=2, under=shim.fail("fsync", "state.pth", at=2))
    assert "step-00000100: Input/output error; check the disk" in line
    call(tmp_path, *words, "--resume", under=shim.shift_clock(-YEAR_S))
    assert read_weights(tmp_path / "experiments" / "experiment" / "run") == read_weights(trained_run)


def test_a_run_from_the_future_is_read_and_published_like_any_other(
    shim: Shim, run: Path, trained_run: Path, sample_dataset: Path, tmp_path: Path
) -> None:
    clock = shim.shift_clock(-YEAR_S)
    data = ("--dataset_folder", sample_dataset)
    assert call(tmp_path, "verify", run, "--files_only", under=clock).startswith("INTACT\n")
    call(tmp_path, "compare", run, trained_run, under=clock)
    call(tmp_path, "report", run, *data, under=clock)
    assert "200" in call(tmp_path, "data", "info", *data, under=clock)
    call(tmp_path, "registry", "add", run, "--name", "model", *data)  # at the right time, and then before it
    call(tmp_path, "registry", "add", run, "--name", "model", *data, under=clock)
    assert "version 2; it was" not in call(tmp_path, "registry", "promote", "model/1", *data)
    assert "is version 2; it was 1" in call(tmp_path, "registry", "promote", "model/2", *data, under=clock)
    listed = json.loads(call(tmp_path, "registry", "list", "--json", under=clock))
    assert [version["version"] for version in listed] == ["1", "2"]


@pytest.mark.parametrize("number", [errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("fault", ["write", "fsync", "rename"])
def test_a_disk_that_fails_at_any_step_of_a_file_is_one_line_and_leaves_the_old_one(
    fault: str, number: int, shim: Shim, published_run: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "image.png")
    output = tmp_path / "predictions.csv"
    output.write_text("old")
    words = ("predict", published_run, tmp_path / "image.png", "--output", output)
    line = call(tmp_path, *words, status=2, under=shim.fail(fault, "predictions.csv", number=number))
    remedy = "check the disk" if number == errno.EIO else "free some of your quota"
    assert line == f"error: cannot write {output}: {os.strerror(number)}; {remedy}"
    assert output.read_text() == "old"


def test_a_disk_that_fails_while_it_is_read_is_no_verdict_and_no_trace(shim: Shim, run: Path, tmp_path: Path) -> None:
    model = shim.fail("read", "run/model.pth", at=0)
    line = call(tmp_path, "verify", run, "--files_only", status=2, under=model)
    assert line == f"error: {run / 'model.pth'} cannot be read: Input/output error; check the disk"
    assert "Input/output error" in call(tmp_path, "evaluate", run, status=2, under=model)
    (tmp_path / "settings.yaml").write_text("seed: 1\n")
    words = (*build_training(tmp_path / "experiments", tmp_path), "--config", tmp_path / "settings.yaml")
    assert "Input/output error" in call(tmp_path, *words, status=2, under=shim.fail("read", "settings.yaml", at=0))


def test_a_registry_on_a_failing_disk_is_one_line_at_once_and_works_again(shim: Shim, tmp_path: Path) -> None:
    line = call(tmp_path, "registry", "list", status=2, under=shim.fail("write", "mlflow.db", at=9))
    assert "disk I/O error; free some space, or check the disk" in line
    assert not list((tmp_path / "experiments").rglob("mlflow.db*"))
    assert call(tmp_path, "registry", "list") == "no model is registered\n"
    line = call(tmp_path, "registry", "list", status=2, under=shim.fail("read", "mlflow.db", at=0))
    assert "mlflow.db cannot be read as a SQLite database: disk I/O error; check the disk" in line
    assert call(tmp_path, "registry", "list") == "no model is registered\n"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EBADF], ids=["no locks", "no locks of folders"])
def test_a_file_system_without_locks_is_used_with_a_word(number: int, shim: Shim, tmp_path: Path) -> None:
    without_locks = shim.fail("flock", "/", at=0, number=number)
    sample = ("data", "prepare", "--source", "sample", "--num_train", "50", "--num_test", "20")
    call(tmp_path, *sample, "--dataset_folder", tmp_path / "data", under=without_locks)
    line = [sys.executable, "-m", "image_classifier", "data", "ingest", str(tmp_path / "data"), "--dataset", "shapes"]
    environment = os.environ | without_locks | {"PYTHONPATH": str(PROJECT)}
    result = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "has no locks: no other process may write there" in result.stderr


# Links, long names, folders that may not be written.


def test_links_to_folders_are_followed_and_those_to_nothing_are_named(
    sample_dataset: Path, run: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "experiments").symlink_to(elsewhere)
    (tmp_path / "data").symlink_to(shutil.copytree(sample_dataset, tmp_path / "moved"))
    words = build_training(tmp_path / "experiments", tmp_path / "data")
    call(tmp_path, *words, "--num_epochs", "1")
    finished = elsewhere / "experiment" / "run"
    (tmp_path / "link").symlink_to(finished)
    assert call(tmp_path, "verify", tmp_path / "link", "--files_only").startswith("INTACT\n")
    call(tmp_path, "report", tmp_path / "link")
    assert (finished / "report.html").is_file()
    (tmp_path / "report.html").touch()
    (finished / "report.html").unlink()
    (finished / "report.html").symlink_to(tmp_path / "report.html")
    assert "report.html: there is a symbolic link of this name" in call(tmp_path, "report", finished, status=2)
    assert (tmp_path / "report.html").read_text() == ""

    for name in ("nowhere", "experiments/nowhere", "experiments/experiment/nowhere"):
        (tmp_path / name).symlink_to(tmp_path / "nothing")
    for experiments, experiment, name in (
        ("nowhere", "experiment", "run"),
        ("experiments", "nowhere", "run"),
        ("experiments", "experiment", "nowhere"),
    ):
        names = ("--experiments_folder", experiments, "--experiment_name", experiment, "--run_name", name)
        for more in ((), ("--resume",)):
            line = call(tmp_path, *words, *names, *more, status=2)
            assert any(part in line for part in ("a broken link", "exists already", "there is no run")), line
    assert "there is neither a folder nor a file" in call(
        tmp_path, "data", "info", "--dataset_folder", "nowhere", status=2
    )
    assert not (tmp_path / "nothing").exists()


def test_names_that_are_too_long_for_a_file_system_are_one_line(
    sample_dataset: Path, published_run: Path, tmp_path: Path
) -> None:
    image = tmp_path / "image.png"
    Image.new("RGB", (32, 32), "red").save(image)
    name, words = "🐈" * 64, build_training(tmp_path / "experiments", sample_dataset)
    for option in ("--run_name", "--experiment_name"):
        for more in ((), ("--resume",)):
            line = call(tmp_path, *words, option, name, *more, status=2)  # 256 bytes, in 64 letters
            assert "File name too long; choose a shorter name" in line or "takes " in line, line
    too_long = "n" * 256
    for command in (
        ("data", "info", "--dataset_folder", too_long),
        ("data", "prepare", "--source", "sample", "--dataset_folder", too_long),
        ("predict", published_run, image, "--output", too_long),
        ("predict", too_long, image),
        ("evaluate", too_long),
        ("verify", too_long),
        ("compare", too_long, too_long),
        ("report", too_long),
        ("publish", too_long),
        ("registry", "check", too_long),
        ("registry", "list", "--experiments_folder", too_long),
        ("data", "list", "--db_config", too_long),
        ("data", "list", "--dataset_folder", too_long),
        (*words, "--config", too_long),
        (*words, "--pretrained_model", too_long),
    ):
        call(tmp_path, *command, status=2)
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["image.png"]


def test_names_of_255_bytes_are_names(sample_dataset: Path, published_run: Path, tmp_path: Path) -> None:
    longest = "n" * 251 + ".png"
    Image.new("RGB", (32, 32), "red").save(tmp_path / longest)
    output = tmp_path / ("p" * 251 + ".csv")
    call(tmp_path, "predict", published_run, tmp_path / longest, "--output", output)
    assert longest in output.read_text()
    for split in ("train", "test"):
        (tmp_path / "data" / split / ("c" * 255)).mkdir(parents=True)
        for number in range(2):
            name = f"{number}".rjust(251, "i") + ".png"
            Image.new("RGB", (32, 32), (number * 100, 0, 0)).save(tmp_path / "data" / split / ("c" * 255) / name)
    assert "c" * 255 in call(tmp_path, "data", "info", "--dataset_folder", tmp_path / "data")
    call(tmp_path, "data", "export", tmp_path / "data", "--output", tmp_path / ("e" * 255))
    assert (tmp_path / ("e" * 255) / "train" / ("c" * 255)).is_dir()


WITHOUT_RIGHTS = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
EACH = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from image_classifier.__main__ import main
answers = []
for words in json.load(sys.stdin):
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as errors:
        answers.append((main(words), errors.getvalue()))
print(json.dumps(answers))
"""
"""Runs commands in one process, which has lost root's right to write and enter everywhere."""


def test_folders_that_may_not_be_written_or_entered_are_one_line(
    sample_dataset: Path, run: Path, tmp_path: Path
) -> None:
    locked, closed = tmp_path / "locked", tmp_path / "closed"
    for folder in (locked, closed):
        folder.mkdir()
    shutil.copytree(run, locked / "run")
    folders = [path for path in (locked, *locked.rglob("*")) if path.is_dir()]
    commands: list[list[str | Path]] = [
        build_training(locked, sample_dataset),
        build_training(closed, sample_dataset),
        ["report", locked / "run"],
        ["publish", locked / "run", "--overwrite", "--dataset_folder", sample_dataset],
        ["registry", "list", "--experiments_folder", locked],
        ["registry", "list", "--experiments_folder", closed],
        ["data", "export", sample_dataset, "--output", locked / "new"],
        ["data", "info", "--dataset_folder", closed / "data"],
        ["evaluate", closed / "run"],
        ["verify", closed / "run", "--files_only"],
        ["compare", closed / "run", run],
        ["predict", closed / "model.onnx", closed / "image.png"],
        ["data", "list", "--dataset_folder", closed],
    ]
    for folder in folders:
        folder.chmod(0o555)
    closed.chmod(0)
    try:
        result = subprocess.run(
            [*WITHOUT_RIGHTS, sys.executable, "-c", EACH],
            input=json.dumps([[*map(str, words)] for words in commands]),
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(PROJECT), "IMAGE_CLASSIFIER_CACHE": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            timeout=250,
        )
    finally:
        for folder in (*folders, closed):
            folder.chmod(0o755)
    assert result.returncode == 0, result.stderr
    for words, (status, errors) in zip(commands, json.loads(result.stdout), strict=True):
        assert status == 2 and "Traceback" not in errors, (words, errors)
        assert errors.splitlines()[-1].startswith("error: "), (words, errors)
