#!/bin/sh
# Starts the command that follows, or has it go on where its run folder is there already: a pod before this one began.
set -eu
# What Kubernetes sets for a Service called image-classifier, where a pod cannot say that it wants none of that.
for name in $(env | sed -n 's/^\(IMAGE_CLASSIFIER_\(SERVICE\|PORT\)[A-Z0-9_]*\)=.*/\1/p'); do unset "$name"; done
folder=$IMAGE_CLASSIFIER_EXPERIMENTS_FOLDER/$IMAGE_CLASSIFIER_EXPERIMENT_NAME/$IMAGE_CLASSIFIER_RUN_NAME
if [ -e "$folder" ]; then set -- "$@" --resume; fi
exec "$@"
