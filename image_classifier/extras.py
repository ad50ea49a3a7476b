"""Imports optional dependencies when they are needed, and says how to install missing ones."""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType

from image_classifier.errors import SettingsError


def load_extra(module: str, extra: str) -> ModuleType:
    """Import a module that one of the extras brings.

    Raises:
        SettingsError: it is not installed; the message has the command that installs it.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # of ONNX Runtime, which reads it when it is loaded
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"this needs {error.name}, which is not installed: pip install 'image-classifier[{extra}]'"
        ) from error


def check_extra(module: str, extra: str) -> None:
    """Check that a module which one of the extras brings is installed; it is not imported.

    Raises:
        SettingsError: it is not; the message has the command that installs it.
    """
    if importlib.util.find_spec(module) is None:
        load_extra(module, extra)


def explain_missing(error: ModuleNotFoundError) -> str | None:
    """Explain that what the base install brings is missing, as in a server's environment; None for any other reason."""
    module = (error.name or "").partition(".")[0]
    if module in ("", "image_classifier") or importlib.util.find_spec(module) is not None:
        return None
    return f"this needs {module}, which is not installed: pip install image-classifier"
