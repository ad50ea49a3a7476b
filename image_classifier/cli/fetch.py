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

    from image_classifier.data.partial_snapshot import Change, PartialSnapshot
    from image_classifier.data.proof import Proof

_NUM_LISTED = 20


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
            places = {part: [each.index for each in changes if each.part == part] for part in snapshot.counts}
        if not any(places.values()):
            raise DataError(
                f"{snapshot.folder} has no image that {options.since} does not have: there is nothing to fetch"
            )
        proof = snapshot.prove(places)
    _write(snapshot, places, proof, options)
    print("ACCEPTED")
    print(f"  data {snapshot.digest}")
    if old is not None:
        print(f"  since data {old.digest}")
    for line in _describe(snapshot, proof, changes, old):
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


def _write(snapshot: PartialSnapshot, places: dict[str, Sequence[int]], proof: Proof, options: Namespace) -> None:
    """Read and check the images; write them and their proof where that is asked for."""
    from image_classifier.data.export import check_folder_names, encode_image, new_folder
    from image_classifier.data.proof import MAX_BYTES, serialize_proof
    from image_classifier.storage import DISK

    content = serialize_proof(proof) if options.proof is not None else b""
    if len(content) > MAX_BYTES:
        raise SettingsError(
            f"--proof: the proof of {count(len(proof.images), 'image')} takes {len(content):,} bytes, of which at most "
            f"{MAX_BYTES:,} are read: fetch fewer images at once, or leave --proof out"
        )
    parts = {snapshot.get_number(image.part, image.index): image.part for image in proof.images}
    with ExitStack() as stack:
        task = stack.enter_context(track("fetching the images", len(parts), "images"))
        folder = None
        if options.output is not None:
            check_folder_names(snapshot.classes, "leave --output out")
            folder = stack.enter_context(new_folder(options.output))
        for number, label, image in snapshot.iterate(places, task):
            if folder is not None:
                path = folder / parts[number] / snapshot.classes[label] / f"{number:08d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                DISK.write_file(path, encode_image(image))
        if options.proof is not None:
            write_atomically(options.proof, content)
    if options.proof is not None:
        say(f"the proof is {options.proof}; `image_classifier data check-proof` checks it")


def _describe(
    snapshot: PartialSnapshot, proof: Proof, changes: Sequence[Change], old: PartialSnapshot | None
) -> list[str]:
    """Describe the images that were fetched, the first of them one by one where they are changes."""
    first, last = proof.images[0], proof.images[-1]
    lines = []
    if old is None and first != last:
        lines.append(f"images {first.index:,} to {last.index:,} of the {first.part} part")
    for place, image in enumerate(proof.images[:_NUM_LISTED] if old is not None or first == last else []):
        line = describe_image(image.part, image.index, snapshot.classes[image.label], image.image_digest)
        was = changes[place].was if old is not None else None
        if old is not None and was is None:
            line += ", is new"
        elif was is not None:
            other_pixels = ", had other pixels" if was[1] != image.image_digest else ""
            line += f", was of class {snapshot.classes[was[0]]}{other_pixels}"
        lines.append(line)
    if old is not None:
        if len(proof.images) > _NUM_LISTED:
            lines.append(f"and {count(len(proof.images) - _NUM_LISTED, 'other image')}")
        lines += [
            f"no longer at the end of the {part} part: {count(number - snapshot.counts.get(part, 0), 'image')}"
            for part, number in old.counts.items()
            if number > snapshot.counts.get(part, 0)
        ]
    return lines


ACTIONS = {"fetch": _fetch}
PARSERS = (build_fetch_parser,)
