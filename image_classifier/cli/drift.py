"""`image_classifier drift`: whether captured images and answers are like those of the test set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from image_classifier.cli.access import add_public_key_option
from image_classifier.cli.arguments import parse_arguments
from image_classifier.cli.command import ExitStatus, build_parser, execute
from image_classifier.cli.table import format_percentage, format_table
from image_classifier.cli.times import add_time_options, parse_times
from image_classifier.errors import SettingsError
from image_classifier.extras import load_extra
from image_classifier.monitoring.accuracy import Period
from image_classifier.progress import say
from image_classifier.references import REGISTERED
from image_classifier.storage import temporary_files_beside, write_atomically

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from image_classifier.monitoring.accuracy import Accuracy
    from image_classifier.monitoring.drift import DriftTest
    from image_classifier.monitoring.window import Window
    from image_classifier.published.folder import Published
    from image_classifier.published.reference import Reference

DEFAULT_WINDOW = 1000
DEFAULT_LEVEL = 0.01


def main(argv: Sequence[str] | None = None) -> int:
    """Test for drift as the command line says and return the exit status."""
    return execute(_drift, argv)


def build_drift_parser() -> ArgumentParser:
    """Build the parser of `drift`."""
    parser = build_parser(
        "drift",
        "Test whether the latest captured images and answers are like those of the model's test set. The exit status "
        "is 0 if no drift is found, and 3 if some is.",
    )
    parser.add_argument("capture", type=str, help="folder with captures, or a URL that fsspec understands")
    parser.add_argument("model", type=str, help="published folder, its run's folder, or models:/NAME@ALIAS")
    parser.add_argument("--window", type=int, default=DEFAULT_WINDOW, help="latest captured images that are compared")
    parser.add_argument("--level", type=float, default=DEFAULT_LEVEL, help="chance of drift being found where none is")
    add_time_options(parser)
    parser.add_argument(
        "--model_version",
        type=str | None,
        default=None,
        help="take answers of this version for the model's, and leave out others",
    )
    parser.add_argument(
        "--labels",
        type=Path | None,
        default=None,
        help="CSV file with request_id, image_index and label: shows how right the answers were over time",
    )
    parser.add_argument("--labels_by", type=Period, default="day", help="what accuracy is shown by: hour or day")
    parser.add_argument("--page", type=Path | None, default=None, help="HTML file to write, with captured images")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    add_public_key_option(parser)
    parser.add_argument("--tracking_uri", type=str | None, default=None, help="where models:/ names are looked up")
    parser.add_argument(
        "--experiments_folder", type=Path, default=Path("experiments"), help="folder with the registry's file"
    )
    return parser


@dataclass(frozen=True)
class _Found:
    """All that a comparison gave."""

    reference: Reference
    published: Published
    window: Window
    tests: Sequence[DriftTest]
    accuracy: Accuracy | None
    level: float

    @property
    def num_drifts(self) -> int:
        return sum(test.p_value <= self.level for test in self.tests)

    @property
    def verdict(self) -> str:
        if not self.num_drifts:
            return "no drift found"
        return f"DRIFT in {', '.join(test.name for test in self.tests if test.p_value <= self.level)}"


def _drift(argv: Sequence[str] | None) -> int:
    arguments = parse_arguments(build_drift_parser(), argv)
    since, until = parse_times(arguments)
    _check(arguments)
    for module in ("scipy.stats", "pyarrow.parquet"):
        load_extra(module, "drift")
    if arguments.page is None:
        found = _compare(arguments, since, until)
    else:
        with temporary_files_beside(arguments.page):
            found = _compare(arguments, since, until)
            page = _build_page(arguments, found)
            write_atomically(arguments.page, page.encode("utf-8", "backslashreplace"))
        say(f"the page is {arguments.page}")
    print(json.dumps(describe(found), indent=2, allow_nan=False) if arguments.json else format_found(found))
    return ExitStatus.DIFFERENT if found.num_drifts else ExitStatus.DONE


def _check(arguments: Namespace) -> None:
    from image_classifier.monitoring.drift import MIN_IMAGES

    if arguments.window < MIN_IMAGES:
        raise SettingsError(f"--window takes a whole number of {MIN_IMAGES} or more, got: {arguments.window}")
    if not 0 < arguments.level < 1:
        raise SettingsError(f"--level takes a number between 0 and 1, got: {arguments.level}")


def find_model(arguments: Namespace) -> Path:
    """Find the folder of the published model that the command line names.

    Raises:
        ModelError: there is none.
        RegistryError: the registry has no such version.
    """
    if arguments.model.startswith(REGISTERED):
        from image_classifier.cli.serve import resolve_name

        return resolve_name(arguments.tracking_uri, arguments.experiments_folder, arguments.model)[0]

    from image_classifier.published.folder import find_published

    return find_published(Path(arguments.model))


def _compare(arguments: Namespace, since: datetime | None, until: datetime | None) -> _Found:
    from image_classifier.capture.labels import load_labels
    from image_classifier.monitoring.accuracy import compute_accuracy
    from image_classifier.monitoring.drift import compute_tests
    from image_classifier.monitoring.window import describe_served, iterate_captured, load_window
    from image_classifier.published.folder import read_published
    from image_classifier.published.reference import read_reference

    folder = find_model(arguments)
    published = read_published(folder, arguments.public_key)
    reference = read_reference(folder, published)
    served = describe_served(folder, published, reference.image_size, arguments.model_version)
    labels = None if arguments.labels is None else load_labels(arguments.labels, reference.classes)
    window = load_window(arguments.capture, served, arguments.window, since=since, until=until)
    accuracy = None
    if labels is not None:
        parts = iterate_captured(arguments.capture, served, since, until)
        accuracy = compute_accuracy(labels, parts, arguments.labels_by)
    tests = compute_tests(reference, window.images, window.probabilities)
    return _Found(reference, published, window, tests, accuracy, arguments.level)


def _describe_facts(found: _Found) -> dict[str, str]:
    manifest, window = found.published.manifest, found.window
    facts = {
        "model": f"{manifest['experiment_name']}/{manifest['run_name']}",
        "captured images": f"{len(window):,}",
        "from": f"{window.first} UTC",
        "to": f"{window.last} UTC",
        "reference": f"{found.reference.num_images:,} test images",
        "level": f"{found.level:g}, over all tests",
    }
    if window.broken:
        facts["broken files, left out"] = f"{len(window.broken):,}"
    if found.accuracy is not None:
        facts["accuracy on the test set"] = format_percentage(manifest["metrics"]["accuracy"])
        facts["labels"] = f"{found.accuracy.total.num_images:,} of {found.accuracy.num_labels:,} are of captured images"
    return facts


def describe(found: _Found) -> dict[str, Any]:
    """Describe what was found, as `--json` prints it."""
    return {
        "format_version": 1,
        "verdict": "DRIFT" if found.num_drifts else "NONE",
        "level": found.level,
        "num_images": len(found.window),
        "first": f"{found.window.first}Z",
        "last": f"{found.window.last}Z",
        "broken": [broken._asdict() for broken in found.window.broken],
        "tests": [{**asdict(test), "is_drift": test.p_value <= found.level} for test in found.tests],
        "accuracy": None if found.accuracy is None else asdict(found.accuracy),
    }


def format_found(found: _Found) -> str:
    """Format what was found as tables, the verdict last."""
    heading = ["of", "test", "effect", "stability index", "corrected p", ""]
    rows = [
        [
            test.name,
            test.method,
            f"{test.effect:.3f}",
            "-" if test.stability is None else f"{test.stability:.3f}",
            f"{test.p_value:.2g}",
            "DRIFT" if test.p_value <= found.level else "",
        ]
        for test in found.tests
    ]
    parts = [format_table([list(fact) for fact in _describe_facts(found).items()], num_left=2)]
    parts.append(format_table([heading, *rows], num_left=2))
    if found.accuracy is not None:
        lines = [["UTC", "labels", "accuracy", "95 % interval"]]
        for each in (*found.accuracy.periods, found.accuracy.total):
            interval = f"{100 * each.low:.2f} to {format_percentage(each.high)}"
            lines.append([each.start, f"{each.num_images:,}", format_percentage(each.accuracy), interval])
        parts.append(format_table(lines))
    return "\n\n".join([*parts, found.verdict])


def _build_page(arguments: Namespace, found: _Found) -> str:
    from image_classifier.monitoring.page import build_page

    title = f"{arguments.model}: {found.verdict}"
    facts = _describe_facts(found)
    return build_page(title, facts, found.tests, found.level, found.reference, found.window, found.accuracy)


PARSERS = (build_drift_parser,)
