"""All levels of a data set's Merkle tree as a file, of which single branches are read and checked.

`tree.bin` has the parts that the header names, in their order. Each part has its levels one after another: entries,
leaves, nodes, up to the root. So where a node lies follows from the number of images, and what proves an image takes a
read of up to 16 children a level. Nothing in the file is believed: each group is checked by its parent, from the root
down, and the roots by the digest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from image_classifier.data.mapping import iterate_blocks
from image_classifier.data.merkle import (
    ENTRY_BYTES,
    FANOUT,
    HASH_BYTES,
    build_header,
    compute_entries,
    compute_header_digest,
    compute_node,
    get_width,
)

TREE_FILE = "tree.bin"


def count_levels(num_entries: int) -> list[int]:
    """Count what each level of a tree has, from the entries up to the root."""
    counts = [num_entries]
    while len(counts) == 1 or counts[-1] > 1:
        counts.append(max(1, -(-counts[-1] // FANOUT)))
    return counts


def compute_size(num_entries: int) -> int:
    """Compute the bytes of all levels of a part's tree."""
    return sum(number * get_width(height) for height, number in enumerate(count_levels(num_entries)))


@dataclass(frozen=True)
class Root:
    """The root of a part's tree, and the number of its entries."""

    num_entries: int
    root: bytes

    def compute_root(self) -> bytes:
        """Give the root."""
        return self.root


def write_tree(
    path: Path, images: NDArray[np.uint8], labels: NDArray[np.int64], classes: Sequence[str], parts: Mapping[str, slice]
) -> str:
    """Write the trees of a data set's parts to a new file, and return the data set's digest.

    Args:
        images: [N, 3, S, S]; the pages of a mapping are given back.
        labels: [N].
        parts: which of the images are those of each part, in their order.

    Raises:
        OSError: the disk refused.
    """
    roots = {}
    with open(path, "xb") as file:
        for part, place in parts.items():
            for piece in iterate_levels(iterate_entries(images[place], labels[place])):
                file.write(piece)
            roots[part] = Root(place.stop - place.start, piece)
    return compute_header_digest(build_header(classes, roots, images.shape[1:]))


def iterate_entries(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> Iterator[bytes]:
    """Iterate over the entries of images [N, 3, S, S] with labels [N], many at a time, as `iterate_blocks` does."""
    start = 0
    for block in iterate_blocks(images):
        yield from compute_entries(block, labels[start : start + len(block)])
        start += len(block)


def iterate_levels(entries: Iterable[bytes]) -> Iterator[bytes]:
    """Iterate over all levels of the tree over the entries of a part; what comes last is the root."""
    rest, size = b"", FANOUT * ENTRY_BYTES
    leaves = []
    for block in entries:
        yield block
        rest += block
        cut = len(rest) - len(rest) % size
        leaves.append(_hash_groups(0, rest[:cut]))
        rest = rest[cut:]
    level = b"".join(leaves)
    if rest or not level:
        level += compute_node(0, rest)
    for height in count(1):
        yield level
        if len(level) == HASH_BYTES:
            return
        level = _hash_groups(height, level)


def _hash_groups(level: int, children: bytes) -> bytes:
    size = FANOUT * get_width(level)
    return b"".join(compute_node(level, children[start : start + size]) for start in range(0, len(children), size))


class Branches:
    """Branches of a part's tree, read from the root down.

    A node is named by its height (0 for entries, 1 for leaves) and its number on that height.

    Args:
        read: reads from the file, given start and size in bytes.
        start: of the part in the file.

    Attributes:
        num_entries: of the part.
        counts: of the nodes on each height.
        top: height of the root.
    """

    def __init__(self, read: Callable[[int, int], bytes], start: int, num_entries: int) -> None:
        self.num_entries = num_entries
        self.counts = count_levels(num_entries)
        self.top = len(self.counts) - 1
        sizes = [number * get_width(height) for height, number in enumerate(self.counts)]
        self._starts = list(accumulate(sizes, initial=start))
        self._read = read
        self._root = read(self._starts[self.top], sizes[self.top])
        self._groups: dict[tuple[int, int], bytes] = {}  # the children of each node that was opened

    def compute_root(self) -> bytes:
        """Give the root, which nothing here has checked."""
        return self._root

    def open(self, height: int, numbers: Sequence[int]) -> None:
        """Read the children of nodes, whose parents are open.

        Args:
            numbers: of the nodes, ascending.

        Raises:
            ValueError: the children are not those of their node.
        """
        width = get_width(height - 1)
        for run in find_runs(numbers):
            start, stop = run.start * FANOUT, min(run.stop * FANOUT, self.counts[height - 1])
            content = self._read(self._starts[height - 1] + start * width, (stop - start) * width)
            for place, number in enumerate(run):
                group = content[place * FANOUT * width : (place + 1) * FANOUT * width]
                if compute_node(height - 1, group) != self.get_node(height, number):
                    first = number * FANOUT**height
                    last = min(first + FANOUT**height, self.num_entries) - 1
                    raise ValueError(f"level {height - 1} is wrong at images {first} to {last}")
                self._groups[height, number] = group

    def open_entries(self, indices: Sequence[int]) -> None:
        """Read all that is between the root and some entries.

        Args:
            indices: of the entries, ascending.

        Raises:
            ValueError: they do not lead to the root.
        """
        for height in range(self.top, 0, -1):
            above = sorted({index // FANOUT**height for index in indices})
            self.open(height, [number for number in above if (height, number) not in self._groups])

    def get_node(self, height: int, number: int) -> bytes:
        """Get a node whose parent is open: an entry on height 0."""
        if height == self.top:
            return self._root
        start = number % FANOUT * get_width(height)
        return self._groups[height + 1, number // FANOUT][start : start + get_width(height)]

    def find_path(self, index: int) -> list[list[str]]:
        """Find what proves an entry that was opened, as `merkle.find_path` does."""
        path = []
        for height in range(self.top):
            number = index // FANOUT**height
            group, width = self._groups[height + 1, number // FANOUT], get_width(height)
            children = [group[start : start + width].hex() for start in range(0, len(group), width)]
            del children[number % FANOUT]
            path.append(children)
        return path


def find_changes(old: Branches, new: Branches) -> list[int]:
    """Find the entries of a tree that another tree does not have at their place; open them in both.

    Only what differs is read: a few groups on each level for each change.

    Raises:
        ValueError: entries do not lead to their root.
    """
    numbers = [0]
    for height in range(max(old.top, new.top), -1, -1):
        if height <= new.top:
            numbers = [number for number in numbers if _differs(old, new, height, number)]
        if height == 0:
            break
        if height <= old.top:
            old.open(height, [number for number in numbers if number < old.counts[height]])
        if height <= new.top:
            new.open(height, numbers)
            starts = [number * FANOUT for number in numbers]
            numbers = [child for at in starts for child in range(at, min(at + FANOUT, new.counts[height - 1]))]
    return numbers


def _differs(old: Branches, new: Branches, height: int, number: int) -> bool:
    is_there = height <= old.top and number < old.counts[height]
    return not is_there or old.get_node(height, number) != new.get_node(height, number)


def find_runs(numbers: Sequence[int]) -> Iterator[range]:
    """Find the runs of ascending numbers that follow each other."""
    start = 0
    for place in range(1, len(numbers) + 1):
        if place == len(numbers) or numbers[place] != numbers[place - 1] + 1:
            yield range(numbers[start], numbers[place - 1] + 1)
            start = place
