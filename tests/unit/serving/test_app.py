from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from image_classifier.published.folder import CARD
from image_classifier.published.predictor import PublishedModel
from image_classifier.serving.app import MAX_SHOWN_BYTES, describe_model


def describe_card(folder: Path) -> object:
    """Describe a model in a folder, and return its card."""
    return describe_model("model", PublishedModel(folder, ("a", "b"), "1", "e", "r", "0" * 64, "one", 1))["card"]


def test_the_card_beside_a_model_is_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert describe_card(tmp_path) is None and not caplog.records
    (tmp_path / CARD).write_bytes(b"# A model\xff")
    assert describe_card(tmp_path) == "# A model\ufffd"


def test_a_card_that_is_too_large_or_a_pipe_is_not_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / CARD).touch()
    os.truncate(tmp_path / CARD, MAX_SHOWN_BYTES + 1)
    with caplog.at_level(logging.WARNING):
        assert describe_card(tmp_path) is None
    assert f"it has more than the {MAX_SHOWN_BYTES:,} bytes that are read" in caplog.text
    (tmp_path / CARD).unlink()
    os.mkfifo(tmp_path / CARD)
    assert describe_card(tmp_path) is None
