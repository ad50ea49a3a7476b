"""Labels of captured images, which arrive later, by request and image."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from image_classifier.errors import DataError
from image_classifier.files import read_file
from image_classifier.text import one_line

COLUMNS = ("request_id", "image_index", "label")
MAX_BYTES = 2**26
"""Size limit of the file: about two million labels."""

Labels = dict[tuple[str, int], int]
"""Class index by request id and image index."""


def load_labels(path: Path, classes: tuple[str, ...]) -> Labels:
    """Load a CSV file with the columns `request_id`, `image_index` and `label` (a class name).

    Raises:
        DataError: it cannot be read, a column is missing, a class is unknown, or an image has two labels.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    labels: Labels = {}
    try:
        reader = csv.DictReader(io.StringIO(read_file(path, MAX_BYTES).decode("utf-8-sig"), newline=""), strict=True)
        if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
            raise ValueError(f"its header has no column {missing[0]}")
        for row in reader:
            place = f"line {reader.line_num}"
            request_id, index, label = (row[name] for name in COLUMNS)
            if not (request_id and (index or "").isdecimal() and label in numbers):
                raise ValueError(f"{place}: not a request_id, a whole number and one of the {len(classes)} classes")
            if labels.setdefault((request_id, int(index)), numbers[label]) != numbers[label]:
                raise ValueError(f"{place}: a second, different label for an image")
    except (OSError, ValueError, csv.Error) as error:
        reason = one_line(error)
        raise DataError(
            f"{path} is not a valid label file: {reason}; it is CSV with the columns {', '.join(COLUMNS)}"
        ) from error
    return labels
