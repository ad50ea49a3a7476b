"""Checks a file of torch.save before torch.load reads it, so that it cannot take more memory than its size.

Such a file is an archive with a pickle, which names tensors, and a record of bytes for each of their storages. Whatever
unpacks to more is refused: records that are compressed, tensors that are larger than their storage, values that hold
each other again and again.
"""

from __future__ import annotations

import io
import math
import zipfile
from typing import Any

from image_classifier.data.pickles import PickleError, interpret
from image_classifier.text import one_line

MAX_BYTES = 2**29
MAX_HEADER_BYTES = 2**23
"""Of a safetensors file."""
MAX_RECORDS = 20_000
MAX_PICKLE_BYTES = 2**23

_ENTRY = b"PK\1\2"
"""Begins each entry of an archive's directory."""
_ITEM_SIZES = {
    **dict.fromkeys(("ByteStorage", "CharStorage", "BoolStorage"), 1),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("FloatStorage", "IntStorage"), 4),
    **dict.fromkeys(("DoubleStorage", "LongStorage"), 8),
}


def rebuild_tensor_file(raw: bytes) -> bytes:
    """Check a file of torch.save, and build it again out of what was checked and nothing else.

    So there is one way to read it: archives may have several directories, and names that differ by case alone.

    Raises:
        PickleError: it is damaged, or would take more memory than it has bytes; goes on after the file's name.
    """
    if raw.count(_ENTRY) > MAX_RECORDS:
        raise PickleError(f"is an archive of more than {MAX_RECORDS:,} records; get it again")
    rebuilt = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(rebuilt, "w", zipfile.ZIP_STORED) as new:
            records = _list_records(old.infolist(), len(raw))
            sizes = {name.removeprefix("data/"): record.file_size for name, record in records.items()}
            interpret(old.read(records["data.pkl"]), _TensorReader(sizes))
            for name, record in records.items():
                new.writestr(f"archive/{name}", old.read(record))
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, RuntimeError) as error:
        # RuntimeError: zipfile's, of a record that is encrypted or of a later format.
        raise PickleError(f"cannot be read: {one_line(error)}; get it again") from error
    return rebuilt.getvalue()


def _list_records(entries: list[zipfile.ZipInfo], num_bytes: int) -> dict[str, zipfile.ZipInfo]:
    """List the records that torch.load reads, by their name below the archive's folder."""
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise PickleError("is compressed, which torch.save does not do; get it again")
    if sum(entry.file_size for entry in entries) > num_bytes:
        raise PickleError("has records that overlap; get it again")
    named = {entry.filename.partition("/")[2]: entry for entry in entries}
    if len(named) < len(entries) or not {"data.pkl", "version"} <= named.keys():
        raise PickleError("has other records than torch.save writes; get it again")
    if named["data.pkl"].file_size > MAX_PICKLE_BYTES:
        raise PickleError(f"has more than {MAX_PICKLE_BYTES:,} bytes beside its tensors; get it again")
    wanted = ("data.pkl", "version", "byteorder")
    return {name: entry for name, entry in named.items() if name in wanted or name.startswith("data/")}


class _Call:
    """What stands for a function, or a type of storage, that tensors are pickled with."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Storage:
    def __init__(self, num_items: int) -> None:
        self.num_items = num_items


class _Tensor:
    pass


class _TensorReader:
    """Reads tensors that lie in their storages, and dictionaries; it builds none.

    Args:
        sizes: bytes of each record.
    """

    def __init__(self, sizes: dict[str, int]) -> None:
        self._sizes = sizes

    def find(self, name: str) -> object:
        known = (
            "torch._utils._rebuild_tensor_v2",
            "torch._utils._rebuild_parameter",
            "collections.OrderedDict",
            *(f"torch.{kind}" for kind in _ITEM_SIZES),
        )
        if name not in known:
            raise PickleError(f"asks for {ascii(name)[:100]}, which no model and no checkpoint of this package needs")
        return _Call(name)

    def call(self, function: object, arguments: tuple[Any, ...]) -> object:
        name = function.name if isinstance(function, _Call) else ""
        if name == "collections.OrderedDict" and not arguments:
            return {}
        if name == "torch._utils._rebuild_parameter" and isinstance(arguments[0], _Tensor):
            return arguments[0]
        if name != "torch._utils._rebuild_tensor_v2":
            raise PickleError("calls what is no function; get it again")
        storage, offset, shape, strides, *_ = arguments
        if len(shape) > 8:
            raise PickleError("has a tensor of more than 8 dimensions; get it again")
        numbers = (offset, *shape, *strides)
        if not isinstance(storage, _Storage) or any(type(number) is not int or number < 0 for number in numbers):
            raise PickleError("has a tensor without a storage or a shape; get it again")
        num_items = math.prod(shape)
        last = (
            offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if num_items else 0
        )
        if num_items > storage.num_items or last >= max(storage.num_items, 1):
            raise PickleError("has a tensor that is larger than its storage; get it again")
        return _Tensor()

    def set_state(self, target: object, state: object) -> None:
        if not isinstance(target, dict):  # a state_dict has the versions of its modules as an attribute
            raise PickleError("changes what is no dictionary; get it again")

    def load(self, reference: object) -> object:
        kind, storage, key, _, num_items = reference if isinstance(reference, tuple) else (None,) * 5
        size = _ITEM_SIZES.get(storage.name.removeprefix("torch.")) if isinstance(storage, _Call) else None
        if kind != "storage" or size is None or type(num_items) is not int or self._sizes.get(key) != num_items * size:
            raise PickleError("has a storage that is not the record that it names; get it again")
        return _Storage(num_items)
