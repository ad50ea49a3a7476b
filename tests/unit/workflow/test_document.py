"""A workflow's file: what it may hold, and what is refused before Metaflow starts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from image_classifier.errors import RunError, SettingsError
from image_classifier.workflow.classification import Classification
from image_classifier.workflow.document import Document, check_before, load_document, parse_document
from tests.conftest import PROJECT
from tests.documents import iterate_blocks
from tests.tiny import write_tiny_dataset
from tests.workflows import GOOD, SPACE, SWEEP, TRAINING


@dataclass(frozen=True, kw_only=True)
class Strange(Classification):
    """Has settings of its own."""

    number: int
    parts: dict[str, int] | None = None

    def __post_init__(self) -> None:
        assert self.number != 13, "thirteen"


def load(tmp_path: Path, content: Any) -> Document:
    path = tmp_path / "workflow.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return parse_document(load_document(path))


def test_a_file_names_a_class_its_settings_a_training_a_sweep_and_a_promotion(tmp_path: Path) -> None:
    content = {**GOOD, "settings": {"license": "mit"}, "sweep": SWEEP, "promote": {"name": "shapes"}}
    document = load(tmp_path, content)
    assert isinstance(document.workflow, Classification) and document.workflow.license == "mit"
    assert document.sweep is not None and (document.sweep.parallel, document.num_trials) == (2, 3)
    assert document.promote is not None and document.promote.alias == "champion"
    assert load(tmp_path, GOOD).sweep is None and load(tmp_path, GOOD).promote is None
    assert load(tmp_path, {**GOOD, "promote": None}).promote is not None


def test_the_file_of_the_document_is_one(tmp_path: Path) -> None:
    (block,) = (block for block in iterate_blocks(PROJECT / "docs" / "workflow.md") if block.language == "yaml")
    assert load(tmp_path, block.code).num_trials == 20


def test_a_file_with_the_space_becomes_a_part_of_it(tmp_path: Path) -> None:
    """So that what a flow keeps is whole, wherever its steps are computed."""
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(SPACE))
    path = tmp_path / "workflow.yaml"
    path.write_text(yaml.safe_dump({**GOOD, "sweep": {**SWEEP, "space": str(tmp_path / "space.yaml")}}))
    content = load_document(path)
    assert content["sweep"]["space"] == SPACE and json.loads(json.dumps(content)) == content


def test_what_is_searched_is_not_fixed(tmp_path: Path) -> None:
    document = load(tmp_path, {**GOOD, "training": {**TRAINING, "learning_rate": 0.5}, "sweep": SWEEP})
    assert "learning_rate" not in document.training


BAD: dict[str, tuple[Any, str]] = {
    "no YAML": ("workflow: [a", "cannot be read as YAML: .*line 1"),
    "no settings": ("a text", "must contain settings by name"),
    "a date": ({**GOOD, "settings": {"license": yaml.safe_load("2020-01-01")}}, "neither text nor number"),
    "too long": (f"workflow: {'é' * 25_000}", "more than the limit of 100,000 characters"),
    "an unknown key": ({**GOOD, "sweeps": SWEEP}, r"has the unknown key 'sweeps' .*did you mean sweep\?"),
    "no class": ({"training": TRAINING}, "has no workflow, which is required"),
    "no training": ({"workflow": "classification"}, "has no training, which is required"),
    "a class that is a number": ({**GOOD, "workflow": 3}, "workflow takes a name, got: '3'"),
    "an unknown class": ({**GOOD, "workflow": "nothing"}, "workflow takes one of classification"),
    "an unknown setting": (
        {**GOOD, "settings": {"licence": "mit"}},
        r"did you mean license\?\); it takes views, opset",
    ),
    "a setting of another type": ({**GOOD, "settings": {"opset": "new"}}, "settings: --opset takes a whole number"),
    "settings in a list": ({**GOOD, "settings": ["mit"]}, "settings takes settings by name"),
    "no experiment": ({**GOOD, "training": {"run_name": "r"}}, "training: --experiment_name is required"),
    "an unknown option": ({**GOOD, "training": {**TRAINING, "lr": 1}}, r"did you mean learning_rate\?"),
    "an option out of range": ({**GOOD, "training": {**TRAINING, "momentum": 2}}, "training: --momentum takes"),
    "a control": ({**GOOD, "training": {**TRAINING, "resume": True}}, "has the unknown setting 'resume'"),
    "a password": ({**GOOD, "training": {**TRAINING, "db_pass": "hidden"}}, "training has a password"),
    "a sweep of nothing": ({**GOOD, "sweep": {"num_trials": 3}}, "sweep has no space"),
    "an empty range": (
        {**GOOD, "sweep": {**SWEEP, "space": {"momentum": {"low": 0.5, "high": 0.1}}}},
        "momentum: the range from 0.5 to 0.1 is empty",
    ),
    "no number of trials": ({**GOOD, "sweep": {"space": SPACE}}, "sweep: --num_trials must be given"),
    "a grid without an end": ({**GOOD, "sweep": {"space": SPACE, "search": "grid"}}, "sweep: --search grid takes"),
    "a refit": ({**GOOD, "sweep": {**SWEEP, "refit": 2}}, "has the unknown setting 'refit'"),
    "no file of the space": ({**GOOD, "sweep": {**SWEEP, "space": "none.yaml"}}, "sweep: space: none.yaml cannot be"),
    "a wrong promotion": (
        {**GOOD, "promote": {"names": "a"}},
        r"promote has the unknown setting 'names' .*did you mean name\?",
    ),
    "a setting that is missing": ({**GOOD, "workflow": f"{__name__}:Strange"}, "settings: .*number"),
    "a class that refuses": (
        {**GOOD, "workflow": f"{__name__}:Strange", "settings": {"number": 13}},
        "cannot be created: AssertionError: thirteen",
    ),
    "a value that no option has": (
        {**GOOD, "workflow": f"{__name__}:Strange", "settings": {"number": 1, "parts": "many"}},
        "settings has a value of a wrong type",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_fault_is_named_in_one_line(name: str, tmp_path: Path) -> None:
    content, message = BAD[name]
    with pytest.raises(SettingsError, match=message) as error:
        load(tmp_path, content)
    assert "\n" not in str(error.value) and "workflow.yaml" in str(error.value)
    assert "hidden" not in str(error.value)


def test_a_sweep_needs_images_to_be_judged_on(tmp_path: Path) -> None:
    """Whether the data has a validation part of its own is known when it is loaded."""
    dataset = write_tiny_dataset(tmp_path / "data")
    training = {**TRAINING, "dataset_folder": str(dataset), "experiments_folder": str(tmp_path)}
    check_before(load(tmp_path, {**GOOD, "training": training, "sweep": SWEEP}))
    none = {**training, "validation_fraction": 0.0}
    with pytest.raises(SettingsError, match="workflow.yaml: a sweep is judged on a validation part"):
        check_before(load(tmp_path, {**GOOD, "training": none, "sweep": SWEEP}))
    check_before(load(tmp_path, {**GOOD, "training": none}))


def test_a_new_flow_takes_no_run_for_its_own(tmp_path: Path) -> None:
    document = load(tmp_path, {**GOOD, "training": {**TRAINING, "experiments_folder": str(tmp_path)}})
    (tmp_path / "e" / "r").mkdir(parents=True)
    with pytest.raises(RunError, match="e/r exists already; `resume` continues"):
        check_before(document)


def test_what_a_later_step_lacks_is_known_before_the_first(tmp_path: Path) -> None:
    training = {**TRAINING, "experiments_folder": str(tmp_path)}
    with pytest.raises(SettingsError, match="--sign_key .*none.pem"):
        check_before(load(tmp_path, {**GOOD, "training": training, "settings": {"sign_key": "none.pem"}}))


def test_no_password_gets_into_what_metaflow_keeps(tmp_path: Path) -> None:
    content = {**GOOD, "training": {**TRAINING, "experiments_folder": str(tmp_path)}}
    parts = {
        "sweep": {**SWEEP, "storage": "postgresql://me:hidden@host/db"},
        "promote": {"tracking_uri": "https://me:hidden@host"},
    }
    for key, part in parts.items():
        with pytest.raises(SettingsError, match="must not contain a password") as error:
            check_before(load(tmp_path, {**content, key: part}))
        assert "hidden" not in str(error.value)


@pytest.mark.parametrize("variable", ["IMAGE_CLASSIFIER_SEED", "IMAGE_CLASSIFIER_SED"])
def test_settings_in_the_environment_are_refused(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "3")
    with pytest.raises(SettingsError, match=f"{variable} .*unset"):
        check_before(load(tmp_path, GOOD))


def test_a_file_that_is_missing_is_not_called_broken(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="none.yaml cannot be read: No such file or directory; correct the path"):
        load_document(tmp_path / "none.yaml")
