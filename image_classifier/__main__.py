"""`image_classifier COMMAND`: finds the command's module in `cli/` and passes the remaining arguments to it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from image_classifier import __version__
from image_classifier.cli.commands import COMMANDS

USAGE = "usage: image_classifier COMMAND [OPTIONS]\n\n{}\n\n`image_classifier COMMAND --help` explains each."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    usage = USAGE.format("\n".join(f"  {name:<10} {purpose}" for name, purpose in COMMANDS.items()))
    if not words or words[0] in ("-h", "--help"):
        print(usage)
        return 0
    if words[0] == "--version":
        print(f"image_classifier {__version__}")
        return 0
    if words[0] not in COMMANDS:
        from image_classifier.cli.spelling import suggest

        meant = suggest(words[0], COMMANDS)
        print(f"error: {words[0]!a} is no command{meant}; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    status: int = importlib.import_module(f"image_classifier.cli.{words[0]}").main(words[1:])
    return status


if __name__ == "__main__":
    sys.exit(main())
