"""Which captured images are compared: the latest, of the model alone."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from image_classifier.capture.files import CaptureFacts
from image_classifier.errors import DataError
from image_classifier.monitoring.window import Served, load_window
from tests.captures import START, write_captures

FACTS = CaptureFacts(32, ("cat", "dog"), "d" * 64, "a machine")
SERVED = Served("the model", FACTS.classes, 32, frozenset((FACTS.model_digest,)))
HOUR = timedelta(hours=1)


def capture(folder: Path, number: int, first: int, *, facts: CaptureFacts = FACTS, version: str = "1") -> Path:
    """Capture images a minute apart, each of which has its number in the first two of its levels."""
    images = np.zeros((number, facts.image_size, facts.image_size, 3), np.uint8)
    numbers = np.arange(first, first + number)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = numbers // 256, numbers % 256
    probabilities = np.tile(np.array([0.75, 0.25], np.float32), (number, 1))
    minute = timedelta(minutes=1)
    start = START + first * minute
    return write_captures(folder, facts, images, probabilities, version=version, start=start, every=minute)


@pytest.mark.parametrize("num_images", [100, 119, 120, 121, 180, 250, 1000])
def test_the_latest_images_are_loaded_in_their_order(tmp_path: Path, num_images: int) -> None:
    for first, number in ((0, 40), (40, 210), (250, 50)):
        capture(tmp_path, number, first)
    window = load_window(str(tmp_path), SERVED, num_images)
    numbers = window.images[:, 0, 0, 0] * np.int64(256) + window.images[:, 0, 0, 1]
    assert numbers.tolist() == list(range(300))[-num_images:]
    assert len(window) == len(window.probabilities) == len(window.times) == len(window.request_ids)
    assert window.last == "2026-11-30T16:59:00"


def test_a_window_holds_what_was_captured_between_two_times(tmp_path: Path) -> None:
    capture(tmp_path, 300, 0)
    window = load_window(str(tmp_path), SERVED, 1000, since=START + HOUR / 2, until=START + 3 * HOUR)
    assert (window.first, window.last) == ("2026-11-30T12:30:00", "2026-11-30T14:59:00")
    assert len(load_window(str(tmp_path), SERVED, 110, until=START + 3 * HOUR)) == 110


def test_too_few_are_refused(tmp_path: Path) -> None:
    capture(tmp_path, 99, 0)
    with pytest.raises(DataError, match="has 99 images; drift needs 100: capture more"):
        load_window(str(tmp_path), SERVED, 1000)
    with pytest.raises(DataError, match="has 0 images of version 2; drift needs 100"):
        load_window(str(tmp_path), replace(SERVED, version="2"), 1000)


def test_a_place_without_captures_is_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(DataError, match="has no captures|cannot be read"):
            load_window(str(place), SERVED, 1000)


def test_answers_of_another_model_are_refused_or_left_out(tmp_path: Path) -> None:
    capture(tmp_path, 120, 0)
    capture(tmp_path, 120, 120, facts=replace(FACTS, model_digest="e" * 64), version="2")
    with pytest.raises(
        DataError, match=r"has predictions of another model than the model, of version 2; --model_version"
    ):
        load_window(str(tmp_path), SERVED, 1000)
    for version, first in (("1", "12:00"), ("2", "14:00")):
        window = load_window(str(tmp_path), replace(SERVED, version=version), 1000)
        assert len(window) == 120 and window.first == f"2026-11-30T{first}:00"
    assert len(load_window(str(tmp_path), SERVED, 1000, until=START + 2 * HOUR)) == 120


@pytest.mark.parametrize("facts", [replace(FACTS, classes=("cat", "car")), replace(FACTS, image_size=64)])
def test_other_classes_and_sizes_are_refused(tmp_path: Path, facts: CaptureFacts) -> None:
    capture(tmp_path, 100, 0, facts=facts)
    with pytest.raises(DataError, match="for other classes, or images of another size, than the model"):
        load_window(str(tmp_path), SERVED, 1000)


def test_numbers_that_are_no_probabilities_are_refused(tmp_path: Path) -> None:
    images = np.zeros((100, 32, 32, 3), np.uint8)
    write_captures(tmp_path, FACTS, images, np.tile(np.array([np.nan, 1], np.float32), (100, 1)))
    with pytest.raises(DataError, match="has invalid probabilities"):
        load_window(str(tmp_path), SERVED, 1000)


def test_a_broken_file_is_left_out_and_named(tmp_path: Path) -> None:
    capture(tmp_path, 300, 0)
    path = next((tmp_path / "date=2026-11-30" / "hour=15").iterdir())
    path.write_bytes(path.read_bytes()[:-100])
    window = load_window(str(tmp_path), SERVED, 1000)
    assert len(window) == 240
    assert [Path(broken.path).name for broken in window.broken] == [path.name]
