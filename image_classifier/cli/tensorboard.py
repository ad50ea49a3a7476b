"""A run written for TensorBoard too, while it goes on: `--log tensorboard`."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from image_classifier.cli.tracking import TEST_METRICS
from image_classifier.extras import load_extra
from image_classifier.reporter import Reporter
from image_classifier.settings import RunSettings
from image_classifier.storage import storage_error
from image_classifier.tracking.layout import BOARD, FIGURE
from image_classifier.tracking.reading import read_epochs, read_evaluation


@contextmanager
def open_board(settings: RunSettings) -> Iterator[Reporter]:
    """Yield a reporter that writes event files if the settings ask for them; at the end the evaluation follows.

    Raises:
        SettingsError: tensorboard is not installed.
        StorageError: the disk refused.
    """
    if settings.log == "none":
        yield Reporter()
        return
    load_extra("tensorboard", "tensorboard")
    board = Board(settings)
    try:
        yield board
        board.finish()
    finally:
        board.close()


class Board(Reporter):
    """Writes the lines of metrics.jsonl as events.

    A run that is resumed goes back to a checkpoint, and events cannot be taken back. So the folder is made anew then,
    from the lines that are left.
    """

    def __init__(self, settings: RunSettings) -> None:
        self._run = settings.run_folder
        self._writer: Any = None  # torch ships it without types

    def begin(self, record: dict[str, Any], num_steps: int, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with self._writing():
            if (self._run / BOARD).exists():
                shutil.rmtree(self._run / BOARD)
            self._writer = SummaryWriter(str(self._run / BOARD))
            rows = [f"| {name} | {value} |" for name, value in record["settings"].items()]
            self._writer.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *rows]))
        for line in read_epochs(self._run):
            self.epoch(line)

    def epoch(self, line: dict[str, Any]) -> None:
        last, losses = line["step"], line["loss_by_part"]
        steps = np.linspace(last - last // line["epoch"], last, len(losses) + 1).astype(int)[1:]
        with self._writing():
            for value, step in zip(losses, steps.tolist(), strict=True):
                self._writer.add_scalar("loss", value, step)
            for name, value in line.items():
                if isinstance(value, float):
                    self._writer.add_scalar(name, value, last)

    def finish(self) -> None:
        """Write the evaluation, and the pictures of it."""
        if self._writer is None:  # the run was finished before it was resumed
            return
        from image_classifier.visualization.confusion import draw_confusion_matrix

        evaluation, epochs = read_evaluation(self._run), read_epochs(self._run)
        step = epochs[-1]["step"] if epochs else 0
        pictures = {"metrics": (self._run / FIGURE).read_bytes(), "confusion_matrix": draw_confusion_matrix(evaluation)}
        with self._writing():
            for name in TEST_METRICS:
                self._writer.add_scalar(f"test_{name}", evaluation[name], step)
            for name, content in pictures.items():
                pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
                self._writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """End the event file."""
        if self._writer is not None:
            self._writer.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Name the disk where it refuses; what was written is on it at the end."""
        try:
            yield
            self._writer.flush()
        except OSError as error:
            raise storage_error(self._run / BOARD, error) from error
