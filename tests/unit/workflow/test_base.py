"""Workflows are found by the names that a decorator or an entry point gives them, or as module:attribute."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from image_classifier.errors import SettingsError
from image_classifier.workflow import base
from image_classifier.workflow.base import Workflow, find_workflow, register
from image_classifier.workflow.classification import Classification
from tests.conftest import PROJECT
from tests.documents import iterate_blocks


class Elsewhere(Classification):
    """What most people do: the data lies elsewhere."""

    def load_data(self) -> Path:
        return Path("elsewhere")


@dataclass(frozen=True, kw_only=True)
class Half(Workflow):
    """Lacks most of it."""

    def load_data(self) -> Path:
        return Path()


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(base, "_REGISTERED", {})
    yield


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str, text: str) -> None:
    """Install a distribution with a module, which registers a class as an entry point."""
    (folder / f"{module}.py").write_text(text)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[image_classifier.workflows]\n{name} = {module}:Own\n")
    monkeypatch.syspath_prepend(folder)


TEXT = """
from pathlib import Path
from image_classifier.workflow.base import register
from image_classifier.workflow.classification import Classification

@register("decorated")
class Own(Classification):
    def load_data(self):
        return Path("own")
"""


def test_a_class_is_found_by_each_of_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_workflow("classification") is Classification
    assert find_workflow(f"{__name__}:Elsewhere") is Elsewhere
    register("elsewhere")(Elsewhere)
    assert find_workflow("elsewhere") is Elsewhere
    install(tmp_path, monkeypatch, "installed", "own_workflow_of_test", TEXT)
    found = find_workflow("installed")
    assert found(training={}).load_data() == Path("own")
    assert find_workflow("decorated", "own_workflow_of_test") is found


def test_the_class_of_the_document_takes_its_data_from_elsewhere() -> None:
    (block,) = (block for block in iterate_blocks(PROJECT / "docs" / "workflow.md") if block.language == "python")
    exec(block.code, {"__name__": "own"})
    assert find_workflow("elsewhere")(training={}).load_data() == Path("/data/shapes")


def test_a_name_has_one_class() -> None:
    register("mine")(Elsewhere)
    register("mine")(Elsewhere)
    for name in ("mine", "classification"):
        with pytest.raises(SettingsError, match=f"'{name}' is registered already"):
            register(name)(Half)


@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        ("clasification", None, r"workflow takes one of classification, .*did you mean classification\?"),
        ("mine", __name__, "got: mine; .* registers none"),
        ("classification", "no_such_module", "import: no_such_module cannot be imported: ModuleNotFoundError"),
        ("no_such_module:Own", None, "workflow no_such_module:Own cannot be imported"),
        ("pathlib:Path", None, "not a class derived from image_classifier.workflow.base.Workflow"),
        ("json:dumps", None, "not a class derived from"),
        (f"{__name__}:Half", None, "lacks evaluate, save, train"),
    ],
)
def test_what_is_no_workflow_is_refused(name: str, module: str | None, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        find_workflow(name, module)
