#!/usr/bin/env bash
# Builds the training image and tags it with the version and `latest`: docker/build.sh [OPTION OF docker build]...
# configure.sh says what can be set. Run it or source it, from any folder: the subshell keeps the caller's shell where
# and as it was, and removes what it made, however it ends.
(
    [ "${BASH_SOURCE[0]-}" = "$0" ] || set -- # sourced: the arguments are the caller's own
    CDPATH='' cd -P -- "$(dirname -- "${BASH_SOURCE[0]:-$0}")" || exit
    . ./configure.sh

    context=
    trap '[ -z "$context" ] || ./cleanup_build_context.sh "$context"' EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
    context=$(mktemp -d "${TMPDIR:-/tmp}/image-classifier-context.XXXXXXXX") || exit
    ./create_build_context.sh "$context" || exit

    set -- --build-arg VERSION="$IMAGE_VERSION" --build-arg REVISION="$IMAGE_REVISION" \
        --build-arg SOURCE="$IMAGE_SOURCE" "$@"
    [ -z "$BASE_IMAGE" ] || set -- --build-arg BASE_IMAGE="$BASE_IMAGE" "$@"
    docker build --platform "$IMAGE_PLATFORM" --file Dockerfile \
        --tag "$IMAGE_NAME:$IMAGE_VERSION" --tag "$IMAGE_NAME:latest" "$@" "$context"
)
