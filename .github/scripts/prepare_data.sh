#!/usr/bin/env bash
# Puts the data set under data/ in order and writes the folder that the container finds it in to GITHUB_OUTPUT:
# prepare_data.sh cifar10|sample|FOLDER|db:NAME[@VERSION]
# Of a database, DB_CONNECT says where it is, for the trainer, which reads from it by itself.
# A download that fails fails the job: nothing takes its place.
set -euo pipefail
scripts=$(CDPATH='' cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
dataset=${1:?the data set}

case $dataset in
    db:*)
        if [ -z "${DB_CONNECT-}" ]; then
            echo "::error::the repository variable DB_CONNECT does not say where the database is"
            exit 2
        fi
        mkdir -p data
        printf '%s\n' "$DB_CONNECT" >data/db_connect.yaml
        echo "dataset_folder=$dataset" >>"$GITHUB_OUTPUT"
        exit
        ;;
    cifar10)
        folder=cifar_dataset
        options=(--source cifar10)
        # It may come out of a cache, which other runs can write to: it is checked like a download.
        if [ -e "data/$folder" ] && ! {
            (cd "data/$folder" && md5sum --check --quiet "$scripts/cifar10.md5") >&2 &&
                [ "$(find "data/$folder" -mindepth 1 | wc -l)" = "$(wc -l <"$scripts/cifar10.md5")" ]
        }; then
            echo "::error::data/$folder holds something else than CIFAR-10 as it was published: delete the cache cifar10"
            exit 2
        fi
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
"$scripts/stop_commands.sh"
"$scripts/in_container.sh" image_classifier data prepare --dataset_folder "/data/$folder" "${options[@]}"
echo "dataset_folder=/data/$folder" >>"$GITHUB_OUTPUT"
