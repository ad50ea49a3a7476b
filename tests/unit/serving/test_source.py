"""Where the served model comes from, and when it is loaded."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import pytest

from image_classifier.errors import ModelError
from image_classifier.serving.settings import ServerSettings
from image_classifier.serving.source import ModelSource
from tests.serving import write_model


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_model_is_loaded_once_however_it_was_begun(tmp_path: Path, has_begun: bool) -> None:
    path = write_model(tmp_path / "model.onnx")
    source = ModelSource(ServerSettings(model=str(path)), None)
    if has_begun:
        source.begin()
    predictor = source.load()
    assert predictor.model.run_name == "seed-0" and predictor.seconds_per_image < math.inf
    assert source.load_if_moved() is None
    write_model(path, seed=1)
    moved = source.load_if_moved()
    assert moved is not None and moved.model.run_name == "seed-1" and moved.seconds_per_image < math.inf


def test_what_was_begun_and_failed_is_said_by_whoever_waits_for_it(tmp_path: Path) -> None:
    source = ModelSource(ServerSettings(model=str(tmp_path / "nowhere.onnx")), None)
    source.begin()
    with pytest.raises(ModelError, match="no published model"):
        source.load()


class Mallinfo(ctypes.Structure):
    """What glibc's `mallinfo2` says."""

    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks".split()] + [
        (name, ctypes.c_size_t) for name in "fsmblks uordblks fordblks keepcost".split()
    ]


def is_mapped(num_bytes: int) -> bool:
    """Say whether an allocation is the system's own, and given back when it is freed."""
    library = ctypes.CDLL(None)
    library.mallinfo2.restype, library.malloc.restype = Mallinfo, ctypes.c_void_p
    before = library.mallinfo2().hblks
    address = ctypes.c_void_p(library.malloc(ctypes.c_size_t(num_bytes)))
    found: bool = library.mallinfo2().hblks > before
    library.free(address)
    return found


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="another C library than glibc 2.33")
def test_what_was_set_to_load_a_model_holds_no_longer_than_that(tmp_path: Path) -> None:
    ModelSource(ServerSettings(model=str(write_model(tmp_path / "model.onnx"))), None).load()
    assert not is_mapped(2**20), "each ordinary allocation would ask the system for memory"
