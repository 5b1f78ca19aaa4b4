#!/usr/bin/env bash
# Measures everything on a machine with an NVIDIA GPU, in calls of MINUTES (default 9). Every stage
# continues where the last call stopped:
#
#   OUT=results bash experiments/bench/gpu.sh   # again and again, until it prints "all done"
#
# Stages, in this order:
#   train    compiles the training steps in many processes at once, compares their convolutions with
#            float64, and times them: VGG-19, ResNet-32 and ResNet-50, dense in XLA and in PyTorch,
#            masked and packed; the first row comes from a dense step, before our kernels compile
#   profile  lists the kernels of these steps by category
#   tune     times tiles and writes the table of tuned tiles
#   layers   compares the kernels with float64, and times single layers: those of the goals first;
#            the table by which implementation=None chooses takes their times
#   check    runs all checks and measures what the device can do at most
#   two      times the 2:4 products
#
# Environment variables:
#   STAGES  some of the stages, such as "tune layers"
#   MINUTES of a call, 3 or more
#   TUNE    how many of them the tuner gets (default 2); 0 leaves it out
#   OUT     folder of the journals, reports, tuned tables and compiled programs; keep it between the
#           calls
#   FROM    folder of an earlier call's OUT, for a machine that starts empty: send it this folder
#   BLOCK   the longest runs of channels (default 16)
#   PYTHON  a Python with jax[cuda13], jax-triton==0.3.1 and the extra "experiments" of this project
#   WHEELS  folder of wheels that this machine lacks and cannot download; installed for this call
#           (default: .whl, which `make gpu-wheels` fills, where it exists)
#   TORCH   a Python that has PyTorch, whose dense steps are timed too (default: PYTHON, if it has)
#   ABSENT  if not empty, an implementation that cannot run here is no failure
#   COMMIT  what the reports call this checkout where git cannot tell
#   QUICK   if not empty, a dry run of tiny shapes on any device
#
# Exit status: 0 all done; 75 time is up, call again; 1 something failed: the reports and the
# journals say what, everything else was measured; 2 a wrong argument.
set -uo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-runs/gpu}
MINUTES=${MINUTES:-9}
TUNE=${TUNE:-2}
STAGES=${STAGES:-train profile tune layers check two}
BLOCK=${BLOCK:-16}
for name in $STAGES; do
    case $name in
        train | profile | tune | layers | check | two) ;;
        *)
            echo "STAGES: expected some of train profile tune layers check two, got $name" >&2
            exit 2
            ;;
    esac
done
PYTHON=${PYTHON:-python3}
QUICK=${QUICK:+--quick}
mkdir -p "$OUT"
begin=$SECONDS
if [ -z "${WHEELS:-}" ] && [ -d .whl ]; then WHEELS=.whl; fi

# What one process compiles, the next one finds. Names of source lines are left out of programs:
# they differ between the process that compiles ahead and the one that times.
export PYTHONUNBUFFERED=1
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$(realpath "$OUT")/compiled}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
export JAX_TRACEBACK_IN_LOCATIONS_LIMIT=0

tuned=pallas_kernels/block_sparse_conv/tuned
if [ -n "${FROM:-}" ]; then
    cp -n "$FROM"/*.json* "$OUT"/
    if [ -d "$FROM"/compiled ]; then cp -rn "$FROM"/compiled "$OUT"/; fi
fi
for table in "$OUT"/tuned_*.json; do
    if [ -z "$QUICK" ] && [ -e "$table" ]; then cp "$table" "$tuned"/; fi
done
if [ -n "${WHEELS:-}" ]; then
    site=$(mktemp -d)
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
        --target "$site" "$WHEELS"/*.whl || exit 2
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi

if [ -z "${TORCH:-}" ] && "$PYTHON" -c "import torch" 2>/dev/null; then TORCH=$PYTHON; fi

status=0
later=0

# Computes with a: the first argument (default m), p: the minutes that have passed, m: those of the
# call.
number() {
    awk -v a="$1" -v p=$((SECONDS - begin)) -v m="$MINUTES" \
        "BEGIN { p /= 60; if (a == \"\") a = m; printf \"%.2f\", $2 }"
}

# Of so many minutes, those that the call still has.
remaining() { number "$1" '(m - p < a) ? ((m > p) ? m - p : 0) : a'; }

# Runs a command for some minutes at most. When it lost the device (70) or crashed (128 or more) it
# runs again without that unit. When time is up (75) the next stage has its turn, if half a minute
# remains; the next call does the rest.
stage() {
    local minutes=$1 journal=$2 try code=75
    shift 2
    for try in 1 2 3 4 5 6; do
        if [ "$(number 0.5 'm - p < a')" = 1.00 ]; then finish 75; fi
        printf '\n== %s\n' "$*"
        "$PYTHON" -m "$@" --journal "$journal" --device gpu $QUICK \
            --minutes "$(remaining "$minutes")"
        code=$?
        if [ "$code" -ge 128 ]; then
            "$PYTHON" -m experiments.bench.gpu.journal "$journal" || finish "$code"
        elif [ "$code" -ne 70 ]; then
            break
        fi
    done
    case $code in
        0) ;;
        1) status=1 ;;
        2) finish 2 ;;
        *) later=75 ;;
    esac
}

finish() {
    for table in "$tuned"/tuned_*.json; do # those of CPUs stay where they are
        if [ -z "$QUICK" ] && [[ "$table" != *_cpu.json ]]; then cp "$table" "$OUT"/; fi
    done
    case $1 in
        0) echo "all done" ;;
        75) echo "time is up: call again" ;;
        *) echo "stopped with status $1" ;;
    esac
    exit "$1"
}

kernels() { # stages of the benchmark
    stage "$MINUTES" "$OUT/bench_kernels.jsonl" experiments.bench.kernels --keep-going \
        ${ABSENT:+--allow-absent} --channel-block "$BLOCK" \
        --out "$OUT/bench_kernels_gpu.json" --stages "$@"
}

for name in $STAGES; do
    case $name in
        train)
            stage "$MINUTES" "$OUT/bench_training.jsonl" experiments.bench.training \
                --channel-block "$BLOCK" --out "$OUT/bench_training_gpu.json" \
                ${TORCH:+--torch "$TORCH"}
            ;;
        profile)
            stage "$MINUTES" "$OUT/bench_profile.jsonl" experiments.bench.gpu.profile \
                --channel-block "$BLOCK" --out "$OUT/bench_profile_gpu.json"
            ;;
        tune) # what is not tuned yet runs in the tile that the rule gives
            if [ "$TUNE" != 0 ]; then
                stage "$TUNE" "$OUT/tune.jsonl" experiments.bench.tune \
                    --channel-block "$BLOCK" ${QUICK:+--folder "$OUT"}
            fi
            ;;
        layers)
            kernels gate headline layers
            if [ -z "$QUICK" ] && [ -e "$OUT/bench_kernels_gpu.json" ]; then
                "$PYTHON" -m experiments.bench.tune --device gpu \
                    --rows "$OUT/bench_kernels_gpu.json" || status=1
            fi
            ;;
        check) kernels gate check ceilings ;;
        two)
            "$PYTHON" -m pallas_kernels.two_of_four.build || true
            stage "$MINUTES" "$OUT/two_of_four.jsonl" experiments.bench.gpu.two_of_four \
                --out "$OUT/two_of_four.json"
            ;;
    esac
done
if [ "$later" -ne 0 ]; then finish "$later"; else finish "$status"; fi
