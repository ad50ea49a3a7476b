"""References to what is no path: a data set in the database, and weights that torchvision publishes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from image_classifier.errors import SettingsError

_DATABASE_PREFIX = "db:"


_PUBLISHED = re.compile(r"torchvision:([a-z0-9_]{1,100})@([A-Za-z0-9_]{1,100})")


_REFERENCE = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]{0,99})(?:@([1-9][0-9]{0,8}))?")


@dataclass(frozen=True)
class Reference:
    """A data set in a database, and which of its versions; None is the newest."""

    name: str
    version: int | None = None

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name}@{self.version}"


def parse_reference(text: str) -> Reference:
    """Parse NAME or NAME@VERSION.

    Raises:
        SettingsError: it is neither.
    """
    match = _REFERENCE.fullmatch(text)
    if match is None:
        raise SettingsError(
            "a data set in a database is NAME or NAME@VERSION, of letters, digits, dots, dashes and underscores and a "
            f"whole number, got: {text[:200]!a}"
        )
    return Reference(match[1], int(match[2]) if match[2] else None)


def get_reference(dataset: Path | str) -> Reference | None:
    """Parse db:NAME or db:NAME@VERSION, which may stand where a folder may; None for a path.

    Raises:
        SettingsError: it begins with db: and does not go on so.
    """
    text = str(dataset)
    return parse_reference(text.removeprefix(_DATABASE_PREFIX)) if text.startswith(_DATABASE_PREFIX) else None


def get_published_weights(model: Path | str) -> tuple[str, str] | None:
    """Parse torchvision:NETWORK@WEIGHTS, which may stand where a model file may; None for a path.

    Raises:
        SettingsError: it begins with torchvision: and does not go on so.
    """
    if not str(model).startswith("torchvision:"):
        return None
    match = _PUBLISHED.fullmatch(str(model))
    if match is None:
        raise SettingsError(
            "--pretrained_model takes a path, or torchvision:NETWORK@WEIGHTS such as "
            f"torchvision:resnet18@IMAGENET1K_V1, got: {str(model)[:200]!a}"
        )
    return match[1], match[2]
