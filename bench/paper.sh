#!/usr/bin/env bash
# The three models with the paper's settings, five draws each, and their table.
# About a day on two fast cores, nearly all of it the DDPM's: 500 epochs, then 500 steps for each draw.
set -euo pipefail
cd "$(dirname "$0")/.."
. bench/run.sh

run cvae paper-cvae --paper
run dcgan paper-dcgan --paper
run ddpm paper-ddpm --paper
report paper-cvae paper-dcgan paper-ddpm
