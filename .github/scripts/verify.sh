#!/usr/bin/env bash
# Trains a published run again in the container and writes the verdict into the summary: verify.sh RUN DATASET_FOLDER
# RUN lies under experiments/. Fails with the status of `image_classifier verify` unless the verdict is IDENTICAL.
set -euo pipefail
run=/experiments/${1#experiments/}
status=0
"$(dirname -- "${BASH_SOURCE[0]}")/in_container.sh" image_classifier verify "$run" \
    --dataset_folder "$2" --experiments_folder /experiments \
    2>&1 >"$RUNNER_TEMP/verdict" | tee "$RUNNER_TEMP/errors" >&2 || status=$? # the pipe is for stderr alone
cat "$RUNNER_TEMP/verdict"
{
    jq --raw-output '"## Verification of \(.experiment_name)/\(.run_name)\n"' "$1/run.json"
    echo '```'
    if [ -s "$RUNNER_TEMP/verdict" ]; then cat "$RUNNER_TEMP/verdict"; else tail -n 5 "$RUNNER_TEMP/errors"; fi
    echo '```'
} >>"$GITHUB_STEP_SUMMARY"
exit "$status"
