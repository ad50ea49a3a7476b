"""The actions of `image_classifier data` that work on a database."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse.typing import PositiveInt

from image_classifier.access import DATABASE_FOLDER, Reading
from image_classifier.cli.access import (
    add_access_options,
    add_image_size_option,
    add_reading_options,
    build_access,
    build_reading,
    check_local,
)
from image_classifier.cli.arguments import parse_arguments
from image_classifier.cli.command import ExitStatus, build_parser
from image_classifier.cli.summaries import format_counts, format_difference, format_summary, name_left_out
from image_classifier.data.parts import CONDITIONS
from image_classifier.errors import SettingsError
from image_classifier.extras import load_extra
from image_classifier.progress import say, track
from image_classifier.references import Reference, describe_place, get_reference, parse_reference
from image_classifier.storage import temporary_files_beside, write_atomically
from image_classifier.text import count, make_printable

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def _build_parser(action: str, description: str, **options: None) -> ArgumentParser:
    """Build the parser of an action that reaches the database."""
    parser = build_parser(f"data {action}", description, **options)
    parser.add_argument(
        "--dataset_folder",
        type=Path,
        default=DATABASE_FOLDER,
        help="where SQLite's file lies, and the snapshots of what is read",
    )
    add_access_options(parser)
    return parser


def build_ingest_parser() -> ArgumentParser:
    """Build the parser of `data ingest`."""
    parser = _build_parser(
        "ingest",
        "Add the images of a source to a data set in the database, and freeze it into a new version. Images that are "
        "there already are skipped, so an interrupted ingest continues where it stopped.",
    )
    parser.add_argument(
        "source", type=Path, help="anything that the trainer reads: a folder, an archive, Parquet, or its URL"
    )
    parser.add_argument("--dataset", required=True, help="name of the data set; it is made if there is none")
    add_reading_options(parser)
    parser.add_argument("--chunk_size", type=PositiveInt, default=5000, help="images per transaction")
    return parser


def build_snapshot_parser() -> ArgumentParser:
    """Build the parser of `data snapshot`."""
    parser = _build_parser(
        "snapshot",
        "Freeze a data set into a snapshot that the trainer maps. Without --version that is a new version, unless an "
        "earlier one holds the same. The only line on stdout is NAME@VERSION.",
        version=None,
    )
    parser.add_argument("--dataset", required=True, help="name of the data set")
    parser.add_argument("--version", type=PositiveInt | None, default=None, help="an existing version")
    parser.add_argument(
        "--as_of", type=str | None, default=None, help="the data set as it was at this time, in ISO 8601"
    )
    parser.add_argument(
        "--where",
        type=str,
        nargs="+",
        default=[],
        metavar="NAME=VALUE[,VALUE...]",
        help=f"only what has one of these values; the names are {', '.join(CONDITIONS)}",
    )
    return parser


def build_list_parser() -> ArgumentParser:
    """Build the parser of `data list`."""
    return _build_parser("list", "List the data sets of the database, and their versions.")


def build_diff_parser() -> ArgumentParser:
    """Build the parser of `data diff`."""
    parser = _build_parser("diff", "Say which images were added, removed and relabelled from one data set to another.")
    parser.add_argument("old", type=Path, help="db:NAME@VERSION, or a dataset folder")
    parser.add_argument("new", type=Path, help="db:NAME[@VERSION], or a dataset folder")
    add_image_size_option(parser)
    parser.add_argument("--output", type=Path | None, default=None, help="PNG file for a sheet with these images")
    return parser


def build_relabel_parser() -> ArgumentParser:
    """Build the parser of `data relabel`."""
    parser = _build_parser(
        "relabel",
        "Correct labels. The labels before stay with the versions before; there is a new version with the new ones.",
    )
    parser.add_argument("dataset", help="db:NAME[@VERSION], whose images the numbers count")
    parser.add_argument(
        "--image",
        type=int | None,
        default=None,
        help="number of the image in the version, counted from 0, the training images first",
    )
    parser.add_argument("--label", type=str | None, default=None, help="name of its class")
    parser.add_argument(
        "--corrections", type=Path | None, default=None, help="CSV file with the columns image and label, for many"
    )
    parser.add_argument("--reason", default="", help="why the label was wrong, for the record")
    return parser


def build_export_parser() -> ArgumentParser:
    """Build the parser of `data export`."""
    parser = _build_parser(
        "export",
        "Write a data set out, as images by class or as Parquet; or as a snapshot, of which `data fetch` reads and "
        "checks single images.",
    )
    parser.add_argument("dataset", type=Path, help="db:NAME[@VERSION], or a dataset folder")
    add_image_size_option(parser)
    parser.add_argument("--output", type=Path, required=True, help="the folder to make")
    parser.add_argument(
        "--format", type=Literal["folder", "parquet", "snapshot"], default="folder", help="what to write"
    )
    return parser


def build_upgrade_parser() -> ArgumentParser:
    """Build the parser of `data upgrade`."""
    return _build_parser("upgrade", "Make the tables of the database, or bring them up to this version.")


def ingest(argv: Sequence[str] | None) -> int:
    """add the images of a source to a data set in the database"""
    options = _parse(build_ingest_parser(), argv)
    name = _check_name(options.dataset)

    from image_classifier.data.ingest import Listener
    from image_classifier.data.ingest import ingest as ingest_source

    with track("ingesting", unit="images") as task:

        class Progress(Listener):
            """Counts what is added."""

            def commit(self, num_images: int) -> None:
                task.advance(num_images)

        result = ingest_source(
            options.source,
            name,
            build_access(options, options.dataset_folder),
            reading=build_reading(options),
            chunk_size=options.chunk_size,
            listener=Progress(),
        )
    added, version = result.added, result.version
    say(f"the database is {result.database}; --dataset_folder names another folder for it, --db_config a server")
    say(f"{added.num_added:,} images added, {added.num_present:,} were there already")
    if added.num_other_label:
        say(f"note: {added.num_other_label:,} of these have another label there, which stays: see `data relabel`")
    say(f"{version.reference}: {format_counts(version)}")
    say(f"digest {version.digest}")
    print(version.reference)
    for line in (*result.notes, *(result.findings.describe() if result.findings else ())):
        say(f"note: {make_printable(line)}")
    return name_left_out(result.findings)


def snapshot(argv: Sequence[str] | None) -> int:
    """freeze a data set in the database into a snapshot, or a part of it"""
    options = _parse(build_snapshot_parser(), argv)
    name = _check_name(options.dataset)
    conditions, as_of = parse_conditions(options.where), parse_time(options.as_of)
    if options.version is not None and (conditions or as_of):
        raise SettingsError("--version names what was frozen already: leave --as_of and --where out, or --version")
    access = build_access(options, options.dataset_folder)

    from image_classifier.data.database import load_version_snapshot
    from image_classifier.data.freezing import freeze_snapshot

    if options.version is None:
        frozen = freeze_snapshot(name, access, as_of=as_of, conditions=conditions)
    else:
        frozen = load_version_snapshot(Reference(name, options.version), access)
    say(f"{frozen.database}: {format_counts(frozen)}")
    say(f"digest {frozen.digest}")
    print(frozen.database)
    return ExitStatus.DONE


def list_datasets(argv: Sequence[str] | None) -> int:
    """list the data sets of the database, and their versions"""
    options = _parse(build_list_parser(), argv)
    access = build_access(options, options.dataset_folder)

    from image_classifier.data.database import list_datasets as list_all
    from image_classifier.data.revision import open_database

    with open_database(access) as database:
        summaries = database.run(lambda: list_all(database))
        title = database.place.title
    if not summaries:
        say(f"{title} has no data set yet; `image_classifier data ingest` adds one")
    print("\n\n".join(format_summary(summary) for summary in summaries))
    return ExitStatus.DONE


def diff(argv: Sequence[str] | None) -> int:
    """say what was added, removed and relabelled between two versions"""
    options = _parse(build_diff_parser(), argv)
    access = build_access(options, options.dataset_folder)

    from image_classifier.data.dataset import load_snapshot
    from image_classifier.data.diff import compute_difference

    reading = Reading(image_size=options.image_size)
    old, new = (load_snapshot(path, access, reading) for path in (options.old, options.new))
    difference = compute_difference(old, new)
    if options.output is not None:
        with temporary_files_beside(options.output):
            from image_classifier.visualization.difference_sheet import draw_difference_sheet

            places = [describe_place(place) for place in (options.old, options.new)]
            title = f"{old.database or places[0]} → {new.database or places[1]}"
            write_atomically(options.output, draw_difference_sheet(old, new, difference, title))
        say(f"the picture is {options.output}")
    print(format_difference(difference, old.classes, new.classes))
    return ExitStatus.DONE


def relabel(argv: Sequence[str] | None) -> int:
    """correct labels, which makes a new version"""
    options = _parse(build_relabel_parser(), argv)
    reference = get_reference(options.dataset)
    if reference is None:
        raise SettingsError(
            f"labels are corrected in a database: give db:NAME, got: {ascii(options.dataset)[:100]}; "
            "those of files are corrected in the files"
        )
    if (options.image is None) != (options.label is None) or (options.image is None) == (options.corrections is None):
        raise SettingsError("give --image and --label for one correction, or --corrections for a file of them")

    from image_classifier.data.corrections import Correction, correct_labels, read_corrections
    from image_classifier.data.revision import open_database

    if options.corrections is None:
        wanted = [Correction(options.image, options.label)]
    else:
        wanted = read_corrections(options.corrections)
    with open_database(build_access(options, options.dataset_folder)) as database:
        version, num_changed = correct_labels(database, reference, wanted, options.reason)
    done = f"{count(num_changed, 'label')} corrected" if num_changed else "the labels are these already"
    say(f"{done}; digest {version.digest}")
    print(version.reference)
    return ExitStatus.DONE


def export(argv: Sequence[str] | None) -> int:
    """write a version out, as a folder of images, as Parquet or as a snapshot"""
    options = _parse(build_export_parser(), argv)
    access = build_access(options, options.dataset_folder)

    from image_classifier.data.dataset import load_snapshot
    from image_classifier.data.export import write_folder, write_parquet, write_snapshot

    loaded = load_snapshot(options.dataset, access, Reading(image_size=options.image_size))
    write = {"folder": write_folder, "parquet": write_parquet, "snapshot": write_snapshot}[options.format]
    write(loaded, options.output)
    say(f"{len(loaded.labels):,} images of {loaded.database or describe_place(options.dataset)}")
    print(options.output)
    return ExitStatus.DONE


def upgrade(argv: Sequence[str] | None) -> int:
    """make the tables of the database, or bring them up to this version"""
    options = _parse(build_upgrade_parser(), argv)
    access = build_access(options, options.dataset_folder)

    from image_classifier.data.revision import upgrade_database

    before, after = upgrade_database(access)
    say(f"the tables are at revision {after}" + (f", up from {before}" if before not in (None, after) else ""))
    return ExitStatus.DONE


def parse_conditions(texts: Sequence[str]) -> Mapping[str, Sequence[str]]:
    """Parse NAME=VALUE,VALUE.

    Raises:
        SettingsError: one has no such form, an unknown name, or comes twice.
    """
    conditions: dict[str, list[str]] = {}
    for text in texts:
        name, separator, values = text.partition("=")
        if name not in CONDITIONS or not separator or not values or name in conditions:
            raise SettingsError(
                f"--where takes NAME=VALUE[,VALUE...] with each of the names {', '.join(CONDITIONS)} at most once, "
                f"got: {ascii(text)[:100]}"
            )
        conditions[name] = values.split(",")
    return conditions


def parse_time(text: str | None) -> datetime | None:
    """Parse a moment in ISO 8601; without a zone it is in that of this machine.

    Raises:
        SettingsError: it is none.
    """
    if text is None:
        return None
    try:
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError):
        raise SettingsError(
            f"--as_of takes a time such as 2026-11-21T09:30:00+01:00, got: {ascii(text)[:50]}"
        ) from None


def _parse(parser: ArgumentParser, argv: Sequence[str] | None) -> Namespace:
    """Parse, and see whether what a database needs is installed."""
    options = parse_arguments(parser, argv)
    check_local(options.dataset_folder)
    load_extra("sqlalchemy", "database")
    return options


def _check_name(name: str) -> str:
    reference = parse_reference(name)
    if reference.version is not None:
        raise SettingsError(f"--dataset takes the name of a data set, without a version, got: {name}")
    return name


ACTIONS: dict[str, Any] = {
    "ingest": ingest,
    "snapshot": snapshot,
    "list": list_datasets,
    "diff": diff,
    "relabel": relabel,
    "export": export,
    "upgrade": upgrade,
}

PARSERS = (
    build_ingest_parser,
    build_snapshot_parser,
    build_list_parser,
    build_diff_parser,
    build_relabel_parser,
    build_export_parser,
    build_upgrade_parser,
)
