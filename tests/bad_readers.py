"""Readers that do what none may do: what `tests.fuzz` must find."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from image_classifier.errors import DataError
from tests.fuzz import Reader


def build_readers(scratch: Path) -> list[Reader]:
    """Build a good reader, and one for each kind of finding."""

    def read(name: str, content: bytes, folder: Path) -> object:
        raise DataError("it is refused")

    def fail(name: str, content: bytes, folder: Path) -> object:
        return content[10**6]

    def ramble(name: str, content: bytes, folder: Path) -> object:
        raise DataError("it is refused,\nand that is that")

    def ask(name: str, content: bytes, folder: Path) -> object:
        return bytearray(2**31)

    def swallow(name: str, content: bytes, folder: Path) -> object:
        try:
            return np.ones(2**28)
        except Exception as error:
            raise DataError("it is damaged") from error

    def compute(name: str, content: bytes, folder: Path) -> object:
        while True:
            pass

    def crash(name: str, content: bytes, folder: Path) -> object:
        os.abort()

    deeds = {"refused": read, "exception": fail, "message": ramble, "time": compute, "crash": crash}
    return [
        Reader(kind, {"seed": b"content"}, lambda chance, content: content + chance.randbytes(2), deed)
        for kind, deed in (*deeds.items(), ("memory", ask), ("memory that is said to be damage", swallow))
    ]
