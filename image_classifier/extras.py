"""Imports what an extra of this package brings, when it is needed."""

from __future__ import annotations

import importlib
from types import ModuleType

from image_classifier.errors import SettingsError


def load_extra(module: str, extra: str) -> ModuleType:
    """Import a module that one of the extras brings.

    Raises:
        SettingsError: it is not installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"this needs {error.name}, which is not installed: pip install 'image-classifier[{extra}]'"
        ) from error
