"""What a person sees of a run: a bar on a terminal, a line an epoch in a log, a summary at the end."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.conftest import PROJECT
from tests.tiny import write_tiny_dataset


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    dataset = write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny", num_train=800)
    line = f"--experiment_name e --dataset_folder {dataset} --recipe notebook --num_threads 1"
    return line.split()


def test_a_terminal_shows_a_bar_with_speed_loss_and_time_left(options: list[str], tmp_path: Path) -> None:
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
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
    with subprocess.Popen(command, cwd=PROJECT, stderr=terminal, stdout=subprocess.PIPE, text=True) as process:
        os.close(terminal)
        shown = b""
        while True:
            try:
                part = os.read(controller, 65536)
            except OSError:  # the other side was closed
                break
            if not part:
                break
            shown += part
        summary, _ = process.communicate(timeout=60)
    os.close(controller)
    assert process.returncode == 0
    text = shown.decode()
    assert re.search(r"\d+%\|.*/1\.60k \[\d\d:\d\d<\d\d:\d\d, .* images/s, loss=\d\.\d{3}\]", text), text[-2000:]
    assert "epoch 1/2: loss " in text and "epoch 2/2: loss " in text
    assert re.search(r"test accuracy +\d+\.\d\d% of 60 images, (single view|2 views averaged)", summary)
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
