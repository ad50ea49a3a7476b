"""`image_classifier sweep`: a search over settings, each trial an ordinary run."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from image_classifier.cli.access import get_asking, hide_password, take_password
from image_classifier.cli.arguments import parse_arguments, parse_config
from image_classifier.cli.command import ExitStatus, build_parser, execute
from image_classifier.cli.signals import StopRequest
from image_classifier.cli.train import (
    CONTROLS,
    add_run_options,
    build_run_settings,
    build_settings,
    build_trainer_parser,
    complete_settings,
    dump_settings,
    load_config,
    settle_weights,
)
from image_classifier.credentials import Secret, hide_in_urls, load_secret, resolve_password
from image_classifier.errors import Interrupted, SettingsError
from image_classifier.extras import load_extra
from image_classifier.plugins import PLUGGABLE, describe
from image_classifier.progress import track
from image_classifier.recipe import DEFAULT_RECIPE, check_batch_size, load_default_recipe
from image_classifier.settings import RunSettings, TrainingSettings
from image_classifier.storage import compute_file_digest, temporary_files_beside, write_atomically
from image_classifier.studies.settings import SweepSettings

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from image_classifier.data.snapshot import Snapshot
    from image_classifier.experiment import RunResult
    from image_classifier.studies.plan import Plan
    from image_classifier.studies.space import Space
    from image_classifier.studies.storage import Storage
    from image_classifier.studies.sweep import Work

PAGE, RECIPE, REFITS = "sweep.html", "best.yaml", "refits.json"
"""What a sweep leaves in the experiment's folder, beside the runs."""

ALLOWING = {"code": "allow_code_change", "environment": "allow_environment_change", "machine": "allow_other_machine"}
"""Parts of a sweep's identity that may change when it goes on, by the option that allows it."""

_OF_JUDGING = ("seed", "validation_fraction", "keep", "early_stopping")
"""Settings that a run on all training images has no use for, or that it takes anew."""


def main(argv: Sequence[str] | None = None) -> int:
    """Search as the command line says and return the exit status."""
    return execute(_sweep, argv)


def build_sweep_parser() -> ArgumentParser:
    """Build the parser of `sweep`: its own options, and the trainer's for what is the same in all trials."""
    parser = build_parser(
        "sweep", "Search for the best settings, judged on the validation part of the training set. Each trial is a run."
    )
    parser.add_class_arguments(SweepSettings, None)
    add_run_options(parser, skip={"run_name", "resume", "profile"})
    return parser


_OWN = tuple(field.name for field in fields(SweepSettings))


def _sweep(argv: Sequence[str] | None) -> int:
    parser = build_sweep_parser()
    options = dict(parse_arguments(parser, argv, defaults=False))
    password = take_password(options)
    sweep = SweepSettings(**{name: options.pop(name) for name in _OWN if name in options})
    words = [*map(hide_in_urls, hide_password(list(sys.argv[1:] if argv is None else argv)))]
    for module in ("optuna", "plotly", "sqlalchemy"):
        load_extra(module, "sweep")
    with StopRequest() as stop:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        try:
            return _search(
                parser, sweep, options, {"db_password": password, "ask_db_password": get_asking()}, words, stop
            )
        except Interrupted as interruption:
            print(interruption, file=sys.stderr)
            return stop.exit_status


def _search(
    parser: ArgumentParser,
    sweep: SweepSettings,
    options: dict[str, Any],
    access: Mapping[str, Any],
    words: Sequence[str],
    stop: StopRequest,
) -> int:
    from image_classifier.studies.space import load_space

    space = load_space(sweep.space, partial(parse_value, build_trainer_parser(), sweep.space))
    given = {**collect_given(parser, options, space), **access}
    search = prepare_search(sweep, space, given, ["image_classifier", "sweep", *words], stop)
    with temporary_files_beside(search.experiment / "trial"):
        told = search.train()
        finish(search, told, sweep.refit)
    return ExitStatus.DONE


@dataclass(frozen=True)
class Search:
    """A sweep of which all is checked.

    Attributes:
        common: what trials and refits are trained with: snapshot, command, and what hears of them.
    """

    experiment: Path
    trials: Trials
    storage: Storage
    work: Work
    common: Mapping[str, Any]

    @property
    def plan(self) -> Plan:
        """What decides the trials."""
        return self.work.plan

    def train(self, most: int | None = None) -> Sequence[FrozenTrial]:
        """Train all trials that are left, or so many of them; return those that are told.

        Raises:
            ImageClassifierError: as `Worker.run` says.
        """
        from image_classifier.studies.sweep import Worker

        return Worker(self.storage, self.work).run(most)


# Over 50 lines: the checks before a sweep in their order, which import torch only after it is capped.
def prepare_search(
    sweep: SweepSettings,
    space: Space,
    given: Mapping[str, Any],
    command: Sequence[str],
    stop: StopRequest,
    **others: Any,
) -> Search:
    """Check all of a sweep before its first trial.

    Args:
        given: what is the same in all trials, and how a database is reached.
        command: for the records of the runs.
        others: what else trials and refits are trained with.

    Raises:
        ImageClassifierError: the settings do not go together, no images are there to judge on, or the data cannot be
            loaded.
    """
    base = complete_settings({**given, "run_name": "trial"})
    experiment = build_run_settings(base).run_folder.parent

    from image_classifier.training.determinism import cap_instruction_set

    cap_instruction_set(base.get("instruction_set", TrainingSettings.instruction_set))

    from image_classifier.studies.storage import Storage, parse_storage

    place = parse_storage(sweep.storage, experiment)
    secret = choose_password(sweep, base)
    with track("starting"):
        from image_classifier.cli.trials import TrialsShown, shown_run
        from image_classifier.studies.sweep import Work

    base = settle_weights(base)
    run, snapshot = load_data(base)
    fixed = {**given, "dataset_folder": run.dataset_folder, "database": snapshot.database}  # its version, if newest
    check_judging(snapshot, base)
    trials = Trials(fixed, snapshot)
    check_space(space, trials)
    plan, num_trials = build_plan(sweep, space, base), count_trials(sweep, space)
    shown = TrialsShown(num_trials)
    common: dict[str, Any] = {
        "open_reporter": lambda settings: shown_run(settings, stop, shown.note),
        "snapshot": snapshot,
        "command": command,
        "should_stop": stop.is_set,
        **others,
    }
    work = Work(
        plan=plan,
        num_trials=num_trials,
        max_failures=sweep.max_failures,
        identity=describe_sweep(plan, base, snapshot),
        allowed=[part for part, option in ALLOWING.items() if base.get(option)],
        build_settings=trials.build,
        watcher=shown,
        **common,
    )
    return Search(experiment, trials, Storage(place, experiment.name, secret), work, common)


def load_data(values: Mapping[str, Any]) -> tuple[RunSettings, Snapshot]:
    """Load the data set that settings name, with images of their size.

    Raises:
        ImageClassifierError: it cannot be loaded.
    """
    from image_classifier.data.dataset import load_snapshot

    run = build_run_settings(values)
    reading = replace(run.reading, image_size=values.get("image_size", run.reading.image_size))
    return run, load_snapshot(run.dataset, run.database_access, reading)


def choose_password(sweep: SweepSettings, values: Mapping[str, Any]) -> Secret | None:
    """Choose the storage's password: its own, or else that of the data's database.

    Raises:
        SettingsError: a file with it cannot be read.
    """
    if sweep.storage_pass_file is not None:
        return load_secret(sweep.storage_pass_file, "storage_pass_file")
    given: Secret | None = values.get("db_password")
    return given or resolve_password(values.get("db_pass_file"))


def build_plan(sweep: SweepSettings, space: Space, values: Mapping[str, Any]) -> Plan:
    """Build what decides the trials.

    Raises:
        SettingsError: a trial would train nothing.
    """
    from image_classifier.studies.plan import Plan

    epochs = list_edges(space, values, "num_epochs")
    if min(epochs) < 1:
        raise SettingsError("--num_epochs takes 1 or more in a sweep: an untrained network cannot be compared")
    return Plan(space, sweep.search, sweep.pruner, values.get("seed", 0), sweep.parallel, max(epochs))


def finish(search: Search, told: Sequence[FrozenTrial], num_refits: int) -> None:
    """Write and print what was found, and train the best settings on all images."""
    from image_classifier.studies.sweep import refit

    experiment, plan, trials = search.experiment, search.plan, search.trials
    best = write_findings(search, told)
    results: list[RunResult] = []
    if num_refits:
        recipe = load_config(build_trainer_parser(), experiment / RECIPE)
        seeds = [plan.seed + number for number in range(num_refits)]
        results = refit(seeds, partial(build_refit, trials.given, recipe), **search.common)
        write_page(experiment, plan, told, list(zip(seeds, results, strict=True)))
    print_summary(experiment, told, best, plan.space, results)


def write_findings(search: Search, told: Sequence[FrozenTrial]) -> FrozenTrial:
    """Write the recipe of the best trial and the page; return that trial.

    Raises:
        RunError: no trial came to its end.
    """
    from image_classifier.studies.sweep import get_winner

    best = get_winner(told)
    winner = search.trials.build(search.plan.space.get_values(best.params), "best")
    write_atomically(search.experiment / RECIPE, format_recipe(winner, best).encode())
    write_page(search.experiment, search.plan, told, [])
    return best


class Trials:
    """Builds the settings of the runs of a sweep.

    Attributes:
        given: what the command line and the config file say, which is the same in all.

    Args:
        snapshot: the data set, which decides about the recipe `default`.
    """

    def __init__(self, given: Mapping[str, Any], snapshot: Snapshot) -> None:
        self.given = given
        self._snapshot = snapshot

    def build(self, searched: Mapping[str, Any], run_name: str) -> RunSettings:
        """Build the settings of a run, which is gone on with where it is begun.

        Raises:
            SettingsError: they do not go together, or not with the data set.
        """
        from image_classifier.data.split import count_validation_images

        values = settle_weights(complete_settings({**self.given, **searched, "run_name": run_name}))
        num_images = self._snapshot.num_train
        num_images -= count_validation_images(num_images, values.get("validation_fraction", 0))
        if values["recipe"] == DEFAULT_RECIPE:
            values = load_default_recipe(num_images, values)
        settings = build_settings(values)
        if settings.training.num_epochs > 0:
            check_batch_size(settings.training.batch_size, num_images)
        return go_on(settings)


def go_on(settings: RunSettings) -> RunSettings:
    """Let a run go on where it is begun."""
    return replace(settings, resume=os.path.lexists(settings.run_folder))


def build_refit(given: Mapping[str, Any], recipe: Mapping[str, Any], seed: int) -> RunSettings:
    """Build the settings of the run on all training images with a seed."""
    others = {name: value for name, value in given.items() if name not in TrainingSettings.__dataclass_fields__}
    values = {**others, **recipe, "seed": seed, "run_name": f"refit-{seed}"}
    return go_on(build_settings(settle_weights(complete_settings(values))))


def parse_value(parser: ArgumentParser, path: Path, name: str, value: Any) -> Any:
    """Check a value of a setting as a config file's is, and give it its type."""
    return parse_config(parser, {name: value}, path, refused=CONTROLS, option="--space")[name]


def collect_given(parser: ArgumentParser, options: dict[str, Any], space: Space) -> dict[str, Any]:
    """Collect what is the same in all trials: the options above the config file, without what is searched.

    Raises:
        SettingsError: an option is searched, too.
    """
    for parameter in space.parameters:
        if parameter.name in options:
            raise SettingsError(f"--{parameter.name} is in the --space, too: leave one of them out")
    path = options.pop("config", None)
    config = {} if path is None else load_config(parser, path, refused=(*CONTROLS, *_OWN))
    return {**{name: value for name, value in config.items() if name not in space.distributions}, **options}


def check_judging(snapshot: Snapshot, values: Mapping[str, Any]) -> None:
    """Check that there are images to judge trials by that are no test images.

    Raises:
        SettingsError: there are none.
    """
    from image_classifier.data.split import count_validation_images

    fraction = values.get("validation_fraction", TrainingSettings.validation_fraction)
    TrainingSettings(validation_fraction=fraction)
    num_validation = count_validation_images(snapshot.num_train, fraction)
    if snapshot.num_validation and fraction:
        raise SettingsError(
            f"--validation_fraction {fraction} sets images aside, but {snapshot.name} has a validation part of "
            f"{snapshot.num_validation:,} images: leave the option out, or remove that part"
        )
    if not snapshot.num_validation and not 0 < num_validation < snapshot.num_train:
        raise SettingsError(
            "a sweep is judged on a validation part, never on the test set, and there is none: set "
            f"--validation_fraction, such as 0.1, got: {fraction}"
        )


def list_edges(space: Space, values: Mapping[str, Any], name: str) -> tuple[Any, ...]:
    """List the outermost values that a setting has in a sweep."""
    searched = [parameter.edges for parameter in space.parameters if parameter.name == name]
    return searched[0] if searched else (values.get(name, getattr(TrainingSettings, name)),)


def check_space(space: Space, trials: Trials) -> None:
    """Check that each setting takes what it is or may be, with some of what the others may be.

    Raises:
        SettingsError: one does not.
    """

    def find_refusal(values: Mapping[str, Any]) -> SettingsError | None:
        try:
            trials.build(values, "trial")
        except SettingsError as error:
            return error
        return None

    singles = [{parameter.name: edge} for parameter in space.parameters for edge in parameter.edges]
    refusals = [find_refusal(values) for values in ({}, *singles)]
    fixed = re.match(r"--(\w+) takes", str(refusals[0] or ""))
    if refusals[0] and fixed and fixed[1] not in space.distributions and all(refusals):
        raise refusals[0]
    for single in singles:
        (name,) = single
        pairs = [single, *({**other, **single} for other in singles if name not in other)]
        refusals = [find_refusal(values) for values in pairs]
        if all(refusal and str(refusal).startswith(f"--{name} takes") for refusal in refusals):
            raise SettingsError(f"--space: {str(refusals[0]).removeprefix('--')}")


def count_trials(sweep: SweepSettings, space: Space) -> int:
    """Count the trials: as many as are asked for, of a grid no more than it has points."""
    if sweep.search != "grid":
        return sweep.num_trials or 0
    return min(sweep.num_trials or space.count(), space.count())


def describe_sweep(plan: Plan, values: Mapping[str, Any], snapshot: Snapshot) -> dict[str, Any]:
    """Describe what must be the same wherever a sweep goes on; all of it decides about the trials' bits."""
    from image_classifier.studies.sweep import FORMAT_VERSION
    from image_classifier.tracking.identity import describe_code, describe_environment, describe_machine
    from image_classifier.training.determinism import resolve_settings

    fixed = {
        name: values[name]
        for name in TrainingSettings.__dataclass_fields__
        if name in values and name not in plan.space.distributions
    }
    engine = {name: fixed[name] for name in ("device", "precision", "engine", "instruction_set") if name in fixed}
    names = {kind: [str(name) for name in list_edges(plan.space, values, kind)] for kind in PLUGGABLE}
    plugins = {name: plugin.digest for kind in names for name in names[kind] if (plugin := describe(kind, name))}
    weights = build_run_settings(values).pretrained_path
    return {
        "format_version": FORMAT_VERSION,
        "space": plan.space.describe(),
        "search": plan.search,
        "pruner": plan.pruner,
        "seed": plan.seed,
        "parallel": plan.num_parallel,
        "settings": fixed,
        "recipe": values["recipe"],
        "weights": compute_file_digest(weights) if weights and weights.is_file() else weights and str(weights),
        "data": snapshot.digest,
        "code": {"digest": describe_code()["digest"], **plugins},
        "environment": {"digest": describe_environment()["digest"]},
        "machine": describe_machine(resolve_settings(TrainingSettings(**engine)))["class"],
    }


def format_recipe(winner: RunSettings, best: FrozenTrial) -> str:
    """Format the settings of the best trial as a config file of the trainer, to train on all training images."""
    settings = {name: value for name, value in asdict(winner.training).items() if name not in _OF_JUDGING}
    weights = {} if winner.pretrained_model is None else {"pretrained_model": winner.pretrained_model}
    lines = [
        f"# The best settings of the sweep {winner.experiment_name!a}: trial {best.number}, "
        f"validation accuracy {100 * (best.value or 0):.2f} %.",
        f"#   image_classifier_trainer --config {RECIPE} --experiment_name {winner.experiment_name} --run_name best",
        f"# Searched: {', '.join(best.params)}. {', '.join(_OF_JUDGING)} are left out: all images are trained on.",
    ]
    return "\n".join(lines) + "\n" + dump_settings({"recipe": winner.recipe, **weights, **settings})


def write_page(
    experiment: Path,
    plan: Plan,
    told: Sequence[FrozenTrial],
    refits: Sequence[tuple[int, RunResult]],
) -> None:
    """Write the page, and what the refits came to."""
    from image_classifier.studies.page import build_page

    accuracies = [(seed, result.evaluation["accuracy"]) for seed, result in refits]
    facts = {
        "search": plan.search,
        "pruner": plan.pruner,
        "seed": str(plan.seed),
        "trials at once": str(plan.num_parallel),
        **{f"space: {name}": json.dumps(value) for name, value in plan.space.describe().items()},
    }
    write_atomically(experiment / PAGE, build_page(experiment.name, facts, plan.space, told, accuracies).encode())
    if refits:
        content = [{"seed": seed, "run": result.folder.name, **_get_figures(result)} for seed, result in refits]
        write_atomically(experiment / REFITS, (json.dumps(content, indent=2) + "\n").encode())


def _get_figures(result: RunResult) -> dict[str, Any]:
    names = ("accuracy", "accuracy_single_view")
    return {**{name: result.evaluation[name] for name in names}, "weights_digest": result.weights_digest}


def print_summary(
    experiment: Path, told: Sequence[FrozenTrial], best: FrozenTrial, space: Space, refits: Sequence[RunResult]
) -> None:
    """Print what was found and where it lies."""
    from image_classifier.cli.trials import format_value
    from image_classifier.studies.page import describe_spread

    states = [trial.state.name.lower() for trial in told]
    counts = {"complete": "complete", "pruned": "pruned", "fail": "failed"}
    values = space.get_values(best.params)
    rows = [
        ("trials", ", ".join(f"{states.count(state)} {name}" for state, name in counts.items())),
        ("best", f"{experiment / str(best.user_attrs['run'].rpartition('/')[2])}"),
        ("validation", f"{100 * (best.value or 0):.2f} %"),
        *((name, format_value(value)) for name, value in values.items()),
        ("recipe", str(experiment / RECIPE)),
        ("page", str(experiment / PAGE)),
    ]
    if refits:
        accuracies = [result.evaluation["accuracy"] for result in refits]
        rows.append(
            (
                "test accuracy",
                f"{describe_spread(accuracies)}, {len(refits)} seed{'s' * (len(refits) > 1)}, on all training images",
            )
        )
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        print(f"{label:<{width}}  {value}")


PARSERS = (build_sweep_parser,)
