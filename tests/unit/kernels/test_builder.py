"""The building of the kernels: the same bytes anywhere, for other platforms too."""

from __future__ import annotations

import json
from pathlib import Path

from image_classifier.kernels.builder import FOLDER, LIBRARIES, build_libraries, compute_source_digest, get_target


def test_the_kernels_are_built_from_the_sources_beside_them() -> None:
    facts = json.loads((FOLDER / LIBRARIES).read_text())
    assert facts["digest"] == compute_source_digest(), "the sources changed: install the package again"


def test_the_same_kernels_are_built_anywhere_and_for_other_processors(tmp_path: Path) -> None:
    target = get_target()
    facts = json.loads((FOLDER / LIBRARIES).read_text())
    build_libraries(tmp_path / target, target)
    assert json.loads((tmp_path / target / LIBRARIES).read_text()) == facts
    for folder in (tmp_path / "one", tmp_path / "other"):
        build_libraries(folder, "macosx-arm64")
    assert [path.name for path in sorted(folder.iterdir())] == [LIBRARIES, "neon.dylib"]
    assert all(path.read_bytes() == (tmp_path / "one" / path.name).read_bytes() for path in folder.iterdir())
