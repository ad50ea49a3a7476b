#!/usr/bin/env python3
"""Checks that the commit of a tag may be released: it belongs to the default branch, and `ci.yaml` passed there.

With RELEASED_MODEL_RUN_ID in the environment it downloads the model that goes with the release into the folder model/:
the artifact of a training on the default branch. The workflow checks its signature then. Standard library only.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from artifact import (
    PUBLISHED,
    RefusedError,
    ask,
    ask_git,
    check_history,
    check_run,
    download,
    find_artifact,
    get_tip,
    report,
)

CI = ".github/workflows/ci.yaml"


def main() -> int:
    """Check the commit that is checked out, and get the model."""
    branch, commit = os.environ["DEFAULT_BRANCH"], ask_git("rev-parse", "HEAD") or ""
    try:
        check_history(commit, get_tip(branch), "the commit of the tag")
        check_ci(commit, branch)
        run_id = os.environ["RELEASED_MODEL_RUN_ID"]
        if run_id:
            if not (run_id.isascii() and run_id.isdecimal()):
                raise RefusedError(f"RELEASED_MODEL_RUN_ID takes the number of a workflow run, got: {run_id}")
            artifact = find_artifact(run_id, PUBLISHED, branch, get_tip(branch))
            download(artifact.id, artifact.digest, Path("model"))
    except RefusedError as refusal:
        return report(refusal)
    return 0


def check_ci(commit: str, branch: str) -> None:
    """Check that the newest run of `ci.yaml` at a commit of a branch has passed.

    Raises:
        RefusedError: it has not, or not yet.
    """
    query = f"head_sha={commit}&event=push&per_page=100"
    found = ask(f"actions/workflows/{Path(CI).name}/runs?{query}")["workflow_runs"]
    runs = [run for run in found if run["head_sha"] == commit and run["head_branch"] == branch]
    if not runs:
        raise RefusedError(
            f"{Path(CI).name} has not run at {commit} on {branch}: push it there, and the tag once it passed"
        )
    newest = max(runs, key=lambda run: int(run["id"]))
    check_run(newest, branch, get_tip(branch), workflow=CI, event="push")


if __name__ == "__main__":
    sys.exit(main())
