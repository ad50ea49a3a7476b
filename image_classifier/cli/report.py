"""`image_classifier report`: one page of pictures and facts about a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from image_classifier.access import DatabaseAccess, Reading
from image_classifier.cli.access import add_access_options, build_access
from image_classifier.cli.arguments import parse_arguments
from image_classifier.cli.command import ExitStatus, build_parser, execute
from image_classifier.errors import DataError, SettingsError
from image_classifier.references import get_url
from image_classifier.storage import temporary_files_beside, write_atomically

if TYPE_CHECKING:
    import numpy as np
    from jsonargparse import ArgumentParser, Namespace
    from numpy.typing import NDArray

    from image_classifier.visualization.report import RunFacts, Saliency


def main(argv: Sequence[str] | None = None) -> int:
    """Write a report as the command line says and return the exit status."""
    return execute(_report, argv)


def build_report_parser() -> ArgumentParser:
    """Build the parser of `report`."""
    parser = build_parser(
        "report", "Write report.html into a run's folder: one page with its settings, curves, errors and identity."
    )
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument(
        "--dataset_folder",
        type=Path | None,
        default=None,
        help="the run's data set, if it moved; for the images in the report",
    )
    parser.add_argument(
        "--saliency",
        type=tuple[int, ...],
        default=(),
        help="numbers of test images to add saliency maps of: on which pixels the prediction depends",
    )
    add_access_options(parser)
    return parser


def _report(argv: Sequence[str] | None) -> int:
    arguments = parse_arguments(build_report_parser(), argv)
    access = build_access(arguments, DatabaseAccess().dataset_folder)

    from image_classifier.tracking.checking import check_finished

    if get_url(arguments.run) is not None:
        raise SettingsError("the report is written into the run's folder, which must lie on this machine: copy it here")
    path = arguments.run / "report.html"
    check_finished(arguments.run)
    with temporary_files_beside(path):
        _write_report(arguments, access, path)
    print(path)
    return ExitStatus.DONE


def _write_report(arguments: Namespace, access: DatabaseAccess, path: Path) -> None:
    from image_classifier.tracking import reading
    from image_classifier.tracking.trace import Where, trace_run
    from image_classifier.visualization.report import RunFacts, Saliency, build_report

    folder = arguments.run
    probabilities, labels = reading.read_predictions(folder)
    facts = RunFacts(
        path=str(folder),
        record=reading.read_record(folder),
        epochs=reading.read_epochs(folder),
        evaluation=reading.read_evaluation(folder),
        chain=reading.read_chain(folder),
        manifest=reading.read_manifest(folder),
        probabilities=probabilities,
        labels=labels,
        links=list(trace_run(folder, Where(folder.parent.parent, arguments.dataset_folder, access))),
    )
    images: NDArray[np.uint8] | str
    saliency: list[Saliency] = []
    _check_numbers(arguments.saliency, len(labels))
    try:
        images = load_test_images(*reading.find_dataset(folder, arguments.dataset_folder, access), facts.record)
    except DataError as error:
        if arguments.dataset_folder is not None or arguments.saliency:
            raise
        images = str(error)
    else:
        saliency = _compute_saliency(facts, images, arguments)
    write_atomically(path, build_report(facts, images, saliency).encode("utf-8", "backslashreplace"))


def _check_numbers(numbers: Sequence[int], num_images: int) -> None:
    wrong = next((number for number in numbers if not 0 <= number < num_images), None)
    if wrong is not None:
        raise SettingsError(f"--saliency {wrong}: the test images have the numbers 0 to {num_images - 1}")


def _compute_saliency(facts: RunFacts, images: NDArray[np.uint8], arguments: Namespace) -> list[Saliency]:
    """Compute the saliency of the images that were asked for, for the predicted and the true class."""
    if not arguments.saliency:
        return []
    from image_classifier.tracking.checkpoint import load_model
    from image_classifier.tracking.layout import MODEL
    from image_classifier.visualization.report import Saliency
    from image_classifier.visualization.saliency import compute_saliency

    classifier = load_model(arguments.run / MODEL).classifier
    return [
        Saliency(
            number,
            {
                label: compute_saliency(classifier, images[number], label)
                for label in dict.fromkeys((int(facts.probabilities[number].argmax()), int(facts.labels[number])))
            },
        )
        for number in dict.fromkeys(arguments.saliency)
    ]


def load_test_images(
    dataset_folder: Path, access: DatabaseAccess, reading: Reading, record: dict[str, Any]
) -> NDArray[np.uint8]:
    """Load the images [N, 3, S, S] that a run was tested on.

    Raises:
        DataError: the data set is not there, or is another one.
    """
    from image_classifier.data.dataset import load_snapshot

    snapshot = load_snapshot(dataset_folder, access, reading).recognize(record["data"]["digest"])
    if snapshot.digest != record["data"]["digest"]:
        raise DataError(
            f"{dataset_folder} holds data of the digest {snapshot.digest[:12]}, but the run is on "
            f"{record['data']['digest'][:12]}; --dataset_folder says where that lies"
        )
    return snapshot.test[0]


PARSERS = (build_report_parser,)
