"""Commands at work: each says how far it has come, on stderr alone, whatever it does for long."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.conftest import PROJECT

PROGRAM = """
import sys
import time
from image_classifier import progress

begin = progress._Display.begin

def begin_and_wait(display, task):
    begin(display, task)
    written_at = display._written_at
    while display._written_at == written_at:
        time.sleep(0.001)

progress.INTERVAL_S = 0.002
progress._Display.begin = begin_and_wait
from image_classifier.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
"""The program with a line due every 2 ms, instead of every 30 s, in which work waits until a line has shown it."""


def run_command(*words: str | Path, cwd: Path = PROJECT) -> tuple[str, str]:
    """Run a command whose progress is to be seen; return what it says, and what it prints."""
    command = [sys.executable, "-c", PROGRAM, *map(str, words)]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "\r" not in result.stderr
    return result.stderr, result.stdout


def assert_shown(log: str, *titles: str) -> None:
    """Check that work of these titles was seen, at the beginning of a line or within another work."""
    for title in titles:
        assert re.search(rf"^(.*; )?{re.escape(title)}: .*\d s", log, flags=re.MULTILINE), f"{title}:\n{log[-2000:]}"


def test_a_training_shows_its_stages_and_how_far_an_epoch_has_come(sample_dataset: Path, tmp_path: Path) -> None:
    names = ("--experiments_folder", tmp_path, "--experiment_name", "e", "--run_name", "r")
    options = ("--recipe", "notebook", "--dataset_folder", sample_dataset, "--validation_fraction", "0.2")
    log, output = run_command("train", *names, *options, "--num_threads", "1")
    assert_shown(log, "starting", "looking at the data set", "training", "evaluating")
    assert_shown(log, "drawing the figures")
    done = [
        int(number.replace(",", ""))
        for number in re.findall(r"^training: ([\d,]+) of 1,600 images \(\d+%\)", log, re.M)
    ]
    assert len(set(done)) > 3 and done == sorted(done)
    assert re.search(r"training: .*\d s, loss=\d\.\d{3}$", log, flags=re.MULTILINE)
    assert [line.split()[0] for line in output.splitlines()] == ["run", "test", "test", "weights"]


def test_the_commands_on_a_run_show_what_they_do(trained_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained_run, tmp_path / "e" / "run"))
    log, output = run_command("verify", run)
    assert_shown(log, "checking the run's files", "starting", "training", "evaluating")
    assert output.splitlines()[0] == "IDENTICAL"
    log, output = run_command("report", run)
    assert_shown(log, "drawing the report", "looking at the data set")
    assert output == f"{run / 'report.html'}\n"
    log, output = run_command("evaluate", run)
    assert_shown(log, "loading the model", "evaluating")
    assert output.startswith(f"{run}/model.pth on sample")
    log, output = run_command("compare", run, trained_run, "--output", tmp_path / "c.png")
    assert_shown(log, "comparing", "drawing the figures")
    assert output.startswith("Results on the test set\n")


def test_a_prediction_counts_its_images(trained_run: Path, sample_dataset: Path, tmp_path: Path) -> None:
    exported = tmp_path / "images"
    log, output = run_command("data", "export", sample_dataset, "--output", exported)
    assert_shown(log, "writing the images")
    assert output == f"{exported}\n"
    log, output = run_command("predict", trained_run, exported)
    assert_shown(log, "predicting", "evaluating")
    assert re.search(r"predicting: 1,000 images, \d+ s", log)
    assert output.startswith("path,class,probability,") and output.count("\n") == 1 + 1200


def test_publishing_and_the_registry_show_what_they_do(trained_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained_run, tmp_path / "e" / "run"))
    log, output = run_command("publish", run)
    assert_shown(log, "exporting the network", "evaluating", "comparing in batches of 1", "quantizing")
    assert_shown(log, "comparing both precisions")
    assert output == f"{run / 'published'}\n"
    registry = ("--experiments_folder", tmp_path)
    log, output = run_command("registry", "add", run, "--name", "shapes", *registry)
    assert_shown(log, "MLflow: register 'shapes'")
    assert output == "shapes/1\n"
    log, output = run_command("registry", "resolve", "shapes/1", *registry)
    assert_shown(log, "MLflow: fetch shapes/1")
    assert Path(output.strip()).is_dir()


def test_the_commands_on_data_show_what_they_do(tmp_path: Path) -> None:
    folder = tmp_path / "sample"
    log, output = run_command(
        "data", "prepare", "--source", "sample", "--num_train", "4000", "--dataset_folder", folder
    )
    assert_shown(log, "generating the sample set", "looking at the data set", "reading the data set")
    assert output == f"{folder}\n"
    log, output = run_command("data", "info", "--dataset_folder", folder, "--output", tmp_path / "sheet.png")
    assert_shown(log, "drawing the sheet")
    assert output.startswith("name    sample\n")
    log, output = run_command("data", "ingest", folder, "--dataset", "shapes", "--dataset_folder", folder)
    assert_shown(log, "ingesting")
    assert output == "shapes@1\n"
    log, output = run_command("data", "snapshot", "--dataset", "shapes", "--dataset_folder", folder)
    assert output == "shapes@1\n"
