#!/usr/bin/env bash
# Gets one path's content out of Git LFS, and no other's, for what is fetched is billed: pull_from_lfs.sh PATH
# GH_TOKEN signs in, where the repository is not public: through the environment, where no process list shows it.
set -euo pipefail
path=${1:?the path to get}
if [ ! -e "$path" ]; then
    echo "::error::there is no $path in this commit"
    exit 2
fi
if [ -n "${GH_TOKEN-}" ]; then
    credentials=$(printf 'x-access-token:%s' "$GH_TOKEN" | base64 --wrap=0)
    echo "::add-mask::$credentials"
    export GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0="http.$GITHUB_SERVER_URL/.extraheader" \
        GIT_CONFIG_VALUE_0="AUTHORIZATION: basic $credentials"
fi
git lfs install --local --skip-repo
git lfs pull --include "$path" --exclude ""
if git lfs pointer --check --file "$path" 2>/dev/null; then
    echo "::error::$path is still a pointer: Git LFS did not deliver its content"
    exit 2
fi
