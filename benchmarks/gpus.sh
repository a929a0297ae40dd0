#!/usr/bin/env bash
# What docs/benchmarks.md says of GPUs, anew: each command within a time of its own, its words in
# files of OUT as they come. Names run some alone: OUT=measured benchmarks/gpus.sh layer one
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-measured}
PYTHON=${PYTHON:-.venv/bin/python}
wanted=" $* "
failed=()
mkdir -p "$OUT"

step() { # name, seconds, arguments of python...
  local name=$1 limit=$2
  shift 2
  [[ $wanted == "  " || $wanted == *" $name "* ]] || return 0
  echo "==> $name: at most $limit s"
  # Checkpoints of tens of gigabytes, for who reads files, are gone with the step however it ends.
  local scratch
  scratch=$(mktemp -d -p "${TMPDIR:-/dev/shm}")
  TMPDIR=$scratch timeout --kill-after=10 "$limit" "$PYTHON" "$@" </dev/null 2>"$OUT/$name.err" | tee "$OUT/$name.out"
  [ "${PIPESTATUS[0]}" = 0 ] || { failed+=("$name"); tail -n 5 "$OUT/$name.err"; }
  rm -rf "$scratch"
}

step tests 600 -m pytest -q -rs tests/gpu
step layer 120 -m cli.main bench layer --rows 1,8,32,128,512,2048,8192
step peers 120 -m cli.main bench layer --workers 16 --experts 16 --top-k 2 --rows 32,128
step overlap 120 -m benchmarks.overlap --rows 512,2048 --out "$OUT/overlap"
step stages 150 -m benchmarks.stages --model one
step slices 150 -m benchmarks.stages --model one --slices
step one 450 -m benchmarks.papers --model one --out "$OUT/one"
step plain 350 -m benchmarks.papers --model plain --out "$OUT/plain"
step wide 350 -m benchmarks.papers --model wide --out "$OUT/wide"
step deep 350 -m benchmarks.papers --model deep --layers 8 --out "$OUT/deep"
step shared 450 -m benchmarks.papers --model shared --out "$OUT/shared"
step colocated 550 -m benchmarks.papers --model colocated --out "$OUT/colocated"
step many 550 -m benchmarks.papers --model many --layers 8 --out "$OUT/many"
step serving 300 -m benchmarks.serving --model demo --model one --out "$OUT/serving"

[ ${#failed[@]} -eq 0 ] || { printf 'failed: %s\n' "${failed[@]}"; exit 1; }
