#!/usr/bin/env bash
# Fills an empty folder with what an image is built from: create_build_context.sh FOLDER [LOCK]
# IMAGE_WHEELS may name a folder with wheels of the locked requirements, as `pip download` leaves them.
set -euo pipefail
context=$(CDPATH='' cd -P -- "${1:?the folder to fill}" && pwd)
CDPATH='' cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

cp "requirements/${2:-requirements-prod.txt}" requirements/requirements-build.txt "$context"
mkdir "$context/source" "$context/source/requirements" "$context/wheels"
if [ -n "${IMAGE_WHEELS-}" ]; then cp --recursive --link "$IMAGE_WHEELS/." "$context/wheels"; fi

# Without what was made of the code, which would make the same code another context.
cp --recursive image_classifier pyproject.toml setup.py README.md CHANGELOG.md LICENSE MANIFEST.in "$context/source"
cp requirements/requirements-prod.txt "$context/source/requirements" # the package carries it
find "$context/source" \( -name __pycache__ -o -name '*.so' -o -name libraries.json \) -prune -exec rm -rf {} +
