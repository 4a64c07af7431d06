"""FID (Fréchet Inception Distance; Heusel et al., 2017), KID, precision and recall of two sets of images.

Inception v3 turns an image into a vector of features, as in pytorch-fid. The FID is the distance between the
Gaussians that fit the vectors of each set. Images have one range: uint8, or floats in [0, 1].

    python fid.py samples.npz bloodmnist                   generated, real: names, .npz files or folders
    python fid.py samples cells --size 28 --split test     folders, read as training reads them
    python fid.py A B --dims 768 --weights imagenet        FID-768, very likely the scale of README.md
    python fid.py A --save-stats A.npz                     mean and covariance alone, for pytorch-fid too
"""
import argparse
import contextlib
import functools
import hashlib
import json
import platform
import sys
import time
import warnings
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.linalg import sqrtm
from torch.nn.utils.fusion import fuse_conv_bn_eval

import data

# the last block for so many features, and the last that has weights
LAST = {64: "maxpool1", 192: "maxpool2", 768: "Mixed_6e", 2048: "Mixed_7c"}
WEIGHTED = {64: "Conv2d_2b_3x3", 192: "Conv2d_4a_3x3", 768: "Mixed_6e", 2048: "Mixed_7c"}
URLS = {"fid": "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
               "pt_inception-2015-12-05-6726825d.pth",
        "imagenet": "https://download.pytorch.org/models/inception_v3_google-0cc3c7bd.pth"}
MEASURES = ("fid", "kid", "precision", "recall")
# (where, name, value) of the switches that keep a convolution in full fp32
FP32 = [(torch.backends.cudnn, "allow_tf32", False)]
if hasattr(torch.backends.cudnn, "conv"):  # since torch 2.9, where the old switch can raise
    FP32 = [(part.conv, "fp32_precision", "ieee") for part in (torch.backends.cudnn, torch.backends.mkldnn)]


# ---- the measures, of features (N, D) ----

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), Dowson & Landau 1982; never below 0.
    mu: (D,), sigma: (D, D). Raises Error for other shapes, NaN and infinity."""
    mu1, mu2 = (x.astype(np.float64) for x in np.atleast_1d(mu1, mu2))
    sigma1, sigma2 = (x.astype(np.float64) for x in np.atleast_2d(sigma1, sigma2))
    shapes = [x.shape for x in (mu1, sigma1, mu2, sigma2)]
    if shapes != [(len(mu1),), (len(mu1), len(mu1))] * 2:
        raise data.Error(f"means and covariances of shapes {shapes} do not go together")
    if not all(np.isfinite(x).all() for x in (mu1, sigma1, mu2, sigma2)):
        raise data.Error("a mean or a covariance holds NaN or infinity")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the next lines deal with a singular product
        covmean = sqrtm(sigma1 @ sigma2)
        if not np.isfinite(covmean).all():
            eps = 1e-6 * np.eye(len(mu1))
            covmean = sqrtm((sigma1 + eps) @ (sigma2 + eps))
    if np.iscomplexobj(covmean) and not np.allclose(np.diagonal(covmean).imag, 0, atol=1e-3):
        raise data.Error("(sigma1 sigma2)^(1/2) is not real")
    return max(0.0, float(np.sum((mu1 - mu2) ** 2) + np.trace(sigma1 + sigma2) - 2 * np.trace(covmean.real)))


def statistics(x):
    """features (N, D), N of 2 or more -> mean (D,) and covariance (D, D), float64."""
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise data.Error(f"statistics need two rows of features or more, these are {x.shape}")
    if len(x) <= x.shape[1]:
        warn(f"{len(x)} images for {x.shape[1]} dimensions: the covariance is singular and the FID too high; "
             "compare it only with FIDs of as many images")
    return x.mean(0), np.cov(x, rowvar=False).reshape(x.shape[1], -1)


@functools.cache  # once is enough
def warn(text):
    warnings.warn(text, stacklevel=3)


def kernel_distance(a, b, subsets=100, size=1000, seed=0):
    """KID (Bińkowski et al., 2018): mean and standard deviation over subsets of the squared maximum mean
    discrepancy with the kernel (x·y / D + 1)^3; unbiased, so it can be below 0. A subset is at most half of
    the images, so that the subsets differ."""
    most = max(2, min(len(a), len(b)) // 2)
    if most < size:
        warn(f"KID over subsets of {most}, not {size}: half of the images")
    rng, size, values = np.random.default_rng(seed), min(size, most), []
    for _ in range(subsets):
        x, y = (torch.as_tensor(z[rng.choice(len(z), size, replace=False)]).double() for z in (a, b))
        xx, yy, xy = ((p @ q.T / p.shape[1] + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        values.append((within - 2 * xy.mean()).item())
    return float(np.mean(values)), float(np.std(values))


def precision_recall(real, fake, k=3, block=1000):
    """Precision: the share of the fake that lie in the ball around some real point, which reaches to the k-th
    nearest real neighbour of its centre. Recall: the same with real and fake exchanged (Kynkäänniemi et al.,
    2019, who take sets of one size and VGG-16's features). Raises Error for k images or fewer."""
    real, fake = (torch.as_tensor(x).float() for x in (real, fake))
    if min(len(real), len(fake)) <= k:
        raise data.Error(f"precision and recall need more than {k} images: {len(real)}, {len(fake)}")

    def share_within(points, centres):
        radii = [torch.cdist(x, centres).kthvalue(k + 1).values for x in centres.split(block)]  # + 1: itself
        inside = [(torch.cdist(x, centres) <= torch.cat(radii)).any(1) for x in points.split(block)]
        return torch.cat(inside).float().mean().item()
    return share_within(fake, real), share_within(real, fake)


def measures(real, fake):
    """{"fid", "kid", "kid_std", "precision", "recall"} of two sets of features (N, D)."""
    found = (frechet_distance(*statistics(real), *statistics(fake)), *kernel_distance(real, fake),
             *precision_recall(real, fake))
    return dict(zip(("fid", "kid", "kid_std", "precision", "recall"), found, strict=True))


# ---- the network ----

class FIDPool:
    """The pooling of the original FID network, which is TensorFlow's, in torchvision's blocks: averages leave
    out the padding, and the last block, of 2048 channels, takes the maximum, a slip that all have kept."""

    def _forward(self, x):
        pooled = (F.max_pool2d(x, 3, stride=1, padding=1) if x.shape[1] == 2048 else
                  F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False))
        return [*super()._forward(x)[:-1], self.branch_pool(pooled)]


def network(dims=2048, weights="fid", device=None):
    """Inception v3 up to the block of `dims` features: float (B, 3, 299, 299) in [-1, 1] -> (B, dims, h, w).

    weights: "fid" (the usual FID's), "imagenet" (torchvision's) or a file with torchvision's names. BatchNorm
    is folded in. Attributes: dims, weights (a name), sha256 (of the layers in use). Raises Error."""
    from torchvision.models import inception as v3  # here alone: it takes seconds
    state, net = read_weights(weights, dims), nn.Sequential()
    a, c, e = (type("FID", (FIDPool, block), {}) for block in (v3.InceptionA, v3.InceptionC, v3.InceptionE))
    blocks = [v3.BasicConv2d, a, v3.InceptionB, c, v3.InceptionD, e, None]  # None: the auxiliary head
    with torch.device("meta"):  # built without memory, then filled
        whole = v3.Inception3(aux_logits=False, init_weights=False, inception_blocks=blocks)
    for name, layer in whole.named_children():
        net.add_module(name, layer)
        if name == LAST[dims]:
            break
    try:
        missing, _ = net.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        cause = str(error).splitlines()[-1].strip()
        raise data.Error(f"{weights} does not fit Inception v3: {cause}", 1) from None
    if missing := [k for k in missing if "num_batches" not in k]:
        raise data.Error(f"{weights} lacks {missing[0]}, which --dims {dims} needs", 1)
    used = {k: v for k, v in net.float().state_dict().items() if "num_batches" not in k}
    sha = hashlib.sha256(b"".join(k.encode() + used[k].numpy().tobytes() for k in sorted(used)))
    for layer in [*net.eval().modules()]:
        if isinstance(layer, v3.BasicConv2d):
            layer.conv, layer.bn = fuse_conv_bn_eval(layer.conv, layer.bn), nn.Identity()
    net.dims, net.weights, net.sha256 = dims, Path(weights).name, sha.hexdigest()
    return net.requires_grad_(False).to(device or data.device(), memory_format=torch.channels_last)


def read_weights(weights, dims):
    """A state dict with the layers for `dims` features. Downloads "fid" and "imagenet" once. Raises Error."""
    data.choose("dims", dims, LAST)
    place = URLS.get(weights, weights)
    try:  # not data.read_torch, which refuses the old format of pytorch-fid's file
        if weights in URLS:
            state = torch.hub.load_state_dict_from_url(place, None, "cpu", check_hash=True, weights_only=True)
        else:
            state = torch.load(weights, "cpu", weights_only=True)
        there = any(key.startswith(WEIGHTED[dims]) for key in state)
    except Exception as error:  # torch raises a dozen types for a broken file
        raise data.Error(f"no weights in {place} ({error!r:.60}); name a file with --weights", 1) from error
    if not there:
        raise data.Error(f"{weights} has no layer {WEIGHTED[dims]}, which --dims {dims} needs", 1)
    return state


# ---- images to features ----

def check_images(images):
    """Arrays or tensors (N, C, H, W) or (N, H, W, C), C 1 or 3, or grey (N, H, W) -> a tensor (N, C, H, W),
    uint8 or float32 in [0, 1]. Raises Error for all else: images in [-1, 1] would give a wrong figure."""
    try:
        x = torch.as_tensor(images)
    except (TypeError, ValueError, RuntimeError) as error:
        raise data.Error(f"images are no array: {data.one_line(error)}") from None
    shape, x = tuple(x.shape), x[:, None] if x.ndim == 3 else x
    if len(shape) == 3 and shape[0] == 3:
        raise data.Error(f"images are {shape}, a colour image or three grey ones? Add a dimension")
    first, last = (x.ndim == 4 and x.shape[axis] in (1, 3) for axis in (1, -1))
    if x.numel() == 0 or first == last:
        raise data.Error(f"images are {shape}, not clearly (N, C, H, W), (N, H, W, C) or (N, H, W), C 1 or 3")
    x = x if first else x.permute(0, 3, 1, 2)
    if x.dtype == torch.uint8:
        return x
    if not (x.dtype.is_floating_point and 0 <= x.min() and x.max() <= 1):  # false for NaN as well
        low, high = x.double().aminmax()
        raise data.Error(f"images are {x.dtype} in [{low:.4g}, {high:.4g}], not uint8 or floats in [0, 1]")
    return x.float()


@contextlib.contextmanager
def full_precision(device):
    """Whatever the program allows, nothing is rounded to TF32 or bf16, which would change the FID."""
    before = [getattr(where, name) for where, name, _ in FP32]
    try:
        for where, name, value in FP32:
            setattr(where, name, value)
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for (where, name, _), value in zip(FP32, before, strict=True):
            setattr(where, name, value)


@torch.inference_mode()
def features(images, net):
    """Inception features float32 (N, dims) of images as check_images() takes them. Input as in pytorch-fid:
    [0, 1], bilinear to 299 x 299, then [-1, 1]; in fp32. Raises Error."""
    images, device, found = check_images(images), next(net.parameters()).device, []
    batch = 100 if device.type == "cuda" else 8  # 8 fit a CPU's cache
    with full_precision(device):
        for x in data.progress(images.split(batch), "Inception"):
            x = x.to(device).float() / (255 if x.dtype == torch.uint8 else 1)
            x = x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
            x = F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
            found.append(net(2 * x - 1).mean((2, 3)))
    return torch.cat(found).cpu().numpy()


def kept_features(images, net, folder="out"):
    """features(), kept in `folder` under a hash of images and weights; a broken file is made anew."""
    images = check_images(images)
    sha = hashlib.sha256(f"{net.dims} {net.sha256}{images.dtype} {tuple(images.shape)}".encode())
    sha.update(images.cpu().contiguous().numpy())
    path = Path(folder) / f"features-{net.dims}-{sha.hexdigest()[:16]}.npy"
    with contextlib.suppress(Exception):  # there is none, or a broken one
        return np.load(path, allow_pickle=False)
    kept = features(images, net)
    try:
        with data.atomic(path) as file:
            np.save(file, kept)
    except OSError as error:
        print(f"features are not kept: {error}", file=sys.stderr)
    return kept


# ---- the paper's protocol ----

def how_many(wanted, there):
    """The images of a draw: as wanted, else 10,000 or all there are. Raises Error where there are fewer."""
    n = wanted or min(10000, there)
    if n > there:
        raise data.Error(f"--fid-samples {n}: there are {there} real images")
    if n < 4:
        raise data.Error(f"{n} images: precision and recall need 4")
    if n < 10000 and not wanted:
        print(f"--fid-samples {n}: there are no more, the protocol takes 10000")
    return n


def check(n, wanted, dims, weights):
    """Raises Error, before a training, for too few real images and for weights without the layers."""
    how_many(wanted, n)
    read_weights(weights, dims)


def protocol(draw, real, runs=5, n=None, net=None, folder="out"):
    """Measures a model `runs` times. Run k has seed 100 k. It takes n real images without replacement and n
    samples, draw(n, seed), uint8 (n, C, H, W), and compares them. It also compares these real images with up
    to n others, the floor: about what a perfect generator would score. Where fewer than n / 2 others are
    left, the n are split into two halves; their FID is higher, for there are fewer images. Prints one line
    per run, returns a dict for JSON, keeps the real features in `folder`. Raises Error."""
    net = network() if net is None else net
    real, n = check_images(real), how_many(n, len(real))
    draws, rows, floors = {}, [], []
    for seed in range(100, 100 * runs + 1, 100):
        rng = np.random.default_rng(seed)
        chosen = rng.choice(len(real), n, replace=False)
        draws[seed] = chosen, rng.permutation(np.setdiff1d(np.arange(len(real)), chosen))[:n]
    needed = np.unique(np.concatenate(sum(draws.values(), ())))  # of these alone features are computed
    kept = np.zeros((len(real), net.dims), np.float32)
    kept[needed] = kept_features(real[needed], net, folder)
    for seed, (chosen, others) in draws.items():
        began = time.time()
        images = draw(n, seed)
        sampled = time.time()
        if images.shape != (n, *real.shape[1:]):
            raise data.Error(f"drawn are {[*images.shape]}, the real ones {[n, *real.shape[1:]]}")
        rows.append({"seed": seed, **measures(kept[chosen], features(images, net)),
                     "sampling_seconds": sampled - began, "measuring_seconds": time.time() - sampled})
        half = n // 2
        a, b = (chosen, others) if len(others) >= max(4, half) else (chosen[:half], chosen[half:2 * half])
        if len(a) > 3:
            floors.append(measures(kept[a], kept[b]))
        print(f"seed {seed}: " + "  ".join(f"{k} {rows[-1][k]:.4g}" for k in MEASURES), flush=True)
    versions = {name: metadata.version(name) for name in ("torch", "torchvision", "numpy", "scipy")}
    return {"dims": net.dims, "weights": net.weights, "weights_sha256": net.sha256,
            "images": n, "of": len(real), "others": len(others), "runs": rows,
            "drawn": {k: summary([row[k] for row in rows]) for k in MEASURES},
            "floor": {k: summary([row[k] for row in floors]) for k in MEASURES if floors},
            "floor_images": [len(a), len(b)], "device": machine(next(net.parameters()).device),
            "versions": {"python": platform.python_version(), **versions}}


def text(result):
    """What protocol() found, in lines."""
    n, halves = result["images"], result["floor_images"][0] < result["images"]
    lines = [f"{len(result['runs'])} x {n} of {result['of']} images, {result['dims']} features, weights "
             + result["weights"]]
    floor = f"floor (two halves of {n})" if halves else "floor"
    for title, values in (("drawn", result["drawn"]), (floor, result["floor"])):
        if values:
            lines.append(f"{title}: " + "  ".join(f"{k} {v['text']}" for k, v in values.items()))
    return "\n".join(lines)


def summary(values):
    """Mean and standard deviation of several runs, and both as text."""
    mean, std = float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": mean, "std": std, "text": f"{mean:.4g}" + (f" ± {std:.2g}" if len(values) > 1 else "")}


def machine(device):
    """A GPU's name or "cpu (1 threads)"; of two processes "2 x cpu (1 threads)"."""
    name = f"{device} ({torch.get_num_threads()} threads)"
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    _, n = data.processes()
    return f"{n} x {name}" if n > 1 else name


# ---- the command ----

def get_args(argv=None):
    p = argparse.ArgumentParser(epilog=__doc__, formatter_class=data.Help, allow_abbrev=False)
    p.error, add = data.refuse, p.add_argument
    add("a", metavar="A", help="the generated set: a folder, an .npz of images or of statistics, or a name")
    add("b", metavar="B", nargs="?", help="the real set: a MedMNIST name, demo, an .npz or a folder")
    add("--size", type=data.number(int, 16, 256), metavar="N",
        help="crop and resize pictures to N x N, as training does")
    add("--split", choices=(*data.SPLITS, "all"), default="all",
        help="part of B (or of A alone), and of A where it has parts (samples.npz has none)")
    add("--root", help="folder of MedMNIST's files; else $MEDMNIST_ROOT, else ~/.medmnist")
    add("--device", type=data.device, default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--dims", type=int, choices=tuple(LAST), default=2048, help="number of features of the FID")
    add("--weights", default="fid", help="Inception's weights: fid (the usual ones), imagenet or a file")
    add("--save-stats", type=Path, metavar="FILE", help="write mean and covariance of A to a new .npz")
    add("--json", action="store_true", help="print the result and its settings as JSON")
    args = p.parse_args(argv)
    if (args.b is None) == (args.save_stats is None):
        p.error("name a set B to compare with, or --save-stats FILE")
    if args.save_stats and (args.save_stats.suffix != ".npz" or args.save_stats.exists()):
        p.error(f"--save-stats {args.save_stats}: not a new .npz file")
    return args


def read(source, args, last):
    """Images (N, C, H, W), or a dict of the arrays in a file of statistics."""
    splits = True
    with contextlib.suppress(Exception):  # no .npz, or a broken one, of which data.load speaks
        with np.load(source, allow_pickle=False) as file:
            if "mu" in file and "sigma" in file:
                return dict(file)
            splits = "images" not in file
    if source not in data.NAMES and Path(source).is_dir():
        splits = any(name.lower() in data.SPELLINGS for name in data.subfolders(Path(source)))
    images, _, _ = data.load(source, args.root, args.split if splits or last else "all", args.size or 0)
    if len(images) < 50:
        warn(f"{source}: only {len(images)} images, the result says little")
    return images


def main(argv=None):
    args = get_args(argv)
    sources = [args.a, args.b] if args.b else [args.a]
    sets = [read(source, args, k == len(sources)) for k, source in enumerate(sources, 1)]
    images = [x for x in sets if torch.is_tensor(x)]
    sizes = ["{3} x {2}".format(*x.shape) for x in images]
    if len({*sizes}) > 1:
        raise data.Error(f"A has images of {sizes[0]}, B of {sizes[1]}; --size N reads a folder, "
                         "or fetches a MedMNIST set, with N x N pixels")
    net = network(args.dims, args.weights, args.device) if images else None
    if not torch.is_tensor(sets[-1]) and args.split != "all":
        raise data.Error(f"--split {args.split}: {sources[-1]} holds statistics, not images")
    for source, x in zip(sources, sets, strict=True):
        if not torch.is_tensor(x) and net and np.size(x["mu"]) != net.dims:
            raise data.Error(f"{source} holds {np.size(x['mu'])} features, not the {net.dims} of --dims")
    made = {net.sha256 if torch.is_tensor(x) else str(x.get("weights", "")) for x in sets} - {""}
    if len(made) > 1:
        raise data.Error("A and B were measured with different weights of Inception")

    def moments(x):
        return statistics(kept_features(x, net)) if torch.is_tensor(x) else (x["mu"], x["sigma"])
    if args.save_stats:
        mu, sigma = (v.astype(np.float32) for v in moments(sets[0]))
        with data.atomic(args.save_stats) as file:
            np.savez_compressed(file, mu=mu, sigma=sigma, weights="".join(made))
        return
    line = "FID {fid:.4g}"
    if len(images) == 2:
        fake, real = (kept_features(x, net) for x in images)
        result = measures(real, fake)
        line += "  KID {kid:.4g} ± {kid_std:.2g}  precision {precision:.4g}  recall {recall:.4g}"
    else:
        result = {"fid": frechet_distance(*moments(sets[0]), *moments(sets[1]))}
    result |= {"a": args.a, "b": args.b, "split": args.split}
    if images:
        result |= {"images": [*map(len, images)], "size": [*images[0].shape[2:]], "dims": net.dims,
                   "weights": net.weights, "sha256": net.sha256}
        line += "  ({a} against {b}, {dims} features, weights {weights})"
    print(json.dumps(result, indent=1) if args.json else line.format(**result))


if __name__ == "__main__":
    data.command(main)
