"""`image_classifier data`: get a data set, show what is in it, empty its caches; and the actions on a database."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse.typing import PositiveFloat, PositiveInt

from image_classifier.access import DATABASE_FOLDER, DATASET_FOLDER
from image_classifier.cli import database, fetch, prove
from image_classifier.cli.access import (
    add_access_options,
    add_reading_options,
    build_access,
    build_reading,
    check_local,
)
from image_classifier.cli.arguments import parse_arguments
from image_classifier.cli.command import ExitStatus, build_parser, execute_action
from image_classifier.cli.summaries import format_counts, name_left_out
from image_classifier.cli.table import format_table
from image_classifier.errors import DataError
from image_classifier.progress import say
from image_classifier.references import get_reference
from image_classifier.remote.cache import localize
from image_classifier.storage import storage_error, temporary_files_beside, write_atomically
from image_classifier.text import make_printable

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from image_classifier.data.snapshot import Snapshot

SAMPLE_FOLDER = "sample_dataset"
"""Where the sample set goes that stands in for a data set which cannot be reached: beside the dataset folder."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the action that the first word names and return the exit status."""
    return execute_action("data", ACTIONS, argv)


def build_prepare_parser() -> ArgumentParser:
    """Build the parser of `data prepare`."""
    parser = build_parser(
        "data prepare",
        "Get a data set and freeze it into a snapshot. The only line on stdout is the folder (or file) "
        "to give to --dataset_folder of the other commands. What is there already is checked and not fetched again.",
    )
    parser.add_argument("--dataset_folder", type=Path, default=DATASET_FOLDER, help="where the data set is or goes to")
    parser.add_argument(
        "--source",
        type=Literal["present", "cifar10", "cifar100", "sample"],
        default="present",
        help="what to get: present takes what lies in the folder, and gets CIFAR-10 if nothing does; "
        "sample is generated",
    )
    parser.add_argument(
        "--url", type=str | None, default=None, help="address of the archive, in place of its usual one"
    )
    parser.add_argument("--digest", type=str | None, default=None, help="md5 or sha256 of the archive at --url")
    parser.add_argument("--timeout_s", type=PositiveFloat, default=20.0, help="seconds to wait for the server")
    parser.add_argument("--num_tries", type=PositiveInt, default=3, help="how often to try to download")
    parser.add_argument(
        "--sample_if_unreachable",
        action="store_true",
        help=f"if the address cannot be reached at all, generate the sample set as {SAMPLE_FOLDER} beside the folder",
    )
    add_reading_options(parser)
    parser.add_argument("--num_train", type=int, default=5000, help="training images of the sample set")
    parser.add_argument("--num_test", type=int, default=1000, help="test images of the sample set")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample set")
    return parser


def build_info_parser() -> ArgumentParser:
    """Build the parser of `data info`."""
    parser = build_parser("data info", "Show a data set's name, digest, and number of images in each class.")
    parser.add_argument(
        "--dataset_folder",
        type=Path,
        default=DATASET_FOLDER,
        help="where the data set lies, a URL of it, or db:NAME[@VERSION]",
    )
    add_access_options(parser)
    add_reading_options(parser)
    parser.add_argument(
        "--output",
        type=Path | None,
        default=None,
        help="PNG file for a sheet with images of each class and the balance",
    )
    parser.add_argument(
        "--croissant",
        type=Path | None,
        default=None,
        help="JSON-LD file that describes the snapshot in Croissant 1.1, with the digests of its files",
    )
    return parser


def build_prune_parser() -> ArgumentParser:
    """Build the parser of `data prune`."""
    parser = build_parser(
        "data prune",
        "Remove the snapshots of a dataset folder and of the user's cache; they are made again when needed.",
    )
    parser.add_argument("--dataset_folder", type=Path, default=DATASET_FOLDER, help="where the data set lies")
    return parser


def _prepare(argv: Sequence[str] | None) -> int:
    """get a data set and freeze it into a snapshot"""
    options = parse_arguments(build_prepare_parser(), argv)

    from image_classifier.data.dataset import load_snapshot
    from image_classifier.data.download import UnreachableError

    folder: Path = localize(options.dataset_folder)
    reading = build_reading(options)
    if _is_present(folder):
        snapshot = load_snapshot(folder, reading=reading)
        if options.source not in ("present", snapshot.name):
            raise DataError(
                f"{folder} holds {snapshot.name} already: leave --source out to take it, or choose another "
                "--dataset_folder"
            )
        say(f"{folder} is there already")
    else:
        try:
            _get(folder, options)
        except UnreachableError as error:
            if not options.sample_if_unreachable:
                raise
            folder = folder.with_name(SAMPLE_FOLDER)
            say(f"{error}. Instead of it {folder} gets the generated sample set: this is not CIFAR")
            if not _is_present(folder):
                _get_sample(folder, options)
        snapshot = load_snapshot(folder, reading=reading)
    say(f"{snapshot.name}: {format_counts(snapshot)}")
    say(f"digest {snapshot.digest}")
    print(folder)
    for note in snapshot.describe_notes():
        say(make_printable(note))
    return name_left_out(snapshot.findings)


def _is_present(folder: Path) -> bool:
    """Say whether a folder holds a data set; one that another process writes there is an error until it is whole."""
    from image_classifier.data.sample import locked_dataset
    from image_classifier.data.source import find_sources

    try:
        with locked_dataset(folder) if folder.is_dir() else nullcontext():
            return bool(find_sources(folder))
    except OSError as error:
        raise storage_error(folder, error) from error


def _get(folder: Path, options: Namespace) -> None:
    """Put the data set that was asked for into a folder that holds none."""
    from image_classifier.data.cifar import CIFAR10_CLASSES
    from image_classifier.data.download import ARCHIVES, fetch_archive
    from image_classifier.data.metadata import METADATA_FILE, METADATA_FORMAT
    from image_classifier.storage import write_atomically

    if options.source == "sample":
        return _get_sample(folder, options)
    source = "cifar10" if options.source == "present" else options.source
    given = {name: options[name] for name in ("url", "digest") if options[name] is not None}
    archive = replace(ARCHIVES[source], **given)
    say(f"downloading {archive.url} to {folder}")
    fetch_archive(archive, folder, timeout_s=options.timeout_s, num_tries=options.num_tries)
    if source == "cifar10" and not (folder / METADATA_FILE).exists():
        metadata = {"format_version": METADATA_FORMAT, "name": source, "classes": CIFAR10_CLASSES}
        write_atomically(folder / METADATA_FILE, json.dumps(metadata, indent=1).encode() + b"\n")


def _get_sample(folder: Path, options: Namespace) -> None:
    from image_classifier.data.sample import write_sample

    write_sample(folder, num_train=options.num_train, num_test=options.num_test, seed=options.seed)


def _info(argv: Sequence[str] | None) -> int:
    """show a data set's classes and balance; with --output draw a sheet of its images"""
    options = parse_arguments(build_info_parser(), argv)

    from image_classifier.data.dataset import load_snapshot

    in_database = get_reference(options.dataset_folder) is not None
    access = build_access(options, DATABASE_FOLDER if in_database else options.dataset_folder)
    snapshot = load_snapshot(options.dataset_folder, access, build_reading(options))
    if options.output is not None:
        with temporary_files_beside(options.output):
            from image_classifier.visualization.dataset_sheet import draw_dataset_sheet

            write_atomically(options.output, draw_dataset_sheet(snapshot))
        say(f"the picture is {options.output}")
    if options.croissant is not None:
        from image_classifier.data.croissant import write_croissant
        from image_classifier.data.snapshot import find_stores
        from image_classifier.data.source import get_folder

        folder = access.dataset_folder if in_database else get_folder(options.dataset_folder)
        write_croissant(snapshot, find_stores(folder), options.croissant)
        say(f"the Croissant description is {options.croissant}")
    print(format_info(snapshot))
    return ExitStatus.DONE


def format_info(snapshot: Snapshot) -> str:
    """Format a data set's name, digest and number of images as a table, and what was found when it was read."""
    counts = snapshot.count_classes()
    rows = [["class", *counts, "all"]]
    for name, *numbers in zip(snapshot.classes, *counts.values(), strict=True):
        rows.append([name, *(f"{number:,}" for number in (*numbers, sum(numbers)))])
    totals = [int(numbers.sum()) for numbers in counts.values()]
    rows.append(["total", *(f"{total:,}" for total in (*totals, sum(totals)))])
    notes = [make_printable(note) for note in snapshot.describe_notes()]
    facts = [f"name    {snapshot.name}", f"digest  {snapshot.digest}"]
    if snapshot.database is not None:
        facts.insert(1, f"version {snapshot.database}")
    return "\n".join([*facts, "", format_table(rows), *(["", *notes] if notes else [])])


def _prune(argv: Sequence[str] | None) -> int:
    """remove the snapshots and what was fetched from URLs, which are made again when needed"""
    options = parse_arguments(build_prune_parser(), argv)

    from image_classifier.data.snapshot import prune
    from image_classifier.remote.cache import prune as prune_copies

    check_local(options.dataset_folder)
    print(f"removed {prune(options.dataset_folder):,} bytes of snapshots")
    if num_bytes := prune_copies():
        print(f"removed {num_bytes:,} bytes of copies of what lies elsewhere")
    return ExitStatus.DONE


ACTIONS = {"prepare": _prepare, "info": _info, "prune": _prune, **database.ACTIONS, **prove.ACTIONS, **fetch.ACTIONS}
PARSERS = (
    build_prepare_parser,
    build_info_parser,
    build_prune_parser,
    *database.PARSERS,
    *prove.PARSERS,
    *fetch.PARSERS,
)
