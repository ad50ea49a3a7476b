"""`image_classifier replay CAPTURE MODEL`: captured images computed again, and every bit of the answers compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from image_classifier.cli.access import add_public_key_option
from image_classifier.cli.arguments import parse_arguments
from image_classifier.cli.command import ExitStatus, build_parser, execute
from image_classifier.cli.serve import resolve_name
from image_classifier.cli.times import add_time_options, parse_times
from image_classifier.extras import load_extra
from image_classifier.progress import say
from image_classifier.references import REGISTERED
from image_classifier.text import make_printable

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from image_classifier.capture.replay import Replay


def main(argv: Sequence[str] | None = None) -> int:
    """Replay as the command line says and return the exit status."""
    return execute(_replay, argv)


def build_replay_parser() -> ArgumentParser:
    """Build the parser of `replay`."""
    parser = build_parser(
        "replay",
        "Compute captured images again with the model that answered them, and say whether every bit of every "
        "probability is the same.",
    )
    parser.add_argument("capture", type=str, help="folder or URL that a server captured to")
    parser.add_argument("model", type=str, help="published folder, its run's folder, ONNX file, or models:/NAME@ALIAS")
    add_time_options(parser)
    parser.add_argument(
        "--precision", type=Literal["fp32", "int8"], default="fp32", help="which of the folder's two models"
    )
    add_public_key_option(parser)
    parser.add_argument(
        "--tracking_uri", type=str | None, default=None, help="MLflow server or database; a SQLite file by default"
    )
    parser.add_argument(
        "--experiments_folder", type=Path, default=Path("experiments"), help="folder that the SQLite file lies under"
    )
    return parser


def _replay(argv: Sequence[str] | None) -> int:
    arguments = parse_arguments(build_replay_parser(), argv)
    since, until = parse_times(arguments)
    load_extra("onnxruntime", "serve")

    from image_classifier.capture.files import read_captures
    from image_classifier.capture.replay import replay
    from image_classifier.published.folder import find_published
    from image_classifier.published.predictor import load_predictor

    captures = read_captures(arguments.capture, since=since, until=until)
    path, version = Path(arguments.model), None
    if arguments.model.startswith(REGISTERED):
        path, version = resolve_name(arguments.tracking_uri, arguments.experiments_folder, arguments.model)
    elif path.is_dir():
        path = find_published(path)
    predictor = load_predictor(
        path, public_key=arguments.public_key, num_threads=1, precision=arguments.precision, version=version
    )
    result = replay(captures, predictor)
    for line in describe_left_out(result):
        say(f"note: {make_printable(line)}")
    print(make_printable(describe_verdict(result, predictor.model.version)))
    if result.num_different:
        return ExitStatus.DIFFERENT
    return ExitStatus.DONE_IN_PART if captures.broken else ExitStatus.DONE


def describe_left_out(result: Replay) -> list[str]:
    """Describe what was not compared, beside broken files, and what may explain a difference, a line each."""
    lines = [f"{number:,} images of version {name} were not compared" for name, number in sorted(result.others.items())]
    if result.machines:
        from image_classifier.capture.recorder import describe_machine

        lines += [f"computed there by {name}; here by {describe_machine()}" for name in sorted(result.machines)]
    return lines


def describe_verdict(result: Replay, version: str) -> str:
    """Describe what was compared and with what result."""
    compared = f"{result.num_images:,} images of {result.num_files:,} files, version {version}"
    if not result.num_different:
        return f"IDENTICAL: every bit of the probabilities of {compared}"
    return (
        f"DIFFERENT: {result.num_different:,} of {compared}; {result.num_other_class:,} got another class; "
        f"the largest difference of a probability is {result.largest:.2g}; the first is {result.first}"
    )


PARSERS = (build_replay_parser,)
