"""Tables, pictures and what is shipped, from the folders of finished runs.

    python -m bench.report table out [cvae dcgan ddpm]    the table of their fid.json, also in out/results.md
    python -m bench.report curve out                      FID against images seen and core-hours, curve.png
    python -m bench.report pictures out                   cells.png, types.png and denoising.png
    python -m bench.report ship out                       checkpoints/ in fp16, assets/demo.npz

The pictures and what is shipped are of out/<script>/model.pt.
"""

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import cvae
import data
import dcgan
import ddpm
import fid

SCRIPTS = (cvae, dcgan, ddpm)


def table(out, names):
    """A row a run: the size of what draws, what its training took (of log.csv, if it is there) and the means
    of its draws; the trainings <run>-seed100, -seed200 .. of RETRAIN=1 are one row."""
    groups = {}
    for file in sorted(out.glob("*/fid.json")):
        groups.setdefault(file.parent.name.split("-seed")[0], []).append(file)
    head = ("| run | parameters, M | epochs | images seen, M | core-hours | FID | KID | precision | recall | "
            "images | features | ± is the spread of | cells/s | on |")
    lines = [head, "|---" * 14 + "|"]
    for name, files in groups.items():
        if names and name not in names:
            continue
        results = [json.loads(file.read_text()) for file in files]
        rows, one = [row for r in results for row in r["runs"]], results[0]
        cells = [fid.summary([row[k] for row in rows])["text"] for k in fid.MEASURES]
        of = f"{len(results)} trainings" if len(results) > 1 else "sampling, one training"
        images, hours = effort(files[0].parent, one)
        took = f"{images / 1e6:.3g} | {hours:.2g}" if images else " | "
        size = f"{one['parameters'] / 1e6:.2g}" if "parameters" in one else ""  # an earlier version's file
        rate = one["images"] / np.mean([row["sampling_seconds"] for row in rows])
        lines.append(
            f"| {name} | {size} | {one['trained']['epochs']} | {took} | "
            f"**{cells[0]}** | {' | '.join(cells[1:])} | {len(rows)} x {one['images']:,} | "
            f"{one['dims']}, {one['weights']} | {of} | {rate:,.4g} | {one['device']} |"
        )
        if one["floor"]:
            floor = " | ".join(
                fid.summary([r["floor"][k]["mean"] for r in results])["text"] for k in fid.MEASURES
            )
            real = f"real, {one['images']:,} against {one['others']:,}"
            lines.append(f"| {real} | | | | | {floor} | | | | | |")
    text = "\n".join(lines if groups else ["nothing is measured yet"]) + "\n"
    data.save(out / "results.md", lambda file: file.write(text.encode()))
    print(text, end="")


def effort(folder, result, n=None):
    """Images seen and core-hours (a GPU's: hours) of a run's first n epochs, at the median rate of all: other
    work on the machine slows some of them. Zeros where the run left no log.csv."""
    if not (folder / "log.csv").exists():
        return 0, 0
    epochs = list(csv.DictReader(open(folder / "log.csv")))
    images = sum(float(e["seconds"]) * float(e["images/s"]) for e in epochs[:n])
    hours = images / np.median([float(e["images/s"]) for e in epochs]) / 3600
    cores = re.findall(r"^(\d+) x |\((\d+) threads\)", result["device"])  # processes, threads of each
    return round(images), hours * math.prod(int(a or b) for a, b in cores)


def curve(out):
    """FID at the stages of out/curve-<script>: a row each, and log-log against images seen and core-hours.
    What is left above the FID of real cells after twice the time, as from the last stage of at most half the
    images to the last, allows an extrapolation."""
    rows, left = [], {}
    for s in SCRIPTS:
        folder = out / f"curve-{s.NAME}"
        stages = sorted(folder.glob("fid-*.json"), key=lambda f: int(f.stem[4:]))
        for file in stages:
            result, n = json.loads(file.read_text()), int(file.stem[4:])
            images, hours = effort(folder, result, n)
            rows.append({"script": s.NAME, "epochs": n, "fid": result["drawn"]["fid"]["mean"],
                         "floor": result["floor"]["fid"]["mean"] if result["floor"] else 0,
                         "images": images, "core-hours": hours})
            print("  ".join(f"{k} {v:.4g}" if k != "script" else v for k, v in rows[-1].items()))
        if len(stages) > 1:
            mine, b = rows[-len(stages):], rows[-1]
            a = next((r for r in mine[::-1] if r["images"] <= b["images"] / 2), mine[0])
            power = np.log2(b["images"] / a["images"])
            left[s.NAME] = ((b["fid"] - b["floor"]) / (a["fid"] - a["floor"])) ** (1 / power)
            print(f"twice the time leaves {left[s.NAME]:.0%} of what is above the real cells' FID")
    result = {"curve": rows, "left after twice the time": left}
    data.save(out / "curve.json", lambda file: file.write(json.dumps(result, indent=1).encode()))
    try:
        from matplotlib import pyplot
    except ImportError:
        return print("no picture of it: matplotlib is not installed")
    figure, axes = pyplot.subplots(1, 2, sharey=True, figsize=(8, 3), layout="constrained")
    for axis, of, unit in zip(axes, ("images", "core-hours"), ("images seen", "core-hours"), strict=True):
        for name in dict.fromkeys(row["script"] for row in rows):
            points = [(row[of], row["fid"]) for row in rows if row["script"] == name]
            axis.loglog(*zip(*points, strict=True), "o-", label=name.upper())
        axis.axhline(np.mean([row["floor"] for row in rows]), color="grey", ls="--", label="real cells")
        axis.set(xlabel=unit)
        axis.grid(True, which="both", alpha=0.3)
    axes[0].set(ylabel="FID")
    axes[0].legend()
    data.save(out / "curve.png", lambda file: figure.savefig(file, format="png", dpi=100))
    pyplot.close(figure)


def sheet(path, rows, across, scale=2, margin=60):
    """A picture of rows {title: uint8 images (N, C, H, W)}, `across` of them in a line."""
    side = scale * next(iter(rows.values())).shape[2] + 2
    lines = {title: -(-len(cells) // across) for title, cells in rows.items()}
    picture = Image.new("RGB", (margin + across * side, sum(n * side + 6 for n in lines.values())), "white")
    top = 0
    for title, cells in rows.items():
        ImageDraw.Draw(picture).text((4, top + lines[title] * side // 2 - 6), title[:8], fill="black")
        for i, cell in enumerate(cells.permute(0, 2, 3, 1).numpy()):
            cell = Image.fromarray(cell.squeeze()).resize((side - 2, side - 2), Image.Resampling.NEAREST)
            picture.paste(cell, (margin + i % across * side, top + i // across * side))
        top += lines[title] * side + 6
    data.save(path, lambda file: picture.save(file, "PNG"))
    print(path)


def draw(script, model, n, labels=None, seed=0):
    steps = {"steps": min(50, model.diffusion.T)} if script is ddpm else {}
    return script.sample(model, n, labels if model.classes else None, seed, **steps)


def pictures(out, source, root):
    models = {s: s.load(out / s.NAME / "model.pt") for s in SCRIPTS if (out / s.NAME / "model.pt").is_file()}
    images, labels = data.load(source, root)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    cells = {"real": images[order[:32]]} | {s.NAME: draw(s, m, 32) for s, m in models.items()}
    sheet(out / "cells.png", cells, 16)
    typed = {s: m for s, m in models.items() if m.classes}
    if typed:
        rows = {}
        for k, name in enumerate(next(iter(typed.values())).classes):
            drawn = [draw(s, m, 5, torch.full((5,), k)) for s, m in typed.items()]
            rows[name] = torch.cat([images[order][labels[order] == k][:5], *drawn])
        sheet(out / "types.png", rows, 5 * (1 + len(typed)))
    if ddpm in models:
        strips = {}
        for seed in range(4):  # the image that the network sees in the noise, after ever more of the steps
            model, seen = models[ddpm], []
            predict = model.diffusion.predict
            model.diffusion.predict = lambda *a, p=predict, seen=seen: seen.append(p(*a)) or seen[-1]
            draw(ddpm, model, 1, torch.tensor([seed]), seed)
            model.diffusion.predict = predict
            shown = torch.linspace(0, len(seen) - 1, 15).round().long().tolist()
            strips[str(seed)] = torch.cat([ddpm.from_model(seen[i]) for i in shown])
        sheet(out / "denoising.png", strips, 15, margin=16)


def ship(out):
    checkpoints = Path(__file__).parents[1] / "checkpoints"
    for s in SCRIPTS:
        model = data.read_torch(out / s.NAME / "model.pt")
        for k, v in model["weights"].items():  # matrices to the digits of bf16: every clone is smaller
            if v.is_floating_point():
                model["weights"][k] = (v.bfloat16() if v.ndim > 1 else v).half()
        data.save(checkpoints / f"{s.NAME}.pt", lambda file, model=model: torch.save(model, file))
    model = ddpm.load()
    labels = data.draw_labels(model.classes, 2048, None, 0)
    images = ddpm.sample(model, 2048, labels).permute(0, 2, 3, 1).numpy()
    arrays = {"class_names": [*model.classes]}
    for split, a, b in (("train", 0, 1536), ("val", 1536, 1792), ("test", 1792, 2048)):
        arrays |= {
            f"{split}_images": images[a:b],
            f"{split}_labels": labels[a:b, None].numpy().astype(np.uint8),
        }
    data.save(data.DEMO, lambda file: np.savez_compressed(file, **arrays))
    for path in (*sorted(checkpoints.iterdir()), data.DEMO):
        print(f"{path} {path.stat().st_size / 1e6:.1f} MB")


def main(argv=None):
    p = data.Parser(__doc__)
    p.add_argument("what", choices=("table", "curve", "pictures", "ship"))
    p.add_argument("out", type=Path, help="folder of the runs' folders")
    p.add_argument("names", nargs="*", help="the table of these runs alone")
    p.add_argument("--data", default="bloodmnist", help="the real images of the pictures")
    data.common(p.add_argument, "root")
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
