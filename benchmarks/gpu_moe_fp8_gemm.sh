#!/usr/bin/env bash
# Mixture of experts, FP8 KV cache and skinny matrix products on a GPU, the most important first, each part with a limit:
#
#     benchmarks/gpu_moe_fp8_gemm.sh OUT [PART ...]
#
# Parts, in this order unless named: tests gemm-first skinny-engine fp8-attention moe fp8-engine moe-engine gemm rows
# sanitizer. PYTHON names the interpreter (default: .venv/bin/python, or python3); the package is the one that it finds,
# else src without the C++ extension. The parts go on after one has failed; the exit code is 1 if any did. OUT gets a log
# a part and times.txt; results/*.jsonl get the measured lines.
set -u

out=$(mkdir -p "${1:?usage: gpu_moe_fp8_gemm.sh OUT [PART ...]}" && cd "$1" && pwd) || exit 2
shift
parts=${*:-tests gemm-first skinny-engine fp8-attention moe fp8-engine moe-engine gemm rows sanitizer}
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
"$python" -c 'import minisgl' 2> /dev/null || export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH}
workers=$("$python" -c 'import xdist' 2> /dev/null && echo "-n ${WORKERS:-6}") # processes of pytest
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
failed=0

offline() { # SHAPE [OPTION ...]
    timeout 150 "$python" -m minisgl bench offline --shape "$@" --save benchmarks/results/offline.jsonl
}

steps() { # SHAPE BATCHES [OPTION ...]
    local shape=$1 batches=$2
    shift 2
    # shellcheck disable=SC2086  # batches are words
    timeout 150 "$python" benchmarks/bench_engine.py --context 672 --prefill 2048 --shape "$shape" --batches $batches "$@"
}

run_part() {
    case $1 in
        tests)
            # shellcheck disable=SC2086  # workers is words
            timeout 240 "$python" -m pytest -q -m cuda -p no:cacheprovider $workers tests/kernels/test_moe.py \
                tests/models/test_moe_fused.py tests/kernels/test_fp8_store.py tests/kernels/test_kernels.py \
                tests/kernels/test_skinny_gemm_chain.py tests/models/test_skinny.py \
                tests/attention/test_triton_paged.py -k "moe or skinny or fp8 or fused or qkv_post"
            ;;
        gemm-first)
            timeout 60 "$python" benchmarks/bench_gemm.py --models qwen3-0.6b,qwen3-8b --batches 1,8 --chain
            timeout 180 "$python" benchmarks/bench_gemm.py --models qwen3-0.6b,qwen3-8b --batches 8,16,32,64 --no-ladder --seconds 120
            ;;
        skinny-engine) steps qwen3-0.6b "1 8 32" --compare-skinny && steps qwen3-8b "1 8 32" --compare-skinny ;;
        fp8-attention) timeout 90 "$python" benchmarks/bench_attention.py --models qwen3-0.6b --fp8 ;;
        moe) timeout 240 "$python" benchmarks/bench_moe.py --tokens 1,32,256,4096 --seconds 150 ;;
        fp8-engine)
            timeout 120 bash -c "$(declare -f steps); python=$python; steps qwen3-0.6b '1 32 256' --kv-cache-dtype fp8" &&
                timeout 120 "$python" -m minisgl bench offline --shape qwen3-0.6b --kv-cache-dtype fp8 \
                    --save benchmarks/results/offline.jsonl &&
                timeout 150 "$python" -m minisgl bench offline --shape qwen3-8b --kv-cache-dtype fp8 \
                    --save benchmarks/results/offline.jsonl
            ;;
        moe-engine) # beside 60 GB of weights, 80 GB have no room for 256 contexts of 672
            steps qwen3-30b-a3b "1 32"
            steps qwen3-30b-a3b 256 --context 192
            offline qwen3-30b-a3b
            ;;
        gemm) timeout 480 "$python" benchmarks/bench_gemm.py --seconds 380 ;;
        rows) steps mistral-7b "1 32" --context 8192 && steps llama-3.2-1b "1 32 256" && offline llama-3.2-1b ;;
        sanitizer)
            [ -n "$sanitizer" ] || { echo "skipped: compute-sanitizer isn't installed" && return 0; }
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 300 "$sanitizer" --tool memcheck --report-api-errors no --error-exitcode 1 \
                "$python" -m pytest -q -m cuda -p no:cacheprovider tests/kernels -k "skinny and not chain or fp8_store"
            ;;
        *) echo "no such part: $1" && return 2 ;;
    esac
}

for part in $parts; do
    began=$SECONDS
    run_part "$part" > "$out/$part.log" 2>&1
    code=$?
    [ $code -eq 0 ] || failed=1
    echo "$part: exit code $code, $((SECONDS - began)) s" | tee -a "$out/times.txt"
    tail -n 4 "$out/$part.log"
done
exit $failed
