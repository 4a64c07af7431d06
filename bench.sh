#!/usr/bin/env bash
# Every figure of the README from one command. What is finished is not done again; what was stopped goes on.
#
#   bash bench.sh             train the three models at their defaults, measure each in 5 draws, a table
#   bash bench.sh paper       the same with the paper's settings; tables: its tables 1 to 3, a run a row
#   bash bench.sh quick       the same path at a few epochs and samples, some minutes on two cores
#   bash bench.sh precision   fp32 against bf16; recipe: the rows of RESULTS.md that chose the defaults
#   bash bench.sh curve       how long must one train? each model for ever longer, measured at every stage
#   bash bench.sh trust       floors; are the drawn cells copies, of their types, of use? hours on two cores
#   bash bench.sh speed       against the plain loop of a tutorial, about 10 minutes on two cores
#   bash bench.sh report      only the table and the pictures; ship: checkpoints/ and assets/demo.npz
#   RETRAIN=1 bash bench.sh   train anew for each of the five draws: the ± is then the spread of training too
#
# Settings come from the environment, each a flag of the scripts: ROOT DATA SPLIT DEVICE EPOCHS DIMS WEIGHTS
# FID_RUNS FID_SAMPLES; CVAE, DCGAN, DDPM: further flags of one script; OUT: the results; STAGES; PYTHON.
set -euo pipefail
cd "$(dirname "$0")"

mode=${1:-all}
PYTHON=${PYTHON:-python} OUT=${OUT:-out}
if [ "$mode" = quick ]; then
  OUT=$OUT/quick SPLIT=${SPLIT:-val} EPOCHS=${EPOCHS:-2}
  FID_RUNS=${FID_RUNS:-2} FID_SAMPLES=${FID_SAMPLES:-200}
  DDPM=${DDPM:---unet tiny --steps 10}
fi
where=()
for name in ROOT DEVICE; do [ -z "${!name:-}" ] || where+=("--${name,,}" "${!name}"); done
measure=(--dims "${DIMS:-2048}" --weights "${WEIGHTS:-fid}")

# run SCRIPT FOLDER [FLAGS]: trains into $OUT/FOLDER and measures, unless its fid.json is there
run() {
  local script=$1 out=$OUT/$2 own=${1^^} flags; shift 2
  [ ! -f "$out/fid.json" ] || { echo "== $out is finished"; return; }
  flags=("${where[@]}" "${measure[@]}" --fid-runs "${FID_RUNS:-5}" --fid-samples "${FID_SAMPLES:-10000}")
  for name in DATA SPLIT EPOCHS; do [ -z "${!name:-}" ] || flags+=("--${name,,}" "${!name}"); done
  # shellcheck disable=SC2206
  flags+=("$@" ${!own:-} --out "$out")
  [ ! -f "$out/ckpt.pt" ] || flags+=(--resume)
  echo "== $PYTHON $script.py ${flags[*]}"
  "$PYTHON" "$script.py" "${flags[@]}"
}
report() { "$PYTHON" -m bench.report table "$OUT" "$@"; }
pictures() { "$PYTHON" -m bench.report pictures "$OUT" --data "${DATA:-bloodmnist}" ${ROOT:+--root "$ROOT"}; }

case $mode in
  all|quick)
    for script in cvae dcgan ddpm; do
      if [ "${RETRAIN:-}" = 1 ]; then
        for seed in 100 200 300 400 500; do
          FID_RUNS=1 run $script $script-seed$seed --seed $seed --fid-seed $seed
        done
      else
        run $script $script
      fi
    done
    report cvae dcgan ddpm
    pictures ;;
  paper)
    for script in cvae dcgan ddpm; do run $script paper-$script --paper; done
    report paper-cvae paper-dcgan paper-ddpm ;;
  tables)
    cvae="--paper --kl-weight 1 --lr 1e-4"
    for n in 32 64 128; do run cvae t1-latent$n $cvae --latent-dim $n; done
    for kl in 2 0.75 0.25; do run cvae t1-kl$kl $cvae --kl-weight $kl; done
    for lr in 1e-3 5e-3; do run cvae t1-lr$lr --paper --lr $lr; done
    run dcgan t2-baseline --paper --label-smoothing 0 --g-steps 1
    for g in 1 3 5; do run dcgan t2-smooth-g$g --paper --g-steps $g; done
    run dcgan t2-lr5e-4 --paper --lr 5e-4 --d-lr 5e-4
    for n in 64 128; do run dcgan t2-latent$n --paper --latent-dim $n; done
    export EPOCHS=${EPOCHS:-100}
    for t in 300 500 750 1000; do run ddpm t3-T$t --paper --unet baseline --timesteps $t; done
    run ddpm t3-deeper --paper
    report ;;
  precision)
    for script in cvae dcgan ddpm; do
      for seed in 100 200 300; do
        for dtype in fp32 bf16; do
          FID_RUNS=1 run $script $script-$dtype-seed$seed --dtype $dtype --seed $seed --fid-seed $seed
        done
      done
    done
    report {cvae,dcgan,ddpm}-{fp32,bf16} ;;
  recipe)
    export SPLIT=${SPLIT:-train} EPOCHS=${EPOCHS:-4} FID_RUNS=1 FID_SAMPLES=${FID_SAMPLES:-1000}
    recipe() { run "$1" "recipe-$1-$2" --classes --fid-seed 0 "${@:3}"; }
    for o in adam muon; do recipe ddpm $o --unet small --optimizer $o; done
    for kl in 0.5 1 2; do recipe cvae kl-$kl --kl-weight $kl; done
    for lr in 0.005 0.01; do recipe ddpm muon-$lr --unet small --muon-lr $lr; done
    for batch in 32 64; do recipe ddpm batch-$batch --unet small --batch-size $batch; done
    for ema in 0.02 0.1 0.2; do recipe ddpm ema-$ema --unet small --ema $ema; done
    recipe ddpm paper --paper --lr 3e-4 --steps 30
    for loss in standard relativistic; do recipe dcgan $loss --loss $loss; done
    recipe dcgan batch-32 --batch-size 32
    report ;;
  curve)
    for epochs in ${STAGES:-5 10 20 40 80 160}; do
      for script in cvae dcgan ddpm; do
        out=$OUT/curve-$script
        [ ! -f "$out/fid-$epochs.json" ] || continue
        rm -f "$out/fid.json"
        EPOCHS=$epochs FID_RUNS=${FID_RUNS:-1} run $script curve-$script
        mv "$out/fid.json" "$out/fid-$epochs.json"
      done
    done
    "$PYTHON" -m bench.report curve "$OUT" ;;
  trust)
    trust() {  # NAME WHAT SETS: into $OUT/NAME.json, unless it is there
      [ ! -f "$OUT/$1.json" ] || { echo "== $OUT/$1.json is finished"; return; }
      "$PYTHON" -m bench.trust "${@:2}" "${where[@]}" "${measure[@]}" --cache "$OUT" | tee "$OUT/$1.tmp"
      mv "$OUT/$1.tmp" "$OUT/$1.json"
    }
    mkdir -p "$OUT"
    data=${DATA:-bloodmnist}
    trust floors floors "$data"
    for script in cvae dcgan ddpm; do
      out=$OUT/trust-$script model=$OUT/$script/model.pt
      [ -f "$model" ] || model=checkpoints/$script.pt
      [ -f "$out/samples.npz" ] || "$PYTHON" $script.py --sample 2048 --ckpt "$model" --out "$out"
      for what in neighbours cas; do trust $script-$what $what "$out/samples.npz" "$data"; done
    done
    trust scarce scarce "$data" ;;
  speed)
    "$PYTHON" -m bench.speed "$OUT" "${where[@]}" --data "${DATA:-bloodmnist}" --dims "${DIMS:-768}" ;;
  report) report; pictures ;;
  ship) "$PYTHON" -m bench.report ship "$OUT" ;;
  *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
