"""What every command has in common: a parser that explains, one line for an expected error, an exit status."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader

from image_classifier import __version__
from image_classifier.cli.help import HelpFormatter
from image_classifier.cli.spelling import suggest
from image_classifier.credentials import hide_in_urls
from image_classifier.errors import ImageClassifierError, VerdictError
from image_classifier.extras import explain_missing
from image_classifier.files import check_yaml
from image_classifier.logs import set_log_level
from image_classifier.progress import shown
from image_classifier.storage import REFUSALS, storage_error
from image_classifier.text import make_printable


class ExitStatus(IntEnum):
    """What a command's exit status says; the documentation's table says the same."""

    DONE = 0
    UNEXPECTED_ERROR = 1
    EXPECTED_ERROR = 2
    DIFFERENT = 3
    NOT_COMPARABLE = 4
    DONE_IN_PART = 5
    INTERRUPTED = 130
    TERMINATED = 143


_load_value = get_loader("yaml")


def _load_bounded_value(text: str) -> Any:
    """Load a value that is written as YAML, as jsonargparse does, if that is within the limits."""
    try:
        check_yaml(text)
        return _load_value(text)
    except Exception as error:  # tags that do not fit their values raise IndexError, AttributeError, ...
        raise yaml.YAMLError(str(error)) from error


set_loader("yaml", _load_bounded_value, (yaml.YAMLError,))


def build_parser(command: str, description: str, *, version: str | None = __version__) -> ArgumentParser:
    """Build the parser of one command.

    Args:
        version: what --version prints; None leaves this name to the command.
    """
    prog = command if command.startswith("image_classifier") else f"image_classifier {command}"
    parser = ArgumentParser(
        prog=prog,
        description=description,
        formatter_class=HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
        version=version,
        print_config=None,  # the trainer has its own, which prints settings alone
    )
    return parser


def execute(
    command: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None, *, shows_progress: bool = True
) -> int:
    """Run a command and return its exit status; an expected error becomes one line on stderr.

    SIGTERM ends it as Ctrl-C does, also where it is process 1 of a container, which has no default action for it.
    """
    previous = signal.signal(signal.SIGTERM, _end)
    try:
        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
        set_log_level("WARNING")
        with shown(command.__name__.strip("_")) if shows_progress else nullcontext():
            return command(argv)
    except ImageClassifierError as error:
        from image_classifier.remote.cache import name_urls

        print(f"error: {make_printable(hide_in_urls(name_urls(str(error))))}", file=sys.stderr)
        return ExitStatus.DIFFERENT if isinstance(error, VerdictError) else ExitStatus.EXPECTED_ERROR
    except ModuleNotFoundError as error:
        explanation = explain_missing(error)
        if explanation is None:
            raise
        print(f"error: {explanation}", file=sys.stderr)
        return ExitStatus.EXPECTED_ERROR
    except BrokenPipeError:  # the reader of a pipe has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitStatus.UNEXPECTED_ERROR
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        path = "a file" if error.filename is None else make_printable(os.fsdecode(error.filename))
        print(f"error: {storage_error(Path(path), error, 'use')}", file=sys.stderr)
        return ExitStatus.EXPECTED_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return ExitStatus.INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, previous)


def execute_action(
    command: str, actions: Mapping[str, Callable[[Sequence[str] | None], int]], argv: Sequence[str] | None
) -> int:
    """Run the action of a command that the first word names and return its exit status; without one, list them."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        width = max(map(len, actions))
        listed = "\n".join(f"  {name:<{width}} {action.__doc__}" for name, action in actions.items())
        usage = f"image_classifier {command} ACTION"
        print(f"usage: {usage} [OPTIONS]\n\n{listed}\n\n`{usage} --help` explains each.")
        return ExitStatus.DONE
    if words[0] not in actions:
        meant = suggest(words[0], actions)
        print(f"error: {words[0]!a} is no action{meant}; the actions are {', '.join(actions)}", file=sys.stderr)
        return ExitStatus.EXPECTED_ERROR
    return execute(actions[words[0]], words[1:])


def _end(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(ExitStatus.TERMINATED)


def get_options(arguments: Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Pick the named options out of what was parsed."""
    return {name: arguments[name] for name in names}
