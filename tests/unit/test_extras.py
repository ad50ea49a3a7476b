"""What an extra or the base install brings: imported, or named with the command that installs it."""

from __future__ import annotations

import json

import pytest

from image_classifier.errors import SettingsError
from image_classifier.extras import check_extra, explain_missing, load_extra


def test_what_is_missing_is_named_with_its_remedy() -> None:
    with pytest.raises(SettingsError, match=r"no_such_module, .*: pip install 'image-classifier\[publish\]'"):
        load_extra("no_such_module", "publish")
    with pytest.raises(SettingsError, match=r"no_such_module, .*: pip install 'image-classifier\[publish\]'"):
        check_extra("no_such_module", "publish")
    check_extra("json", "publish")


def test_what_is_there_is_imported() -> None:
    assert load_extra("json", "publish") is json


def test_a_missing_distribution_is_explained_and_a_mistake_in_the_code_is_not() -> None:
    missing = explain_missing(ModuleNotFoundError(name="no_such_module.part"))
    assert missing == "this needs no_such_module, which is not installed: pip install image-classifier"
    for name in ("image_classifier.no_such_module", "json.no_such_module", None):
        assert explain_missing(ModuleNotFoundError(name=name)) is None
