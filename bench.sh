#!/usr/bin/env bash
# Every figure of the README from one command. What is finished is not done again; what was stopped goes on.
#
#   bash bench.sh             train the three models at their defaults, measure each in five draws, a table
#                             and pictures: a GPU's work; most of a day on two fast cores
#   RETRAIN=1 bash bench.sh   five trainings of each, a draw each: the ± is then the spread of training too
#   bash bench.sh MODE        runs bench/MODE.sh, which says how long it takes:
#
#     quick       the same path at a few epochs and samples
#     paper       the three models with the paper's settings
#     tables      the paper's tables 1 to 3, a run a row
#     retrain     what RETRAIN=1 runs
#     precision   fp32 against bf16
#     recipe      short trainings of the kind that chose the defaults
#     curve       how long must one train? FID at ever more epochs
#     trust       are the drawn cells copies, are they of their types, what do they teach?
#     scarce      do samples help where real cells of a type are scarce?
#     speed       against the plain loop of a tutorial
#     report      only the table and the pictures
#     ship        checkpoints/ and assets/demo.npz from the finished runs
#
# Settings come from the environment, each a flag of the scripts: ROOT DATA SPLIT DEVICE EPOCHS DIMS WEIGHTS
# FID_RUNS FID_SAMPLES; CVAE, DCGAN, DDPM: further flags of one script; OUT: the results, else out; STAGES:
# the epochs of curve; PYTHON. An example: DEVICE=cuda EPOCHS=100 DDPM="--unet small" bash bench.sh
set -euo pipefail
cd "$(dirname "$0")"

if [ $# = 0 ] && [ "${RETRAIN:-}" = 1 ]; then set -- retrain; fi
if [ $# != 0 ]; then
  if [ "$1" = run ] || [ ! -f "bench/$1.sh" ]; then  # bench/run.sh is what the modes share, not a mode
    sed -n '2,/^set/s/^# \{0,1\}//p' bench.sh >&2
    exit 2
  fi
  mode=$1; shift
  exec bash "bench/$mode.sh" "$@"
fi

. bench/run.sh
run cvae cvae
run dcgan dcgan
run ddpm ddpm
report cvae dcgan ddpm
pictures
