#!/usr/bin/env bash
# Trains a published run again in the container and writes the verdict into the summary: verify.sh RUN DATASET_FOLDER
# RUN lies under experiments/; what can be signed of the verdict is written beside it, as statement.json.
# Fails with the status of `image_classifier verify` unless the verdict is IDENTICAL.
set -euo pipefail
scripts=$(dirname -- "${BASH_SOURCE[0]}")
run=/experiments/${1#experiments/}
status=0
"$scripts/stop_commands.sh"
"$scripts/in_container.sh" image_classifier verify "$run" \
    --dataset_folder "$2" --experiments_folder /experiments --statement "${run%/*}/statement.json" \
    2>&1 >"$RUNNER_TEMP/verdict" | tee "$RUNNER_TEMP/errors" >&2 || status=$? # the pipe is for stderr alone
cat "$RUNNER_TEMP/verdict"
if [ -s "$RUNNER_TEMP/verdict" ]; then said=$RUNNER_TEMP/verdict; else said=$RUNNER_TEMP/errors; fi
{
    jq --raw-output '"## Verification of \(.experiment_name)/\(.run_name)\n"' "$1/run.json"
    # Indented, it is shown as it is, whatever it says.
    tail -n 30 "$said" | tr -d '\r' | sed 's/^/    /'
} >>"$GITHUB_STEP_SUMMARY"
exit "$status"
