"""When a model in 8 bits is worth having."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from image_classifier.published.predictor import Predictor
from image_classifier.publishing.quantize import compare_precisions, describe_comparison
from tests.batching import MODEL

IMAGES = np.zeros((200, 3, 32, 32), np.uint8)
LABELS = np.zeros(200, np.int64)


class Timed(Predictor):
    """Is right for a number of 200 images, and takes a time for each batch."""

    def __init__(self, num_right: int, batch_s: float) -> None:
        super().__init__(None, replace(MODEL, classes=("a", "b")))
        answers: NDArray[np.float32] = np.eye(2, dtype=np.float32)[(np.arange(200) >= num_right).astype(int)]
        self.answers = answers
        self.batch_s = batch_s
        self.position = 0

    def predict(self, images: NDArray[np.uint8], *, is_alone: bool = False) -> NDArray[np.float32]:
        time.sleep(self.batch_s)
        rows = (self.position + np.arange(len(images))) % 200
        self.position += len(images)
        chosen: NDArray[np.float32] = self.answers[rows]
        return chosen


@pytest.mark.parametrize(
    ("num_right", "batch_s", "verdict"),
    [
        (180, 0.001, None),
        (179, 0.001, None),
        (178, 0.001, "it loses 1.00 points of accuracy, more than the 0.5 that are allowed"),
        (180, 0.02, "it is not faster"),
    ],
)
def test_it_must_be_faster_and_nearly_as_good(num_right: int, batch_s: float, verdict: str | None) -> None:
    comparison = compare_precisions({"fp32": Timed(180, 0.01), "int8": Timed(num_right, batch_s)}, IMAGES, LABELS)
    assert comparison["accuracy"] == {"fp32": 0.9, "int8": num_right / 200}
    assert comparison["verdict"] == verdict or (verdict or "-") in comparison["verdict"]
    described = describe_comparison(comparison)
    if verdict is None:
        assert described.endswith(f" times as fast as fp32, accuracy {num_right / 200:.2%}, fp32 90.00%")
    else:
        assert described.startswith(f"int8 is left out, because {verdict}")
