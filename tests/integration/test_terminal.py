"""What a person sees of a run: a bar on a terminal, a line an epoch in a log, a summary at the end."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PROJECT
from tests.terminal import run_on_terminal
from tests.tiny import write_tiny_dataset


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    dataset = write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny", num_train=800)
    line = f"--experiment_name e --dataset_folder {dataset} --recipe notebook --num_threads 1"
    return line.split()


def test_a_terminal_shows_a_bar_with_speed_loss_and_time_left(options: list[str], tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "image_classifier.main",
        *options,
        "--experiments_folder",
        str(tmp_path),
        "--run_name",
        "r",
    ]
    text, summary = run_on_terminal(command, lines=24, columns=120)
    assert re.search(r"\d+%\|.*/1\.60k \[\d\d:\d\d<\d\d:\d\d, .* images/s, loss=\d\.\d{3}\]", text), text[-2000:]
    assert "epoch 1/2: loss " in text and "epoch 2/2: loss " in text
    assert re.search(
        r"test accuracy +\d+\.\d\d% of 60 images, (single view|test-time augmentation \(2 views\))", summary
    )
    assert str(tmp_path / "e" / "r") in summary


def test_a_log_gets_one_line_an_epoch_and_no_bar(options: list[str], tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "image_classifier.main",
        *options,
        "--experiments_folder",
        str(tmp_path),
        "--run_name",
        "r",
    ]
    log = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True, timeout=120).stderr
    assert "\r" not in log and "%|" not in log
    epochs = [line for line in log.splitlines() if line.startswith("epoch ")]
    assert len(epochs) == 2
    assert re.fullmatch(
        r"epoch 1/2: loss \d\.\d{4}, training accuracy \d+\.\d\d%, \d+\.\d s, [\d,]+ images/s", epochs[0]
    )
