"""The tree in a file: branches of it are those of the tree, cost what they hold, and are believed if they fit alone."""

from __future__ import annotations

from random import Random

import pytest

from image_classifier.data.levels import Branches, compute_size, count_levels, find_changes, find_runs, iterate_levels
from image_classifier.data.merkle import ENTRY_BYTES, Tree, find_path
from tests.trees import SIZES, make_entries

START = 100
"""What lies before the tree in its file."""


class File:
    """A file whose reads are noted."""

    def __init__(self, entries: bytes) -> None:
        self.content = bytearray(START) + b"".join(iterate_levels([entries]))
        self.reads: list[tuple[int, int]] = []
        self.num_entries = len(entries) // ENTRY_BYTES

    def read(self, start: int, size: int) -> bytes:
        self.reads.append((start, size))
        return bytes(self.content[start : start + size])

    def open(self) -> Branches:
        return Branches(self.read, START, self.num_entries)

    @property
    def num_bytes(self) -> int:
        return sum(size for _, size in self.reads)


@pytest.mark.parametrize("size", (0, *SIZES))
def test_all_levels_are_written_and_end_with_the_root(size: int) -> None:
    entries, tree, chance = make_entries(size), Tree(), Random(size)
    tree.extend(entries)
    cuts = sorted(chance.choices(range(size + 1), k=5))
    pieces = [entries[a * ENTRY_BYTES : b * ENTRY_BYTES] for a, b in zip([0, *cuts], [*cuts, size], strict=True)]
    *_, last = levels = list(iterate_levels(pieces))
    assert last == tree.compute_root() and len(b"".join(levels)) == compute_size(size)
    assert Branches(File(entries).read, START, size).compute_root() == last
    assert (count_levels(size)[0], count_levels(size)[-1]) == (size, 1)


@pytest.mark.parametrize("size", SIZES)
def test_the_branch_of_a_range_proves_each_of_its_entries_and_costs_no_more(size: int) -> None:
    entries, chance = make_entries(size), Random(size)
    for _ in range(5):
        start, stop = sorted(chance.sample(range(size + 1), 2))
        file = File(entries)
        branches = file.open()
        branches.open_entries(range(start, stop))
        for index in {start, (start + stop) // 2, stop - 1}:
            assert branches.get_node(0, index) == entries[index * ENTRY_BYTES : (index + 1) * ENTRY_BYTES]
            assert branches.find_path(index) == find_path(entries, index)
        assert file.num_bytes <= (stop - start + 30) * (ENTRY_BYTES + 3) + 32 * 31 * branches.top


def test_every_flipped_byte_that_is_read_is_found_and_says_where() -> None:
    entries, chance = make_entries(300), Random(0)
    file = File(entries)
    file.open().open_entries(range(100, 140))
    read = [at for start, size in file.reads[1:] for at in range(start, start + size)]  # the first is the root
    for at in chance.sample(read, 150):
        file.content[at] ^= 1 << chance.randrange(8)
        with pytest.raises(ValueError, match=r"level [012] is wrong at images \d+ to \d+"):
            file.open().open_entries(range(100, 140))
        if at < START + 300 * ENTRY_BYTES:
            first = (at - START) // ENTRY_BYTES // 16 * 16
            with pytest.raises(ValueError, match=f"level 0 is wrong at images {first} to {first + 15}"):
                file.open().open_entries(range(100, 140))
        file.content = File(entries).content
    file.open().open_entries(range(100, 140))


def test_what_changed_between_two_trees_is_found_whatever_their_sizes() -> None:
    chance = Random(0)
    for old_size in SIZES:
        for new_size in {old_size, chance.choice(SIZES), min(old_size + 1, 4097)}:
            old = make_entries(old_size)
            new = bytearray((old + make_entries(new_size))[: new_size * ENTRY_BYTES])
            for _ in range(chance.choice((0, 1, 3))):
                new[chance.randrange(len(new))] ^= 1
            width = ENTRY_BYTES
            wanted = [at for at in range(new_size) if old[at * width :][:width] != new[at * width :][:width]]
            trees = File(old), File(bytes(new))
            before, after = (tree.open() for tree in trees)
            assert find_changes(before, after) == wanted
            for index in wanted[:3]:
                assert after.find_path(index) == find_path(bytes(new), index)


def test_one_change_among_many_entries_costs_a_few_nodes() -> None:
    old = make_entries(4097)
    new = bytearray(old)
    new[3000 * ENTRY_BYTES] ^= 1
    files = File(old), File(bytes(new))
    assert find_changes(*(file.open() for file in files)) == [3000]
    assert all(file.num_bytes <= 16 * (ENTRY_BYTES + 3 * 32) + 32 for file in files)


def test_a_wrong_node_hides_no_change() -> None:
    old, chance = make_entries(300), Random(0)
    new = bytearray(old)
    new[200 * ENTRY_BYTES] ^= 1
    files = File(old), File(bytes(new))
    find_changes(*(file.open() for file in files))
    for file in files:
        good = bytes(file.content)
        for at in chance.sample([at for start, size in file.reads[1:] for at in range(start, start + size)], 50):
            file.content[at] ^= 1
            with pytest.raises(ValueError, match="is wrong at images"):
                find_changes(*(each.open() for each in files))
            file.content = bytearray(good)


def test_numbers_that_follow_each_other_are_one_run() -> None:
    assert list(find_runs([])) == []
    assert list(find_runs([3])) == [range(3, 4)]
    assert list(find_runs([0, 1, 4, 6, 7, 8])) == [range(0, 2), range(4, 5), range(6, 9)]
