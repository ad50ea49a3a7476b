"""What the repository's files promise each other: locks, scripts, sources, attributes."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import PROJECT, require_program, require_real_data
from tests.repository import read_lock, read_texts

LOCKS = ("build", "cq", "dev", "mlflow", "prod", "serve", "publish")
PACKAGE = PROJECT / "image_classifier"
PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))


def test_no_process_is_polled_whose_pipe_nobody_reads() -> None:
    """A process stops once a pipe is full: poll one that writes to files, or wait with `communicate(timeout=...)`."""
    for path, text in read_texts():
        if path.suffix == ".py" and ".poll()" in text and "subprocess.PIPE" in text:
            functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
            sources = {node.name: ast.get_source_segment(text, node) or "" for node in functions}
            polling = {name for name, source in sources.items() if ".poll()" in source and "subprocess.PIPE" in source}
            assert polling <= {"test_no_process_is_polled_whose_pipe_nobody_reads"}, f"{path}: {polling}"


@pytest.mark.parametrize("name", LOCKS)
def test_each_requirement_of_a_lock_has_one_version_and_hashes(name: str) -> None:
    text = (PROJECT / "requirements" / f"requirements-{name}.txt").read_text(encoding="utf-8")
    entries = [
        line for line in re.sub(r" \\\n +", " ", text).splitlines() if line and not line.lstrip().startswith("#")
    ]
    assert entries
    for entry in entries:
        assert re.fullmatch(r"[a-z0-9.-]+==\S+( --hash=sha256:[0-9a-f]{64})+", entry), entry


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_names_no_address_and_no_path_of_a_machine(name: str) -> None:
    text = (PROJECT / "requirements" / f"requirements-{name}.txt").read_text(encoding="utf-8")
    assert not re.findall(r"(?m)^-.*|\w+://\S*|file:\S+|(?<![\w.])/\w+|--(?:extra-)?index-url|--find-links", text)


@pytest.mark.parametrize("name", ("build", "cq", "prod", "publish", "serve"))
def test_the_developers_lock_holds_the_others(name: str) -> None:
    assert read_lock(name).items() <= read_lock("dev").items()


def test_the_server_of_mlflow_is_of_the_version_of_its_clients() -> None:
    assert read_lock("mlflow")["mlflow"] == read_lock("publish")["mlflow-skinny"] == read_lock("dev")["mlflow-skinny"]


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_holds_what_its_source_asks_for(name: str) -> None:
    source = (PROJECT / "requirements" / f"requirements-{name}.in").read_text(encoding="utf-8")
    asked = [line for line in source.splitlines() if line and not line.startswith(("#", "-"))]
    extras: tuple[str, ...] = {"prod": ("parquet", "database"), "publish": ("publish", "tracking")}.get(name, ())
    if extras:
        asked += PYPROJECT["project"]["dependencies"]
    if name == "serve":  # which takes of the base what it needs, and no torch
        extras = ("serve",)
        assert "torch" not in read_lock("serve")
    for extra in extras:
        asked += PYPROJECT["project"]["optional-dependencies"][extra]
    lock = read_lock(name)
    for requirement in map(Requirement, asked):
        assert requirement.specifier.contains(lock[canonicalize_name(requirement.name)]), requirement


def test_all_that_is_installed_by_the_project_is_locked_with_hashes() -> None:
    """Distributions of Python and of npm; packages of Debian are checked by the signatures of its archive."""
    commands = [
        (path.as_posix(), command.strip())
        for path, text in read_texts()
        if path.parts[0] in (".ci", ".github", "docker", "requirements", "Makefile", "tox.ini")
        and path.suffix != ".txt"
        for command in re.findall(r"(?m)^[^#\n]*\b(?:pip3?|npm|pipx|uvx|npx)\b.*$", text.replace("\\\n", " "))
        if re.search(r"\bpip3? .*\b(install|download)\b|\b(npm|npx|pipx|uvx) [a-z]", command)
    ]
    assert len(commands) >= 10
    for path, command in commands:
        is_locked = "--require-hashes" in command or "npm ci " in command
        is_own = "--no-deps" in command and re.search(
            r"--no-index|--no-build-isolation --editable \.|\{packages\}", command
        )
        assert is_locked or is_own, f"{path}: {command}"


def test_the_lock_is_what_is_installed() -> None:
    installed: dict[str, str] = {canonicalize_name(d.name): d.version for d in importlib.metadata.distributions()}
    assert {name: installed.get(name) for name in read_lock("prod")} == read_lock("prod")


def test_the_package_imports_what_it_declares_and_nothing_else() -> None:
    base = {canonicalize_name(Requirement(text).name) for text in PYPROJECT["project"]["dependencies"]}
    extras = {
        canonicalize_name(Requirement(text).name)
        for texts in PYPROJECT["project"]["optional-dependencies"].values()
        for text in texts
    }
    providers = importlib.metadata.packages_distributions()
    imported: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    foreign = imported - set(sys.stdlib_module_names) - {"image_classifier"}
    used = {canonicalize_name(providers[name][0]) for name in foreign}
    assert used <= base | extras
    assert base <= used | {"torchvision"}  # torchvision comes with torch, as one build of the two


def test_models_are_loaded_in_one_place_and_as_tensors_alone() -> None:
    calls = [
        (path.relative_to(PACKAGE).as_posix(), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords})
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("torch.load", "pickle.load", "pickle.loads"))
    ]
    assert calls
    for name, keywords in calls:
        assert name == "tracking/checkpoint.py"
        assert keywords.get("weights_only") == "True"


def test_the_packages_reexport_nothing() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert isinstance(body[0], ast.Expr), f"{path} says nothing about what it holds"
        assert all(isinstance(node, ast.Assign) for node in body[1:]), path


def test_every_folder_of_tests_is_a_package() -> None:
    """Without `__init__.py` two test files of one name would hide each other."""
    for folder in {path.parent for path in (PROJECT / "tests").rglob("test_*.py")}:
        assert (folder / "__init__.py").is_file(), folder


def read_imports(path: Path, modules: set[str]) -> set[str]:
    """Read which modules of the package a module imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & modules or {node.module} & modules
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & modules
    return found


def test_no_module_imports_itself_by_way_of_others() -> None:
    names = {path: ".".join(path.relative_to(PROJECT).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    modules = {path: name.removesuffix(".__init__") for path, name in names.items()}
    graph = {name: read_imports(path, set(modules.values())) for path, name in modules.items()}
    assert len(graph) > 100 and sum(map(len, graph.values())) > 500
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise AssertionError(f"these modules import each other: {' -> '.join(error.args[1])}") from error
    assert set(order) == set(graph)


def test_a_function_of_more_than_50_lines_says_beside_it_why() -> None:
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                is_long = (node.end_lineno or 0) - node.lineno >= 50
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                has_reason = lines[first - 2].lstrip().startswith("# Over 50 lines: ")
                assert has_reason == is_long, f"{path.relative_to(PROJECT)}: {node.name}"


def test_helpers_of_tests_are_imported_from_modules_that_hold_no_tests() -> None:
    for path in (PROJECT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                named = {part for name in names for part in name.split(".")}
                own = [part for part in named if part.startswith("test_") and "tests" in names[0].split(".")]
                assert not own, f"{path.relative_to(PROJECT)} imports {own[0]}: move what it takes beside conftest.py"


def test_each_unit_test_has_its_module() -> None:
    others = {f"test_{name}.py" for name in ("conftest", "docs", "forked", "repository", "website", "workflows")}
    for path in (PROJECT / "tests" / "unit").rglob("test_*.py"):
        relative = path.relative_to(PROJECT / "tests" / "unit")
        module = PACKAGE / relative.with_name(relative.name.removeprefix("test_"))
        is_there = module.is_file() or module.with_suffix(".c").is_file()
        assert is_there or module.name == "main.py" or relative.name in others, relative


PRIVATE = {
    "torch._fused_sgd_",
    "torch.cpu._init_amx",
    "torch.utils._python_dispatch.TorchDispatchMode",
}
"""Names of torch without a promise that nothing public can stand in for; `pyproject.toml` has an upper bound for it."""


def test_the_private_names_of_torch_that_are_used_are_known_and_there() -> None:
    pattern = re.compile(r"(?<![\"\w.])torch(?:\.\w+)*\._(?!_)\w+(?:\.\w+)*(?: import \w+)?")
    found = set()
    for path in PACKAGE.rglob("*.py"):
        found |= {name.replace(" import ", ".") for name in pattern.findall(path.read_text(encoding="utf-8"))}
    assert found == PRIVATE
    for name in PRIVATE:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), f"torch has no {name} any more"
    (bound,) = (
        Requirement(text).specifier for text in PYPROJECT["project"]["dependencies"] if text.startswith("torch>")
    )
    assert any(each.operator == "<" for each in bound)


def test_no_file_names_a_machine_or_a_registry() -> None:
    folders = "|".join(("root", "home", "work", "opt"))
    hosts = "|".join(("pypi" + r"\.org", "python" + "hosted", "deb" + r"\.debian", "registry" + r"\.npm"))
    pattern = re.compile(rf"(?<![\w.])/(?:{folders})/|{hosts}")
    found = {str(path): pattern.findall(text) for path, text in read_texts()}
    assert not {path: hits for path, hits in found.items() if hits}


def test_text_ends_its_lines_with_line_feeds() -> None:
    assert not [str(path) for path, _ in read_texts() if b"\r\n" in (PROJECT / path).read_bytes()]


@pytest.mark.parametrize(
    ("path", "attributes"),
    [
        ("experiments/cifar/run-1/model.pth", {"filter": "lfs", "text": "unset"}),
        ("experiments/cifar/run-1/metrics.png", {"filter": "lfs", "text": "unset"}),
        ("experiments/cifar/run-1/published/card.png", {"filter": "lfs", "text": "unset"}),
        ("model.pth", {"filter": "lfs", "text": "unset"}),
        ("docs/picture.png", {"filter": "unspecified", "text": "auto"}),
        ("image_classifier/settings.py", {"filter": "unspecified", "eol": "lf"}),
    ],
)
def test_weights_and_pictures_of_runs_are_kept_by_git_lfs(path: str, attributes: dict[str, str]) -> None:
    words = [require_program("git"), "check-attr", *attributes, "--", path]
    lines = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.rsplit(": ", 1)[1] for line in lines] == list(attributes.values())


@pytest.mark.parametrize(
    ("path", "is_ignored"),
    [
        ("data/cifar_dataset/cifar-10-batches-py/test_batch", True),
        ("data/README.md", False),
        ("image_classifier/data/source.py", False),
        ("experiments/cifar/run-1/run.json", False),
        ("experiments/cifar/run-1/model.pth", False),
        ("experiments/cifar/run-1/checkpoints/step-100/state.pth", False),
        (".venv/bin/python", True),
        (".env", True),
    ],
)
def test_git_ignores_what_is_made_and_nothing_else(path: str, is_ignored: bool) -> None:
    words = [require_program("git"), "check-ignore", "--quiet", "--no-index", path]
    assert (subprocess.run(words, cwd=PROJECT).returncode == 0) is is_ignored


@pytest.mark.parametrize(("ci", "outcome"), [("", pytest.skip.Exception), ("true", pytest.fail.Exception)])
def test_what_is_lacking_skips_a_test_by_name_and_fails_it_in_ci(
    monkeypatch: pytest.MonkeyPatch, ci: str, outcome: type[BaseException]
) -> None:
    monkeypatch.setenv("CI", ci)
    monkeypatch.delenv("IMAGE_CLASSIFIER_CIFAR10", raising=False)
    with pytest.raises(outcome, match="no-such-program"):
        require_program("no-such-program")
    with pytest.raises(outcome, match="IMAGE_CLASSIFIER_CIFAR10"):
        require_real_data("IMAGE_CLASSIFIER_CIFAR10")


def test_real_data_that_is_not_where_it_should_be_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("IMAGE_CLASSIFIER_CIFAR10", str(tmp_path))
    with pytest.raises(pytest.fail.Exception, match="holds no cifar-10-batches-py"):
        require_real_data("IMAGE_CLASSIFIER_CIFAR10")
