#!/usr/bin/env bash
# Builds an image and tags it with the version and `latest`: docker/build.sh [serve] [OPTION OF docker build]...
# Without a name that is the training image; `serve` is the server's.
# It needs docker, and git to name the commit: the wheel is built inside. configure.sh says what can be set. Run it or source it, from any folder: the subshell keeps the caller's shell where
# and as it was, and removes what it made, however it ends.
(
    [ "${BASH_SOURCE[0]-}" = "$0" ] || set -- # sourced: the arguments are the caller's own
    CDPATH='' cd -P -- "$(dirname -- "${BASH_SOURCE[0]:-$0}")" || exit
    target=train
    if [ "${1-}" = serve ] || [ "${1-}" = train ]; then
        target=$1
        shift
    fi
    if ! command -v docker >/dev/null; then
        echo "error: there is no program docker on the PATH: install Docker, or another engine with a command of that name" >&2
        exit 2
    fi
    . ./configure.sh
    if [ -z "$IMAGE_REVISION" ]; then
        echo "note: this is no git checkout, or git is missing: neither the image nor the runs in it will name a commit;" \
            "IMAGE_REVISION can name one" >&2
    fi

    context=
    trap '[ -z "$context" ] || ./cleanup_build_context.sh "$context"' EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
    context=$(mktemp -d "${TMPDIR:-/tmp}/image-classifier-context.XXXXXXXX") || exit
    ./create_build_context.sh "$context" "$IMAGE_LOCK" || exit

    set -- --build-arg VERSION="$IMAGE_VERSION" --build-arg REVISION="$IMAGE_REVISION" \
        --build-arg SOURCE="$IMAGE_SOURCE" "$@"
    [ -z "$BASE_IMAGE" ] || set -- --build-arg BASE_IMAGE="$BASE_IMAGE" "$@"
    docker build --platform "$IMAGE_PLATFORM" --file "$IMAGE_FILE" \
        --tag "$IMAGE_NAME:$IMAGE_VERSION" --tag "$IMAGE_NAME:latest" "$@" "$context"
)
