"""Evaluates a published model on the test set, and compares the result with its manifest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from image_classifier.data.snapshot import Snapshot
from image_classifier.errors import DataError, ModelError
from image_classifier.metrics import compute_metrics
from image_classifier.progress import track
from image_classifier.published.folder import MODEL, Published
from image_classifier.published.predictor import Predictor
from image_classifier.text import one_line

METRICS = ("accuracy", "top5_accuracy", "loss")

_BATCH_SIZE = 500
_IMAGES_PER_DIFFERENCE = 1000
"""One image in so many may be right here and wrong there: processors round differently, which decides a tie."""


@dataclass(frozen=True)
class Evidence:
    """How a model does on a test set.

    Attributes:
        right: whether each image is classified rightly, [N].
        metrics: accuracy, top5_accuracy, loss, and num_images.
        source: data where this was computed here, signature where a manifest says so whose signer is trusted.
    """

    right: NDArray[np.bool_]
    metrics: dict[str, float]
    source: str


def compute_evidence(
    title: str,
    published: Published,
    predictor: Predictor,
    snapshot: Snapshot,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> Evidence:
    """Compute how a published model does on the test set of its data.

    Args:
        title: what messages call the model.
        predictor: built of its `model.onnx`.
        say: told before what takes time.

    Raises:
        DataError: the snapshot is other data.
        ModelError: the model cannot be computed, or says that it is another than its manifest says.
    """
    digest = published.manifest["data_digest"]
    if snapshot.recognize(digest).digest != digest:
        raise DataError(
            f"{title} was tested on data with the digest {str(digest)[:12]}, but this is {snapshot.name} with "
            f"{snapshot.digest[:12]}; name the right data with --dataset_folder"
        )
    _check_metadata(title, published.manifest, predictor.model)
    images, labels = snapshot.test
    say(f"computing the answers of {title} to {len(labels):,} images")
    pixels = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    starts = range(0, len(pixels), _BATCH_SIZE)
    try:
        with track("computing answers", len(labels), "images") as task:
            parts = []
            for start in starts:
                parts.append(predictor.predict(pixels[start : start + _BATCH_SIZE]))
                task.advance(len(parts[-1]))
        answers = np.concatenate(parts)
        if answers.shape != (len(labels), len(snapshot.classes)):
            raise ValueError(f"its answers are {list(answers.shape)}")
    except Exception as error:  # of types that the runtime alone knows
        raise ModelError(f"{title} cannot be computed on {snapshot.name}: {one_line(error)}") from error
    metrics = compute_metrics(answers, labels, snapshot.classes)
    return Evidence(
        answers.argmax(axis=1) == labels,
        {**{name: float(metrics[name]) for name in METRICS}, "num_images": len(labels)},
        "data",
    )


def _check_metadata(title: str, manifest: dict[str, Any], model: Any) -> None:
    for name in ("experiment_name", "run_name", "data_digest", "views", "classes"):
        inside = getattr(model, name)
        if manifest.get(name) != (list(inside) if name == "classes" else inside):
            raise ModelError(
                f"{title} contradicts itself about its {name}: its manifest says {manifest.get(name)!a}, its {MODEL} "
                f"{inside!a}; publish the run again"
            )


def read_claims(title: str, published: Published) -> Evidence:
    """Read what the manifest of a published model says about how it does.

    Raises:
        ModelError: it says nothing of the kind.
    """
    try:
        metrics = {name: float(published.manifest["metrics"][name]) for name in METRICS}
        num_images = int(published.manifest["metrics"]["num_images"])
        packed = np.frombuffer(bytes.fromhex(published.manifest["right"]), np.uint8)
        if len(packed) != -(-num_images // 8):
            raise ValueError("right does not have num_images entries")
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"the manifest of {title} has no valid figures ({error}); publish the run again") from error
    right = np.unpackbits(packed, count=num_images).astype(bool)
    return Evidence(right, {**metrics, "num_images": num_images}, "signature")


def check_claims(title: str, published: Published, evidence: Evidence) -> None:
    """Check that what a manifest says about its model is what was found.

    Raises:
        ModelError: it is not.
    """
    claims = read_claims(title, published)
    num_images = len(evidence.right)
    if len(claims.right) != num_images:
        raise ModelError(
            f"{title} claims predictions for {len(claims.right):,} images, but its data has {num_images:,}; publish "
            f"again"
        )
    tolerated = num_images // _IMAGES_PER_DIFFERENCE
    differing = int((claims.right != evidence.right).sum())
    difference = abs(claims.metrics["accuracy"] - evidence.metrics["accuracy"])
    if differing > tolerated or difference > (tolerated + 0.5) / num_images:
        raise ModelError(
            f"{title} claims {100 * claims.metrics['accuracy']:.2f} % accuracy, but has "
            f"{100 * evidence.metrics['accuracy']:.2f} %, and {differing:,} of {num_images:,} predictions differ "
            "from its manifest; publish the run again, and find out who wrote this manifest"
        )
