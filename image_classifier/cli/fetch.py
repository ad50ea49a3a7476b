"""`image_classifier data fetch`: some images of a snapshot, checked by the data set's digest without the others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from image_classifier.cli.arguments import parse_arguments
from image_classifier.cli.command import ExitStatus, build_parser
from image_classifier.cli.prove import describe_image, find_data_digest
from image_classifier.errors import DataError, RunError, SettingsError
from image_classifier.progress import say, track
from image_classifier.storage import write_atomically
from image_classifier.text import count, make_printable

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from image_classifier.data.partial_snapshot import Change, Entry, PartialSnapshot

_NUM_LISTED = 20
_LEAST_PROOF_BYTES = 100
"""Of an image, at the least: a proof that is too large by this is not even built."""


def build_fetch_parser() -> ArgumentParser:
    """Build the parser of `data fetch`."""
    parser = build_parser(
        "data fetch",
        "Read some images of a snapshot and check them by the data set's digest, without reading the others. With "
        "--output, write them as PNG files.",
    )
    parser.add_argument("snapshot", type=Path, help="folder that `data export --format snapshot` wrote, or a URL of it")
    parser.add_argument("--data_digest", type=str | None, default=None, help="the data set's digest")
    parser.add_argument("--run", type=Path | None, default=None, help="a run whose record has the digest")
    parser.add_argument(
        "--part",
        type=Literal["train", "validation", "test"] | None,
        default=None,
        help="the part that --images counts in; train by default",
    )
    parser.add_argument(
        "--images",
        type=str | None,
        default=None,
        metavar="START:STOP",
        help="which images: from START to before STOP, counted from 0 in the part; or the number of one",
    )
    parser.add_argument(
        "--since",
        type=Path | None,
        default=None,
        help="snapshot of an earlier version, or a URL of it: fetch the images that are new or relabelled since",
    )
    parser.add_argument(
        "--output", type=Path | None, default=None, help="folder to make, with PART/CLASS/NUMBER.png for each image"
    )
    parser.add_argument(
        "--proof", type=Path | None, default=None, help="JSON file for a proof that these images are in the data set"
    )
    return parser


def _fetch(argv: Sequence[str] | None) -> int:
    """fetch some images of a snapshot, or what a correction changed, and check them without the others"""
    options = parse_arguments(build_fetch_parser(), argv)
    if (options.images is None) == (options.since is None):
        raise SettingsError("give the --images to fetch, or --since for what is new or relabelled")
    if options.since is not None and options.part is not None:
        raise SettingsError("--part goes with --images; --since looks at all parts")
    wanted = None if options.images is None else parse_range(options.images)
    digest, record = find_data_digest(options)
    if record is not None and record["data"].get("digest_format", 1) == 1:
        raise RunError(
            f"{options.run} was made by an earlier version, whose digest is over all images at once and checks none "
            "alone: train again, or fetch the whole data set"
        )

    from image_classifier.data.partial_snapshot import PartialSnapshot
    from image_classifier.remote.ranges import RangeReader

    old, changes = None, []
    with track("looking at the trees"):
        snapshot = PartialSnapshot(RangeReader(options.snapshot), digest)
        if wanted is not None:
            part = options.part or "train"
            places: dict[str, Sequence[int]] = {part: snapshot.find_indices(part, *wanted)}
        else:
            old = PartialSnapshot(RangeReader(options.since))
            changes = snapshot.find_changes(old)
            if not changes:
                raise DataError(f"{snapshot.folder} has no image that {old.folder} does not have: nothing to fetch")
            places = {part: [each.index for each in changes if each.part == part] for part in snapshot.counts}
        entries = snapshot.list_entries(places)
    _write(snapshot, entries, options)
    print("ACCEPTED")
    print(f"  data {snapshot.digest}")
    if old is not None:
        print(f"  since data {old.digest}")
    for line in _describe(snapshot, entries, changes, old):
        print(make_printable(f"  {line}"))
    num_read = snapshot.folder.num_bytes + (old.folder.num_bytes if old else 0)
    print(f"  read {num_read:,} bytes of {snapshot.num_bytes + (old.num_bytes if old else 0):,}")
    return ExitStatus.DONE


def parse_range(text: str) -> tuple[int, int]:
    """Parse START:STOP, or one number.

    Raises:
        SettingsError: it is neither.
    """
    match = re.fullmatch("([0-9]{1,15})(?::([0-9]{1,15}))?", text)
    if match is None:
        raise SettingsError(f"--images takes START:STOP such as 100:200, or a number, got: {ascii(text)[:50]}")
    start = int(match[1])
    return start, start + 1 if match[2] is None else int(match[2])


def _write(snapshot: PartialSnapshot, entries: Sequence[Entry], options: Namespace) -> None:
    """Read and check the images; write them and their proof where that is asked for."""
    from image_classifier.data.export import check_folder_names, encode_image, new_folder
    from image_classifier.storage import DISK

    proof = None if options.proof is None else _serialize_proof(snapshot, entries)
    with ExitStack() as stack:
        task = stack.enter_context(track("fetching the images", len(entries), "images"))
        folder = None
        if options.output is not None:
            check_folder_names(snapshot.classes, "leave --output out")
            folder = stack.enter_context(new_folder(options.output))
        for entry, image in snapshot.iterate(entries, task):
            if folder is not None:
                name = f"{snapshot.get_number(entry):08d}.png"
                path = folder / entry.part / snapshot.classes[entry.label] / name
                path.parent.mkdir(parents=True, exist_ok=True)
                DISK.write_file(path, encode_image(image))
        if proof is not None:
            write_atomically(options.proof, proof)
    if proof is not None:
        say(f"the proof is {options.proof}; `image_classifier data check-proof` checks it")


def _serialize_proof(snapshot: PartialSnapshot, entries: Sequence[Entry]) -> bytes:
    from image_classifier.data.proof import MAX_BYTES, serialize_proof

    least = len(entries) * _LEAST_PROOF_BYTES
    content = b"" if least > MAX_BYTES else serialize_proof(snapshot.prove(entries))
    if max(least, len(content)) > MAX_BYTES:
        raise SettingsError(
            f"--proof: the proof of {count(len(entries), 'image')} has more than the {MAX_BYTES:,} bytes that are "
            "read: fetch fewer images at once, or leave --proof out"
        )
    return content


def _describe(
    snapshot: PartialSnapshot, entries: Sequence[Entry], changes: Sequence[Change], old: PartialSnapshot | None
) -> list[str]:
    """Describe the images that were fetched, the first of them one by one where they are changes."""
    if old is None and len(entries) > 1:
        return [f"images {entries[0].index:,} to {entries[-1].index:,} of the {entries[0].part} part"]
    lines = [
        describe_image(entry.part, entry.index, snapshot.classes[entry.label], entry.image_digest)
        for entry in entries[:_NUM_LISTED]
    ]
    if old is None:
        return lines
    for place, entry in enumerate(entries[:_NUM_LISTED]):
        was = changes[place].was
        if was is None:
            lines[place] += ", is new"
        else:
            had_others = ", had other pixels" if was.image_digest != entry.image_digest else ""
            lines[place] += f", was of class {old.classes[was.label]}{had_others}"
    if len(entries) > _NUM_LISTED:
        lines.append(f"and {count(len(entries) - _NUM_LISTED, 'other image')}")
    gone = {part: number - snapshot.counts.get(part, 0) for part, number in old.counts.items()}
    lines += [
        f"no longer at the end of the {part} part: {count(number, 'image')}"
        for part, number in gone.items()
        if number > 0
    ]
    return lines


ACTIONS = {"fetch": _fetch}
PARSERS = (build_fetch_parser,)
