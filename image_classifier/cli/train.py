"""`image_classifier train`, or `image_classifier_trainer`: one run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from image_classifier.cli.access import add_password_option, get_asking, hide_password, take_password
from image_classifier.cli.command import ExitStatus, build_parser, execute, parse_arguments
from image_classifier.cli.signals import StopRequest
from image_classifier.config import DEFAULT_RECIPE, FLAGS, RECIPES, RunSettings, TrainingSettings, get_recipe_path
from image_classifier.errors import Interrupted, SettingsError


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says and return the exit status."""
    return execute(_train, argv)


def _train(argv: Sequence[str] | None) -> int:
    parser = build_trainer_parser()
    arguments = parse_settings(parser, argv)
    password = take_password(arguments)
    if arguments.print_config:
        print(parser.dump(arguments.clone(with_meta=False)), end="")
        return ExitStatus.DONE
    settings = replace(build_settings(arguments), db_password=password, ask_db_password=get_asking())

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
    names = f"{DEFAULT_RECIPE} (that is {RECIPES[0]}), {', '.join(RECIPES)}"
    parser.add_argument("--recipe", default=DEFAULT_RECIPE, help=f"named settings to start from: {names}")
    parser.add_argument("--config", type=Path | None, default=None, help="YAML file with settings, above the recipe's")
    parser.add_argument("--print_config", action="store_true", help="print all settings as YAML and stop")
    for flag, purpose in FLAGS.items():
        parser.add_argument(f"--{flag}", action="store_true", help=purpose)
    add_password_option(parser)
    parser.add_class_arguments(RunSettings, None, skip={"training", "recipe", "db_password", "ask_db_password", *FLAGS})
    parser.add_class_arguments(TrainingSettings, None)
    return parser


def parse_settings(parser: ArgumentParser, argv: Sequence[str] | None) -> Namespace:
    """Parse in rising priority: recipe (or, to resume, the run's record), config file, environment, options."""
    first = parse_arguments(parser, argv)
    files = []
    if first.resume:
        parser.set_defaults(read_recorded_options(build_settings(first).run_folder))
    else:
        files.append(get_recipe_path(first.recipe))
    if first.config is not None:
        if not first.config.is_file():
            raise SettingsError(f"--config: there is no file {first.config}")
        files.append(first.config)
    parser.default_config_files = [str(file) for file in files]
    return parse_arguments(parser, argv)


def read_recorded_options(run_folder: Path) -> dict[str, Any]:
    """Read the options that a run was started with, so that `--resume` needs none of them; none if it never began."""
    from image_classifier.tracking.run import RECORD, read_record

    if not (run_folder / RECORD).exists():
        return {}
    record = read_record(run_folder)
    execution = {name: value for name, value in record["execution"].items() if name != "experiments_folder"}
    return {**record["settings"], **execution, "recipe": record["recipe"]}


def build_settings(arguments: Namespace) -> RunSettings:
    """Build the settings out of what was parsed; they check themselves."""
    values = dict(arguments)
    training = TrainingSettings(**{name: values[name] for name in TrainingSettings.__dataclass_fields__})
    names = [name for name in RunSettings.__dataclass_fields__ if name in values]
    return RunSettings(**{name: values[name] for name in names}, training=training)
