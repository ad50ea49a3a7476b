"""A training that is written for TensorBoard too, read back as TensorBoard reads it: `--log tensorboard`."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from image_classifier.tracking.checking import verify_files
from tests import forked
from tests.conftest import PROJECT, run_command, wait_until
from tests.tiny import write_tiny_dataset

SETTINGS = ("--recipe", "notebook", "--batch_size", "50", "--num_threads", "1", "--learning_rate", "0.01")


def build_words(experiments: Path, dataset: Path, *more: str) -> list[str]:
    """Build the command line of a run that is written for TensorBoard."""
    names = ("--experiments_folder", str(experiments), "--experiment_name", "board", "--run_name", "run")
    words = ("image_classifier.main", *names, "--dataset_folder", str(dataset), *SETTINGS)
    return [*words, "--log", "tensorboard", *more]


def read_events(run: Path) -> EventAccumulator:
    """Read all event files of a run."""
    events = EventAccumulator(
        str(run / "tensorboard"), purge_orphaned_data=False
    )  # it would hide steps that are there twice
    events.Reload()
    return events


def read_lines(run: Path) -> list[dict[str, Any]]:
    """Read the lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_was_killed_and_resumed_has_each_step_once(sample_dataset: Path, tmp_path: Path) -> None:
    run, words = tmp_path / "board" / "run", build_words(tmp_path, sample_dataset, "--num_epochs", "12")
    with subprocess.Popen([sys.executable, "-m", *words, "--checkpoint_every", "5epochs"], cwd=PROJECT) as trainer:
        wait_until(lambda: (run / "metrics.jsonl").exists() and len(read_lines(run)) >= 7, trainer)
        trainer.send_signal(signal.SIGKILL)
    assert trainer.returncode == -signal.SIGKILL and 7 <= len(read_lines(run)) < 12
    run_command(*words, "--checkpoint_every", "5epochs", "--resume")

    events, lines = read_events(run), read_lines(run)
    for name in ("train_loss", "train_accuracy", "learning_rate"):
        written = [(event.step, event.value) for event in events.Scalars(name)]
        assert written == [(line["step"], pytest.approx(line[name])) for line in lines]
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == sorted({event.step for event in losses})
    assert [event.value for event in losses] == pytest.approx([loss for line in lines for loss in line["loss_by_part"]])
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert events.Scalars("test_accuracy")[0].value == pytest.approx(evaluation["accuracy"])
    for name in ("metrics", "confusion_matrix"):
        (picture,) = events.Images(name)
        assert Image.open(io.BytesIO(picture.encoded_image_string)).size == (picture.width, picture.height)
    assert verify_files(run) == ()


def test_a_run_without_epochs_has_its_evaluation(sample_dataset: Path, tmp_path: Path) -> None:
    words = build_words(tmp_path, sample_dataset, "--num_epochs", "0")
    run_command(*words)
    (accuracy,) = read_events(tmp_path / "board" / "run").Scalars("test_accuracy")
    assert accuracy.step == 0 and 0 <= accuracy.value <= 1


def test_a_disk_that_refuses_is_one_line(sample_dataset: Path, tmp_path: Path) -> None:
    words = build_words(tmp_path, sample_dataset, "--num_epochs", "1")
    run_command(*words)
    run = tmp_path / "board" / "run"
    (run / "manifest.json").unlink()
    subprocess.run(["rm", "-r", run / "tensorboard"], check=True)
    (run / "tensorboard").write_text("in the way")
    result = forked.run(*words, "--resume")
    assert result.returncode == 2
    assert f"error: cannot write {run / 'tensorboard'}" in result.stderr.splitlines()[-1]


def test_a_reporter_of_ones_own_is_told_of_each_epoch(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (PROJECT / "docs" / "logs.md").read_text(), flags=re.DOTALL)
    write_tiny_dataset(tmp_path / "data" / "sample")
    words = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    result = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    lines = read_lines(tmp_path / "experiments" / "cifar10" / "printed")
    assert result.stdout.splitlines() == [
        f"{line['epoch']} {line['train_loss']} {line['train_accuracy']}" for line in lines
    ]
