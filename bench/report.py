"""Tables, pictures and what is shipped, from the folders of finished runs.

    python -m bench.report table out [cvae dcgan ddpm]    the table of their fid.json, also in out/results.md
    python -m bench.report curve out                      FID against images seen and core-hours, curve.png
    python -m bench.report pictures out                   cells.png, types.png and denoising.png
    python -m bench.report ship out                       checkpoints/ in fp16, assets/demo.npz

The pictures and what is shipped are of out/<script>/model.pt.
"""
import argparse
import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import torch

import cvae
import data
import dcgan
import ddpm
import fid
from bench import trust

SCRIPTS = (cvae, dcgan, ddpm)
TITLES = {script.NAME: script.NAME.upper() for script in SCRIPTS}


def table(out, names):
    """One row per run: the size of its network, what its training took (by log.csv, if there is one), the
    means of its sets of samples. The trainings <run>-seed100, -seed200 .. are one row."""
    groups = {}
    for file in sorted(out.glob("*/fid.json")):
        groups.setdefault(file.parent.name.split("-seed")[0], []).append(file)
    head = ("| run | parameters, M | epochs | images seen, M | core-hours | FID | KID | precision | recall | "
            "images | features | ± is the spread of | samples/s | on |")
    lines = [head, "|---" * 14 + "|"]
    for name, files in groups.items():
        if names and name not in names:
            continue
        results = [json.loads(file.read_text()) for file in files]
        one, runs = results[0], [run for r in results for run in r["runs"]]
        cells = [fid.summary([run[k] for run in runs])["text"] for k in fid.MEASURES]
        spread = f"{len(results)} trainings" if len(results) > 1 else "sampling, one training"
        images, hours = effort(files[0].parent, one)
        took = f"{images / 1e6:.3g} | {hours:.2g}" if images else " | "
        size = f"{one['parameters'] / 1e6:.2g}" if "parameters" in one else ""  # an earlier version's file
        rate = one["images"] / np.mean([run["sampling_seconds"] for run in runs])
        lines.append(
            f"| {TITLES.get(name, name)} | {size} | {one['trained']['epochs']} | {took} | "
            f"**{cells[0]}** | {' | '.join(cells[1:])} | {len(runs)} x {one['images']:,} | "
            f"{one['dims']}, {one['weights']} | {spread} | {rate:,.4g} | {one['device']} |")
        if one["floor"]:
            floor = [fid.summary([r["floor"][k]["mean"] for r in results])["text"] for k in fid.MEASURES]
            few, many = one.get("floor_images", (one["images"], one["others"]))
            lines.append(f"| real, {few:,} against {many:,} | | | | | {' | '.join(floor)} | | | | | |")
    text = "\n".join(lines if groups else ["nothing is measured yet"]) + "\n"
    with data.atomic(out / "results.md") as file:
        file.write(text.encode())
    print(text, end="")


def effort(folder, result, n=None):
    """Images seen and core-hours (on a GPU: hours) of a run's first n epochs, at the median rate of all, for
    other work on the machine slows some of them. Zeros where the run left no log.csv."""
    if not (folder / "log.csv").exists():
        return 0, 0
    epochs = list(csv.DictReader(open(folder / "log.csv")))
    images = sum(float(e["seconds"]) * float(e["images/s"]) for e in epochs[:n])
    hours = images / np.median([float(e["images/s"]) for e in epochs]) / 3600
    machine = result.get("trained", {}).get("on", result["device"])  # "on" is not in earlier versions' files
    cores = re.findall(r"^(\d+) x |\((\d+) threads\)", machine)  # processes, threads of each
    return round(images), hours * math.prod(int(a or b) for a, b in cores)


def curve(out):
    """FID at the stages of out/curve-<script>: one row each, and log-log against images seen and core-hours.
    Also how much of the FID above that of real cells a doubling of the training leaves, estimated from the
    last stage and the last one with at most half its images."""
    rows, left, measured = [], {}, "FID"
    for script in SCRIPTS:
        folder = out / f"curve-{script.NAME}"
        stages = sorted(folder.glob("fid-*.json"), key=lambda f: int(f.stem[4:]))
        for file in stages:
            result, n = json.loads(file.read_text()), int(file.stem[4:])
            images, hours = effort(folder, result, n)
            measured = f"FID-{result['dims']} of {result['images']:,} samples"
            rows.append({"script": script.NAME, "epochs": n, "fid": result["drawn"]["fid"]["mean"],
                         "floor": result["floor"]["fid"]["mean"] if result["floor"] else 0,
                         "images": images, "core-hours": hours})
            print("  ".join(f"{k} {v:.4g}" if k != "script" else v for k, v in rows[-1].items()))
        if len(stages) > 1:
            mine, b = rows[-len(stages):], rows[-1]
            a = next((r for r in mine[::-1] if r["images"] <= b["images"] / 2), mine[0])
            doublings = np.log2(b["images"] / a["images"])
            left[script.NAME] = ((b["fid"] - b["floor"]) / (a["fid"] - a["floor"])) ** (1 / doublings)
            print(f"twice the time leaves {left[script.NAME]:.0%} of what is above the real cells' FID")
    result = {"curve": rows, "left after twice the time": left}
    with data.atomic(out / "curve.json") as file:
        file.write(json.dumps(result, indent=1).encode())
    try:
        from matplotlib import pyplot
    except ImportError:
        return print("no picture of it: matplotlib is not installed")
    figure, axes = pyplot.subplots(1, 2, sharey=True, figsize=(8, 3), layout="constrained")
    for axis, unit, label in zip(axes, ("images", "core-hours"), ("images seen", "core-hours"), strict=True):
        for name in dict.fromkeys(row["script"] for row in rows):
            points = [(row[unit], row["fid"]) for row in rows if row["script"] == name]
            axis.loglog(*zip(*points, strict=True), "o-", label=TITLES[name])
        axis.axhline(np.mean([row["floor"] for row in rows]), color="grey", ls="--", label="real")
        axis.set(xlabel=label)
        axis.grid(True, which="both", alpha=0.3)
    axes[0].set(ylabel=measured)
    axes[0].legend()
    with data.atomic(out / "curve.png") as file:
        figure.savefig(file, format="png", dpi=100)
    pyplot.close(figure)


def draw(script, model, n, labels=None, seed=0):
    steps = {"steps": min(50, model.diffusion.T)} if script is ddpm else {}
    return script.sample(model, n, labels if model.classes else None, seed, **steps)


def pictures(out, source, root):
    """cells.png: 32 real cells and 32 of each model. types.png: a line for each class, of five real cells and
    five of each model. denoising.png: the image that the DDPM expects, after ever more of its steps."""
    models = {s: s.load(out / s.NAME / "model.pt") for s in SCRIPTS if (out / s.NAME / "model.pt").is_file()}
    images, labels, names = data.load(source, root)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    cells = {"real": images[:32]} | {TITLES[s.NAME]: draw(s, model, 32) for s, model in models.items()}
    data.save_grid(out / "cells.png", cells, across=16)
    typed = {s: model for s, model in models.items() if model.classes}
    if typed:
        classes, rows = [[*model.classes] for model in typed.values()], {}
        if any(set(one) != set(classes[0]) for one in classes):
            raise data.Error(f"the models in {out} have learned different classes", 1)
        _, labels = trust.labelled(source, out, classes[0], images, labels, names)
        for k, name in enumerate(classes[0]):
            samples = [draw(s, model, 5, one.index(name))
                       for (s, model), one in zip(typed.items(), classes, strict=True)]
            rows[name] = torch.cat([images[labels == k][:5], *samples])
        data.save_grid(out / "types.png", rows, across=5 * (1 + len(typed)))
    if ddpm in models:
        model, rows = models[ddpm], {}
        predict = model.diffusion.predict_x0
        for seed, name in enumerate([*model.classes][:4] or range(4)):
            seen = []
            model.diffusion.predict_x0 = lambda *a, seen=seen: seen.append(predict(*a)) or seen[-1]
            draw(ddpm, model, 1, seed, seed)
            shown = torch.linspace(0, len(seen) - 1, 15).round().long().tolist()
            rows[str(name)] = torch.cat([ddpm.from_model(seen[i]).cpu() for i in shown])
        data.save_grid(out / "denoising.png", rows, across=15)
    print(f"{out}/cells.png, types.png and denoising.png, of {', '.join(TITLES[s.NAME] for s in models)}")


def ship(out):
    """checkpoints/<script>.pt of out/<script>/model.pt, and assets/demo.npz: 2,048 samples of the DDPM."""
    checkpoints = Path(__file__).parents[1] / "checkpoints"
    for s in SCRIPTS:
        model = data.read_torch(out / s.NAME / "model.pt")
        for k, v in model["weights"].items():  # fp16, matrices with bf16's few digits: git packs them smaller
            if v.is_floating_point():
                model["weights"][k] = (v.bfloat16() if v.ndim > 1 else v).half()
        with data.atomic(checkpoints / f"{s.NAME}.pt") as file:
            torch.save(model, file)
    model = ddpm.load()
    labels = data.draw_labels(model.classes, 2048)
    images = ddpm.sample(model, 2048, labels).permute(0, 2, 3, 1).numpy()
    arrays = {"class_names": [*model.classes]}
    for split, a, b in (("train", 0, 1536), ("val", 1536, 1792), ("test", 1792, 2048)):
        arrays[f"{split}_images"] = images[a:b]
        arrays[f"{split}_labels"] = labels[a:b, None].numpy().astype(np.uint8)
    with data.atomic(data.DEMO) as file:
        np.savez_compressed(file, **arrays)
    for path in (*sorted(checkpoints.iterdir()), data.DEMO):
        print(f"{path} {path.stat().st_size / 1e6:.1f} MB")


def main(argv=None):
    p = argparse.ArgumentParser(epilog=__doc__, formatter_class=data.Help, allow_abbrev=False)
    p.error = data.refuse
    p.add_argument("what", choices=("table", "curve", "pictures", "ship"))
    p.add_argument("out", type=Path, help="folder of the runs' folders")
    p.add_argument("names", nargs="*", help="the table of these runs alone")
    p.add_argument("--data", default="bloodmnist", help="the real images of the pictures")
    p.add_argument("--root", help="folder of MedMNIST's files; else $MEDMNIST_ROOT, else ~/.medmnist")
    args = p.parse_args(argv)
    if args.what == "table":
        table(args.out, args.names)
    elif args.what == "curve":
        curve(args.out)
    elif args.what == "pictures":
        pictures(args.out, args.data, args.root)
    else:
        ship(args.out)


if __name__ == "__main__":
    data.command(main)
