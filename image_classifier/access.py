"""How a data set is reached and read: its folder, the database and its password, and what becomes of its images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from image_classifier.choices import Fit
from image_classifier.credentials import Secret
from image_classifier.image_sizes import DEFAULT_IMAGE_SIZE, ImageSize, check_image_size

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Endings of the names of image files."""
DATASET_FOLDER = Path("data/cifar_dataset")
"""Where a data set lies if nothing else is said."""
DATABASE_FOLDER = Path("data")
"""Where SQLite's file lies, with all data sets in it, and the snapshots of what is read from a database."""


@dataclass(frozen=True, kw_only=True)
class DatabaseAccess:
    """How the database is reached.

    Attributes:
        config: YAML file that says where it is; None takes the packaged db_connect.yaml.
        password: what the server asks for; None if nobody gave one.
        ask: asks a person for the password where the server wants one and nobody gave it.
        dataset_folder: where SQLite's file lies, and the snapshots of what is read.
    """

    config: Path | None = None
    password: Secret | None = None
    ask: Callable[[], Secret] | None = None
    dataset_folder: Path = DATABASE_FOLDER


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How image files are read.

    Attributes:
        fit: What becomes of an image of another size: it is resized whatever its sides' ratio (squeeze), cut to the
            square in its middle (crop), or given a black border (pad), then resized; or it cannot be read (refuse).
        skip_bad: leave out images that cannot be read; else they are an error.
        image_size: side in pixels that images get; None for that of a database, and the default for all else.
    """

    fit: Fit = "squeeze"
    skip_bad: bool = False
    image_size: ImageSize | None = None

    def __post_init__(self) -> None:
        if self.image_size is not None:
            check_image_size(self.image_size)

    @property
    def side(self) -> ImageSize:
        """Side in pixels that images get which come from files."""
        return self.image_size or DEFAULT_IMAGE_SIZE
