"""Do samples help a classifier where real cells of a type are scarce? The whole study: bash bench.sh scarce

    python -m bench.scarce prepare --type basophil --left 50 --out few.npz
    python ddpm.py --data few.npz --split train --classes --augment --balance 1 --unet small \\
        --batch-size 64 --epochs 40 --out gen
    python ddpm.py --sample 4000 --label basophil --out gen
    python -m bench.scarce rows --type basophil --left 50 --part val --repeats 0 500 --counts 0 500 1000 \\
        --samples gen/samples.npz --generator ddpm
    python -m bench.scarce copies --type basophil --left 50 --samples gen/samples.npz --out copies.json
    python -m bench.scarce named --type basophil --left 50 --sets gen/samples.npz --out named.json
    python -m bench.scarce table --part val

prepare leaves 50 basophils in the train part, and the other types whole: all that the generator sees. rows
leaves the same 50, by --type, --left and --choice. It trains one classifier for each combination of
--repeats, --counts and --seeds, on the cells left, their repeats and the samples.
Each result is kept at once, and not computed again. Settings are chosen on the val part: without --repeats
and --counts, rows takes the best. Without --type, nothing is left out, and samples of all types are added.
The other scarcity is a laboratory with few cells of every type:

    python -m bench.scarce move --how mild --left 30 --choice 0 --out mild-30-c0.npz
    python ddpm.py --init pretrained --data mild-30-c0.npz --split train --classes --augment --lr 3e-4 \\
        --muon-lr 0.005 --batch-size 64 --epochs 125 --out lab
    python -m bench.scarce rows --data mild-30-c0.npz --part val --repeats 0 960
    python -m bench.scarce picture --sets mild-30-c0.npz lab/samples.npz --out lab.png
"""
import argparse
import copy
import hashlib
import itertools
import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

import data
import fid
from bench import trust

STEPS = 1500  # of a classifier
SETTING = ("repeats", "samples", "weighted")  # what is chosen on the val part
FEWER = (10, 20, 50)  # held-out cells of the type by which a constant is chosen
MEASURES = ("accuracy", "mean", "by_frequency", "tuned_mean", "average_precision")  # the middle: over types
FIELDS = ("data", "type", "left", "generator", "before", "steps", *SETTING)


def get_args(argv=None):
    p = argparse.ArgumentParser(epilog=__doc__, formatter_class=data.Help, allow_abbrev=False)
    p.error = data.refuse
    add = p.add_argument
    add("what", choices=("prepare", "move", "rows", "copies", "named", "table", "picture"))
    add("--data", default="bloodmnist", help="the real cells")
    add("--root", help="folder of MedMNIST's files; else $MEDMNIST_ROOT, else ~/.medmnist")
    add("--device", type=data.device, default="cpu", help="auto, cpu, cuda, cuda:N or mps")
    add("--type", help="the scarce type, by name or number")
    add("--left", type=data.number(int, 0), help="cells of it that are left; move: of each type")
    add("--choice", type=data.number(int, 0, 2**31), default=0, help="seed that chooses the cells left")
    add("--out", type=Path, help="the file that prepare, move, copies, named or picture writes")
    add("--how", choices=("mild", "strong"), default="mild", help="how far to move")
    add("--samples", help="samples.npz of a generator that has seen the cells left and no others")
    add("--sets", nargs="+", help="for picture and named: sets of images of the same classes")
    add("--dims", type=int, choices=tuple(fid.LAST), default=768, help="features for copies")
    add("--weights", default="fid", help="Inception's: fid (as pytorch-fid), imagenet or a file")
    add("--rows", type=Path, default=Path("out/scarce/rows.json"), help="file of the results")
    add("--part", choices=("val", "test"), default="test", help="part of the data to classify")
    add("--generator", default="", help="name of what made the samples")
    add("--repeats", type=data.number(int, 0), nargs="+", help="copies of the cells left, added in all")
    add("--counts", type=data.number(int, 0), nargs="+", help="samples added")
    add("--weighted", action="store_true", help="weigh the classes alike in the loss")
    add("--before", default="", metavar="DATA", help="set whose train part a classifier learns first")
    add("--steps", type=data.number(int, 2), default=STEPS, help="of a classifier")
    add("--seeds", type=data.number(int, 0, 2**31), nargs="+", default=trust.SEEDS,
        help="one for each classifier of a setting")
    args = p.parse_args(argv)
    needs = {"prepare": ["type", "left", "out"], "move": ["left", "out"], "table": [],
             "picture": ["sets", "out"],
             "copies": ["type", "left", "samples", "out"],
             "named": ["type", "left", "sets", "out"],
             "rows": ["left"] * bool(args.type) + ["generator"] * bool(args.samples)}[args.what]
    if missing := [f"--{k}" for k in needs if getattr(args, k) in (None, "")]:
        p.error(f"{args.what} needs {', '.join(missing)}")
    if args.what == "rows" and args.left is not None and not args.type:
        p.error(f"--left {args.left} needs --type")
    if args.what in ("move", "copies") and not args.left:
        p.error(f"{args.what} --left {args.left}: it can be 1 or more")
    if args.samples and args.counts is None and (args.repeats is not None or args.weighted):
        p.error(f"--samples {args.samples} needs --counts: how many of them to add")
    kind = {"prepare": ".npz", "move": ".npz", "copies": ".json", "named": ".json", "picture": ".png"}
    if args.what in kind:
        if args.out.suffix != kind[args.what] or args.out.exists():
            p.error(f"--out {args.out}: it can be a new {kind[args.what]}")
    writes = args.out if args.what in kind else args.rows
    for source in (args.data, *(args.sets or ())):
        data.check_outside(writes, source)
    if args.what != "table":
        writes.parent.mkdir(parents=True, exist_ok=True)  # what cannot be written fails here, not at the end
    return args


# ---- what the generators learn ----

def find_type(names, text):
    try:
        return data.find_class(dict.fromkeys(names, 1), text)
    except data.Error as error:
        raise data.Error(str(error).replace("label", "--type", 1)) from None


def split(labels, kind, left, choice):
    """Indices of the cells of a type that are left, and of its others, which nothing learns. labels: (N,)."""
    mine = (labels == kind).nonzero()[:, 0]
    if left > len(mine):
        raise data.Error(f"--left {left}: there are {len(mine)} cells of that type")
    mine = mine[torch.randperm(len(mine), generator=torch.Generator().manual_seed(choice))]
    return mine[:left], mine[left:]


def save(path, names, parts):
    """An .npz in MedMNIST's form of {part: (images, labels)}."""
    arrays = {"class_names": names}
    for part, (images, labels) in parts.items():
        arrays[f"{part}_images"] = images.permute(0, 2, 3, 1).numpy()
        arrays[f"{part}_labels"] = labels[:, None].numpy()
    with data.atomic(path) as file:
        np.savez_compressed(file, **arrays)


def prepare(args):
    """A set whose train part has --left cells of the type. 0: for a model that `ddpm.py --init` continues."""
    images, labels, names = data.load(args.data, args.root, "train")
    kind = find_type(names, args.type)
    few, _ = split(labels, kind, args.left, args.choice)
    kept = torch.cat([(labels != kind).nonzero()[:, 0], few])
    parts = {part: data.load(args.data, args.root, part)[:2] for part in ("val", "test")}
    save(args.out, names, {"train": (images[kept], labels[kept])} | parts)


def move(args):
    """A train part of --left cells of each type of the test part, moved. The others of the test part, moved
    alike, are val part or test part: a cell is in the same one of them for every choice. The pretrained model
    must not have seen the test part; of the official BloodMNIST it has, so train your own for --init."""
    images, labels, names = data.load(args.data, args.root, "test")
    fewest, name = min(zip(labels.bincount(minlength=len(names)).tolist(), names, strict=True))
    if fewest < args.left + 2:  # one for val, one for test, at least
        raise data.Error(f"--left {args.left}: the test part of {args.data} has {fewest} {name}")
    order, fixed = (torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
                    for seed in (args.choice, 10**6))
    few = torch.cat([order[labels[order] == k][:args.left] for k in range(len(names))])
    others = fixed[~torch.isin(fixed, few)]
    in_val = torch.isin(others, fixed[:len(fixed) // 2])
    parts = {"train": few, "val": others[in_val], "test": others[~in_val]}
    save(args.out, names, {part: (moved(images[i], args.how), labels[i]) for part, i in parts.items()})


def moved(images, how):
    """Cells uint8 (N, 3, H, W) as another laboratory might have them. mild: hue + 0.06 of the colour circle,
    contrast x 0.8, saturation x 1.3, a Gaussian blur of sigma 0.5 pixels. strong: hue + 0.25, then a mirrored
    brightness, as in dark field: the mean m of a pixel's channels becomes 255 - m; their differences stay."""
    from torchvision.transforms import functional as tf
    if how == "mild":
        x = tf.adjust_hue(images, 0.06)
        x = tf.adjust_contrast(x, 0.8)
        x = tf.adjust_saturation(x, 1.3)
        return tf.gaussian_blur(x, 5, 0.5)
    x = tf.adjust_hue(images, 0.25).float()
    return (x + 255 - 2 * x.mean(1, keepdim=True)).round().clamp(0, 255).to(torch.uint8)


# ---- what the classifiers learn ----

def read_rows(path):
    try:
        found = json.loads(path.read_text()) if path.exists() else []
        known = {*FIELDS, "part", "choice", "seed"}
        if isinstance(found, list) and all(known <= row.keys() for row in found):
            return found
    except (ValueError, TypeError, AttributeError):
        pass
    raise data.Error(f"{path} is damaged, or holds other things than results of rows", 1)


def rows(args):
    if args.samples:
        samples = data.load(args.samples, size=0)
        images, labels, names, held_out, val = real_parts(args, samples[0])
        fake, fake_labels = trust.labelled(args.samples, args.data, names, *samples)
        if Path(args.samples).is_dir():  # which is read class by class
            order = in_turn(fake_labels)
            fake, fake_labels = fake[order], fake_labels[order]
    else:
        images, labels, names, held_out, val = real_parts(args)
        fake, fake_labels = images[:0], labels[:0]
    source = re.fullmatch(r"(.*?)(-c(\d+))?", Path(args.data).stem)  # the files of move: mild-30-c0.npz
    about = {"data": source[1], "type": None, "left": None, "choice": int(source[3]) if source[2] else None}
    kind, kept = None, torch.arange(len(labels))
    few = kept
    if args.type:
        kind = find_type(names, args.type)
        few, _ = split(labels, kind, args.left, args.choice)
        kept = torch.cat([(labels != kind).nonzero()[:, 0], few])
        for part, there in ((args.part, held_out[1]), ("val", val[1])):
            if (there != kind).all():
                raise data.Error(f"{args.data} has no {names[kind]} in its {part} part to classify: more "
                                 "pictures of it are needed", 1)
        about |= {"type": names[kind], "left": args.left, "choice": args.choice}
        fake, fake_labels = fake[fake_labels == kind], fake_labels[fake_labels == kind]

    settings = [dict(zip(SETTING, values, strict=True)) for values in
                itertools.product(args.repeats or [0], args.counts or [0], [args.weighted])]
    if args.repeats is None and args.counts is None and not args.weighted:
        settings = [chosen(read_rows(args.rows), about | {"generator": name, "before": args.before})
                    for name in dict.fromkeys(("", args.generator))]
    if None in settings:
        raise data.Error(f"{args.rows} has no comparable results on val; name --repeats and --counts")
    if (most := max(setting["samples"] for setting in settings)) > len(fake):
        of = f" of {names[kind]}" if args.type else ""
        raise data.Error(f"--counts {most}: there are {len(fake)} samples{of}; see --samples")
    if not len(few) and any(setting["repeats"] for setting in settings):
        raise data.Error("--repeats: no cells are left to repeat")
    if args.before:
        before, its_labels, theirs = data.load(args.before, args.root, "train", images.shape[2])
        if before.shape[1:] != images.shape[1:]:
            raise data.Error(f"--before {args.before} holds images {[*before.shape[1:]]}, "
                             f"{args.data} {[*images.shape[1:]]}")
        before, its_labels = trust.labelled(args.before, args.data, names, before, its_labels, theirs)
    real, kept_before = sha(images, labels, *held_out), 0
    one = {"type": None, "choice": about["choice"]} if source[2] and not args.type else {}
    alike = matching(read_rows(args.rows), {"data": source[1], "part": args.part} | one)
    others = f"{args.rows} has results of other cells or samples under these names; name another --rows"
    if any(row.get("of", [real])[0] != real for row in alike):
        raise data.Error(others)

    for seed in args.seeds:
        first = None  # a classifier that has learned --before
        for setting in settings:
            repeats, count = setting["repeats"], setting["samples"]
            row = about | {"generator": args.generator if count else "", "before": args.before,
                           "steps": args.steps, **setting, "part": args.part, "seed": seed}
            learned = [real] + [sha(fake[:count], fake_labels[:count])] * bool(count)
            if args.before:
                learned.append(sha(before, its_labels))
            if there := matching(read_rows(args.rows), row):
                if there[0].get("of", learned) != learned:
                    raise data.Error(others)
                kept_before += 1
                continue
            if args.before and not first:
                first = trust.classifier(before, its_labels, len(names), STEPS, seed, args.device)
            whole, rest = divmod(repeats, max(1, len(few)))
            again = torch.cat([few.repeat(whole), few[in_turn(labels[few])[:rest]]])
            x = torch.cat([images[kept], images[again], fake[:count]])
            y = torch.cat([labels[kept], labels[again], fake_labels[:count]])
            weight = (1 / y.bincount(minlength=len(names))).to(args.device) if setting["weighted"] else None
            start = copy.deepcopy(first)
            net = trust.classifier(x, y, len(names), args.steps, seed, args.device, weight, start)
            found = trust.classify(net, held_out[0])
            figures = [of(found, held_out[1]) for of in (trust.accuracy, trust.average_precision)]
            present = [names[k] for k in held_out[1].unique()]
            types, ranked = ({name: round(v, 4) for name, v in zip(present, values, strict=True)}
                             for values in figures)
            mean, all_ranked = (round(float(np.mean(values)), 5) for values in figures)
            row |= {"accuracy": types[names[kind]] if args.type else mean, "mean": mean, "types": types,
                    "average_precision": ranked[names[kind]] if args.type else all_ranked,
                    "average_precisions": ranked}
            if args.type and not args.weighted:  # logit adjustment (Menon et al., 2021)
                adjusted = found / y.bincount(minlength=len(names)).clamp(min=1)
                row["by_frequency"] = round(float(np.mean(trust.accuracy(adjusted, held_out[1]))), 5)
            if args.type and args.part == "test":
                row |= tuned(kind, (trust.classify(net, val[0]), val[1]), (found, held_out[1]))
            row["of"] = learned  # not under FIELDS: rows of an earlier version lack it
            lines = [json.dumps(one) for one in (*read_rows(args.rows), row)]  # another process may add some
            with data.atomic(args.rows) as file:
                file.write(("[" + ",\n".join(lines) + "]\n").encode())
            print(lines[-1], flush=True)
    if kept_before:
        print(f"{kept_before} results were in {args.rows} before")


def real_parts(args, samples=None):
    """Images and labels of the train part, names, [images, labels] of --part and of the val part."""
    parts = {part: data.load(args.data, args.root, part) if samples is None else
             trust.real(args.samples, args.data, args.root, part, samples)
             for part in dict.fromkeys(("train", args.part, *["val"] * bool(args.type)))}
    known = parts["train"][1].unique()
    for part, (_, labels, names) in parts.items():
        if new := [names[k] for k in labels.unique() if k not in known]:
            raise data.Error(f"{args.data}: its {part} part has {new[0]}, which its train part has not", 1)
    if args.type and (less := set(parts[args.part][1].tolist()) - set(parts["val"][1].tolist())):
        raise data.Error(f"{args.data}: its val part has no {parts['train'][2][min(less)]}", 1)
    return (*parts["train"], parts[args.part][:2], parts.get("val", parts["train"])[:2])


def in_turn(labels):
    """Indices of labels (N,), one of each class in turn: any first n of them are a fair share of each."""
    rank = torch.zeros_like(labels)
    for k in labels.unique():
        rank[labels == k] = torch.arange((labels == k).sum())
    return rank.argsort(stable=True)


def sha(*tensors):
    """By which a row knows what it is of."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()[:12]


def tuned(kind, val, test):
    """Means over types of a classifier that names a type more readily, or less: to the log-probability of
    `kind` a constant is added, the best on val of 33 from -2 to 6, of equals the nearest to 0. Repeats and
    samples then differ by what they teach, not by how often the type is named. val, test: (probabilities
    (N, K), labels (N,)). Also with fewer cells of the type in val, as a mean over 100 draws."""
    constants = torch.tensor(sorted(np.linspace(-2, 6, 33), key=abs))
    found = []  # for val and test: the sum of the other types' accuracies, and which of its own are right
    for scores, labels in (val, test):
        scores = scores.double().clamp(min=1e-30).log().repeat(len(constants), 1, 1)
        scores[:, :, kind] += constants[:, None]
        right = (scores.argmax(2) == labels).double().numpy()  # (constants, N)
        others = [right[:, labels == k].mean(1) for k in labels.unique() if k != kind]
        found.append((sum(others), right[:, labels == kind]))
    (others, mine), (test_others, test_mine) = found
    means = (test_others + test_mine.mean(1)) / len(test[1].unique())  # of each constant
    generator = np.random.default_rng(0)

    def draw(n):
        return mine[:, generator.permutation(mine.shape[1])[:n]].mean(1)

    fewer = {n: np.mean([means[np.argmax(others + draw(n))] for _ in range(100)])
             for n in FEWER if n <= mine.shape[1]}
    return {"tuned_mean": round(float(means[np.argmax(others + mine.mean(1))]), 5),
            "tuned_with": {str(n): round(float(mean), 5) for n, mean in fewer.items()}}


def matching(rows, wanted):
    return [row for row in rows if wanted.items() <= row.items()]


def tried(rows, about):
    """{setting: {(type, choice, seed): mean over types}} on the val part, with as many cells left, of any
    type; without samples for the generator ""."""
    found = defaultdict(dict)
    wanted = {k: about[k] for k in ("data", "left", "generator", "before")}
    for row in matching(rows, wanted | {"part": "val", "steps": STEPS}):
        found[tuple(row[k] for k in SETTING)][row["type"], row["choice"], row["seed"]] = row["mean"]
    return found


def chosen(rows, about):
    """The setting tried() of the highest mean over types, over the classifiers that all settings have. None
    where there are none. Not that of the highest accuracy on the type: a classifier that takes many others
    for it would have that."""
    found = tried(rows, about)
    if not found or not (shared := set.intersection(*map(set, found.values()))):
        return None
    best = max(found, key=lambda setting: np.mean([found[setting][one] for one in shared]))
    return dict(zip(SETTING, best, strict=True))


def copies(args):
    """How many samples are closer to a cell left, however turned, than the closest 1 % of the type's other
    cells are?"""
    samples = data.load(args.samples, size=0)
    (images, labels, names), *parts = (trust.real(args.samples, args.data, args.root, part, samples[0])
                                       for part in data.SPLITS)
    kind = find_type(names, args.type)
    few, others = split(labels, kind, args.left, args.choice)
    unseen = torch.cat([images[others], *[x[y == kind] for x, y, _ in parts]])
    samples, of = trust.labelled(args.samples, args.data, names, *samples)
    samples = samples[of == kind]
    for cells, where in ((samples, args.samples), (unseen, f"{args.data}, but for those left,")):
        if not len(cells):
            raise data.Error(f"{where} has no {names[kind]}")
    net = fid.network(args.dims, args.weights, args.device)
    seen = trust.turns(images[few])  # as --augment shows them
    sets = (torch.from_numpy(fid.features(x, net)) for x in (samples, seen, unseen))
    result, _, _ = trust.copies(*sets)
    result |= {"type": names[kind], "left": len(few), "choice": args.choice, "samples": len(samples)}
    result |= {"dims": net.dims, "weights": net.weights, "weights_sha256": net.sha256}
    print(json.dumps(result, indent=1))
    with data.atomic(args.out) as file:
        file.write(json.dumps(result, indent=1).encode())


def named(args):
    """Are samples of their type? Classifiers name them, and the real cells of --part. They have learned all
    real cells but the --left ones, which the generator has learned: a copy of one is not named right for
    that. A generator that has not learned a type makes others under its name."""
    images, labels, names = data.load(args.data, args.root, "train")
    kind = find_type(names, args.type)
    few, _ = split(labels, kind, args.left, args.choice)
    kept = ~torch.isin(torch.arange(len(labels)), few)
    sets = {}
    for source in (args.data, *args.sets):
        real = source == args.data
        x, y, theirs = data.load(source, args.root, args.part if real else "all")
        if x.shape[1:] != images.shape[1:]:
            raise data.Error(f"{source} holds images {[*x.shape[1:]]}, {args.data} {[*images.shape[1:]]}")
        x, y = trust.labelled(source, args.data, names, x, y, theirs)
        if not (y == kind).any():
            raise data.Error(f"{source} has no {names[kind]}{f' in its {args.part} part' * real}")
        sets["real cells" if real else source] = x[y == kind]
    shares = defaultdict(list)
    for seed in args.seeds:
        net = trust.classifier(images[kept], labels[kept], len(names), args.steps, seed, args.device)
        for name, x in sets.items():
            shares[name].append(trust.classify(net, x).argmax(1).bincount(minlength=len(names)) / len(x))
    result = {}
    for name, x in sets.items():
        every = torch.stack(shares[name]).double()  # (seeds, types)
        all_types = dict(zip(names, [round(v, 4) for v in every.mean(0).tolist()], strict=True))
        right = fid.summary(every[:, kind].tolist())
        result[name] = {"images": len(x), "named right": right, "named": all_types}
        print(f"{name}: {right['text']} of {len(x)} are named {names[kind]}", flush=True)
    with data.atomic(args.out) as file:
        about = {"type": names[kind], "left": args.left, "choice": args.choice, "part": args.part}
        file.write(json.dumps(result | about, indent=1).encode())


# ---- what came out ----

def table(args):
    """One line per setting: mean over networks, ± over choices of the cells, or, of one choice, over
    networks. In bold the best of several on the val part. In brackets the gain over the best without samples,
    of the same choices and networks. First of a scarce type; then its means over types once more, with
    constants added to the log-probabilities: by the frequencies of all types, or for the scarce one by some
    held-out cells, see tuned(); then of sets where all types are scarce. Also writes <part>.md and
    <part>.png."""
    every = read_rows(args.rows)
    rows = matching(every, {"part": args.part})
    if not rows:
        raise data.Error(f"no results on the {args.part} part in {args.rows}; see --rows, --part", 1)
    one = len({row["choice"] for row in rows}) == 1
    rows = [row | {"draw": row["seed" if one else "choice"]} for row in rows]
    settings = {tuple(row[k] for k in FIELDS) for row in rows}
    lines, of_all_cells, with_constant, of_all_types, curves = [], [], [], [], defaultdict(list)
    for setting in sorted(settings, key=lambda setting: [str(value).zfill(6) for value in setting]):
        g = dict(zip(FIELDS, setting, strict=True))
        kind = (g["type"] or g["data"]).split("(")[0]
        found, best = matching(rows, g), chosen(every, g)
        none = without_samples(every, rows, g) if g["samples"] else []
        steps = f", {g['steps']:,} steps" if g["steps"] != STEPS else ""
        if high := all_cells(rows, g):
            values = " | ".join(spread(high, of) for of in MEASURES)
            of_all_cells.append(
                f"| {kind}, all | real cells{steps}; ± over networks | {values} | 1 x {len(high)} |")
        cells = f"{kind}, {g['left']} left" if g["type"] else f"{kind}, all"
        parts = {"{before} first": g["before"], "real cells": True, "{repeats:,} repeats": g["repeats"],
                 "weighted loss": g["weighted"], "{samples:,} samples of {generator}": g["samples"]}
        learned = ", ".join(part.format(**g) for part, there in parts.items() if there) + steps
        if not steps and best and len(tried(every, g)) > 1 and all(g[k] == v for k, v in best.items()):
            learned = f"**{learned}**"
        title = f"{cells} | {learned}"
        if g["type"]:
            lines.append(line(title, found, none, MEASURES))
        else:
            of_all_types.append(line(title, found, none, ("mean", "average_precision")))
        known, none_known = ([row | {f"with {n}": v for n, v in row["tuned_with"].items()}
                              for row in part if "tuned_with" in row] for part in (found, none))
        if known:
            ways = ("mean", "by_frequency", *(f"with {n}" for n in FEWER), "tuned_mean")
            with_constant.append(line(title, known, none_known, ways))
        alike = best and (g["repeats"], g["weighted"]) == (best["repeats"], best["weighted"])
        if g["type"] and g["samples"] and alike and not steps:
            curve = curves[f"{cells}, {g['repeats']:,} repeats, {g['generator']}"]
            without = matching(rows, g | {"generator": "", "samples": 0})
            curve += [(0, without)] * bool(without and not curve) + [(g["samples"], found)]
    lines += dict.fromkeys(of_all_cells)
    by_cells = [f"by {n} cells" for n in FEWER]
    tables = ((["accuracy", "mean over types", "corrected", "tuned", "average precision"], lines),
              (["no constant", "corrected", *by_cells, "by the whole val part"], with_constant),
              (["mean over types", "average precision"], of_all_types))
    text = "\n".join(under(*one) for one in tables if one[1])
    with data.atomic(args.rows.with_name(f"{args.part}.md")) as file:
        file.write(text.encode())
    print(text, end="")
    if one:
        print("\n± is over networks, since there is one choice of the cells")
    choices = {k: min(len({row["choice"] for row in found}) for _, found in v) for k, v in curves.items()}
    most = max(choices.values(), default=0)  # what was tried with fewer is left out of the picture
    draw(args.rows.with_name(f"{args.part}.png"), {k: v for k, v in curves.items()
                                                   if len(v) > 2 and choices[k] == most})


def line(title, found, none, measures):
    """A line of a table: the measures of the rows `found`, with their gains over the rows `none`."""
    values = " | ".join(spread(found, of) + gain(found, none, of) for of in measures)
    choices = len({row["choice"] for row in found})
    return f"| {title} | {values} | {choices} x {len(found) / choices:g} |"


def under(titles, lines):
    """The lines of a table under their titles."""
    titles = ["cells", "learned from", *titles, "choices x networks"]
    return "\n".join([f"| {' | '.join(titles)} |", "|---" * len(titles) + "|", *lines]) + "\n"


def without_samples(every, rows, g):
    """The rows of the best setting without samples; all else is alike."""
    real = g | {"generator": "", "samples": 0}
    best = chosen(every, real)
    return matching(rows, real | (best or {}))


def all_cells(rows, g):
    """Rows of those that have learned all real cells; their accuracy and average precision are those on the
    type, and each network counts as a choice. Empty for no type."""
    real = {"data": g["data"], "type": None, "left": None, "generator": "", "before": "", "steps": g["steps"]}
    found = matching(rows, real | {"repeats": 0, "samples": 0, "weighted": False}) if g["type"] else []
    return [row | {"accuracy": row["types"][g["type"]], "choice": row["seed"], "draw": row["seed"],
                   "average_precision": row.get("average_precisions", {}).get(g["type"])} for row in found]


def by_choice(rows, of):
    """[mean over networks, for each choice of the cells, or each network]; of rows that have the measure."""
    choices = defaultdict(list)
    for row in rows:
        if row.get(of) is not None:  # rows of an earlier version have no average precision
            choices[row["draw"]].append(row[of])
    return [float(np.mean(values)) for values in choices.values()]


def spread(rows, of):
    return fid.summary(values)["text"] if (values := by_choice(rows, of)) else ""


def gain(rows, none, of):
    """Of rows over `none`, by the choices and networks that both have."""
    theirs = {(row["choice"], row["seed"]): row.get(of) for row in none}
    pairs = [row | {of: row[of] - theirs[row["choice"], row["seed"]]} for row in rows
             if row.get(of) is not None and theirs.get((row["choice"], row["seed"])) is not None]
    if not pairs:
        return ""
    found = fid.summary(by_choice(pairs, of))
    return f" ({found['mean']:+.3f}" + (f" ± {found['std']:.2g})" if found["std"] is not None else ")")


def draw(path, curves):
    """Measures against the number of samples added. curves: {title: [(samples, rows), ..]}."""
    try:
        from matplotlib import pyplot
    except ImportError:
        return print("no picture of it: matplotlib is not installed")
    shown = {"accuracy": "accuracy on the type", "mean": "mean over types",
             "average_precision": "average precision of the type"}
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 4), layout="constrained")
    for axis, (of, label) in zip(axes, shown.items(), strict=True):
        for title, points in curves.items():
            points = [(x, fid.summary(by_choice(rows, of))) for x, rows in points if by_choice(rows, of)]
            axis.errorbar([x for x, _ in points], [y["mean"] for _, y in points],
                          [y["std"] or 0 for _, y in points], fmt="o-", capsize=3, label=title)
        axis.set(xlabel="samples added", ylabel=label)
        axis.grid(True, alpha=0.3)
    if curves:
        axes[0].legend(fontsize="small")
    with data.atomic(path) as file:
        figure.savefig(file, format="png", dpi=100)
    pyplot.close(figure)


def picture(args):
    """Two images of each class in a line for each of --sets."""
    lines = {}
    for source in map(Path, args.sets):
        images, labels, names = data.load(source)
        title = source.parent.name if source.stem == "samples" else source.stem
        lines[title] = torch.cat([images[labels == k][:2] for k in range(len(names))])
    data.save_grid(args.out, lines, across=max(map(len, lines.values())))


def main(argv=None):
    args = get_args(argv)
    {"prepare": prepare, "move": move, "rows": rows, "copies": copies, "named": named,
     "table": table, "picture": picture}[args.what](args)


if __name__ == "__main__":
    data.command(main)
