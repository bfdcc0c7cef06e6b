# What the two overnight scripts share: settings, a log, steps that may fail, a table at the end. Sourced, not run.
#
# Settings come from the environment:
#   EXPERIMENT   whose vectors, and where the captures go        pocket
#   TRAITS       read in one pass                                uncertainty_calibration,commitment_strength,cognitive_load,sycophancy
#   METHOD       which of their vectors                          probe
#   MAX_TOKENS   longest response: 20, 50, 100                   50
#   TEMPERATURE  0 is greedy                                     0.7
#   LAYER        of tier 3; auto: the one that the card chose    auto
#   MODEL        another model than the vectors' own             (none)
#   PYTHON       the checkout's .venv/bin/python, else python3
#   LOG          experiments/$EXPERIMENT/captures/overnight.log; appended to
# Arguments are handed on to tiers 2 and 3, so they must be options that both take (--png, --batch-size 4, ...).
#
# Exit code: 0 all steps done, 1 some failed, 2 nothing could begin, 129, 130, 143 stopped by SIGHUP, SIGINT, SIGTERM.

EXPERIMENT=${EXPERIMENT:-pocket}
TRAITS=${TRAITS:-uncertainty_calibration,commitment_strength,cognitive_load,sycophancy}
METHOD=${METHOD:-probe}
MAX_TOKENS=${MAX_TOKENS:-50}
TEMPERATURE=${TEMPERATURE:-0.7}
LAYER=${LAYER:-auto}
MODEL=${MODEL:-}
TIER_2_FILES=(prompts_uncertainty.txt prompts_commitment.txt prompts_cognitive.txt prompts_sycophancy.txt)
TIER_3_FILES=(prompts_tier3_uncertainty.txt prompts_tier3_cognitive.txt)
GRACE=5 # seconds that a step has to end by itself when the night is stopped

CHECKOUT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P) || exit 2
TRAITLINE='from extraction.cli.commands import main; main(prog_name="traitline")' # needs no installed command
CHILD=
N_FAILED=0
TABLE=

refuse() {
    printf '%s: %s\n' "${0##*/}" "$1" >&2
    exit 2
}

# Fills ROOT, LOG, COMMON (the options of tiers 2 and 3) and OWN_MODEL (those of every command).
begin() {
    find_root "$@"
    find_python
    is_name "$EXPERIMENT" || refuse "EXPERIMENT '$EXPERIMENT' is no name: use letters, digits, '.', '_' and '-'"
    RUNS=$ROOT/experiments/$EXPERIMENT
    LOG=${LOG:-$RUNS/captures/overnight.log}
    mkdir -p -- "$(dirname -- "$LOG")" && : 2>/dev/null >>"$LOG" || refuse "can't write $LOG; choose another LOG"
    OWN_MODEL=(--experiment "$EXPERIMENT")
    [ -z "$MODEL" ] || OWN_MODEL=("${OWN_MODEL[@]}" --model "$MODEL")
    COMMON=("${OWN_MODEL[@]}" --traits "$TRAITS" --method "$METHOD" --max-new-tokens "$MAX_TOKENS")
    COMMON=("${COMMON[@]}" --temperature "$TEMPERATURE" --keep-going ${1+"$@"})
    trap '' PIPE # whoever looked on may be gone
    trap 'stop HUP 129' HUP
    trap 'stop INT 130' INT
    trap 'stop TERM 143' TERM
    BEGAN=$(date +%s)
    say "${0##*/}: experiment $EXPERIMENT, traits $TRAITS, $MAX_TOKENS tokens; log $LOG"
}

# As the commands find it: --root, TRAITLINE_ROOT, this folder where it has configs/, else the checkout.
find_root() {
    ROOT=${TRAITLINE_ROOT:-}
    while [ $# -gt 0 ]; do
        case $1 in
            --root) ROOT=${2:-} ;;
            --root=*) ROOT=${1#--root=} ;;
        esac
        shift
    done
    if [ -z "$ROOT" ]; then
        ROOT=$CHECKOUT
        [ ! -d configs ] || ROOT=$PWD
    fi
    ROOT=$(cd -- "$ROOT" 2>/dev/null && pwd -P) || refuse "the root is no folder; correct --root or TRAITLINE_ROOT"
    export TRAITLINE_ROOT=$ROOT
}

find_python() {
    if [ -z "${PYTHON:-}" ]; then
        PYTHON=$CHECKOUT/.venv/bin/python
        [ -x "$PYTHON" ] || PYTHON=python3
    fi
    command -v -- "$PYTHON" >/dev/null 2>&1 || refuse "no Python at '$PYTHON'; set PYTHON"
    export PYTHONPATH="$CHECKOUT${PYTHONPATH:+:$PYTHONPATH}"
}

is_name() (
    LC_ALL=C
    case $1 in
        '' | [!A-Za-z0-9]* | *[!A-Za-z0-9._-]*) return 1 ;;
    esac
)

# A prompt file of this name: the root's own before the checkout's.
prompt_file() {
    if [ -e "$ROOT/configs/prompts/$1" ]; then
        printf '%s\n' "$ROOT/configs/prompts/$1"
    else
        printf '%s\n' "$CHECKOUT/configs/prompts/$1"
    fi
}

say() {
    both "$(date '+%Y-%m-%d %H:%M:%S')  $*"
}

both() {
    printf '%s\n' "$1" >>"$LOG"
    printf '%s\n' "$1" 2>/dev/null
}

# step NAME COMMAND...: all that it says goes to the log; a failure is put down, and the night goes on.
step() {
    local name=$1 before started status seconds last
    shift
    say "$name ..."
    printf '+ %s\n' "$(printf '%q ' "$@")" >>"$LOG"
    before=$(wc -c <"$LOG")
    started=$(date +%s)
    "$@" </dev/null >>"$LOG" 2>&1 &
    CHILD=$!
    wait "$CHILD"
    status=$?
    CHILD=
    seconds=$(($(date +%s) - started))
    last=$(tail -c "+$((before + 1))" -- "$LOG" | tail -n 1)
    put_down "$name" "$status" "$seconds"
    if [ "$status" -eq 0 ]; then
        say "$name: ok after $seconds s. $last"
    else
        N_FAILED=$((N_FAILED + 1))
        say "$name: FAILED with exit code $status after $seconds s. $last"
    fi
    return "$status"
}

# put_down NAME STATUS SECONDS: a line of the table.
put_down() {
    local result=ok line
    [ "$2" -eq 0 ] || result="failed ($2)"
    printf -v line '%-50s %-14s %8s' "$1" "$result" "$3"
    TABLE="$TABLE$line
"
}

# missing NAME WHAT: a step that can't even begin.
missing() {
    N_FAILED=$((N_FAILED + 1))
    put_down "$1" 2 0
    say "$1: FAILED. $2"
}

# Vectors of every trait that has none; and what else goes with them, where an earlier night was stopped meanwhile.
make_vectors() {
    local names name vectors begun
    IFS=, read -r -a names <<<"$TRAITS"
    for name in "${names[@]}"; do
        name=${name// /}
        [ -n "$name" ] || continue
        vectors=$RUNS/$name/vectors
        begun=$RUNS/captures/.extracting-${name//\//_}
        if [ -f "$vectors/$METHOD.safetensors" ] && [ -f "$vectors/$METHOD.receipt.json" ] && [ ! -f "$begun" ]; then
            continue
        fi
        mkdir -p -- "$RUNS/captures" && : >"$begun"
        step "vectors of $name" "$PYTHON" -c "$TRAITLINE" extract "${OWN_MODEL[@]}" --trait "$name" --quick &&
            rm -f -- "$begun"
    done
}

# tier 2|3 NAME OPTIONS...: one call of a door, so one load of the model.
tier() {
    local number=$1 name=$2 place=()
    shift 2
    [ "$number" = 2 ] || place=(--layer "$LAYER")
    step "$name" "$PYTHON" "$CHECKOUT/extraction/capture_tier$number.py" "${COMMON[@]}" \
        ${place[@]+"${place[@]}"} "$@"
}

finish() {
    local seconds=$(($(date +%s) - BEGAN))
    summary
    if [ "$N_FAILED" -gt 0 ]; then
        say "$N_FAILED of the steps failed, in $seconds s. Why: $LOG. Start the same command again: what is done stays done."
        exit 1
    fi
    say "All steps done, in $seconds s. Start with $RUNS/captures/index.html."
    exit 0
}

summary() {
    both "
$(printf '%-50s %-14s %8s' step result seconds)
$TABLE"
}

# stop SIGNAL CODE: hand the signal on, wait for the step to end, say where things stand. At a terminal the step has
# had SIGINT as well, and a second one ends it at once, so it gets a moment first.
stop() {
    trap '' HUP INT TERM
    if [ -n "$CHILD" ]; then
        [ "$1" != INT ] || ends_within 1 || true
        kill -s "$1" "$CHILD" 2>/dev/null
        ends_within "$GRACE" || kill -s TERM "$CHILD" 2>/dev/null
        ends_within "$GRACE" || kill -s KILL "$CHILD" 2>/dev/null
        wait "$CHILD" 2>/dev/null
    fi
    summary
    say "Stopped by SIG$1. Start the same command again: what is done stays done."
    exit "$2"
}

# ends_within SECONDS: true as soon as the step has ended.
ends_within() {
    local tenths=$(($1 * 10))
    while kill -0 "$CHILD" 2>/dev/null; do
        [ "$tenths" -gt 0 ] || return 1
        tenths=$((tenths - 1))
        sleep 0.1
    done
}
