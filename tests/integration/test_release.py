"""release.yaml, executed: what it checks before anything is published, and what it publishes."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.actions import JobRun, Runner, UnknownFormError
from tests.published import claim
from tests.release import IDENTITY, MODEL, Scene, bumped, scene
from tests.sigstore import Sigstore

__all__ = ["bumped", "scene"]


def get_results(jobs: dict[str, JobRun]) -> dict[str, str]:
    """Get what became of each job."""
    return {name: job.result for name, job in jobs.items()}


def test_a_release_has_the_distributions_the_notes_and_the_signed_model(scene: Scene, tmp_path: Path) -> None:
    scene.publish()
    jobs = scene.run()
    log = "\n".join(job.log for job in jobs.values())
    assert set(get_results(jobs).values()) == {"success"}, log
    assert set(scene.github.index) == {
        f"image_classifier-{scene.tag}-py3-none-macosx_12_0_arm64.whl",
        f"image_classifier-{scene.tag}-py3-none-manylinux_2_17_aarch64.whl",
        f"image_classifier-{scene.tag}-py3-none-manylinux_2_17_x86_64.whl",
        f"image_classifier-{scene.tag}.tar.gz",
    }
    release = scene.github.folder / "releases" / scene.tag
    files = {path.name: path for path in release.iterdir()}
    assert files.keys() == {"notes.md", f"model-{scene.tag}.tar.gz", *scene.github.index}
    assert files["notes.md"].read_text() == "- Something new.\n"
    assert {name: files[name].read_bytes() for name in scene.github.index} == scene.github.index
    (attestation,) = scene.github.attestations
    assert attestation.subjects == scene.github.index
    assert attestation.commit == scene.git("rev-parse", "HEAD")
    with tarfile.open(files[f"model-{scene.tag}.tar.gz"]) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    unpacked = {path.name: path.read_bytes() for path in (tmp_path / "unpacked" / "model").iterdir()}
    assert unpacked == {path.name: path.read_bytes() for path in scene.published.iterdir()}
    assert "model.sig" in unpacked
    assert all(job.commits <= {attestation.commit} for job in jobs.values() if job.may_sign)


def test_a_release_without_a_model_has_none(scene: Scene) -> None:
    assert set(get_results(scene.run()).values()) == {"success"}
    assert not list((scene.github.folder / "releases" / scene.tag).glob("model*"))


def change_ci(**changes: object) -> Callable[[Scene], None]:
    """Let the API show something else of the run of ci.yaml."""
    return lambda scene: scene.github.change_run("40", **changes)


def move_tag(scene: Scene) -> None:
    """Tag a commit that is on another branch alone, where ci.yaml passed, too."""
    scene.git("checkout", "--quiet", "-b", "aside")
    scene.git("commit", "--quiet", "--allow-empty", "--message=Aside")
    scene.git("tag", "--force", "--annotate", "--message=x", scene.tag)
    scene.github.add_run("42", path=".github/workflows/ci.yaml", event="push", head_branch="aside")


def push_over(scene: Scene) -> None:
    """Take the tagged commit off the branch again."""
    scene.git("reset", "--quiet", "--hard", "HEAD~1")


def add_failure(scene: Scene) -> None:
    """Let ci.yaml run again at the commit, and fail."""
    scene.github.add_run("43", path=".github/workflows/ci.yaml", event="push", conclusion="failure")


def change_model(**changes: object) -> Callable[[Scene], None]:
    """Let the API show something else of the run that published the model."""

    def change(scene: Scene) -> None:
        scene.publish()
        scene.github.change_run(MODEL, **changes)

    return change


def add_file(scene: Scene) -> None:
    """Lay a file beside the model after it was signed."""
    scene.publish()
    (scene.published / "more.txt").write_text("more")
    scene.github.add_artifact(MODEL, "published", scene.published)


def change_content(scene: Scene) -> None:
    """Claim another accuracy after the model was signed, in a manifest that is consistent in itself."""
    scene.publish()
    claim(scene.published, 1)
    scene.github.add_artifact(MODEL, "published", scene.published)


def leave_unsigned(scene: Scene) -> None:
    """Let the model be published without a signature."""
    scene.publish()
    (scene.published / "model.sig").unlink()
    scene.github.add_artifact(MODEL, "published", scene.published)


def sign_elsewhere(scene: Scene) -> None:
    """Let the right identity be vouched for by somebody else."""
    scene.sigstore = Sigstore()
    scene.publish()


def set_model(value: str) -> Callable[[Scene], None]:
    """Let the variable name something else."""
    return lambda scene: setattr(scene, "model", value)


REFUSED: dict[str, tuple[Callable[[Scene], None], str]] = {
    "ci.yaml failed": (change_ci(conclusion="failure"), "has not succeeded: failure"),
    "ci.yaml was cancelled": (change_ci(conclusion="cancelled"), "has not succeeded: cancelled"),
    "ci.yaml runs still": (change_ci(status="in_progress", conclusion=None), "has not succeeded: in_progress"),
    "ci.yaml failed later": (add_failure, "has not succeeded: failure"),
    "ci.yaml ran elsewhere": (change_ci(head_sha="0" * 40), "ci.yaml has not run at"),
    "ci.yaml ran on another branch": (change_ci(head_branch="aside"), "ci.yaml has not run at"),
    "ci.yaml ran for a pull request": (change_ci(event="pull_request"), "ci.yaml has not run at"),
    "ci.yaml ran in a fork": (change_ci(head_repository={"id": 2}), "is of another repository's commit"),
    "another workflow passed": (change_ci(path=".github/workflows/security.yaml"), "ci.yaml has not run at"),
    "a workflow of a like name passed": (change_ci(path=".github/workflows/x/ci.yaml"), "not of .github/workflows/ci"),
    "the commit is on another branch": (move_tag, "is not in the history of refs/remotes/origin/main"),
    "the commit was pushed over": (push_over, "is not in the history of refs/remotes/origin/main"),
    "the model's run failed": (change_model(conclusion="failure"), "has not succeeded: failure"),
    "the model's run is another workflow's": (change_model(path=".github/workflows/ci.yaml"), "not of .github/workfl"),
    "the model's run is another branch's": (change_model(head_branch="aside"), "is of the branch aside"),
    "the model's run is a fork's": (change_model(head_repository={"id": 2}), "is of another repository's commit"),
    "the model's run is a pull request's": (change_model(event="pull_request"), "was started by pull_request"),
    "the model's commit is not the branch's": (change_model(head_sha="0" * 40), "is not in the history of"),
    "the model was not published": (lambda scene: scene.publish(name="run"), "has left no artifact published"),
    "the model's run is no number": (set_model("41/artifacts"), "takes the number of a workflow run"),
    "the model's run does not exist": (set_model("99"), "GitHub does not answer"),
    "the model is not signed": (leave_unsigned, "is not signed: it has no model.sig"),
    "a file was added to the model": (add_file, "which its manifest.json does not list"),
    "the model was changed": (change_content, "is not signed by"),
    "the model is signed on another branch": (
        lambda scene: scene.publish(identity=IDENTITY.replace("main", "aside")),
        "is not signed by",
    ),
    "the model is signed by another workflow": (
        lambda scene: scene.publish(identity=IDENTITY.replace("training", "ci")),
        "is not signed by",
    ),
    "the model is signed by another repository": (
        lambda scene: scene.publish(identity=IDENTITY.replace("somebody", "else")),
        "is not signed by",
    ),
    "the model's signer is vouched for by another": (sign_elsewhere, "is not signed by"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_nothing_is_released_otherwise(scene: Scene, name: str) -> None:
    change, message = REFUSED[name]
    change(scene)
    jobs = scene.run()
    assert get_results(jobs) == {job: "failure" if job == "check" else "skipped" for job in jobs}
    assert message in jobs["check"].log
    assert not scene.github.index and not scene.github.attestations
    assert not any((scene.github.folder / "releases").iterdir())


@pytest.mark.parametrize("ref", ["refs/heads/main", "refs/tags/v1.0.0", "refs/tags/x/1.0.0"])
def test_nothing_else_that_is_pushed_starts_a_release(scene: Scene, ref: str) -> None:
    if ref.startswith("refs/tags/"):
        scene.git("update-ref", ref, "HEAD")
    with pytest.raises(UnknownFormError, match="release.yaml does not run on push of"):
        Runner(scene.github, "release.yaml", scene.folder, run_id="50", inputs=None, event="push", ref=ref)
