"""What `metadata.json` in a dataset folder says of the data set."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from image_classifier.errors import DataError
from image_classifier.files import load_json
from image_classifier.text import is_digest, is_name, one_line

METADATA_FILE = "metadata.json"
METADATA_FORMAT = 1


@dataclass(frozen=True)
class Metadata:
    """What `metadata.json` in the dataset folder says; each part is optional.

    Attributes:
        name: what the data set calls itself.
        classes: the names of the classes, in the order of the labels.
        digest: the digest that the snapshot must have.
        split_seed: seed by which a folder of images without train/ and test/ is split.
    """

    name: str | None = None
    classes: tuple[str, ...] | None = None
    digest: str | None = None
    split_seed: int = 0


def load_metadata(folder: Path) -> Metadata:
    """Load a dataset folder's `metadata.json`; without one everything is left to the source.

    Raises:
        DataError: it is no JSON object, or has an unknown key or a value of the wrong type.
    """
    path = folder / METADATA_FILE
    try:
        content = load_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return Metadata()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {one_line(error)}; correct it") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold a JSON object, got: {type(content).__name__}")
    version = content.pop("format_version", METADATA_FORMAT)
    if type(version) is int and version > METADATA_FORMAT:
        raise DataError(
            f"{path} has format_version {version}; this version of image_classifier reads {METADATA_FORMAT}"
        )
    checks = {
        "format_version": (type(version) is int and version >= 1, f"the number {METADATA_FORMAT}", version),
        "name": _check(content, "name", is_name, "a text on one line"),
        "classes": _check(content, "classes", are_classes, "a list of different names"),
        "digest": _check(
            content,
            "digest",
            lambda value: isinstance(value, str) and is_digest(value.lower()),
            "64 hexadecimal digits",
        ),
        "split_seed": _check(content, "split_seed", _is_seed, "a whole number from 0 to 2**63 - 1"),
    }
    for key in content:
        if key not in checks:
            raise DataError(f"{path} has the unknown key {key!a}; it may have {', '.join(checks)}")
    for key, (good, takes, got) in checks.items():
        if not good:
            raise DataError(f"{path}: {key} takes {takes}, got: {json.dumps(got)[:200]}")
    classes, digest = content.get("classes"), content.get("digest")
    return Metadata(
        content.get("name"),
        tuple(classes) if classes else None,
        digest and digest.lower(),
        content.get("split_seed", 0),
    )


def are_classes(value: Any) -> bool:
    """Say whether a value is a list of different names, at least one."""
    return isinstance(value, list) and len(value) > 0 and all(map(is_name, value)) and len(set(value)) == len(value)


def _check(content: dict[str, Any], key: str, accepts: Any, takes: str) -> tuple[bool, str, Any]:
    return (key not in content or accepts(content[key]), takes, content.get(key))


def _is_seed(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63
