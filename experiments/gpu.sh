#!/usr/bin/env bash
# All GPU numbers, on a machine with an NVIDIA GPU, in calls of MINUTES (default 9). Each stage goes on where the last call stopped:
#   OUT=results bash experiments/gpu.sh                          # again and again, until it says "all done" (exit status 0)
# Stages: check and ceilings, tuning, layers, training steps. STAGES="tune time" runs some of them; TUNE: the tuner's minutes in each call
#   (default: no share, first all tuning, then the rest).
#   OUT     folder of the journals, reports and tuned tables; keep it between the calls, or hand what it held back in FROM
#   FROM    folder of an earlier call's OUT
#   PYTHON  a Python with jax[cuda13] and the packages of this project's extra "experiments" (tyro, rich, flax, optax)
#   WHEELS  folder of wheels that this machine lacks, for one without a network; installed beside the rest, for this call alone
#   COMMIT  what the reports call this checkout where git cannot say
# Exit status 75: time was up, call again. 1: something failed; the reports and the journals name it, the rest was measured.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/gpu}
MINUTES=${MINUTES:-9}
TUNE=${TUNE:-$MINUTES}
STAGES=${STAGES:-check tune time train}
PYTHON=${PYTHON:-python3}
QUICK=${QUICK:+--quick}
export PYTHONUNBUFFERED=1
mkdir -p "$OUT"
begin=$SECONDS

kernels=pallas_kernels/block_sparse_conv
if [ -n "${FROM:-}" ]; then cp -n "$FROM"/*.json* "$OUT"/; fi
for table in "$OUT"/tuned_{mosaic_gpu,triton}_*.json; do if [ -e "$table" ]; then cp "$table" "$kernels"/; fi; done
if [ -n "${WHEELS:-}" ]; then
    site=$(mktemp -d)
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$WHEELS"/*.whl || exit 2
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi

status=0
left() { awk -v minutes="$1" -v past=$((SECONDS - begin)) 'BEGIN { printf "%.2f", (minutes > past / 60) ? minutes - past / 60 : 0 }'; }
# Runs a command until it is done, leaving out what makes it lose the device (70); stops this call when time is up (75).
stage() {
    local minutes=$1 try code
    shift
    for try in 1 2 3 4 5 6; do
        printf '\n== %s\n' "$*"
        "$PYTHON" -m "$@" --device gpu $QUICK --minutes "$(left "$minutes")"
        code=$?
        [ "$code" -eq 70 ] || break
    done
    case $code in
        0) ;;
        1) status=1 ;;
        75) if [ "$wanted" != tune ] || [ "$TUNE" = "$MINUTES" ]; then finish 75; fi ;;
        *) finish "$code" ;;
    esac
}
finish() {
    if [ -z "$QUICK" ]; then cp "$kernels"/tuned_{mosaic_gpu,triton}_*.json "$OUT"/ 2>/dev/null; fi
    case $1 in
        0) echo "all done" ;;
        75) echo "time is up: call again" ;;
        *) echo "stopped with status $1" ;;
    esac
    exit "$1"
}

bench="experiments.bench_kernels --keep-going --journal $OUT/bench_kernels.jsonl --out $OUT/bench_kernels_gpu.json"
for wanted in $STAGES; do
    case $wanted in
        check) stage "$MINUTES" $bench --stages check ceilings ;;
        tune) # its own share: what is not tuned in it runs in the tile that the rule gives
            if [ "$TUNE" = "$MINUTES" ]; then share=$MINUTES; else share=$(awk -v a="$TUNE" -v p=$((SECONDS - begin)) 'BEGIN { print a + p / 60 }'); fi
            stage "$share" pallas_kernels.tune --journal "$OUT/tune.jsonl" ${QUICK:+--folder "$OUT"}
            ;;
        time) stage "$MINUTES" $bench --stages check ceilings layers ;;
        train)
            stage "$MINUTES" experiments.bench_training --journal "$OUT/bench_training.jsonl" --out "$OUT/bench_training_gpu.json"
            ;;
        *) echo "STAGES: expected some of check tune time train, got $wanted" >&2 && exit 2 ;;
    esac
done
finish "$status"
