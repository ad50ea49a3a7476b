"""Computes captured images again and compares the probabilities bit by bit.

The result for an image could depend on the batch size in ONNX Runtime, although it did not for any model and machine
that we tried. So each image is computed in a batch of its original size.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from image_classifier.capture.files import Captured, Captures
from image_classifier.capture.recorder import describe_machine
from image_classifier.errors import DataError
from image_classifier.progress import track
from image_classifier.published.predictor import Predictor

MAX_BATCH_BYTES = 2**28
"""Size limit of a batch's pixels, larger than any server's batch."""


@dataclass
class Replay:
    """Result of a comparison.

    Attributes:
        num_different: images with any different bit in the probabilities.
        num_other_class: images with another predicted class.
        largest: largest difference of a probability.
        first: description of the first different image; empty if there is none.
        others: number of skipped images of other models, by version.
        machines: other machines that computed captured images.
    """

    num_files: int = 0
    num_images: int = 0
    num_different: int = 0
    num_other_class: int = 0
    largest: float = 0.0
    first: str = ""
    others: Counter[str] = field(default_factory=Counter)
    machines: set[str] = field(default_factory=set)


def replay(captures: Captures, predictor: Predictor) -> Replay:
    """Compute captured images of a model again.

    Args:
        captures: its attribute `broken` lists skipped files afterwards.
        predictor: of the model that computed them; images of other models are counted and skipped.

    Raises:
        DataError: the place cannot be read, or has no image of this model in the period.
    """
    result = Replay()
    with track("computing again", len(captures.list_paths()), "files") as task:
        for captured in captures:
            if captured.facts.model_digest == predictor.model.digest:
                _compare(captured, predictor, result)
            else:
                result.others.update(describe_version(captured, version) for version in captured.model_versions)
            task.done = captures.num_read
    if result.num_images == 0:
        versions = f"all are of version {', '.join(sorted(result.others))}" if result.others else "all files are broken"
        raise DataError(
            f"no captured images are of {predictor.model.path} (sha256 {predictor.model.digest[:12]}): {versions}; "
            "name the model that computed them, with its --precision"
        )
    return result


def describe_version(captured: Captured, version: str) -> str:
    """Describe a version by its name and, if that is not the digest, by the ONNX file's digest."""
    digest = captured.facts.model_digest[:12]
    return version if version == digest else f"{version} (sha256 {digest})"


def _compare(captured: Captured, predictor: Predictor, result: Replay) -> None:
    again = compute_again(captured, predictor)
    before = captured.probabilities
    differs = (again.view(np.uint32) != before.view(np.uint32)).any(axis=1)
    result.num_files += 1
    result.num_images += len(captured)
    if captured.facts.machine != describe_machine():
        result.machines.add(captured.facts.machine)
    if not differs.any():
        return
    result.num_different += int(differs.sum())
    result.num_other_class += int((again.argmax(axis=1) != before.argmax(axis=1)).sum())
    result.largest = max(result.largest, float(np.abs(again - before).max()))
    row = int(differs.argmax())
    result.first = result.first or (
        f"image {captured.image_indices[row]} of request {captured.request_ids[row]} in {captured.path}"
    )


def compute_again(captured: Captured, predictor: Predictor) -> NDArray[np.float32]:
    """Compute the images of a file again, each in a batch of its original size: float32 [N, K]."""
    again = np.empty_like(captured.probabilities)
    for size in np.unique(captured.batch_sizes).tolist():
        rows = np.flatnonzero(captured.batch_sizes == size)
        if not 1 <= size <= max(1, MAX_BATCH_BYTES // captured.pixels[0].nbytes):
            raise DataError(f"{captured.path} has an invalid batch size of {size:,}")
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            filled = np.resize(batch, size)  # the rest of the original batch is unknown: repeat images
            again[batch] = predictor.predict(captured.pixels[filled])[: len(batch)]
    return again
