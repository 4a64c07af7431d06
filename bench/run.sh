# What bench.sh and the scripts beside this one share. They source it from the root of the repository.
# The settings of the environment become flags here; bench.sh lists them.
# shellcheck shell=bash
set -euo pipefail
PYTHON=${PYTHON:-python} OUT=${OUT:-out}
where=(${ROOT:+--root "$ROOT"} ${DEVICE:+--device "$DEVICE"})
measure=(--dims "${DIMS:-2048}" --weights "${WEIGHTS:-fid}")

# Prints a command, then runs it.
step() { echo "== $*"; "$@"; }

# run SCRIPT FOLDER [FLAGS]: trains into $OUT/FOLDER and measures, unless its fid.json is there.
run() {
  local script=$1 out=$OUT/$2 own resume=
  shift 2
  if [ -f "$out/fid.json" ]; then echo "== $out is finished"; return; fi
  if [ -f "$out/ckpt.pt" ]; then resume=--resume; fi
  case $script in cvae) own=${CVAE:-} ;; dcgan) own=${DCGAN:-} ;; *) own=${DDPM:-} ;; esac
  # shellcheck disable=SC2086  # $own holds several flags; ${where[@]+..}: bash 3 fails on an empty array
  step "$PYTHON" "$script.py" ${where[@]+"${where[@]}"} \
    ${DATA:+--data "$DATA"} ${SPLIT:+--split "$SPLIT"} ${EPOCHS:+--epochs "$EPOCHS"} \
    "${measure[@]}" --fid-runs "${FID_RUNS:-5}" --fid-samples "${FID_SAMPLES:-10000}" \
    "$@" $own --out "$out" $resume
}

# report [RUN ..]: the table of these runs, or of all in $OUT.
report() { step "$PYTHON" -m bench.report table "$OUT" "$@"; }

pictures() {
  step "$PYTHON" -m bench.report pictures "$OUT" --data "${DATA:-bloodmnist}" ${ROOT:+--root "$ROOT"}
}
