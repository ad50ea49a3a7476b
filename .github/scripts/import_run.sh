#!/usr/bin/env bash
# Puts a run that training.yaml published under experiments/ and commits it, so that other trainings can start from its
# weights: import_run.sh run.zip    (the artifact as it was downloaded, or the folder that it was unzipped to)
# Only what the run's manifests name is taken (unpack_run.py). Whatever goes wrong, nothing is left of it.
# Afterwards: git push, and give the path that is printed to `pretrained_model`.
set -euo pipefail
artifact=$(realpath -- "${1:?the artifact: a zip file, or a folder}")
CDPATH='' cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."

fail() {
    echo "error: $1" >&2
    exit 2
}
git lfs version >/dev/null 2>&1 || fail "git-lfs is not installed; without it the weights would go into Git itself"
git config filter.lfs.clean >/dev/null || fail "git-lfs is not set up here; run: git lfs install"

temporary=$(mktemp -d)
target=
clean_up() {
    rm -rf -- "$temporary"
    if [ -n "$target" ]; then
        git rm -r --quiet --cached --force --ignore-unmatch -- "$target" || true
        rm -rf -- "$target"
        rmdir --ignore-fail-on-non-empty -- "${target%/*}" 2>/dev/null || true
    fi
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

names=$(python3 .github/scripts/unpack_run.py "$artifact" "$temporary/run")
experiment=${names%%$'\n'*}
run=${names#*$'\n'}
for folder in experiments "experiments/$experiment" "experiments/$experiment/$run"; do
    [ ! -L "$folder" ] || fail "$folder is a symbolic link, which Git does not look behind"
done
[ ! -e "experiments/$experiment/$run" ] || fail "experiments/$experiment/$run exists already"

target=experiments/$experiment/$run
mkdir -p "experiments/$experiment"
mv -- "$temporary/run" "$target"
git add -- "$target"
git commit --quiet --message "Add the run $experiment/$run" -- "$target"
target=
echo "$experiment/$run/model.pth"
