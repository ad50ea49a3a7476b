"""`image_classifier evaluate` on a data set of image files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from image_classifier.cli.evaluate import main
from image_classifier.data.dataset import load_snapshot
from image_classifier.data.snapshot import Snapshot
from image_classifier.tracking.checkpoint import load_model
from tests.runs import write_image_folder, write_run

CLASSES = ("blue", "green", "red")


@pytest.fixture
def dataset_folder(tmp_path: Path) -> Path:
    return write_image_folder(tmp_path / "images", CLASSES)


@pytest.fixture
def snapshot(dataset_folder: Path) -> Snapshot:
    return load_snapshot(dataset_folder)


@pytest.fixture
def run_folder(tmp_path: Path, dataset_folder: Path, snapshot: Snapshot) -> Path:
    """A run on the data set, as its record says."""
    changes = {
        "data": {"name": snapshot.name, "digest": snapshot.digest, "classes": list(CLASSES)},
        "execution": {"dataset_folder": str(dataset_folder)},
    }
    return write_run(tmp_path, classes=CLASSES, changes=changes)


def compute_accuracy(run_folder: Path, snapshot: Snapshot) -> float:
    """Compute the accuracy with both views, straight from the network."""
    model = load_model(run_folder / "model.pth")
    images, labels = snapshot.test
    with torch.no_grad():
        both = [model.classifier(torch.tensor(view.copy())).softmax(1) for view in (images, images[..., ::-1])]
    return float(((both[0] + both[1]).argmax(1).numpy() == labels).mean())


def test_a_run_is_evaluated_on_its_own_data(
    run_folder: Path, snapshot: Snapshot, capsys: pytest.CaptureFixture[str]
) -> None:
    output = run_folder.parent / "evaluation.json"

    status = main([str(run_folder), "--output", str(output)])

    shown, said = capsys.readouterr()
    evaluation = json.loads(output.read_text())
    assert status == 0
    assert said == ""
    assert evaluation["accuracy"] == pytest.approx(compute_accuracy(run_folder, snapshot), abs=1e-6)
    assert evaluation["num_images"] == 21
    assert evaluation["views"] == "mirror"
    assert evaluation["data"] == {"name": snapshot.name, "digest": snapshot.digest, "is_data_of_run": True}
    assert f"{100 * evaluation['accuracy']:.2f} %" in shown
    assert [line.split()[0] for line in shown.splitlines()[-3:]] == list(CLASSES)


def test_a_model_file_is_evaluated_on_the_data_that_is_named(
    tmp_path: Path, run_folder: Path, dataset_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "elsewhere.pth"
    shutil.copy(run_folder / "model.pth", model)

    assert main([str(model)]) == 2
    assert "--dataset_folder is required" in capsys.readouterr().err
    assert main([str(model), "--dataset_folder", str(dataset_folder)]) == 0


def test_other_data_of_the_same_classes_is_evaluated_and_said(
    tmp_path: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_image_folder(tmp_path / "other", CLASSES, num_test=3)

    assert main([str(run_folder), "--dataset_folder", str(other)]) == 0

    shown, said = capsys.readouterr()
    assert "9 images" in shown
    assert said == f"note: {other} is not the data that the model was trained on\n"


def test_data_of_other_classes_is_refused(tmp_path: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_image_folder(tmp_path / "other", ("blue", "green", "yellow"))
    output = tmp_path / "evaluation.json"

    assert main([str(run_folder), "--dataset_folder", str(other), "--output", str(output)]) == 2

    shown, said = capsys.readouterr()
    assert said.startswith("error: ") and said.count("\n") == 1
    assert "blue, green, yellow instead of blue, green, red" in said
    assert shown == ""
    assert not output.exists()


def test_data_that_has_gone_is_asked_for(
    run_folder: Path, dataset_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(dataset_folder)

    assert main([str(run_folder)]) == 2

    assert "give --dataset_folder" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["nowhere", "experiment"])
def test_what_is_no_finished_run_is_refused(
    tmp_path: Path, run_folder: Path, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_trained_run_gives_its_recorded_evaluation_again(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "evaluation.json"

    assert main([str(trained_run), "--output", str(output)]) == 0

    recorded = json.loads((trained_run / "evaluation.json").read_text())
    again = json.loads(output.read_text())
    assert again["confusion_matrix"] == recorded["confusion_matrix"]
    assert again["accuracy_single_view"] == recorded["accuracy_single_view"]
    assert again["loss"] == pytest.approx(recorded["loss"], rel=1e-5)
    assert again["data"]["is_data_of_run"] is True
