"""The data that the workflow of this folder draws is a data set, and the same one each time."""

from pathlib import Path

import pytest
from own_workflow import Stripes, draw_stripes

from image_classifier.data.dataset import load_snapshot


def test_the_data_is_drawn_once_and_always_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    snapshot = load_snapshot(Stripes(training={}).load_data())
    assert (snapshot.num_train, snapshot.num_test) == (120, 120)
    assert load_snapshot(draw_stripes(tmp_path / "again")).digest == snapshot.digest
