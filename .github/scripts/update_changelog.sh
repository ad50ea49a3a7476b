#!/usr/bin/env bash
# Gives what is unreleased in the changelog the version that bumpver is about to commit, which is in BUMPVER_NEW_VERSION.
set -euo pipefail
CDPATH='' cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
if ! awk '/^## / { inside = $0 == "## [Unreleased]"; next } inside && NF { found = 1 } END { exit !found }' CHANGELOG.md; then
    echo "error: CHANGELOG.md has nothing under [Unreleased]: write down there what is new, and commit it" >&2
    exit 2
fi
sed --in-place "s/^## \[Unreleased\]$/## [Unreleased]\n\n## [$BUMPVER_NEW_VERSION] - $(date --utc +%F)/" CHANGELOG.md
git add CHANGELOG.md
