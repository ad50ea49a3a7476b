#!/usr/bin/env bash
# Makes the locks again from pyproject.toml and the .in files: compile.sh [--upgrade] [build|cq|dev|mlflow|prod|publish|serve]...
# Without names all of them; without --upgrade a version that is locked stays where it still fits.
# Needs Python 3.11 and pip-tools. The hashes are those of the index alone: a wheel that lies in a local folder, or
# comes from a second index, may be another build of the same version, which no other machine could install.
set -euo pipefail
CDPATH='' cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")"
unset PIP_FIND_LINKS PIP_EXTRA_INDEX_URL
export PIP_CONFIG_FILE=/dev/null CUSTOM_COMPILE_COMMAND=requirements/compile.sh

options=(--quiet --generate-hashes --strip-extras --allow-unsafe --no-emit-index-url --no-emit-find-links)
if [ "${1-}" = --upgrade ]; then
    options+=(--upgrade)
    shift
fi
[ $# -gt 0 ] || set -- prod publish serve build cq dev mlflow # in this order: each is held to those before it
for name in "$@"; do
    sources=("requirements-$name.in")
    case $name in
        prod) sources+=(--extra=parquet --extra=database ../pyproject.toml) ;;
        publish) sources+=(--extra=publish --extra=tracking ../pyproject.toml) ;;
        serve | build | cq | dev | mlflow) ;;
        *)
            echo "error: no lock is called '$name'; they are prod, publish, serve, build, cq, dev and mlflow" >&2
            exit 2
            ;;
    esac
    echo "requirements-$name.txt"
    python -m piptools compile "${options[@]}" --output-file="requirements-$name.txt" "${sources[@]}"
done
