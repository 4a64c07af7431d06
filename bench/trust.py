"""Can drawn images be trusted? Measured in Inception's features, beside the same for held-out real images.

    python -m bench.trust floors bloodmnist                   what a perfect generator would score
    python -m bench.trust neighbours samples.npz bloodmnist   does it hand out its training images?
    python -m bench.trust classifier samples.npz bloodmnist   are its images of the types they are said to be?

A real set needs its train and test part, samples.npz labels for the classifier. Results are printed as JSON.
"""

import json
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image

import data
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
    images = fid.check_images(fid.read_images(args.a, args.root))
    real = Real(args, args.b)
    (train, _, near), held_out = real.parts["train"], real.parts["test"][2]
    if images.shape[1:] != train.shape[1:]:
        raise data.UsageError(f"{args.a} holds {[*images.shape[1:]]}, {args.b} {[*train.shape[1:]]}")
    drawn = torch.from_numpy(features(args, images))
    (near, which), (usual, _) = (torch.cdist(x, near).min(1) for x in (drawn, held_out))
    closest = near.argsort()[:8]
    pairs = (
        torch.cat([images[closest], train[which[closest]]]).repeat_interleave(3, 2).repeat_interleave(3, 3)
    )
    grid = torchvision.utils.make_grid(pairs, 8, padding=3, pad_value=255).permute(1, 2, 0).numpy()
    data.save(Path(args.cache) / "neighbours.png", lambda file: Image.fromarray(grid).save(file, "PNG"))
    quantiles = torch.tensor([0.01, 0.1, 0.5])
    return {
        "images": len(images),
        "distance to the nearest training image at the quantiles 0.01, 0.1, 0.5": {
            "generated": near.quantile(quantiles).tolist(),
            "held-out real": usual.quantile(quantiles).tolist(),
        },
        "share of the generated nearer than 0.99 of the held-out (0.01 if nothing is copied)": (
            near < usual.quantile(quantiles[0])
        )
        .float()
        .mean()
        .item(),
        "pixel-identical to a training image": sum(
            bool((train == x).flatten(1).all(1).any()) for x in images
        ),
    }


def classifier(args):
    """A linear classifier (multinomial logistic regression) over the features learns B's train part; its
    accuracy on B's test part says what its accuracy on A's labels can mean."""
    images = fid.check_images(fid.read_images(args.a, args.root))
    try:
        with np.load(args.a, allow_pickle=False) as file:
            labels = file["labels"] if "images" in file else data.load(args.a)[1].numpy()
    except Exception as error:  # a folder, a set without labels
        raise ValueError(f"{args.a} has no labels ({data.one_line(error)}); draw with --classes") from None
    labels = labels.reshape(-1).astype(np.int64)
    if len(labels) != len(images):
        raise ValueError(f"{args.a} holds {len(images)} images, but {len(labels)} labels")
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
    sets = {
        "held-out real": real.parts["test"][1:],
        "generated": (torch.from_numpy(labels), torch.from_numpy(features(args, images))),
    }
    result = {}
    for name, (y, x) in sets.items():
        hit = layer((x - mean) / std).argmax(1) == y
        result[f"accuracy on {name} images"] = {
            "all": hit.float().mean().item(),
            "images": len(y),
            "of each class": [hit[y == c].float().mean().item() for c in range(classes)],
        }
    return result


def main(argv=None):
    p = data.Parser(__doc__)
    p.add_argument("what", choices=("floors", "neighbours", "classifier"))
    p.add_argument("a", metavar="A", help="drawn images; for floors, a real set")
    p.add_argument("b", metavar="B", nargs="?", help="the real set")
    p.add_argument("--dims", type=int, choices=fid.LAST, default=2048, help="Inception's block")
    p.add_argument("--weights", default="fid", help="Inception's weights: fid, imagenet or a file")
    p.add_argument("--device", type=data.device, default="auto", help="auto, cpu, cuda, cuda:N or mps")
    p.add_argument("--root", help="folder of the .npz files; else $MEDMNIST_ROOT, else ~/.medmnist")
    p.add_argument(
        "--images", type=data.number(int, 2), default=10000, metavar="N", help="in a draw of floors"
    )
    p.add_argument("--cache", default="out", metavar="DIR", help="where features are kept")
    args = p.parse_args(argv)
    if (args.b is None) != (args.what == "floors"):
        p.error("floors takes one set, neighbours and classifier take two: the drawn and the real one")
    result = {"floors": floors, "neighbours": neighbours, "classifier": classifier}[args.what](args)
    result |= {
        "a": args.a,
        "b": args.b,
        "dims": args.dims,
        "weights": Path(args.weights).name,
        "weights_sha256": fid.file_hash(args.weights),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    data.command(main)
