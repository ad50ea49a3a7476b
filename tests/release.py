"""A repository with a release that may be made."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.actions import REPOSITORY, GitHub, JobRun, Runner
from tests.conftest import require_program, run_program
from tests.sigstore import Sigstore

IDENTITY = f"https://github.com/{REPOSITORY}/.github/workflows/training.yaml@refs/heads/main"


MODEL = "41"


@dataclass
class Scene:
    """A repository with a release that has been tagged, at a commit that passed, and a model; a test changes one thing.

    Attributes:
        tag: as `bumpver` made it.
        model: number of the run that published one, as the repository's variable has it.
    """

    github: GitHub
    folder: Path
    repository: Path
    sigstore: Sigstore
    published: Path
    tag: str
    model: str = ""

    def git(self, *words: str) -> str:
        """Run git in the repository."""
        return run_program(require_program("git"), *words, cwd=self.repository).strip()

    def publish(self, *, identity: str = IDENTITY, name: str = "published") -> None:
        """Let a run of training.yaml publish the model, and the variable name it."""
        self.sigstore.sign(self.published, identity)
        self.github.add_run(MODEL)
        self.github.add_artifact(MODEL, name, self.published)
        self.model = MODEL

    def run(self, *, builds_image: bool = False) -> dict[str, JobRun]:
        """Push the tag; the image is built where there is an engine."""
        runner = Runner(
            self.github,
            "release.yaml",
            self.folder,
            run_id="50",
            inputs=None,
            event="push",
            ref=f"refs/tags/{self.tag}",
            variables={"RELEASED_MODEL_RUN_ID": self.model} if self.model else {},
            environment={"IMAGE_CLASSIFIER_TRUST_CONFIG": str(self.folder.parent / "trust.json"), "PIP_NO_INDEX": "1"},
        )
        return runner.run({} if builds_image else {"image": lambda job: None})


@pytest.fixture(scope="module")
def bumped(tmp_path_factory: pytest.TempPathFactory, project_copy: Path) -> tuple[Path, str]:
    """A repository in which `bumpver` has made the next version, and the tag."""
    git, repository = require_program("git"), tmp_path_factory.mktemp("bumped") / "repository"
    run_program(git, "clone", "--quiet", project_copy, repository, cwd=repository.parent)
    changelog = repository / "CHANGELOG.md"
    text = changelog.read_text(encoding="utf-8").replace("## [Unreleased]\n", "", 1)
    head, _, rest = text.partition("\n## [")
    changelog.write_text(f"{head}\n## [Unreleased]\n\n- Something new.\n\n## [{rest}", encoding="utf-8")
    run_program(git, "commit", "--quiet", "--all", "--message=Write", cwd=repository)
    run_program(Path(sys.executable).parent / "bumpver", "update", "--no-fetch", "--patch", cwd=repository)
    return repository, run_program(git, "tag", cwd=repository).strip()


@pytest.fixture
def scene(tmp_path: Path, bumped: tuple[Path, str], published_run: Path) -> Scene:
    """A release that may be made."""
    repository = tmp_path / "repository"
    shutil.copytree(bumped[0], repository)
    github = GitHub(tmp_path / "github", repository)
    github.add_run("40", path=".github/workflows/ci.yaml", event="push")
    sigstore = Sigstore()
    sigstore.write_trust_config(tmp_path / "trust.json")
    published = shutil.copytree(published_run, tmp_path / "published")
    return Scene(github, tmp_path / "runs", repository, sigstore, published, bumped[1])
