#!/usr/bin/env bash
# Fills an empty folder with what an image is built from: create_build_context.sh FOLDER [LOCK]
# The wheel is built from a copy, so that the project's own build/ and dist/ stay as they are. IMAGE_WHEELS may name a
# folder with wheels of the locked requirements, as `pip download` leaves them.
set -euo pipefail
context=$(CDPATH='' cd -P -- "${1:?the folder to fill}" && pwd)
CDPATH='' cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || python=python3

cp "requirements/${2:-requirements-prod.txt}" "$context"
mkdir "$context/source" "$context/wheels"
if [ -n "${IMAGE_WHEELS-}" ]; then cp --recursive --link "$IMAGE_WHEELS/." "$context/wheels"; fi

cp --recursive --preserve=timestamps \
    image_classifier pyproject.toml README.md CHANGELOG.md LICENSE MANIFEST.in "$context/source"
# The time within the wheel is the commit's: the same code gives the same wheel, and the same layer.
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct 2>/dev/null || echo 315532800)
export SOURCE_DATE_EPOCH
"$python" -m build --quiet --wheel --no-isolation --outdir "$context" "$context/source" >&2
rm -r "$context/source"
