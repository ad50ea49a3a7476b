"""The prose against what it speaks of: options, recipes, commands, exit statuses, trees, links, versions."""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from docstring_parser import parse

import image_classifier
from benchmarks import database, engines, fine_tuning, image_sizes, kernels, options, portable, scaling, sweep, variants
from benchmarks.measure import load_result, read_table
from benchmarks.tables import build_recipe_line, build_tables
from image_classifier.cli.command import ExitStatus
from image_classifier.cli.commands import COMMANDS
from image_classifier.config import FLAGS, RECIPES, RunSettings, TrainingSettings, get_recipe_path, load_recipe
from image_classifier.kernels.builder import LIBRARIES, get_library_names, get_target
from image_classifier.plugins import OWN
from image_classifier.serving.settings import ServerSettings
from tests.conftest import PROJECT

README = (PROJECT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted(
    path for pattern in ("*.md", "data/*.md", "docs/*.md", "experiments/*.md") for path in PROJECT.glob(pattern)
)
PACKAGE = PROJECT / "image_classifier"
NO_OPTIONS = {"training", "recipe", "recipe_reason", "settings_from_weights", "db_password", "ask_db_password"}
TYPES = {
    int: "whole number",
    float: "number",
    float | None: "number",
    bool: "true, false",
    str: "text",
    str | None: "text",
    Path: "path",
    Path | None: "path",
    tuple[float, float, float]: "three numbers, such as 0.5,0.5,0.5",
    tuple[int, ...]: "whole numbers, such as 16,24",
}


def get_section(title: str) -> str:
    """Get the text of one section of the README."""
    sections = re.split(r"^##+ ", README, flags=re.MULTILINE)
    (section,) = (text for text in sections if text.partition("\n")[0] == title)
    return section


def build_options_table(settings: type[RunSettings] | type[TrainingSettings] | type[ServerSettings]) -> str:
    """Build the README's table of options from the settings and their docstring."""
    meanings = FLAGS | {entry.arg_name: entry.description or "" for entry in parse(settings.__doc__ or "").params}
    hints: dict[str, Any] = get_type_hints(settings)
    recipe = load_recipe(RECIPES[0]) if settings is TrainingSettings else {}
    lines = ["| option | takes | default | meaning |", "|---|---|---|---|"]
    for field in fields(settings):
        if field.name in NO_OPTIONS:
            continue
        if settings is ServerSettings and field.name == "model":
            continue
        hint = hints[field.name]
        takes = ", ".join(map(str, get_args(hint))) if get_origin(hint) is Literal else TYPES[hint]
        if field.name in OWN:
            takes = f"{', '.join(OWN[field.name])}, module:attribute"
        value = recipe.get(field.name, field.default)
        default = "" if value in ("", None) else str(value).lower().strip("()[]").replace(", ", ",")
        meaning = " ".join(meanings[field.name].split()).rstrip(".")
        if field.name in FLAGS:
            takes = default = ""
        lines.append(f"| `--{field.name}` | {takes} | {default} | {meaning[0].upper()}{meaning[1:]} |")
    return "\n".join(lines)


@pytest.mark.parametrize("settings", [RunSettings, TrainingSettings])
def test_every_option_is_documented_as_it_is(settings: type[RunSettings] | type[TrainingSettings]) -> None:
    table = build_options_table(settings)
    assert table in README, f"the README needs this table:\n{table}"


def test_every_option_of_the_server_is_documented_as_it_is() -> None:
    table = build_options_table(ServerSettings)
    assert table in (PROJECT / "docs" / "serving.md").read_text(encoding="utf-8"), f"it needs this table:\n{table}"


@pytest.mark.parametrize("option", ["recipe", "config", "print_config", "db_pass"])
def test_the_options_that_are_no_settings_are_documented(option: str) -> None:
    assert f"`--{option}" in get_section("Options")


def test_every_recipe_has_its_row() -> None:
    assert re.findall(r"^\| `(\w+)`", get_section("Recipes"), flags=re.MULTILINE) == list(RECIPES)


def test_every_command_has_its_row() -> None:
    assert re.findall(r"^\| `(\w+)", get_section("Commands"), flags=re.MULTILINE) == list(COMMANDS)


def test_every_exit_status_has_its_row() -> None:
    assert re.findall(r"^\| (\d+)", get_section("Exit statuses"), flags=re.MULTILINE) == [
        str(int(s)) for s in ExitStatus
    ]


def test_the_printed_tree_is_the_tree() -> None:
    """A line holds a file and what it does, or a folder and its files."""
    printed: set[str] = set()
    for line in re.findall(r"^[├└]── (.+)$", get_section("Layout"), flags=re.MULTILINE):
        name, _, rest = line.partition(" ")
        printed |= {name + file for file in re.split(r" +· +", rest.strip())} if name.endswith("/") else {name}
    built = {*get_library_names(get_target()).values(), LIBRARIES}
    paths = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.*") if "__pycache__" not in path.parts]
    paths = [path for path in paths if path.name not in built]
    real = {path.as_posix() for path in paths if path.name != "__init__.py" or len(path.parts) == 1}
    assert printed == real


@pytest.mark.parametrize("name", build_tables())
def test_the_figures_of_the_readme_are_those_of_the_benchmarks(name: str) -> None:
    assert f"<!-- {name} -->\n{build_tables()[name]}\n<!-- end -->" in README


def test_the_figures_of_the_database_are_those_that_were_measured() -> None:
    shown = read_table(database.DOCUMENT, "database")
    result = load_result("database")
    assert shown == database.build_table(result) if result else shown.startswith("Not measured yet")


def test_what_the_options_give_is_what_was_measured() -> None:
    assert read_table(options.DOCUMENT, "options") == options.build_table(load_result("options"))


def test_what_is_shown_of_sweeps_is_what_was_measured() -> None:
    assert read_table(sweep.DOCUMENT, "sweep") == sweep.build_table(load_result("sweep"))


def test_the_variants_are_those_that_were_measured() -> None:
    for name in ("variants", "variants_before"):
        assert read_table(variants.DOCUMENT, name) == variants.build_table(load_result(name))


@pytest.mark.parametrize(
    ("name", "script"),
    [
        ("engines", engines),
        ("fine_tuning", fine_tuning),
        ("image_sizes", image_sizes),
        ("kernels", kernels),
        ("portable", portable),
        ("scaling", scaling),
    ],
)
def test_the_steps_are_those_that_were_measured(name: str, script: Any) -> None:
    result = load_result(name)
    assert read_table(script.DOCUMENT, name) == (script.build_table(result) if result else "")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_opens_with_its_command_and_what_it_was_measured_at(name: str) -> None:
    lines = get_recipe_path(name).read_text(encoding="utf-8").splitlines()
    assert lines[1].startswith("#   image_classifier_trainer --experiment_name ")
    assert lines[2] == build_recipe_line(name)


def test_every_folder_of_the_repository_is_described() -> None:
    described = re.findall(r"^\| `([\w.]+)/`", get_section("Layout"), flags=re.MULTILINE)
    tracked = {path.name for path in PROJECT.iterdir() if path.is_dir()} - {"dist", "build"}
    assert set(described) == {name for name in tracked if not name.startswith((".", "_")) and "egg-info" not in name}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(PROJECT)))
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"(?m)^#+ (.+)$", text)}
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        assert (document.parent / path).exists(), link
        assert not anchor or path or anchor in anchors, link


def test_the_version_is_the_same_everywhere() -> None:
    changelog = (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d[^\]]*)\]", changelog, flags=re.MULTILINE)
    assert released[0] == image_classifier.__version__ == importlib.metadata.version("image-classifier")


def test_the_tiers_of_the_tests_have_their_share_of_the_time() -> None:
    contributing = (PROJECT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tiers = {path.name for path in (PROJECT / "tests").iterdir() if path.is_dir() and not path.name.startswith("_")}
    assert set(re.findall(r"^\| `tests/(\w+)/?`.*minutes", contributing, flags=re.MULTILINE)) >= tiers - {"data"}
