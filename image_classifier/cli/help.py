"""How `--help` describes an option: what it is for, what kind of number it takes, and its default."""

from __future__ import annotations

import argparse

from jsonargparse import DefaultHelpFormatter

from image_classifier.cli.arguments import describe_type

_PLAIN = ("text", "a path", "true or false", "one of ")
"""What options take that their meaning or their list of values tells already."""


class HelpFormatter(DefaultHelpFormatter):
    """Describes options in the words of the error messages, instead of Python's types."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default == argparse.SUPPRESS:  # of --help and --version
            return super()._get_help_string(action)
        facts = []
        if action.option_strings and action.nargs != 0:
            takes, default = describe_type(action), format_default(action.default)
            facts += ["required"] * bool(action.required)
            facts += [] if takes.startswith(_PLAIN) else [takes]
            facts += [f"default: {default}"] if default else []
        return f"{action.help} ({'; '.join(facts)})" if facts else action.help or ""


def format_default(value: object) -> str:
    """Format a default as the command line would have it; nothing where there is none."""
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
