"""Secrets, from a file or from the caller: never shown, never recorded. Free of torch."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NoReturn

from image_classifier.errors import SettingsError

_HIDDEN = "********"
_SCHEME = r"\b((?:s3|gs|https?):/+|\w+://)"  # a URL that was a path has one slash left
_LOGIN = re.compile(_SCHEME + r"(?:[^\s/?#]+|[^\s/?#]*:[^\s?#]*)@")  # a slash in a password is no URL, and yet written
_QUERY = re.compile(_SCHEME + r"([^\s?]*\?)\S+")


def hide_in_urls(text: str) -> str:
    """Put stars for what may be secret in the URLs of a text: name and password, and the query, which may be signed."""
    return _QUERY.sub(rf"\1\2{_HIDDEN}", _LOGIN.sub(rf"\1{_HIDDEN}@", text))


class Secret:
    """A text that is stars wherever it is printed, formatted or logged, and that cannot be pickled."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """Give the text, to the one call that needs it."""
        return self._text

    def __repr__(self) -> str:
        return _HIDDEN

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __deepcopy__(self, memo: dict[int, Any]) -> Secret:
        return self  # else the copy would go through pickle's way

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is not written anywhere")


def load_secret(path: Path, option: str) -> Secret:
    """Load the first line of a file as a secret.

    Raises:
        SettingsError: the file cannot be read, or its first line is empty; the message names the option.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.readline(2**16).rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise SettingsError(
            f"--{option}: {path} cannot be read: {reason}; give a file whose first line is it"
        ) from None
    if not text:
        raise SettingsError(f"--{option}: the first line of {path} is empty; put the secret there")
    return Secret(text)


def resolve_password(file: Path | None) -> Secret | None:
    """Load the password of the database from a file, or else from DB_PASSWORD.

    Raises:
        SettingsError: the file cannot be read.
    """
    if file is not None:
        return load_secret(file, "db_pass_file")
    text = os.environ.get("DB_PASSWORD")
    return Secret(text) if text else None
