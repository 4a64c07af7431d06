#!/usr/bin/env bash
# What bare bench.sh does, with few epochs and samples, into out/quick: does everything work here?
# Some minutes on two cores. The figures mean nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

export OUT="${OUT:-out}/quick" SPLIT="${SPLIT:-val}" EPOCHS="${EPOCHS:-2}"
export FID_RUNS="${FID_RUNS:-2}" FID_SAMPLES="${FID_SAMPLES:-200}"
export DDPM="${DDPM:---unet tiny --steps 10}"
exec bash bench.sh
