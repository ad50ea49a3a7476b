#!/usr/bin/env bash
# Puts a run that training.yaml published under experiments/ and commits it, so that other trainings can start from its
# weights: import_run.sh run.zip    (the artifact as it was downloaded, or the folder that it was unzipped to)
# Afterwards: git push, and give the path that is printed to `pretrained_model`.
set -euo pipefail
artifact=$(realpath -- "${1:?the artifact: a zip file, or a folder}")
CDPATH='' cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."

fail() {
    echo "error: $1" >&2
    exit 2
}
git lfs version >/dev/null 2>&1 || fail "git-lfs is not installed; without it the weights would go into Git itself"

temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
if [ -d "$artifact" ]; then
    cp --recursive "$artifact/." "$temporary"
else
    python3 -m zipfile --extract "$artifact" "$temporary" || fail "$artifact is no zip file"
fi

[ -f "$temporary/run.json" ] || fail "$artifact holds no run.json: it is no run that was published"
image_classifier verify "$temporary" --files_only
name() { python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' "$temporary/run.json" "$1"; }
experiment=$(name experiment_name)
run=$(name run_name)
for folder in "$experiment" "$run"; do
    [[ $folder =~ ^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$ ]] || fail "$(printf '%q' "$folder") is no name of a folder"
done
target=experiments/$experiment/$run
[ ! -e "$target" ] || fail "$target exists already"

mkdir -p "experiments/$experiment"
mv "$temporary" "$target"
chmod 755 "$target" # mktemp's folder is its owner's alone
git add -- "$target"
git commit --quiet --message "Add the run $experiment/$run" -- "$target"
echo "$experiment/$run/model.pth"
