#!/usr/bin/env bash
# How long must one train? Each model goes on to ever more epochs (STAGES) and is measured at each of them.
# About ten hours on two fast cores, most of them the training of the DDPM and its draws.
set -euo pipefail
cd "$(dirname "$0")/.."
. bench/run.sh

for epochs in ${STAGES:-5 10 20 40 80 160}; do
  for script in cvae dcgan ddpm; do
    out=$OUT/curve-$script
    if [ -f "$out/fid-$epochs.json" ]; then echo "== $out is finished at $epochs epochs"; continue; fi
    rm -f "$out/fid.json"  # of a stage that was stopped here
    EPOCHS=$epochs FID_RUNS=${FID_RUNS:-1} run $script curve-$script
    mv "$out/fid.json" "$out/fid-$epochs.json"
  done
done
step "$PYTHON" -m bench.report curve "$OUT"
