#!/usr/bin/env bash
# What batching saves on this machine: three prompts in three calls of tier 2, then in one.
#
#     experiments/test_batching_speed.sh
#
# Settings are those of the overnight scripts (overnight_steps.sh, beside this file); the traits' vectors are made first
# where they are missing. It works in a temporary root, with a copy of the vectors' runs, so that nothing is resumed and
# nothing is left. One call that isn't timed comes first, so that both sides find the model's files in memory.
set -u
. "$(dirname -- "${BASH_SOURCE[0]}")/overnight_steps.sh" || exit 2

PROMPTS=("Are you sure that the moon pulls the tides?" "How long will it take me to learn Spanish?" "Should I cycle to work?")
TEMPORARY=

clean() {
    [ -z "$TEMPORARY" ] || rm -rf -- "$TEMPORARY"
}

# A root of which all but experiments/ are links, with copies of the runs that the vectors are in.
make_root() {
    local path names name
    mkdir -p "$TEMPORARY/root/experiments/$EXPERIMENT" || exit 2
    for path in "$ROOT"/*; do
        [ "${path##*/}" = experiments ] || ln -s "$path" "$TEMPORARY/root/"
    done
    IFS=, read -r -a names <<<"$TRAITS"
    for name in "${names[@]}"; do
        cp -R "$RUNS/${name// /}" "$TEMPORARY/root/experiments/$EXPERIMENT/" || exit 2
    done
}

# timed OPTIONS...: the seconds of one call, in SECONDS_OF_CALL.
timed() {
    local TIMEFORMAT=%R
    { time call "$@"; } 2>"$TEMPORARY/seconds" || {
        tail -n 3 -- "$TEMPORARY/said" >&2
        exit 1
    }
    SECONDS_OF_CALL=$(cat "$TEMPORARY/seconds")
}

call() {
    "$PYTHON" "$CHECKOUT/extraction/capture_tier2.py" "${COMMON[@]}" --root "$TEMPORARY/root" "$@" \
        </dev/null >"$TEMPORARY/said" 2>&1 &
    CHILD=$!
    wait "$CHILD" && CHILD=
}

sum() {
    printf '%s\n' "$@" | awk '{ total += $1 } END { print total }'
}

export LC_ALL=C # a point in numbers
trap clean EXIT
TEMPORARY=$(mktemp -d) || refuse "can't make a temporary folder"
LOG=$TEMPORARY/log
begin ${1+"$@"} >/dev/null
make_vectors >&2
[ "$N_FAILED" -eq 0 ] || exit 1
make_root
timed --prompts "Hello." --max-new-tokens 1

TIMES=()
for prompt in "${PROMPTS[@]}"; do
    timed --prompts "$prompt"
    TIMES=(${TIMES[@]+"${TIMES[@]}"} "$SECONDS_OF_CALL")
done
UNBATCHED=$(sum "${TIMES[@]}")

rm -rf -- "$TEMPORARY/root/experiments/$EXPERIMENT/captures"
timed --prompts "${PROMPTS[0]}" --prompts "${PROMPTS[1]}" --prompts "${PROMPTS[2]}"

awk -v unbatched="$UNBATCHED" -v batched="$SECONDS_OF_CALL" 'BEGIN {
    printf "Unbatched (3 calls):  %.1f s\n", unbatched
    printf "Batched (1 call):  %.1f s\n", batched
    printf "Speedup:  %.1fx\n", unbatched / batched
    printf "Time saved:  %.1f s\n", unbatched - batched
}'
