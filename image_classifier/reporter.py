"""Who is told what a run does, while it does it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from image_classifier.training.loop import Step
from image_classifier.training.watching import Watch


class Reporter:
    """Told what happens while it happens; this one is silent. A terminal's is in `cli/progress.py`.

    Attributes:
        watch: shown what each step computes.
    """

    watch: Watch | None = None

    def note(self, text: str) -> None:
        """Something is as asked for, and may not be as expected."""

    def begin(self, record: dict[str, Any], num_steps: int, first_step: int) -> None:
        """The record is written; training begins after first_step steps."""

    def restore(self, step: int, state: dict[str, Tensor]) -> None:
        """The state of a checkpoint was taken up: that after this many steps."""

    def step(self, step: Step) -> None:
        """A step was taken."""

    def digest(self, line: dict[str, Any], state: dict[str, Tensor]) -> None:
        """A line was added to the digest chain."""

    def checkpoint(self, step: int) -> None:
        """A checkpoint was written: that after this many steps."""

    def epoch(self, line: dict[str, Any]) -> None:
        """An epoch ended, and this line was added to metrics.jsonl."""

    def evaluate(self, num_images: int) -> None:
        """The test set is being evaluated."""


class Reporters(Reporter):
    """Tells several reporters, in their order."""

    def __init__(self, *reporters: Reporter) -> None:
        self._reporters = reporters

    def note(self, text: str) -> None:
        for reporter in self._reporters:
            reporter.note(text)

    def begin(self, record: dict[str, Any], num_steps: int, first_step: int) -> None:
        for reporter in self._reporters:
            reporter.begin(record, num_steps, first_step)

    def restore(self, step: int, state: dict[str, Tensor]) -> None:
        for reporter in self._reporters:
            reporter.restore(step, state)

    def step(self, step: Step) -> None:
        for reporter in self._reporters:
            reporter.step(step)

    def digest(self, line: dict[str, Any], state: dict[str, Tensor]) -> None:
        for reporter in self._reporters:
            reporter.digest(line, state)

    def checkpoint(self, step: int) -> None:
        for reporter in self._reporters:
            reporter.checkpoint(step)

    def epoch(self, line: dict[str, Any]) -> None:
        for reporter in self._reporters:
            reporter.epoch(line)

    def evaluate(self, num_images: int) -> None:
        for reporter in self._reporters:
            reporter.evaluate(num_images)
