"""Parts of a data set, written as data sets of their own in CIFAR-10's binary layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from image_classifier.data.snapshot import Snapshot


def write_subset(
    snapshot: Snapshot,
    folder: Path,
    train: NDArray[np.int64],
    test: NDArray[np.int64],
    classes: Sequence[str] | None = None,
) -> Path:
    """Write the images at these indices, [N] to train on and [M] to test on; return the folder, which exists.

    Args:
        classes: those that the images are of, in the order of the new labels; by default all, as they are.
    """
    classes = snapshot.classes if classes is None else classes
    labels = np.array([classes.index(name) if name in classes else 255 for name in snapshot.classes], np.uint8)
    rows = np.concatenate([labels[snapshot.labels][:, None], snapshot.images.reshape(len(snapshot.images), -1)], axis=1)
    names = [f"data_batch_{number}.bin" for number in range(1, 6)]
    parts: Sequence[NDArray[np.int64]] = np.array_split(train, len(names))
    for name, part in zip([*names, "test_batch.bin"], [*parts, test], strict=True):
        (folder / name).write_bytes(rows[part].tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(classes) + "\n")
    return folder
