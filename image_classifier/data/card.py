"""Checks the number of images of a data set against its Hugging Face metadata.

They stand as `dataset_info` at the head of `README.md`, or in `dataset_infos.json`
(https://huggingface.co/docs/datasets/package_reference/main_classes#datasets.DatasetInfo).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from image_classifier.data.parts import find_part
from image_classifier.errors import DataError
from image_classifier.files import load_json, parse_yaml, read_file
from image_classifier.text import one_line

MAX_CARD_BYTES = 2**20


def check_sizes(counts: Mapping[str, int], folders: Sequence[Path]) -> None:
    """Check the number of images of each part against what metadata in the folders states, if there is any.

    Where metadata describes several configurations of a data set, one of them must have these sizes.

    Raises:
        DataError: a part has more or fewer images than are stated, or the metadata cannot be read.
    """
    for path in {folder / name for folder in folders for name in ("README.md", "dataset_infos.json")}:
        if path.is_file():
            check_stated(counts, list(_load_infos(path)), path)


def check_stated(counts: Mapping[str, int], infos: Sequence[Any], where: object) -> None:
    """Check the number of images of each part against one of the `dataset_info` objects.

    Raises:
        DataError: none of them has these sizes.
    """
    differences = []
    for info in infos:
        stated = _get_sizes(info)
        differences.append(
            [
                f"{size:,} {part} images, but {counts.get(part, 0):,} are here"
                for part, size in stated.items()
                if counts.get(part, 0) != size
            ]
        )
    if differences and all(differences):
        raise DataError(
            f"{where} says that the data set has {', '.join(differences[0])}: get the complete data set, or correct "
            f"the sizes there"
        )


def _get_sizes(info: Any) -> dict[str, int]:
    """Get the number of images of each part that a `dataset_info` object states."""
    splits = info.get("splits") if isinstance(info, dict) else None
    if isinstance(splits, dict):  # by name, where it is JSON
        splits = [{"name": name, **split} for name, split in splits.items() if isinstance(split, dict)]
    sizes = {}
    for split in splits if isinstance(splits, list) else ():
        part = find_part(str(split.get("name"))) if isinstance(split, dict) else None
        if part is not None and type(split.get("num_examples")) is int:
            sizes[part] = split["num_examples"]
    return sizes


def _load_infos(path: Path) -> Iterator[Any]:
    """Load the `dataset_info` objects of a file, one for each configuration."""
    try:
        if path.suffix == ".json":
            yield from dict(load_json(path)).values()
            return
        opening, _, rest = read_file(path, MAX_CARD_BYTES).decode("utf-8", "replace").partition("\n")
        head, closing, _ = rest.partition("\n---")
        if opening.rstrip() != "---" or not closing or "dataset_info" not in head:
            return  # a README.md without metadata
        infos = dict(parse_yaml(head))["dataset_info"]
        yield from infos if isinstance(infos, list) else [infos]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path} has no valid dataset_info with the sizes of the data set: {one_line(error)}; "
            "correct it, or remove it"
        ) from error
