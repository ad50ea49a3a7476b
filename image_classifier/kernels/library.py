"""Loads the kernel library for this processor, or for a lower instruction set if it is capped.

What they are for is said in torch's terms in `training/small_steps.py`, `large_steps.py` and `portable_steps.py`, so
that every network is served: an operation that is met with arguments that a kernel can take is computed by it, all
others stay torch's.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from image_classifier.errors import SettingsError

FOLDER = Path(__file__).parent
LIBRARIES = "libraries.json"
HEADER = "kernels.h"

_TYPES = {"int64_t": ctypes.c_int64, "double": ctypes.c_double}


class Arguments(ctypes.Structure):
    """What a kernel takes: a struct of `kernels.h`. Addresses are whole numbers, 0 is none."""


class Kernels:
    """The kernels of a library, called by name.

    Attributes:
        constants: of `kernels.h`, by name.
    """

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._brief_library = ctypes.PyDLL(str(path))
        self.constants, self._structs = read_header()

    def prepare(self, kernel: str, **values: float | Sequence[int]) -> Arguments:
        """Make the arguments of a kernel.

        Raises:
            TypeError: one is missing, or there is no such one.
        """
        struct = self._structs[split_name(kernel)[0]]
        names = {field[0] for field in struct._fields_}
        if values.keys() != names:
            raise TypeError(f"{kernel} takes {', '.join(sorted(names))}, got: {', '.join(sorted(values))}")
        return struct(**values)

    def has_scratch(self, kernel: str) -> bool:
        """Say whether a kernel needs memory."""
        return hasattr(self._structs[split_name(kernel)[0]], "scratch")

    def count_scratch(self, kernel: str, arguments: Arguments) -> int:
        """Count the bytes of memory that a kernel needs."""
        name, kind = split_name(kernel)
        count = getattr(self._library, f"{name}_scratch{kind}")
        count.restype = ctypes.c_int64
        num_bytes: int = count(ctypes.byref(arguments))
        return num_bytes

    def call(self, kernel: str, arguments: Arguments, *, is_brief: bool = False) -> None:
        """Call a kernel.

        Args:
            is_brief: whether it ends in a few microseconds, so that other threads of Python may wait meanwhile: to let
                them in, and to wait until they are done, would take longer.
        """
        library = self._brief_library if is_brief else self._library
        getattr(library, kernel)(ctypes.byref(arguments))

    def chain(self, calls: Sequence[tuple[str, Arguments]]) -> Chain:
        """Put calls that follow each other into one."""
        return Chain(self._library, calls)


class Chain:
    """Calls of kernels one after the other, in one call of Python; their arguments may change in between."""

    def __init__(self, library: ctypes.CDLL, calls: Sequence[tuple[str, Arguments]]) -> None:
        words = [
            address
            for kernel, arguments in calls
            for address in (ctypes.cast(getattr(library, kernel), ctypes.c_void_p).value, ctypes.addressof(arguments))
        ]
        self._arguments = [arguments for _, arguments in calls]  # to which the calls point
        self._calls = (ctypes.c_void_p * len(words))(*words)  # each struct call has two addresses
        self._run = library.run
        self._count = ctypes.c_int64(len(calls))

    def __call__(self) -> None:
        self._run(self._calls, self._count)


@cache
def read_header() -> tuple[dict[str, int], dict[str, type[Arguments]]]:
    """Read the constants and the structs of `kernels.h`, by name."""
    text = re.sub(r"/\*.*?\*/", "", (FOLDER / HEADER).read_text(encoding="utf-8"), flags=re.DOTALL)
    constants = {name: int(value) for name, value in re.findall(r"(\w+) = (\d+)", text)}
    structs = {
        name: type(
            name, (Arguments,), {"_fields_": [field for line in body.split(";") for field in _read_fields(line)]}
        )
        for name, body in re.findall(r"struct (\w+) \{(.*?)\};", text, flags=re.DOTALL)
        if name != "call"
    }
    return constants, structs


def _read_fields(declaration: str) -> list[tuple[str, Any]]:
    """Read the fields of a declaration, such as `const float *a, *b` or `int64_t n, strides[4]`."""
    if not declaration.strip():
        return []
    kind, names = declaration.replace("const ", "").split(maxsplit=1)
    fields: list[tuple[str, Any]] = []
    for star, name, length in re.findall(r"(\*?)(\w+)(?:\[(\d+)\])?", names):
        of_one: Any = ctypes.c_void_p if star else _TYPES[kind]
        fields.append((name, of_one * int(length) if length else of_one))
    return fields


def split_name(kernel: str) -> tuple[str, str]:
    """Split a kernel's name into that of its struct, and the type of numbers or the layout that it is for."""
    if kernel in read_header()[1]:
        return kernel, ""
    name, _, kind = kernel.rpartition("_")
    return name, f"_{kind}"


@cache
def load_kernels(instruction_set: str) -> Kernels:
    """Load the kernels for an instruction set.

    Raises:
        SettingsError: the package has none, they are not those that it was built with, or the system refuses them.
    """
    path, digest = _find_library(instruction_set)
    try:
        if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise SettingsError(f"{path} is not what the package was built with; install the package again")
        return Kernels(path)
    except OSError as error:
        raise SettingsError(f"the kernels cannot be loaded: {error}; install the package again") from error


def get_kernels_digest(instruction_set: str) -> str:
    """Get the sha256 of the library with the kernels for an instruction set, as it was built.

    Raises:
        SettingsError: the package has none.
    """
    return _find_library(instruction_set)[1]


def get_source_digest() -> str:
    """Get the sha256 of what the kernels were built from: the same for all processors, which get the same bits.

    Raises:
        SettingsError: the package has no kernels.
    """
    digest: str = _read_facts()["digest"]
    return digest


def _read_facts() -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads((FOLDER / LIBRARIES).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(
            f"the package was installed without its kernels ({error}); install it again, or choose --engine eager"
        ) from error
    return facts


def _find_library(instruction_set: str) -> tuple[Path, str]:
    facts = _read_facts()
    library = facts["libraries"].get(instruction_set)
    if library is None:
        known = ", ".join(facts["libraries"])
        raise SettingsError(f"there are no kernels for {instruction_set}, but for {known}; choose --engine eager")
    return FOLDER / library["file"], library["sha256"]
