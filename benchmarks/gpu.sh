#!/usr/bin/env bash
# Everything to be known of a CUDA machine, in at most 8 minutes and without a network: correctness, rates, MFU, busy
# share, memory, recompilations. Ends with a table and one JSON object.
#
#   benchmarks/gpu.sh [--dry] [PART...]       parts: checks train busy tokenize codebook evaluate; all if none is named
#
# --dry runs every part on the CPU at size tiny, so that no second on a GPU is lost to a typo. A part that fails or
# exceeds its time is named in the result, and the others run. PYTHON: the interpreter, python3 if empty.
# For a machine without this project's environment: in a clone (not a git worktree), with ../shared beside it,
# `EXTRA_PACKAGES=psutil ../shared/tools/offline-bundle.sh`, then `source .gpu/enter` there.
set -uo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
python=${PYTHON:-python3}
dry=()
[ "${1:-}" = --dry ] && { dry=(--dry); shift; export CUDA_VISIBLE_DEVICES=; }
declare -A seconds=([checks]=120 [train]=200 [busy]=60 [tokenize]=60 [codebook]=30 [evaluate]=30)
[ ${#dry[@]} = 0 ] || for part in "${!seconds[@]}"; do seconds[$part]=900; done # compiling on a CPU takes minutes
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(checks train busy tokenize codebook evaluate)
results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT
for part in "${parts[@]}"; do
  [ -n "${seconds[$part]:-}" ] || { echo "gpu.sh: there is no part $part; there are ${!seconds[*]}" >&2; exit 2; }
  echo "== $part, at most ${seconds[$part]} s" >&2
  timeout "${seconds[$part]}" "$python" benchmarks/gpu.py "$part" ${dry[@]+"${dry[@]}"} --out "$results/$part.json" >&2
  code=$?
  [ $code = 0 ] || echo "{\"failed\": \"exit code $code (124: out of time)\"}" > "$results/$part.json"
done
"$python" benchmarks/gpu.py table --results "$results"
