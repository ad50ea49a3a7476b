"""`image_classifier train`, or `image_classifier_trainer`: one run."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser

from image_classifier.cli.access import add_password_option, get_asking, hide_password, take_password
from image_classifier.cli.arguments import parse_arguments, parse_config
from image_classifier.cli.command import ExitStatus, build_parser, execute
from image_classifier.cli.signals import StopRequest
from image_classifier.config import (
    DEFAULT_RECIPE,
    FLAGS,
    RECIPES,
    RecipeName,
    RunSettings,
    TrainingSettings,
    freeze_lists,
    load_recipe,
    restore_training_settings,
)
from image_classifier.errors import Interrupted, RunError, SettingsError
from image_classifier.files import load_yaml

CONTROLS = ("config", "print_config", "resume")
"""Options that say what the command does: no settings, so a config file holds none of them."""

_NOT_PRINTED = (*CONTROLS, "training", "db_password", "ask_db_password")
_PATHS = {name for name, hint in get_type_hints(RunSettings).items() if Path in (hint, *get_args(hint))}


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says and return the exit status."""
    return execute(_train, argv)


def _train(argv: Sequence[str] | None) -> int:
    given = parse_settings(build_trainer_parser(), argv)
    password = take_password(given)
    values = complete_settings(given)
    if given.get("print_config"):
        print(format_settings(values), end="")
        return ExitStatus.DONE
    settings = replace(build_settings(values), db_password=password, ask_db_password=get_asking())

    from image_classifier.training.determinism import cap_instruction_set

    cap_instruction_set(settings.training.instruction_set)  # before anything imports torch

    command = ["image_classifier_trainer", *hide_password(list(sys.argv[1:] if argv is None else argv))]
    with StopRequest() as stop:
        try:
            from image_classifier.cli.progress import TerminalReporter, print_summary
            from image_classifier.cli.tracking import open_tracker
            from image_classifier.experiment import run

            with closing(TerminalReporter(stop)) as terminal, open_tracker(settings, terminal) as reporter:
                result = run(settings, reporter=reporter, should_stop=stop.is_set, command=command)
        except Interrupted as interruption:
            print(interruption, file=sys.stderr)
            return stop.exit_status
    print_summary(result)
    return ExitStatus.DONE


def build_trainer_parser() -> ArgumentParser:
    """Build the trainer's parser; its options are the fields of the settings."""
    parser = build_parser("image_classifier_trainer", "Train a network, evaluate it, and leave a complete run folder.")
    parser.add_argument(
        "--recipe",
        type=RecipeName,
        default=DEFAULT_RECIPE,
        help=f"named settings to start from; {DEFAULT_RECIPE} is {RECIPES[0]}",
    )
    parser.add_argument("--config", type=Path | None, default=None, help="YAML file with settings, above the recipe's")
    parser.add_argument("--print_config", action="store_true", help="print all settings as YAML and stop")
    for flag, purpose in FLAGS.items():
        parser.add_argument(f"--{flag}", action="store_true", help=purpose)
    add_password_option(parser)
    parser.add_class_arguments(RunSettings, None, skip={"training", "recipe", "db_password", "ask_db_password", *FLAGS})
    parser.add_class_arguments(TrainingSettings, None)
    return parser


def parse_settings(parser: ArgumentParser, argv: Sequence[str] | None) -> dict[str, Any]:
    """Parse what was given, and nothing else: the config file below the environment below the options.

    Raises:
        SettingsError: an option, a variable or a line of the config file is unknown or of the wrong type.
    """
    options = dict(parse_arguments(parser, argv, defaults=False))
    path = options.get("config")
    return {**(load_config(parser, path) if path is not None else {}), **options}


def load_config(parser: ArgumentParser, path: Path) -> dict[str, Any]:
    """Load the settings of a config file.

    Raises:
        SettingsError: it cannot be read, or holds something else.
    """
    try:
        document = load_yaml(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingsError(f"--config: {path} cannot be read as YAML: {reason}; correct it") from error
    return parse_config(parser, document, path, refused=CONTROLS)


def complete_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Complete what was given, by the record of the run that is resumed, or else by the recipe.

    Raises:
        RunError: the run that is resumed began with another recipe.
    """
    recorded = read_recorded_options(build_run_settings(given).run_folder) if given.get("resume") else None
    recipe = given.get("recipe", DEFAULT_RECIPE)
    if recorded is None:
        return {**freeze_lists(load_recipe(recipe)), "recipe": recipe, **given}
    if given.get("recipe", recorded["recipe"]) != recorded["recipe"]:
        raise RunError(f"the run cannot be resumed, --recipe was {recorded['recipe']}, is {recipe}; start another run")
    return {**recorded, **given}


def read_recorded_options(run_folder: Path) -> dict[str, Any] | None:
    """Read the options that a run was started with, so that `--resume` needs none of them; None if it never began."""
    from image_classifier.tracking.run import RECORD, read_record

    if not (run_folder / RECORD).exists():
        return None
    record = read_record(run_folder)
    execution = {
        name: Path(value) if name in _PATHS and value is not None else value
        for name, value in record["execution"].items()
        if name != "experiments_folder"
    }
    return {**asdict(restore_training_settings(record["settings"])), **execution, "recipe": record["recipe"]}


def build_settings(values: Mapping[str, Any]) -> RunSettings:
    """Build the settings out of values by option; they check themselves, and have defaults for what is left out."""
    training = {name: values[name] for name in TrainingSettings.__dataclass_fields__ if name in values}
    return build_run_settings(values, training=TrainingSettings(**training))


def build_run_settings(values: Mapping[str, Any], **others: Any) -> RunSettings:
    """Build the settings of a run out of values by option, without those that decide the weights."""
    return RunSettings(**{name: values[name] for name in RunSettings.__dataclass_fields__ if name in values}, **others)


def format_settings(values: Mapping[str, Any]) -> str:
    """Format all settings as a config file, which gives the same settings again; without passwords.

    Raises:
        SettingsError: they are out of range or at odds with each other.
    """
    names = {name: values.get(name) or "unnamed" for name in ("experiment_name", "run_name")}
    settings = build_settings({**values, **names})
    named = ["recipe", *(field.name for field in fields(RunSettings) if field.name not in (*_NOT_PRINTED, "recipe"))]
    printed = {name: getattr(settings, name) for name in named} | asdict(settings.training)
    printed |= {name: values.get(name, "") for name in names}
    plain = {
        name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        for name, value in printed.items()
    }
    return yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=1000)


PARSERS = (build_trainer_parser,)
