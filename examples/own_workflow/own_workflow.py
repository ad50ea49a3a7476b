"""A workflow for `image_classifier` with data of its own: images of stripes, which it draws."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from image_classifier.workflow.base import register
from image_classifier.workflow.classification import Classification


@register("stripes")
class Stripes(Classification):
    def load_data(self) -> Path:
        return draw_stripes(Path("stripes"))


def draw_stripes(folder: Path, num_images: int = 40) -> Path:
    """Draw images of each class to train with and to test with; the folder is there when all are."""
    if folder.exists():
        return folder
    ways = {"across": (0, 1), "down": (1, 0), "slanting": (1, 1)}
    drawn = Path(tempfile.mkdtemp(dir=folder.parent))
    for part, name in ((part, name) for part in ("train", "test") for name in ways):
        (drawn / part / name).mkdir(parents=True)
        generator = np.random.default_rng([len(part), len(name)])
        for number in range(num_images):
            rows, columns = np.mgrid[:32, :32]
            phase = (ways[name][0] * columns + ways[name][1] * rows) * generator.uniform(0.4, 1.0)
            wave = np.sin(phase + generator.uniform(0, 6))[:, :, None] * generator.uniform(40, 120, 3)
            pixels = np.clip(128 + wave + generator.normal(0, 20, (32, 32, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(drawn / part / name / f"{number}.png")
    return drawn.rename(folder)
