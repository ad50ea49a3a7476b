"""`image_classifier bisect RUN_A RUN_B`: where two runs part that should agree, or a run and this machine."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser

from image_classifier.access import DatabaseAccess
from image_classifier.cli.access import add_access_options, build_access
from image_classifier.cli.arguments import parse_arguments
from image_classifier.cli.command import ExitStatus, build_parser, execute, get_options
from image_classifier.cli.signals import StopRequest
from image_classifier.errors import Interrupted
from image_classifier.progress import track
from image_classifier.text import list_first, make_printable

if TYPE_CHECKING:
    from image_classifier.bisection import Finding

WIDTH = 110
NUM_NAMED = 3
NUM_DIFFERENCES = 12
"""Of the records that are printed, so that all fits on a page; JSON has all."""


def main(argv: Sequence[str] | None = None) -> int:
    """Bisect as the command line says and return the exit status."""
    return execute(_bisect, argv)


def build_bisect_parser() -> ArgumentParser:
    """Build the parser of `bisect`."""
    parser = build_parser(
        "bisect",
        "Find the first step, tensor, layer and operator in which two runs differ, or a run and this machine.",
    )
    parser.add_argument("runs", nargs="+", type=Path, help="two run folders, or one to hold against this machine")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument(
        "--dataset_folder", type=Path | None, default=None, help="the runs' data set, if it moved; or db:NAME@VERSION"
    )
    add_access_options(parser)
    parser.add_argument(
        "--experiments_folder", type=Path | None, default=None, help="where their pretrained models lie, if they moved"
    )
    parser.add_argument("--num_threads", type=int, default=0, help="threads that compute shards; 0 for all cores")
    parser.add_argument("--num_workers", type=int, default=1, help="threads that prepare batches")
    return parser


def _bisect(argv: Sequence[str] | None) -> int:
    parsed = parse_arguments(build_bisect_parser(), argv)
    access = build_access(parsed, DatabaseAccess().dataset_folder)
    names = ("dataset_folder", "experiments_folder", "num_threads", "num_workers")

    from image_classifier.tracking.reading import read_record
    from image_classifier.training.determinism import cap_instruction_set, restore_nearest_settings

    nearest, _ = restore_nearest_settings(read_record(parsed.runs[0])["settings"])
    cap_instruction_set(nearest.instruction_set)  # before torch is imported

    with StopRequest() as stop:
        try:
            with track("starting"):
                from image_classifier.bisection import BisectionSettings, bisect
                from image_classifier.cli.progress import TerminalReporter

            options = get_options(parsed, names)
            settings = BisectionSettings(runs=tuple(parsed.runs), database_access=access, **options)
            with closing(TerminalReporter()) as reporter:
                finding = bisect(settings, reporter)
        except Interrupted as interruption:
            print(f"{interruption}: nothing found so far", file=sys.stderr)
            return stop.exit_status
    if parsed.json:
        print(json.dumps(finding.to_json(), indent=2, allow_nan=False))
    else:
        print(format_finding(finding))
    return ExitStatus.DONE if finding.verdict == "SAME" else ExitStatus.DIFFERENT


def format_finding(finding: Finding) -> str:
    """Format a finding as one page of text."""
    facts = [(name, text) for name, text in _list_facts(finding) if text]
    width = max(len(name) for name, _ in facts) + 4
    lines: list[str] = [finding.verdict]
    for name, text in facts:
        first, *rest = textwrap.wrap(
            make_printable(text), WIDTH - width, break_long_words=False, break_on_hyphens=False
        )
        lines += [f"  {name:<{width - 2}}{first}", *(" " * width + line for line in rest)]
    return "\n".join(lines)


def _list_facts(finding: Finding) -> Iterator[tuple[str, str]]:
    yield from zip(("A", "B"), finding.runs, strict=True)
    yield "step", _describe_step(finding)
    if finding.tensors:
        yield "tensor", f"{list_first(finding.tensors, NUM_NAMED)}, of the state after it"
    result = finding.result
    if result is not None:
        shard = "" if result.shard is None else f", shard {result.shard}"
        yield "layer", f"{result.layer} ({result.phase}{shard})"
        yield "operator", result.operator
    if finding.values is not None:
        yield "values", finding.values.describe()
    if finding.cause is not None:
        yield "cause", f"{finding.cause.kind}: {finding.cause.reason}"
        differences = finding.cause.differences
        for line in differences[:NUM_DIFFERENCES]:
            yield "differs", line
        if len(differences) > NUM_DIFFERENCES:
            yield "differs", f"{len(differences) - NUM_DIFFERENCES} more, which --json has"
    for line in finding.replays:
        yield "replay", line
    trained = ", ".join(f"{begin} to {end} of {name}" for name, begin, end in finding.segments if end > begin)
    yield "trained", f"steps {trained}" if trained else ""


def _describe_step(finding: Finding) -> str:
    same = f"the states after step {finding.equal_step} are equal" if finding.equal_step else ""
    if finding.verdict == "SAME":
        return (
            f"none of {finding.num_steps}: all digests that both have are equal, and so are weights and probabilities"
        )
    if finding.step is None:
        return f"none of {finding.num_steps}: {same}; what was made of the last one is not"
    if finding.is_exact:
        return f"{finding.step} of {finding.num_steps}{'; ' if same else ''}{same}"
    between = f"one of {finding.equal_step + 1} to {finding.step} of {finding.num_steps}"
    return f"{between}: the records have no digest between; {same or 'they begin alike, as far as is recorded'}"


PARSERS = (build_bisect_parser,)
