"""The image that release.yaml builds, for real; tests/integration/test_release.py has the rest of the workflow."""

from __future__ import annotations

from pathlib import Path

import pytest

from image_classifier import __version__
from tests.conftest import run_program
from tests.e2e.conftest import build_docker_words, inspect
from tests.release import Scene, bumped, scene

__all__ = ["bumped", "scene"]
pytestmark = pytest.mark.timeout(1800)  # where nothing of it is cached


def test_the_released_image_is_of_the_tagged_commit(docker: str, training_image: str, scene: Scene) -> None:
    jobs = scene.run(builds_image=True)
    assert {job.result for job in jobs.values()} == {"success"}, jobs["image"].log
    (build,) = scene.github.builds
    assert build["push"] == build["sbom"] == "true" and build["platforms"] == "linux/amd64"
    assert scene.tag in build["tags"]
    (image,) = [digest for a in scene.github.attestations for digest in a.subjects.values() if digest[:7] == b"sha256:"]
    identifier = image.decode().removeprefix("sha256:")
    labels = inspect(docker, identifier)["Config"]["Labels"]
    kept = {name.rpartition(".")[2]: value for name, value in labels.items()}
    assert (kept["version"], kept["revision"]) == (scene.tag, scene.git("rev-parse", "HEAD"))
    words = (*build_docker_words(docker), identifier, "image_classifier", "--version")
    assert (
        run_program(*words, cwd=Path("/")) == f"image_classifier {scene.tag}\n" != f"image_classifier {__version__}\n"
    )
