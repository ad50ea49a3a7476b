#!/usr/bin/env python3
"""Finds artifacts that a training on this branch left, and downloads one: artifact.py ID DIGEST FOLDER

Anybody can hand in an artifact of any name, for example in a pull request that changes a workflow. So what is taken is
traced back through GitHub's API to a run of training.yaml in this repository, started by hand, on the branch that is
asked for, at a commit of its history. What was found is known by its number and digest, and whoever downloads it
compares both again.

Needs GH_TOKEN and GITHUB_REPOSITORY; what finds something needs GITHUB_RUN_ID, too, and a clone with its whole history.
Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

WORKFLOW = ".github/workflows/training.yaml"
RUN, UNFINISHED, PUBLISHED = "run", "unfinished-run", "published"
MAX_FILES = 10_000
MAX_BYTES = 8 << 30


class RefusedError(Exception):
    """Something is not what it has to be; the message says so in one line."""


@dataclass(frozen=True)
class Artifact:
    """An artifact that was traced back.

    Attributes:
        id: its number, which no other artifact ever gets.
        digest: "sha256:" and 64 hexadecimal digits, of the zip file.
        run_id: the run of the workflow that left it.
    """

    id: int
    digest: str
    run_id: int


def find_newest(branch: str) -> Artifact | None:
    """Find the newest run that was published on a branch; other than this one, and None if there is none."""
    query = f"branch={quote(branch, safe='')}&event=workflow_dispatch&status=success&per_page=100"
    runs = ask(f"actions/workflows/{Path(WORKFLOW).name}/runs?{query}")["workflow_runs"]
    head = get_tip(branch)
    for run in sorted(runs, key=lambda run: (run["created_at"], run["id"]), reverse=True):
        if str(run["id"]) == os.environ["GITHUB_RUN_ID"]:
            continue
        try:
            check_run(run, branch, head)
            return get_artifact(run, RUN)
        except RefusedError as reason:
            print(f"passed over: {make_printable(reason)}", file=sys.stderr)
    return None


def find_artifact(run_id: str, name: str, branch: str, head: str, *, finished: bool = True) -> Artifact:
    """Find an artifact of one run of the workflow, as `check_run` has it.

    Raises:
        RefusedError: the run or the artifact is another's, or is no longer there.
    """
    run = ask(f"actions/runs/{int(run_id)}")
    check_run(run, branch, head, finished=finished)
    return get_artifact(run, name)


def get_tip(branch: str) -> str:
    """Name the newest commit of a branch as this clone has it."""
    return f"refs/remotes/origin/{branch}"


def check_run(
    run: Mapping[str, Any],
    branch: str,
    head: str,
    *,
    finished: bool = True,
    workflow: str = WORKFLOW,
    event: str = "workflow_dispatch",
) -> None:
    """Check that a run is one of a workflow of this repository, of an event on a branch.

    Args:
        head: the commit in whose history the run's has to be: a tag or a fork's branch may have the same name, and
            what was pushed over is no longer the branch's.
        finished: whether the run must have ended, and well.

    Raises:
        RefusedError: it is not.
    """
    what = f"the workflow run {run['id']}"
    path = str(run["path"]).partition("@")[0]  # the API may name the branch behind it
    here, there = ((run[key] or {}).get("id") for key in ("repository", "head_repository"))
    for is_wrong, reason in (
        (path != workflow, f"is one of {path}, not of {workflow}"),
        (here is None or here != there, "is of another repository's commit"),
        (run["event"] != event, f"was started by {run['event']}, not by {event}"),
        (run["head_branch"] != branch, f"is of the branch {run['head_branch']}, not of {branch}"),
        (finished and run["conclusion"] != "success", f"has not succeeded: {run['conclusion'] or run['status']}"),
    ):
        if is_wrong:
            raise RefusedError(f"{what} {reason}")
    check_history(str(run["head_sha"]), head, f"the commit of {what}")


def check_history(commit: str, head: str, what: str) -> None:
    """Check that a commit is another one, or belongs to its history.

    Raises:
        RefusedError: it does not, or nothing is known of it.
    """
    if ask_git("rev-parse", "--is-shallow-repository") != "false":
        raise RefusedError("this clone lacks its history: check it out with fetch-depth: 0")
    if not re.fullmatch(r"[0-9a-f]{40}", commit) or ask_git("merge-base", "--is-ancestor", commit, head) is None:
        raise RefusedError(f"{what}, {commit}, is not in the history of {head}")


def get_artifact(run: Mapping[str, Any], name: str) -> Artifact:
    """Get the artifact of this name that a run left last.

    Raises:
        RefusedError: there is none, or it has expired, or what the API says of it does not fit the run.
    """
    found = ask(f"actions/runs/{run['id']}/artifacts?name={name}&per_page=100")["artifacts"]
    named = [artifact for artifact in found if artifact["name"] == name]
    if not named:
        raise RefusedError(f"the workflow run {run['id']} has left no artifact {name}")
    artifact = max(named, key=lambda artifact: int(artifact["id"]))  # a run that is repeated leaves it again
    what = f"the artifact {name} of the workflow run {run['id']}"
    origin = artifact["workflow_run"] or {}
    if artifact["expired"] is not False:
        raise RefusedError(f"{what} has expired")
    if (origin.get("id"), origin.get("head_sha")) != (run["id"], run["head_sha"]):
        raise RefusedError(f"{what} is of another run")
    if origin.get("repository_id") is None or origin["repository_id"] != origin.get("head_repository_id"):
        raise RefusedError(f"{what} is of another repository's commit")
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", str(artifact["digest"])):
        raise RefusedError(f"{what} has no digest")
    if not int(artifact["size_in_bytes"]) <= MAX_BYTES:
        raise RefusedError(f"{what} has {artifact['size_in_bytes']} bytes; {MAX_BYTES:,} are taken")
    return Artifact(int(artifact["id"]), artifact["digest"], int(run["id"]))


def download(artifact_id: int, digest: str, folder: Path) -> None:
    """Download an artifact of a known digest and unpack it into a folder, which must not exist.

    Raises:
        RefusedError: its content is another, or holds something else than files and folders of plain names.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as temporary:
        archive = Path(temporary) / "artifact.zip"
        with open(archive, "wb") as file:
            request(f"actions/artifacts/{artifact_id}/zip", file.fileno())
        with open(archive, "rb") as file:
            found = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        if found != digest:
            raise RefusedError(f"the artifact {artifact_id} has the digest {found}, not {digest}")
        unpacked = Path(temporary) / "unpacked"
        unpack(archive, unpacked)
        folder.mkdir()  # fails where there is one
        unpacked.rename(folder)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack an artifact.

    Raises:
        RefusedError: it is no zip file, is too large, or holds a link or a name that could lead out or deceive.
    """
    try:
        with zipfile.ZipFile(archive) as content:
            members = content.infolist()
            for member in members:
                _check_member(member)
            if len({member.filename for member in members}) < len(members):
                raise RefusedError("the artifact holds two files of one name")
            if len(members) > MAX_FILES or sum(member.file_size for member in members) > MAX_BYTES:
                raise RefusedError(f"the artifact has more than {MAX_FILES:,} files or {MAX_BYTES:,} bytes")
            content.extractall(folder)
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError) as error:
        raise RefusedError(f"the artifact cannot be unpacked: {error!a}") from error


def _check_member(member: zipfile.ZipInfo) -> None:
    """Runs consist of files whose names are plain; a name may be shown and becomes part of commands."""
    mode = member.external_attr >> 16
    kind = stat.S_IFMT(mode)
    parts = member.filename.removesuffix("/").split("/")
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR) or not all(
        re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}", part) for part in parts
    ):
        raise RefusedError(f"the artifact holds {member.filename[:100]!a}: files of plain names are taken alone")


def ask(path: str) -> Any:
    """Ask GitHub's API about this repository."""
    return json.loads(request(path))


def request(path: str, output: int = subprocess.PIPE) -> bytes:
    """Send a request to GitHub's API about this repository; return the answer, or write it to a file.

    Raises:
        RefusedError: there is no answer.
    """
    words = ["gh", "api", f"repos/{os.environ['GITHUB_REPOSITORY']}/{path}"]
    result = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.PIPE)
    if result.returncode != 0:
        raise RefusedError(f"GitHub does not answer {path}: {result.stderr.decode(errors='replace')[-300:]!a}")
    return result.stdout or b""


def ask_git(*words: str) -> str | None:
    """Ask git about this clone; None if it says no."""
    result = subprocess.run(["git", *words], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else None


def report(refusal: RefusedError) -> int:
    """Show on the page of the workflow run why nothing was taken; return the exit status."""
    print(f"::error::{make_printable(refusal)}")
    return 2


def make_printable(message: object) -> str:
    """Make one line of a message, in which nothing can be another command of a workflow."""
    return " ".join(ascii(str(message))[1:-1].split()).replace("%", "%25")


def main() -> int:
    """Download what the command line names."""
    artifact_id, digest, folder = sys.argv[1:]
    try:
        download(int(artifact_id), digest, Path(folder))
    except RefusedError as refusal:
        return report(refusal)
    return 0


if __name__ == "__main__":
    sys.exit(main())
