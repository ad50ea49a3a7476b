"""Runs with what is off by default: they go on exactly, are verified, and stop early where they are to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from image_classifier.data import blocks
from image_classifier.errors import Interrupted
from image_classifier.experiment import RunResult, run
from image_classifier.reporter import Reporter
from image_classifier.settings import ADDITIONS
from image_classifier.tracking.checkpoint import Checkpoints, load_model
from image_classifier.tracking.reading import read_chain, read_epochs
from image_classifier.training.loop import Step
from image_classifier.verification import VerificationSettings, verify
from tests.tiny import make_settings, write_tiny_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny")


EARLY: dict[str, Any] = {"num_epochs": 9, "early_stopping": 2, "validation_fraction": 0.25, "learning_rate": 0.1}


@pytest.fixture(scope="module")
def stopped(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A run whose learning rate is so high that it does not become better for long."""
    return run(make_settings(tmp_path_factory.mktemp("early"), dataset, **EARLY, keep="best", keep_checkpoints=9))


def test_a_run_stops_early_after_epochs_without_a_better_validation_accuracy(
    stopped: RunResult, dataset: Path, tmp_path: Path
) -> None:
    accuracies = [line["validation_accuracy"] for line in read_epochs(stopped.folder)]
    best = accuracies.index(max(accuracies))
    assert len(accuracies) == best + 3 < 9
    epochs = read_epochs(stopped.folder)
    assert read_chain(stopped.folder)[-1]["step"] == epochs[-1]["step"]
    kept = Checkpoints(stopped.folder / "checkpoints").load(epochs[best]["step"])["classifier"]
    weights = load_model(stopped.folder / "model.pth").classifier.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in weights.items())
    assert verify(VerificationSettings(run_folder=stopped.folder)).verdict == "IDENTICAL"
    whole = run(make_settings(tmp_path, dataset, **{**EARLY, "early_stopping": 0}))
    lines = [line["train_loss"] for line in read_epochs(whole.folder)]
    assert lines[: len(epochs)] == [line["train_loss"] for line in epochs] and len(lines) == 9


@pytest.mark.parametrize("schedule", ["constant", "triangular"])
def test_a_run_that_stops_early_says_so_and_goes_on_from_where_it_was_killed(
    schedule: str, dataset: Path, tmp_path: Path
) -> None:
    values: dict[str, Any] = {**EARLY, "schedule": schedule, "learning_rate": 0.1, "early_stopping": 1}
    notes: list[str] = []

    class Killed(Reporter):
        def note(self, text: str) -> None:
            notes.append(text)
            if len(notes) == 1:
                raise KeyboardInterrupt  # after the last step, before the evaluation

    whole = run(make_settings(tmp_path / "whole", dataset, **values))
    settings = make_settings(tmp_path / "killed", dataset, **values)
    with pytest.raises(KeyboardInterrupt):
        run(settings, reporter=Killed())
    resumed = run(replace(settings, resume=True), reporter=Killed())
    assert resumed.weights_digest == whole.weights_digest
    assert (resumed.folder / "digests.jsonl").read_bytes() == (whole.folder / "digests.jsonl").read_bytes()
    assert len(read_epochs(resumed.folder)) == len(read_epochs(whole.folder)) < 9
    assert notes[0] == notes[1] and notes[0].startswith("--early_stopping ended the run after epoch ")
    assert ("the schedule ended at a learning rate of" in notes[0]) == (schedule == "triangular")


ALL_THAT_IS_OFF: list[dict[str, Any]] = [
    {"mixup": 0.4, "sampler": "balanced", "ema_decay": 0.9},
    {"cutmix": 1.0, "class_weights": "balanced", "rand_augment": 9, "color_jitter": 0.4},
    {"ema_decay": 0.9, "validation_fraction": 0.25, "keep": "best", "class_weights": "balanced", "mixup": 1.0},
    {"shuffle_window": 2, "validation_fraction": 0.1},
]


@pytest.mark.parametrize("batch_size", [10, 100])
@pytest.mark.parametrize("values", ALL_THAT_IS_OFF)
def test_a_run_with_options_that_are_off_by_default_goes_on_exactly_and_is_verified(
    values: dict[str, Any], batch_size: int, imbalanced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 10 * 3072)
    values = {
        **values,
        "model": "resnet",
        "batch_size": batch_size,
        "shards": 2,
        "num_threads": 2,
        "image_sizes": (16,),
    }
    whole = run(make_settings(tmp_path / "whole", imbalanced, **{**values, "num_threads": 1}))
    settings = make_settings(tmp_path / "parts", imbalanced, num_workers=2, **values)
    steps: list[int] = []

    class Counter(Reporter):
        def step(self, step: Step) -> None:
            steps.append(step.number)

    with pytest.raises(Interrupted):
        run(settings, reporter=Counter(), should_stop=lambda: len(steps) == 2)
    resumed = run(replace(settings, resume=True))
    assert resumed.weights_digest == whole.weights_digest
    assert verify(VerificationSettings(run_folder=resumed.folder)).verdict == "IDENTICAL"
    without = run(make_settings(tmp_path / "without", imbalanced, **{**values, **dict(ADDITIONS)}))
    assert without.weights_digest != whole.weights_digest


@pytest.fixture(scope="module")
def imbalanced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images of two classes: 150 to train with of one, 12 of the other."""
    folder = tmp_path_factory.mktemp("data") / "imbalanced"
    generator = np.random.default_rng(0)
    for part, counts in (("train", (150, 12)), ("test", (10, 10))):
        for name, level, count in zip(("dark", "light"), (0, 128), counts, strict=True):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(level, level + 128, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{number:03}.png")
    return folder
