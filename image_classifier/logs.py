"""Which messages this package logs."""

from __future__ import annotations

import logging
import os

from image_classifier.errors import SettingsError


def set_log_level(default: str) -> None:
    """Set the level of this package's loggers from IMAGE_CLASSIFIER_LOG_LEVEL; other libraries keep to warnings.

    Raises:
        SettingsError: the variable names no level.
    """
    name = os.environ.get("IMAGE_CLASSIFIER_LOG_LEVEL") or default
    levels = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
    if name.upper() not in levels:
        raise SettingsError(f"IMAGE_CLASSIFIER_LOG_LEVEL takes one of {', '.join(levels)}, got: {name[:50]!a}")
    logging.getLogger("image_classifier").setLevel(name.upper())
