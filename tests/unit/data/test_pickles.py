"""Pickles of CIFAR's python layout: the good ones come out equal, hostile and damaged ones run nothing."""

from __future__ import annotations

import builtins
import os
import pickle
import struct
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from image_classifier.data.pickles import load_pickle
from image_classifier.errors import DataError
from tests.datasets import pickle_python2

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
PIXELS = np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072)
ARRAY = b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tC\x01btR"


class Hostile:
    """Pickles into a call."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.call


def test_pickle_of_python_2_is_read() -> None:
    batch = load_pickle(pickle_python2({"data": PIXELS, "labels": [3, 7], "filenames": ["a.png", "b.png"]}), "batch")
    assert batch["labels"] == [3, 7]
    assert batch["filenames"] == [b"a.png", b"b.png"]
    np.testing.assert_array_equal(batch["data"], PIXELS)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("key", ["data", b"data"])
def test_pickle_of_python_3_is_read_in_each_protocol(protocol: int, key: str | bytes) -> None:
    content = pickle.dumps({key: PIXELS, "labels": [3, 7], "mean": 1.5, "none": None}, protocol)
    batch = load_pickle(content, "batch")
    assert batch["labels"] == [3, 7]
    assert batch["data"].dtype == np.uint8
    np.testing.assert_array_equal(batch["data"], PIXELS)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", ["<i8", ">i4", "|i1", "<u2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_integers_are_read_in_each_byte_order_and_layout(protocol: int, kind: str, order: Any) -> None:
    array = np.asarray(np.arange(-6, 6).reshape(3, 4), kind, order=order)
    read = load_pickle(pickle.dumps({"labels": array}, protocol), "batch")["labels"]
    np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "place", [lambda x: x, lambda x: {"data": x}, lambda x: {"data": [[(1, x)]]}, lambda x: {x: 1}]
)
def test_hostile_pickle_runs_nothing(protocol: int, place: Callable[[object], object], tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    content = pickle.dumps(place(Hostile(os.system, f"touch {trace}")), protocol)
    pickle.loads(content)  # a control: an ordinary unpickler does run it
    assert trace.exists()
    trace.unlink()
    with pytest.raises(DataError, match=r"batch_7 is a pickle that wants to run '(posix|nt)\.system'"):
        load_pickle(content, "batch_7")
    assert not trace.exists()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "function, name",
    [
        (builtins.eval, "eval"),
        (builtins.exec, "exec"),
        (builtins.__import__, "__import__"),
        (builtins.getattr, "getattr"),
        (builtins.open, "open"),
        (builtins.bytearray, "bytearray"),
        (subprocess.Popen, "Popen"),
        (np.load, "load"),
        (np.empty, "empty"),
        (np.frombuffer, "frombuffer"),
        (np.full, "full"),
    ],
)
def test_every_other_function_is_refused_by_name(protocol: int, function: Callable[..., Any], name: str) -> None:
    content = pickle.dumps({"data": Hostile(function, "1")}, protocol)
    with pytest.raises(DataError, match=rf"wants to run '[\w.]*\b{name}'.* it was not run"):
        load_pickle(content, "batch")


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"cos\nsystem\n(S'id'\ntR.", "os.system"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02id\x85R.", "os.system"),
        (b"\x80\x04\x8c\x05numpy\x8c\x11ndarray.__class__\x93.", "numpy.ndarray.__class__"),
        (b"\x80\x04\x8c\x05numpy\x8c\x1ectypeslib.ctypes.cdll.LoadLibr\x93.", "ctypeslib"),
        (b"cnumpy\nndarray\\x0a\n.", "ndarray"),
        (b"c__main__\n\x1b[2J\n.", "__main__"),
        (b"(S'id'\nios\nsystem\n.", "instruction INST"),
        (b"(cos\nsystem\nS'id'\no.", "os.system"),
        (b"(S'id'\no.", "instruction OBJ"),
        (b"\x80\x02cnumpy\nndarray\n)\x81.", "instruction NEWOBJ"),
        (b"\x80\x04cnumpy\nndarray\n)}\x92.", "instruction NEWOBJ_EX"),
        (b"\x80\x02\x82\x01.", "instruction EXT1"),
        (b"Pid\n.", "instruction PERSID"),
        (b"\x80\x02K\x01Q.", "instruction BINPERSID"),
        (b"\x80\x05\x97.", "instruction NEXT_BUFFER"),
        (b"\x80\x02]2.", "instruction DUP"),
        (b"\x80\x02\x8b\x00\x00\x00\x00.", "instruction LONG4"),
    ],
)
def test_hand_written_hostile_pickle_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        load_pickle(content, "batch")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "array", [np.array([{}, 1], object), np.zeros(3), np.array(["a"]), np.zeros(2, "i4,u1"), np.ma.ones(2)]
)
def test_arrays_of_anything_but_integers_are_refused(protocol: int, array: Any) -> None:
    with pytest.raises(DataError, match="^batch is a pickle"):
        load_pickle(pickle.dumps({"data": array}, protocol), "batch")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"\x80\x02}r\xff\xff\xff\x7f.", id="memo index of 2**31"),
        pytest.param(b"\x80\x02}p99999999999\n.", id="memo index in digits"),
        pytest.param(b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"abc.", id="byte array of 2**40"),
        pytest.param(b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"abc.", id="bytes of 2**40"),
        pytest.param(b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"abc.", id="text of 2**40"),
        pytest.param(b"\x80\x02T\xff\xff\xff\x7fabc.", id="string of 2**31"),
        pytest.param(b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"}.", id="frame of 2**40"),
        pytest.param(ARRAY.replace(b"K\x00", b"\x8a\x06" + struct.pack("<Q", 2**40)[:6]) + b".", id="array of 2**40"),
        pytest.param(
            ARRAY
            + b"(K\x01(\x8a\x06"
            + struct.pack("<Q", 2**40)[:6]
            + b"tcnumpy\ndtype\n(X\x02\x00\x00\x00u1tR\x89C\x01atb.",
            id="shape of 2**40",
        ),
        pytest.param(b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x04\x00\x00\x00idnatR.", id="another codec"),
        pytest.param(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", id="deep lists"),
    ],
)
def test_memory_bomb_is_refused_before_it_takes_memory(content: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="^batch "):
            load_pickle(content, "batch")
        assert tracemalloc.get_traced_memory()[1] < 32_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"\x80\x02}K\x01\x85q\0" + b"h\0\x86q\0" * 60 + b"K\1s.", "uses a tuple again, which no data need"),
        (b"\x80\x02}(U\x01a]q\0h\0h\0\x86u.", "uses a list again, which no data need"),
        (b"\x80\x02}(K\x01\x85K\x01u.", "keys are texts or numbers, got a key of type tuple"),
        (b"\x80\x02}(\x8a\x09" + b"\xff" * 8 + b"\1K\x01u.", "keys are texts or numbers, got a key of type int"),
        (b"\x80\x02}(" + b"]" * 1_000_000 + b"u.", "more than 1,000,000 instructions"),
        (
            b"\x80\x02c_codecs\nencode\nq\0X\x10\x27\0\0"
            + b"a" * 10_000
            + b"q\1U\x06latin1q\2"
            + b"h\0h\1h\2\x86R" * 100
            + b".",
            "encodes a text again and again",
        ),
    ],
)
def test_what_makes_much_out_of_little_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=f"^batch .*{reason}"):
        load_pickle(content, "batch")


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(b"cnumpy\nndarray\n(X\x01\x00\x00\x00aX\x01\x00\x00\x00bd\x62.", id="state of ndarray"),
        pytest.param(b"cnumpy\ndtype\n(N(X\x08\x00\x00\x00__call__K\x01dtb.", id="slots of dtype"),
        pytest.param(
            b"cnumpy._core.multiarray\n_reconstruct\n(X\x08\x00\x00\x00__call__K\x01db.", id="state of a function"
        ),
        pytest.param(b"cnumpy\nndarray\n(K\x09tR.", id="call of ndarray"),
        pytest.param(
            b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\ndtype\n(K\x00tC\x01btR.", id="subclass of ndarray"
        ),
        pytest.param(
            b"cnumpy._core.numeric\n_frombuffer\n(C\x01aNK\x01X\x01\x00\x00\x00CtR.", id="parts of other types"
        ),
        pytest.param(b"cnumpy\ndtype\n(X\x02\x00\x00\x00u1tR(K\x03X\x01\x00\x00\x00?tb.", id="another byte order"),
    ],
)
def test_the_stand_ins_can_neither_be_changed_nor_misused(build: bytes) -> None:
    with pytest.raises(DataError):
        load_pickle(build, "batch")
    np.testing.assert_array_equal(load_pickle(pickle.dumps({"data": PIXELS}), "batch")["data"], PIXELS)


def test_truncation_at_each_length_is_refused() -> None:
    content = pickle_python2({"data": PIXELS[:1], "labels": [3]})
    for length in [*range(200), *range(200, len(content), 97), len(content) - 1]:
        with pytest.raises(DataError, match="^batch .*get it again"):
            load_pickle(content[:length], "batch")


@pytest.mark.parametrize("value", [[1], None, "text", 3, {1: 2}, {(): 2}])
def test_anything_but_a_dict_with_texts_as_keys_is_refused(value: object) -> None:
    with pytest.raises(DataError, match="must hold a dict"):
        load_pickle(pickle.dumps(value), "batch")


@settings(max_examples=300, deadline=None)
@given(
    st.data(),
    st.sampled_from(
        [
            pickle_python2({"data": PIXELS[:1], "labels": [3]}),
            *(pickle.dumps({"data": PIXELS[:1, :8], "labels": [3]}, p) for p in PROTOCOLS),
        ]
    ),
)
def test_a_pickle_with_changed_bytes_loads_or_is_refused(data: st.DataObject, content: bytes) -> None:
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, min(len(changed), 400) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert isinstance(load_pickle(bytes(changed), "batch"), dict)
    except DataError as error:
        assert str(error).isprintable()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(content: bytes) -> None:
    try:
        assert isinstance(load_pickle(content, "batch"), dict)
    except DataError as error:
        assert str(error).isprintable()
