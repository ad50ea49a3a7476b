"""Conformance tests for data sources: the same images and labels each time, and a complete list of files."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from image_classifier.data.content import Content
from image_classifier.data.metadata import Metadata
from image_classifier.data.plugged import DataSource, Reader
from image_classifier.errors import ImageClassifierError
from image_classifier.plugins import PlugIn


def check_source(source: DataSource, path: Path) -> None:
    """Check that a data source reads a data set, in the same way each time, and nothing that is none.

    Args:
        path: a small data set of its kind, with a training and a test part.

    Raises:
        AssertionError: the source fails; the message says in what.
    """
    reader = Reader(PlugIn("source", "the source", "none"), source)
    try:
        if not reader.can_read(path):
            raise AssertionError(f"the source does not read {path}")
        with TemporaryDirectory() as empty:
            if reader.can_read(Path(empty)):
                raise AssertionError("the source says that it reads a folder in which nothing is")
        for file in reader.list_files(path):
            if not ((path if path.is_dir() else path.parent) / file).is_file():
                raise AssertionError(f"the source lists {file}, which is no file")
        first, again = (_collect(reader.read(path, Metadata())) for _ in range(2))
    except ImageClassifierError as error:
        raise AssertionError(str(error)) from error
    for part in ("train", "test"):
        if part not in first:
            raise AssertionError(f"the source gives no images of the part {part}")
    for part, arrays in first.items():
        if not all(np.array_equal(one, other) for one, other in zip(arrays, again[part], strict=True)):
            raise AssertionError(f"the source gives other images or labels of the part {part} when it is read again")


def _collect(content: Content) -> dict[str, list[NDArray[Any]]]:
    """Collect images [N, 3, H, W] and labels [N] by part."""
    parts = {part: list(batches) for part, batches in content.parts.items()}
    return {part: [np.concatenate(arrays) for arrays in zip(*batches)] for part, batches in parts.items() if batches}
