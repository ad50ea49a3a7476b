"""The YAML file of a workflow: which class, its settings, those of the training, of the sweep and of the promotion."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from jsonargparse import ArgumentParser

from image_classifier.cli.arguments import check_environment, get_options, get_variable, parse_config
from image_classifier.cli.command import build_parser
from image_classifier.cli.spelling import suggest
from image_classifier.cli.sweep import check_judging, count_trials, load_data, parse_value
from image_classifier.cli.train import (
    CONTROLS,
    build_settings,
    build_trainer_parser,
    check_open_settings,
    complete_settings,
    settle_weights,
)
from image_classifier.errors import RunError, SettingsError
from image_classifier.extras import check_extra
from image_classifier.files import load_yaml
from image_classifier.plugins import explain
from image_classifier.recipe import DEFAULT_RECIPE
from image_classifier.references import check_tracking_uri
from image_classifier.studies.settings import SweepSettings
from image_classifier.workflow.base import Workflow, find_workflow

if TYPE_CHECKING:
    from image_classifier.studies.space import Space

KEYS = ("import", "workflow", "settings", "training", "sweep", "promote")
_TAKES = f"it takes {', '.join(KEYS)}"
_MAX_CHARACTERS = 100_000
"""Of a file, as JSON: Linux takes no word of a command that is much longer."""
_NEVER_KEPT = "db_pass"
"""The trainer's option that would put a password into Metaflow's datastore."""


@dataclass(frozen=True, kw_only=True)
class PromoteSettings:
    """How the published model is registered and promoted, as `image_classifier registry` does.

    Attributes:
        name: Name of the model; the experiment's by default.
        alias: Alias that the new version gets, unless it is worse than the one that has it.
        tracking_uri: MLflow server or database; a SQLite file by default.
        public_key: PEM file of the key that the model must be signed by.
        policy: YAML file that says by whom the run must have been verified.
        allow_loss: Promote the version although it is worse, or not comparable.
    """

    name: str | None = None
    alias: str = "champion"
    tracking_uri: str | None = None
    public_key: Path | None = None
    policy: Path | None = None
    allow_loss: bool = False


@dataclass(frozen=True, kw_only=True)
class Document:
    """A workflow's file, checked.

    Attributes:
        file: its name.
        training: options of the trainer, by name; those that are searched are left out.
        sweep: None where nothing is searched.
        promote: None where nothing is promoted.
    """

    file: str
    workflow: Workflow
    training: Mapping[str, Any]
    sweep: SweepSettings | None = None
    space: Space | None = None
    promote: PromoteSettings | None = None

    @property
    def num_trials(self) -> int:
        """How many trials the sweep has."""
        return count_trials(self.sweep, self.space) if self.sweep and self.space else 0

    @property
    def command(self) -> list[str]:
        """What the records of the runs say of how they were started."""
        return ["python", "-m", "image_classifier.workflow", "run", "--config", self.file]


def load_document(path: Path) -> dict[str, Any]:
    """Load a workflow's file as JSON has it; a file that its space names becomes a part of it.

    Raises:
        SettingsError: it cannot be read, or holds what JSON has not.
    """
    where = f"--config: {path}"
    content = _load(path, where)
    if not isinstance(content, dict):
        raise SettingsError(f"{where} must contain settings by name, such as `workflow: classification`; {_TAKES}")
    sweep = content.get("sweep")
    if isinstance(sweep, dict) and isinstance(sweep.get("space"), str):
        space = _load(Path(sweep["space"]), f"{where}: sweep: space: {sweep['space']}")
        content = {**content, "sweep": {**sweep, "space": space}}
    try:
        text = json.dumps(content)
    except TypeError as error:
        raise SettingsError(f"{where} has a value that is neither text nor number: {error}; quote it") from error
    if len(text) > _MAX_CHARACTERS:
        raise SettingsError(f"{where} has more than the limit of {_MAX_CHARACTERS:,} characters; shorten it")
    return {"file": str(path), **json.loads(text)}


def _load(path: Path, where: str) -> Any:
    try:
        return load_yaml(path)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError):
            raise SettingsError(f"{where} cannot be read: {error.strerror}; correct the path") from error
        raise SettingsError(f"{where} cannot be read as YAML: {error}; correct it") from error


def parse_document(content: Mapping[str, Any]) -> Document:
    """Check what a file holds, and find the class that it names.

    Raises:
        SettingsError: a key or a setting is unknown, missing, of the wrong type, or at odds with another; or the class
            cannot be found.
    """
    file = content["file"]
    where = f"--config: {file}"
    for key in content:
        if key not in (*KEYS, "file"):
            raise SettingsError(f"{where} has the unknown key {key!a}{suggest(key, KEYS)}; {_TAKES}")
    for key, example in {"workflow": "classification", "training": "{experiment_name: .., run_name: ..}"}.items():
        if not content.get(key):
            raise SettingsError(f"{where} has no {key}, which is required, such as `{key}: {example}`")
    for key in ("import", "workflow"):
        if not isinstance(content.get(key, ""), str):
            raise SettingsError(f"{where}: {key} takes a name, got: {str(content[key])[:50]!a}")
    parser = build_trainer_parser()
    training = _parse_block(content, "training", parser, listed="image_classifier_trainer --help lists them")
    with _named(where):
        workflow = _build_workflow(content, training)
    sweep, space = _parse_sweep(content, parser) if "sweep" in content else (None, None)
    fixed = {name: value for name, value in training.items() if space is None or name not in space.distributions}
    with _named(f"{where}: training"):
        values = complete_settings(fixed)
        check_open_settings(values) if values["recipe"] == DEFAULT_RECIPE else build_settings(values)
    promote = None
    if "promote" in content:
        promote = PromoteSettings(**_parse_block(content, "promote", _build_block_parser(PromoteSettings)))
    return Document(file=file, workflow=workflow, training=fixed, sweep=sweep, space=space, promote=promote)


def _build_workflow(content: Mapping[str, Any], training: Mapping[str, Any]) -> Workflow:
    kind = find_workflow(content["workflow"], content.get("import"))
    settings = _parse_block(content, "settings", _build_block_parser(kind, skip={"training"}))
    try:
        return kind(training=training, **settings)
    except SettingsError:
        raise
    except Exception as error:  # it is somebody's code
        raise SettingsError(f"workflow {content['workflow']} cannot be created: {explain(error)}") from error


def _parse_sweep(content: Mapping[str, Any], parser: ArgumentParser) -> tuple[SweepSettings, Space]:
    for module in ("optuna", "plotly", "sqlalchemy"):
        check_extra(module, "sweep")

    from image_classifier.studies.space import build_space

    where = Path(f"{content['file']}: sweep")
    block = content["sweep"]
    if not isinstance(block, dict) or "space" not in block:
        raise SettingsError(f"--config: {where} has no space, which is required: what is searched")
    space = build_space(where, block["space"], partial(parse_value, parser, where))
    others = {name: value for name, value in block.items() if name != "space"}
    options = _parse_block(
        {**content, "sweep": others}, "sweep", _build_block_parser(SweepSettings, {"space", "refit"})
    )
    with _named(f"--config: {where}"):
        sweep = SweepSettings(space=Path(content["file"]), **options)
        count_trials(sweep, space)
    return sweep, space


def _build_block_parser(kind: type, skip: Collection[str] = ()) -> ArgumentParser:
    """Build a parser whose options are the fields of a dataclass. jsonargparse's own way would import torch, as it
    follows what methods are annotated with."""
    parser = build_parser("workflow", "", version=None)
    hints = get_type_hints(kind)
    for field in fields(kind):
        if field.init and field.name not in skip:
            parser.add_argument(f"--{field.name}", type=hints[field.name], required=field.default is MISSING)
    return parser


def _parse_block(content: Mapping[str, Any], name: str, parser: ArgumentParser, listed: str = "") -> dict[str, Any]:
    """Check the settings of one key of the file, and give them their types."""
    where = Path(f"{content['file']}: {name}")
    block = content.get(name) or {}
    if not isinstance(block, dict):
        raise SettingsError(f"--config: {where} takes settings by name, got: {str(block)[:50]!a}")
    options = [option for option in get_options(parser) if option not in CONTROLS]
    for key in block:
        if key == _NEVER_KEPT and key in options:
            raise SettingsError(
                f"--config: {where} has a password, which would be stored: use DB_PASSWORD or db_pass_file"
            )
        if key not in options:
            known = listed or f"it takes {', '.join(options) or 'none'}"
            raise SettingsError(f"--config: {where} has the unknown setting {key!a}{suggest(key, options)}; {known}")
    try:
        return parse_config(parser, block, where, refused=())
    except KeyError as error:  # a class of one's own has a setting of a type that no option has
        raise SettingsError(f"--config: {where} has a value of a wrong type: {error}") from error


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Say in messages of the block where in the file the fault is."""
    try:
        yield
    except SettingsError as error:
        text = str(error)
        raise SettingsError(text if text.startswith("--config") else f"{where}: {text}") from error


def check_before(document: Document) -> None:
    """Check what would stop a new run of the flow after hours, or change it unseen.

    Raises:
        RunError: the run's folder is there already.
        SettingsError: a sweep has no images to be judged on, a step lacks something, or the environment has a setting.
        ImageClassifierError: the data is needed to know that, and cannot be loaded.
    """
    options = get_options(build_trainer_parser())
    for variable in map(get_variable, options):
        if variable in os.environ:
            raise SettingsError(
                f"{variable} is in the environment, but a workflow takes settings only from its file, so that all "
                "its steps have the same settings: write it there, and unset the variable"
            )
    check_environment(options)
    document.workflow.check()
    if document.sweep is not None:
        from image_classifier.studies.storage import parse_storage

        parse_storage(document.sweep.storage, Path())  # which refuses a password, before Metaflow keeps it
    if document.promote is not None:
        if document.promote.tracking_uri is not None:
            check_tracking_uri(document.promote.tracking_uri)
        for module, extra in {"mlflow": "tracking", "sqlalchemy": "tracking", "onnxruntime": "serve"}.items():
            check_extra(module, extra)
    values = complete_settings(document.training)
    run = build_settings(values) if values["recipe"] != DEFAULT_RECIPE else check_open_settings(values)
    if run.run_folder.exists():
        raise RunError(
            f"the run folder {run.run_folder} exists already; `resume` continues its flow, a new flow "
            f"needs another run_name in {document.file}"
        )
    if document.sweep is not None and not values.get("validation_fraction"):
        values = settle_weights({**values, "dataset_folder": Path(document.workflow.load_data())})
        _, snapshot = load_data(values)
        with _named(f"--config: {document.file}"):
            check_judging(snapshot, values)
