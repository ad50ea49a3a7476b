"""A promotion that asks for captured answers, too: both models compute the images whose labels came later."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from image_classifier.capture.files import CaptureFacts
from image_classifier.capture.places import LocalPlace
from image_classifier.cli import registry as command
from image_classifier.data.dataset import load_snapshot
from image_classifier.data.snapshot import Snapshot
from image_classifier.published.predictor import Predictor, load_predictor
from tests.captures import CapturedImage, build_capture
from tests.published import write_published

RIGHT = {"good": 180, "better": 190}


@pytest.fixture(name="snapshot", scope="module")
def load(sample_dataset: Path) -> Snapshot:
    return load_snapshot(sample_dataset)


@pytest.fixture(name="predictors", scope="module")
def write(published_run: Path, snapshot: Snapshot, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Predictor]:
    """Models that have so many of the 200 test images right, the first ones."""
    top = tmp_path_factory.mktemp("models")
    folders = {
        name: write_published(top / name / "published", published_run, snapshot, number, run_name=name)
        for name, number in RIGHT.items()
    }
    return {name: load_predictor(folder) for name, folder in folders.items()}


def capture(folder: Path, predictor: Predictor, snapshot: Snapshot, rows: range, *, later_us: int = 0) -> None:
    """Capture test images, as a model answers them; their requests are named by their rows."""
    images = np.ascontiguousarray(snapshot.test[0][rows.start : rows.stop].transpose(0, 2, 3, 1))
    answers = predictor.predict(images)
    model = predictor.model
    captured = [
        CapturedImage(row + later_us, str(row), 0, None, model.version, 1, image.tobytes(), answer.tolist())
        for row, image, answer in zip(rows, images, answers, strict=True)
    ]
    LocalPlace(folder).write(*build_capture(CaptureFacts(32, model.classes, model.digest), captured))


def write_labels(path: Path, snapshot: Snapshot, shift: int = 0) -> Path:
    """Write the labels of all test images, or of as many other classes."""
    names = [snapshot.classes[(label + shift) % len(snapshot.classes)] for label in snapshot.test[1].tolist()]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "request_id", "image_index"])
        writer.writerows([name, row, 0] for row, name in enumerate(names))
    return path


def test_a_canary_that_is_worse_on_captured_images_is_not_promoted(
    tmp_path: Path,
    snapshot: Snapshot,
    sample_dataset: Path,
    predictors: dict[str, Predictor],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("IMAGE_CLASSIFIER_CACHE", str(tmp_path / "cache"))
    data = ["--experiments_folder", str(tmp_path), "--dataset_folder", str(sample_dataset)]
    for predictor in predictors.values():
        assert command.main(["add", str(predictor.model.path), "--name", "shapes", *data]) == 0
    captured, labels = tmp_path / "captured", write_labels(tmp_path / "labels.csv", snapshot)
    capture(captured, predictors["good"], snapshot, range(100, 180))

    def promote(version: int, labels: Path) -> tuple[int, str]:
        words = ["promote", f"shapes/{version}", "--captured", str(captured), "--labels", str(labels), *data]
        status = command.main(words)
        shown = capsys.readouterr()
        return status, shown.out + shown.err

    status, shown = promote(1, labels)
    assert status == 0 and "champion is no other version, so captured images compare nothing" in shown
    status, shown = promote(2, labels)
    assert status == 2 and "serve the model as a canary first" in shown
    capture(captured, predictors["better"], snapshot, range(180, 200))
    capture(captured, predictors["good"], snapshot, range(180, 200), later_us=1000)  # the first answers count
    status, shown = promote(2, write_labels(tmp_path / "shifted.csv", snapshot, shift=1))
    # of the last images the better model has ten right and gives ten the next class, which the other one gives all
    assert status == 2 and "is worse than the champion, version 1, by 10.00 points of accuracy (p = 0.002," in shown
    assert "McNemar's test on 100 captured images); --allow_loss" in shown
    status, shown = promote(2, labels)
    assert status == 0 and "+10.00 points on 100 captured images" in shown


def test_captures_and_labels_are_needed_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["promote", "shapes/1", "--captured", "x", "--experiments_folder", str(tmp_path)]) == 2
    assert "--captured and --labels are needed together; give both" in capsys.readouterr().err
