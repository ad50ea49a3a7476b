"""Reads untrusted pickles: returns only plain data and types that the reader allows; imports and executes nothing.

A pickle is a program for a stack machine that can call whatever it can import. This machine knows the instructions
that build plain data, and hands names and calls to the reader, which has a few stand-ins for what it expects. It ends
where a program is longer than a data set needs, or would make much out of little: a list that holds another again and
again, or a key whose hash takes long to compute.

`load_pickle` reads the pickles of CIFAR's python layout, in which arrays of integers are expected.
"""

from __future__ import annotations

import pickletools
import re
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from image_classifier.errors import DataError
from image_classifier.text import one_line

MAX_INSTRUCTIONS = 1_000_000
"""A batch of 50,000 images has 200,000."""

_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, type[Any]] = {"EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict}
_VALUES = frozenset(
    "INT BININT BININT1 BININT2 LONG1 FLOAT BINFLOAT UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES "
    "SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)
_BYTES = frozenset("STRING BINSTRING SHORT_BINSTRING".split())
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_GETS, _PUTS = frozenset("GET BINGET LONG_BINGET".split()), frozenset("PUT BINPUT LONG_BINPUT".split())


class PickleError(Exception):
    """A pickle is damaged or hostile; the message goes on after the file's name."""


class Reader(Protocol):
    """What a pickle may name and call; each method raises PickleError where it may not."""

    def find(self, name: str) -> object:
        """Find what stands for a name, MODULE.NAME."""

    def call(self, function: object, arguments: tuple[Any, ...]) -> object:
        """Call what `find` found."""

    def set_state(self, target: object, state: object) -> None:
        """Give a state to what `call` made."""

    def load(self, reference: object) -> object:
        """Load what lies outside the pickle."""


def interpret(content: bytes, reader: Reader) -> Any:
    """Carry out a pickle's instructions and return its value.

    Raises:
        PickleError: it is damaged, too long, or asks for anything that plain data do not need.
    """
    try:
        return _interpret(content, reader)
    except PickleError:
        raise
    except Exception as error:  # pickletools raises ValueError, and what int() and the decoders raise
        raise PickleError(f"is no readable pickle: {one_line(error)}; get it again") from error


# Over 50 lines: one case for each instruction that a pickle of data has.
def _interpret(content: bytes, reader: Reader) -> Any:
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks under each mark
    memo: dict[int, Any] = {}
    items: Any
    argument: Any
    for number, (opcode, argument, position) in enumerate(pickletools.genops(content)):
        name = opcode.name
        if number == MAX_INSTRUCTIONS:
            raise PickleError(f"is a pickle of more than {MAX_INSTRUCTIONS:,} instructions; get it again")
        if name in _VALUES:
            stack.append(argument)
        elif name in _BYTES:
            stack.append(argument.encode("latin-1"))
        elif name in _GETS:
            value = memo[argument]
            if isinstance(value, (list, tuple, dict)):
                raise PickleError(
                    f"is a pickle that uses a {type(value).__name__} again, which no data need; get it again"
                )
            stack.append(value)
        elif name in _PUTS:
            if argument > len(content):
                raise PickleError(f"is a pickle that wants {argument} memo entries; get it again")
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            size = _TUPLES[name]
            items = tuple(stack.pop() for _ in range(size))
            stack.append(items[::-1])
        elif name == "MARK":
            below.append(stack)
            stack = []
        elif name in ("TUPLE", "LIST"):
            items = stack
            stack = below.pop()
            stack.append(tuple(items) if name == "TUPLE" else items)
        elif name == "DICT":
            items = stack
            stack = below.pop()
            stack.append({})
            _set_items(stack[-1], items)
        elif name == "APPEND":
            item = stack.pop()
            _check_type(stack[-1], list).append(item)
        elif name == "APPENDS":
            items = stack
            stack = below.pop()
            _check_type(stack[-1], list).extend(items)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _set_items(stack[-1], [key, value])
        elif name == "SETITEMS":
            items = stack
            stack = below.pop()
            _set_items(stack[-1], items)
        elif name == "GLOBAL":
            stack.append(reader.find(argument.replace(" ", ".", 1)))
        elif name == "STACK_GLOBAL":
            last, module = stack.pop(), stack.pop()
            stack.append(reader.find(f"{_check_type(module, str)}.{_check_type(last, str)}"))
        elif name == "REDUCE":
            arguments = _check_type(stack.pop(), tuple)
            stack.append(reader.call(stack.pop(), arguments))
        elif name == "BUILD":
            state = stack.pop()
            reader.set_state(stack[-1], state)
        elif name == "BINPERSID":
            stack.append(reader.load(stack.pop()))
        elif name == "STOP":
            return stack.pop()
        elif name == "FRAME" and argument > len(content):
            raise PickleError("is no readable pickle: it ends within a frame; get it again")
        elif name not in ("PROTO", "FRAME"):
            raise PickleError(
                f"is a pickle with the instruction {name} at byte {position}, which no data need; it was not run. "
                "Get it from a source that you trust"
            )
    raise PickleError("is no readable pickle: it has no end; get it again")


def _check_type(value: Any, kind: type[Any]) -> Any:
    if not isinstance(value, kind):
        raise PickleError(f"is no readable pickle: a {type(value).__name__} instead of a {kind.__name__}; get it again")
    return value


def _set_items(target: Any, items: list[Any]) -> None:
    _check_type(target, dict)
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in (str, bytes, int) or type(key) is int and abs(key) >= 2**60:
            raise PickleError(
                f"must hold a dict whose keys are texts or numbers, got a key of type {type(key).__name__}"
            )
        target[key] = value


def load_pickle(content: bytes, name: str) -> dict[str, Any]:
    """Load a pickled dict of plain data and integer arrays; `name` is the file's, for messages.

    Byte strings stay `bytes`, keys become `str`, arrays `NDArray` of integers.

    Raises:
        DataError: the pickle is damaged, or asks for anything that a data set does not need. Nothing was run.
    """
    try:
        value = interpret(content, _ArrayReader(len(content)))
        if not isinstance(value, dict):
            raise PickleError(f"must hold a dict, got: {type(value).__name__}")
        return {_decode(key): item.value if isinstance(item, _Array) else item for key, item in value.items()}
    except PickleError as error:
        raise DataError(f"{name} {error}") from error


def _decode(key: object) -> str:
    if isinstance(key, bytes):
        return key.decode("latin-1")
    if isinstance(key, str):
        return key
    raise PickleError(f"must hold a dict whose keys are texts, got a key of type {type(key).__name__}")


class _Name:
    """What stands for one of the names that numpy's arrays and Python 3's bytes are pickled with."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Type:
    """What a call of numpy.dtype made: an integer type."""

    def __init__(self, code: object) -> None:
        text = _to_text(code)
        if not re.fullmatch("[iu][1248]", text):
            raise PickleError(f"is a pickle with an array of type {ascii(text)[:50]}; only integers are read")
        self.dtype: np.dtype[Any] = np.dtype(text)


class _Array:
    """What a call of numpy's _reconstruct or _frombuffer made: empty until it has its state."""

    def __init__(self) -> None:
        self.value: NDArray[Any] = np.empty(0, np.uint8)


class _ArrayReader:
    """Reads arrays of integers: numpy's names mean what is here, not numpy.

    Args:
        num_bytes: most that may be encoded; more would be the same text again and again.
    """

    def __init__(self, num_bytes: int) -> None:
        self._left = num_bytes

    def find(self, name: str) -> _Name:
        known = name.replace("numpy._core.", "numpy.core.")
        if known not in _NAMES:
            raise PickleError(
                f"is a pickle that wants to run {ascii(name)[:200]}, which no data set needs; it was not "
                "run. Get it from a source that you trust"
            )
        return _Name(known)

    def call(self, function: object, arguments: tuple[Any, ...]) -> object:
        if not isinstance(function, _Name) or function.name == "numpy.ndarray":
            raise PickleError("is a pickle that calls what is no function; get it again")
        if function.name == "_codecs.encode":
            return self._encode(*arguments)
        if function.name == "numpy.dtype":
            return _Type(arguments[0])
        array = _Array()
        if function.name == "numpy.core.multiarray._reconstruct":
            if not isinstance(arguments[0], _Name) or arguments[0].name != "numpy.ndarray":
                raise PickleError(
                    "is a pickle with an array of a subclass of numpy.ndarray; only plain arrays are read"
                )
        else:
            content, kind, shape, order = arguments
            array.value = _build_array(content, kind, shape, "F" if order == "F" else "C")
        return array

    def set_state(self, target: object, state: object) -> None:
        if isinstance(target, _Type) and isinstance(state, tuple):
            order = _to_text(state[1])
            if order not in ("|", "<", ">", "="):
                raise PickleError(f"is a pickle with an array of byte order {ascii(order)[:50]}")
            target.dtype = target.dtype.newbyteorder(cast(Any, order))
        elif isinstance(target, _Array) and isinstance(state, tuple):
            _, shape, kind, fortran, content = state
            target.value = _build_array(content, kind, shape, "F" if fortran else "C")
        else:
            raise PickleError("is a pickle that changes what is no array; get it again")

    def load(self, reference: object) -> object:
        raise PickleError("is a pickle with the instruction BINPERSID, which no data need; it was not run")

    def _encode(self, text: object, encoding: object) -> bytes:
        """Encode as Python 3 writes bytes into pickles of protocol 2 and below."""
        if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
            raise PickleError("is a pickle that encodes other than by latin1, which no data need; get it again")
        self._left -= len(text)
        if self._left < 0:
            raise PickleError("is a pickle that encodes a text again and again, which no data need; get it again")
        return text.encode("latin-1")


_NAMES = (
    "_codecs.encode",
    "numpy.ndarray",
    "numpy.dtype",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.numeric._frombuffer",
)


def _to_text(value: object) -> str:
    text = value.decode("latin-1") if isinstance(value, bytes) else value
    return text if isinstance(text, str) else type(value).__name__


def _build_array(content: object, kind: object, shape: object, order: Any) -> NDArray[Any]:
    if not isinstance(content, (bytes, bytearray)) or not isinstance(kind, _Type) or not isinstance(shape, tuple):
        raise PickleError("is a pickle with an array whose parts are of the wrong type; get it again")
    return np.frombuffer(content, kind.dtype).reshape(shape, order=order)
