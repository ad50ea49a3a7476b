#!/usr/bin/env bash
# Builds an image and tags it with the version and `latest`: docker/build.sh [serve] [OPTION OF docker build]...
# Without a name that is the training image; `serve` is the server's.
# configure.sh says what can be set. Run it or source it, from any folder: the subshell keeps the caller's shell where
# and as it was, and removes what it made, however it ends.
(
    [ "${BASH_SOURCE[0]-}" = "$0" ] || set -- # sourced: the arguments are the caller's own
    CDPATH='' cd -P -- "$(dirname -- "${BASH_SOURCE[0]:-$0}")" || exit
    target=train
    if [ "${1-}" = serve ] || [ "${1-}" = train ]; then
        target=$1
        shift
    fi
    . ./configure.sh

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
