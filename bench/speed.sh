#!/usr/bin/env bash
# Training, drawing and measuring against the plain loop of a tutorial, in turns: a table and out/speed.json.
# About ten minutes on two cores that do nothing else. Further flags are bench.speed's: --rounds 5.
set -euo pipefail
cd "$(dirname "$0")/.."
. bench/run.sh

step "$PYTHON" -m bench.speed "$OUT" ${where[@]+"${where[@]}"} \
  --data "${DATA:-bloodmnist}" --dims "${DIMS:-768}" "$@"
