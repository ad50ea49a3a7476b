#!/usr/bin/env bash
# Runs a command of the package in the training image, with the least that it needs: in_container.sh COMMAND...
# data/ and experiments/ are /data and /experiments there; data/db_connect.yaml says where a database is, and DB_PASSWORD
# in the environment has its password. IMAGE_CLASSIFIER_KERNELS has the kernels of portable runs, where it is set.
set -euo pipefail
mkdir -p data experiments
database=()
if [ -f data/db_connect.yaml ]; then
    database=(--env IMAGE_CLASSIFIER_DB_CONFIG=/data/db_connect.yaml --env DB_PASSWORD)
fi
exec docker run --rm --user "$(id -u):$(id -g)" "${database[@]}" --env IMAGE_CLASSIFIER_KERNELS \
    --read-only --cap-drop ALL --security-opt no-new-privileges \
    --volume "$PWD/data:/data" --volume "$PWD/experiments:/experiments" \
    "${IMAGE_NAME:-image-classifier}:latest" "$@"
