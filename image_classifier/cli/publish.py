"""`image_classifier publish RUN`: a finished run to one ONNX file that is proved to answer as the run does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from image_classifier.cli.arguments import parse_arguments
from image_classifier.cli.command import ExitStatus, build_parser, execute
from image_classifier.progress import say
from image_classifier.storage import temporary_files_beside


def main(argv: Sequence[str] | None = None) -> int:
    """Publish as the command line says and return the exit status."""
    return execute(_publish, argv)


def build_publish_parser() -> ArgumentParser:
    """Build the parser of `publish`."""
    parser = build_parser(
        "publish",
        "Publish a finished run: RUN/published with one ONNX file whose answers are proved equal to the run's.",
    )
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--views", action="store_true", help="build the recipe's test-time augmentation into the graph")
    parser.add_argument("--opset", type=int, default=20, help="version of ONNX's operators, 18 to 23")
    parser.add_argument(
        "--license", type=str, default="unknown", help="licence of the weights, such as mit, for the card"
    )
    parser.add_argument(
        "--sign_key", type=str | None, default=None, help="private key to sign with (elliptic curve, PEM), or keyless"
    )
    parser.add_argument(
        "--num_samples",
        type=int,
        default=0,
        help="test images to publish with the model, 0 to 24, as samples on the server's page",
    )
    parser.add_argument("--dataset_folder", type=Path | None, default=None, help="the run's data set, if it moved")
    parser.add_argument("--overwrite", action="store_true", help="replace what was published of this run before")
    return parser


def _publish(argv: Sequence[str] | None) -> int:
    options = dict(parse_arguments(build_publish_parser(), argv))

    run = options.pop("run")
    with temporary_files_beside(run / "published"):
        from image_classifier.publishing.publish import PublishSettings, publish

        folder = publish(run, PublishSettings(**options), say=say)
    print(folder)
    return ExitStatus.DONE


PARSERS = (build_publish_parser,)
