"""`image_classifier report`: one page of pictures and facts about a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from image_classifier.cli.access import add_access_options, build_access
from image_classifier.cli.arguments import parse_arguments
from image_classifier.cli.command import ExitStatus, build_parser, execute
from image_classifier.config import DatabaseAccess, Reading
from image_classifier.errors import DataError
from image_classifier.storage import temporary_files_beside, write_atomically

if TYPE_CHECKING:
    import numpy as np
    from jsonargparse import ArgumentParser, Namespace
    from numpy.typing import NDArray


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
        "--dataset_folder", type=Path | None, default=None, help="where the run's data lies now, for images of mistakes"
    )
    add_access_options(parser)
    return parser


def _report(argv: Sequence[str] | None) -> int:
    arguments = parse_arguments(build_report_parser(), argv)
    access = build_access(arguments, DatabaseAccess().dataset_folder)

    from image_classifier.tracking.checking import check_finished

    path = arguments.run / "report.html"
    check_finished(arguments.run)
    with temporary_files_beside(path):
        _write_report(arguments, access, path)
    print(path)
    return ExitStatus.DONE


def _write_report(arguments: Namespace, access: DatabaseAccess, path: Path) -> None:
    from image_classifier.tracking import reading
    from image_classifier.tracking.trace import Where, trace_run
    from image_classifier.visualization.report import RunFacts, build_report

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
    try:
        images = load_test_images(*reading.find_dataset(folder, arguments.dataset_folder, access), facts.record)
    except DataError as error:
        if arguments.dataset_folder is not None:
            raise
        images = str(error)
    write_atomically(path, build_report(facts, images).encode("utf-8", "backslashreplace"))


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
