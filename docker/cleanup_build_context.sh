#!/usr/bin/env bash
# Removes a folder that create_build_context.sh filled, or had begun to fill: cleanup_build_context.sh FOLDER
set -euo pipefail
case ${1:?the folder to remove} in
    */image-classifier-context.*) rm -rf -- "$1" ;;
    *)
        echo "error: $1 is no build context; nothing is removed" >&2
        exit 2
        ;;
esac
