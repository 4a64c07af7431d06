#!/usr/bin/env bash
# Short trainings, one draw each, of the kind that chose the defaults: what is best after the same few epochs?
# About an hour on two fast cores; EPOCHS=10 trains longer. One training each: small differences are chance.
set -euo pipefail
cd "$(dirname "$0")/.."
. bench/run.sh

SPLIT=${SPLIT:-train} EPOCHS=${EPOCHS:-4} FID_RUNS=1 FID_SAMPLES=${FID_SAMPLES:-1000}

run cvae recipe-cvae-kl-0.5 --classes --kl-weight 0.5
run cvae recipe-cvae-kl-1 --classes --kl-weight 1
run cvae recipe-cvae-kl-2 --classes --kl-weight 2

run dcgan recipe-dcgan-standard --classes --loss standard
run dcgan recipe-dcgan-relativistic --classes --loss relativistic
run dcgan recipe-dcgan-batch-32 --classes --batch-size 32

run ddpm recipe-ddpm-adam --classes --unet small --optimizer adam
run ddpm recipe-ddpm-muon --classes --unet small --optimizer muon
run ddpm recipe-ddpm-muon-0.005 --classes --unet small --muon-lr 0.005
run ddpm recipe-ddpm-muon-0.01 --classes --unet small --muon-lr 0.01
run ddpm recipe-ddpm-batch-32 --classes --unet small --batch-size 32
run ddpm recipe-ddpm-batch-64 --classes --unet small --batch-size 64
run ddpm recipe-ddpm-ema-0.02 --classes --unet small --ema 0.02
run ddpm recipe-ddpm-ema-0.1 --classes --unet small --ema 0.1
run ddpm recipe-ddpm-ema-0.2 --classes --unet small --ema 0.2
run ddpm recipe-ddpm-paper --classes --paper --lr 3e-4 --steps 30

report
