#!/usr/bin/env bash
# A night of captures: 24 prompts, the model loaded once for tier 2 and once for tier 3.
#
#     experiments/overnight_experiments_batched.sh
#     MAX_TOKENS=100 EXPERIMENT=gemma_2b_cognitive nohup experiments/overnight_experiments_batched.sh --png &
#
# Vectors that are missing are made first. A step that fails doesn't end the night. Started again, it does what is
# missing. The log says in the morning what was done. Settings and exit codes: overnight_steps.sh, beside this file.
set -u
. "$(dirname -- "${BASH_SOURCE[0]}")/overnight_steps.sh" || exit 2

# with_files NUMBER FILE...: one call for all of a tier's prompt files.
with_files() {
    local number=$1 file options=()
    shift
    for file in "$@"; do
        options=(${options[@]+"${options[@]}"} --prompts-file "$(prompt_file "$file")")
    done
    tier "$number" "tier $number: $# prompt files" "${options[@]}"
}

begin ${1+"$@"}
make_vectors
with_files 2 "${TIER_2_FILES[@]}"
with_files 3 "${TIER_3_FILES[@]}"
finish
