#!/usr/bin/env bash
# Puts the data set under data/ in order and writes the folder that the container finds it in to GITHUB_OUTPUT:
# prepare_data.sh cifar10|sample|FOLDER
# A download that fails fails the job: nothing takes its place.
set -euo pipefail
scripts=$(dirname -- "${BASH_SOURCE[0]}")
dataset=${1:?the data set}

case $dataset in
    cifar10)
        folder=cifar_dataset
        options=(--source cifar10)
        ;;
    sample)
        folder=sample_dataset
        options=(--source sample)
        ;;
    *)
        folder=$dataset
        options=()
        if [ ! -d "data/$folder" ]; then
            echo "::error::there is no folder data/$folder in this commit"
            exit 2
        fi
        "$scripts/pull_from_lfs.sh" "data/$folder"
        ;;
esac
"$scripts/in_container.sh" image_classifier data prepare --dataset_folder "/data/$folder" "${options[@]}"
echo "dataset_folder=/data/$folder" >>"$GITHUB_OUTPUT"
