"""Files of torch.save: what is in them comes out equal, and what would take more memory than it has bytes does not."""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from image_classifier.data.pickles import PickleError
from image_classifier.tracking.tensor_file import MAX_PICKLE_BYTES, MAX_RECORDS, rebuild_tensor_file

TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool)


def save(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def load(raw: bytes) -> Any:
    return torch.load(io.BytesIO(rebuild_tensor_file(raw)), weights_only=True)


def change(raw: bytes, edit: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """Write an archive again with other records."""
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(changed, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, edit(name, old.read(name)))
    return changed.getvalue()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(TYPES), st.lists(st.integers(0, 4), max_size=4), st.booleans()), max_size=5),
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats(allow_nan=False) | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=8,
    ),
)
def test_what_was_saved_comes_out_equal(tensors: list[tuple[torch.dtype, list[int], bool]], values: Any) -> None:
    made = [torch.randint(0, 2, shape).to(dtype) for dtype, shape, _ in tensors]
    made = [
        tensor.transpose(0, -1) if turned and tensor.dim() else tensor for tensor, (_, _, turned) in zip(made, tensors)
    ]
    read = load(save({"tensors": made, "again": made[:1], "values": values}))
    assert read["values"] == values
    for one, other in zip([*made, *made[:1]], [*read["tensors"], *read["again"]], strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_the_state_of_a_network_and_of_an_optimizer_come_out_equal() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    network(torch.rand(5, 3)).sum().backward()
    optimizer.step()
    read = load(save({"network": network.state_dict(), "optimizer": optimizer.state_dict()}))
    assert isinstance(read["network"], OrderedDict) and vars(read["network"]) == vars(network.state_dict())
    assert all(torch.equal(tensor, read["network"][name]) for name, tensor in network.state_dict().items())
    assert read["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]
    network.load_state_dict(read["network"])
    optimizer.load_state_dict(read["optimizer"])


def lie(raw: bytes, old: bytes, new: bytes) -> bytes:
    """Replace bytes of the pickle."""

    def edit(name: str, content: bytes) -> bytes:
        assert not name.endswith("data.pkl") or old in content
        return content.replace(old, new) if name.endswith("data.pkl") else content

    return change(raw, edit)


def add(raw: bytes, *names: str) -> bytes:
    """Add records to an archive."""
    changed = io.BytesIO(raw)
    with zipfile.ZipFile(changed, "a") as archive:
        for name in names:
            archive.writestr(name, b"")
    return changed.getvalue()


def build_tower() -> Any:
    level: Any = [1]
    for _ in range(60):
        level = [level, level]
    return level


ZEROS = save({"a": torch.zeros(1000)})


@pytest.mark.parametrize(
    "raw, reason",
    [
        (change(ZEROS, lambda _, content: content, zipfile.ZIP_DEFLATED), "is compressed"),
        (save(torch.zeros(1).expand(10**9)), "has a tensor that is larger than its storage"),
        (lie(ZEROS, b"M\xe8\x03tq\x07Q", b"J\0\0\0\x40tq\x07Q"), "has a storage that is not the record that it names"),
        (lie(ZEROS, b"K\0M\xe8\x03\x85", b"K\1M\xe8\x03\x85"), "has a tensor that is larger than its storage"),
        (lie(ZEROS, b"K\0M\xe8\x03\x85", b"K\0J\0\0\0\x40\x85"), "has a tensor that is larger than its storage"),
        (lie(ZEROS, b"K\1\x85", b"K\2\x85"), "has a tensor that is larger than its storage"),
        (lie(ZEROS, b"K\0M\xe8\x03\x85", b"K\0(" + b"K\1" * 100 + b"t"), "a tensor of more than 8 dimensions"),
        (save({"a": torch.zeros(3).to_sparse()}), "asks for 'torch._utils._rebuild_sparse_tensor'"),
        (save({"a": torch.Size([10**9])}), "asks for 'torch.Size'"),
        (save({"a": bytearray(10)}), "asks for"),
        (save(build_tower()), "uses a list again"),
        (save({(1, 2): 3}), "keys are texts or numbers, got a key of type tuple"),
        (save({"a": torch.zeros(3)}, _use_new_zipfile_serialization=False), "cannot be read: File is not a zip file"),
        (pickle.dumps({"a": 1}), "cannot be read: File is not a zip file"),
        (add(ZEROS, "other/data.pkl"), "has other records than torch.save writes"),
        (b"PK\1\2" * (MAX_RECORDS + 1), "is an archive of more than 20,000 records"),
        (save({"a": "x" * MAX_PICKLE_BYTES}), "has more than 8,388,608 bytes beside its tensors"),
        (ZEROS[:-100], "cannot be read"),
        (ZEROS[: len(ZEROS) // 2] + b"x" + ZEROS[len(ZEROS) // 2 + 1 :], "cannot be read: Bad CRC-32"),
        (b"", "cannot be read"),
    ],
    ids=lambda value: re.sub(r"\W+", " ", value)[:40] if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_would_take_more_than_it_has_is_refused(raw: bytes, reason: str) -> None:
    with pytest.raises(PickleError, match=reason):
        rebuild_tensor_file(raw)


def test_names_that_differ_by_case_alone_do_not_mislead() -> None:
    """torch finds records whatever their case; what was not checked is not passed on."""
    hostile = save({"a": torch.zeros(1).expand(10**9)})
    records = {
        name.partition("/")[2]: zipfile.ZipFile(io.BytesIO(hostile)).read(name)
        for name in zipfile.ZipFile(io.BytesIO(hostile)).namelist()
    }
    changed = io.BytesIO()
    with zipfile.ZipFile(changed, "w") as archive:
        archive.writestr("archive/DATA.PKL", records["data.pkl"])
        with zipfile.ZipFile(io.BytesIO(ZEROS)) as good:
            for name in good.namelist():
                archive.writestr(name, good.read(name))
    assert torch.equal(load(changed.getvalue())["a"], torch.zeros(1000))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_pickle_with_changed_bytes_is_read_or_refused(data: st.DataObject) -> None:
    def edit(name: str, content: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return content
        changed = bytearray(content)
        for _ in range(data.draw(st.integers(1, 3))):
            changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
        return bytes(changed)

    raw = change(save({"a": torch.zeros(3), "b": {"c": torch.ones(2, 2)}, "d": [1, "x"]}), edit)
    try:
        rebuild_tensor_file(raw)
    except PickleError as error:
        assert str(error).isprintable()
