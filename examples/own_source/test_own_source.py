"""The package's own suite, called with the source of this folder."""

from pathlib import Path

import numpy as np
from own_source import CsvSource
from PIL import Image

from image_classifier.testing.sources import check_source


def test_the_source_reads_the_same_each_time(tmp_path: Path) -> None:
    lines = ["file,class,part"]
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{'ab'[number % 2]},{'train' if number < 4 else 'test'}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    check_source(CsvSource(), tmp_path)
