#!/usr/bin/env bash
# Every figure of the README from one command. What is finished is not done again; what was stopped goes on.
#
#   bash bench.sh             train the three models at their defaults, measure the FID of each in 5 runs, print the table
#   bash bench.sh paper       the same with the paper's settings (--paper)
#   bash bench.sh tables      the paper's tables 1 to 3, each row one run
#   bash bench.sh quick       the same path at a few epochs and samples, about 5 minutes on two cores
#   bash bench.sh precision   trained in fp32 and in bf16, with three seeds each: does the FID tell them apart?
#   bash bench.sh speed       images/s, seconds and memory against the plain loop of a tutorial, about 10 minutes on two cores
#   bash bench.sh report      only the table and the pictures, of what is there
#   bash bench.sh ship        checkpoints/ and assets/demo.npz from the trained models
#   RETRAIN=1 bash bench.sh   train anew for each of the five runs: the ± is then the spread of training too
#
# Settings come from the environment, each a flag of the scripts: ROOT DATA SPLIT DEVICE EPOCHS DIMS WEIGHTS FID_RUNS
# FID_SAMPLES; CVAE, DCGAN and DDPM hold further flags of one script (DDPM="--unet patches --classes").
# OUT is the folder of the results (out), PYTHON the interpreter (python).
set -euo pipefail
cd "$(dirname "$0")"

mode=${1:-all}
PYTHON=${PYTHON:-python} OUT=${OUT:-out}
case $mode in
  all|paper|tables|precision|speed|report|ship) ;;
  quick) OUT=$OUT/quick SPLIT=${SPLIT:-val} EPOCHS=${EPOCHS:-2} FID_RUNS=${FID_RUNS:-2} FID_SAMPLES=${FID_SAMPLES:-200} DDPM=${DDPM:---unet patches --steps 10} ;;
  *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
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
  local own=${script^^}
  local flags=("${shared[@]}" --fid-runs "${FID_RUNS:-5}" "$@" ${!own:-} --out "$out")
  [ ! -f "$out/ckpt.pt" ] || flags+=(--resume)
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

# pictures: cells.png (real cells and each model's), types.png (a row a type) and denoising.png, at one scale, in $OUT
pictures() {
  "$PYTHON" - "$OUT" "${DATA:-bloodmnist}" "${ROOT:-}" "${DEVICE:-auto}" <<'PY'
import importlib, sys
from pathlib import Path
import torch
from PIL import Image, ImageDraw
import data

out, name, root = Path(sys.argv[1]), sys.argv[2], sys.argv[3] or None
images, labels = data.load(name, root)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
models = {}
for model in ("cvae", "dcgan", "ddpm"):
    script = importlib.import_module(model)
    args = script.get_args(["--sample", "32", "--out", str(out / model), "--device", sys.argv[4]])
    if (args.out / "model.pt").is_file():
        models[model] = script, args, script.load(args)


def draw(model, labels):
    script, args, net = models[model]
    return script.sample(net, len(labels), args, 0, labels if args.class_counts else None)


def sheet(path, rows, per_line, scale=2, margin=56):
    """rows: {title: uint8 images (N, C, H, W)}, per_line of them in a line."""
    side, lines = scale * images.shape[2] + 2, {title: -(-len(cells) // per_line) for title, cells in rows.items()}
    picture, top = Image.new("RGB", (margin + per_line * side, sum(n * side + 6 for n in lines.values())), "white"), 0
    for title, cells in rows.items():
        ImageDraw.Draw(picture).text((4, top + lines[title] * side // 2 - 6), title, fill="black")
        for i, cell in enumerate(cells.permute(0, 2, 3, 1).numpy()):
            cell = Image.fromarray(cell.squeeze()).convert("RGB").resize((side - 2, side - 2), Image.Resampling.NEAREST)
            picture.paste(cell, (margin + i % per_line * side, top + i // per_line * side))
        top += lines[title] * side + 6
    picture.save(path)
    print(path)


mixed = labels[order[:32]]
sheet(out / "cells.png", {"real": images[order[:32]]} | {model.upper(): draw(model, mixed) for model in models}, 16)
typed = [m for m in models if models[m][1].class_counts]
if typed:
    rows = {}
    for k in range(int(labels.max()) + 1):
        rows[str(k)] = torch.cat([images[order][labels[order] == k][:5], *(draw(m, torch.full((5,), k)) for m in typed)])
    sheet(out / "types.png", rows, 5 * (1 + len(typed)), margin=16)
if "ddpm" in models:
    script, args, net = models["ddpm"]
    strips = {}
    for seed in range(4):  # what the network sees in the noise after 1, 3, 5, ... of the steps
        seen = []
        predict = script.Diffusion.predict
        script.Diffusion.predict = lambda self, model, x, t: seen.append(predict(self, model, x, t)) or seen[-1]
        script.sample(net, 1, args, seed, torch.tensor([seed % 8]) if args.class_counts else None)
        script.Diffusion.predict = predict
        strips[str(seed)] = torch.cat([script.from_model(x) for x in seen[::max(1, len(seen) // 14)]][-14:] + [script.from_model(seen[-1])])
    sheet(out / "denoising.png", strips, 15, margin=16)
PY
}

# ship: the trained networks in fp16 to checkpoints/, 2,048 labelled cells of the DDPM to assets/demo.npz
ship() {
  "$PYTHON" - "$OUT" "${DEVICE:-auto}" <<'PY'
import sys
from pathlib import Path
import numpy as np, torch
import data, ddpm

out = Path(sys.argv[1])
for model in ("cvae", "dcgan", "ddpm"):
    ckpt = torch.load(out / model / "model.pt", map_location="cpu", weights_only=True)
    ckpt["weights"] = {k: v.half() if v.is_floating_point() else v for k, v in ckpt["weights"].items()}
    Path("checkpoints").mkdir(exist_ok=True)
    torch.save(ckpt, f"checkpoints/{model}.pt")
args = ddpm.get_args(["--sample", "2048", "--ckpt", "checkpoints/ddpm.pt", "--device", sys.argv[2]])
net = ddpm.load(args)
labels = ddpm.draw_labels(args, args.sample, args.seed)
images = ddpm.sample(net, args.sample, args, args.seed, labels).permute(0, 2, 3, 1).numpy()
cuts = {"train": slice(0, 1536), "val": slice(1536, 1792), "test": slice(1792, 2048)}
np.savez_compressed(data.DEMO, **{f"{s}_images": images[c] for s, c in cuts.items()}, **{f"{s}_labels": labels[c, None].numpy().astype(np.uint8) for s, c in cuts.items()})
for path in (*Path("checkpoints").iterdir(), data.DEMO):
    print(f"{path} {path.stat().st_size / 1e6:.1f} MB")
PY
}

# speed: training, sampling, FID and start against the plain loop (--plain), A B A B; the table goes to $OUT/speed.md and speed.json
speed() {
  "$PYTHON" -c "import pytorch_fid" 2>/dev/null || { echo "bench.sh speed compares with the pytorch-fid package: pip install pytorch-fid" >&2; exit 1; }
  "$PYTHON" -W ignore - "$OUT" "${DATA:-bloodmnist}" "${ROOT:-}" "${DEVICE:-auto}" "${DIMS:-768}" <<'PY'
import csv, json, os, platform, re, shutil, subprocess, sys, tempfile, time
from pathlib import Path
from statistics import mean, stdev
from unittest import mock
import numpy as np, torch, torchvision
from torch.utils.flop_counter import FlopCounterMode
import cvae, data, dcgan, ddpm, fid

out, dims, reps = Path(sys.argv[1]), int(sys.argv[5]), 2
out.mkdir(parents=True, exist_ok=True)
work = Path(tempfile.mkdtemp(dir=out))
args = ddpm.get_args(["--device", sys.argv[4]])
gpu = args.device.type == "cuda"
images, labels = data.load(sys.argv[2], sys.argv[3] or None)
many = len(images) if gpu else 512                        # a GPU needs a longer look
epochs = {"cvae": (20, 3), "dcgan": (10, 2), "ddpm": (10, 2)} if gpu else {"cvae": (2, 2), "dcgan": (2, 2), "ddpm": (2, 2)}
result = {"device": torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} CPU threads", "torch": torch.__version__,
          "torchvision": torchvision.__version__, "python": platform.python_version(), "rows": [], "growth": {}}


def part(n):
    """A data set of the first n images."""
    path = work / f"{n}.npz"
    x, y = images[:n].permute(0, 2, 3, 1).numpy(), labels[:n, None].numpy()
    np.savez(path, **{f"{s}_{k}": v if s == "train" else v[:1] for s in data.SPLITS for k, v in (("images", x), ("labels", y))})
    return path


peak = 0  # MiB of the machine's memory that the last script took at most


def script(name, *flags):
    """Runs a script; its output and the seconds it took."""
    global peak
    began, log = time.time(), open(work / "log", "w+")
    process = subprocess.Popen([sys.executable, "-W", "ignore", f"{name}.py", "--device", sys.argv[4], *map(str, flags)], stdout=log, stderr=subprocess.STDOUT)
    _, status, usage = os.wait4(process.pid, 0)
    log.seek(0)
    if status:
        sys.exit(f"{name}.py {' '.join(map(str, flags))}: {log.read()}")
    peak = usage.ru_maxrss // 1024
    return log.read(), time.time() - began


def trained(name, *flags, n=many):
    """images/s of the last epoch: the one before has warmed up."""
    script(name, "--data", part(n), "--split", "train", "--overwrite", "--out", work / name, *flags)
    return float(list(csv.DictReader(open(work / name / "log.csv")))[-1]["images/s"])


def compare(what, plain, fast, unit):
    """A row of the table: both measured in turns."""
    global peak
    pairs, memory, peak = [], set(), 0
    for _ in range(reps):
        pairs.append((plain(), fast()))
        memory.add(peak)
    a, b = zip(*pairs)
    faster = [y / x if unit == "images/s" else x / y for x, y in pairs]
    result["rows"].append({"what": what, "unit": unit, "plain": a, "this": b, "ratio": mean(faster), "spread": stdev(faster), "peak MiB": max(memory)})
    print(f"{what}: {mean(a):.4g} -> {mean(b):.4g} {unit}, {mean(faster):.3g} x", flush=True)


for name in ("cvae", "dcgan", "ddpm"):
    long, short = epochs[name]
    compare(f"training the {name.upper()}", lambda: trained(name, "--plain", "--epochs", short), lambda: trained(name, "--epochs", long, *(["--compile", "on"] if gpu and name == "ddpm" else [])), "images/s")

ckpt = ["--ckpt", "checkpoints/ddpm.pt"] if Path("checkpoints/ddpm.pt").is_file() else ["--ckpt", work / "ddpm" / "model.pt"]
few, lot = (2000, 10000) if gpu else (16, 256)


def drawn(name, n, *flags):
    return n / float(re.search(r"drawn in ([\d.]+) s", script(name, "--sample", n, "--out", work / "drawn", *flags)[0]).group(1))


compare("sampling from the DDPM: all T steps against the solver's", lambda: drawn("ddpm", few, *ckpt, "--plain", "--steps", 0), lambda: drawn("ddpm", lot, *ckpt), "images/s")

import pytorch_fid.fid_score, pytorch_fid.inception
state = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False).state_dict()
torch.save(state, work / "random.pth")                    # speed does not depend on what the weights are
with mock.patch.object(pytorch_fid.inception, "load_state_dict_from_url", lambda *a, **k: state):
    theirs = pytorch_fid.inception.InceptionV3([pytorch_fid.inception.InceptionV3.BLOCK_INDEX_BY_DIM[dims]]).eval().to(args.device)
some, batch = images[:2000 if gpu else 64], 100 if gpu else 8


@torch.inference_mode()
def reference():
    began = time.time()
    for i in range(0, len(some), batch):
        theirs(some[i:i + batch].to(args.device).float() / 255)[0].cpu()
    return len(some) / (time.time() - began)


def ours():
    with mock.patch.object(fid, "network", lambda *a, net=fid.network(dims, str(work / "random.pth")): net):
        began = time.time()
        fid.features(some, dims, "", args.device)
        return len(some) / (time.time() - began)


compare(f"FID-{dims}: features, pytorch-fid against fid.py, batches of {batch}", reference, ours, "images/s")
x, y = np.random.default_rng(0).normal(size=(2, 10000, dims))
moments = [(a.mean(0), np.cov(a, rowvar=False)) for a in (x, y)]


def seconds(call):
    began = time.time()
    call()
    return time.time() - began


root = fid.sqrtm
with mock.patch.object(pytorch_fid.fid_score.linalg, "sqrtm", lambda a, disp=False: (root(a), 0)):  # as in SciPy before 1.18
    compare(f"FID-{dims}: statistics of 2 x 10,000 and the distance", lambda: seconds(lambda: pytorch_fid.fid_score.calculate_frechet_distance(*moments[0], *moments[1])),
            lambda: seconds(lambda: fid.frechet_distance(*moments[0], *moments[1])), "s")

features, distance = result["rows"][-2:]
both = {k: [20000 / f + d for f, d in zip(features[k], distance[k])] for k in ("plain", "this")}
faster = [a / b for a, b in zip(both["plain"], both["this"])]
result["rows"].append({"what": f"FID-{dims} of 10,000 against 10,000, from the two rows above", "unit": "s", **both, "ratio": mean(faster), "spread": stdev(faster), "peak MiB": distance["peak MiB"]})

growth = result["growth"]
whole = len(images) if gpu else 2048
growth["CVAE, seconds an epoch against images"] = {n: round(n / trained("cvae", "--epochs", 2, n=n), 2) for n in (whole // 4, whole // 2, whole)}
growth["CVAE, images/s against batch size"] = {b: trained("cvae", "--epochs", 2, "--batch-size", b, n=1024) for b in (32, 128, 512)}
growth["DDPM, images/s drawn against steps"] = {s: round(drawn("ddpm", lot // 2, *ckpt, "--steps", s), 1) for s in (5, 10, 20, 50)}
memory = {}
for n in (1000, 10000, 100000):
    script("dcgan", "--sample", n, "--ckpt", work / "dcgan" / "model.pt", "--out", work / "drawn")
    memory[n] = peak
growth["DCGAN, peak MiB against images drawn (an image is 2,352 bytes)"] = memory
result["start to the end of a run of one step, s"] = {name: round(script(name, "--data", part(128), "--split", "train", "--overwrite", "--epochs", 1, "--out", work / "start")[1], 1) for name in epochs}

net = ddpm.UNet()                                         # how much of the hardware the DDPM's training uses
with FlopCounterMode(display=False) as counter:
    net(torch.randn(1, 3, 28, 28), torch.zeros(1))
dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
a = torch.randn(4096, 4096, device=args.device, dtype=dtype)


def product():
    began = time.time()
    for _ in range(rounds):
        a @ a
    torch.cuda.synchronize() if gpu else None
    return rounds * 2 * 4096 ** 3 / (time.time() - began)


rounds = 50 if gpu else 3
product()
speed = mean(next(row for row in result["rows"] if row["what"] == "training the DDPM")["this"])
flops, most = 3 * counter.get_total_flops(), max(product() for _ in range(3))
result["DDPM: share of the hardware"] = {"GFLOP an image trained": flops / 1e9, "TFLOP/s": speed * flops / 1e12, f"TFLOP/s of a {args.dtype} product of 4096 x 4096": most / 1e12, "share": speed * flops / most}

lines = [f"{result['device']}, torch {result['torch']}, torchvision {result['torchvision']}, Python {result['python']}; mean of {reps}, measured in turns", "",
         "| | plain loop | this | ratio ± spread | peak MiB |", "|---|---|---|---|---|"]
lines += [f"| {r['what']} | {mean(r['plain']):.4g} {r['unit']} | {mean(r['this']):.4g} {r['unit']} | **{r['ratio']:.3g} ± {r['spread']:.1g}** | {format(r['peak MiB'], ',') if r['peak MiB'] else ''} |" for r in result["rows"]]
lines += ["", *(f"- {k}: " + ", ".join(f"{n} {v:.4g}" for n, v in values.items()) for k, values in (growth | {k: v for k, v in result.items() if k.startswith(("start", "DDPM:"))}).items())]
(out / "speed.md").write_text("\n".join(lines) + "\n")
(out / "speed.json").write_text(json.dumps(result, indent=1) + "\n")
shutil.rmtree(work)
print((out / "speed.md").read_text(), end="")
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
    pictures ;;
  paper)
    for script in cvae dcgan ddpm; do run $script paper-$script --paper; done
    report paper-cvae paper-dcgan paper-ddpm ;;
  tables)
    cvae="--paper --kl-weight 1 --lr 1e-4"                             # table 1: from latent 64, KL weight 1, lr 1e-4
    for latent in 32 64 128; do run cvae t1-latent$latent $cvae --latent-dim $latent; done
    for kl in 2 0.75 0.25; do run cvae t1-kl$kl $cvae --kl-weight $kl; done
    for lr in 1e-3 5e-3; do run cvae t1-lr$lr --paper --lr $lr; done
    run dcgan t2-baseline --paper --label-smoothing 0 --g-steps 1      # table 2
    for g in 1 3 5; do run dcgan t2-smooth-g$g --paper --g-steps $g; done
    run dcgan t2-lr5e-4 --paper --lr 5e-4 --d-lr 5e-4
    for latent in 64 128; do run dcgan t2-latent$latent --paper --latent-dim $latent; done
    for t in 300 500 750 1000; do run ddpm t3-T$t --paper --unet baseline --timesteps $t --epochs "${EPOCHS:-100}"; done
    run ddpm t3-deeper --paper --epochs "${EPOCHS:-100}"               # table 3
    run ddpm t3-500epochs --paper --epochs "${EPOCHS:-500}"
    report ;;
  precision)
    for script in cvae dcgan ddpm; do
      for seed in 100 200 300; do
        for dtype in fp32 bf16; do FID_RUNS=1 run $script $script-$dtype-seed$seed --dtype $dtype --seed $seed --fid-seed $seed; done
      done
    done
    report {cvae,dcgan,ddpm}-{fp32,bf16} ;;
  speed) speed ;;
  report) report; pictures ;;
  ship) ship ;;
esac
