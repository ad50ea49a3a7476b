"""The binary tree that adds the shards of a batch: neighbours first, then their sums, and so on.

A node is named by its level, 0 for the shards themselves, and its number on it. What is left over at the end of a level
goes up as it is.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import TypeVar

Node = tuple[int, int]
Value = TypeVar("Value")


def find_nodes(begin: int, end: int, num_shards: int) -> list[Node]:
    """Find the highest nodes that a part of the shards gives, from `begin` up to but without `end`."""
    nodes = []
    while begin < end:
        level = 0
        while begin % (2 << level) == 0 and begin + (1 << level) < num_shards:
            if min(begin + (2 << level), num_shards) > end:
                break
            level += 1
        nodes.append((level, begin >> level))
        begin += 1 << level
    return nodes


def find_root(num_shards: int) -> Node:
    """Find the node that is the sum of all shards."""
    return (num_shards - 1).bit_length(), 0


def compute_node(
    node: Node, known: MutableMapping[Node, Value], num_shards: int, add: Callable[[Value, Value], Value]
) -> Value:
    """Compute a node's sum from those that are known, which must be enough for it."""
    if node in known:
        return known[node]
    level, number = node
    left = compute_node((level - 1, 2 * number), known, num_shards, add)
    if (2 * number + 1) << (level - 1) >= num_shards:
        return left
    return add(left, compute_node((level - 1, 2 * number + 1), known, num_shards, add))
