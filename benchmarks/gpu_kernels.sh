#!/usr/bin/env bash
# All that concerns the kernels and needs a GPU, with what it printed kept in a folder:
#
#     benchmarks/gpu_kernels.sh OUT [STEP ...]
#
# Steps, in this order unless named, with the minutes after which each is ended: tests (5), memcheck (9), racecheck (9),
# env (1), kernels (2), index (3), store (3), attention (2), bench (3), tune (3).
# PYTHON names the interpreter (default: .venv/bin/python, or python3), which must find minisgl. The steps go on after
# one has failed; the exit code is 1 if any did. OUT gets a log a step, the records, the tuning table, and times.txt.
set -u

out=$(mkdir -p "${1:?usage: gpu_kernels.sh OUT [STEP ...]}" && cd "$1" && pwd) || exit 2
shift
steps=${*:-tests memcheck racecheck env kernels index store attention bench tune}
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
# not nccl: its memory isn't ours to check
ours=index,store,store_norm,qkv_post,rmsnorm,add_rmsnorm,rope,silu_mul,sample,prepare,moe,skinny_gemm,skinny_gemm_add
workers=$("$python" -c 'import xdist' 2> /dev/null && echo "-n ${WORKERS:-6}") # processes of pytest
failed=0

limited() { # MINUTES COMMAND ...
    local minutes=$1
    shift
    timeout --kill-after=10 $((60 * minutes)) "$@"
}

# Every case of every kernel, since those behind the first two have the odd widths, ranges of ids and slots of -1.
# Every allocation by itself, so that a byte beyond a tensor is a byte beyond an allocation.
# Refused API calls are no errors here: cuda-core asks the driver for functions that it may lack.
sanitize() {
    if [ -z "$sanitizer" ]; then
        echo "skipped: compute-sanitizer isn't installed"
        return 0
    fi
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited 9 "$sanitizer" --tool "$1" --report-api-errors no --error-exitcode 1 \
        "$python" -m minisgl profile kernels --kernels "$ours" --out "$out/$1"
}

run_step() {
    case $1 in
        # shellcheck disable=SC2086  # workers is words
        tests) limited 5 "$python" -m pytest -q -m cuda tests/kernels -p no:cacheprovider $workers ;;
        memcheck | racecheck) sanitize "$1" ;;
        env) limited 1 "$python" -m minisgl profile env --out "$out" ;;
        kernels | attention) limited 2 "$python" -m minisgl profile "$1" --out "$out" ;;
        index | store) limited 3 "$python" -m minisgl profile "$1" --out "$out" ;;
        bench) limited 3 "$python" benchmarks/bench_kernels.py --versions best ;;
        tune) limited 3 "$python" -m minisgl profile tune --output "$out/tuning.json" ;;
        *) echo "no such step: $1" && return 2 ;;
    esac
}

for step in $steps; do
    began=$SECONDS
    run_step "$step" > "$out/$step.log" 2>&1
    code=$?
    [ $code -eq 0 ] || failed=1
    echo "$step: exit code $code, $((SECONDS - began)) s" | tee -a "$out/times.txt"
    tail -n 4 "$out/$step.log"
done
exit $failed
