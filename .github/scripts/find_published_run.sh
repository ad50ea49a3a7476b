#!/usr/bin/env bash
# Finds the newest published run: prints the number of the workflow run, of this repository's default branch and other
# than this one, that holds its artifact; nothing if there is none. Needs GH_TOKEN and DEFAULT_BRANCH.
set -euo pipefail

# A fork's branch may have the same name, and its pull request may publish an artifact of any name.
gh api "repos/$GITHUB_REPOSITORY/actions/artifacts?name=run&per_page=100" |
    jq --raw-output --arg branch "$DEFAULT_BRANCH" --arg this "$GITHUB_RUN_ID" '
        [.artifacts[]
            | select(.expired | not)
            | select(.workflow_run.head_branch == $branch)
            | select(.workflow_run.head_repository_id == .workflow_run.repository_id)
            | select((.workflow_run.id | tostring) != $this)]
        | sort_by(.created_at) | last | .workflow_run.id // empty'
