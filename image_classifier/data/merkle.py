"""The digest of a data set: the hash of a header with the Merkle tree root of each split.

A tree's entries are the images of a part in their order: the label, and the sha256 of the pixels. So one image can be
proved without the others, and a tree that grows by an image is hashed on from where it was::

    entry    label, int64 little endian  ‖  sha256(pixels, uint8 [3, S, S])
    leaf     sha256(0x00 ‖ up to 16 entries)
    node     sha256(0x01 ‖ up to 16 leaves or nodes)      until one is left, the root
    digest   sha256(0x02 ‖ header)                        one line of JSON, sorted, in ASCII

The first byte keeps the kinds apart, as in RFC 6962. There a node has two children. With 16, a tree takes a fifteenth
of the calls: each costs as much as hashing a kilobyte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

FORMAT = "image_classifier snapshot 2"
FANOUT = 16
ENTRY_BYTES = 40
HASH_BYTES = 32

_BYTES_AT_ONCE = 2**21
_BYTES_FOR_THREADS = 8192
"""Of an image: of smaller ones, threads wait for the interpreter for as long as they hash."""


class Rooted(Protocol):
    """What has the root of a part's tree."""

    @property
    def num_entries(self) -> int:
        """Number of images."""

    def compute_root(self) -> bytes:
        """Give the root."""


class Tree:
    """The tree of a part, which grows by entries at its end.

    Attributes:
        num_entries: so far.
    """

    def __init__(self, num_entries: int = 0, rest: Sequence[bytes] = ()) -> None:
        self.num_entries = num_entries
        self._rest = list(rest)  # of each level, what does not fill a group yet

    def extend(self, entries: bytes) -> None:
        """Add entries at the end."""
        self.num_entries += len(entries) // ENTRY_BYTES
        for level in count():
            if level == len(self._rest):
                self._rest.append(b"")
            size = FANOUT * get_width(level)
            data = self._rest[level] + entries
            cut = len(data) - len(data) % size
            self._rest[level] = data[cut:]
            if not cut:
                return
            entries = b"".join(compute_node(level, data[start : start + size]) for start in range(0, cut, size))

    def compute_root(self) -> bytes:
        """Compute the root of the entries so far."""
        node = b""
        for level, rest in enumerate(self._rest):
            children = rest + node
            if level and len(children) == HASH_BYTES and not any(self._rest[level + 1 :]):
                return children
            node = compute_node(level, children) if children else b""
        return node or compute_node(0, b"")

    def to_json(self) -> dict[str, Any]:
        """Say what it takes to go on from here."""
        return {"num_entries": self.num_entries, "rest": [rest.hex() for rest in self._rest]}

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Tree:
        """Go on from what `to_json` said."""
        return cls(state["num_entries"], [bytes.fromhex(rest) for rest in state["rest"]])


def get_width(level: int) -> int:
    """Get the bytes of a child on a level: entries are below level 0."""
    return HASH_BYTES if level else ENTRY_BYTES


def compute_node(level: int, children: bytes) -> bytes:
    """Compute the hash over up to 16 children: on level 0, a leaf's."""
    return hashlib.sha256((b"\1" if level else b"\0") + children).digest()


def build_entry(label: int, pixels_digest: bytes) -> bytes:
    """Build an image's entry."""
    return label.to_bytes(8, "little", signed=True) + pixels_digest


def compute_entries(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> Iterator[bytes]:
    """Compute the entries of images [N, 3, S, S] with labels [N], many at a time."""
    num_at_once = max(1, _BYTES_AT_ONCE // max(1, images[:1].nbytes))
    starts = range(0, len(labels), num_at_once)
    blocks = [(images[start : start + num_at_once], labels[start : start + num_at_once]) for start in starts]
    if len(blocks) > 1 and images[0].nbytes >= _BYTES_FOR_THREADS:
        with ThreadPoolExecutor() as threads:
            yield from threads.map(_compute_block, blocks)
    else:
        yield from map(_compute_block, blocks)


def _compute_block(block: tuple[NDArray[np.uint8], NDArray[np.int64]]) -> bytes:
    images, labels = block
    size, pixels = images[0].nbytes, np.ascontiguousarray(images, np.uint8).reshape(-1).data
    sha256 = hashlib.sha256
    hashes = b"".join([sha256(pixels[start : start + size]).digest() for start in range(0, len(pixels), size)])
    return join_entries(labels, hashes)


def join_entries(labels: NDArray[np.int64], hashes: bytes) -> bytes:
    """Join labels [N] and the sha256 of as many images to entries."""
    entries = np.empty((len(labels), ENTRY_BYTES), np.uint8)
    entries[:, :8] = np.ascontiguousarray(labels, "<i8").view(np.uint8).reshape(-1, 8)
    entries[:, 8:] = np.frombuffer(hashes, np.uint8).reshape(-1, HASH_BYTES)
    return entries.tobytes()


def build_header(classes: Sequence[str], trees: Mapping[str, Rooted], shape: Sequence[int]) -> dict[str, Any]:
    """Build the header of a data set's digest; it does not speak of a validation part without images.

    Args:
        trees: of each part, by its name.
        shape: of an image.
    """
    parts = {part: tree for part, tree in trees.items() if tree.num_entries or part != "validation"}
    return {
        "classes": list(classes),
        "format": FORMAT,
        **{f"num_{part}": tree.num_entries for part, tree in parts.items()},
        "roots": {part: tree.compute_root().hex() for part, tree in parts.items()},
        "shape": list(shape),
    }


def compute_header_digest(header: Mapping[str, Any]) -> str:
    """Compute the digest of the data set that a header is of."""
    line = json.dumps(header, sort_keys=True, separators=(",", ":")) + "\n"
    return hashlib.sha256(b"\2" + line.encode("ascii")).hexdigest()


def find_path(entries: bytes, index: int) -> list[list[str]]:
    """Find what proves an entry: on each level, the other children of the node that the entry is below.

    Args:
        entries: all of a part.
        index: of the entry in the part.
    """
    path = []
    for level in count():
        width = get_width(level)
        size = FANOUT * width
        groups = [entries[start : start + size] for start in range(0, len(entries), size)]
        group = groups[index // FANOUT]
        children = [group[start : start + width].hex() for start in range(0, len(group), width)]
        del children[index % FANOUT]
        path.append(children)
        if len(groups) == 1:
            return path
        entries, index = b"".join(compute_node(level, group) for group in groups), index // FANOUT
    raise AssertionError


def compute_root_of_path(entry: bytes, index: int, num_entries: int, path: Sequence[Sequence[str]]) -> bytes:
    """Compute the root of a part of so many entries from one of them and its path.

    Raises:
        ValueError: the path has another length, on a level or in all, than such a part gives.
    """
    node = entry
    for level in count():
        num_siblings = min(FANOUT, num_entries - index // FANOUT * FANOUT) - 1
        siblings = [bytes.fromhex(each) for each in path[level]] if level < len(path) else None
        if siblings is None or [len(each) for each in siblings] != [get_width(level)] * num_siblings:
            raise ValueError(f"its path does not have {num_siblings} siblings on level {level}")
        siblings.insert(index % FANOUT, node)
        node = compute_node(level, b"".join(siblings))
        index, num_entries = index // FANOUT, -(-num_entries // FANOUT)
        if num_entries == 1:
            break
    if len(path) != level + 1:
        raise ValueError(f"its path has {len(path)} levels instead of {level + 1}")
    return node
