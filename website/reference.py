"""The reference pages: what options, commands, files and routes there are, out of the code itself.

Nothing here is written twice: options come from the settings' dataclasses, commands from their parsers, exit statuses
from `ExitStatus`, files from a tiny run that is made for the purpose, and routes from the server's OpenAPI document.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from docstring_parser import parse
from jsonargparse import ArgumentParser

from image_classifier.cli.arguments import OTHER_VARIABLES, describe_type, get_options
from image_classifier.cli.command import ExitStatus
from image_classifier.cli.commands import COMMANDS, iterate_parsers
from image_classifier.cli.help import format_default
from image_classifier.kernels.builder import LIBRARIES
from image_classifier.plugins import OWN
from image_classifier.recipe import RECIPES, get_recipe_path, load_recipe
from image_classifier.settings import FLAGS, RunSettings, TrainingSettings

PROJECT = Path(__file__).resolve().parents[1]
PACKAGE = PROJECT / "image_classifier"
OPENAPI = PROJECT / "docs" / "openapi.json"
NO_SETTINGS = ("recipe", "config", "print_config", "db_pass")
"""Options of the trainer that are no settings."""

STATUSES = {
    ExitStatus.DONE: "done",
    ExitStatus.UNEXPECTED_ERROR: "an unexpected error, with its trace: a defect of this package",
    ExitStatus.EXPECTED_ERROR: "an expected error, in one line that names the remedy",
    ExitStatus.DIFFERENT: "`verify`: DIFFERENT; `drift`: found",
    ExitStatus.NOT_COMPARABLE: "`verify`: NOT COMPARABLE",
    ExitStatus.DONE_IN_PART: "done in part: images that could not be read were left out",
    ExitStatus.INTERRUPTED: "interrupted by Ctrl-C, state saved",
    ExitStatus.TERMINATED: "terminated by SIGTERM, state saved",
}
KINDS = {
    ".css": "The style of a page.",
    ".html": "A page, or the template of one.",
    ".js": "The script of a page.",
    ".json": "A JSON schema.",
    ".svg": "A picture of a page.",
    ".typed": "Says that the types are complete.",
}
"""Files that begin with no sentence about themselves."""

PYTHON = {
    "A run": ("image_classifier.experiment", ["run", "RunResult"]),
    "What a run reports": ("image_classifier.reporter", ["Reporter", "Reporters"]),
    "Settings": ("image_classifier.settings", ["RunSettings", "TrainingSettings"]),
    "Reading data": ("image_classifier.access", ["DatabaseAccess", "Reading"]),
    "Verification": ("image_classifier.verification", ["verify", "VerificationSettings", "Verification", "Verdict"]),
    "Published models": ("image_classifier.published.predictor", ["load_predictor", "Predictor", "PublishedModel"]),
    "Conformance suites: networks": ("image_classifier.testing.networks", ["check_network"]),
    "Conformance suites: optimizers": ("image_classifier.testing.optimizers", ["check_optimizer"]),
    "Conformance suites: data sources": ("image_classifier.testing.sources", ["check_source"]),
    "Errors": ("image_classifier.errors", []),
}
"""The public Python interface: module, and its members; none for all."""


def build_parts() -> dict[str, Callable[[], str]]:
    """Say what builds the generated part of each page, by the name at its mark in docs/reference."""
    return {
        "options": build_options,
        "commands": build_commands,
        "files": build_files,
        "http": build_http,
        "python": build_python,
        "layout": build_layout,
    }


def build_table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Build a table in Markdown; a bar in a cell is escaped."""
    lines = [list(head), *([str(cell) for cell in row] for row in rows)]
    written = [
        f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    ]
    return "\n".join([written[0], "|" + "---|" * len(lines[0]), *written[1:]])


def build_options_table(
    settings: type[RunSettings] | type[TrainingSettings], options: Mapping[str, argparse.Action]
) -> str:
    """Build the table of the options that settings are, from their fields and docstring, and from the parser."""
    meanings = FLAGS | {entry.arg_name: entry.description or "" for entry in parse(settings.__doc__ or "").params}
    recipe = load_recipe(RECIPES[0]) if settings is TrainingSettings else {}
    rows = []
    for field in fields(settings):
        if field.name not in options or field.name in NO_SETTINGS:
            continue
        takes = _describe_takes(options[field.name])
        if field.name in OWN:
            takes = f"one of {', '.join(OWN[field.name])}, or module:attribute"
        default = "" if field.name in FLAGS else format_default(recipe.get(field.name, field.default))
        rows.append((f"`--{field.name}`", takes, default, format_meaning(meanings[field.name])))
    return build_table(("option", "takes", "default", "meaning"), rows)


def format_meaning(text: str) -> str:
    """Format a help text: one line that begins with a capital and ends without a point."""
    meaning = " ".join(text.split()).rstrip(".")
    return meaning[:1].upper() + meaning[1:]


def build_options() -> str:
    """Build the tables of the trainer's options, of recipes and variables."""
    (trainer,) = (parser for parser in iterate_parsers() if parser.prog == "image_classifier_trainer")
    options = get_options(trainer)
    recipes = [(f"`{name}`", *_read_recipe(name)) for name in RECIPES]
    return "\n\n".join(
        [
            "## Where the settings come from",
            build_table(
                ("option", "meaning"), [(f"`--{n}`", format_meaning(options[n].help or "")) for n in NO_SETTINGS]
            ),
            "## Where the run lies, and how the work is carried out",
            "Threads, workers and folders change no bit of the weights. Data and start weights count by their content.",
            build_options_table(RunSettings, options),
            "## What decides the weights",
            f"The defaults are those of recipe `{RECIPES[0]}`. These settings are part of the run's identity.",
            build_options_table(TrainingSettings, options),
            "## Recipes",
            "[Benchmarks](../benchmarks.md#recipes) compares them.",
            build_table(("recipe", "command", "measured"), recipes),
            "## Other variables",
            build_table(("variable", "holds"), [(f"`{name}`", text) for name, text in OTHER_VARIABLES.items()]),
        ]
    )


def _read_recipe(name: str) -> tuple[str, str]:
    lines = get_recipe_path(name).read_text(encoding="utf-8").splitlines()
    return f"`{lines[1].lstrip('# ')}`", lines[2].lstrip("# ")


def list_parser_options(parser: ArgumentParser) -> dict[str, argparse.Action]:
    """List what a parser takes, by the name that the user writes: arguments, then options."""
    arguments = {
        action.dest.upper(): action
        for action in parser._actions
        if not action.option_strings and action.help != argparse.SUPPRESS
    }
    return arguments | {f"--{name}": action for name, action in get_options(parser).items()}


def build_commands() -> str:
    """Build what the commands do and take, and what their exit statuses mean."""
    parts = [build_table(("command", "does"), [(f"`{name}`", text) for name, text in COMMANDS.items()])]
    for parser in iterate_parsers():
        parts += [f"## {parser.prog}", format_meaning(parser.description or "") + "."]
        if parser.prog == "image_classifier_trainer":
            parts.append("[Options of the trainer](options.md) has what it takes.")
            continue
        rows = [
            (f"`{name}`", _describe_takes(action), _describe_default(action), format_meaning(action.help or ""))
            for name, action in list_parser_options(parser).items()
        ]
        parts.append(build_table(("option", "takes", "default", "meaning"), rows))
    parts += [
        "## Exit statuses",
        build_table(("status", "means"), [(int(status), STATUSES[status]) for status in ExitStatus]),
        "`IMAGE_CLASSIFIER_LOG_LEVEL` (debug, info, warning, error or critical) says how much the package logs to "
        "stderr. The default is warning, and info for the server. Other libraries log as they always do.",
    ]
    return "\n\n".join(parts)


def _describe_takes(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    takes = describe_type(action)
    return f"{takes}, several" if action.nargs in ("+", "*") else takes


def _describe_default(action: argparse.Action) -> str:
    return "" if action.nargs == 0 or action.default == argparse.SUPPRESS else format_default(action.default)


def list_keys(value: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """List the keys of a JSON document: path, type, and an example where that is a plain value.

    Of names of libraries and of tensors one is shown.
    """
    if isinstance(value, dict):
        names = list(value)
        if prefix.endswith(("distributions", "tensors")):
            names = names[:1]
        for name in names:
            yield from list_keys(value[name], f"{prefix}.{name}" if prefix else name)
    elif isinstance(value, list) and value and isinstance(value[0], dict | list):
        yield from list_keys(value[0], f"{prefix}[]")
    else:
        kind = {str: "text", int: "whole number", float: "number", bool: "true, false", list: "list"}
        example = json.dumps(value)
        yield prefix, kind.get(type(value), "null"), example if len(example) <= 60 else f"{example[:56]} …"


def build_files() -> str:
    """Build the tables of the files of a run and of its snapshot: keys and types, as a tiny run has them."""
    parts = []
    with tempfile.TemporaryDirectory() as scratch:
        run = make_tiny_run(Path(scratch))
        for path in [*sorted(run.glob("*.json*")), *Path(scratch).glob("data/.snapshots/*/snapshot.json")]:
            text = path.read_text(encoding="utf-8")
            content = json.loads(text.splitlines()[0] if path.suffix == ".jsonl" else text)
            rows = [(f"`{name}`", kind, f"`{example}`") for name, kind, example in list_keys(content)]
            title = f"{path.name}, each line" if path.suffix == ".jsonl" else path.name
            parts += [f"## {title}", build_table(("key", "type", "example"), _hide(rows, scratch))]
    return "\n\n".join(parts)


def _hide(rows: Iterable[tuple[str, ...]], scratch: str) -> list[tuple[str, ...]]:
    """Write paths of this machine as a reader would have them."""
    return [tuple(cell.replace(f"{scratch}/", "").replace(sys.executable, "python") for cell in row) for row in rows]


def make_tiny_run(folder: Path) -> Path:
    """Train LeNet on a few generated images; return the run folder. It takes some seconds, most of them to start."""
    program = [sys.executable, "-m", "image_classifier"]
    data = folder / "data"
    commands = (
        ["data", "prepare", "--source", "sample", "--dataset_folder", data, "--num_train", "64", "--num_test", "32"],
        ["train", "--experiments_folder", folder / "experiments", "--experiment_name", "shapes", "--run_name", "first"]
        + ["--dataset_folder", data, "--recipe", "notebook", "--num_epochs", "1", "--num_threads", "1"],
    )
    for words in commands:
        subprocess.run([*program, *map(str, words)], cwd=PROJECT, check=True, capture_output=True)
    return folder / "experiments" / "shapes" / "first"


def build_http() -> str:
    """Build what the server's routes take and answer, from its OpenAPI document."""
    document = json.loads(OPENAPI.read_text(encoding="utf-8"))
    parts = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts += [f"## {method.upper()} {path}", operation["summary"] + "."]
            parameters: list[dict[str, Any]] = operation.get("parameters", [])
            rows = [(f"`{each['name']}`", each["in"], each.get("description", "")) for each in parameters]
            parts += [build_table(("parameter", "in", "meaning"), rows)] if rows else []
            bodies = operation.get("requestBody", {}).get("content", {})
            schemas = [(f"`{kind}`", name_schema(body.get("schema", {}))) for kind, body in bodies.items()]
            parts += [build_table(("body", "schema"), schemas)] if schemas else []
            answers = sorted(operation["responses"].items())
            statuses = [(status, answer["description"], _list_schemas(answer)) for status, answer in answers]
            parts.append(build_table(("status", "answer", "schema"), statuses))
    parts.append("## Schemas")
    for name, schema in sorted(document["components"]["schemas"].items()):
        required = schema.get("required", ())
        fields_of_schema = [
            (f"`{field}`", name_schema(value), "yes" if field in required else "", value.get("description", ""))
            for field, value in schema.get("properties", {}).items()
        ]
        parts += [f"### {name}", schema.get("description", "")]
        parts.append(
            build_table(("field", "type", "required", "meaning"), fields_of_schema) if fields_of_schema else ""
        )
    return "\n\n".join(part for part in parts if part)


def _list_schemas(answer: dict[str, Any]) -> str:
    names = [name_schema(body.get("schema", {})) for body in answer.get("content", {}).values()]
    return ", ".join(dict.fromkeys(names))


def name_schema(schema: dict[str, Any]) -> str:
    """Name a schema of OpenAPI in a few words, with a link where it is one of those that have a name."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(name_schema(each) for each in schema["anyOf"])
    if "items" in schema:
        return f"list of {name_schema(schema['items'])}"
    if "const" in schema or "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    return str(schema.get("type", "bytes"))


def build_python() -> str:
    """Build the directives of the Python interface, which mkdocstrings fills from the docstrings."""
    parts = []
    for title, (module, members) in PYTHON.items():
        parts += [f"## {title}"]
        if members:
            parts += [f"::: {module}.{member}" for member in members]
        else:
            parts.append(f"::: {module}")
    return "\n\n".join(parts)


def list_modules() -> list[Path]:
    """List the package's files, without what was built."""
    built = {".so", ".dylib", ".pyc"}
    paths = [path for path in PACKAGE.rglob("*.*") if path.suffix not in built and path.name != LIBRARIES]
    return sorted(path for path in paths if path.name != "__init__.py" or path.parent == PACKAGE)


def build_layout() -> str:
    """Build what each file of the package is for, by folder: the first sentence of its docstring or comment."""
    parts = []
    for folder, paths in itertools.groupby(sorted(list_modules(), key=lambda path: (path.parent, path)), _get_folder):
        rows = [(f"`{path.name}`", describe_module(path)) for path in paths]
        parts += [f"### {folder}/", build_table(("file", "is for"), rows)]
    return "\n\n".join(parts)


def _get_folder(path: Path) -> str:
    return path.parent.relative_to(PROJECT).as_posix()


def describe_module(path: Path) -> str:
    """Describe what a file is for in the sentence that it begins with."""
    if path.suffix in KINDS:
        return KINDS[path.suffix]
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    else:
        text = re.sub(r"^(?:/\*|#) |\*/.*", "", text.partition("\n\n")[0], flags=re.DOTALL).replace("\n * ", " ")
    return " ".join(re.split(r"(?<=\.)\s", text.partition("\n\n")[0].partition("\n#")[0], maxsplit=1)[0].split())
