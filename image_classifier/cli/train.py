"""`image_classifier train`, or `image_classifier_trainer`: one run."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser

from image_classifier.cli.access import add_password_option, get_asking, hide_password, take_password
from image_classifier.cli.arguments import get_options, parse_arguments, parse_config
from image_classifier.cli.command import ExitStatus, build_parser, execute
from image_classifier.cli.signals import StopRequest
from image_classifier.credentials import hide_in_urls
from image_classifier.errors import ImageClassifierError, Interrupted, ModelError, RunError, SettingsError
from image_classifier.files import load_yaml
from image_classifier.plugins import PLUGGABLE, check_allowed, describe_names
from image_classifier.progress import track
from image_classifier.recipe import (
    DEFAULT_RECIPE,
    NUM_IMAGES_FOR_FAST,
    RECIPES,
    RecipeName,
    choose_recipe,
    freeze_lists,
    load_default_recipe,
    load_recipe,
)
from image_classifier.references import describe_place
from image_classifier.settings import FLAGS, RunSettings, TrainingSettings, restore_training_settings
from image_classifier.storage import scratch_folder, temporary_files_beside

if TYPE_CHECKING:
    from image_classifier.data.snapshot import Snapshot
    from image_classifier.training.ranks import Ranks

CONTROLS = ("config", "print_config", "resume")
"""Options that say what the command does: no settings, so a config file holds none of them."""

OF_WEIGHTS = ("model", "input_mean", "input_std", "image_size", "image_sizes")
"""Settings that the weights to start from say, unless something above the recipe does."""

_NO_OPTIONS = {"training", "recipe", "recipe_reason", "settings_from_weights", "db_password", "ask_db_password"}
_NOT_PRINTED = {*_NO_OPTIONS, *CONTROLS}
_PATHS = {name for name, hint in get_type_hints(RunSettings).items() if Path in (hint, *get_args(hint))}


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says and return the exit status."""
    return execute(_train, argv)


# Over 50 lines: the order of what is parsed, imported and opened matters, and so does which failure ends what.
def _train(argv: Sequence[str] | None) -> int:
    given = parse_settings(build_trainer_parser(), argv)
    password = take_password(given)
    if given.get("resume") and given.get("mirror") is not None:
        from image_classifier.cli.mirror import take_over

        take_over(build_run_settings(given))
    values = complete_settings(given)
    if given.get("print_config"):
        print(format_settings(values), end="")
        return ExitStatus.DONE
    values |= {"db_password": password, "ask_db_password": get_asking()}
    command = [
        "image_classifier_trainer",
        *map(hide_in_urls, hide_password(list(sys.argv[1:] if argv is None else argv))),
    ]
    with StopRequest() as stop:
        try:
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no traces of a connection that is lost
            settings, snapshot = settle_recipe(settle_weights(values))

            from image_classifier.training.determinism import cap_instruction_set

            cap_instruction_set(settings.training.instruction_set)  # before anything imports torch

            with track("starting"):
                from image_classifier.cli.mirror import open_mirror
                from image_classifier.cli.progress import TerminalReporter, print_summary
                from image_classifier.cli.tensorboard import open_board
                from image_classifier.cli.tracking import open_tracker
                from image_classifier.experiment import run
                from image_classifier.reporter import Reporters
                from image_classifier.training.ranks import open_ranks

            with open_ranks(settings.training.device) as ranks:
                try:
                    if ranks.rank > 0:
                        return _train_aside(settings, snapshot, stop, ranks)
                    if is_restarted():
                        settings = replace(settings, resume=settings.run_folder.exists())
                    with (
                        temporary_files_beside(settings.run_folder),
                        closing(TerminalReporter(stop)) as terminal,
                        open_mirror(
                            settings
                        ) as mirror,  # first, so that it ends last, and copies what the others wrote
                        open_tracker(settings) as tracker,
                        open_board(settings) as board,
                    ):
                        result = run(
                            settings,
                            snapshot=snapshot,
                            reporter=Reporters(terminal, mirror, tracker, board),
                            should_stop=stop.is_set,
                            command=command,
                            ranks=ranks,
                        )
                except Interrupted:
                    raise
                except ImageClassifierError:
                    if ranks.is_first_to_fail():
                        raise
                    return ExitStatus.EXPECTED_ERROR
        except Interrupted as interruption:
            print(interruption, file=sys.stderr)
            return stop.exit_status
    print_summary(result)
    return ExitStatus.DONE


def _train_aside(settings: RunSettings, snapshot: Snapshot | None, stop: StopRequest, ranks: Ranks) -> int:
    """Train as a process that computes its part alone: its files are thrown away, and it says nothing."""
    from image_classifier.experiment import run

    stop.deferring = True
    with scratch_folder() as scratch:
        try:
            run(place_aside(settings, scratch), snapshot=snapshot, should_stop=stop.is_set, ranks=ranks)
        except Interrupted:
            return stop.exit_status
    return ExitStatus.DONE


def is_restarted() -> bool:
    """Say whether torchrun started the processes anew, after one was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def place_aside(settings: RunSettings, folder: Path) -> RunSettings:
    """Let a run that another process writes leave its files in a folder of their own."""
    return replace(settings, experiments_folder=folder, pretrained_model=settings.pretrained_path, resume=False)


def build_trainer_parser() -> ArgumentParser:
    """Build the trainer's parser; its options are the fields of the settings."""
    parser = build_parser("image_classifier_trainer", "Train a network, evaluate it, and leave a complete run folder.")
    parser.add_argument("--print_config", action="store_true", help="print all settings as YAML and stop")
    add_run_options(parser)
    return parser


def add_run_options(parser: ArgumentParser, skip: Collection[str] = ()) -> None:
    """Add the options of a run: recipe, config file, and the fields of the settings but those to skip."""
    parser.add_argument(
        "--recipe",
        type=RecipeName,
        default=DEFAULT_RECIPE,
        help=f"named settings to start from; {DEFAULT_RECIPE} is fast from {NUM_IMAGES_FOR_FAST:,} images to train on, "
        "and small below",
    )
    parser.add_argument("--config", type=Path | None, default=None, help="YAML file with settings, above the recipe's")
    for flag, purpose in FLAGS.items():
        if flag not in skip:
            parser.add_argument(f"--{flag}", action="store_true", help=purpose)
    add_password_option(parser)
    parser.add_class_arguments(RunSettings, None, skip={*_NO_OPTIONS, *FLAGS, *skip})
    parser.add_class_arguments(TrainingSettings, None)
    options = get_options(parser)
    for kind in PLUGGABLE:
        options[kind].help = f"{options[kind].help} {{{describe_names(kind)}}}"


def parse_settings(parser: ArgumentParser, argv: Sequence[str] | None) -> dict[str, Any]:
    """Parse what was given, and nothing else: the config file below the environment below the options.

    Raises:
        SettingsError: an option, a variable or a line of the config file is unknown or of the wrong type.
    """
    options = dict(parse_arguments(parser, argv, defaults=False))
    path = options.get("config")
    return {**(load_config(parser, path) if path is not None else {}), **options}


def load_config(parser: ArgumentParser, path: Path, refused: Collection[str] = CONTROLS) -> dict[str, Any]:
    """Load the settings of a config file.

    Args:
        refused: options that it must not hold.

    Raises:
        SettingsError: it cannot be read, or holds something else.
    """
    try:
        document = load_yaml(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingsError(f"--config: {path} cannot be read as YAML: {reason}; correct it") from error
    return parse_config(parser, document, path, refused=refused)


def complete_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Complete what was given, by the record of the run that is resumed, or else by the recipe that was named.

    What the recipe `default` decides stays open: for that, the data must be known. So does what the weights to start
    from say.

    Raises:
        RunError: the run that is resumed began with another recipe.
    """
    recorded = read_recorded_options(build_run_settings(given).run_folder, given) if given.get("resume") else None
    recipe = given.get("recipe", DEFAULT_RECIPE)
    if recorded is None:
        named = {} if recipe == DEFAULT_RECIPE else freeze_lists(load_recipe(recipe, given.get("image_size")))
        if given.get("pretrained_model") is not None:
            named = {name: value for name, value in named.items() if name not in OF_WEIGHTS}
        return {**named, "recipe": recipe, **given}
    was_default = recipe == DEFAULT_RECIPE and ("recipe" not in given or recorded["recipe_reason"])
    if not was_default and recipe != recorded["recipe"]:
        raise RunError(f"the run cannot be resumed, --recipe was {recorded['recipe']}, is {recipe}; start another run")
    return {**recorded, **given, "recipe": recorded["recipe"]}


def read_recorded_options(run_folder: Path, given: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the options that a run was started with, so that `--resume` needs none of them; None if it never began.

    Raises:
        RunError: the record names code of another package that was not given and is not to be imported for it.
    """
    from image_classifier.tracking.layout import RECORD
    from image_classifier.tracking.reading import read_record

    if not (run_folder / RECORD).exists():
        return None
    record = read_record(run_folder)
    for kind in PLUGGABLE:
        check_allowed(kind, record["settings"].get(kind, "sgd"), run_folder / RECORD, RunError, given.get(kind))
    execution = {
        name: Path(value) if name in _PATHS and value is not None else value
        for name, value in record["execution"].items()
        if name != "experiments_folder"
    }
    settings = asdict(restore_training_settings(record["settings"]))
    return {**settings, **execution, "recipe": record["recipe"], "recipe_reason": record.get("recipe_reason")}


def settle_weights(values: Mapping[str, Any]) -> dict[str, Any]:
    """Add what the weights to start from say to what was given; `settings_from_weights` is what that is.

    Sizes of images that end in the weights' own stay the recipe's, and so do those of an --image_size that was given.

    Raises:
        ImageClassifierError: the weights cannot be loaded, or do not say which network they are of.
    """
    left_open = [name for name in OF_WEIGHTS if name not in values]
    run = build_run_settings(values)
    if run.pretrained_path is None or not left_open:
        return dict(values)

    from image_classifier.training.determinism import cap_instruction_set

    cap_instruction_set(values.get("instruction_set", TrainingSettings.instruction_set))

    from image_classifier.tracking.pretrained import load_pretrained

    weights = load_pretrained(run.pretrained_path, values.get("model"))
    if weights.model is None and "model" in left_open:
        raise ModelError(f"--pretrained_model {run.pretrained_path} does not name its network: name it with --model")
    said = {name: getattr(weights, name) for name in ("model", "input_mean", "input_std", "image_size")}
    is_named = values["recipe"] != DEFAULT_RECIPE
    image_size = values.get("image_size", weights.image_size)
    recipe = freeze_lists(load_recipe(values["recipe"] if is_named else RECIPES[0], image_size))
    if "image_size" not in values and weights.scaled_to not in (None, recipe["image_sizes"][-1]):
        said["image_sizes"] = (weights.scaled_to,)
    theirs = {name: said[name] for name in left_open if said.get(name) is not None}
    return {**(recipe if is_named else {}), **theirs, **values, "settings_from_weights": tuple(theirs)}


def settle_recipe(values: Mapping[str, Any]) -> tuple[RunSettings, Snapshot | None]:
    """Build the settings; where the recipe is `default`, load the data set for it, and return that too.

    Raises:
        RunError: the run folder exists already.
        ImageClassifierError: the settings do not go together, or the data set cannot be loaded.
    """
    if values["recipe"] != DEFAULT_RECIPE:
        return build_settings(values), None
    run = check_open_settings(values)

    from image_classifier.data.dataset import load_snapshot
    from image_classifier.data.split import count_validation_images
    from image_classifier.tracking.run import run_exists_error

    if os.path.lexists(run.run_folder) and not (run.resume or is_restarted()):
        raise run_exists_error(run.run_folder)
    snapshot = load_snapshot(run.dataset, run.database_access, run.reading)
    num_validation = count_validation_images(snapshot.num_train, values.get("validation_fraction", 0))
    return build_settings(load_default_recipe(snapshot.num_train - num_validation, values)), snapshot


def check_open_settings(values: Mapping[str, Any]) -> RunSettings:
    """Check that settings go together with what the recipe `default` will be, whatever the number of images; return
    them as they would be for few.

    Raises:
        SettingsError: they do not.
    """
    build_settings(load_default_recipe(sys.maxsize, values))
    return build_settings(load_default_recipe(2, values))  # one image cannot be mixed, which is said when it is known


def build_settings(values: Mapping[str, Any]) -> RunSettings:
    """Build the settings out of values by option; they check themselves, and have defaults for what is left out."""
    training = {name: values[name] for name in TrainingSettings.__dataclass_fields__ if name in values}
    return build_run_settings(values, training=TrainingSettings(**training))


def build_run_settings(values: Mapping[str, Any], **others: Any) -> RunSettings:
    """Build the settings of a run out of values by option, without those that decide the weights."""
    return RunSettings(**{name: values[name] for name in RunSettings.__dataclass_fields__ if name in values}, **others)


def format_settings(values: Mapping[str, Any]) -> str:
    """Format all settings as a config file, which gives the same settings again; without passwords.

    What the recipe `default` decides by the data is left open, and stands in comments.

    Raises:
        SettingsError: they are out of range or at odds with each other.
    """
    named = {**values, **{name: values.get(name) or "unnamed" for name in ("experiment_name", "run_name")}}
    of_weights = [name for name in OF_WEIGHTS if name not in values and values.get("pretrained_model") is not None]
    comments = f"# {', '.join(of_weights)}: what the weights to start from say\n" if of_weights else ""
    left_open = set(of_weights)
    if values["recipe"] == DEFAULT_RECIPE:
        check_open_settings(named)
        for num_images in (NUM_IMAGES_FOR_FAST, NUM_IMAGES_FOR_FAST - 1):
            recipe = choose_recipe(num_images)
            settings_of_recipe = freeze_lists(load_recipe(recipe, values.get("image_size")))
            taken = {*values, *of_weights}
            decided = {name: value for name, value in settings_of_recipe.items() if name not in taken}
            side = "from" if recipe == "fast" else "below"
            comments += f"# {side} {NUM_IMAGES_FOR_FAST:,} images to train on: {recipe}, that is "
            comments += dump_settings(decided, in_one_line=True)
            left_open |= decided.keys()
        named = load_default_recipe(NUM_IMAGES_FOR_FAST, named)
    settings = build_settings(named)
    run = [field.name for field in fields(RunSettings) if field.name not in _NOT_PRINTED]
    printed = {"recipe": values["recipe"]} | {name: getattr(settings, name) for name in run} | asdict(settings.training)
    printed |= {name: values.get(name, "") for name in ("experiment_name", "run_name")}
    return comments + dump_settings({name: value for name, value in printed.items() if name not in left_open})


class _Dumper(yaml.SafeDumper):
    """Writes a tuple as `[16, 24]`, and a path as text."""


_Dumper.add_multi_representer(Path, lambda dumper, path: dumper.represent_str(describe_place(path)))
_Dumper.add_representer(
    tuple, lambda dumper, values: dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)
)


def dump_settings(values: Mapping[str, Any], *, in_one_line: bool = False) -> str:
    """Write settings as YAML."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=in_one_line, width=10_000)
    return text


PARSERS = (build_trainer_parser,)
