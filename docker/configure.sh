#!/usr/bin/env bash
# shellcheck disable=SC2034  # read by those that source this
# What the image is called and made from; what is set in the environment stays. Source it from the docker folder.

# Which image: what is built from what. The server's name is the other's with -serve behind it.
case ${target:-train} in
    serve) IMAGE_FILE=Dockerfile.serve IMAGE_LOCK=requirements-serve.txt IMAGE_NAME=${IMAGE_NAME:-image-classifier}-serve ;;
    *) IMAGE_FILE=Dockerfile IMAGE_LOCK=requirements-prod.txt IMAGE_NAME=${IMAGE_NAME:-image-classifier} ;;
esac
# A tag takes no plus sign, which a local version has.
IMAGE_VERSION=${IMAGE_VERSION:-$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' ../image_classifier/__init__.py | tr + -)}
# That of this machine: the locks hold wheels for both. A run has the same bits on either, if it is a portable one.
case $HOSTTYPE in
    aarch64 | arm64) IMAGE_PLATFORM=${IMAGE_PLATFORM:-linux/arm64} ;;
    *) IMAGE_PLATFORM=${IMAGE_PLATFORM:-linux/amd64} ;;
esac
# Empty: the base that the Dockerfile names.
BASE_IMAGE=${BASE_IMAGE-}

# The commit, and whether what is built differs from it; the address without what may be in it to sign in.
IMAGE_REVISION=${IMAGE_REVISION:-$(git describe --always --abbrev=40 --exclude='*' --dirty 2>/dev/null || true)}
IMAGE_SOURCE=${IMAGE_SOURCE:-$(git remote get-url origin 2>/dev/null | sed -E 's|^([a-z]+://)[^/@]*@|\1|')}
