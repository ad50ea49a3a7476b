"""The options that choose captured images by their time."""

from __future__ import annotations

from datetime import UTC, datetime

from jsonargparse import ArgumentParser, Namespace

from image_classifier.errors import SettingsError


def add_time_options(parser: ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--since", type=str | None, default=None, help="first time, such as 2026-11-30T12:00, in UTC unless it says so"
    )
    parser.add_argument("--until", type=str | None, default=None, help="the time after the last, likewise")


def parse_times(arguments: Namespace) -> tuple[datetime | None, datetime | None]:
    """Parse the times that the options hold, in UTC; None where an option was left out.

    Raises:
        SettingsError: one is no time.
    """
    since, until = (_parse_time(name, arguments[name]) for name in ("since", "until"))
    return since, until


def _parse_time(name: str, text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        time = datetime.fromisoformat(text)
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise SettingsError(f"--{name} takes a time such as 2026-11-30T12:00, got: {text[:50]!a}") from None
