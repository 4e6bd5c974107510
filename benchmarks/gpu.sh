#!/usr/bin/env bash
# What a GPU shows, in one command under nine minutes: the tests marked gpu, then what variants, passes,
# grafts and max-norm cost there; each line of the table ends with its seconds.
#
#     benchmarks/gpu.sh                        # on the CUDA device
#     benchmarks/gpu.sh --device cpu --quick   # tries the command itself, few rounds
set -uo pipefail
cd "$(dirname "$0")/.."
device=cuda quick=
while [ $# -gt 0 ]; do
    case $1 in
        --device) device=$2; shift 2 ;;
        --quick) quick=1; shift ;;
        *) echo "usage: $0 [--device cuda|cpu] [--quick]" >&2; exit 2 ;;
    esac
done
out=${OUT:-$(mktemp -d)}
python=${PYTHON:-python}
export HF_HUB_OFFLINE=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

echo "$("$python" -c "
import platform, torch
name = torch.cuda.get_device_name() if '$device' == 'cuda' else platform.processor() or 'CPU'
print(f'torch {torch.__version__}, Python {platform.python_version()}, {name}')")"

status=0
declare -a table
part() { # name, at most so many seconds, command
    local name=$1 limit=$2 began=$SECONDS
    shift 2
    local result=done
    timeout "$limit" "$@" >"$out/$name.txt" 2>&1 || result="failed: $?"
    [ "$result" = "failed: 124" ] && result="stopped after $limit s"
    [ "$result" = done ] || status=1
    table+=("| $name | $result | $((SECONDS - began)) |")
}

rounds=(--rounds 15) overhead=(--rounds 100 --repeats 3) seconds=(--seconds 0.5) only=()
if [ -n "$quick" ]; then
    rounds=(--rounds 2) overhead=(--rounds 3 --repeats 1) seconds=(--seconds 0.02)
fi
if [ "$device" = cpu ]; then
    only=(--only "BERT")
    part tests 60 "$python" -m pytest -n 0 -q -m gpu --collect-only tests
else
    part tests 150 "$python" -m pytest -n 0 -q -m gpu tests
fi
part variants 130 "$python" benchmarks/variants.py --device "$device" --threads 1 "${seconds[@]}"
part passes 130 "$python" benchmarks/passes.py --device "$device" "${rounds[@]}" --no-memory "${only[@]}"
part overhead 80 "$python" benchmarks/overhead.py --device "$device" "${overhead[@]}"
part max_norm 40 "$python" benchmarks/max_norm.py --device "$device" "${rounds[@]}"

for name in variants passes overhead max_norm tests; do
    printf '\n## %s\n\n' "$name"
    tail -n 60 "$out/$name.txt"
done
printf '\n| part | result | seconds |\n|---|---|---|\n'
printf '%s\n' "${table[@]}"
exit $status
