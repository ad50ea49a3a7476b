"""The accuracy of captured answers by hour and day."""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import pytest

from image_classifier.capture.files import Captured, CaptureFacts, read_captures
from image_classifier.errors import DataError
from image_classifier.monitoring.accuracy import compute_accuracy
from tests.captures import START, write_captures

CLASSES = ("cat", "dog, small")


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> list[Captured]:
    """Images of two days, one in six hours, all of them called a cat."""
    images = np.zeros((8, 32, 32, 3), np.uint8)
    answers = np.tile(np.array([0.75, 0.25], np.float32), (8, 1))
    facts = CaptureFacts(32, CLASSES)
    start = START - timedelta(hours=12)
    folder = write_captures(tmp_path_factory.mktemp("c"), facts, images, answers, start=start, every=timedelta(hours=6))
    return list(read_captures(folder))


def test_accuracy_is_shown_by_day_with_wilsons_interval(captured: list[Captured]) -> None:
    labels = {(f"request-{number}", 0): int(number in (1, 5, 6)) for number in range(8)} | {("other", 0): 0}
    accuracy = compute_accuracy(labels, captured)
    assert accuracy.num_labels == 9
    assert [(each.start, each.num_images, each.num_right) for each in (*accuracy.periods, accuracy.total)] == [
        ("2026-11-30", 4, 3),
        ("2026-12-01", 4, 2),
        ("all", 8, 5),
    ]
    # By hand: (p + z²/2n ± z sqrt(p(1 - p)/n + z²/4n²)) / (1 + z²/n) with p = 5/8, n = 8, z = 1.95996.
    assert (accuracy.total.low, accuracy.total.high) == pytest.approx((0.30574, 0.86316), abs=1e-5)
    assert [each.start for each in compute_accuracy(labels, captured, "hour").periods][:2] == [
        "2026-11-30T00",
        "2026-11-30T06",
    ]


def test_a_request_id_that_comes_again_counts_once(captured: list[Captured]) -> None:
    assert compute_accuracy({("request-0", 0): 0}, [*captured, *captured]).total.num_images == 1


def test_labels_of_no_captured_image_are_refused(captured: list[Captured]) -> None:
    with pytest.raises(DataError, match="none of the 2 labels belongs to a captured image"):
        compute_accuracy({("request-0", 1): 0, ("other", 0): 1}, captured)
