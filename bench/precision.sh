#!/usr/bin/env bash
# Does bf16 cost quality? Three trainings of each model in fp32 and in bf16, one draw each.
# A week and more on two cores at the defaults. Short trainings take about an hour:
#   SPLIT=train EPOCHS=3 FID_SAMPLES=500 DIMS=768 DDPM="--unet small" bash bench.sh precision
set -euo pipefail
cd "$(dirname "$0")/.."
. bench/run.sh

FID_RUNS=1
for script in cvae dcgan ddpm; do
  for seed in 100 200 300; do
    run $script $script-fp32-seed$seed --dtype fp32 --seed $seed
    run $script $script-bf16-seed$seed --dtype bf16 --seed $seed
  done
done
report {cvae,dcgan,ddpm}-{fp32,bf16}
