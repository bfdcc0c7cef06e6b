#!/usr/bin/env bash
# The same night with one call, so one load of the model, for every prompt. It is kept for comparison: it makes the same
# kind of captures as overnight_experiments_batched.sh, which you want, and takes longer by the loads.
#
# Settings and exit codes: overnight_steps.sh, beside this file.
set -u
. "$(dirname -- "${BASH_SOURCE[0]}")/overnight_steps.sh" || exit 2

# one_by_one NUMBER FILE...: a call for every line that holds a prompt.
one_by_one() {
    local number=$1 file path line n
    shift
    for file in "$@"; do
        path=$(prompt_file "$file")
        if [ ! -r "$path" ]; then
            missing "tier $number: $file" "$path: can't be read"
            continue
        fi
        n=0
        while IFS= read -r line <&3 || [ -n "$line" ]; do
            line=${line%$'\r'}
            [ -n "${line//[[:space:]]/}" ] || continue
            n=$((n + 1))
            tier "$number" "tier $number: $file, prompt $n" --prompts "$line"
        done 3<"$path"
    done
}

begin ${1+"$@"}
make_vectors
one_by_one 2 "${TIER_2_FILES[@]}"
one_by_one 3 "${TIER_3_FILES[@]}"
finish
