#!/usr/bin/env bash
# Writes the job summary of a run, with the comparison to the one in PREVIOUS if that names a folder: summarize.sh RUN
set -euo pipefail
scripts=$(dirname -- "${BASH_SOURCE[0]}")
run=${1:?the folder of the run}
comparison=$RUNNER_TEMP/comparison

if [ -n "${PREVIOUS-}" ]; then
    # That the two cannot be compared, on different data for example, is something to say and no failure.
    "$scripts/in_container.sh" image_classifier compare "/$PREVIOUS" "/$run" >"$comparison" 2>&1 || true
fi
"$scripts/summarize.py" "$run" --comparison "$comparison" --artifact "${ARTIFACT-}" >>"$GITHUB_STEP_SUMMARY"
