#!/usr/bin/env bash
# Every figure of the README from one command. What is finished is not done again; what was stopped goes on.
#
#   bash bench.sh             train the three models at their defaults, measure the FID of each in 5 runs, print the table
#   bash bench.sh tables      the paper's tables 1 to 3, each row one run
#   bash bench.sh quick       the same path at a few epochs and samples, about 5 minutes on two cores
#   bash bench.sh report      only the table and the picture, of what is there
#   RETRAIN=1 bash bench.sh   train anew for each of the five runs: the ± is then the spread of training too
#
# Settings come from the environment, each a flag of the scripts: ROOT DATA SPLIT DEVICE EPOCHS DIMS WEIGHTS FID_RUNS
# FID_SAMPLES; SAMPLER holds flags for the DDPM's sampling ("--steps 50"; without it all steps, many hours on a CPU).
# OUT is the folder of the results (out), PYTHON the interpreter (python).
set -euo pipefail
cd "$(dirname "$0")"

mode=${1:-all}
PYTHON=${PYTHON:-python} OUT=${OUT:-out}
case $mode in
  all|tables|report) ;;
  quick) OUT=$OUT/quick SPLIT=${SPLIT:-val} EPOCHS=${EPOCHS:-2} FID_RUNS=${FID_RUNS:-2} FID_SAMPLES=${FID_SAMPLES:-200} SAMPLER=${SAMPLER:---steps 10} ;;
  *) sed -n '2,13s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac

shared=(--dims "${DIMS:-2048}" --weights "${WEIGHTS:-fid}" --fid-samples "${FID_SAMPLES:-10000}")
for name in ROOT DATA SPLIT DEVICE EPOCHS; do
  value=${!name:-}
  [ -z "$value" ] || shared+=("--${name,,}" "$value")
done

# run SCRIPT FOLDER [FLAGS]: trains into $OUT/FOLDER and measures, unless its fid.json is there for these dims and samples
run() {
  local script=$1 out=$OUT/$2; shift 2
  if [ -f "$out/fid.json" ] && grep -q "\"dims\": ${DIMS:-2048}," "$out/fid.json" && grep -q "\"generated_images\": ${FID_SAMPLES:-10000}," "$out/fid.json"; then
    echo "== $out is finished"
    return
  fi
  local flags=("${shared[@]}" --fid-runs "${FID_RUNS:-5}" "$@" --out "$out")
  [ ! -f "$out/ckpt.pt" ] || flags+=(--resume)
  [ "$script" != ddpm ] || flags+=(${SAMPLER:-})
  echo "== $PYTHON $script.py ${flags[*]}"
  "$PYTHON" "$script.py" "${flags[@]}"
}

# report [FOLDER ...]: the table of these folders of $OUT (all that are measured), on the screen and in $OUT/results.md
report() {
  "$PYTHON" - "$OUT" "$@" <<'PY'
import json, sys
from pathlib import Path
from statistics import mean, stdev

out, names = Path(sys.argv[1]), sys.argv[2:]
files = sorted(f for f in out.glob("*/fid.json") if not names or f.parent.name.split("-seed")[0] in names)
groups = {}  # the five folders of RETRAIN=1 are one row
for f in files:
    groups.setdefault(f.parent.name.split("-seed")[0], []).append(json.loads(f.read_text()))
lines = ["| run | epochs | FID dims, weights | FID | runs x images | ± is the spread of | device | command |", "|---|---|---|---|---|---|---|---|"]
for name, results in groups.items():
    values = [run["fid"] for r in results for run in r["runs"]]
    r, spread = results[0], stdev(values) if len(values) > 1 else 0.0
    what = f"training and sampling ({len(results)} trainings)" if len(results) > 1 else "sampling (1 training)"
    lines.append(f"| {name} | {r['trained']['epochs']:g} | {r['dims']}, {r['weights']} | **{mean(values):.4g} ± {spread:.2g}** | {len(values)} x {r['generated_images']:,} "
                 f"| {what} | {r['device']} | `{r['command']}` |")
text = "\n".join(lines) + "\n" if groups else "nothing is measured yet\n"
(out / "results.md").write_text(text)
print(text, end="")
PY
}

# picture: $OUT/cells.png, 32 real cells over 32 of each model, at one scale
picture() {
  "$PYTHON" - "$OUT" "${DATA:-bloodmnist}" "${ROOT:-}" "${DEVICE:-auto}" "${SAMPLER:---steps 50}" <<'PY'
import importlib, sys
from pathlib import Path
import numpy as np, torch
from PIL import Image, ImageDraw
import data

out, name, root = Path(sys.argv[1]), sys.argv[2], sys.argv[3] or None
images = data.load(name, root)[0]
rows = {"real": images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:32]].permute(0, 2, 3, 1).numpy()}
for model in ("cvae", "dcgan", "ddpm"):
    if (out / model / "model.pt").is_file():
        sampler = sys.argv[5].split() if model == "ddpm" else []
        importlib.import_module(model).main(["--sample", "32", "--out", str(out / model), "--device", sys.argv[4], *sampler])
        with np.load(out / model / "samples.npz") as file:
            rows[model] = file["images"][:32]
n, scale, margin = rows["real"].shape[1], 2, 48
picture = Image.new("RGB", (margin + 16 * (n * scale + 2), len(rows) * (2 * (n * scale + 2) + 6)), "white")
for r, (model, cells) in enumerate(rows.items()):
    top = r * (2 * (n * scale + 2) + 6)
    ImageDraw.Draw(picture).text((6, top + n * scale - 4), model.upper() if model != "real" else model, fill="black")
    for i, cell in enumerate(cells):
        cell = Image.fromarray(cell.squeeze()).convert("RGB").resize((n * scale, n * scale), Image.Resampling.NEAREST)
        picture.paste(cell, (margin + i % 16 * (n * scale + 2), top + i // 16 * (n * scale + 2)))
picture.save(out / "cells.png")
print(f"{out}/cells.png")
PY
}

case $mode in
  all|quick)
    if [ "${RETRAIN:-}" = 1 ]; then
      for script in cvae dcgan ddpm; do
        for seed in 100 200 300 400 500; do
          FID_RUNS=1 run $script $script-seed$seed --seed $seed --fid-seed $seed
        done
      done
    else
      for script in cvae dcgan ddpm; do run $script $script; done
    fi
    report cvae dcgan ddpm
    picture ;;
  tables)
    cvae="--kl-weight 1 --lr 1e-4"                                     # table 1: from latent 64, KL weight 1, lr 1e-4
    for latent in 32 64 128; do run cvae t1-latent$latent $cvae --latent-dim $latent; done
    for kl in 2 0.75 0.25; do run cvae t1-kl$kl $cvae --kl-weight $kl; done
    for lr in 1e-3 5e-3; do run cvae t1-lr$lr --kl-weight 0.75 --lr $lr; done
    run dcgan t2-baseline --label-smoothing 0 --g-steps 1              # table 2
    for g in 1 3 5; do run dcgan t2-smooth-g$g --g-steps $g; done
    run dcgan t2-lr5e-4 --lr 5e-4
    for latent in 64 128; do run dcgan t2-latent$latent --latent-dim $latent; done
    for t in 300 500 750 1000; do run ddpm t3-T$t --depth baseline --timesteps $t --epochs "${EPOCHS:-100}"; done
    run ddpm t3-deeper --epochs "${EPOCHS:-100}"                       # table 3
    run ddpm t3-500epochs --epochs "${EPOCHS:-500}"
    report ;;
  report) report; picture ;;
esac
