"""`image_classifier trace SOURCE`: where an answer or a model comes from, each link checked as it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from image_classifier.access import DatabaseAccess
from image_classifier.cli.access import add_access_options, build_access
from image_classifier.cli.arguments import parse_arguments
from image_classifier.cli.command import ExitStatus, build_parser, execute
from image_classifier.cli.table import format_table

SHOWN_DIGITS = 12


def main(argv: Sequence[str] | None = None) -> int:
    """Trace as the command line says and return the exit status."""
    return execute(_trace, argv)


def build_trace_parser() -> ArgumentParser:
    """Build the parser of `trace`."""
    parser = build_parser("trace", "Show where a model comes from: run, data, code, environment and verdicts.")
    parser.add_argument(
        "source",
        type=str,
        help="an answer's model_version, a .json file with an answer, or a run, a published model or a weight file",
    )
    parser.add_argument("--experiments_folder", type=Path, default=Path("experiments"), help="where to look for runs")
    parser.add_argument(
        "--dataset_folder", type=Path | None, default=None, help="the run's data set, if it moved; or db:NAME@VERSION"
    )
    add_access_options(parser)
    parser.add_argument(
        "--policy", type=Path | None, default=None, help="YAML file with the verifiers whose verdicts count"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _trace(argv: Sequence[str] | None) -> int:
    arguments = parse_arguments(build_trace_parser(), argv)
    access = build_access(arguments, DatabaseAccess().dataset_folder)

    from image_classifier.published.policy import load_policy
    from image_classifier.tracking.trace import Where, dump_links, trace

    policy = load_policy(arguments.policy) if arguments.policy else None
    links = trace(arguments.source, Where(arguments.experiments_folder, arguments.dataset_folder, access, policy))
    if arguments.json:
        print(dump_links(links))
    else:
        rows = [[link.name, link.digest[:SHOWN_DIGITS], link.state, f"{link.what}; {link.reason}"] for link in links]
        print(format_table([["link", "digest", "is", "what it is, and how that is known"], *rows], num_left=4))
    states = {link.state for link in links}
    if "different" in states:
        return ExitStatus.DIFFERENT
    return ExitStatus.EXPECTED_ERROR if "missing" in states else ExitStatus.DONE


PARSERS = (build_trace_parser,)
