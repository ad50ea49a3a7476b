"""docker/*.sh as a user calls them, with a `docker` that writes down what it is given; tests/e2e has the real one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from image_classifier import __version__
from tests.conftest import require_program, run_program

DOCKER = f"""#!{sys.executable}
import hashlib, json, os, pathlib, signal, sys, time
words, folder = sys.argv[1:], pathlib.Path(os.environ["DOCKER_CALLS"])
context = pathlib.Path(words[-1])
call = {{"words": words, "context": sorted(str(p.relative_to(context)) for p in context.rglob("*"))}}
files = sorted(path for path in context.rglob("*") if path.is_file())
call["digest"] = hashlib.sha256(b"\\0".join(str(p).removeprefix(words[-1]).encode() + p.read_bytes()
                                           for p in files)).hexdigest()
written = folder / f"{{os.getpid()}}.tmp"
written.write_text(json.dumps(call))
written.rename(written.with_suffix(".json"))
signal.signal(signal.SIGINT, signal.default_int_handler)
time.sleep(float(os.environ.get("DOCKER_TIME_S", 0)))
sys.exit(int(os.environ.get("DOCKER_STATUS", 0)))
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, project_copy: Path) -> Path:
    """A clone in a folder whose name has a space, with a dist/ of the user's own."""
    clone = tmp_path_factory.mktemp("docker") / "a project"
    run_program(require_program("git"), "clone", "--quiet", project_copy, clone, cwd=project_copy)
    (clone / "dist").mkdir()
    (clone / "dist" / "mine.whl").write_text("mine")
    return clone


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that `docker` writes its calls to; contexts are made in tmp_path/temporary, which must end empty."""
    for name in ("bin", "calls", "temporary", "elsewhere"):
        (tmp_path / name).mkdir()
    docker = tmp_path / "bin" / "docker"
    docker.write_text(DOCKER)
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", str(docker.parent), prepend=":")
    monkeypatch.setenv("DOCKER_CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    return tmp_path / "calls"


def read_calls(calls: Path) -> list[dict[str, Any]]:
    """Read what `docker` was given, call by call."""
    return [json.loads(path.read_text()) for path in sorted(calls.glob("*.json"))]


def list_top(call: dict[str, Any]) -> set[str]:
    """List what lies at the top of a build context."""
    return {name for name in call["context"] if "/" not in name}


def wait_for_call(calls: Path, process: subprocess.Popen[Any]) -> None:
    """Wait until `docker` runs."""
    deadline = time.monotonic() + 120
    while not read_calls(calls):
        assert process.poll() is None and time.monotonic() < deadline, "docker was never called"
        time.sleep(0.05)


def assert_nothing_is_left(project: Path, calls: Path) -> None:
    """Assert that neither the temporary folder nor the project holds anything new."""
    assert not list((calls.parent / "temporary").iterdir())
    git = require_program("git")
    assert run_program(git, "status", "--porcelain", "--ignored", cwd=project).split("\n") == ["!! dist/", ""]
    assert [path.name for path in (project / "dist").iterdir()] == ["mine.whl"]


def test_the_image_is_built_from_another_folder(project: Path, calls: Path) -> None:
    run_program(project / "docker" / "build.sh", "--pull", cwd=calls.parent / "elsewhere")
    (call,) = read_calls(calls)
    words = call["words"]
    assert words[0] == "build"
    assert [words[i + 1] for i, word in enumerate(words) if word == "--tag"] == [
        f"image-classifier:{__version__}",
        "image-classifier:latest",
    ]
    revision = run_program(require_program("git"), "rev-parse", "HEAD", cwd=project).strip()
    arguments = dict(words[i + 1].split("=", 1) for i, word in enumerate(words) if word == "--build-arg")
    assert arguments.pop("SOURCE")
    assert arguments == {"VERSION": __version__, "REVISION": revision}  # the Dockerfile has the base
    assert words[-2] == "--pull"
    assert list_top(call) == {"requirements-build.txt", "requirements-prod.txt", "source", "wheels"}
    assert_nothing_is_left(project, calls)


def test_the_servers_image_is_built_of_its_own_lock(project: Path, calls: Path) -> None:
    run_program(project / "docker" / "build.sh", "serve", "--pull", cwd=project)
    (call,) = read_calls(calls)
    line = " ".join(call["words"])
    assert f"--file Dockerfile.serve --tag image-classifier-serve:{__version__} --tag" in line
    assert call["words"][-2] == "--pull" and " serve " not in line
    assert list_top(call) == {"requirements-build.txt", "requirements-serve.txt", "source", "wheels"}
    assert_nothing_is_left(project, calls)


def test_what_is_configured_is_used(
    project: Path, calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "torch-1-py3-none-any.whl").touch()
    variables = {"IMAGE_NAME": "mine", "IMAGE_VERSION": "7", "BASE_IMAGE": "base:1", "IMAGE_PLATFORM": "linux/arm64"}
    for name, value in {**variables, "IMAGE_SOURCE": "here", "IMAGE_WHEELS": str(wheels)}.items():
        monkeypatch.setenv(name, value)
    run_program(project / "docker" / "build.sh", cwd=project)
    (call,) = read_calls(calls)
    line = " ".join(call["words"])
    for expected in ("--tag mine:7 --tag mine:latest", "--platform linux/arm64", "BASE_IMAGE=base:1", "SOURCE=here"):
        assert expected in line
    assert "wheels/torch-1-py3-none-any.whl" in call["context"]
    assert_nothing_is_left(project, calls)


@pytest.mark.parametrize(("machine", "platform"), [("x86_64", "linux/amd64"), ("aarch64", "linux/arm64")])
def test_the_image_is_for_the_machine_that_builds_it(machine: str, platform: str, project: Path, calls: Path) -> None:
    run_program(project / "docker" / "build.sh", cwd=project, HOSTTYPE=machine)  # as bash names it
    assert f"--platform {platform}" in " ".join(read_calls(calls)[0]["words"])


def test_what_signs_in_at_the_origin_gets_into_no_label(project: Path, calls: Path) -> None:
    git = require_program("git")
    origin = run_program(git, "remote", "get-url", "origin", cwd=project).strip()
    run_program(git, "remote", "set-url", "origin", "https://me:secret@example.org/a/b.git", cwd=project)
    try:
        run_program(project / "docker" / "build.sh", cwd=project)
    finally:
        run_program(git, "remote", "set-url", "origin", origin, cwd=project)
    assert "SOURCE=https://example.org/a/b.git" in read_calls(calls)[0]["words"]


def test_the_context_holds_what_the_wheel_is_made_of_and_is_the_same_each_time(project: Path, calls: Path) -> None:
    run_program(project / "docker" / "build.sh", cwd=project)
    cache = project / "image_classifier" / "__pycache__"
    cache.mkdir()
    try:
        (cache / "main.cpython-311.pyc").write_bytes(b"bytecode")
        run_program(project / "docker" / "build.sh", cwd=project)
    finally:
        shutil.rmtree(cache)
    first, second = read_calls(calls)
    assert first["digest"] == second["digest"]
    tracked = run_program(require_program("git"), "ls-files", "image_classifier", cwd=project).split()
    source = {name.removeprefix("source/") for name in first["context"] if name.startswith("source/")}
    assert {*tracked, "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "MANIFEST.in"} <= source
    assert not {name for name in source - set(tracked) if name.startswith("image_classifier/") and "." in name}


PROGRAMS = ("bash", "cp", "dirname", "env", "find", "mkdir", "mktemp", "rm", "sed", "tr")


@pytest.fixture
def bare(tmp_path: Path, calls: Path) -> dict[str, str]:
    """An environment whose PATH has Debian's basic programs and docker: no Python, no git."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for program in PROGRAMS:
        (folder / program).symlink_to(require_program(program))
    (folder / "docker").symlink_to(calls.parent / "bin" / "docker")
    return {**os.environ, "PATH": str(folder)}


def test_docker_and_git_are_all_that_it_needs(project: Path, calls: Path, bare: dict[str, str]) -> None:
    (Path(bare["PATH"]) / "git").symlink_to(require_program("git"))
    result = subprocess.run([project / "docker" / "build.sh"], env=bare, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    revision = run_program(require_program("git"), "rev-parse", "HEAD", cwd=project).strip()
    assert f"REVISION={revision}" in read_calls(calls)[0]["words"]
    assert_nothing_is_left(project, calls)


def test_an_image_without_a_commit_is_not_built_in_silence(project: Path, calls: Path, bare: dict[str, str]) -> None:
    result = subprocess.run([project / "docker" / "build.sh"], env=bare, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")
    assert (
        result.stderr.startswith("note: this is no git checkout, or git is missing:") and result.stderr.count("\n") == 1
    )
    assert "REVISION=" in read_calls(calls)[0]["words"]
    named = subprocess.run([project / "docker" / "build.sh"], env={**bare, "IMAGE_REVISION": "1"}, capture_output=True)
    assert (named.returncode, named.stderr) == (0, b"")


@pytest.mark.parametrize("how", ["", "source "])
def test_without_docker_one_line_says_so(project: Path, calls: Path, bare: dict[str, str], how: str) -> None:
    (Path(bare["PATH"]) / "docker").unlink()
    words = [require_program("bash"), "-c", f'{how}docker/build.sh || echo "status $?"']
    result = subprocess.run(words, cwd=project, env=bare, capture_output=True, text=True)
    assert result.stdout == "status 2\n"
    assert (
        result.stderr.startswith("error: there is no program docker on the PATH: ") and result.stderr.count("\n") == 1
    )
    assert_nothing_is_left(project, calls)


@pytest.mark.parametrize("state", ["set -eu", "set +eu; CDPATH=/", "set -- --not-for-docker"])
def test_sourcing_leaves_the_shell_as_it_was(project: Path, calls: Path, state: str) -> None:
    look = (
        'echo "$PWD $- $*"; trap; compgen -A variable | grep -vE "^(BASH_.*|_|PIPESTATUS|LINENO)$";'
        " compgen -A function || true"
    )
    script = f"""
        {state}
        {{ {look}; }} > before
        source "{project}/docker/build.sh" 2> output
        echo "status $?"
        {{ {look}; }} > after
    """
    elsewhere = calls.parent / "elsewhere"
    assert run_program(require_program("bash"), "-c", script, cwd=elsewhere) == "status 0\n"
    assert (elsewhere / "after").read_text() == (elsewhere / "before").read_text()
    assert "--not-for-docker" not in read_calls(calls)[0]["words"]
    assert_nothing_is_left(project, calls)


@pytest.mark.parametrize("how", ["", "source "])
def test_a_build_that_fails_says_so_and_leaves_nothing(project: Path, calls: Path, how: str) -> None:
    script = f'{how}docker/build.sh 2>/dev/null || echo "status $?, goes on"'
    output = run_program(require_program("bash"), "-c", script, cwd=project, DOCKER_STATUS="7")
    assert output == "status 7, goes on\n"
    assert read_calls(calls)
    assert_nothing_is_left(project, calls)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("how", ["exec ", "source "])
def test_an_interrupted_build_leaves_nothing(
    project: Path, calls: Path, number: signal.Signals, status: int, how: str
) -> None:
    """The signal goes to the whole group, as Ctrl-C does on a terminal."""
    words = [require_program("bash"), "-c", f"{how}docker/build.sh"]
    environment = {**os.environ, "DOCKER_TIME_S": "120"}
    with subprocess.Popen(words, cwd=project, env=environment, start_new_session=True) as process:
        wait_for_call(calls, process)
        assert list((calls.parent / "temporary").iterdir())
        began = time.monotonic()
        os.killpg(process.pid, number)
        returned = process.wait(timeout=60)
    assert returned in (status, -number)
    assert time.monotonic() - began < 30
    wait_until_empty(calls.parent / "temporary")
    assert_nothing_is_left(project, calls)


def wait_until_empty(folder: Path) -> None:
    """Wait for a shell that cleans up after the one that was waited for."""
    deadline = time.monotonic() + 10
    while list(folder.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)


def test_two_builds_at_once_do_not_meet(project: Path, calls: Path) -> None:
    builds = [subprocess.Popen([project / "docker" / "build.sh"], cwd=project) for _ in range(2)]
    assert [build.wait(timeout=120) for build in builds] == [0, 0]
    first, second = read_calls(calls)
    assert first["words"][-1] != second["words"][-1]
    assert first["digest"] == second["digest"]
    assert_nothing_is_left(project, calls)


def test_only_a_build_context_is_cleaned_up(project: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    words = [project / "docker" / "cleanup_build_context.sh", tmp_path / "precious"]
    result = subprocess.run(words, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.endswith("is no build context; nothing is removed\n")
    assert (tmp_path / "precious").is_dir()
