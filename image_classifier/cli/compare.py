"""`image_classifier compare`: runs side by side, with the test that says whether they differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from image_classifier.cli.arguments import parse_arguments
from image_classifier.cli.command import ExitStatus, build_parser, execute
from image_classifier.cli.table import format_percentage, format_table
from image_classifier.metrics import MIN_TOP5_CLASSES
from image_classifier.progress import say
from image_classifier.remote.cache import localize
from image_classifier.storage import temporary_files_beside, write_atomically


def main(argv: Sequence[str] | None = None) -> int:
    """Compare runs as the command line says and return the exit status."""
    return execute(_compare, argv)


def build_compare_parser() -> ArgumentParser:
    """Build the parser of `compare`."""
    parser = build_parser(
        "compare",
        "Compare finished runs: settings that differ, results, and whether their difference is more than chance. "
        "Runs that differ only in their seed form a group.",
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or URLs of such, two or more")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--output", type=Path | None, default=None, help="PNG file to draw the comparison to")
    parser.add_argument("--allow_different_data", action="store_true", help="compare runs on different data sets too")
    return parser


def _compare(argv: Sequence[str] | None) -> int:
    arguments = parse_arguments(build_compare_parser(), argv)

    from image_classifier.tracking.compare import compare_runs

    comparison = compare_runs(
        [localize(run) for run in arguments.runs], allow_different_data=arguments.allow_different_data
    )
    if arguments.output is not None:
        with temporary_files_beside(arguments.output):
            from image_classifier.visualization.figures import draw_comparison_figure

            write_atomically(arguments.output, draw_comparison_figure(comparison))
        say(f"the picture is {arguments.output}")
    print(json.dumps(comparison, indent=2, allow_nan=False) if arguments.json else format_comparison(comparison))
    return ExitStatus.DONE


def format_comparison(comparison: dict[str, Any]) -> str:
    """Format what `compare_runs` found as tables and sentences."""
    groups = comparison["groups"]
    parts = ["Results on the test set", _format_runs(comparison["runs"], len(groups[0]["class_accuracy"]))]
    if any(figures["interval"] for group in groups for figures in group["figures"].values()):
        parts += ["Seeds: mean, standard deviation, and 95 % interval of the mean (Student)", _format_groups(groups)]
    names = [group["name"] for group in groups]
    if comparison["settings"]:
        rows = [["setting", *names]]
        rows += [[name, *(str(values[n]) for n in names)] for name, values in comparison["settings"].items()]
        parts += ["Settings that differ", format_table(rows)]
    if comparison["identity"]:
        runs = [run["name"] for run in comparison["runs"]]
        rows = [["run", *comparison["identity"]]]
        rows += [[run, *((d[run] or "none")[:12] for d in comparison["identity"].values())] for run in runs]
        parts += ["Beyond the settings, by digest", format_table(rows, num_left=len(rows[0]))]
    sentences = [_describe_difference(difference) for difference in comparison["differences"]]
    sentences += [f"Note: {note}." for note in comparison["notes"]]
    parts += ["Does the accuracy differ?", "\n".join(sentences)] if sentences else []
    return "\n\n".join(f"{title}\n{body}" for title, body in zip(parts[::2], parts[1::2], strict=True))


def _format_runs(runs: Sequence[dict[str, Any]], num_classes: int) -> str:
    has_top5 = num_classes >= MIN_TOP5_CLASSES
    heading = ["group", "run", "seed", "accuracy", "single view", *(["top-5"] if has_top5 else []), "loss"]
    heading += ["calibration error", "macro F1", "training accuracy", "time"]
    rows = [
        [
            run["group"],
            run["name"],
            str(run["seed"]),
            format_percentage(run["accuracy"]),
            format_percentage(run["accuracy_single_view"]),
            *([format_percentage(run["top5_accuracy"])] if has_top5 else []),
            f"{run['loss']:.4f}",
            format_percentage(run["expected_calibration_error"]),
            f"{run['macro_f1']:.4f}",
            "-" if run["train_accuracy"] is None else format_percentage(run["train_accuracy"]),
            f"{run['seconds']:.0f} s",
        ]
        for run in runs
    ]
    return format_table([heading, *rows], num_left=2)


def _format_groups(groups: Sequence[dict[str, Any]]) -> str:
    rows = [["group", "seeds", "accuracy", "", "", "single view", "", "", "loss", "", ""]]
    for group in groups:
        row = [group["name"], str(len(group["seeds"]))]
        for name in ("accuracy", "accuracy_single_view", "loss"):
            row += _format_sample(group["figures"][name], 1 if name == "loss" else 100)
        rows.append(row)
    return format_table(rows)


def _format_sample(sample: dict[str, Any], scale: int) -> list[str]:
    digits, unit = (4, "") if scale == 1 else (2, " %")
    mean = f"{scale * sample['mean']:.{digits}f}{unit}"
    if sample["interval"] is None:
        return [mean, "", ""]
    low, high = (f"{scale * bound:.{digits}f}" for bound in sample["interval"])
    return [mean, f"± {scale * sample['standard_deviation']:.{digits}f}", f"[{low}, {high}]"]


def _describe_difference(difference: dict[str, Any]) -> str:
    first, second = difference["first"], difference["second"]
    points = f"{second} - {first}: {100 * difference['difference']:+.2f} points"
    if difference["test"] == "McNemar":
        counts = [difference[f"only_{which}_right"] for which in ("first", "second")]
        test = f"McNemar's exact test: only {first} is right on {counts[0]:,} images, only {second} on {counts[1]:,}"
        subject = "these two networks"
    else:
        test, subject = "Welch's t-test over the seeds", "these settings"
        if difference["interval"]:
            low, high = (f"{100 * bound:+.2f}" for bound in difference["interval"])
            points += f", 95 % interval {low} to {high}"
    if difference["p_value"] is None:
        return f"{points}. All seeds gave the same accuracy, so there is no variance to test against."
    p_value = f"p = {difference['p_value']:.2g}" if difference["p_value"] else "p < 1e-300"
    if difference["corrected_p_value"] != difference["p_value"]:
        p_value += f", {difference['corrected_p_value']:.2g} after Holm's correction for several comparisons"
    verdict = f"{'a' if difference['differ'] else 'no'} significant difference between {subject}"
    return f"{points} ({p_value}; {test}): {verdict}."


PARSERS = (build_compare_parser,)
