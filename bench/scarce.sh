#!/usr/bin/env bash
# Do samples help a classifier where real cells of a type are scarce? Days on two cores, mostly of training.
# The parts stand in the order in which they are worth running. Stop it and call it again as you like: what is
# there is kept. Named parts run alone: bash bench.sh scarce lab. Only lab can run beside another part: the
# others share trainings. Where both write a result at once, one may be lost: call them again to compute it.
set -euo pipefail
cd "$(dirname "$0")/.."
. bench/run.sh
S=$OUT/scarce
val="--part val --seeds 100 200"
gently="--lr 3e-4 --muon-lr 0.005"  # for weights that are trained already

bench() { step "$PYTHON" -m bench.scarce "$@" ${ROOT:+--root "$ROOT"} --rows "$S/rows.json"; }

# train SCRIPT FOLDER FLAGS: into $S/FOLDER; a file `done` is left there at the end.
train() {
  local script=$1 out=$S/$2 resume=
  shift 2
  if [ -f "$out/done" ]; then return; fi
  if [ -f "$out/ckpt.pt" ]; then resume=--resume; fi
  step "$PYTHON" "$script.py" ${DEVICE:+--device "$DEVICE"} --split train --classes --augment \
    --batch-size 64 "$@" --out "$out" $resume
  touch "$out/done"
}

# draw SCRIPT FOLDER N FLAGS: N samples into $S/FOLDER/samples.npz
draw() {
  if [ -f "$S/$2/samples.npz" ]; then return; fi
  step "$PYTHON" "$1.py" ${DEVICE:+--device "$DEVICE"} --sample "$3" "${@:4}" --out "$S/$2"
}

# generator NAME TYPE LEFT CHOICE: trained on what is left, with samples of the type, in the folder
# nLEFT-tTYPE-cCHOICE-NAME. NAME: cvae, dcgan, ddpm, or init, a DDPM that has learned the other types before.
# Also init-bB with --balance B, init-eE with E epochs, init-gG with --guidance G, init-gentle at lower rates.
generator() {
  local few=$S/n$3-t$2-c$4.npz out=n$3-t$2-c$4-$1 script=$1
  if [ -f "$S/$out/samples.npz" ]; then return; fi
  if [ ! -f "$few" ]; then bench prepare --type "$2" --left "$3" --choice "$4" --out "$few"; fi
  case $1 in
    init*)  # half an hour, once for two types, on all the others; then some minutes for each choice
      script=ddpm
      local others balance=1 epochs=3 rates=
      local pair=35  # types 3 and 5 share a model that has learned neither, so do 0 and 4
      case $2 in 0 | 4) pair=04 ;; esac
      others=$S/without$pair.npz
      if [ ! -f "$others" ]; then
        bench prepare --type ${pair:0:1} --left 0 --out "$S/without${pair:0:1}.npz"
        bench prepare --type ${pair:1:1} --left 0 --out "$others" --data "$S/without${pair:0:1}.npz"
      fi
      train ddpm "pre$pair" --data "$others" --unet small --epochs 20
      case $1 in  # settings that were tried
        *-b*) balance=${1#*-b} ;;
        *-e*) epochs=${1#*-e} ;;
        *-gentle) rates=$gently ;;
      esac
      case $1 in
        *-g[0-9]*)
          generator init "$2" "$3" "$4"
          draw ddpm "$out" 1000 --label "$2" --guidance "${1#*-g}" --ckpt "$S/n$3-t$2-c$4-init/model.pt"
          ;;
        *)
          train ddpm "$out" --data "$few" --balance $balance --init "$S/pre$pair/model.pt" \
            --epochs $epochs $rates
          ;;
      esac
      ;;
    ddpm) train ddpm "$out" --data "$few" --balance 1 --unet small --epochs 40 ;;
    dcgan) train dcgan "$out" --data "$few" --balance 1 --epochs 120 ;;
    cvae) train cvae "$out" --data "$few" --balance 1 --epochs 40 ;;
  esac
  local n=1000
  if [ "$1-$2-$3" = init-0-50 ]; then n=4000; fi  # how many are best?
  draw "$script" "$out" $n --label "$2"
}

# rows NAME TYPE LEFT CHOICE FLAGS: classifiers with samples of a generator. Without further flags: the
# settings that are best on the val part, with samples and without, measured on the test part.
rows() {
  generator "$1" "$2" "$3" "$4"
  bench rows --type "$2" --left "$3" --choice "$4" --generator "$1" \
    --samples "$S/n$3-t$2-c$4-$1/samples.npz" "${@:5}"
}

# tried: ways to train and to sample, one choice of 50 basophils, on the val part
tried() {
  for name in init init-b0.5 init-e6 init-g0 init-g1.2 init-gentle; do
    rows $name 0 50 0 $val --repeats 1000 --counts 250 500 1000
  done
  rows init 0 50 0 $val --repeats 1000 --counts 0 250 500 1000 --steps 6000
  bench rows --type 0 --left 50 $val --repeats 0 --counts 500 1000 --generator init-alone \
    --samples "$S/n50-t0-c0-init/samples.npz"  # in place of repeats
  # how much would a generator give that has learned all 852?
  draw ddpm knows-852 1000 --ckpt pretrained --label 0
  bench rows --type 0 --left 50 $val --repeats 1000 --counts 250 500 1000 --generator knows-852 \
    --samples "$S/knows-852/samples.npz"
}

# chosen LEFT: settings for basophils, on the val part
chosen() {
  local counts="250 500 1000"
  if [ "$1" = 50 ]; then counts="$counts 2000 4000"; fi
  for choice in 0 1 2; do
    bench rows --type 0 --left "$1" --choice $choice $val --repeats 0 250 500 1000 2000
    bench rows --type 0 --left "$1" --choice $choice $val --weighted
    rows init 0 "$1" $choice $val --repeats 1000 --counts $counts
  done
}

basophils() {
  bench rows --repeats 0  # all real cells
  bench rows --repeats 0 --steps 3000
  # all cells of a type, as often as the 50 with 1,000 repeats and 500 samples; there are 2,026 of type 3
  bench rows --type 0 --left 852 --repeats 698
  bench rows --type 0 --left 852 --repeats 698 --steps 3000
  bench rows --type 4 --left 849 --repeats 701
  bench rows --type 5 --left 993 --repeats 557
  for left in 50 20; do
    chosen $left
    for choice in 0 1 2; do rows init 0 $left $choice; done
    for choice in 0 1 2; do  # twice the steps
      rows init 0 $left $choice $val --repeats 1000 --counts 0 $((left == 50 ? 500 : 1000)) --steps 3000
      rows init 0 $left $choice --steps 3000
    done
  done
}

types() {  # monocyte, immature granulocyte, lymphocyte
  for left in 50 20; do
    for type in 5 3 4; do
      for choice in 0 1 2; do rows init $type $left $choice; done
    done
  done
}

named() {  # are the samples of their type?
  local type left
  for type in 0 5 3 4; do
    for left in 20 50; do
      generator init $type $left 0
      if [ -f "$S/named-n$left-t$type.json" ]; then continue; fi
      bench named --type $type --left $left --sets "$S"/n$left-t$type-c0-*/samples.npz \
        --out "$S/named-n$left-t$type.json"
    done
  done
}

copies() {
  for type in 0 5 3 4; do
    for left in 20 50; do
      local out=$S/n$left-t$type-c0-init
      generator init $type $left 0
      if [ -f "$out/copies.json" ]; then continue; fi
      bench copies --type $type --left $left --samples "$out/samples.npz" --out "$out/copies.json" \
        --dims "${DIMS:-768}" --weights "${WEIGHTS:-fid}"
    done
  done
}

# moved HOW LEFT CHOICE NAMES: LEFT cells of every type, moved as from another laboratory. From the pretrained
# weights, init takes 500 steps at gentle learning rates, long 2,000 at the default ones; ddpm: 500 from
# scratch. 1,600 samples; classifiers on the val part. The pretrained model has learned many cells of the
# official test part: there, name one with INIT=MODEL.pt that has not.
moved() {
  local cells=$1-$2-c$3 epochs=$(($2 == 30 ? 125 : 38)) name
  local file=$S/$cells.npz
  if [ ! -f "$file" ]; then bench move --how "$1" --left "$2" --choice "$3" --out "$file"; fi
  bench rows --data "$file" $val --repeats 0 960
  bench rows --data "$file" $val --repeats 0 960 --before bloodmnist  # the cells that init has learned
  for name in "${@:4}"; do
    local out=$cells-$name start="--init ${INIT:-pretrained}" times=1
    local made=(--generator "$name" --samples "$S/$cells-$name/samples.npz" --counts 800 1600)
    case $name in
      ddpm) start="--unet small" ;;
      init) start="$start $gently" ;;
      long) times=4 ;;
    esac
    train ddpm "$out" --data "$file" --epochs $((epochs * times)) $start
    draw ddpm "$out" 1600
    bench rows --data "$file" $val --repeats 0 960 "${made[@]}"
    if [ "$name" != ddpm ]; then bench rows --data "$file" $val --before bloodmnist "${made[@]}"; fi
  done
}

# measured HOW LEFT CHOICE: the same on the test part, with the settings chosen by then; FID and near-copies
measured() {
  local cells=$1-$2-c$3 samples
  for samples in "$S/$cells"-*/samples.npz; do
    local out=${samples%/*} how=("$S/$cells.npz" ${DEVICE:+--device "$DEVICE"} "${measure[@]}")
    local made=(--data "$S/$cells.npz" --generator "${out##*-}" --samples "$samples")
    bench rows "${made[@]}"
    if [ "${out##*-}" != ddpm ]; then bench rows "${made[@]}" --before bloodmnist; fi
    if [ "$3" != 0 ]; then continue; fi
    if [ ! -f "$out/fid.json" ]; then
      "$PYTHON" fid.py "$samples" "${how[@]}" --split test --json > "$out/fid.tmp"
      mv "$out/fid.tmp" "$out/fid.json"
    fi
    if [ ! -f "$out/neighbours.json" ]; then
      step "$PYTHON" -m bench.trust neighbours "$samples" "${how[@]}" --augment --out "$out"
    fi
  done
}

lab() {  # thirty and a hundred cells of every type
  local left choice how name
  for left in 30 100; do
    for how in mild strong; do
      if [ $how = mild ]; then name=init; else name=long; fi
      moved $how $left 0 $name ddpm  # from scratch: one choice shows enough
      for choice in 1 2; do moved $how $left $choice $name; done
      for choice in 0 1 2; do measured $how $left $choice; done
    done
    rm -f "$S/lab-$left.png"
    bench picture --out "$S/lab-$left.png" --sets "$S"/mild-$left-c0{.npz,-{init,ddpm}/samples.npz} \
      "$S"/strong-$left-c0{.npz,-long/samples.npz}
  done
}

sizes() {  # 100 and 200 cells left
  for left in 100 200; do
    chosen $left
    for type in 0 5 3 4; do
      for choice in 0 1 2; do rows init $type $left $choice; done
    done
  done
}

models() {  # the other generators, for 50 basophils; ddpm: from scratch, one to three core-hours each
  for name in cvae dcgan ddpm; do
    for choice in 0 1 2; do
      rows $name 0 50 $choice $val --repeats 1000 --counts 250 500 1000
    done
    for choice in 0 1 2; do rows $name 0 50 $choice; done
  done
}

whole() {  # samples of the pretrained model beside all real cells
  local samples="--samples $S/pretrained/samples.npz --generator pretrained"
  draw ddpm pretrained 6000 --ckpt pretrained
  bench rows $val --counts 0 2000 6000 $samples
  bench rows $samples
}

tables() {
  bench table --part val
  bench table --part test
}

if [ $# = 0 ]; then set -- tried basophils types named copies lab whole sizes models tables; fi
for part in "$@"; do $part; done
