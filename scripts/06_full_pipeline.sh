#!/usr/bin/env bash
# All of the laboratory on this machine: environment, kernels, sweeps, communication, a served model under load, the
# timelines of a request and of a decode step, rulings, the comparison, and the reports from all of it.
#
#   scripts/06_full_pipeline.sh [--quick] [--out DIR] [--write-reports] [-- ENGINE OPTION …]
#
# --quick           few sizes and samples: to see that everything works, in under two minutes on two cores
# --out DIR         for the JSON, the logs and the reports (default: out/profile)
# --write-reports   also keep the JSON in reports/data and render reports/, which is what the repository commits
# -- …              options of the engine for what is served, as in -- --model FOLDER (default: the default model)
#
# $PYTHON is the interpreter (default: .venv/bin/python, else python3). A step that fails doesn't stop the others; its
# name and log are told at the end, and the exit code is 1.
set -uo pipefail
cd "$(dirname "$0")/.."

out=out/profile quick=() engine=() keep=false
while [ $# -gt 0 ]; do
    case $1 in
        --quick) quick=(--quick) ;;
        --write-reports) keep=true ;;
        --out) out=${2:?--out needs a folder}; shift ;;
        --) engine=("${@:2}"); break ;;
        *) sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 2 ;;
    esac
    shift
done
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
mkdir -p "$out/logs"
rm -f "$out"/*.json

# On a GPU the step of a shape that is worth one; random weights take as long as others.
step_of=
if command -v nvidia-smi >/dev/null && [ ${#engine[@]} -eq 0 ]; then step_of='--shape qwen3-0.6b'; fi

# name, then the command: every step writes its JSON to $out and its words to a log
steps=(
    'env        scripts/00_check_env.py'
    'kernels    scripts/01_test_kernels.py'
    'index      scripts/02_profile_index.py'
    'store      scripts/03_profile_store.py'
    'attention  scripts/04_profile_attention.py'
    'comm       scripts/05_profile_comm.py'
    'tp         -m minisgl profile tp'
    'rulings    -m minisgl profile rulings'
    'load       -m minisgl profile load'
    'request    -m minisgl profile request'
    "step       -m minisgl profile step $step_of"
)
command -v ncu >/dev/null && steps+=('ncu        -m minisgl profile ncu')
if $keep; then reports=2; else reports=1; fi
total=$((${#steps[@]} + 1 + reports)) done_steps=0 failed=() left_out=

bar() { # one line that redraws itself on a terminal, a line a step elsewhere
    local filled=$((done_steps * 30 / total)) line
    printf -v line '[%-30s] %2d/%d %4d s  %s' "$(printf '%*s' "$filled" '' | tr ' ' '#')" "$done_steps" "$total" \
        "$SECONDS" "$1"
    if [ -t 2 ]; then printf '\r\033[K%s' "$line" >&2; else printf '%s\n' "$line" >&2; fi
}

run() { # name, command …
    local name=$1
    shift
    bar "$name"
    if ! "$python" "$@" >"$out/logs/$name.log" 2>&1 </dev/null; then
        if [ "$name" = ncu ]; then # its counters are often forbidden
            left_out='left out: ncu'
        else
            failed+=("$name")
        fi
    fi
    done_steps=$((done_steps + 1))
}

for step in "${steps[@]}"; do
    read -r name command <<<"$step"
    # shellcheck disable=SC2086 # a command is several words
    case $name in
        load | request | step) run "$name" $command --out "$out" "${quick[@]}" "${engine[@]}" ;;
        *) run "$name" $command --out "$out" "${quick[@]}" ;;
    esac
done
run compare -m minisgl profile compare --out "$out"
run report -m minisgl profile report --out "$out"
if $keep; then run write-reports -m minisgl profile report --out "$out" --write-reports; fi
bar "done"
[ -t 2 ] && echo >&2
printf 'reports: %s\n' "$out/report/report.html"
[ -z "$left_out" ] || printf '%s, see %s\n' "$left_out" "$out/logs/ncu.log"
for name in "${failed[@]}"; do printf 'failed: %s, see %s\n' "$name" "$out/logs/$name.log"; done
[ ${#failed[@]} -eq 0 ]
