#!/usr/bin/env bash
# Runs a command of the package in the training image, with the least that it needs: in_container.sh COMMAND...
# data/ and experiments/ are /data and /experiments there.
set -euo pipefail
mkdir -p data experiments
exec docker run --rm --user "$(id -u):$(id -g)" \
    --read-only --cap-drop ALL --security-opt no-new-privileges \
    --volume "$PWD/data:/data" --volume "$PWD/experiments:/experiments" \
    "${IMAGE_NAME:-image-classifier}:latest" "$@"
