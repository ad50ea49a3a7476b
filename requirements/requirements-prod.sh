#!/usr/bin/env bash
# Installs what training runs on, from the lock, into the environment whose python is first on the PATH.
# Run it or source it, from any folder: the subshell keeps the caller's shell where and as it was.
(
    CDPATH='' cd -P -- "$(dirname -- "${BASH_SOURCE[0]:-$0}")" &&
        python -m pip install --no-deps --require-hashes --requirement requirements-prod.txt
)
