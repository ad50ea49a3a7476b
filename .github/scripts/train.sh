#!/usr/bin/env bash
# Trains in the container with the inputs, which are INPUT_<NAME> in the environment, or resumes an interrupted run;
# after TIME_LIMIT_S seconds the trainer is told to save and stop. Writes to GITHUB_OUTPUT the run's `folder`, and
# whether it has `finished`.
set -euo pipefail
scripts=$(dirname -- "${BASH_SOURCE[0]}")
"$scripts/check_inputs.sh"

folder=experiments/$INPUT_EXPERIMENT_NAME/$INPUT_RUN_NAME
options=(--experiments_folder /experiments --experiment_name "$INPUT_EXPERIMENT_NAME" --run_name "$INPUT_RUN_NAME")
if [ -n "$INPUT_CONTINUATION" ]; then
    options+=(--resume) # the record has the settings
else
    options+=(--dataset_folder "$DATASET_FOLDER" --recipe "$INPUT_RECIPE" --instruction_set "$INPUT_INSTRUCTION_SET")
    for input in learning_rate momentum num_epochs num_workers batch_size seed pretrained_model; do
        variable=INPUT_${input^^}
        if [ -n "${!variable}" ]; then options+=("--$input" "${!variable}"); fi
    done
fi

# In the foreground: otherwise `timeout` signals the whole group too, and a second SIGTERM ends the trainer at once.
status=0
"$scripts/stop_commands.sh"
timeout --foreground --preserve-status --signal TERM --kill-after 900 "${TIME_LIMIT_S:?}" \
    "$scripts/in_container.sh" image_classifier_trainer "${options[@]}" || status=$?

case $status in
    0) finished=true ;;
    143) finished=false ;;
    *) exit "$status" ;;
esac
if [ ! -f "$folder/run.json" ]; then
    echo "error: the time of $TIME_LIMIT_S s was over before the run began" >&2
    exit 1
fi
printf 'folder=%s\nfinished=%s\n' "$folder" "$finished" >>"$GITHUB_OUTPUT"
