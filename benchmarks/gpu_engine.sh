#!/usr/bin/env bash
# All that concerns the engine and needs a GPU, with what it printed kept in a folder:
#
#     benchmarks/gpu_engine.sh OUT [STEP ...]
#
# Steps, in this order unless named (minutes that each may take at most, after which it is ended):
#
#     smoke     (3)  the newest kernels' tests, counts of synchronisations, one family through every route with them
#     small     (3)  Qwen3-0.6B's shape, caches empty at first: throughput, steps, breakdown, host time
#     unfused   (2)  the same without the fused kernels: throughput, steps, breakdown
#     large     (4)  Qwen3-8B's shape
#     restart   (1)  Qwen3-0.6B again: a start with filled caches
#     rest      (3)  overlap off, graphs off, sampling, mixed steps
#     attention (2)  attention alone, beside torch's
#     routes    (6)  every family through every route with the fused kernels
#     tests    (10)  all GPU tests of attention and engine
#
# PYTHON names the interpreter (default: .venv/bin/python, or python3), which must find minisgl. DRY=1 goes through the
# motions on a CPU. The steps go on after one has failed; the exit code is 1 if any did. OUT gets a log a step,
# engine.jsonl with a line a measurement, and times.txt.
set -u

out=$(mkdir -p "${1:?usage: gpu_engine.sh OUT [STEP ...]}" && cd "$1" && pwd) || exit 2
shift
steps=${*:-smoke small unfused large restart rest attention routes tests}
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export MINISGL_CACHE=${MINISGL_CACHE:-$out/cache} TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$out/triton}
first=start,offline,decode,breakdown,prefill,host,launch
workers=$("$python" -c 'import xdist' 2> /dev/null && echo "-n ${WORKERS:-6}")  # processes of pytest
failed=0

limited() {  # MINUTES COMMAND ...
    local minutes=$1
    shift
    timeout --kill-after=10 $((60 * minutes)) "$@"
}

bench() {  # MINUTES SHAPE PARTS [OPTION ...]
    local minutes=$1 shape=$2 parts=$3
    shift 3
    BENCH_BEGAN=$(date +%s.%N) limited "$minutes" "$python" benchmarks/bench_gpu.py --shape "$shape" --parts "$parts" --out "$out/engine.jsonl" \
        ${DRY:+--tiny} "$@"
}

pytests() {  # MINUTES ARGUMENT ...
    local minutes=$1
    shift
    limited "$minutes" "$python" -m pytest -q -m cuda -p no:cacheprovider --durations=5 "$@"
}

run_step() {
    case $1 in
        smoke)
            pytests 3 tests/kernels/test_prepare.py tests/kernels/test_filter.py tests/kernels/test_sample.py \
                tests/engine/test_steady_state.py tests/engine/test_budget.py tests/engine/test_routes.py \
                -k "not routes or (fused and lag1 and (mistral or qwen3_yarn))"
            ;;
        small) bench 3 qwen3-0.6b "$first" ;;
        unfused) bench 2 qwen3-0.6b start,offline,decode,breakdown --fused off ;;
        large) bench 4 qwen3-8b "$first" ;;
        restart) bench 1 qwen3-0.6b start ;;
        rest) bench 3 qwen3-0.6b plain,sampling,mixed,eager ;;
        attention) [ -n "${DRY:-}" ] || limited 2 "$python" benchmarks/bench_attention.py --models qwen3-0.6b,qwen3-8b ;;
        # shellcheck disable=SC2086  # workers is words
        routes) pytests 6 tests/engine/test_routes.py -k fused $workers ;;
        # shellcheck disable=SC2086
        tests) pytests 10 tests/attention tests/engine $workers ;;
        *) echo "no such step: $1" && return 2 ;;
    esac
}

for step in $steps; do
    began=$SECONDS
    run_step "$step" > "$out/$step.log" 2>&1
    code=$?
    # 5: no test was chosen, as on a machine without a GPU
    [ $code -eq 0 ] || { [ -n "${DRY:-}" ] && [ $code -eq 5 ]; } || failed=1
    echo "$step: exit code $code, $((SECONDS - began)) s" | tee -a "$out/times.txt"
    tail -n 4 "$out/$step.log" | cut -c1-400
done
exit $failed
