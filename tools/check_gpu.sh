#!/usr/bin/env bash
# Checks this checkout on a machine with a GPU: whether its results are right, and how close its
# speed is to what the GPU allows. Takes six minutes at most.
#
#   tools/check_gpu.sh                           all stages, the most important first
#   tools/check_gpu.sh --stage ids --stage decode
#   tools/check_gpu.sh --list                    lists the stages, their seconds, what they check
#
# Requires python3 (or the program that PYTHON names) with CuPy, NumPy and npllama's dependencies.
# The stage "tests" requires pytest, "rival" requires torch and transformers. npllama itself need
# not be installed. CUDA_VISIBLE_DEVICES selects one of several GPUs.
#
# Each stage runs in its own process with a time limit. If a stage fails, the next one still runs.
# The table is printed after each stage. The last table is Markdown, for tools/README.md.
#
#   --seconds N   time limit of all stages together (default 360)
#   --stage-seconds N
#                 time limit of each stage, if it is less than the limit that --list names
#   --out DIR     directory for the table and the standard error of the stages (default: a new
#                 directory, which is named at the end)
#   --tiny        uses tiny models and lengths, to test this script on a CPU (for example with the
#                 tests' replacement for CuPy); its figures mean nothing
set -u
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}

# name module seconds: what it checks; the most important first. "large" runs if time is left.
stages="\
ids ids 60: ids of the shipped model on the reference and on the kernels, in each dtype
tests unit_tests 100: pytest --backend cupy, the test files that matter most
decode decode 120: read bandwidth; decoding of the shipped model, 1.1b and 7b
prompt prompt 40: a prompt of 2,048 tokens of 7b and 1.1b
rival rival 110: transformers eager and compiled, 1.1b float16
equivalence equivalence 40: differences from float64 in each dtype
sanitizer sanitizer 40: a dozen launches under compute-sanitizer
large large 60: decoding of 13b float16 and 34b int8"

usage() {
  sed -n '2,/^set/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//'
}

wrong() {
  echo "check_gpu: error: $1 (--help lists all options)" >&2
  exit 2
}

total=360 most="" out="" tiny="" chosen="" command="tools/check_gpu.sh${*:+ $*}"
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) usage; exit 0 ;;
    --list) sed 's/^\([a-z]*\) [a-z_]* \([0-9]*\): /\1\t\2 s\t/' <<<"$stages"; exit 0 ;;
    --tiny) tiny=--tiny; shift ;;
    --stage | --seconds | --stage-seconds | --out)
      [ $# -gt 1 ] || wrong "$1 needs a value"
      case $1 in
        --stage)
          grep -q "^$2 " <<<"$stages" || wrong "there is no stage $2"
          chosen="$chosen $2"
          ;;
        --seconds | --stage-seconds)
          [[ $2 =~ ^[1-9][0-9]*$ ]] || wrong "$1 is $2: expected a whole number"
          if [ "$1" = --seconds ]; then total=$2; else most=$2; fi
          ;;
        --out) out=$2 ;;
      esac
      shift 2
      ;;
    *) wrong "unknown option $1" ;;
  esac
done

if [ -z "$out" ]; then out=$(mktemp -d) || exit 2; fi
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
rm -f "$out/rows.jsonl" "$out/numbers.json" "$out/equivalence.txt"
export PYTHONPATH="$root:$root/tools${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
cd "$root" || exit 2

# The table's heading: the GPU, and the driver's version if nvidia-smi reports it
card=$("$python" -m checking_gpu.card) || exit 2
driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1)
commit=$(git rev-parse --short HEAD 2>/dev/null)
heading="$card${driver:+, driver $driver}${commit:+; commit $commit}"
[ -z "$tiny" ] || heading="$heading; tiny models: no figure says anything about the device"
echo "$heading"

while read -r name module limit _; do
  limit=${limit%:}
  if [ -n "$chosen" ]; then
    case "$chosen " in *" $name "*) ;; *) continue ;; esac
  fi
  [ "$limit" -gt "${most:-$limit}" ] && limit=$most
  left=$((total - SECONDS))
  [ "$limit" -gt "$left" ] && limit=$left
  # a stage chosen by --stage runs even if little time is left
  if [ "$left" -lt "$([ -n "$chosen" ] && echo 1 || echo 5)" ]; then
    echo "== $name: no time left"
    continue
  fi
  echo "== $name (at most $limit s, $SECONDS s so far)"
  began=$SECONDS log=$out/$name.log
  timeout -k 3 "$limit" "$python" -m "checking_gpu.$module" --results "$out" \
    --seconds "$limit" $tiny 2>"$log" </dev/null
  code=$?
  [ "$code" -eq 0 ] || "$python" -m checking_gpu.results "$out" "$name" "$code" "$log"
  echo "== $name took $((SECONDS - began)) s; so far:"
  "$python" -m checking_gpu.results "$out"
done <<<"$stages"

echo
echo "== done in $SECONDS s; $out holds the output of the stages"
echo
echo "\`$command\` on $heading:"
echo
"$python" -m checking_gpu.results "$out"
