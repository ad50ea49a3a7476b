"""The flow: snapshot, sweep, train, evaluate, publish, promote. Metaflow runs this file, which `__main__` has called.

Each step is a process. What it leaves for the next are paths, digests and plain values; `steps` has what it does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from metaflow import FlowSpec, Parameter, card, current, step
from metaflow.exception import MetaflowException

from image_classifier.cli.signals import StopRequest
from image_classifier.workflow import cards, steps
from image_classifier.workflow.document import Document, parse_document


class ImageClassification(FlowSpec):
    """From data to a promoted model."""

    document = Parameter("document", help="a workflow's file, as JSON", required=True)

    @contextmanager
    def _computing(self) -> Iterator[tuple[Document, StopRequest]]:
        """Yield the file, checked, and what hears signals; an expected error ends the step with its line alone."""
        with steps.computing(MetaflowException) as stop:
            yield parse_document(json.loads(self.document)), stop

    def _show(self, title: str, values: Mapping[str, Any], pictures: Sequence[cards.Picture] = ()) -> None:
        current.card.extend(cards.build_card(title, values, pictures))

    @card(type="blank")
    @step(start=True)
    def snapshot(self) -> None:
        """Load the data by the workflow's class, and freeze it."""
        with self._computing() as (document, _):
            self.data, snapshot = steps.take_snapshot(document)
            self.trials = list(range(document.num_trials))
            self.searches = "yes" if self.trials else "no"
            self.found: dict[str, Any] = {}
            self._show("Data", self.data, cards.draw_data(snapshot))
        self.next({"yes": self.plan, "no": self.train}, condition="searches")

    @step
    def plan(self) -> None:
        """Begin as many tasks as there are trials."""
        self.next(self.trial, foreach="trials")

    @card(type="blank")
    @step
    def trial(self) -> None:
        """Train the next trial of the sweep."""
        with self._computing() as (document, stop):
            self.runs = steps.train_trial(document, self.data, stop)
            figures = [figure for run in self.runs for figure in cards.read_figure(run)]
            self._show("Trial", {"run": ", ".join(self.runs) or "none was left"}, figures)
        self.next(self.sweep)

    @card(type="blank")
    @step
    def sweep(self, inputs: Any) -> None:
        """Find the best trial."""
        self.data = inputs[0].data
        with self._computing() as (document, stop):
            self.winner, told = steps.find_winner(document, self.data, stop)
            self.found = self.winner["settings"]
            self._show("Sweep", {**self.winner, **self.found}, cards.draw_sweep(told, list(self.found)))
        self.next(self.train)

    @card(type="blank")
    @step
    def train(self) -> None:
        """Train the run that becomes the model, or go on with it."""
        with self._computing() as (document, stop):
            self.run = steps.train(document, self.data, self.found, stop)
            self._show("Training", {**self.run, **self.found}, cards.read_figure(self.run["folder"]))
        self.next(self.evaluate)

    @card(type="blank")
    @step
    def evaluate(self) -> None:
        """Evaluate the run by the workflow's class."""
        with self._computing() as (document, _):
            self.figures = steps.evaluate(document, Path(self.run["folder"]))
            self._show("Evaluation", self.figures, cards.read_figure(self.run["folder"]))
        self.next(self.publish)

    @card(type="blank")
    @step
    def publish(self) -> None:
        """Save the run by the workflow's class."""
        with self._computing() as (document, _):
            self.published = steps.save(document, Path(self.run["folder"]))
            self._show("Published", {"folder": self.published})
        self.next(self.promote)

    @card(type="blank")
    @step(end=True)
    def promote(self) -> None:
        """Register the published model, and point the alias to it."""
        with self._computing() as (document, _):
            self.promotion = steps.promote(document, self.data, Path(self.published))
            self._show("Promotion", self.promotion or {"promoted": "nothing: the file has no promote"})


if __name__ == "__main__":
    ImageClassification()
