"""How far apart tensors are, in units that follow from their bits."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies

from image_classifier.errors import RunError
from image_classifier.tracking import divergence
from image_classifier.tracking.divergence import (
    ChainDifference,
    compare_tensors,
    find_chain_difference,
    find_flipped_bit,
    list_digests,
)
from image_classifier.tracking.identity import compute_tensor_digest

FLOATS = strategies.floats(width=32, allow_nan=False, allow_infinity=False)


@given(FLOATS)
def test_the_next_value_is_one_unit_away(value: float) -> None:
    after = float(np.nextafter(np.float32(value), np.float32(np.inf)))
    if after == value or math.isinf(after):
        return
    found = compare_tensors(torch.tensor([1.0, value]), torch.tensor([1.0, after]))
    assert found is not None and (found.index, found.ulps, found.num_different) == ((1,), 1, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_units_are_those_of_the_type_across_zero(dtype: torch.dtype) -> None:
    least = torch.finfo(dtype).smallest_normal
    one = torch.tensor(1.0, dtype=dtype)
    found = compare_tensors(one, one + torch.finfo(dtype).eps)
    assert found is not None and (found.ulps, found.bit, found.index) == (1, 0, ())
    across = compare_tensors(torch.tensor([-least], dtype=dtype), torch.tensor([least], dtype=dtype))
    up = compare_tensors(torch.tensor([0.0], dtype=dtype), torch.tensor([least], dtype=dtype))
    assert across is not None and up is not None and up.ulps is not None and across.ulps == 2 * up.ulps
    zeros = compare_tensors(torch.tensor([-0.0], dtype=dtype), torch.tensor([0.0], dtype=dtype))
    assert zeros is not None and zeros.ulps == 0


def test_what_has_no_distance_is_said_in_words() -> None:
    nan = compare_tensors(torch.tensor([math.nan, 1.0]), torch.tensor([0.0, 2.0]))
    assert nan is not None and (nan.ulps, nan.largest_ulps, nan.to_json()["first"]) == (None, 1 << 23, "nan")
    shapes = compare_tensors(torch.zeros(2), torch.zeros(3))
    assert shapes is not None and shapes.describe() == "one is float32 [2], the other float32 [3]"
    assert compare_tensors(torch.tensor([math.nan]), torch.tensor([math.nan])) is None


def test_whole_numbers_are_their_distance_apart() -> None:
    pixels = compare_tensors(torch.tensor([[1, 250]], dtype=torch.uint8), torch.tensor([[1, 3]], dtype=torch.uint8))
    assert pixels is not None and (pixels.index, pixels.ulps) == ((0, 1), 247)
    assert pixels.describe() == "at [0, 1] A has 250 and B 3, 247 apart; 1 of 2 values differ, by up to 247"
    labels = compare_tensors(torch.tensor([-2]), torch.tensor([5]))
    assert labels is not None and labels.ulps == 7


@given(strategies.lists(FLOATS, min_size=1, max_size=20), strategies.data())
def test_a_flipped_bit_is_found_by_its_digest(values: list[float], data: strategies.DataObject) -> None:
    tensor = torch.tensor(values)
    place, bit = data.draw(strategies.integers(0, len(values) - 1)), data.draw(strategies.integers(0, 30))
    changed = tensor.clone()
    changed.view(torch.int32)[place] ^= 1 << bit
    found = find_flipped_bit(tensor, compute_tensor_digest(changed)[:16])
    assert found is not None and torch.equal(found.view(torch.int32), changed.view(torch.int32))


def test_a_search_that_would_take_long_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "MAX_HASHED_BYTES", 4 * 8**2 - 1)
    changed = torch.tensor([1.0, 2.0])
    assert find_flipped_bit(torch.tensor([1.0, 4.0]), compute_tensor_digest(changed)) is None
    assert find_flipped_bit(torch.tensor([1.0]), compute_tensor_digest(torch.tensor([3.0]))) is None


def test_chains_are_compared_by_the_steps_that_both_have() -> None:
    first = {10: {"a": "1"}, 20: {"a": "2", "b": "3"}, 30: {"a": "4"}}
    second = {5: {"a": "0"}, 10: {"a": "1"}, 20: {"a": "2", "b": "4"}, 30: {"a": "5"}}
    assert find_chain_difference(first, second) == ChainDifference(10, 20, ("b",))
    assert find_chain_difference(first, first) is None
    assert find_chain_difference({1: {"a": "1"}}, {2: {"a": "1"}}) is None


def test_a_chain_whose_steps_do_not_ascend_is_refused() -> None:
    lines = [{"step": 2, "tensors": {}}, {"step": 1, "tensors": {}}]
    with pytest.raises(RunError, match="its steps are not in ascending order"):
        list_digests(Path("run"), lines)
