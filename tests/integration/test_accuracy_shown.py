"""Whoever shows an accuracy says of which views it is: with test-time augmentation, or of the image alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from image_classifier.__main__ import main
from image_classifier.tracking.reading import read_evaluation
from tests.conftest import run_command


@pytest.fixture(scope="module")
def run(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a run whose evaluation averages two views, to be published."""
    run = Path(shutil.copytree(trained_run, tmp_path_factory.mktemp("experiments") / "e" / "run"))
    assert read_evaluation(run)["views"] == "mirror"
    return run


def test_the_report_and_an_evaluation_name_the_views(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = read_evaluation(run)
    run_command("image_classifier", "report", run, cwd=run)
    page = (run / "report.html").read_text()
    assert (
        f"<dt>test accuracy, test-time augmentation (2 views)</dt><dd>{evaluation['accuracy']:.2%}</dd>"
        in page.replace(" %", "%")
    )
    assert "<dt>test accuracy, single view</dt>" in page
    assert main(["evaluate", str(run)]) == 0
    table = " ".join(capsys.readouterr().out.split())
    assert f"accuracy, test-time augmentation (2 views) {100 * evaluation['accuracy']:.2f} %" in table
    assert f"accuracy, single view {100 * evaluation['accuracy_single_view']:.2f} %" in table


@pytest.mark.parametrize("with_views", [False, True])
def test_publishing_and_the_registry_name_the_views(
    run: Path, sample_dataset: Path, with_views: bool, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    evaluation = read_evaluation(run)
    assert main(["publish", str(run), "--overwrite", *(["--views"] if with_views else [])]) == 0
    accuracy, views = (
        (evaluation["accuracy"], "test-time augmentation (2 views)")
        if with_views
        else (evaluation["accuracy_single_view"], "single view")
    )
    line = f"accuracy {accuracy:.2%} of {evaluation['num_images']:,} test images, {views}"
    other = (
        ""
        if with_views
        else f"; --views publishes the run's {evaluation['accuracy']:.2%}, test-time augmentation (2 views)"
    )
    assert f"{line}{other}\n" in capsys.readouterr().err
    registry = ("--experiments_folder", str(tmp_path))
    assert main(["registry", "add", str(run), "--name", "m", "--dataset_folder", str(sample_dataset), *registry]) == 0
    assert f"accuracy {100 * accuracy:.2f} % of the test set, {views}\n" in capsys.readouterr().err
    assert main(["registry", "list", *registry]) == 0
    assert f"{views} {100 * accuracy:.2f} %" in " ".join(capsys.readouterr().out.split())
