#!/bin/sh
# Starts the command that follows, or has it go on where its run folder is there already: a pod before this one began.
set -eu
folder=$IMAGE_CLASSIFIER_EXPERIMENTS_FOLDER/$IMAGE_CLASSIFIER_EXPERIMENT_NAME/$IMAGE_CLASSIFIER_RUN_NAME
if [ -e "$folder" ]; then set -- "$@" --resume; fi
exec "$@"
