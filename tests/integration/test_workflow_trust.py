"""What training.yaml takes from other runs of workflows: only what a training on its own branch has left."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import struct
import subprocess
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.actions import REPOSITORY, TOKEN, GitHub, JobRun, Runner, ask_git
from tests.conftest import PROJECT, require_program, run_program

INPUTS: Mapping[str, str | bool] = {"experiment_name": "trust", "run_name": "long", "dataset": "sample"}
Change = Callable[["Scene"], object]


@dataclass
class Scene:
    """A training that was interrupted on the branch main, which has moved on since: a test changes one thing of it.

    Attributes:
        commits: by what became of them: `begun` at which the training began, `tip` of the branch, `proposed` in a pull
            request, `replaced` by a push with --force, `aside` on another branch.
        continuation: what the workflow gives itself to go on.
    """

    github: GitHub
    folder: Path
    commits: dict[str, str]
    continuation: str
    artifact: dict[str, Any]

    def run(self, inputs: Mapping[str, str | bool] | None, trained: str = "begun") -> dict[str, JobRun]:
        """Run the workflow, in which a run that was made before takes the place of the training.

        Args:
            trained: the commit that its record names.
        """

        def train(job: JobRun) -> None:
            left = self.github.add_artifact("30", "run", make_run(self.folder.with_name("made"), self.commits[trained]))
            job.outputs.update(finished="true", artifact_id=str(left["id"]), artifact_digest=left["digest"][7:])

        runner = Runner(self.github, "training.yaml", self.folder, run_id="30", inputs=inputs)
        return runner.run({"train": train, "verify": lambda job: None})

    def go_on(self, trained: str = "begun") -> dict[str, JobRun]:
        """Run the workflow as a person, or the workflow itself, starts it to go on."""
        return self.run({**INPUTS, "continuation": self.continuation}, trained)

    def leave(self, content: Path | bytes, name: str = "unfinished-run", **changes: Any) -> dict[str, Any]:
        """Leave another artifact in the run that was interrupted."""
        return self.github.add_artifact("10", name, content, **changes)


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory, project_copy: Path) -> tuple[Path, dict[str, str]]:
    """A repository whose branch main has a history, and its commits by what became of them."""
    git, repository = require_program("git"), tmp_path_factory.mktemp("history") / "repository"
    run_program(git, "clone", "--quiet", project_copy, repository, cwd=repository.parent)
    commits = {}

    def commit(name: str) -> None:
        run_program(git, "commit", "--quiet", "--allow-empty", f"--message={name}", cwd=repository)
        commits[name] = ask_git(repository, "rev-parse", "HEAD")

    commit("begun")
    for name, ref in (("proposed", "refs/pull/7/head"), ("replaced", "refs/kept"), ("aside", "refs/heads/aside")):
        script = repository / ".github" / "scripts" / "train.sh"
        script.write_text(f"#!/bin/sh\n: {name} > canary\n")
        run_program(git, "add", "--all", cwd=repository)
        commit(name)
        run_program(git, "update-ref", ref, "HEAD", cwd=repository)
        run_program(git, "reset", "--quiet", "--hard", commits["begun"], cwd=repository)
    commit("tip")
    return repository, commits


@pytest.fixture
def scene(tmp_path: Path, history: tuple[Path, dict[str, str]]) -> Scene:
    """A branch with a history, and what an interrupted training on it has left."""
    repository, commits = history
    github = GitHub(tmp_path / "github", repository)
    github.add_run("10", head_sha=commits["begun"])
    artifact = github.add_artifact("10", "unfinished-run", make_run(tmp_path / "run", commits["begun"]))
    return Scene(github, tmp_path / "runs", commits, f"10:1:{commits['begun']}", artifact)


def make_run(folder: Path, commit: str, **changes: Any) -> Path:
    """Make the folder of a run as far as a plan looks at it."""
    folder.mkdir()
    record = {
        "experiment_name": "trust",
        "run_name": "long",
        "recipe": "notebook",
        "settings": {"instruction_set": "portable"},
        "execution": {"dataset_folder": "/data/sample_dataset", "pretrained_model": None},
        "code": {"commit": commit, "uncommitted_changes": False},
    }
    (folder / "run.json").write_text(json.dumps({**record, **changes}))
    (folder / "model.pth").write_bytes(commit.encode())
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "state.pth").write_bytes(b"state")
    return folder


def zip_files(*names: str, content: bytes = b"x", mode: int = stat.S_IFREG | 0o644, size: int | None = None) -> bytes:
    """Make the zip file of a run with more in it.

    Args:
        size: what the list of files says of each one's size; None for the truth.
    """
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one name may be there twice
        archive.writestr("run.json", b"{}")
        for name in names:
            entry = zipfile.ZipInfo(name)
            entry.external_attr = mode << 16
            archive.writestr(entry, content)
    listed = packed.getvalue()
    if size is not None:
        head, *entries = listed.split(b"PK\1\2")
        listed = b"PK\1\2".join([head, *(entry[:20] + struct.pack("<L", size) + entry[24:] for entry in entries)])
    return listed


def zip_record(record: bytes) -> bytes:
    """Make the zip file of a run with a record as it is."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("run.json", record)
    return packed.getvalue()


def name_commit(name: str) -> Change:
    """Go on at another commit, of which the artifact speaks, too."""

    def change(scene: Scene) -> None:
        commit = scene.commits.get(name, name)
        scene.leave(make_run(scene.folder.with_name("forged"), commit))
        scene.continuation = f"10:1:{commit}"

    return change


def change_run(**changes: Any) -> Change:
    """Let the API show something else of the run that left the artifact."""
    return lambda scene: scene.github.change_run("10", **changes)


def change_artifact(**changes: Any) -> Change:
    """Let the API show something else of the artifact."""
    return lambda scene: scene.github.change_artifact(scene.artifact["id"], **changes)


def change_record(**changes: Any) -> Change:
    """Leave the artifact of something else."""
    return lambda scene: scene.leave(make_run(scene.folder.with_name("forged"), scene.commits["begun"], **changes))


def leave(content: bytes) -> Change:
    """Leave an artifact as it is."""
    return lambda scene: scene.leave(content)


FORGED: dict[str, tuple[Change, str]] = {
    "an invented commit": (name_commit("f" * 40), "is not in the history of"),
    "a commit of a pull request": (name_commit("proposed"), "is not in the history of"),
    "a commit that was pushed over": (name_commit("replaced"), "is not in the history of"),
    "a commit of another branch": (name_commit("aside"), "is not in the history of"),
    "another commit of the branch": (
        lambda scene: setattr(scene, "continuation", f"10:1:{scene.commits['tip']}"),
        "has left the commit",
    ),
    "a fork's run": (
        change_run(head_repository={"id": 2}),
        "is of another repository's commit",
    ),
    "a run of a fork that is gone": (change_run(head_repository=None), "is of another repository's commit"),
    "a pull request's run": (change_run(event="pull_request"), "was started by pull_request"),
    "a push's run": (change_run(event="push"), "was started by push"),
    "another workflow's run": (
        change_run(path=".github/workflows/other.yaml"),
        "is one of .github/workflows/other.yaml",
    ),
    "a workflow of that name elsewhere": (change_run(path="training.yaml"), "is one of training.yaml"),
    "another branch's run": (change_run(head_branch="aside"), "is of the branch aside"),
    "a run of a tag of that name": (
        lambda scene: scene.github.change_run("10", head_sha=scene.commits["aside"]),
        "is not in the history of",
    ),
    "a run whose commit was pushed over": (
        lambda scene: scene.github.change_run("10", head_sha=scene.commits["replaced"]),
        "is not in the history of",
    ),
    "a run that does not exist": (
        lambda scene: setattr(scene, "continuation", f"11:1:{scene.commits['begun']}"),
        "GitHub does not answer",
    ),
    "an artifact that has expired": (change_artifact(expired=True), "has expired"),
    "no artifact of the name": (change_artifact(name="run"), "has left no artifact unfinished-run"),
    "an artifact without a digest": (change_artifact(digest=None), "has no digest"),
    "an artifact that is too large": (change_artifact(size_in_bytes=1 << 50), "bytes"),
    "an artifact of a fork": (
        lambda scene: change_artifact(workflow_run={**scene.artifact["workflow_run"], "head_repository_id": 2})(scene),
        "is of another repository's commit",
    ),
    "an artifact of another commit": (
        lambda scene: change_artifact(workflow_run={**scene.artifact["workflow_run"], "head_sha": "0" * 40})(scene),
        "is of another run",
    ),
    "another content": (change_artifact(digest="sha256:" + "0" * 64), "has the digest"),
    "another experiment": (change_record(experiment_name="other"), "has left the experiment other, not trust"),
    "another run of it": (change_record(run_name="other"), "has left the run other, not long"),
    "another commit in the record": (change_record(code={"commit": "0" * 40}), "has left the commit 000"),
    "a record that is a list": (leave(zip_record(b"[]")), "has left the experiment , not trust"),
    "a record without an end": (leave(zip_record(b"[" * 100_000)), "has left no record"),
    "no record": (leave(zip_record(b"")), "has left no record"),
    "no zip file": (leave(b"no zip file"), "cannot be unpacked"),
    "a damaged zip file": (leave(zip_record(b"{}").replace(b"{}", b"[]")), "cannot be unpacked"),
    "a link": (leave(zip_files("model.pth", content=b"/etc/passwd", mode=stat.S_IFLNK | 0o777)), "'model.pth'"),
    "a device": (leave(zip_files("model.pth", mode=stat.S_IFBLK | 0o777)), "'model.pth'"),
    "a way out": (leave(zip_files("../canary")), "'../canary'"),
    "a way out below": (leave(zip_files("a/../../canary")), "'a/../../canary'"),
    "an absolute path": (leave(zip_files("/canary")), "'/canary'"),
    "a hidden file": (leave(zip_files(".git/hooks/post-checkout")), "'.git/hooks/post-checkout'"),
    "an option": (leave(zip_files("--upload-pack=canary")), "'--upload-pack=canary'"),
    "a command in a name": (leave(zip_files("a\n::set-output name=train::canary")), "::set-output name=train::canary'"),
    "another alphabet": (leave(zip_files("ｍodel.pth")), "odel.pth"),
    "a name twice": (leave(zip_files("run.json")), "two files of one name"),
    "a file that is a folder, too": (leave(zip_files("run.json/a")), "cannot be unpacked"),
    "many files": (leave(zip_files(*map(str, range(10_000)), content=b"")), "more than 10,000 files"),
    "a bomb": (leave(zip_files("a", "b", size=2**32 - 2)), "bytes"),
}


@pytest.mark.parametrize("name", FORGED)
def test_nothing_else_goes_on(scene: Scene, name: str) -> None:
    change, message = FORGED[name]
    change(scene)
    jobs = scene.go_on()
    results = {job: run.result for job, run in jobs.items()}
    assert results == {job: "failure" if job == "plan" else "skipped" for job in jobs}, jobs["plan"].log
    (error,) = [line for line in jobs["plan"].log.splitlines() if line.startswith("::")]
    assert error.startswith("::error::") and message in error
    assert len(error) < 500
    assert not jobs["plan"].outputs
    assert not list(scene.folder.parent.rglob("canary"))


def get_results(jobs: Mapping[str, JobRun]) -> dict[str, str]:
    """Get what became of each job."""
    return {name: job.result for name, job in jobs.items()}


def test_an_interrupted_training_goes_on_at_its_commit_and_nothing_signs_it(scene: Scene) -> None:
    """The branch has moved on, and a signature could name its newest commit alone."""
    jobs = scene.run({**INPUTS, "continuation": scene.continuation, "publish": True})
    skipped = dict.fromkeys(("attest", "sign", "verify", "continue"), "skipped")
    assert get_results(jobs) == {"plan": "success", "train": "success", **skipped}, jobs["plan"].log
    outputs = jobs["plan"].outputs
    assert (outputs["commit"], outputs["continuation_number"]) == (scene.commits["begun"], "1")
    assert (outputs["unfinished_id"], outputs["unfinished_digest"]) == ("1", scene.artifact["digest"])
    assert not scene.github.attestations


def test_a_training_that_went_on_at_the_newest_commit_is_attested(scene: Scene) -> None:
    tip = scene.commits["tip"]
    scene.github.add_run("11", head_sha=tip)
    scene.github.add_artifact("11", "unfinished-run", make_run(scene.folder.with_name("other"), tip))
    jobs = scene.run({**INPUTS, "continuation": f"11:2:{tip}"}, trained="tip")
    assert get_results(jobs)["attest"] == "success", jobs["attest"].log
    (attestation,) = scene.github.attestations
    assert (attestation.commit, attestation.subjects) == (tip, {"model.pth": tip.encode()})


@pytest.mark.parametrize("trained", ["begun", "proposed"])
def test_a_record_of_another_commit_is_not_attested(scene: Scene, trained: str) -> None:
    jobs = scene.run(INPUTS, trained=trained)
    assert get_results(jobs)["attest"] == "failure"
    assert "::error::the record names another commit than" in jobs["attest"].log
    assert not scene.github.attestations


def test_what_is_downloaded_is_what_was_planned_with(scene: Scene) -> None:
    """The artifact becomes another between the two."""
    jobs = scene.go_on()
    other = zip_record(b"{}")
    (scene.github.folder / "zips" / "1.zip").write_bytes(other)
    scene.github.change_artifact(1, digest=f"sha256:{hashlib.sha256(other).hexdigest()}")
    outputs, target = jobs["plan"].outputs, scene.folder / "unfinished"
    words = [PROJECT / ".github/scripts/artifact.py", outputs["unfinished_id"], outputs["unfinished_digest"], target]
    path = f"{scene.github.folder / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "GH_TOKEN": TOKEN, "GITHUB_REPOSITORY": REPOSITORY}
    result = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout.startswith("::error::the artifact 1 has the digest sha256:")
    assert not target.exists()


@pytest.fixture
def published(scene: Scene) -> Scene:
    """A run that was published, and a later one, which a test changes."""
    for number, name in (("20", "genuine"), ("21", "later")):
        scene.github.add_run(number, head_sha=scene.commits["begun"])
        run = make_run(scene.folder.with_name(name), scene.commits["begun"], run_name=name)
        scene.artifact = scene.github.add_artifact(number, "run", run)
    return scene


PASSED_OVER: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "a fork's": ({"head_repository": {"id": 2}}, {}),
    "a pull request's": ({"event": "pull_request"}, {}),
    "another workflow's": ({"path": ".github/workflows/other.yaml"}, {}),
    "another branch's": ({"head_branch": "aside"}, {}),
    "of a commit that is not in the branch": ({"head_sha": "proposed"}, {}),
    "failed": ({"conclusion": "failure"}, {}),
    "expired": ({}, {"expired": True}),
    "without a digest": ({}, {"digest": None}),
    "of another name": ({}, {"name": "published"}),
}


def test_the_schedule_verifies_the_newest_run(published: Scene) -> None:
    assert published.run(None)["plan"].outputs["published_digest"] == published.artifact["digest"]


@pytest.mark.parametrize("name", PASSED_OVER)
def test_the_schedule_passes_over_what_is_not_of_this_workflow_on_the_branch(published: Scene, name: str) -> None:
    run, artifact = PASSED_OVER[name]
    run = {**run, **({"head_sha": published.commits[run["head_sha"]]} if "head_sha" in run else {})}
    published.github.change_run("21", **run)
    published.github.change_artifact(published.artifact["id"], **artifact)
    outputs = published.run(None)["plan"].outputs
    assert (outputs["published_id"], outputs["commit"]) == ("2", published.commits["begun"])
