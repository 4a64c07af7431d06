#!/usr/bin/env bash
# Five trainings of each model, seeds 100 to 500, one set of samples each: the ± is then the spread of
# training, too.
# A GPU's work: about four days on two fast cores.
set -euo pipefail
cd "$(dirname "$0")/.."
. bench/run.sh

FID_RUNS=1
for script in cvae dcgan ddpm; do
  for seed in 100 200 300 400 500; do
    run $script $script-seed$seed --seed $seed
  done
done
report cvae dcgan ddpm
