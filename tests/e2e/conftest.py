"""The training image, built once and shared by all tests that run it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import report_lack, require_program, run_program

IMAGE_NAME = f"image-classifier-test-{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}"
"""Another than the image of whoever runs the tests, and than that of tests that run at the same time."""


@pytest.fixture(scope="session")
def docker() -> str:
    """The path of a docker command that an engine answers; without one the test is skipped."""
    docker = require_program("docker")
    answer = subprocess.run([docker, "images", "--quiet"], capture_output=True, text=True, timeout=600)
    if answer.returncode != 0:
        report_lack(f"no engine answers {docker}: {' '.join(answer.stderr.split())}")
    return docker


@pytest.fixture(scope="session")
def training_image(docker: str, project_copy: Path) -> str:
    """The image that docker/build.sh makes of the project's copy."""
    build_image(project_copy)
    return f"{IMAGE_NAME}:latest"


def build_image(project: Path) -> str:
    """Build the training image of a copy of the project and return what the build said."""
    words = (project / "docker" / "build.sh",)
    return run_program(*words, cwd=project, timeout_s=1200, IMAGE_NAME=IMAGE_NAME)


def build_docker_words(docker: str, *mounts: str, options: tuple[str, ...] = (), user: str = "") -> list[str]:
    """Build the words of a `docker run` that gives a container no more than it needs; never root's rights."""
    own = str(os.getuid() or 12345)
    words = [docker, "run", "--rm", "--user", user or f"{own}:{own}", "--read-only", "--cap-drop", "ALL"]
    words += ["--security-opt", "no-new-privileges", *options]
    for mount in mounts:
        words += ["--volume", mount]
    return words


def make_open_folder(folder: Path) -> Path:
    """Make a folder that any user may write."""
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    return folder


def inspect(docker: str, image: str) -> dict[str, Any]:
    """Read what an image says about itself."""
    (facts,) = json.loads(run_program(docker, "inspect", image, cwd=Path("/")))
    return dict(facts)
