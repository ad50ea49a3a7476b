"""The tree of a digest: the same however it grows, and a path leads to its root from nowhere else."""

from __future__ import annotations

import json
from random import Random

import pytest

from image_classifier.data.merkle import (
    ENTRY_BYTES,
    Tree,
    compute_node,
    compute_root_of_path,
    find_path,
    get_width,
)
from tests.trees import SIZES, make_entries


def compute_root(entries: bytes) -> bytes:
    """Compute a root level by level."""
    level = 0
    while True:
        size = 16 * get_width(level)
        entries = b"".join(compute_node(level, entries[at : at + size]) for at in range(0, len(entries), size))
        if len(entries) == 32:
            return entries
        level += 1


def test_a_root_is_the_same_however_the_tree_grows() -> None:
    chance = Random(0)
    for size in SIZES:
        entries, tree, at = make_entries(size), Tree(), 0
        while at < size:
            step = chance.choice((0, 1, 3, 16, 40, 1000))
            tree.extend(entries[at * ENTRY_BYTES : (at + step) * ENTRY_BYTES])
            at += step
            tree = Tree.from_json(json.loads(json.dumps(tree.to_json())))
        assert (tree.num_entries, tree.compute_root()) == (size, compute_root(entries))


def test_what_a_tree_keeps_to_grow_from_is_short_and_one_more_entry_costs_a_few_hashes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tree = Tree()
    tree.extend(make_entries(60_000))
    assert len(json.dumps(tree.to_json())) < 3000
    calls: list[int] = []
    compute = compute_node

    def count(level: int, children: bytes) -> bytes:
        calls.append(level)
        return compute(level, children)

    monkeypatch.setattr("image_classifier.data.merkle.compute_node", count)
    tree.extend(make_entries(1))
    tree.compute_root()
    assert len(calls) <= 8


def test_a_tree_without_images_has_a_root_of_its_own() -> None:
    assert Tree().compute_root() == compute_node(0, b"")


def test_a_path_leads_to_the_root_from_its_place_alone() -> None:
    for size in SIZES:
        entries = make_entries(size)
        root = compute_root(entries)
        for index in {0, size // 2, size - 1}:
            path, entry = find_path(entries, index), entries[index * ENTRY_BYTES : (index + 1) * ENTRY_BYTES]
            assert compute_root_of_path(entry, index, size, path) == root
            for other in {index + 1, index - 1, index + 16, index ^ 8} - {index}:
                if 0 <= other < size:
                    assert not leads(root, entry, other, size, path)
            assert not leads(root, entry, index, 16 * size + 1, path)  # the size itself is in the header
            assert not leads(root, entry[:-1], index, size, path)


def leads(root: bytes, entry: bytes, index: int, size: int, path: list[list[str]]) -> bool:
    try:
        return compute_root_of_path(entry, index, size, path) == root
    except ValueError:
        return False
