"""The words of a command line, the variables of the environment and the lines of a config file, to checked values.

Every refusal is one line in plain words: the option, what it takes, what it got, and what may have been meant.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveFloat, PositiveInt

from image_classifier.choices import NumKept
from image_classifier.cli.commands import iterate_parsers
from image_classifier.cli.spelling import find_meant, suggest
from image_classifier.credentials import Secret
from image_classifier.errors import SettingsError
from image_classifier.references import get_url
from image_classifier.text import make_printable

PREFIX = "IMAGE_CLASSIFIER_"
"""Of the variables that give options."""

OTHER_VARIABLES = {
    "IMAGE_CLASSIFIER_CACHE": "the folder of snapshots, and of models from a registry",
    "IMAGE_CLASSIFIER_LOG_LEVEL": "what is logged: DEBUG, INFO, WARNING or ERROR",
    "IMAGE_CLASSIFIER_PLUGINS": "the code, as module:attribute, that may be imported because a run or a model names it",
    "IMAGE_CLASSIFIER_KERNELS": "the kernels of a portable run, such as avx2 where the processor has more",
    "IMAGE_CLASSIFIER_REVISION": "the commit that a container image was built from",
    "IMAGE_CLASSIFIER_BIND": "the address that docker-compose.yaml publishes the server at",
    "IMAGE_CLASSIFIER_CIFAR10": "real data for the package's own tests",
    "IMAGE_CLASSIFIER_CIFAR10_ORIGINAL": "the same, with the published pixels",
    "IMAGE_CLASSIFIER_MLFLOW": "a program for the package's own tests",
}
"""Variables with the package's prefix that are no options."""

TAKES_URLS = (
    *("dataset", "dataset_folder", "mirror", "model", "new", "old", "run", "runs", "since", "snapshot", "source"),
    "target",
)
"""Options and arguments with a path that may also be a URL."""

_TYPES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    Secret: "text",
    PositiveInt: "a whole number of 1 or more",
    PositiveFloat: "a number above 0",
    NumKept: "a whole number of 1 or more, or all",
    tuple[float, float, float]: "three numbers such as 0.5,0.5,0.5",
    tuple[int, ...]: "whole numbers such as 16,24",
}
_KEY = re.compile(r'Parser key "([^"]+)"')
_ARGUMENT = re.compile(r"argument --(\w+): ")
_MAX_BRACKETS = 100
"""Of a value, whose parser is recursive."""
_MAX_SHOWN = 100
_BROKEN_URL = {"", ".", ".."}
"""Parts of a path that do not stay as they are in one of this machine, as which options are read."""


def parse_arguments(parser: ArgumentParser, argv: Sequence[str] | None, *, defaults: bool = True) -> Namespace:
    """Parse a command line above the environment.

    Args:
        argv: the words after the command; those of this process where left out.
        defaults: whether options that are not given have their default; otherwise they are left out.

    Raises:
        SettingsError: an option or a variable is unknown, lacks a value, or has one of the wrong type.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    options = get_options(parser)
    named = {word.partition("=")[0] for word in words}
    if named.isdisjoint(("-h", "--help")):
        free = {name: action for name, action in options.items() if f"--{name}" not in named}
        several = {name: action for name, action in free.items() if action.nargs == "+"}
        ones = {name: action for name, action in free.items() if name not in several}
        # What takes several words comes last: it would take the arguments without a name, too.
        words = [*_list_environment_words(ones), *words, *_list_environment_words(several)]
    _check_words(words, options)
    try:
        parsed = parser.parse_args(_join_lists(words, options), env=False, defaults=defaults)
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise SettingsError(_explain(" ".join(str(error).split()), parser, words)) from error
    for name, action in options.items():
        if parsed.get(name) is None and name in parsed and not _may_be_null(action):
            raise SettingsError(_refuse(action, _find_value(words, name)))
    _check_urls(parsed)
    check_environment(options)
    return parsed


def parse_config(
    parser: ArgumentParser, config: Any, path: Path, refused: Collection[str], option: str = "--config"
) -> dict[str, Any]:
    """Check what a config file holds, and return its settings by option.

    Args:
        config: the document.
        refused: options that a config file must not hold.
        option: that names the file.

    Raises:
        SettingsError: it holds no settings by name, or one is unknown, refused, or of the wrong type.
    """
    options = get_options(parser)
    if not isinstance(config, dict | None):
        raise SettingsError(f"{option}: {path} must hold lines such as `seed: 1`, a setting each")
    values = {}
    for name, value in (config or {}).items():
        if name in (*refused, "help", "version"):
            raise SettingsError(
                f"{option}: {path} holds {name}, which only the command line may set; remove it from the file"
            )
        if name not in options:
            meant = suggest(str(name), options.keys() - set(refused))
            raise SettingsError(f"{option}: {path} holds {_show(name)}, which is no setting{meant}; --help lists them")
        if value is None and not _may_be_null(options[name]):
            raise SettingsError(f"{option}: {path}: {_refuse(options[name], 'null')}")
        _check_brackets(str(value), f"{option}: {path}: {name}")
        values[name] = _write_list(str(value)) if _is_list(options[name]) and not isinstance(value, list) else value
    try:
        parsed = dict(parser.parse_object(values, env=False, defaults=False))
        _check_urls(parsed)
        return parsed
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        key = _KEY.search(str(error))
        action = options.get(key[1]) if key else None
        reason = _refuse(action, str(values[action.dest])) if action else " ".join(str(error).split())
        raise SettingsError(f"{option}: {path}: {reason}") from error


def _check_urls(values: Mapping[str, Any] | Namespace) -> None:
    """Check that what is a URL is one, and stands where one may.

    Raises:
        SettingsError: it is not, or does not.
    """
    for name, value in values.items():
        for place in value if isinstance(value, list) else [value]:
            if isinstance(place, Path) and get_url(place) is not None and name not in TAKES_URLS:
                raise SettingsError(f"--{name} takes a path on this machine, got a URL")


def check_environment(options: Mapping[str, argparse.Action]) -> None:
    """Check that each variable with the package's prefix is known, as an option of this command or of another one.

    Args:
        options: of this command.

    Raises:
        SettingsError: one is not.
    """
    variables = [name for name in os.environ if name.startswith(PREFIX) and name not in OTHER_VARIABLES]
    known = {get_variable(option) for option in options}
    if known.issuperset(variables):
        return
    for parser in iterate_parsers():
        known.update(get_variable(option) for option in get_options(parser))
    for name in variables:
        if name not in known:
            names = {variable.removeprefix(PREFIX).lower() for variable in (*known, *OTHER_VARIABLES)}
            meant = find_meant(name.removeprefix(PREFIX), names)
            question = f" (did you mean {get_variable(meant)}?)" if meant else ""
            raise SettingsError(f"{_show(name)} in the environment is no option of any command{question}; unset it")


def get_options(parser: ArgumentParser) -> dict[str, argparse.Action]:
    """Get a parser's options by name, apart from those that print something and stop."""
    return {
        action.dest: action
        for action in parser._actions
        if action.option_strings and action.help != argparse.SUPPRESS and (action.nargs != 0 or action.const is True)
    }


def get_variable(option: str) -> str:
    """Name the variable of the environment that gives an option."""
    return PREFIX + option.upper()


def _list_environment_words(options: Mapping[str, argparse.Action]) -> list[str]:
    """List what the environment says, in the words of a command line."""
    words = []
    for name, action in options.items():
        text = os.environ.get(get_variable(name))
        if text is None:
            continue
        if action.nargs == 0:
            if text.lower() not in ("true", "false"):
                raise SettingsError(f"{get_variable(name)} takes true or false, got: {_show(text)}")
            words += [f"--{name}"] * (text.lower() == "true")
        elif action.nargs == "+":
            words += [f"--{name}", *_split_words(text, get_variable(name))]
        else:
            words.append(f"--{name}={text}")
    return words


def _split_words(text: str, variable: str) -> list[str]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise SettingsError(f"{variable} takes words as a shell does, got: {_show(text)}") from error
    if not words:
        raise SettingsError(f"{variable} is empty; unset it, or give what it should be")
    return words


def _join_lists(words: Sequence[str], options: Mapping[str, argparse.Action]) -> list[str]:
    """Write the value of an option that takes several with brackets, in one word with the option."""
    lists = {f"--{name}" for name, action in options.items() if _is_list(action)}
    joined = []
    remaining = iter(words)
    for word in remaining:
        name, equals, text = word.partition("=")
        if word == "--":
            joined += [word, *remaining]
        elif name not in lists:
            joined.append(word)
        elif equals:
            joined.append(f"{name}={_write_list(text)}")
        else:
            value = next(remaining, None)
            if value is None or value.startswith("--"):
                joined += [word, *([] if value is None else [value])]
            else:
                joined.append(f"{name}={_write_list(value)}")
    return joined


def _check_words(words: Sequence[str], options: Mapping[str, argparse.Action]) -> None:
    """Refuse what the parser would take: a part of an option, an empty text as the current folder, endless brackets."""
    for before, word in itertools.pairwise(["", *words]):
        name, equals, _ = word.partition("=")
        option = name if equals else before
        action = options.get(option.removeprefix("--")) if option.startswith("--") else None
        if name.startswith("--") and "." in name and name[2:].partition(".")[0] in options:
            raise SettingsError(_explain_surplus([word], options))
        if word == "" and action is None:
            raise SettingsError("an argument is empty; leave it out, or give what it should be")
        if word in ("", f"{option}=") and action is not None and _get_type(action) is Path:
            raise SettingsError(_refuse(action, ""))
        text = word.partition("=")[2] if equals and name.startswith("--") else word
        if (
            "://" in text
            and (action is None or _get_type(action) is Path)
            and not _BROKEN_URL.isdisjoint(text.partition("://")[2].split("/")[1:-1])
        ):
            raise SettingsError("the path of a URL must not hold //, /./ or /../; write it without")
        _check_brackets(word, "an argument")


def _check_brackets(text: str, name: str) -> None:
    if text.count("[") + text.count("{") > _MAX_BRACKETS:
        raise SettingsError(f"{name} has more than {_MAX_BRACKETS} brackets: {_show(text)}")


def _write_list(text: str) -> str:
    return text if text.lstrip().startswith("[") else f"[{text}]"


def _explain(message: str, parser: ArgumentParser, words: Sequence[str]) -> str:
    """Say in plain words what the parser's message says in Python's."""
    options = get_options(parser)
    prefix, _, rest = message.partition(": ")
    if prefix == "unrecognized arguments":
        return _explain_surplus(rest.split(), options)
    if prefix == "the following arguments are required":
        missing = [f"--{name}" if name in options else name.upper() for name in rest.split(", ")]
        return f"{' and '.join(missing)} must be given; --help explains them"
    key = _KEY.search(message)
    named = _ARGUMENT.match(message)
    name = key[1] if key else named[1] if named else None
    action = next((action for action in parser._actions if action.dest == name), None)
    if action is None:
        return f"{message}; --help lists the options"
    if "expected" in rest and named:
        return f"--{action.dest} takes {describe_type(action)}, but nothing follows it"
    if "ignored explicit argument" in rest:
        return f"--{action.dest} is a switch and takes no value"
    return _refuse(action, _find_value(words, action.dest))


def _explain_surplus(words: Sequence[str], options: Collection[str]) -> str:
    """Say which words are no options; what follows them is left out, for it may be a secret."""
    unknown = list(dict.fromkeys(word.partition("=")[0] for word in words if word.startswith("-") and word != "--"))
    if not unknown:
        return f"unexpected argument: {_show(' '.join(words))}; --help lists the options"
    sentences = [f"{_show(word)} is no option{suggest(word, options, '--')}" for word in unknown]
    return f"{'; '.join(sentences)}; --help lists the options"


def _refuse(action: argparse.Action, value: str | None) -> str:
    """Say what an option takes and what it got, unless that may be a secret."""
    name = f"--{action.dest}" if action.option_strings else action.dest.upper()
    if action.option_strings and value is not None and os.environ.get(get_variable(action.dest)) == value:
        name = get_variable(action.dest)
    hint = _get_type(action)
    got = "" if value is None or hint is Secret else f", got: {_show(value)}"
    choices = [*map(str, get_args(hint))] if get_origin(hint) is Literal else []
    return f"{name} takes {describe_type(action)}{got}{suggest(value or '', choices)}"


def describe_type(action: argparse.Action) -> str:
    """Describe in plain words what an option takes."""
    hint = _get_type(action)
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    return _TYPES[hint]


def _get_type(action: argparse.Action) -> Any:
    hint = getattr(action, "_typehint", action.type) or str
    kinds = [kind for kind in get_args(hint) if kind is not NoneType] if _may_be_null(action) else [hint]
    return kinds[0]


def _may_be_null(action: argparse.Action) -> bool:
    return NoneType in get_args(getattr(action, "_typehint", None))


def _is_list(action: argparse.Action) -> bool:
    return get_origin(_get_type(action)) is tuple


def _find_value(words: Sequence[str], name: str) -> str | None:
    """Find the value that an option has last."""
    value = None
    for word, following in itertools.zip_longest(words, words[1:]):
        option, equals, text = word.partition("=")
        if option == f"--{name}":
            value = text if equals else following
    return value


def _show(text: object) -> str:
    shown = make_printable(str(text)) or "''"
    return f"{shown[:_MAX_SHOWN]}…" if len(shown) > _MAX_SHOWN else shown
