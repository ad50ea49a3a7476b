"""What every source gives: a name, the classes, and the images batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from image_classifier.data.findings import Findings, Notebook
from image_classifier.errors import DataError
from image_classifier.image_sizes import DEFAULT_IMAGE_SIZE

MAX_CLASSES = 1000
"""An evaluation counts which class was taken for which: of ten thousand classes that is a table of 800 MB."""

Batch = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Images [n, 3, S, S] RGB and labels [n]."""


@dataclass(frozen=True)
class Content:
    """A data set as it is read.

    Attributes:
        parts: the batches of the training, the validation and the test part, in this order; they are made while they
            are gone through, once. A source without a validation part has no batch of it.
        notebook: what is found meanwhile; None for a source whose images are taken as they are.
        image_size: side in pixels of the images.
        num_images: how many there are, as far as that is known before they are read.
        reopen: gives the batches of a part from its N-th image on, those that are left out counted; None for a source
            that is read from its beginning alone.
    """

    name: str
    classes: tuple[str, ...]
    parts: Mapping[str, Iterable[Batch]]
    notebook: Notebook | None = None
    image_size: int = DEFAULT_IMAGE_SIZE
    num_images: int | None = None
    reopen: Callable[[str, int], Iterable[Batch]] | None = None

    def __post_init__(self) -> None:
        if len(self.classes) > MAX_CLASSES:
            raise DataError(
                f"{self.name} has {len(self.classes):,} classes, at most {MAX_CLASSES:,} are read; merge some"
            )

    @property
    def findings(self) -> Findings | None:
        """What was found in what was gone through so far."""
        return None if self.notebook is None else self.notebook.summarize()
