"""Safetensors: what the format's own library wrote is read, and what is no such file is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from image_classifier.tracking.safetensors import read_safetensors
from image_classifier.tracking.tensor_file import MAX_HEADER_BYTES

WRITTEN = (
    b'H\x01\x00\x00\x00\x00\x00\x00{"__metadata__":{"format":"pt"},"a":{"dtype":"I64","shape":[2],"data_offsets":'
    b'[0,16]},"one":{"dtype":"F64","shape":[],"data_offsets":[16,24]},"b.weight":{"dtype":"F32","shape":[2,3],'
    b'"data_offsets":[24,48]},"none":{"dtype":"F32","shape":[0,3],"data_offsets":[48,48]},"h":{"dtype":"F16","shape":'
    b'[1],"data_offsets":[48,50]}}       \x01\x00\x00\x00\x00\x00\x00\x00\xfe\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00'
    b"\x00\x00\x00\x08@\x00\x00\x00\x00\x00\x00\x80?\x00\x00\x00@\x00\x00@@\x00\x00\x80@\x00\x00\xa0@\x008"
)
"""What safetensors.numpy.save of version 0.8.0 wrote."""


def build(header: Any, body: bytes = b"") -> bytes:
    """Build a file with this header."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(content).to_bytes(8, "little") + content + body


def tensor(begin: int, end: int, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    """Describe a tensor as a header does."""
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def test_what_the_library_wrote_is_read() -> None:
    expected = {
        "a": torch.tensor([1, -2]),
        "one": torch.tensor(3.0, dtype=torch.float64),
        "b.weight": torch.arange(6.0).reshape(2, 3),
        "none": torch.zeros(0, 3),
        "h": torch.tensor([0.5], dtype=torch.float16),
    }
    tensors = read_safetensors(WRITTEN)
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert tensors[name].dtype == value.dtype and torch.equal(tensors[name], value), name


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "no header"),
        (WRITTEN[:100], "no header"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b" " * (MAX_HEADER_BYTES + 1), "no header"),
        (build([]), "is no object"),
        (build(b'{"a": NaN}'), "NaN"),
        (build({"a": 3}), "'a' has no offsets"),
        (build({"a": {**tensor(0, 1), "data_offsets": [0]}}, b"1"), "'a' has no offsets"),
        (build({"a": {**tensor(0, 1), "data_offsets": [0, True]}}, b"1"), "'a' has no offsets"),
        (build({"a": tensor(0, 1, dtype="C64")}, b"1"), "type that is not known: 'C64'"),
        (build({"a": tensor(0, 1, dtype=[])}, b"1"), "type that is not known"),
        (build({"a": tensor(0, 1, [-1])}, b"1"), "'a' has no shape"),
        (build({"a": tensor(0, 1, [1] * 9)}, b"1"), "'a' has no shape"),
        (build({"a": tensor(0, 1, [2**40])}, b"1"), "another size than its shape"),
        (build({"a": tensor(0, 2)}, b"1"), "'a' does not lie"),
        (build({"a": tensor(0, 2), "b": tensor(1, 3)}, b"123"), "'b' does not lie where the one before it ends"),
        (build({"a": tensor(0, 1), "b": tensor(2, 3)}, b"123"), "'b' does not lie where the one before it ends"),
        (build({"a": tensor(0, 1)}, b"123"), "2 bytes at its end belong to no tensor"),
    ],
)
def test_what_is_no_such_file_is_refused(raw: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_safetensors(raw)


@given(st.integers(0, len(WRITTEN) - 1), st.binary(min_size=1, max_size=3))
def test_a_changed_file_gives_tensors_or_is_refused(place: int, change: bytes) -> None:
    changed = WRITTEN[:place] + change + WRITTEN[place + len(change) :]
    try:
        tensors = read_safetensors(changed)
    except ValueError:
        return
    assert sum(each.nbytes for each in tensors.values()) <= len(changed)
