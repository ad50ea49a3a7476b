"""What a run tells MLflow while it goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from image_classifier.cli.tracking import Tracker
from image_classifier.errors import RegistryError
from tests.tiny import make_settings


class SlowStore:
    """A store that is given up after some time, each time."""

    def __init__(self, delay_s: float) -> None:
        self.num_tries = 0
        self._delay_s = delay_s

    @contextmanager
    def open(self, action: str) -> Iterator[Any]:
        self.num_tries += 1
        time.sleep(self._delay_s)
        if self._delay_s:
            raise RegistryError(f"cannot {action}: nothing answers there")
        yield


def test_a_store_that_does_not_answer_holds_a_training_up_for_a_tenth_of_its_time_at_most(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = make_settings(tmp_path, tmp_path / "data", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    tracker = Tracker(settings)
    store = tracker._store = SlowStore(0.1)  # type: ignore[assignment]
    for epoch in range(1, 6):
        tracker.epoch({"epoch": epoch})
    assert store.num_tries == 1
    assert caplog.text.count("the training goes on, and what is missing there is written at its end") == 1
    deadline = time.monotonic() + 30
    while store.num_tries == 1:
        assert time.monotonic() < deadline
        time.sleep(0.05)
        tracker.epoch({"epoch": 6})
