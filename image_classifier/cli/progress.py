"""A run at the terminal: what it is, how far it has come, and the summary at the end."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from image_classifier.choices import describe_views
from image_classifier.cli.signals import StopRequest
from image_classifier.errors import Interrupted
from image_classifier.experiment import RunResult
from image_classifier.progress import Task, say, track
from image_classifier.reporter import Reporter
from image_classifier.text import make_printable
from image_classifier.tracking.record import describe_start
from image_classifier.training.loop import Step

STEPS_PER_LOSS = 50  # reading the loss waits for the device, so it is shown for every 50th step


class TerminalReporter(Reporter):
    """A bar on a terminal; a line an epoch where there is none, as in the log of a CI job."""

    def __init__(self, stop: StopRequest | None = None) -> None:
        self._stop = stop
        self._shown = ExitStack()
        self._task = Task("training")
        self._num_epochs = 0
        self._batch_size = 0

    def note(self, text: str) -> None:
        say(f"note: {make_printable(text)}")

    def begin(self, record: dict[str, Any], num_steps: int, first_step: int) -> None:
        settings, data = record["settings"], record["data"]
        self._num_epochs, self._batch_size = settings["num_epochs"], settings["batch_size"]
        if record.get("recipe_reason"):
            say(f"recipe {record['recipe']}: {record['recipe_reason']}")
        say(
            f"{settings['model']} on {data['name']} ({data['num_train']:,} images, data {data['digest'][:12]}): "
            f"{settings['device']}, {settings['precision']}, {settings['shards']} shards, "
            f"seed {settings['seed']}"
        )
        for note in (*describe_start(record), *data.get("notes", [])):  # older records have none
            say(make_printable(note))
        if first_step:
            say(f"resumed after step {first_step} of {num_steps}")
        total, done = num_steps * self._batch_size, first_step * self._batch_size
        self._task = self._shown.enter_context(track("training", total, "images", done=done, stays=True))
        if self._stop is not None:
            self._stop.deferring = True

    def step(self, step: Step) -> None:
        if step.number % STEPS_PER_LOSS == 0:
            self._task.detail = f"loss={float(step.loss):.3f}"
        self._task.advance(self._batch_size)

    def epoch(self, line: dict[str, Any]) -> None:
        validation = f", validation accuracy {line['validation_accuracy']:.2%}" if "validation_accuracy" in line else ""
        say(
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
        say(f"evaluating on {num_images:,} test images")

    def close(self) -> None:
        """End what is shown of the training."""
        self._shown.close()


def print_summary(result: RunResult) -> None:
    """Print where the results are and how good they are."""
    evaluation = result.evaluation
    views = describe_views(evaluation["views"])
    rows = [
        ("run", str(result.folder)),
        ("test accuracy", f"{evaluation['accuracy']:.2%} of {evaluation['num_images']:,} images, {views}"),
        *([("single view", f"{evaluation['accuracy_single_view']:.2%}")] if evaluation["views"] != "one" else []),
        ("test loss", f"{evaluation['loss']:.4f}"),
        ("weights", result.weights_digest[:16]),
    ]
    for label, value in rows:
        print(f"{label:<14} {value}")
