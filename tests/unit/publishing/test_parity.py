"""The proof of equal answers: what passes it, and what does not."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from image_classifier.errors import ModelError
from image_classifier.published.predictor import Predictor
from image_classifier.publishing.parity import BATCH_SIZES, TIE, check_parity, compute_parity
from tests.batching import MODEL
from tests.runs import draw_predictions

EXPECTED, _ = draw_predictions(0.8, 100, 3)
IMAGES = np.zeros((100, 3, 32, 32), np.uint8)
IMAGES[:, 0, 0, 0] = np.arange(100)


class Answers(Predictor):
    """Gives prepared answers: an image's first value says which."""

    def __init__(self, answers: NDArray[np.float32]) -> None:
        super().__init__(None, MODEL)
        self.answers = answers

    def predict(self, images: NDArray[np.uint8], *, is_alone: bool = False) -> NDArray[np.float32]:
        return self.answers[images[:, 0, 0, 0]]


def test_equal_answers_pass_for_each_size_of_a_batch() -> None:
    lines, answers = compute_parity(Answers(EXPECTED), IMAGES, EXPECTED, EXPECTED)
    check_parity(lines, 100)
    assert [line["batch_size"] for line in lines] == list(BATCH_SIZES)
    np.testing.assert_array_equal(answers, EXPECTED)


def test_a_probability_that_is_too_far_off_fails() -> None:
    answers = EXPECTED.copy()
    answers[17] += np.float32(2e-4)
    lines, _ = compute_parity(Answers(answers), IMAGES, EXPECTED, EXPECTED)
    with pytest.raises(ModelError, match="0 of 100 classes differ, and a probability by 0.0002"):
        check_parity(lines, 100)


@pytest.mark.parametrize(("gap", "passes"), [(TIE / 2, True), (TIE * 4, False)])
def test_a_class_may_differ_by_a_tie_alone(gap: float, passes: bool) -> None:
    expected, answers = EXPECTED.copy(), EXPECTED.copy()
    expected[3] = (0.45 + gap, 0.45, 0.1)
    answers[3] = (0.45, 0.45 + gap, 0.1)
    lines, _ = compute_parity(Answers(answers), IMAGES, expected, expected)
    assert lines[0]["num_ties"] == int(passes)
    if passes:
        check_parity(lines, 100)
    else:
        with pytest.raises(ModelError, match="1 of 100 classes differ"):
            check_parity(lines, 100)


def test_an_image_at_the_threshold_may_get_either_answer_and_no_other() -> None:
    single, expected = EXPECTED.copy(), EXPECTED.copy()
    single[5], expected[5] = (0.65, 0.25, 0.1), (0.6, 0.3, 0.1)  # a margin of 0.4
    for row, passes in ((single[5], True), (expected[5], True), (np.array([0.62, 0.28, 0.1], np.float32), False)):
        answers = expected.copy()
        answers[5] = row
        lines, _ = compute_parity(Answers(answers), IMAGES, expected, single, views="six")
        assert (lines[0]["largest_difference"] < 1e-6) is passes


def test_numbers_that_are_none_fail() -> None:
    lines, _ = compute_parity(Answers(EXPECTED * np.float32(np.nan)), IMAGES, EXPECTED, EXPECTED)
    with pytest.raises(ModelError, match="does not give the run's answers"):
        check_parity(lines, 100)


def test_large_images_are_compared_in_smaller_batches() -> None:
    images = np.zeros((100, 3, 128, 128), np.uint8)
    images[:, 0, 0, 0] = np.arange(100)
    lines, _ = compute_parity(Answers(EXPECTED), images, EXPECTED, EXPECTED)
    assert [line["batch_size"] for line in lines] == [1, 7, 16]
