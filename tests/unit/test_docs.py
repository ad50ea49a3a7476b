"""The prose against what it speaks of: options, recipes, commands, exit statuses, trees, links, versions."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import image_classifier
from benchmarks import (
    capture,
    database,
    drift,
    engines,
    fine_tuning,
    image_sizes,
    kernels,
    large_data,
    load_test,
    merkle,
    options,
    picture,
    portable,
    rolling,
    scaling,
    sweep,
    variants,
)
from benchmarks.measure import load_result, read_table
from benchmarks.speedrun import __main__ as speedrun
from benchmarks.tables import DOCUMENT, PLACES, build_recipe_line, build_tables
from image_classifier import errors
from image_classifier.recipe import RECIPES, get_recipe_path
from tests.conftest import PROJECT
from tests.documents import DATA, DOCUMENTS, EXECUTED, get_section, iterate_blocks
from website.hooks import find_links, find_target

README = (PROJECT / "README.md").read_text(encoding="utf-8")
MAX_WORDS_OF_README = 1200


def test_the_readme_is_short() -> None:
    assert len(README.split()) < MAX_WORDS_OF_README


def test_every_recipe_has_its_row() -> None:
    assert re.findall(r"^\| `(\w+)`", get_section("docs/benchmarks.md", "Recipes"), flags=re.MULTILINE) == list(RECIPES)


def test_every_class_of_errors_is_explained() -> None:
    described = re.findall(r"^\| `(\w+)`", get_section("docs/troubleshooting.md", "Classes of errors"), re.MULTILINE)
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    assert described == [each.__name__ for each in classes if each is not errors.ImageClassifierError]


@pytest.mark.parametrize("name", build_tables())
def test_the_figures_are_those_of_the_benchmarks(name: str) -> None:
    text = PLACES.get(name, DOCUMENT).read_text(encoding="utf-8")
    assert f"<!-- {name} -->\n{build_tables()[name]}\n<!-- end -->" in text


def test_the_picture_shows_the_figures_of_the_benchmarks() -> None:
    with Image.open(picture.PICTURE) as image:
        assert image.info["Description"] == picture.compute_figures_digest(), "python -m benchmarks.picture draws it"


def test_documents_with_figures_say_that_the_code_has_changed_since() -> None:
    for document in {DOCUMENT, *PLACES.values()}:
        assert "older than the present code" in document.read_text(encoding="utf-8")


def test_the_figures_of_the_database_are_those_that_were_measured() -> None:
    shown = read_table(database.DOCUMENT, "database")
    result = load_result("database")
    assert shown == database.build_table(result) if result else shown.startswith("Not measured yet")


def test_what_is_shown_of_drift_is_what_was_measured() -> None:
    shown, result = read_table(drift.DOCUMENT, "drift"), load_result("drift")
    assert shown == drift.build_table(result) if result else shown.startswith("Not measured yet")
    if result:
        with Image.open(drift.PICTURE) as image:
            assert image.info["Description"] == drift.compute_figures_digest(result)


def test_what_the_options_give_is_what_was_measured() -> None:
    assert read_table(options.DOCUMENT, "options") == options.build_table(load_result("options"))


def test_what_is_shown_of_sweeps_is_what_was_measured() -> None:
    assert read_table(sweep.DOCUMENT, "sweep") == sweep.build_table(load_result("sweep"))


def test_the_leaderboard_is_what_was_accepted() -> None:
    assert read_table(speedrun.DOCUMENT, "speedrun") == speedrun.build_table(load_result("speedrun"))


def test_the_variants_are_those_that_were_measured() -> None:
    for name in ("variants", "variants_before"):
        assert read_table(variants.DOCUMENT, name) == variants.build_table(load_result(name))


@pytest.mark.parametrize(
    ("name", "script"),
    [
        ("capture", capture),
        ("engines", engines),
        ("fine_tuning", fine_tuning),
        ("image_sizes", image_sizes),
        ("kernels", kernels),
        ("large_data", large_data),
        ("load_test", load_test),
        ("merkle", merkle),
        ("portable", portable),
        ("rolling", rolling),
        ("scaling", scaling),
    ],
)
def test_the_steps_are_those_that_were_measured(name: str, script: Any) -> None:
    result = load_result(name)
    assert read_table(script.DOCUMENT, name) == (script.build_table(result) if result else "")


def test_each_extra_says_what_it_is_for() -> None:
    with (PROJECT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", get_section("docs/getting_started.md", "Extras"), re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(extras)


def test_make_runs_all_benchmarks_but_those_that_are_named() -> None:
    text = (PROJECT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    scripts = re.findall(
        r"^\| `(\w+)` \|", text.partition("| script | measures |")[2].partition("\n\n")[0], re.MULTILINE
    )
    (sentences,) = re.findall(r"runs all but six\. (.*?) `python -m", text)
    run = re.findall(r"python -m benchmarks\.(\w+)", (PROJECT / "Makefile").read_text(encoding="utf-8"))
    assert set(scripts) - set(run) == set(re.findall(r"`(\w+)`", sentences))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_opens_with_its_command_and_what_it_was_measured_at(name: str) -> None:
    lines = get_recipe_path(name).read_text(encoding="utf-8").splitlines()
    assert lines[1].startswith("#   image_classifier_trainer --experiment_name ")
    assert lines[2] == build_recipe_line(name)


def test_every_folder_of_the_repository_is_described() -> None:
    described = re.findall(r"^\| `([\w.]+)/`", get_section("docs/built.md", "Layout"), flags=re.MULTILINE)
    tracked = {path.name for path in PROJECT.iterdir() if path.is_dir()} - {"dist", "build"}
    assert set(described) == {name for name in tracked if not name.startswith((".", "_")) and "egg-info" not in name}


def list_anchors(document: Path) -> set[str]:
    """List the places of a document that a link may name."""
    titles = re.findall(r"(?m)^#+ (.+)$", document.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(PROJECT)))
def test_links_lead_somewhere(document: Path) -> None:
    """The anchors of the pages that are generated are checked where the site is built."""
    for link in find_links(document.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = find_target(link, document) if path else document
        assert target is not None and target.exists(), link
        if anchor and target.parent.name != "reference":
            assert anchor in list_anchors(target), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(PROJECT)))
def test_every_block_of_code_is_executed_or_says_why_not(document: Path) -> None:
    for block in iterate_blocks(document):
        if block.language in DATA or (document in EXECUTED and not block.comment):
            continue
        kind, _, reason = block.comment.partition(": ")
        assert kind in ("not executed", "executed by") and reason, f"no test executes, and no comment explains: {block}"
        for name in re.findall(r"tests/[\w/]+\.py", reason):
            assert (PROJECT / name).is_file(), f"{block}: {name} is not there"
        if kind == "executed by":
            assert document.name in (PROJECT / reason).read_text(encoding="utf-8"), f"{reason} does not read {document}"


def test_the_version_is_the_same_everywhere() -> None:
    changelog = (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d[^\]]*)\]", changelog, flags=re.MULTILINE)
    assert released[0] == image_classifier.__version__ == importlib.metadata.version("image-classifier")


def test_the_tiers_of_the_tests_have_their_share_of_the_time() -> None:
    contributing = (PROJECT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tiers = {path.name for path in (PROJECT / "tests").iterdir() if path.is_dir() and not path.name.startswith("_")}
    assert set(re.findall(r"^\| `tests/(\w+)/?`.*minutes", contributing, flags=re.MULTILINE)) >= tiers - {"data"}
