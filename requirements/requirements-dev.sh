#!/usr/bin/env bash
# Installs everything a developer needs, from the lock (which holds build, cq and prod too), the package itself in
# editable mode and, in a git checkout, the pre-commit hooks, into the environment whose python is first on the PATH.
# Run it or source it, from any folder: the subshell keeps the caller's shell where and as it was.
(
    CDPATH='' cd -P -- "$(dirname -- "${BASH_SOURCE[0]:-$0}")/.." &&
        python -m pip install --no-deps --require-hashes --requirement requirements/requirements-dev.txt &&
        python -m pip install --no-deps --no-build-isolation --editable . &&
        if [ -e .git ]; then python -m pre_commit install; fi
)
