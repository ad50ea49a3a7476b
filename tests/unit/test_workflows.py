"""What the workflows, the Dockerfile and their documentation promise, read from the files; and the means of the tests
that execute them."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from packaging.version import Version

from benchmarks.container import DOCUMENT, build_table
from benchmarks.measure import read_table
from image_classifier.choices import InstructionSet
from image_classifier.data.cifar import CIFAR10_CLASSES
from image_classifier.data.download import ARCHIVES
from image_classifier.data.metadata import METADATA_FILE, METADATA_FORMAT
from image_classifier.recipe import DEFAULT_RECIPE, RECIPES
from tests.actions import UnknownFormError, check_commands, evaluate, format_value
from tests.conftest import PROJECT

WORKFLOWS = sorted((PROJECT / ".github" / "workflows").glob("*.yaml"))
SOURCES = [*WORKFLOWS, *sorted((PROJECT / ".github" / "actions").glob("*/action.yaml"))]


def load(path: Path) -> dict[Any, Any]:
    """Load a workflow; the key `on` is read as a truth value."""
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")))


def list_steps(path: Path) -> list[dict[str, Any]]:
    """List all steps of a workflow or of a composite action."""
    content = load(path)
    jobs = content["jobs"].values() if "jobs" in content else [content["runs"]]
    return [step for job in jobs for step in job["steps"]]


def get_name(path: Path) -> str:
    """Name a file within the project."""
    return path.relative_to(PROJECT).as_posix()


TRAINING = load(PROJECT / ".github" / "workflows" / "training.yaml")


def test_every_action_is_pinned_to_one_commit_that_has_a_tag() -> None:
    pins: dict[str, set[str]] = {}
    for path in SOURCES:
        for action in re.findall(r"uses: (\S+.*)", path.read_text(encoding="utf-8")):
            if action.startswith("./"):
                continue
            match = re.fullmatch(r"([\w./-]+)@([0-9a-f]{40} # v\d+\.\d+\.\d+)", action)
            assert match is not None, action
            owner, name = match[1].split("/")[:2]  # one repository may hold several actions
            pins.setdefault(f"{owner}/{name}", set()).add(match[2])
    assert pins
    assert {name for name, versions in pins.items() if len(versions) > 1} == set()


@pytest.mark.parametrize("path", WORKFLOWS, ids=get_name)
def test_a_workflow_has_no_rights_but_those_of_its_jobs(path: Path) -> None:
    workflow = load(path)
    assert workflow["permissions"] == {}
    for name, job in workflow["jobs"].items():
        assert job["permissions"], name
        assert job["timeout-minutes"] < 360, name
        signs = {"id-token", "attestations"} & job["permissions"].keys()
        runs_training = any("training-image" in step.get("uses", "") for step in job["steps"])
        assert not (signs and runs_training), f"{name} signs and runs what it signs"


@pytest.mark.parametrize("path", WORKFLOWS, ids=get_name)
def test_a_job_that_signs_or_releases_runs_code_of_its_own_commit_alone(path: Path) -> None:
    """Nor does it take anything out of a cache, which less careful jobs can write to, or from another run by name."""
    for name, job in load(path)["jobs"].items():
        rights = {right for right, grant in job["permissions"].items() if grant == "write"}
        if not rights & {"actions", "attestations", "contents", "id-token", "packages"}:
            continue
        for step in job["steps"]:
            action, options = step.get("uses", "").partition("@")[0], step.get("with", {})
            assert not action.startswith(("./", "actions/cache")), name
            assert not options.keys() & {"ref", "repository", "cache", "run-id", "github-token"}, name


def test_what_another_run_left_is_traced_back() -> None:
    for path in SOURCES:
        for step in list_steps(path):
            assert "run-id" not in step.get("with", {}), f"{path.name}: artifact.py downloads from other runs"


def test_the_digests_of_cifar10_are_those_of_what_is_downloaded() -> None:
    archive = ARCHIVES["cifar10"]
    metadata = {"format_version": METADATA_FORMAT, "name": "cifar10", "classes": CIFAR10_CLASSES}
    written = hashlib.md5(json.dumps(metadata, indent=1).encode() + b"\n", usedforsecurity=False).hexdigest()
    lines = (PROJECT / ".github" / "scripts" / "cifar10.md5").read_text().splitlines()
    assert lines == [f"{archive.digest}  {archive.name}", f"{written}  {METADATA_FILE}"]


@pytest.mark.parametrize(
    ("log", "is_carried_out"),
    [
        ("::set-output name=finished::true", True),
        ("  ::add-path::canary", True),
        ("##[set-env name=PATH]canary", True),
        ("::error::an error", False),
        ("name ::set-output name=finished::true", False),
        ("::stop-commands::x\n::set-output name=finished::true", False),
        ("::stop-commands::x\n::y::\n::x::\n::save-state name=a::b", True),
    ],
)
def test_what_a_log_makes_the_runner_do_is_seen(log: str, is_carried_out: bool) -> None:
    if is_carried_out:
        with pytest.raises(UnknownFormError):
            check_commands(log)
    else:
        check_commands(log)


def test_a_release_is_tagged_as_the_documents_say() -> None:
    """bumpver's pattern, the trigger, the image's tags, and both documents speak of one form."""
    bumpver = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["bumpver"]
    (pattern,) = load(PROJECT / ".github" / "workflows" / "release.yaml")[True]["push"]["tags"]
    assert (bumpver["version_pattern"], bumpver["tag_message"]) == ("MAJOR.MINOR.PATCH[PYTAGNUM]", "{new_version}")
    form = "The tag is the version without a `v`, such as `0.2.0` or `0.2.0rc1`."
    for tag in re.findall(r"`(\d\S+)`", form):
        assert fnmatch.fnmatchcase(tag, pattern) and str(Version(tag)) == tag
        assert not fnmatch.fnmatchcase(f"v{tag}", pattern)
    for document in (DOCUMENT, PROJECT / "CONTRIBUTING.md"):
        text = document.read_text(encoding="utf-8")
        assert form in text and not re.search(r"v<version>|`v\d", text), document


@pytest.mark.parametrize("path", SOURCES, ids=get_name)
def test_no_input_reaches_a_script_but_through_the_environment(path: Path) -> None:
    for step in list_steps(path):
        assert "${{" not in step.get("run", "")
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


def test_the_choices_are_those_of_the_trainer() -> None:
    inputs = TRAINING[True]["workflow_dispatch"]["inputs"]
    assert inputs["recipe"]["options"] == [DEFAULT_RECIPE, *RECIPES]
    assert set(inputs["instruction_set"]["options"]) == set(get_args(InstructionSet))
    assert inputs["instruction_set"]["default"] == "portable"


def test_every_input_is_handed_over_checked_and_documented() -> None:
    inputs = TRAINING[True]["workflow_dispatch"]["inputs"]
    assert TRAINING["env"] == {f"INPUT_{name.upper()}": f"${{{{ inputs.{name} }}}}" for name in inputs}
    script = (PROJECT / ".github" / "scripts" / "check_inputs.sh").read_text(encoding="utf-8")
    loops = re.findall(r"^for input in (.+); do$", script, flags=re.MULTILINE)
    checked = re.findall(r"^check (\w+)", script, flags=re.MULTILINE) + " ".join(loops).split()
    assert sorted(checked) == sorted(inputs)
    table = DOCUMENT.read_text(encoding="utf-8").split("| input | takes |")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\|([^|]+)\|", table, flags=re.MULTILINE)))) == set(inputs)


def test_every_script_is_called_or_explained() -> None:
    scripts = [path for path in (PROJECT / ".github" / "scripts").iterdir() if path.suffix in (".sh", ".py", ".mjs")]
    names = {path.name for path in scripts}
    texts = [*SOURCES, *scripts, DOCUMENT, PROJECT / "pyproject.toml"]
    text = "".join(path.read_text(encoding="utf-8") for path in texts)
    assert {name for name in names if not re.search(rf"[/ ]{re.escape(name)}\b", text)} == set()


def test_every_workflow_is_documented() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert [path.name for path in WORKFLOWS if f"`{path.name}`" not in text] == []


def test_the_base_image_is_named_by_digest() -> None:
    text = (PROJECT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"^ARG BASE_IMAGE=python:3\.11-slim-bookworm@sha256:[0-9a-f]{64}$", text, flags=re.MULTILINE)
    assert set(re.findall(r"^FROM (\S+)", text, flags=re.MULTILINE)) == {"${BASE_IMAGE}", "requirements"}


def test_the_figures_of_the_image_are_those_that_were_measured() -> None:
    result = PROJECT / "benchmarks" / "results" / "container.json"
    shown = read_table(DOCUMENT, "container")
    if result.is_file():
        assert shown == build_table(json.loads(result.read_text(encoding="utf-8")))
    else:
        assert shown.startswith("Not measured yet")


CONTEXT = {"inputs": {"name": "First", "flag": False, "none": None}, "steps": {"a-step": {"outputs": {"x": "1"}}}}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("inputs.name", "First"),
        ("inputs.name == 'first'", True),
        ("inputs.name != 'it''s'", True),
        ("inputs.none == ''", True),
        ("inputs.flag == 0", True),
        ("steps.a-step.outputs.x == 1", False),
        ("!inputs.flag && inputs.name", "First"),
        ("inputs.flag && 'yes' || 'no'", "no"),
        ("'a' || 'b' && ''", "a"),
        ("('a' || 'b') && 'c'", "c"),
        ("inputs.none || 18000", 18000.0),
        ("success() == true", True),
    ],
)
def test_expressions_have_the_values_that_github_gives_them(expression: str, value: object) -> None:
    result = evaluate(expression, CONTEXT, {"success": lambda: True})
    assert (result, type(result)) == (value, type(value))


@pytest.mark.parametrize(
    "expression",
    [
        "inputs.nam",
        "secrets.TOKEN",
        "steps.b.outputs.x",
        "failure()",
        "inputs.name < 3",
        "inputs['name']",
        "'open",
        "a b",
    ],
)
def test_an_unknown_form_is_never_passed_over(expression: str) -> None:
    with pytest.raises(UnknownFormError):
        evaluate(expression, CONTEXT, {"success": lambda: True})


@pytest.mark.parametrize(("value", "text"), [(None, ""), (True, "true"), (18000.0, "18000"), ("a", "a")])
def test_values_are_written_as_github_writes_them(value: object, text: str) -> None:
    assert format_value(value) == text
