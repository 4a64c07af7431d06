#!/usr/bin/env bash
# The paper's tables 1 to 3, one run per row. Each run changes what its row names and keeps the paper's rest.
# About three days on two fast cores, most of them the DDPM's draws in all T steps; a day with
# FID_SAMPLES=2000.
set -euo pipefail
cd "$(dirname "$0")/.."
. bench/run.sh

# Table 1: the CVAE.
run cvae t1-latent32 --paper --kl-weight 1 --lr 1e-4 --latent-dim 32
run cvae t1-latent64 --paper --kl-weight 1 --lr 1e-4 --latent-dim 64
run cvae t1-latent128 --paper --kl-weight 1 --lr 1e-4 --latent-dim 128
run cvae t1-kl2 --paper --kl-weight 2 --lr 1e-4
run cvae t1-kl0.75 --paper --kl-weight 0.75 --lr 1e-4
run cvae t1-kl0.25 --paper --kl-weight 0.25 --lr 1e-4
run cvae t1-lr1e-3 --paper --lr 1e-3
run cvae t1-lr5e-3 --paper --lr 5e-3

# Table 2: the DCGAN.
run dcgan t2-baseline --paper --label-smoothing 0 --g-steps 1
run dcgan t2-smooth-g1 --paper --g-steps 1
run dcgan t2-smooth-g3 --paper --g-steps 3
run dcgan t2-smooth-g5 --paper --g-steps 5
run dcgan t2-lr5e-4 --paper --lr 5e-4 --d-lr 5e-4
run dcgan t2-latent64 --paper --latent-dim 64
run dcgan t2-latent128 --paper --latent-dim 128

# Table 3: the DDPM.
EPOCHS=${EPOCHS:-100}
run ddpm t3-T300 --paper --unet baseline --timesteps 300
run ddpm t3-T500 --paper --unet baseline --timesteps 500
run ddpm t3-T750 --paper --unet baseline --timesteps 750
run ddpm t3-T1000 --paper --unet baseline --timesteps 1000
run ddpm t3-deeper --paper

report
