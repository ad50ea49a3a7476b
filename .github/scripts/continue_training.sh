#!/usr/bin/env bash
# Starts training.yaml again, with the same inputs, to go on with the run that this one has left unfinished.
# Needs GH_TOKEN, the inputs as INPUT_<NAME>, COMMIT and CONTINUATION_NUMBER; at most MAX_CONTINUATIONS times.
set -euo pipefail
"$(dirname -- "${BASH_SOURCE[0]}")/check_inputs.sh"

number=$((CONTINUATION_NUMBER + 1))
if [ "$number" -gt "$MAX_CONTINUATIONS" ]; then
    echo "::error::the run is not finished after $MAX_CONTINUATIONS continuations; its artifact unfinished-run can be resumed elsewhere"
    exit 1
fi
export INPUT_CONTINUATION=$GITHUB_RUN_ID:$number:$COMMIT
jq --null-input 'env | with_entries(select(.key | startswith("INPUT_")) | .key |= (ltrimstr("INPUT_") | ascii_downcase))' |
    gh workflow run training.yaml --repo "$GITHUB_REPOSITORY" --ref "$GITHUB_REF_NAME" --json
echo "Not finished within the time of a job: continuation $number of at most $MAX_CONTINUATIONS has been started." \
    >>"$GITHUB_STEP_SUMMARY"
