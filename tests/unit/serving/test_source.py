"""Where the served model comes from, and when it is loaded."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from image_classifier.errors import ModelError
from image_classifier.serving.settings import ServerSettings
from image_classifier.serving.source import ModelSource
from tests.serving import write_model


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_model_is_loaded_once_however_it_was_begun(tmp_path: Path, has_begun: bool) -> None:
    path = write_model(tmp_path / "model.onnx")
    source = ModelSource(ServerSettings(model=str(path)), None)
    if has_begun:
        source.begin()
    predictor = source.load()
    assert predictor.model.run_name == "seed-0" and predictor.seconds_per_image < math.inf
    assert source.load_if_moved() is None
    write_model(path, seed=1)
    moved = source.load_if_moved()
    assert moved is not None and moved.model.run_name == "seed-1" and moved.seconds_per_image < math.inf


def test_what_was_begun_and_failed_is_said_by_whoever_waits_for_it(tmp_path: Path) -> None:
    source = ModelSource(ServerSettings(model=str(tmp_path / "nowhere.onnx")), None)
    source.begin()
    with pytest.raises(ModelError, match="no published model"):
        source.load()
