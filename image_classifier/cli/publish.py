"""`image_classifier publish RUN`: a finished run to one ONNX file that is proved to answer as the run does."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from jsonargparse import ArgumentParser

from image_classifier.cli.arguments import parse_arguments
from image_classifier.cli.command import ExitStatus, build_parser, execute
from image_classifier.errors import RemoteError, RunError, SettingsError, StorageError
from image_classifier.progress import say
from image_classifier.published import folder as layout
from image_classifier.references import get_url
from image_classifier.remote.cache import localize
from image_classifier.remote.target import Target
from image_classifier.storage import scratch_folder, temporary_files_beside

FILES = (
    *(layout.MODEL, layout.INT8_MODEL, layout.PARITY, layout.CARD, layout.SBOM),
    *(layout.SIGNATURE, layout.ATTESTATIONS),
)
"""What may lie in the folder of a published model, beside its manifest."""


def main(argv: Sequence[str] | None = None) -> int:
    """Publish as the command line says and return the exit status."""
    return execute(_publish, argv)


def build_publish_parser() -> ArgumentParser:
    """Build the parser of `publish`."""
    parser = build_parser(
        "publish",
        "Publish a finished run: RUN/published with one ONNX file whose answers are proved equal to the run's.",
    )
    parser.add_argument("run", type=Path, help="folder of a finished run, or its URL")
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
    parser.add_argument(
        "--target",
        type=Path | None,
        default=None,
        help="folder, or URL such as s3://bucket/folder, that the published model is copied to, its manifest last",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what was published of this run before")
    return parser


def _publish(argv: Sequence[str] | None) -> int:
    options = dict(parse_arguments(build_publish_parser(), argv))

    run, place = options.pop("run"), options.pop("target")
    target = None if place is None else Target(place, "target")
    if target is None and get_url(run) is not None:
        raise SettingsError("a run at a URL is published with --target, which says where its published model goes")
    if target is not None:
        if target.read(layout.MANIFEST) is not None and not options["overwrite"]:
            raise RunError(f"{target} exists already; remove it, or replace it with --overwrite")
        target.probe()
    with ExitStack() as stack:
        if get_url(run) is not None:
            fetched = localize(run)
            run = shutil.copytree(fetched, stack.enter_context(scratch_folder()) / fetched.name)
        stack.enter_context(temporary_files_beside(run / layout.PUBLISHED))
        from image_classifier.publishing.publish import PublishSettings, publish

        folder = publish(run, PublishSettings(**options), say=say)
        if target is not None:
            _copy(folder, target, overwrite=options["overwrite"])
    print(folder if target is None else target)
    return ExitStatus.DONE


def _copy(folder: Path, target: Target, *, overwrite: bool) -> None:
    """Copy a published model to where it was to go.

    Raises:
        RemoteError: it cannot be copied; what was published stays.
    """
    try:
        target.copy(folder, replaceable=(*FILES, layout.MANIFEST) if overwrite else FILES)
    except (RemoteError, StorageError) as error:
        raise RemoteError(f"{folder} is published; its copy is not: {error}; --overwrite publishes again") from error


PARSERS = (build_publish_parser,)
