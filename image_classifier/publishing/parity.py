"""The parity proof: compares a published model with its run on every image of the test set."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from image_classifier.choices import Views
from image_classifier.errors import ModelError
from image_classifier.image_sizes import scale_batch
from image_classifier.progress import track
from image_classifier.published.predictor import Predictor
from image_classifier.training.evaluate import SURE

BATCH_SIZES = (1, 7, 64)
"""Images at once; the most are fewer if they are large."""
TOLERANCE = 1e-4
"""Largest difference of a probability in fp32; sums in another order give about 1e-6."""
TIE = 1e-5
"""Two classes whose probabilities are closer together are a tie, which may be broken either way."""


# Over 50 lines: half of it says what is compared.
def compute_parity(
    predictor: Predictor,
    images: NDArray[np.uint8],
    expected: NDArray[np.float32],
    single_view: NDArray[np.float32],
    *,
    views: Views = "one",
) -> tuple[list[dict[str, Any]], NDArray[np.float32]]:
    """Compute how far a predictor's answers are from the expected ones, for several sizes of a batch.

    An image whose margin is within the tolerance of the one at which more views are taken may get either answer: that
    of the views, or that of the single view.

    Args:
        images: uint8 [N, 3, S, S].
        expected: float32 [N, C], the trainer's probabilities by the views.
        single_view: float32 [N, C], the same by the images alone.

    Returns:
        For each size: `batch_size`, `largest_difference` of a probability, `agreement` of the classes as a fraction,
        `num_ties` among those that differ, and `num_at_threshold`, the images that may get either answer; and the
        answers float32 [N, C] of the largest batches.
    """
    ordered = np.sort(single_view, axis=1)
    margin = ordered[:, -1] - ordered[:, -2:-1].sum(axis=1)
    at_threshold = np.abs(margin - SURE) <= TOLERANCE if views == "six" else np.zeros(len(images), bool)
    lines = []
    largest = max(BATCH_SIZES[-2], scale_batch(BATCH_SIZES[-1], images.shape[-1]))
    for size in sorted({*BATCH_SIZES[:-1], largest}):
        parts = []
        with track(f"comparing in batches of {size}", len(images), "images") as task:
            for start in range(0, len(images), size):
                pixels = np.ascontiguousarray(images[start : start + size].transpose(0, 2, 3, 1))
                parts.append(predictor.predict(pixels))
                task.advance(len(parts[-1]))
        answers = np.concatenate(parts)
        nearer = np.abs(answers - single_view).max(axis=1) < np.abs(answers - expected).max(axis=1)
        reference = np.where((at_threshold & nearer)[:, None], single_view, expected)
        classes, others = reference.argmax(axis=1), answers.argmax(axis=1)
        rows = np.arange(len(reference))
        is_tie = (classes != others) & (reference[rows, classes] - reference[rows, others] <= TIE)
        lines.append(
            {
                "batch_size": size,
                "largest_difference": float(np.abs(answers - reference).max()),
                "agreement": float((classes == others).mean()),
                "num_ties": int(is_tie.sum()),
                "num_at_threshold": int(at_threshold.sum()),
            }
        )
    return lines, answers


def check_parity(lines: list[dict[str, Any]], num_images: int) -> None:
    """Check that a class differs by a tie alone, and no probability by more than the tolerance.

    Raises:
        ModelError: the answers are not the trainer's.
    """
    for line in lines:
        num_others = round((1 - line["agreement"]) * num_images) - line["num_ties"]
        if num_others > 0 or not line["largest_difference"] <= TOLERANCE:
            raise ModelError(
                f"the exported model does not give the run's answers: at batch size {line['batch_size']}, "
                f"{num_others} of {num_images} classes differ, and a probability by {line['largest_difference']:.2g} "
                f"(at most {TOLERANCE:g} is allowed); nothing was published"
            )
