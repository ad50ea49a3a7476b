"""Every earlier format is read: `tests/data/run_v1` is a run as version 1 of the formats wrote it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from image_classifier.data.dataset import load_snapshot
from image_classifier.errors import ModelError, RunError
from image_classifier.settings import restore_training_settings
from image_classifier.tracking.checking import check_finished, verify_files
from image_classifier.tracking.checkpoint import Checkpoints, load_model
from image_classifier.tracking.identity import compute_weights_digest
from image_classifier.tracking.reading import (
    read_chain,
    read_epochs,
    read_evaluation,
    read_manifest,
    read_predictions,
    read_record,
)
from image_classifier.training.evaluate import compute_probabilities
from tests.conftest import PROJECT
from tests.tiny import write_tiny_dataset

GOLDEN = PROJECT / "tests" / "data" / "run_v1"


def test_a_run_of_format_1_is_read_whole() -> None:
    check_finished(GOLDEN)
    assert verify_files(GOLDEN) == ()
    assert restore_training_settings(read_record(GOLDEN)["settings"]).model == "lenet"
    assert [line["epoch"] for line in read_epochs(GOLDEN)] == [1]
    assert [line["step"] for line in read_chain(GOLDEN)] == [10, 20]
    assert read_chain(GOLDEN)[-1]["digest"] == read_manifest(GOLDEN)["chain_head"]
    assert 0 <= read_evaluation(GOLDEN)["accuracy"] <= 1
    assert Checkpoints(GOLDEN / "checkpoints").load(20)["step"] == 20


def test_its_model_still_classifies_as_it_did(tmp_path: Path) -> None:
    model = load_model(GOLDEN / "model.pth")
    assert compute_weights_digest(model.classifier) == read_manifest(GOLDEN)["weights_digest"]
    snapshot = load_snapshot(write_tiny_dataset(tmp_path))
    recorded = read_record(GOLDEN)["data"]["digest"]
    assert snapshot.digest != recorded == snapshot.recognize(recorded).digest
    probabilities, labels = read_predictions(GOLDEN)
    assert np.array_equal(snapshot.test[1], labels)
    assert np.allclose(compute_probabilities(model.classifier, snapshot.test[0]), probabilities, atol=1e-5)


@pytest.mark.parametrize("name", ["run.json", "manifest.json", "evaluation.json"])
def test_a_later_format_is_refused(name: str, tmp_path: Path) -> None:
    run = Path(shutil.copytree(GOLDEN, tmp_path / "run"))
    (run / name).write_text((run / name).read_text().replace('"format_version": 1', '"format_version": 2'))
    read = {"run.json": read_record, "manifest.json": read_manifest, "evaluation.json": read_evaluation}[name]
    with pytest.raises(RunError, match="has the format 2; this version reads up to 1"):
        read(run)


def test_a_pointer_of_git_lfs_in_its_place_says_what_to_run(tmp_path: Path) -> None:
    (tmp_path / "model.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ModelError, match="git lfs pull"):
        load_model(tmp_path / "model.pth")
