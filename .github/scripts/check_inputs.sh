#!/usr/bin/env bash
# Checks the inputs of a training, which lie in the environment as INPUT_<NAME>: silent, or an error for each bad one.
# Whoever starts a workflow through the API can send anything, whatever the form offers.
set -euo pipefail
export LC_ALL=C # [A-Z] holds A to Z, and nothing of another alphabet

name='[A-Za-z0-9][A-Za-z0-9._-]{0,99}' # no slash, no leading dot or dash: neither a path nor an option
failed=0

check() { # NAME PATTERN WHAT_IT_TAKES; the pattern is held to the whole value
    local variable=INPUT_${1^^} shown
    local value=${!variable-}
    if [ ${#value} -le 300 ] && [[ $value =~ ^($2)$ ]]; then return; fi
    printf -v shown '%q' "${value:0:60}" # on one line, whatever it is: a second one could be a workflow command
    echo "::error::the input $1 takes $3, got: ${shown//'%'/%25}"
    failed=1
}

check experiment_name "$name" "the name of a folder: letters, digits, dots, dashes, underscores"
check run_name "$name" "the name of a folder: letters, digits, dots, dashes, underscores"
check dataset "$name(/$name){0,7}" "cifar10, sample, or a folder under data/"
check database "($name(@[1-9][0-9]{0,8})?)?" "NAME or NAME@VERSION of a data set in the database, or nothing"
check recipe '[a-z][a-z0-9_]{0,49}' "the name of a recipe"
check instruction_set '[a-z][a-z0-9_]{0,49}' "the name of an instruction set"
check learning_rate '([0-9]{1,9}(\.[0-9]{1,17})?([eE]-?[0-9]{1,3})?)?' "a number such as 0.1, or nothing"
check momentum '([0-9]{1,9}(\.[0-9]{1,17})?([eE]-?[0-9]{1,3})?)?' "a number such as 0.9, or nothing"
for input in num_epochs num_workers batch_size seed; do
    check "$input" '[0-9]{0,18}' "a whole number, or nothing"
done
check pretrained_model "($name(/$name){0,7}\.(pth|safetensors))?" "the path of a .pth or .safetensors file under experiments/, or nothing"
check verify 'true|false' "true or false"
check publish 'true|false' "true or false"
check continuation '([0-9]{1,20}:[1-9][0-9]{0,2}:[0-9a-f]{40})?' "nothing: the workflow sets it when it starts itself"
exit "$failed"
