#!/usr/bin/env bash
# Plans what the jobs of training.yaml do: writes to GITHUB_OUTPUT which of them run, and on what.
#   PUBLISHED=FOLDER plan.sh     to verify the published run in this folder, that of the workflow run PUBLISHED_RUN_ID
#   plan.sh                      to train with the inputs, which are INPUT_<NAME> in the environment
set -euo pipefail

if [ -n "${PUBLISHED-}" ]; then
    # What the artifact says is checked like what a person says.
    read_record() { jq --raw-output "$1 // empty" "$PUBLISHED/run.json"; }
    INPUT_EXPERIMENT_NAME=$(read_record .experiment_name)
    INPUT_RUN_NAME=$(read_record .run_name)
    INPUT_DATABASE=$(read_record .execution.database)
    INPUT_RECIPE=$(read_record .recipe)
    INPUT_INSTRUCTION_SET=$(read_record .settings.instruction_set)
    INPUT_PRETRAINED_MODEL=$(read_record .execution.pretrained_model)
    INPUT_VERIFY=true INPUT_PUBLISH=false # a schedule has no inputs
    dataset_folder=$(read_record .execution.dataset_folder)
    case ${dataset_folder#/data/} in
        cifar_dataset) INPUT_DATASET=cifar10 ;;
        sample_dataset) INPUT_DATASET=sample ;;
        *) INPUT_DATASET=${dataset_folder#/data/} ;;
    esac
    export INPUT_EXPERIMENT_NAME INPUT_RUN_NAME INPUT_RECIPE INPUT_INSTRUCTION_SET INPUT_PRETRAINED_MODEL INPUT_VERIFY \
        INPUT_PUBLISH INPUT_DATASET INPUT_DATABASE
    INPUT_CONTINUATION=${PUBLISHED_RUN_ID:-0}:1:$(read_record .code.commit)
    export INPUT_CONTINUATION
    train=false
else
    train=true
fi

"$(dirname -- "${BASH_SOURCE[0]}")/check_inputs.sh"

# A continuation trains at the commit that the run began at, even where the branch has moved on since.
IFS=: read -r origin number commit <<<"${INPUT_CONTINUATION:-$GITHUB_RUN_ID:0:$GITHUB_SHA}"
{
    echo "train=$train"
    echo "verify=$INPUT_VERIFY"
    echo "commit=$commit"
    echo "dataset=${INPUT_DATABASE:+db:}${INPUT_DATABASE:-$INPUT_DATASET}"
    echo "pretrained_model=$INPUT_PRETRAINED_MODEL"
    echo "resume_from=$([ "$number" = 0 ] || echo "$origin")"
    echo "continuation_number=$number"
    # where the artifact of the run that is verified lies
    echo "published_by=$([ "$train" = true ] && echo "$GITHUB_RUN_ID" || echo "$origin")"
} >>"$GITHUB_OUTPUT"
