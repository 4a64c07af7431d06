"""Can drawn images be trusted, and are they of use? Each answer beside the same for held-out real images.

    python -m bench.trust floors bloodmnist                   what a perfect generator would score
    python -m bench.trust neighbours samples.npz bloodmnist   does it hand out its training images?
    python -m bench.trust cas samples.npz bloodmnist          are they of their types, and what do they teach?
    python -m bench.trust scarce bloodmnist                   do its images help where real ones are few?

A real set needs its train and test part, samples.npz labels for cas. floors and neighbours compare features
of Inception, cas and scarce train small networks. Results are printed as JSON.
"""

import contextlib
import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import ddpm
import fid

SEEDS = (100, 200, 300, 400, 500)


def features(args, images):
    return fid.kept_features(images, args.dims, args.weights, args.device, folder=args.cache)


def parts(args, source):
    """{split: (images, features)} of a real set, computed once and kept."""
    images = [data.load(source, args.root, split)[0] for split in data.SPLITS]
    rows = torch.from_numpy(features(args, torch.cat(images))).split([len(x) for x in images])
    return dict(zip(data.SPLITS, zip(images, rows, strict=True), strict=True))


def drawn_images(args):
    """Those of A, which are of one size."""
    images = fid.read_images(args.a, args.root)
    if isinstance(images, list) and len(images) > 1:
        raise data.UsageError(f"{args.a} holds pictures of {len(images)} sizes")
    return images[0] if isinstance(images, list) else images


def labelled(args):
    """Images and labels of A: samples.npz, a data set's name, a folder of a subfolder a class."""
    if Path(args.a).suffix == ".npz" and Path(args.a).is_file():
        images = drawn_images(args)
        with np.load(args.a, allow_pickle=False) as file:
            if "images" in file:
                labels = file["labels"].reshape(-1) if "labels" in file else ()
                if len(labels) != len(images):
                    raise ValueError(f"{args.a}: {len(images)} images, {len(labels)} labels; see --classes")
                return images, torch.from_numpy(labels.astype(np.int64))
    return data.load(args.a, args.root)


def floors(args):
    """FIDs of real images against other real ones, over five seeds; and what the paper's slip gives perfect
    images: real ones in [0, 1] against the same in [-1, 1]."""
    real = parts(args, args.a)
    images, kept = (torch.cat(both) for both in zip(*real.values(), strict=True))
    kept = kept.numpy()

    def distance(one, two):
        return fid.frechet_distance(*fid.statistics(one), *fid.statistics(two))

    train, test = (real[s][1].numpy() for s in ("train", "test"))
    found = {f"train part ({len(train)}) against test part ({len(test)})": [distance(train, test)]}
    for n in sorted({min(args.images, len(kept) // 2), len(kept) // 2}):
        orders = [np.random.default_rng(seed).permutation(len(kept)) for seed in SEEDS]
        found[f"two disjoint draws of {n}"] = [distance(kept[o[:n]], kept[o[n : 2 * n]]) for o in orders]
    n = min(args.images, len(kept))
    chosen = np.random.default_rng(100).choice(len(kept), n, replace=False)
    wrong = images[torch.from_numpy(chosen)].float() / 127.5 - 1
    with mock.patch.object(fid, "check_images", torch.as_tensor):  # which refuses that range, everywhere else
        wrong = fid.features(wrong, args.dims, args.weights, args.device)
    fault = f"the same {n} images, once in [0, 1] and once in [-1, 1]: the paper's fault"
    found[fault] = [distance(kept[chosen], wrong)]
    return {"floors": {k: fid.summary(v) | {"runs": v} for k, v in found.items()}}


def neighbours(args):
    """The distance, in features, from each image of A to the nearest of B's train part, beside the same for
    B's test part. Writes the eight closest pairs to <cache>/neighbours.png."""
    images, shape = drawn_images(args), data.load(args.b, args.root, "train")[0].shape
    if images.shape[1:] != shape[1:]:
        raise data.UsageError(f"{args.a} holds {[*images.shape[1:]]}, {args.b} {[*shape[1:]]}")
    real = parts(args, args.b)
    (train, near), (_, held_out) = real["train"], real["test"]
    drawn = torch.from_numpy(features(args, images))
    (near, which), (usual, _) = (torch.cdist(x, near).min(1) for x in (drawn, held_out))
    closest = near.argsort()[:8]
    data.save_grid(Path(args.cache) / "neighbours.png", torch.cat([images[closest], train[which[closest]]]))
    quantiles = torch.tensor([0.01, 0.1, 0.5])
    nearer = (near < usual.quantile(quantiles[0])).float().mean().item()
    same = sum(bool((train == x).flatten(1).all(1).any()) for x in images)
    distances = {"generated": near, "held-out real": usual}
    distances = {k: v.quantile(quantiles).tolist() for k, v in distances.items()}
    return {"images": len(images),
            "distance to the nearest training image at the quantiles 0.01, 0.1, 0.5": distances,
            "share of the generated nearer than 0.99 of the held-out (0.01 if nothing is copied)": nearer,
            "pixel-identical to a training image": same}


def hits(args, training, tests, seed):
    """The shares of each class of each of `tests` that a small convolutional network names right, which has
    learned `training`, all (images, labels), turned and flipped, in args.steps steps of 64."""
    torch.manual_seed(seed)
    layers, (images, labels), step, shares = [], training, 0, []
    for a, b in ((images.shape[1], 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
    net = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(int(labels.max()) + 1)).to(args.device)
    with torch.no_grad():
        net(images[:2].to(args.device).float())
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=0.01, fused=True)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, args.steps)
    while step < args.steps:
        for a, b in data.batches(images, labels, 64, augment=True):
            if step < args.steps and len(a) > 1:
                loss = F.cross_entropy(net(a.to(args.device).float() / 255), b.to(args.device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rates.step()
            step += 1
    for x, y in tests:
        with torch.inference_mode():
            named = [net.eval()(a.to(args.device).float() / 255).argmax(1).cpu() for a in x.split(1000)]
        hit = (torch.cat(named) == y).float()
        shares.append([hit[y == c].mean().item() for c in y.unique()])
    return shares


def over_seeds(args, name, training, *tests):
    """For each test the mean over its classes, and each class's share of hits(), of five networks."""
    runs = []
    for seed in SEEDS:
        runs.append(hits(args, training(seed), tests, seed))
        means = ", ".join(f"{np.mean(shares):.3f}" for shares in runs[-1])
        print(f"{name}, seed {seed}: {means}", file=sys.stderr, flush=True)
    return [{"all": fid.summary([np.mean(run) for run in test]),
             "of each class": [fid.summary(share) for share in zip(*test, strict=True)]}
            for test in zip(*runs, strict=True)]


def cas(args):
    """Accuracies, means over the classes. Of networks that have learned B's train part, on A (are its images
    of their types?) and on B's test part; on the latter, of networks that have learned A alone, which is the
    classification accuracy score (Ravuri & Vinyals, 2019), and of those that have learned as many of B."""
    drawn, test = labelled(args), data.load(args.b, args.root, "test")
    images, labels = data.load(args.b, args.root, "train")

    def as_many(seed):
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[: len(drawn[0])]
        return images[chosen], labels[chosen]

    of_types, held_out = over_seeds(args, "real", lambda seed: (images, labels), drawn, test)
    return {"images": len(drawn[0]), "real name generated": of_types, "real name held-out": held_out,
            "generated name held-out": over_seeds(args, "generated", lambda seed: drawn, test)[0],
            "as many real name held-out": over_seeds(args, "as many real", as_many, test)[0]}


def scarce(args):
    """Of one class of A's train part only n images are left. A network that learns what is left, the n
    repeated to 500 more, beside one that gets 500 drawn ones, from a DDPM that has seen what is left and no
    more."""
    images, labels = data.load(args.a, args.root, "train")
    test, result = data.load(args.a, args.root, "test"), {}
    classes = data.classes(args.a, labels)
    k = data.draw_labels(classes, 1, args.label, 0).item()
    for n in args.left:
        out = Path(args.cache) / f"scarce-{n}"
        mine = (labels == k).nonzero()[:, 0]
        few = mine[torch.randperm(len(mine), generator=torch.Generator().manual_seed(0))[:n]]
        left = torch.cat([(labels != k).nonzero()[:, 0], few])
        arrays = {"class_names": [*classes]}
        for split, (x, y) in (("train", (images[left], labels[left])), ("val", test), ("test", test)):
            x, y = x.permute(0, 2, 3, 1).numpy(), y[:, None].numpy()
            arrays |= {f"{split}_images": x, f"{split}_labels": y}
        data.save(out / "data.npz", lambda file, arrays=arrays: np.savez_compressed(file, **arrays))
        flags = f"--data {out / 'data.npz'} --split train --classes --unet small --batch-size 64"
        flags += f" --epochs {args.epochs} --device {args.device} --out {out}"
        resume = " --resume" if (out / "ckpt.pt").exists() else ""
        with contextlib.redirect_stdout(sys.stderr):
            ddpm.main((flags + resume).split())
        drawn = ddpm.sample(ddpm.load(out / "model.pt", args.device), 500, k)
        data.save_grid(out / "drawn.png", drawn)
        again = few[torch.arange(500) % n]
        more = {"repeated": (images[again], labels[again]), "drawn": (drawn, torch.full((500,), k))}
        found = result[f"{n} left"] = {}
        for name, (x, y) in more.items():
            both = torch.cat([images[left], x]), torch.cat([labels[left], y])
            found[name] = over_seeds(args, f"{n} left, {name}", lambda _, both=both: both, test)[0]
    return {"class": k, "epochs of the DDPM": args.epochs} | result


def main(argv=None):
    p = data.Parser(__doc__)
    commands = {f.__name__: f for f in (floors, neighbours, cas, scarce)}
    p.add_argument("what", choices=commands)
    p.add_argument("a", metavar="A", help="drawn images; for floors and scarce, a real set")
    p.add_argument("b", metavar="B", nargs="?", help="the real set")
    data.common(p.add_argument, "root", "device", "dims", "weights")
    p.add_argument("--images", type=data.number(int, 2), default=10000, help="in a draw of floors")
    p.add_argument("--cache", default="out", metavar="DIR", help="where features and models are kept")
    p.add_argument("--steps", type=data.number(int, 2), default=1500, help="of networks of cas and scarce")
    p.add_argument("--label", default="basophil", help="of scarce: the class that is made so")
    p.add_argument("--left", type=data.number(int, 1), nargs="+", default=[20, 50, 100], help="of scarce: n")
    p.add_argument("--epochs", type=data.number(int, 1), default=4, help="of scarce: the DDPM's training")
    args = p.parse_args(argv)
    if (args.b is None) != (args.what in ("floors", "scarce")):
        p.error("floors and scarce take one set, the others two: the drawn and the real one")
    result = commands[args.what](args) | {"what": args.what, "a": args.a, "b": args.b}
    if args.what not in ("cas", "scarce"):
        result |= {"dims": args.dims, "weights": Path(args.weights).name}
        result |= {"weights_sha256": fid.file_hash(args.weights)}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    data.command(main)
