"""The tree of sums: the same whoever computes which part of it."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_classifier.training.tree import Node, compute_node, find_nodes, find_root


def join(left: str, right: str) -> str:
    return f"({left}{right})"


@pytest.mark.parametrize(
    ("num_shards", "expected"),
    [(1, "a"), (2, "(ab)"), (3, "((ab)c)"), (6, "(((ab)(cd))(ef))"), (7, "(((ab)(cd))((ef)g))")],
)
def test_each_is_added_to_its_neighbour_and_what_is_left_over_goes_up(num_shards: int, expected: str) -> None:
    leaves = {(0, number): "abcdefgh"[number] for number in range(num_shards)}
    assert compute_node(find_root(num_shards), leaves, num_shards, join) == expected


@given(st.integers(1, 40), st.lists(st.integers(0, 40)))
def test_parts_give_nodes_that_are_enough_and_the_same_sum(num_shards: int, cuts: list[int]) -> None:
    leaves: dict[Node, str] = {(0, number): f" {number}" for number in range(num_shards)}
    whole = compute_node(find_root(num_shards), leaves, num_shards, join)
    known: dict[Node, str] = {}
    for begin, end in pairwise([0, *sorted(min(cut, num_shards) for cut in cuts), num_shards]):
        mine: dict[Node, str] = {(0, number): leaves[0, number] for number in range(begin, end)}
        nodes = find_nodes(begin, end, num_shards)
        assert len(nodes) <= 2 * num_shards.bit_length()
        known |= {node: compute_node(node, mine, num_shards, join) for node in nodes}
    assert compute_node(find_root(num_shards), known, num_shards, join) == whole
