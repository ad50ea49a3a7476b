"""The scripts that install and the Makefile, run for real in copies of the project, without an index."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import PROJECT, require_program, run_program

SCRIPTS = ("build", "cq", "dev", "prod")


@pytest.fixture
def offline(developed_copy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project's copy, with its environment first on the PATH and no index to install from."""
    monkeypatch.setenv("PATH", str(developed_copy / ".venv" / "bin"), prepend=":")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    return developed_copy


def run_bash(script: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run lines of bash and return how they ended."""
    bash = require_program("bash")
    return subprocess.run([bash, "-c", script], cwd=cwd, capture_output=True, text=True, timeout=300)


def break_lock(copy: Path, name: str) -> None:
    """Let a lock ask for a version that does not exist."""
    lock = copy / "requirements" / f"requirements-{name}.txt"
    lock.write_text(re.sub(r"(?m)^([a-z0-9.-]+)==\S+", r"\1==99999", lock.read_text(encoding="utf-8"), count=1))


@pytest.fixture
def broken(offline: Path, tmp_path: Path) -> Path:
    """A copy of requirements and package whose locks cannot be installed."""
    for name in ("requirements", "image_classifier"):
        shutil.copytree(offline / name, tmp_path / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(offline / name, tmp_path)
    for name in SCRIPTS:
        break_lock(tmp_path, name)
    return tmp_path


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_from_any_folder(offline: Path, tmp_path: Path, name: str) -> None:
    result = run_bash(f"{offline}/requirements/requirements-{name}.sh", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Requirement already satisfied" in result.stdout


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("state", ["set -eu", "set +eu; CDPATH=/"])
def test_a_sourced_script_leaves_the_shell_as_it_was(offline: Path, tmp_path: Path, name: str, state: str) -> None:
    look = (
        'echo "$PWD $-"; compgen -A variable | grep -vE "^(BASH_.*|_|PIPESTATUS|LINENO)$"; compgen -A function || true'
    )
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements" / "code").symlink_to(offline / "requirements")
    script = f"""
        {state}
        {{ {look}; }} > before
        source requirements/code/requirements-{name}.sh > output
        echo "status $?"
        {{ {look}; }} > after
    """
    result = run_bash(script, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, "status 0\n"), result.stderr
    assert (tmp_path / "after").read_text() == (tmp_path / "before").read_text()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_stops_at_the_first_error(broken: Path, name: str) -> None:
    script = broken / "requirements" / f"requirements-{name}.sh"
    result = run_bash(str(script), cwd=broken)
    assert result.returncode != 0
    assert "99999" in result.stderr
    assert "Successfully" not in result.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_sourced_script_that_fails_does_not_end_the_shell(broken: Path, name: str) -> None:
    """Where its status is asked for, `set -e` would not count inside it: the steps are chained instead."""
    result = run_bash(f'source requirements/requirements-{name}.sh >output || echo "goes on, $PWD"', cwd=broken)
    assert (result.returncode, result.stdout) == (0, f"goes on, {broken}\n")
    assert "Successfully" not in (broken / "output").read_text()


def test_the_developers_script_installs_the_package_to_edit_and_the_hooks(offline: Path) -> None:
    where = "import image_classifier; print(image_classifier.__file__)"
    python = offline / ".venv" / "bin" / "python"
    assert run_program(python, "-c", where, cwd=Path("/")).strip() == str(offline / "image_classifier" / "__init__.py")
    assert "pre-commit" in (offline / ".git" / "hooks" / "pre-commit").read_text()


def test_without_a_checkout_there_are_no_hooks_to_install(broken: Path, offline: Path) -> None:
    shutil.copytree(offline / "requirements", broken / "requirements", dirs_exist_ok=True)
    result = run_bash("requirements/requirements-dev.sh", cwd=broken)
    assert result.returncode == 0, result.stderr
    assert "pre-commit installed" not in result.stdout
    run_program("bash", "requirements/requirements-dev.sh", cwd=offline)  # the environment is the copy's again


def test_locks_of_unknown_names_are_refused(offline: Path) -> None:
    result = run_bash("requirements/compile.sh production", cwd=offline)
    assert (result.returncode, result.stdout) == (2, "")
    assert (
        result.stderr
        == "error: no lock is called 'production'; they are prod, publish, serve, build, cq, dev and mlflow\n"
    )


def test_make_alone_lists_every_target(developed_copy: Path) -> None:
    listed = re.findall(r"make ([\w-]+) +\S", run_program(require_program("make"), cwd=developed_copy))
    phony = re.search(r"^\.PHONY: (.+)$", (PROJECT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert phony is not None
    assert listed == phony[1].split()


def test_make_installs_once_and_again_after_a_change(offline: Path) -> None:
    make = require_program("make")
    assert "Nothing to be done" in run_program(make, "venv", cwd=offline)
    (offline / "requirements" / "requirements-prod.txt").touch()
    assert "requirements/requirements-prod.sh" in run_program(make, "venv", cwd=offline)
    assert "Nothing to be done" in run_program(make, "venv", cwd=offline)


@pytest.mark.parametrize("python", ["/bin/false", "no-such-python"])
def test_make_says_which_python_it_needs(developed_copy: Path, tmp_path: Path, python: str) -> None:
    words = [require_program("make"), "train", f"VENV={tmp_path}/.venv", f"PYTHON={python}"]
    result = subprocess.run(words, cwd=developed_copy, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == ""
    first, _ = result.stderr.splitlines()  # the second line is make's own
    assert first == f"error: {python} is not Python 3.11 or newer; name one that is: make train PYTHON=..."


def test_make_lint_accepts_the_project(offline: Path) -> None:
    run_program(require_program("make"), "lint", cwd=offline)


@pytest.mark.parametrize(
    ("name", "content", "hook"),
    [
        ("image_classifier/crooked.py", "x = 'one'\n", "black"),
        ("image_classifier/errors.py", "import image_classifier.cli.command\n", "layers"),
        ("broken.json", "{\n", "JSON"),
        ("broken.yaml", "a: [\n", "YAML"),
        ("broken.toml", "a = \n", "TOML"),
        ("README.MD", "another case\n", "names that differ by case"),
        ("script.sh", "#!/bin/sh\necho $1\n", "shellcheck"),
        ("noend.txt", "no line feed", "end of file"),
    ],
)
def test_the_hooks_refuse_what_is_not_in_order(offline: Path, name: str, content: str, hook: str) -> None:
    git = require_program("git")
    try:
        (offline / name).write_text(content)
        run_program(git, "add", name, cwd=offline)
        result = subprocess.run([git, "commit", "--message=Crooked"], cwd=offline, capture_output=True, text=True)
        assert result.returncode != 0
        failed = re.findall(r"(?m)^(.+?)\.+(?:\(.+\))?Failed$", result.stderr + result.stdout)
        assert any(line.startswith(hook) for line in failed), result.stderr
    finally:
        run_program(git, "reset", "--quiet", "--hard", cwd=offline)


def test_an_executable_without_a_shebang_is_refused(offline: Path) -> None:
    git = require_program("git")
    try:
        (offline / "tool").write_text("echo\n")
        (offline / "tool").chmod(0o755)
        run_program(git, "add", "tool", cwd=offline)
        result = subprocess.run(["pre-commit", "run"], cwd=offline, capture_output=True, text=True)
        assert "executables have a shebang" in "".join(re.findall(r"(?m)^.*Failed$", result.stdout))
    finally:
        run_program(git, "reset", "--quiet", "--hard", cwd=offline)
