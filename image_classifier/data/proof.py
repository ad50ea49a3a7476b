"""Proof that an image is in a data set: the Merkle path from the image to the data set's digest.

`proof.schema.json` describes the file. `merkle` says how a digest comes about.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from image_classifier import files
from image_classifier.data.merkle import (
    ENTRY_BYTES,
    FANOUT,
    FORMAT,
    Tree,
    build_entry,
    build_header,
    compute_entries,
    compute_header_digest,
    compute_root_of_path,
    find_path,
)
from image_classifier.data.parts import PARTS
from image_classifier.data.snapshot import Snapshot, build_shape
from image_classifier.errors import DataError
from image_classifier.image_sizes import is_image_size
from image_classifier.progress import track
from image_classifier.text import is_name, one_line

FORMAT_VERSION = 1
MAX_BYTES = 2**22
"""Of a proof."""

_DIGEST = re.compile("[0-9a-f]{64}")
_NODE = re.compile("([0-9a-f]{2})+")
_FORM: dict[str, Any] = {
    "format_version": int,
    "header": {"classes": [str], "format": str, "roots": {str: str}, "shape": [int], "num_train": int, "num_test": int},
    "images": [{"part": str, "index": int, "label": int, "image_digest": str, "path": [[str]]}],
}


@dataclass(frozen=True)
class ProvedImage:
    """An image of a data set.

    Attributes:
        part: train, validation or test.
        index: in the part, counted from 0.
        image_digest: sha256 of its pixels, uint8 [3, S, S].
        path: on each level of the part's tree, the hashes beside that of the image.
    """

    part: str
    index: int
    label: int
    image_digest: str
    path: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Proof:
    """Images, and the header whose digest is the data set's."""

    header: Mapping[str, Any]
    images: Sequence[ProvedImage]

    @property
    def digest(self) -> str:
        """Digest of the data set that the images are proved to be in."""
        return compute_header_digest(self.header)


class Entries:
    """The entries of a snapshot: of each image the label, and the sha256 of its pixels."""

    @track("looking at the images")
    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._entries = b"".join(compute_entries(snapshot.images, snapshot.labels))

    def get_digest(self, number: int) -> str:
        """Get the sha256 of an image's pixels; the number counts from 0, the training images first."""
        return self._entries[number * ENTRY_BYTES + 8 : (number + 1) * ENTRY_BYTES].hex()

    def find(self, image_digest: str) -> list[int]:
        """Find the images of this content: their numbers."""
        entries = np.frombuffer(self._entries, np.uint8).reshape(-1, ENTRY_BYTES)
        found = (entries[:, 8:] == np.frombuffer(bytes.fromhex(image_digest), np.uint8)).all(axis=1)
        numbers: list[int] = np.flatnonzero(found).tolist()
        return numbers

    def prove(self, numbers: Sequence[int]) -> Proof:
        """Prove that the images of these numbers are in the data set."""
        trees = {part: Tree() for part in PARTS}
        for part, tree in trees.items():
            tree.extend(self._get_part(part))
        header = build_header(self._snapshot.classes, trees, self._snapshot.images.shape[1:])
        images = []
        for number in numbers:
            part, index = find_place(self._snapshot, number)
            label, path = int(self._snapshot.labels[number]), find_path(self._get_part(part), index)
            images.append(ProvedImage(part, index, label, self.get_digest(number), path))
        return Proof(header, images)

    def _get_part(self, part: str) -> bytes:
        place = self._snapshot.parts.get(part, slice(0, 0))
        return self._entries[place.start * ENTRY_BYTES : place.stop * ENTRY_BYTES]


def find_place(snapshot: Snapshot, number: int) -> tuple[str, int]:
    """Find the part that an image is in, and its index there."""
    part, place = next((part, place) for part, place in snapshot.parts.items() if place.start <= number < place.stop)
    return part, number - place.start


def serialize_proof(proof: Proof) -> bytes:
    """Serialize a proof in the one way that is read again."""
    content = {
        "format_version": FORMAT_VERSION,
        "header": proof.header,
        "images": [asdict(image) for image in proof.images],
    }
    return (json.dumps(content, sort_keys=True, indent=1) + "\n").encode("ascii")


def load_proof(path: Path, data_digest: str | None = None) -> Proof:
    """Load a proof, and check that it leads to the digest of a data set.

    Args:
        data_digest: None takes the digest that the proof has itself.

    Raises:
        DataError: it cannot be read, is no proof, or proves something else.
    """
    try:
        proof = parse_proof(files.read_file(path, MAX_BYTES))
        check_proof(proof, data_digest or proof.digest)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path} proves nothing: {one_line(error)}") from error
    return proof


def parse_proof(content: bytes) -> Proof:
    """Parse a proof.

    Raises:
        ValueError: it is none, or not in the form that proofs are written in.
    """
    document = files.parse_json(content)
    files.check_form(document, {"format_version": int})
    if document["format_version"] != FORMAT_VERSION:
        raise ValueError(f"its format_version is {document['format_version']}; this version reads {FORMAT_VERSION}")
    files.check_form(document, _FORM)
    header, images = document["header"], document["images"]
    _check_header(header)
    if not images:
        raise ValueError("it has no image")
    for image in images:
        if image.keys() != _FORM["images"][0].keys():
            raise ValueError("it has an image with other keys than those of the format")
        if image["part"] not in header["roots"] or not 0 <= image["index"] < header[f"num_{image['part']}"]:
            raise ValueError("it has an image at a place that the data set does not have")
        if not 0 <= image["label"] < len(header["classes"]):
            raise ValueError("it has an image of a class that the data set does not have")
        _check_hashes([image["image_digest"]], _DIGEST)
        _check_hashes(chain.from_iterable(image["path"]), _NODE)
    places = [(PARTS.index(image["part"]), image["index"]) for image in images]
    if places != sorted(set(places)):
        raise ValueError("its images are not in the data set's order, each once")
    proof = Proof(header, [ProvedImage(**image) for image in images])
    if serialize_proof(proof) != content:
        raise ValueError("it is not in the one form that proofs are written in")
    return proof


def _check_header(header: dict[str, Any]) -> None:
    parts = [part for part in PARTS if part in header["roots"]]
    if header.keys() != {"classes", "format", "roots", "shape", *(f"num_{part}" for part in parts)}:
        raise ValueError("its header has other keys than those of a data set")
    files.check_form(header, {f"num_{part}": int for part in parts}, "header")
    side = header["shape"][-1] if header["shape"] else 0
    if header["format"] != FORMAT or not is_image_size(side) or header["shape"] != list(build_shape(side)):
        raise ValueError(f"its header is not of the format {FORMAT!r}, or of images of another shape")
    if header["roots"].keys() != set(parts) or not all(map(is_name, header["classes"])):
        raise ValueError("its header has other parts or classes than a data set")
    _check_hashes(header["roots"].values(), _DIGEST)


def _check_hashes(texts: Iterable[str], form: re.Pattern[str]) -> None:
    if not all(map(form.fullmatch, texts)):
        raise ValueError("it has no hash in hexadecimal digits where it must")


def check_proof(proof: Proof, data_digest: str) -> None:
    """Check that the images of a proof are in the data set of a digest.

    Raises:
        ValueError: they are not.
    """
    if proof.digest != data_digest:
        raise ValueError(f"it is about data of the digest {proof.digest[:12]}, not {data_digest[:12]}")
    for image in proof.images:
        entry = build_entry(image.label, bytes.fromhex(image.image_digest))
        root = compute_root_of_path(entry, image.index, proof.header[f"num_{image.part}"], image.path)
        if root.hex() != proof.header["roots"][image.part]:
            raise ValueError(f"image {image.index} of the {image.part} part does not lead to the root of that part")


@dataclass(frozen=True)
class Relabelled:
    """An image of two versions of a data set that has another label in each."""

    before: ProvedImage
    after: ProvedImage


def find_corrections(before: Proof, after: Proof) -> list[Relabelled]:
    """Find which labels were corrected between two data sets, and check that nothing else differs.

    All other nodes of the trees are the same in both proofs, so all other images are, too.

    Args:
        before, after: checked proofs of the same places.

    Raises:
        ValueError: something else differs, or may differ, for all that the proofs say.
    """
    places = [[(image.part, image.index) for image in proof.images] for proof in (before, after)]
    if places[0] != places[1]:
        raise ValueError("the proofs are not about the same places of the data")
    changed = {part for part, _ in places[0]}
    headers = [_strip_roots(proof.header, changed) for proof in (before, after)]
    if headers[0] != headers[1]:
        raise ValueError("the data sets differ in more than these images: in their classes, their size or another part")
    siblings = [_list_siblings(proof) for proof in (before, after)]
    if siblings[0] != siblings[1]:
        raise ValueError("the data sets differ in more images than the proofs are about")
    pairs = [Relabelled(*pair) for pair in zip(before.images, after.images, strict=True)]
    for pair in pairs:
        if pair.before.image_digest != pair.after.image_digest:
            raise ValueError(
                f"image {pair.after.index} of the {pair.after.part} part has other pixels, not only a label"
            )
    return [pair for pair in pairs if pair.before.label != pair.after.label]


def _strip_roots(header: Mapping[str, Any], parts: set[str]) -> dict[str, Any]:
    """Give a header without the roots of some parts."""
    return {**header, "roots": {part: root for part, root in header["roots"].items() if part not in parts}}


def _list_siblings(proof: Proof) -> dict[tuple[str, int, int], str]:
    """List the nodes of a proof, by part, height and number, that no proved image is below."""
    siblings, above = {}, set()
    for image in proof.images:
        for height, children in enumerate(image.path):
            number = image.index // FANOUT**height
            above.add((image.part, height, number))
            first = number - number % FANOUT
            others = [each for each in range(first, first + len(children) + 1) if each != number]
            siblings.update({(image.part, height, other): node for other, node in zip(others, children, strict=True)})
    return {place: node for place, node in siblings.items() if place not in above}
