"""`image_classifier report` on finished runs, with and without their data."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from image_classifier.cli.report import main
from image_classifier.data.dataset import load_snapshot
from image_classifier.tracking.checking import check_finished, find_changed_files
from tests.runs import write_image_folder, write_run

CLASSES = ("blue", "green", "red")


def write_run_on_images(tmp_path: Path) -> tuple[Path, Path]:
    """Write a data set of 90 test images and a run on it; return both folders."""
    dataset_folder = write_image_folder(tmp_path / "images", CLASSES, num_test=30)
    snapshot = load_snapshot(dataset_folder)
    data = {"name": "images", "digest": snapshot.digest, "classes": list(CLASSES), "num_train": 6, "num_test": 90}
    changes = {"data": data, "execution": {"dataset_folder": str(dataset_folder)}}
    return write_run(tmp_path, classes=CLASSES, num_images=90, accuracy=0.5, changes=changes), dataset_folder


def test_a_report_is_added_to_the_run_and_shows_its_mistakes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = write_run_on_images(tmp_path)

    assert main([str(run)]) == 0

    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count('alt="test image ') == 24
    check_finished(run)
    assert find_changed_files(run) == []  # the report is no part of the run
    assert main([str(run)]) == 0
    assert (run / "report.html").read_text(encoding="utf-8") == page


def test_saliency_is_of_the_images_that_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, dataset_folder = write_run_on_images(tmp_path)

    assert main([str(run), "--saliency", "2,90"]) == 2
    assert "--saliency 90: the test images have the numbers 0 to 89" in capsys.readouterr().err
    assert main([str(run), "--saliency", "2,5,2"]) == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count('alt="saliency of test image 2 for ') in (1, 2) and 'alt="saliency of test image 5 for ' in page
    shutil.rmtree(dataset_folder)
    assert main([str(run), "--saliency", "2"]) == 2  # which cannot be had without the images


def test_a_report_without_the_data_says_so(tmp_path: Path) -> None:
    run, dataset_folder = write_run_on_images(tmp_path)
    shutil.rmtree(dataset_folder)

    assert main([str(run)]) == 0

    assert "The test images cannot be shown: the data set of" in (run / "report.html").read_text(encoding="utf-8")


def test_data_that_has_moved_is_found_where_it_is_said_to_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, dataset_folder = write_run_on_images(tmp_path)
    moved = dataset_folder.rename(tmp_path / "moved")
    other = write_image_folder(tmp_path / "other", CLASSES, num_test=3)

    assert main([str(run), "--dataset_folder", str(other)]) == 2
    assert "but the run is on" in capsys.readouterr().err
    assert not (run / "report.html").exists()
    assert main([str(run), "--dataset_folder", str(moved)]) == 0
    assert 'alt="test image ' in (run / "report.html").read_text(encoding="utf-8")


def test_an_unfinished_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path)
    (run / "manifest.json").unlink()

    assert main([str(run)]) == 2

    assert "not a finished run" in capsys.readouterr().err
    assert not (run / "report.html").exists()
