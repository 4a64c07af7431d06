"""Can drawn images be trusted, and are they of use? Each answer beside the same for held-out real images.

    python -m bench.trust floors bloodmnist                   what a perfect generator would score
    python -m bench.trust neighbours samples.npz bloodmnist   does it hand out its training images?
    python -m bench.trust classifier samples.npz bloodmnist   are its images of the types they are said to be?
    python -m bench.trust cas samples.npz bloodmnist          what does a network learn from its images alone?
    python -m bench.trust scarce bloodmnist                   do its images help where real ones are few?

A real set needs its train and test part, samples.npz labels for the last two of A and B. The first three
compare Inception's features, the last two train small networks. Results are printed as JSON.
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
import torchvision
from PIL import Image

import data
import ddpm
import fid

SEEDS = (100, 200, 300, 400, 500)


class Real:
    """A data set's parts, {split: (images, labels, features)}; its features are computed once and kept."""

    def __init__(self, args, source):
        parts = {s: data.load(source, args.root, s) for s in data.SPLITS}
        self.images = torch.cat([images for images, _ in parts.values()])
        self.features = torch.from_numpy(features(args, self.images))
        rows = self.features.split([len(images) for images, _ in parts.values()])
        self.parts = {s: (*part, row) for (s, part), row in zip(parts.items(), rows, strict=True)}


def features(args, images):
    return fid.kept_features(images, args.dims, args.weights, args.device, folder=args.cache)


def drawn_images(args):
    """Those of A, which are of one size."""
    images = fid.read_images(args.a, args.root)
    if isinstance(images, list) and len(images) > 1:
        raise data.UsageError(f"{args.a} holds pictures of {len(images)} sizes")
    return images[0] if isinstance(images, list) else images


def labelled(args):
    """Images and labels of A."""
    images = drawn_images(args)
    try:
        with np.load(args.a, allow_pickle=False) as file:
            labels = file["labels"] if "images" in file else data.load(args.a)[1].numpy()
    except Exception as error:  # a folder, a set without labels
        raise ValueError(f"{args.a} has no labels ({data.one_line(error)}); draw with --classes") from None
    if labels.size != len(images):
        raise ValueError(f"{args.a} holds {len(images)} images, but {labels.size} labels")
    return images, torch.from_numpy(labels.reshape(-1).astype(np.int64))


def floors(args):
    """FIDs of real images against other real ones, over five seeds; and what the paper's slip gives perfect
    images: real ones in [0, 1] against the same in [-1, 1]."""
    real = Real(args, args.a)
    kept = real.features.numpy()

    def distance(one, two):
        return fid.frechet_distance(*fid.statistics(one), *fid.statistics(two))

    train, test = (real.parts[s][2].numpy() for s in ("train", "test"))
    found = {f"train part ({len(train)}) against test part ({len(test)})": [distance(train, test)]}
    for n in sorted({min(args.images, len(kept) // 2), len(kept) // 2}):
        orders = [np.random.default_rng(seed).permutation(len(kept)) for seed in SEEDS]
        found[f"two disjoint draws of {n}"] = [distance(kept[o[:n]], kept[o[n : 2 * n]]) for o in orders]
    n = min(args.images, len(kept))
    chosen = np.random.default_rng(100).choice(len(kept), n, replace=False)
    wrong = real.images[torch.from_numpy(chosen)].float() / 127.5 - 1
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
    real = Real(args, args.b)
    (train, _, near), held_out = real.parts["train"], real.parts["test"][2]
    drawn = torch.from_numpy(features(args, images))
    (near, which), (usual, _) = (torch.cdist(x, near).min(1) for x in (drawn, held_out))
    closest = near.argsort()[:8]
    pairs = torch.cat([images[closest], train[which[closest]]])
    pairs = F.interpolate(pairs, scale_factor=3)
    grid = torchvision.utils.make_grid(pairs, 8, padding=3, pad_value=255).permute(1, 2, 0).numpy()
    data.save(Path(args.cache) / "neighbours.png", lambda file: Image.fromarray(grid).save(file, "PNG"))
    quantiles = torch.tensor([0.01, 0.1, 0.5])
    nearer = (near < usual.quantile(quantiles[0])).float().mean().item()
    same = sum(bool((train == x).flatten(1).all(1).any()) for x in images)
    distances = {"generated": near, "held-out real": usual}
    distances = {k: v.quantile(quantiles).tolist() for k, v in distances.items()}
    return {
        "images": len(images),
        "distance to the nearest training image at the quantiles 0.01, 0.1, 0.5": distances,
        "share of the generated nearer than 0.99 of the held-out (0.01 if nothing is copied)": nearer,
        "pixel-identical to a training image": same,
    }


def classifier(args):
    """A linear classifier (multinomial logistic regression) over the features learns B's train part; its
    accuracy on B's test part says what its accuracy on A's labels can mean."""
    images, labels = labelled(args)
    real = Real(args, args.b)
    _, y, x = real.parts["train"]
    mean, std, classes = x.mean(0), x.std(0) + 1e-6, int(y.max()) + 1
    layer = nn.Linear(x.shape[1], classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(layer((x - mean) / std), y) + 1e-3 * layer.weight.pow(2).sum()
        value.backward()
        return value

    optimizer.step(loss)
    drawn = labels, torch.from_numpy(features(args, images))
    result = {}
    for name, (y, x) in {"held-out real": real.parts["test"][1:], "generated": drawn}.items():
        hit = (layer((x - mean) / std).argmax(1) == y).float()
        each = [hit[y == c].mean().item() for c in range(classes)]
        result[f"accuracy on {name} images"] = {
            "all": hit.mean().item(), "images": len(y), "of each class": each}
    return result


def hits(args, training, test, seed):
    """The share of each class of `test` that a small convolutional network names right, which has learned
    `training`, both (images, labels), turned and flipped, in args.steps steps of 64."""
    torch.manual_seed(seed)
    layers, (images, labels), (x, y) = [], training, test
    for a, b in ((images.shape[1], 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
    net = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(int(y.max()) + 1)).to(args.device)
    with torch.no_grad():
        net(images[:2].to(args.device).float())
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=0.01, fused=True)
    rates, step = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, args.steps), 0
    while step < args.steps:
        for a, b in data.batches(images, labels, 64, augment=True):
            if step < args.steps and len(a) > 1:
                loss = F.cross_entropy(net(a.to(args.device).float() / 255), b.to(args.device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rates.step()
            step += 1
    with torch.inference_mode():
        named = [net.eval()(a.to(args.device).float() / 255).argmax(1).cpu() for a in x.split(1000)]
    hit = (torch.cat(named) == y).float()
    return [hit[y == c].mean().item() for c in y.unique()]


def over_seeds(args, name, training, test):
    """The mean over the classes, and each class's share of hits(), of five networks."""
    runs = []
    for seed in SEEDS:
        runs.append(hits(args, training(seed), test, seed))
        print(f"{name}, seed {seed}: {np.mean(runs[-1]):.3f}", file=sys.stderr, flush=True)
    each = [fid.summary(share) for share in zip(*runs, strict=True)]
    return {"all": fid.summary([np.mean(run) for run in runs]), "of each class": each}


def cas(args):
    """Classification accuracy score (Ravuri & Vinyals, 2019): accuracy on B's test part, the mean over its
    classes, of a network that has learned A alone; beside it, one that has learned as many of B's train
    part."""
    drawn, test = labelled(args), data.load(args.b, args.root, "test")
    images, labels = data.load(args.b, args.root, "train")

    def as_many(seed):
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[: len(drawn[0])]
        return images[chosen], labels[chosen]

    learned = {"generated": lambda seed: drawn, "real": as_many}
    return {"images": len(drawn[0])} | {k: over_seeds(args, k, v, test) for k, v in learned.items()}


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
        flags = f"--data {out / 'data.npz'} --split train --classes --unet patches --batch-size 64"
        flags += f" --epochs {args.epochs} --device {args.device} --out {out}"
        resume = " --resume" if (out / "ckpt.pt").exists() else ""
        with contextlib.redirect_stdout(sys.stderr):
            ddpm.main((flags + resume).split())
        drawn = ddpm.sample(ddpm.load(out / "model.pt", args.device), 500, k)
        data.save_grid(out / "drawn.png", drawn)
        again = few[torch.arange(500) % n]
        more = {"repeated": (images[again], labels[again]), "drawn": (drawn, torch.full((500,), k))}
        result[f"{n} left"] = {name: over_seeds(
            args, f"{n} left, {name}",
            lambda _, x=x, y=y, left=left: (torch.cat([images[left], x]), torch.cat([labels[left], y])), test)
            for name, (x, y) in more.items()}
    return {"class": k, "epochs of the DDPM": args.epochs} | result


def main(argv=None):
    p = data.Parser(__doc__)
    commands = {f.__name__: f for f in (floors, neighbours, classifier, cas, scarce)}
    p.add_argument("what", choices=commands)
    p.add_argument("a", metavar="A", help="drawn images; for floors and scarce, a real set")
    p.add_argument("b", metavar="B", nargs="?", help="the real set")
    p.add_argument("--dims", type=int, choices=fid.LAST, default=2048, help="Inception's block")
    p.add_argument("--weights", default="fid", help="Inception's weights: fid, imagenet or a file")
    p.add_argument("--device", type=data.device, default="auto", help="auto, cpu, cuda, cuda:N or mps")
    p.add_argument("--root", help="folder of the .npz files; else $MEDMNIST_ROOT, else ~/.medmnist")
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
