#!/usr/bin/env bash
# Prints what the changelog says about a version, and fails unless tag, package and changelog are of one version:
# release_notes.sh TAG
set -euo pipefail
CDPATH='' cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
tag=${1:?the tag of the release}
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' image_classifier/__init__.py)
if [ "$tag" != "$version" ]; then
    echo "::error::the tag is $tag, but the package is $version" >&2
    exit 2
fi
notes=$(awk -v heading="## [$version]" '
    index($0, "## [") == 1 { inside = index($0, heading) == 1; next }
    inside' CHANGELOG.md)
if [ -z "${notes//[[:space:]]/}" ]; then
    echo "::error::CHANGELOG.md says nothing about $version" >&2
    exit 2
fi
printf '%s\n' "$notes" | sed '/./,$!d'
