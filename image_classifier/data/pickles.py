"""Read the pickles of CIFAR's python layout without trusting them: data comes out, nothing is run.

A pickle is a program for a stack machine that can call whatever it can import. Here it meets three checks. The
opcodes are gone through first: only those that build plain data and arrays may occur, with sizes that the file
really has. `find_class` then knows the five names that numpy's reconstruction of an array needs, and no other.
And behind these names are stand-ins, not numpy: they accept exactly the arguments that an array of integers has.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from image_classifier.data.content import one_line
from image_classifier.errors import DataError

_OPCODES = frozenset(
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG1 FLOAT BINFLOAT "
    "STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 "
    "BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 "
    "TUPLE3 EMPTY_DICT DICT SETITEM SETITEMS GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE "
    "GLOBAL STACK_GLOBAL REDUCE BUILD".split()
)
"""Plain data and calls of what find_class allows. Left out: INST, OBJ, NEWOBJ, EXT*, PERSID and the like."""


def load_pickle(content: bytes, name: str) -> dict[str, Any]:
    """Load a pickled dict of plain data and integer arrays; `name` is the file's, for messages.

    Byte strings stay `bytes`, keys become `str`, arrays `NDArray` of integers.

    Raises:
        DataError: the pickle is damaged, or asks for anything that a data set does not need. Nothing was run.
    """
    _check_opcodes(content, name)
    try:
        value = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except DataError as error:
        raise DataError(f"{name} {error}") from None
    except Exception as error:  # a damaged pickle can raise anything that the stack machine's steps can raise
        raise DataError(f"{name} is no readable pickle: {one_line(error)}; get the data set again") from error
    if not isinstance(value, dict):
        raise DataError(f"{name} must hold a dict, got: {type(value).__name__}")
    return {_decode(key, name): item.value if isinstance(item, _Array) else item for key, item in value.items()}


def _decode(key: object, name: str) -> str:
    if isinstance(key, bytes):
        return key.decode("latin-1")
    if isinstance(key, str):
        return key
    raise DataError(f"{name} must hold a dict whose keys are texts, got a key of type {type(key).__name__}")


def _check_opcodes(content: bytes, name: str) -> None:
    try:
        for opcode, argument, position in pickletools.genops(content):
            if opcode.name not in _OPCODES:
                raise DataError(
                    f"{name} is a pickle with the instruction {opcode.name} at byte {position}, which no data set "
                    "needs; it was not run. Get the data set from a source that you trust"
                )
            # The unpickler makes its memo as large as the highest index asks for, at 16 bytes an entry.
            if opcode.name in ("PUT", "LONG_BINPUT") and int(str(argument)) > len(content):
                raise DataError(f"{name} is a pickle that wants {argument} memo entries; get the data set again")
    except DataError:
        raise
    except Exception as error:  # genops raises ValueError, and what int() and the decoders raise
        raise DataError(f"{name} is no readable pickle: {one_line(error)}; get the data set again") from error


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        stand_in = _STAND_INS.get((module, name))
        if stand_in is None:
            raise DataError(
                f"is a pickle that wants to run {ascii(f'{module}.{name}')[:200]}, which no data set needs; it was not "
                "run. Get the data set from a source that you trust"
            )
        return stand_in


class _Encode:
    """_codecs.encode, as Python 3 writes bytes into pickles of protocol 2 and below."""

    __slots__ = ()

    def __call__(self, text: object, encoding: object) -> bytes:
        if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
            raise DataError(f"is a pickle that encodes with {ascii(encoding)[:50]}, which no data set needs")
        return text.encode("latin-1")


class _Type:
    """What a call of numpy.dtype made: an integer type."""

    __slots__ = ("dtype",)

    def __init__(self, code: object) -> None:
        text = code.decode("latin-1") if isinstance(code, bytes) else code
        if not isinstance(text, str) or not re.fullmatch("[iu][1248]", text):
            raise DataError(f"is a pickle with an array of type {ascii(text)[:50]}; only integers are read")
        self.dtype: np.dtype[Any] = np.dtype(text)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order: Any = state[1].decode("latin-1") if isinstance(state[1], bytes) else state[1]
        if order not in ("|", "<", ">", "="):
            raise DataError(f"is a pickle with an array of byte order {ascii(order)[:50]}")
        self.dtype = self.dtype.newbyteorder(order)


class _MakeType:
    """numpy.dtype"""

    __slots__ = ()

    def __call__(self, code: object, align: object = False, copy: object = True) -> _Type:
        return _Type(code)


class _Array:
    """What a call of numpy's _reconstruct made: empty until the state is set."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: NDArray[Any] = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, content = state
        self.value = _build_array(content, kind, shape, "F" if fortran else "C")


class _Reconstruct:
    """numpy.core.multiarray._reconstruct"""

    __slots__ = ()

    def __call__(self, subtype: object, shape: object, code: object) -> _Array:
        if subtype is not _NDARRAY:
            raise DataError("is a pickle with an array of a subclass of numpy.ndarray; only plain arrays are read")
        return _Array()


class _FromBuffer:
    """numpy.core.numeric._frombuffer, as pickles of protocol 5 have it."""

    __slots__ = ()

    def __call__(self, content: object, kind: object, shape: object, order: object) -> _Array:
        array = _Array()
        array.value = _build_array(content, kind, shape, "F" if order == "F" else "C")
        return array


def _build_array(content: object, kind: object, shape: object, order: Any) -> NDArray[Any]:
    if not isinstance(content, (bytes, bytearray)) or not isinstance(kind, _Type) or not isinstance(shape, tuple):
        raise DataError("is a pickle with an array whose parts are of the wrong type; get the data set again")
    return np.frombuffer(content, kind.dtype).reshape(shape, order=order)


# Without attributes and without a call, so that a pickle's BUILD can change nothing and its REDUCE calls nothing.
_NDARRAY = object()
_STAND_INS: dict[tuple[str, str], object] = {
    ("_codecs", "encode"): _Encode(),
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _MakeType(),
    ("numpy.core.multiarray", "_reconstruct"): _Reconstruct(),
    ("numpy._core.multiarray", "_reconstruct"): _Reconstruct(),
    ("numpy.core.numeric", "_frombuffer"): _FromBuffer(),
    ("numpy._core.numeric", "_frombuffer"): _FromBuffer(),
}
