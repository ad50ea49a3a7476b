"""`image_classifier evaluate`: a run's model, or a published one, on the test set of a data set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from image_classifier.access import DatabaseAccess, Reading
from image_classifier.choices import describe_views
from image_classifier.cli.access import add_access_options, add_skip_bad_option, build_access
from image_classifier.cli.arguments import parse_arguments
from image_classifier.cli.command import ExitStatus, build_parser, execute
from image_classifier.cli.model import add_model_arguments, load
from image_classifier.cli.table import format_percentage, format_table
from image_classifier.errors import DataError, SettingsError
from image_classifier.metrics import MIN_TOP5_CLASSES
from image_classifier.progress import say
from image_classifier.references import describe_place, get_reference
from image_classifier.text import make_printable


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says and return the exit status."""
    return execute(_evaluate, argv)


def build_evaluate_parser() -> ArgumentParser:
    """Build the parser of `evaluate`."""
    parser = build_parser("evaluate", "Evaluate a run's model, or a published one, on the test set of a data set.")
    add_model_arguments(parser)
    parser.add_argument(
        "--dataset_folder",
        type=Path | None,
        default=None,
        help="data set, which may be a URL or db:NAME[@VERSION]; the run's own by default",
    )
    add_access_options(parser)
    add_skip_bad_option(parser)
    parser.add_argument("--output", type=Path | None, default=None, help="JSON file to write all metrics to")
    return parser


def _evaluate(argv: Sequence[str] | None) -> int:
    arguments = parse_arguments(build_evaluate_parser(), argv)
    access = build_access(arguments, DatabaseAccess().dataset_folder)
    model = load(arguments)

    from image_classifier.data.dataset import load_snapshot
    from image_classifier.storage import write_atomically
    from image_classifier.text import list_classes
    from image_classifier.tracking.reading import find_dataset

    dataset_folder, reading = arguments.dataset_folder, Reading(fit=model.fit, image_size=model.image_size)
    if dataset_folder is None:
        dataset_folder, access, reading = find_dataset(find_run(model.path), access=access)
    elif get_reference(dataset_folder):
        reading = Reading(image_size=model.image_size)
    if arguments.skip_bad:
        reading = replace(reading, skip_bad=True)
    snapshot = load_snapshot(dataset_folder, access, reading).recognize(model.data_digest)
    if snapshot.classes != model.classes:
        raise DataError(
            f"{dataset_folder} has other classes than {model.path}: {list_classes(snapshot.classes)} instead of "
            f"{list_classes(model.classes)}; choose the data set that the model was trained for"
        )
    is_data_of_run = snapshot.digest == model.data_digest
    if not is_data_of_run:
        say(f"note: {describe_place(dataset_folder)} is not the data that the model was trained on")
    images, labels = snapshot.test
    evaluation = model.evaluate(images, labels)
    data = {"name": snapshot.name, "digest": snapshot.digest, "is_data_of_run": is_data_of_run}
    if arguments.output is not None:
        content = json.dumps({**evaluation, "model": str(model.path), "data": data}, indent=2, allow_nan=False)
        write_atomically(arguments.output, (content + "\n").encode())
    print(f"{make_printable(str(model.path))} on {snapshot.name} (data {snapshot.digest[:12]})\n")
    print(format_evaluation(evaluation))
    return ExitStatus.DONE


def find_run(model_path: Path) -> Path:
    """Find the folder of the run that a model file is part of.

    Raises:
        SettingsError: no record lies there.
    """
    from image_classifier.tracking.layout import RECORD

    folder = model_path.parent.parent if model_path.suffix == ".onnx" else model_path.parent
    if not (folder / RECORD).is_file():
        raise SettingsError(f"--dataset_folder is required: no {RECORD} in {folder} says where its data lies")
    return folder


def format_evaluation(evaluation: dict[str, Any]) -> str:
    """Format the metrics as two tables: over all images, and by class."""
    single_view = ["accuracy, single view", format_percentage(evaluation["accuracy_single_view"])]
    top5 = ["top-5 accuracy", format_percentage(evaluation["top5_accuracy"])]
    figures = [
        [f"accuracy, {describe_views(evaluation['views'])}", format_percentage(evaluation["accuracy"])],
        *([single_view] if evaluation["views"] != "one" else []),
        *([top5] if len(evaluation["per_class"]) >= MIN_TOP5_CLASSES else []),
        ["loss (cross entropy)", f"{evaluation['loss']:.4f}"],
        ["expected calibration error", format_percentage(evaluation["expected_calibration_error"])],
    ]
    rates = ("accuracy", "precision", "f1")
    classes = [
        [name, *(format_percentage(scores[rate]) for rate in rates), f"{scores['support']:,}"]
        for name, scores in evaluation["per_class"].items()
    ]
    heading = ["test set", f"{evaluation['num_images']:,} images"]
    return f"{format_table([heading, *figures])}\n\n{format_table([['class', *rates, 'images'], *classes])}"


PARSERS = (build_evaluate_parser,)
