"""`image_classifier COMMAND`: finds the command's file under `cli/` and hands it the rest of the line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from image_classifier import __version__

COMMANDS = {
    "train": "train a network and evaluate it (the same as image_classifier_trainer)",
    "verify": "train a recorded run again and say whether every bit is the same",
    "data": "prepare a data set, show what is in it, keep it in a database, empty its caches",
    "evaluate": "evaluate a run's model on a data set",
    "predict": "classify images with a run's model",
    "compare": "put runs side by side, with the test that says whether they differ",
    "report": "write one page of pictures and facts about a run",
    "publish": "make one ONNX file of a run, proved to answer as the run does",
    "registry": "name versions of published models, promote them, check their files and signatures",
    "serve": "serve a published model over HTTP",
}

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
        print(f"error: {words[0]!r} is no command; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    status: int = importlib.import_module(f"image_classifier.cli.{words[0]}").main(words[1:])
    return status


if __name__ == "__main__":
    sys.exit(main())
