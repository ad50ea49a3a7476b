"""What an extra brings: imported, or named with the command that installs it."""

from __future__ import annotations

import json

import pytest

from image_classifier.errors import SettingsError
from image_classifier.extras import load_extra


def test_what_is_missing_is_named_with_its_remedy() -> None:
    with pytest.raises(SettingsError, match=r"no_such_module, .*: pip install 'image-classifier\[publish\]'"):
        load_extra("no_such_module", "publish")


def test_what_is_there_is_imported() -> None:
    assert load_extra("json", "publish") is json
