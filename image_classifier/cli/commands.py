"""All commands: what each is for, and what they understand together. Imports none of them before that is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

COMMANDS = {
    "train": "train a network and evaluate it (the same as image_classifier_trainer)",
    "sweep": "search for the best settings, each trial a run of its own",
    "verify": "train a recorded run again and say whether every bit is the same",
    "attest": "sign a verdict that another machine has given",
    "bisect": "find the first step, layer and operator in which two runs differ, and why",
    "trace": "show where an answer or a model comes from, and check each link",
    "data": "prepare a data set, show what is in it, keep it in a database, empty its caches",
    "evaluate": "evaluate a run's model on a data set",
    "predict": "classify images with a run's model",
    "compare": "put runs side by side, with the test that says whether they differ",
    "report": "write one page of pictures and facts about a run",
    "publish": "make one ONNX file of a run, proved to answer as the run does",
    "push": "push a published model to the Hugging Face Hub",
    "registry": "name versions of published models, promote them, check their files and signatures",
    "serve": "serve a published model over HTTP",
    "replay": "compute captured images again and say whether every bit of the answers is the same",
    "drift": "test whether captured images are like those of the test set",
}


def iterate_parsers() -> Iterator[ArgumentParser]:
    """Build the parser of each command, and of each action of those that have several."""
    for command in COMMANDS:
        for build in importlib.import_module(f"image_classifier.cli.{command}").PARSERS:
            yield build()
