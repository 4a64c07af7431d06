"""Can samples be trusted, and are they of use? Every answer stands beside the same for held-out real images.

    python -m bench.trust floors bloodmnist                   what would a perfect generator score?
    python -m bench.trust neighbours samples.npz bloodmnist   are the samples copies of training images?
    python -m bench.trust cas samples.npz bloodmnist          are they of their classes? what do they teach?

floors and neighbours compare features of Inception. cas trains small classifiers, and needs labels. The real
set needs a train and a test part. Results are printed, and written to <out>/<command>.json.
"""
import argparse
import contextlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import fid

SEEDS = (100, 200, 300, 400, 500)


def get_args(argv=None):
    p = argparse.ArgumentParser(epilog=__doc__, formatter_class=data.Help, allow_abbrev=False)
    p.error = data.refuse
    p.add_argument("what", choices=("floors", "neighbours", "cas"))
    p.add_argument("a", metavar="A", help="the samples: an .npz or a folder; for floors, the real set")
    p.add_argument("b", metavar="B", nargs="?", help="the real set: a MedMNIST name, an .npz or a folder")
    p.add_argument("--root", help="folder of MedMNIST's files; else $MEDMNIST_ROOT, else ~/.medmnist")
    p.add_argument("--device", type=data.device, default="auto", help="auto, cpu, cuda, cuda:N or mps")
    p.add_argument("--dims", type=int, choices=tuple(fid.LAST), default=2048, help="features of Inception")
    p.add_argument("--weights", default="fid", help="Inception's: fid (as pytorch-fid), imagenet or a file")
    p.add_argument("--augment", action="store_true",
                   help="neighbours: the training images in all eight flips and turns, as a model saw them")
    p.add_argument("--images", type=data.number(int, 2), default=10000, help="in a draw of floors")
    p.add_argument("--steps", type=data.number(int, 2), default=1500, help="of the classifiers of cas")
    p.add_argument("--out", type=Path, default=Path("out/trust"), help="folder of the results")
    args = p.parse_args(argv)
    if (args.b is None) != (args.what == "floors"):
        p.error("floors takes one set, neighbours and cas take two: the samples and the real set")
    for source in (args.a, args.b or args.a):
        data.check_outside(args.out, source)
    return args


class Fault(nn.Sequential):
    """Inception as the paper fed it: images in [-1, 1] were taken for ones in [0, 1] and mapped again."""

    def forward(self, x):
        return super().forward(2 * x - 1)


def parts(args, net):
    """{split: (images, features)} of the real set, in the order of data.SPLITS. It may have no val part."""
    images = {split: data.load(args.a, args.root, split)[0] for split in ("train", "test")}
    with contextlib.suppress(data.Error):
        images["val"] = data.load(args.a, args.root, "val")[0]
    return {split: (images[split], torch.from_numpy(fid.kept_features(images[split], net, args.out.parent)))
            for split in data.SPLITS if split in images}


def floors(args, net):
    """FIDs of real images against other real ones, over five seeds; and what the paper's fault gives perfect
    images: real ones in [0, 1] against the same in [-1, 1]."""
    real = parts(args, net)
    images, kept = (torch.cat(both) for both in zip(*real.values(), strict=True))
    train, test, kept = real["train"][1].numpy(), real["test"][1].numpy(), kept.numpy()

    def distance(one, two):
        return fid.frechet_distance(*fid.statistics(one), *fid.statistics(two))

    found = {f"train part ({len(train)}) against test part ({len(test)})": [distance(train, test)]}
    for n in sorted({min(args.images, len(kept) // 2), len(kept) // 2}):
        orders = [np.random.default_rng(seed).permutation(len(kept)) for seed in SEEDS]
        found[f"two disjoint draws of {n}"] = [distance(kept[o[:n]], kept[o[n:2 * n]]) for o in orders]
    n = min(args.images, len(kept))
    drawn = np.random.default_rng(100).choice(len(kept), n, replace=False)
    wrong = fid.features(images[torch.from_numpy(drawn)], Fault(net))
    fault = f"the same {n} images, once in [0, 1] and once in [-1, 1]: the paper's fault"
    found[fault] = [distance(kept[drawn], wrong)]
    return {"floors": {k: fid.summary(v) | {"runs": v} for k, v in found.items()}}


def real(a, b, root, split, samples):
    """data.load() of a part of B, in the size of the samples, from A, where B is a folder. Raises Error where
    they differ in shape."""
    size = samples.shape[2] if Path(b).is_dir() and samples.shape[2] in range(16, 257, 4) else None
    found = data.load(b, root, split, size)
    if samples.shape[1:] != found[0].shape[1:]:
        raise data.Error(f"{a} holds images {[*samples.shape[1:]]}, {b} {[*found[0].shape[1:]]}")
    return found


def neighbours(args, net):
    """How far is each sample from the nearest training image, and how far is each held-out image? Writes the
    eight closest samples and their training images to <out>/neighbours.png."""
    images, _, _ = data.load(args.a, args.root, "all", 0)
    train, test = (real(args.a, args.b, args.root, split, images)[0] for split in ("train", "test"))
    if args.augment:
        train = turns(train)
    sets = (torch.from_numpy(fid.kept_features(x, net, args.out.parent)) for x in (images, train, test))
    result, near, which = copies(*sets)
    closest = near.argsort()[:8]
    rows = {"sample": images[closest], "training": train[which[closest]]}
    data.save_grid(args.out / "neighbours.png", rows)
    seen = {image.numpy().tobytes() for image in train}
    same = sum(image.numpy().tobytes() in seen for image in images)
    return {"images": len(images), **result, "pixel-identical to a training image": same}


def turns(images):
    """The eight flips and quarter turns of square images: (N, C, H, H) -> (8 N, C, H, H)."""
    both = images, images.transpose(2, 3)
    return torch.cat([y for x in both for y in (x, x.flip(2), x.flip(3), x.flip(2, 3))])


def copies(samples, training, held_out):
    """Of features (N, D): a dict of figures; of each sample the distance to the nearest training image (N,),
    and the index of that image (N,)."""
    (near, which), (usual, _) = (torch.cdist(x, training).min(1) for x in (samples, held_out))
    levels = torch.tensor([0.01, 0.1, 0.5])
    share = (near < usual.quantile(levels[0])).float().mean().item()
    distances = {"generated": near, "held-out real": usual}
    distances = {k: v.quantile(levels).tolist() for k, v in distances.items()}
    result = {"distance to the nearest training image at the quantiles 0.01, 0.1, 0.5": distances,
              "share of the generated nearer than 0.99 of the held-out (0.01 if nothing is copied)": share}
    return result, near, which


def classifier(images, labels, classes, steps=1500, seed=0, device="cpu", weight=None, net=None):
    """A small convolutional network that learns images uint8 (N, C, H, W), flipped and turned, with labels
    (N,) below `classes`, in steps of 64 images. weight: of each class in the loss. net: one to go on with."""
    torch.manual_seed(seed)
    if net is None:
        layers = []
        for c_in, c_out in ((images.shape[1], 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out)]
            layers += [nn.MaxPool2d(2), nn.ReLU()]  # as ReLU and then MaxPool, but ReLU of fewer values
        net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * (images.shape[2] // 8) ** 2, classes))
    net = net.to(device).train()
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=0.01, fused=True)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    step = 0
    while step < steps:
        for x, y in data.batches(images, labels, 64, augment=True):
            loss = F.cross_entropy(net(x.to(device).float() / 255), y.to(device), weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
            step += 1
            if step == steps:
                break
    return net.eval()


@torch.inference_mode()
def classify(net, images):
    """Probabilities of the classes, (N, K)."""
    device = next(net.parameters()).device
    return torch.cat([net(x.to(device).float() / 255).softmax(1).cpu() for x in images.split(1000)])


def accuracy(found, labels):
    """Of each class that labels (N,) hold, the share of images whose highest probability is the class's.
    found: (N, K)."""
    named = found.argmax(1)
    return [(named[labels == k] == k).float().mean().item() for k in labels.unique()]


def average_precision(found, labels):
    """Of each class that labels (N,) hold: with all images in the order of its probability, the mean over its
    own of the share of its own among those down to there. No threshold enters. found: (N, K)."""
    values = []
    for k in labels.unique():
        own = (labels == k)[found[:, k].argsort(descending=True)].double()
        share = own.cumsum(0) / torch.arange(1, len(own) + 1)
        values.append(share[own > 0].mean().item())
    return values


def over_seeds(args, names, title, training, *tests):
    """Accuracy of five classifiers on each of `tests`, (images, labels): mean over classes, and each class.
    names: of the classes. training: a function seed -> (images, labels)."""
    runs = []
    for seed in SEEDS:
        net = classifier(*training(seed), len(names), args.steps, seed, args.device)
        runs.append([accuracy(classify(net, images), labels) for images, labels in tests])
        means = ", ".join(f"{np.mean(shares):.3f}" for shares in runs[-1])
        print(f"{title}, seed {seed}: {means}", file=sys.stderr, flush=True)
    found = []
    for (_, labels), shares in zip(tests, zip(*runs, strict=True), strict=True):
        present = [names[k] for k in labels.unique()]
        each = {k: fid.summary(share) for k, share in zip(present, zip(*shares, strict=True), strict=True)}
        found.append({"all": fid.summary([np.mean(run) for run in shares]), "of each class": each})
    return found


def labelled(a, b, names, images, labels, theirs):
    """Images of A, and their labels by the numbers that the class names of B have."""
    for known in (names, data.folder_names(names)):  # the second: of the folder samples/
        if set(theirs) <= set(known):  # numbers may be names, in another order
            return images, torch.tensor([known.index(name) for name in theirs])[labels]
    if theirs == ["0"]:
        raise data.Error(f"{a} holds no labels: was its model trained with --classes?")
    if theirs == [str(k) for k in range(len(theirs))] and len(theirs) <= len(names):
        return images, labels  # classes without names
    other = [name for name in theirs if name not in names]
    raise data.Error(f"{a}: {b} has no class {' or '.join(other)}; it has {', '.join(names)}")


def cas(args):
    """Accuracies, means over the classes. Classifiers that learned B's train part name A (are the samples of
    their classes?) and B's test part. The test part is also named by those that learned A alone, which is the
    classification accuracy score (Ravuri & Vinyals, 2019), and by those that learned as many images of B."""
    samples = data.load(args.a, args.root, "all", 0)
    images, labels, names = real(args.a, args.b, args.root, "train", samples[0])
    test = real(args.a, args.b, args.root, "test", samples[0])[:2]
    if (most := int(test[1].max())) >= len(names):
        raise data.Error(f"{args.b}: its test part has a class {most}, its train part {len(names)} classes")
    samples = labelled(args.a, args.b, names, *samples)
    n = len(samples[0])

    def as_many(seed):
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:n]
        return images[chosen], labels[chosen]

    on_samples, on_real = over_seeds(args, names, "real", lambda seed: (images, labels), samples, test)
    return {"images": n, "of as many real": min(n, len(images)),
            "real name generated": on_samples, "real name held-out": on_real,
            "generated name held-out": over_seeds(args, names, "generated", lambda seed: samples, test)[0],
            "as many real name held-out": over_seeds(args, names, "as many real", as_many, test)[0]}


def main(argv=None):
    args = get_args(argv)
    if args.what == "cas":
        result = cas(args)
    else:
        net = fid.network(args.dims, args.weights, args.device)
        result = {"floors": floors, "neighbours": neighbours}[args.what](args, net)
        result |= {"dims": net.dims, "weights": net.weights, "weights_sha256": net.sha256}
    text = json.dumps(result | {"what": args.what, "a": args.a, "b": args.b}, indent=1, ensure_ascii=False)
    print(text)  # first: it took long, and a folder may be full
    with data.atomic(args.out / f"{args.what}.json") as file:
        file.write(text.encode(errors="backslashreplace"))  # a class may be named by a file that is not UTF-8


if __name__ == "__main__":
    data.command(main)
