"""Compute captured images again and compare every bit of the answers.

What ONNX Runtime computes for an image could depend on how many images it computes at once, although it did not in any
model and on any machine that was tried. So each image is computed in a batch of the size that it was computed in.
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
"""Of the pixels that are computed at once; no server computes so many."""


@dataclass
class Replay:
    """What was compared, and with what result.

    Attributes:
        num_different: images of which a probability has another bit.
        num_other_class: of these, the images that got another class.
        largest: the largest difference of a probability.
        first: the first image that differs, in words; empty where none does.
        others: images of other versions by version, which were not compared.
        machines: other machines than this one that computed what was captured.
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
        captures: its `broken` names the files that were left out, afterwards.
        predictor: of the model that computed them; images of other models are counted and left out.

    Raises:
        DataError: the place cannot be read, holds nothing of the time asked for, or no image of this model.
    """
    result = Replay()
    with track("computing again", len(captures.list_paths()), "files") as task:
        for captured in captures:
            if is_of(captured, predictor):
                _compare(captured, predictor, result)
            else:
                result.others.update(describe_version(captured, version) for version in captured.model_versions)
            task.done = captures.num_read
    if result.num_images == 0:
        versions = (
            f"those there are of version {', '.join(sorted(result.others))}" if result.others else "all are broken"
        )
        raise DataError(
            f"no image was captured of {predictor.model.path} (sha256 {predictor.model.digest[:12]}): {versions}; "
            "name the model that computed them, with its --precision"
        )
    return result


def is_of(captured: Captured, predictor: Predictor) -> bool:
    """Say whether a model computed the images of a file, by the digest of its ONNX file."""
    return captured.facts.model_digest == predictor.model.digest


def describe_version(captured: Captured, version: str) -> str:
    """Describe a version by its name, and by the ONNX file's digest where that is no part of the name."""
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
    """Compute the images of a file again: float32 [N, K], each in a batch of the size that it was computed in."""
    again = np.empty_like(captured.probabilities)
    for size in np.unique(captured.batch_sizes).tolist():
        rows = np.flatnonzero(captured.batch_sizes == size)
        if not 1 <= size <= max(1, MAX_BATCH_BYTES // captured.pixels[0].nbytes):
            raise DataError(f"{captured.path} has images of a batch of {size:,}, which no server computes")
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            filled = np.resize(batch, size)  # what else was in the batch is not known: images come again
            again[batch] = predictor.predict(captured.pixels[filled])[: len(batch)]
    return again
