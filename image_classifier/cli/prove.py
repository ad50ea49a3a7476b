"""`image_classifier data prove` and `data check-proof`: whether an image is in what a run trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from image_classifier.access import DatabaseAccess
from image_classifier.choices import Fit
from image_classifier.cli.access import add_access_options, build_access
from image_classifier.cli.arguments import parse_arguments
from image_classifier.cli.command import ExitStatus, build_parser
from image_classifier.errors import DataError, RunError, SettingsError
from image_classifier.progress import say
from image_classifier.storage import temporary_files_beside, write_atomically
from image_classifier.text import is_digest, make_printable

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from image_classifier.data.snapshot import Snapshot

_NUM_LISTED = 20


def build_prove_parser() -> ArgumentParser:
    """Build the parser of `data prove`."""
    parser = build_parser(
        "data prove",
        "Say whether an image is in what a run trained on, and in which steps it was seen. With --output, write a "
        "proof that others check without the data set.",
    )
    parser.add_argument(
        "image",
        type=str,
        help="an image file; its number, counted from 0, the training images first; or the sha256 of its pixels",
    )
    parser.add_argument("run", type=Path, help="the run")
    parser.add_argument(
        "--dataset_folder", type=Path | None, default=None, help="the run's data set, if it moved; or db:NAME@VERSION"
    )
    add_access_options(parser)
    parser.add_argument("--output", type=Path | None, default=None, help="JSON file for the proof")
    return parser


def build_check_proof_parser() -> ArgumentParser:
    """Build the parser of `data check-proof`."""
    parser = build_parser(
        "data check-proof", "Check a proof that an image is in a data set. It takes the data set's digest alone."
    )
    parser.add_argument("proof", type=Path, help="JSON file that `data prove` wrote")
    parser.add_argument("--data_digest", type=str | None, default=None, help="the data set's digest")
    parser.add_argument(
        "--run",
        type=Path | None,
        default=None,
        help="a run whose record has it; says in which steps the image was seen",
    )
    parser.add_argument(
        "--before",
        type=Path | None,
        default=None,
        help="proof of the same images in an earlier version: check that only their labels were corrected since",
    )
    parser.add_argument("--image", type=Path | None, default=None, help="image file that the proof is to be about")
    parser.add_argument("--fit", type=Fit, default="squeeze", help="how the file is fitted to the data set's size")
    return parser


def _prove(argv: Sequence[str] | None) -> int:
    """say whether an image is in what a run trained on, in which steps it was seen, and prove it"""
    options = parse_arguments(build_prove_parser(), argv)
    access = build_access(options, DatabaseAccess().dataset_folder)

    from image_classifier.data.dataset import load_snapshot
    from image_classifier.data.proof import Entries, find_place, serialize_proof
    from image_classifier.tracking.reading import find_dataset, read_record
    from image_classifier.tracking.seen import count_steps

    record = read_record(options.run)
    dataset_folder, access, reading = find_dataset(options.run, options.dataset_folder, access)
    snapshot = load_snapshot(dataset_folder, access, reading).recognize(record["data"]["digest"])
    if snapshot.digest != record["data"]["digest"]:
        raise DataError(
            f"{dataset_folder} holds data of the digest {snapshot.digest[:12]}, but the run is on "
            f"{record['data']['digest'][:12]}; --dataset_folder says where that lies"
        )
    if options.output is not None and snapshot.digest_format == 1:
        raise RunError(
            f"{options.run} was made by an earlier version, whose digest is over all images at once and proves none "
            "alone: leave --output out, or train again"
        )
    entries = Entries(snapshot)
    digest, numbers = _find_images(options.image, snapshot, entries, reading.fit)
    if options.output is not None and not numbers:
        raise DataError(
            f"no image of {snapshot.name} has the pixels of {options.image} (sha256 {digest[:12]}): there is nothing "
            "to prove, for no proof says that an image is absent; leave --output out"
        )
    if options.output is not None:
        with temporary_files_beside(options.output):
            write_atomically(options.output, serialize_proof(entries.prove(numbers)))
    name = f"{record['experiment_name']}/{record['run_name']}"
    print("IN THE DATA" if numbers else "NOT IN THE DATA")
    if not numbers:
        print(f"  no image of {snapshot.name} (data {snapshot.digest[:12]}) has these pixels (sha256 {digest[:12]})")
        print("  an image that was resized or encoded otherwise has others, and is not found")
    for number in numbers:
        part, index = find_place(snapshot, number)
        name_of_class = snapshot.classes[snapshot.labels[number]]
        print(make_printable(f"  {describe_image(part, index, name_of_class, digest)}"))
        steps = count_steps(options.run)
        labels = snapshot.labels[: snapshot.num_train]
        print(make_printable(f"  {_describe_steps(name, record, part, index, snapshot.num_train, steps, labels)}"))
    for line in _list_doubts(record):
        print(make_printable(f"  {line}"))
    if options.output is not None:
        say(f"the proof is {options.output}; `image_classifier data check-proof` checks it")
    return ExitStatus.DONE


def _find_images(image: str, snapshot: Snapshot, entries: Any, fit: Fit) -> tuple[str, list[int]]:
    """Find the images that are meant: the sha256 of their pixels, and their numbers."""
    if image.isdecimal() and image.isascii() and len(image) < 20:
        if int(image) >= len(snapshot.labels):
            raise SettingsError(f"{snapshot.name} has no image {image}: it has 0 to {len(snapshot.labels) - 1}")
        digest = entries.get_digest(int(image))
    elif is_digest(image.lower()):
        digest = image.lower()
    else:
        digest = _compute_image_digest(Path(image), snapshot.image_size, fit)
    return digest, entries.find(digest)


def _compute_image_digest(path: Path, side: int, fit: Fit) -> str:
    """Compute the sha256 of an image file's pixels, as they are in a data set."""
    import hashlib

    from image_classifier.imaging import load_image

    return hashlib.sha256(load_image(path, side=side, fit=fit).transpose(2, 0, 1).tobytes()).hexdigest()


def describe_image(part: str, index: int, name: str, digest: str) -> str:
    """Describe an image by its place, its class and its pixels' sha256."""
    return f"image {index:,} of the {part} part, class {name}, sha256 of its pixels {digest[:12]}"


def _describe_steps(
    name: str, record: dict[str, Any], part: str, index: int, num_train: int, num_steps: int, labels: Any = None
) -> str:
    """Describe in which steps a run has seen an image."""
    from image_classifier.tracking.seen import find_steps

    if part != "train":
        what = "validated on" if part == "validation" else "tested on"
        return f"{name} has {what} it, and not trained on it"
    try:
        steps = find_steps(record, num_train, num_steps, index, labels)
    except SettingsError as error:
        return f"{name} may have trained on it; its steps are not known here: {error}"
    if steps is None:
        return f"{name} has set it aside to validate on, and not trained on it"
    if not steps:
        return f"{name} has taken {num_steps:,} steps, none of them on it"
    listed = ", ".join(map(str, steps[:_NUM_LISTED])) + (", …" if len(steps) > _NUM_LISTED else "")
    return f"{name} has seen it in {len(steps):,} of {num_steps:,} steps: {listed}"


def _list_doubts(record: dict[str, Any]) -> list[str]:
    """List what the answer does not say."""
    from image_classifier.tracking.identity import describe_code

    doubts = []
    if record["pretrained"] is not None:
        doubts.append(f"the run starts from {record['pretrained']['path']}, about whose data this says nothing")
    if record["code"]["digest"] != describe_code()["digest"]:
        doubts.append(
            f"the steps are those of this version's order of images; version {record['code']['version']} trained"
        )
    return doubts


def _check_proof(argv: Sequence[str] | None) -> int:
    """check a proof that an image is in a data set, by the data set's digest alone"""
    options = parse_arguments(build_check_proof_parser(), argv)
    digest, record = find_data_digest(options)

    from image_classifier.data.proof import load_proof

    proof = load_proof(options.proof, digest)
    if options.image is not None:
        found = _compute_image_digest(options.image, proof.header["shape"][-1], options.fit)
        if found not in {image.image_digest for image in proof.images}:
            raise DataError(f"{options.proof} is about other pixels than {options.image} has (sha256 {found[:12]})")
    corrections = None if options.before is None else _find_corrections(options, proof)
    print("ACCEPTED")
    print(f"  data {proof.digest}")
    for image in proof.images:
        name = proof.header["classes"][image.label]
        print(make_printable(f"  {describe_image(image.part, image.index, name, image.image_digest)}"))
        if record is not None:
            from image_classifier.tracking.seen import count_steps

            run = f"{record['experiment_name']}/{record['run_name']}"
            steps, num_train = count_steps(options.run), proof.header["num_train"]
            print(make_printable(f"  {_describe_steps(run, record, image.part, image.index, num_train, steps)}"))
    for line in [*(corrections or ()), *(_list_doubts(record) if record is not None else ())]:
        print(make_printable(f"  {line}"))
    return ExitStatus.DONE


def find_data_digest(options: Namespace) -> tuple[str, dict[str, Any] | None]:
    """Find the digest that --data_digest or --run gives, and the run's record.

    Raises:
        SettingsError: neither is given, or both, or what is no digest.
    """
    if (options.data_digest is None) == (options.run is None):
        raise SettingsError("give the data set's --data_digest, or the --run that has it")
    if options.run is not None:
        from image_classifier.tracking.reading import read_record

        record = read_record(options.run)
        return str(record["data"]["digest"]), record
    digest: str = options.data_digest.lower()
    if not is_digest(digest):
        raise SettingsError(f"--data_digest takes 64 hexadecimal digits, got: {options.data_digest}")
    return digest, None


def _find_corrections(options: Namespace, after: Any) -> list[str]:
    """Describe what was corrected since the proof of --before, which this proof is to be the only difference from."""
    from image_classifier.data.proof import find_corrections, load_proof

    before = load_proof(options.before)
    try:
        pairs = find_corrections(before, after)
    except ValueError as error:
        raise DataError(f"{options.before} and {options.proof} do not prove a correction: {error}") from error
    names = after.header["classes"]
    lines = [
        f"image {pair.after.index:,} of the {pair.after.part} part was of class {names[pair.before.label]} before"
        for pair in pairs
    ]
    return [*lines, f"nothing else differs from data {before.digest}"]


ACTIONS = {"prove": _prove, "check-proof": _check_proof}
PARSERS = (build_prove_parser, build_check_proof_parser)
