"""A data source for `image_classifier`: a folder with image files and `labels.csv`, whose lines are file,class,part."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path


class CsvSource:
    """Reads a folder with a `labels.csv`; the part of a line is train, validation or test."""

    def can_read(self, path: Path) -> bool:
        return (path / "labels.csv").is_file()

    def list_files(self, path: Path) -> list[Path]:
        return [path / "labels.csv", *(path / file for file, _, _ in self._read_lines(path))]

    def list_classes(self, path: Path) -> list[str]:
        return sorted({name for _, name, _ in self._read_lines(path)})

    def iterate_images(self, path: Path, part: str) -> Iterator[tuple[Path, int]]:
        classes = self.list_classes(path)
        for file, name, its_part in self._read_lines(path):
            if its_part == part:
                yield path / file, classes.index(name)

    def _read_lines(self, path: Path) -> list[tuple[str, str, str]]:
        with open(path / "labels.csv", encoding="utf-8", newline="") as file:
            return [(line["file"], line["class"], line["part"]) for line in csv.DictReader(file)]
