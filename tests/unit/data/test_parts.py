"""The parts of a data set by their names, and shards of which none may be missing or there twice."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_classifier.data.parts import check_shards, find_part, find_part_of_file
from image_classifier.data.split import choose_test
from image_classifier.errors import DataError


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("train", "train"),
        ("Training", "train"),
        ("val", "validation"),
        ("valid", "validation"),
        ("VALIDATION", "validation"),
        ("test", "test"),
        ("Testing", "test"),
        ("trains", None),
        ("cat", None),
    ],
)
def test_parts_are_known_by_their_usual_names(name: str, part: str | None) -> None:
    assert find_part(name) == part
    for ending in (".parquet", "-00000-of-00001.parquet", "_0.parquet"):
        assert find_part_of_file(name + ending) == part


@pytest.mark.parametrize(
    "names",
    [
        ["train.parquet"],
        ["cifar10.parquet"],
        ["images-2024.parquet"],
        ["train-00000-of-00001.parquet"],
        ["train-00000-of-00001-b7dbb3d1c2d7e1ff.parquet"],
        ["train-1-of-2.parquet", "train-0-of-2.parquet"],
        ["train-0.parquet", "train-1.parquet", "train-2.parquet"],
        ["train_1.parquet", "train_2.parquet"],
        ["train-00000.parquet"],
    ],
)
def test_whole_sets_of_shards_are_taken(names: list[str]) -> None:
    check_shards(names, "data")


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["train-00000-of-00002.parquet"], "has 1 of 2 Parquet shards, .*: 1 are missing, the first is number 1; get"),
        (["train-00001-of-00002.parquet"], "the first is number 0"),
        (["train-00003-of-999999999.parquet"], "999,999,998 are missing, the first is number 0"),
        (["x-0-of-3.parquet", "x-2-of-3.parquet"], "has 2 of 3 .* the first is number 1"),
        (["train-0.parquet", "train-2.parquet"], "the first is number 1"),
        (["train-00003.parquet"], "has 1 of 3 Parquet shards"),
        (["a-0-of-2.parquet", "a-00000-of-00002.parquet"], "shard 0 twice, as a-0"),
        (["a-0-of-1-0123abcd.parquet", "a-0-of-1.parquet"], "shard 0 twice"),
        (["train-0.parquet", "train_0.parquet"], "shard 0 twice"),
        (["train.parquet", "train-00000-of-00001.parquet"], "train.parquet has no shard number"),
        (["train-0-of-1.parquet", "train-0-of-1 (1).parquet"], "has no shard number"),
        (["val-0-of-2.parquet", "validation-1-of-2.parquet"], "whose names are those of different sets of shards"),
        (["train-0-of-2.parquet", "train-1-of-3.parquet"], "whose names are those of different sets of shards"),
        (["train-0-of-2.parquet", "train-1.parquet"], "whose names are those of different sets of shards"),
        (["a-0-of-1.parquet", "a-1-of-1.parquet"], "has a-1-of-1.parquet, but shards are numbered from 0 to 0"),
        (["a-0-of-0.parquet"], "numbered from 0 to -1"),
    ],
)
def test_others_are_refused_and_named(names: list[str], complaint: str) -> None:
    for order in (names, names[::-1]):
        with pytest.raises(DataError, match=complaint) as caught:
            check_shards(order, "data")
        assert len(str(caught.value)) < 500


@given(
    st.integers(2, 40), st.randoms(use_true_random=False), st.sampled_from(["train-{:05}-of-{:05}", "t_{}", "a-{:03}"])
)
def test_no_set_that_lacks_a_shard_is_taken(count: int, chance: random.Random, pattern: str) -> None:
    names = [f"{pattern.format(number, count)}.parquet" for number in range(count)]
    chance.shuffle(names)
    check_shards(names, "data")
    last = f"{pattern.format(count - 1, count)}.parquet"
    lost = chance.choice([name for name in names if name != last or "-of-" in name])  # nothing tells of a lost last one
    if lost == f"{pattern.format(0, count)}.parquet" and "-of-" not in lost:
        return  # numbers may begin with 1
    with pytest.raises(DataError):
        check_shards([name for name in names if name != lost], "data")
    with pytest.raises(DataError):
        check_shards([*names, lost.replace(".parquet", " (1).parquet")], "data")


@given(
    st.lists(st.tuples(st.binary(min_size=1, max_size=8), st.integers(0, 3)), unique_by=lambda item: item[0]), st.data()
)
def test_the_choice_is_a_sixth_of_each_class_whatever_the_order(
    items: list[tuple[bytes, int]], data: st.DataObject
) -> None:
    keys, labels = [key for key, _ in items], [label for _, label in items]
    chosen = choose_test(keys, labels, 5)
    for label in range(4):
        of_class = np.array(labels) == label
        assert chosen[of_class].sum() == of_class.sum() // 6
    order = data.draw(st.permutations(range(len(items))))
    again = choose_test([keys[place] for place in order], [labels[place] for place in order], 5)
    assert again.tolist() == [bool(chosen[place]) for place in order]
