"""The kernels as they are installed: those that the package was built with, or none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from image_classifier.errors import SettingsError
from image_classifier.kernels import library
from image_classifier.kernels.library import LIBRARIES, load_kernels
from image_classifier.training.determinism import get_instruction_set


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the kernels as they are installed, from which they are loaded."""
    copy = shutil.copytree(library.FOLDER, tmp_path / "kernels")
    monkeypatch.setattr(library, "FOLDER", copy)
    load_kernels.cache_clear()
    yield copy
    load_kernels.cache_clear()


def test_other_kernels_than_the_package_was_built_with_are_refused(installed: Path) -> None:
    path = installed / json.loads((installed / LIBRARIES).read_text())["libraries"][get_instruction_set()]["file"]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=f"^{path} is not what the package was built with; install the package"):
        load_kernels(get_instruction_set())
    path.unlink()
    with pytest.raises(SettingsError, match="^the kernels cannot be loaded: .*; install the package again$"):
        load_kernels(get_instruction_set())


def test_a_package_without_kernels_says_how_to_go_on(installed: Path) -> None:
    with pytest.raises(SettingsError, match="no kernels for z80, but for avx2, .*; choose --engine eager$"):
        load_kernels("z80")
    (installed / LIBRARIES).unlink()
    with pytest.raises(SettingsError, match="installed without its kernels .*install it again, or choose --engine"):
        load_kernels(get_instruction_set())
