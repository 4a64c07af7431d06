#!/usr/bin/env bash
# Trains the three models with their default settings, measures each on five sets of samples, writes a table
# and pictures. (The commands of the README's table stand in RESULTS.md.) What is finished is not done again;
# what was stopped goes on.
#
#   bash bench.sh             a GPU's work; on two fast cores most of a day
#   bash bench.sh MODE        runs bench/MODE.sh, which says how long it takes:
#
#     quick       the same with few epochs and samples: does everything work here?
#     paper       the three models with the paper's settings
#     tables      the paper's tables 1 to 3, one run per row
#     retrain     five trainings of each model: the ± is then the spread of training, too
#     precision   fp32 against bf16
#     recipe      short trainings of the kind that chose the defaults
#     curve       how long must one train? FID at ever more epochs
#     trust       are the samples copies, are they of their types, what do they teach?
#     scarce      do samples help where real cells of a type are scarce?
#     speed       against the plain loop of a tutorial
#     report      only the table and the pictures
#     ship        checkpoints/ and assets/demo.npz from the finished runs
#
# Settings come from the environment. An example: DEVICE=cuda EPOCHS=100 DDPM="--unet small" bash bench.sh
#   ROOT DATA SPLIT DEVICE EPOCHS DIMS WEIGHTS FID_RUNS FID_SAMPLES   flags of the scripts
#   CVAE DCGAN DDPM                                                   further flags of one script
#   OUT STAGES PYTHON     folder of the results, else out; the epochs of curve; the interpreter, else python
set -euo pipefail
cd "$(dirname "$0")"

if [ $# != 0 ]; then
  if [ "$1" = run ] || [ ! -f "bench/$1.sh" ]; then  # bench/run.sh is what the modes share, not a mode
    sed -n '2,/^set/s/^# \{0,1\}//p' bench.sh >&2  # the comment above is the help
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
