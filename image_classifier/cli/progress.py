"""Long work on a terminal: progress, and the summary at the end."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from image_classifier.cli.signals import StopRequest
from image_classifier.cli.table import make_printable
from image_classifier.errors import Interrupted
from image_classifier.experiment import Reporter, RunResult
from image_classifier.training.loop import Step

STEPS_PER_LOSS = 50  # reading the loss waits for the device, so it is shown for every 50th step


class TerminalReporter(Reporter):
    """A bar on a terminal; a line an epoch where there is none, as in the log of a CI job."""

    def __init__(self, stop: StopRequest | None = None) -> None:
        self._stop = stop
        self._bar: tqdm[Any] | None = None
        self._num_epochs = 0

    def note(self, text: str) -> None:
        print(f"note: {make_printable(text)}", file=sys.stderr)

    def begin(self, record: dict[str, Any], num_steps: int, first_step: int) -> None:
        settings, data = record["settings"], record["data"]
        self._num_epochs = settings["num_epochs"]
        if record.get("recipe_reason"):
            print(f"recipe {record['recipe']}: {record['recipe_reason']}", file=sys.stderr)
        print(
            f"{settings['model']} on {data['name']} ({data['num_train']:,} images, data {data['digest'][:12]}): "
            f"{settings['device']}, {settings['precision']}, {settings['num_threads']} threads, "
            f"seed {settings['seed']}",
            file=sys.stderr,
        )
        for note in data.get("notes", []):  # older records have none
            print(make_printable(note), file=sys.stderr)
        if first_step:
            print(f"resumed after step {first_step} of {num_steps}", file=sys.stderr)
        self._batch_size = settings["batch_size"]
        self._bar = tqdm(
            total=num_steps * self._batch_size,
            initial=first_step * self._batch_size,
            unit="img",
            unit_scale=True,
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )
        if self._stop is not None:
            self._stop.deferring = True

    def step(self, step: Step) -> None:
        assert self._bar is not None
        if self._bar.disable:
            return
        if step.number % STEPS_PER_LOSS == 0:
            self._bar.set_postfix(loss=f"{float(step.loss):.3f}", refresh=False)
        self._bar.update(self._batch_size)

    def epoch(self, line: dict[str, Any]) -> None:
        validation = f", validation accuracy {line['validation_accuracy']:.2%}" if "validation_accuracy" in line else ""
        self._write(
            f"epoch {line['epoch']}/{self._num_epochs}: loss {line['train_loss']:.4f}, "
            f"training accuracy {line['train_accuracy']:.2%}{validation}, "
            f"{line['seconds']:.1f} s, {line['images_per_second']:,.0f} images/s"
        )

    def evaluate(self, num_images: int) -> None:
        self.close()
        if self._stop is not None:
            self._stop.deferring = False
            self._stop.advice = "; --resume continues"
            if self._stop.is_set():
                raise Interrupted("stopped before the evaluation; --resume continues")
        print(f"evaluating on {num_images:,} test images", file=sys.stderr)

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self._bar is not None:
            self._bar.close()

    def _write(self, text: str) -> None:
        assert self._bar is not None
        with self._bar.external_write_mode(file=sys.stderr):
            print(text, file=sys.stderr, flush=True)


def print_summary(result: RunResult) -> None:
    """Print where the results are and how good they are."""
    evaluation = result.evaluation
    rows = [
        ("run", str(result.folder)),
        ("test accuracy", f"{evaluation['accuracy']:.2%} of {evaluation['num_images']:,} images"),
        ("single view", f"{evaluation['accuracy_single_view']:.2%}"),
        ("test loss", f"{evaluation['loss']:.4f}"),
        ("weights", result.weights_digest[:16]),
    ]
    for label, value in rows:
        print(f"{label:<14} {value}")
