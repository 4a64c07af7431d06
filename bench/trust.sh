#!/usr/bin/env bash
# Can the drawn cells be trusted? What real cells score against real ones (floors); then, for 2,048 cells of
# each model: are they copies (neighbours), are they of their types and what do they teach (cas)?
# About two hours on two cores. Cells of out/MODEL/model.pt, if it has learned the train part alone, with
# --classes; else of the pretrained model.
set -euo pipefail
cd "$(dirname "$0")/.."
. bench/run.sh

# trust FOLDER WHAT SETS: into $OUT/FOLDER/WHAT.json, unless it is there
trust() {
  local out=$OUT/$1
  if [ -f "$out/$2.json" ]; then echo "== $out/$2.json is finished"; return; fi
  step "$PYTHON" -m bench.trust "${@:2}" ${where[@]+"${where[@]}"} "${measure[@]}" --out "$out"
}

data=${DATA:-bloodmnist}
trust trust floors "$data"
for script in cvae dcgan ddpm; do
  out=$OUT/trust-$script model=pretrained
  if "$PYTHON" - "$OUT/$script/model.pt" 2> /dev/null << EOF; then model=$OUT/$script/model.pt; fi
import sys, $script
model = $script.load(sys.argv[1], "cpu")
sys.exit(not model.classes or model.trained["split"] != "train")
EOF
  if [ ! -f "$out/samples.npz" ]; then
    step "$PYTHON" $script.py --sample 2048 --ckpt "$model" --out "$out" ${DEVICE:+--device "$DEVICE"}
  fi
  trust trust-$script neighbours "$out/samples.npz" "$data"
  trust trust-$script cas "$out/samples.npz" "$data"
done
