"""Fréchet Inception Distance (Heusel et al., 2017), KID, precision and recall of two sets of images.

    python fid.py samples.npz bloodmnist                    two sets: names, .npz files or folders of pictures
    python fid.py A B --dims 768 --weights inception.pth    with a file of Inception's weights
    python fid.py A --save-stats A.npz                      mean and covariance alone, for pytorch-fid too

Inception turns an image into a vector of features, which equal pytorch-fid's; the distance is that of two
clouds of such vectors, 0 for the same. Images come in one range only: uint8, or floats in [0, 1].
"""
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
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from scipy.linalg import sqrtm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

import data

LAST = {64: "maxpool1", 192: "maxpool2", 768: "Mixed_6e", 2048: "Mixed_7c"}  # the block with so many features
URLS = {"fid": "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
               "pt_inception-2015-12-05-6726825d.pth",
        "imagenet": "https://download.pytorch.org/models/inception_v3_google-0cc3c7bd.pth"}
MEASURES = ("fid", "kid", "precision", "recall")


# ----------------------------------------------------------------------------------------------------
# The measures, of features (N, D).

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), Dowson & Landau 1982.

    mu: (D,), sigma: (D, D) symmetric positive semi-definite. Returns a float, not below 0.
    Raises ValueError where shapes differ, values are not finite or the root is not real."""
    mu1, mu2 = (np.atleast_1d(mu).astype(np.float64) for mu in (mu1, mu2))
    sigma1, sigma2 = (np.atleast_2d(sigma).astype(np.float64) for sigma in (sigma1, sigma2))
    if mu1.shape != mu2.shape or not sigma1.shape == sigma2.shape == (len(mu1),) * 2:
        shapes = ", ".join(str(x.shape) for x in (mu1, mu2, sigma1, sigma2))
        raise ValueError(f"means and covariances of shapes {shapes} do not go together")
    if not all(np.isfinite(x).all() for x in (mu1, mu2, sigma1, sigma2)):
        raise ValueError("a mean or a covariance holds NaN or infinity")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a singular product; the next lines deal with it
        root = sqrtm(sigma1 @ sigma2)
        if not np.isfinite(root).all():
            eps = 1e-6 * np.eye(len(mu1))
            root = sqrtm((sigma1 + eps) @ (sigma2 + eps))
    if np.iscomplexobj(root) and not np.allclose(np.diagonal(root).imag, 0, atol=1e-3):
        raise ValueError(f"the covariances' root is not real (imaginary part {np.abs(root.imag).max():.3g})")
    return max(0.0, float(np.sum((mu1 - mu2) ** 2) + np.trace(sigma1 + sigma2) - 2 * np.trace(root.real)))


def statistics(x):
    """features (N, D), N of 2 or more -> mean (D,) and covariance (D, D), float64."""
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"statistics need two rows of features or more, these are {x.shape}")
    if len(x) <= x.shape[1]:
        warn(f"{len(x)} images for {x.shape[1]} dimensions: the covariance is singular and the FID too high; "
             "compare it only with FIDs of as many images")
    return x.mean(0), np.cov(x, rowvar=False).reshape(x.shape[1], -1)


@functools.cache  # once is enough
def warn(text):
    warnings.warn(text, stacklevel=3)


def kernel_distance(a, b, subsets=100, size=1000, seed=0):
    """KID (Bińkowski et al., 2018): mean and standard deviation over subsets of the unbiased squared MMD
    with the kernel (x·y / D + 1)^3. Unlike the FID's, its mean does not depend on the number of images."""
    if min(len(a), len(b)) < size:
        warn(f"KID over subsets of {min(len(a), len(b))}, not {size}: there are no more images")
    rng, size, values = np.random.default_rng(seed), min(size, len(a), len(b)), []
    for _ in range(subsets):
        x, y = (torch.as_tensor(z[rng.choice(len(z), size, replace=False)]).double() for z in (a, b))
        xx, yy, xy = ((p @ q.T / p.shape[1] + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        values.append((within - 2 * xy.mean()).item())
    return float(np.mean(values)), float(np.std(values))


def precision_recall(real, fake, k=3, block=1000):
    """Precision, the share of the fake within the real manifold, and recall, the share of the real within the
    fake one (Kynkäänniemi et al., 2019). A manifold: balls around the points, each out to its k-th
    neighbour."""
    real, fake = (torch.as_tensor(x).float() for x in (real, fake))
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"precision and recall need more than {k} images: {len(real)}, {len(fake)}")

    def share_within(points, centres):
        radii = [torch.cdist(x, centres).kthvalue(k + 1).values for x in centres.split(block)]  # + 1: itself
        inside = [(torch.cdist(x, centres) <= torch.cat(radii)).any(1) for x in points.split(block)]
        return torch.cat(inside).float().mean().item()
    return share_within(fake, real), share_within(real, fake)


def measures(real, fake):
    """{"fid", "kid", "kid_std", "precision", "recall"} of two sets of features (N, D)."""
    (kid, kid_std), (precision, recall) = kernel_distance(real, fake), precision_recall(real, fake)
    return {"fid": frechet_distance(*statistics(real), *statistics(fake)), "kid": kid, "kid_std": kid_std,
            "precision": precision, "recall": recall}


# ----------------------------------------------------------------------------------------------------
# Torchvision's Inception v3 with the differences of TensorFlow's FID network, which pytorch-fid found:
# average pooling leaves out the padding, and the last block takes the maximum (a slip, part of the measure).

class WithoutPadding(nn.Module):
    """Of averages over 3 x 3 that count the zeros around the image, those that do not."""

    def forward(self, x):
        return x / F.avg_pool2d(torch.ones_like(x[:1, :1]), 3, stride=1, padding=1)


def network(dims=2048, weights="fid"):
    """Inception up to the block of `dims` features, in eval mode, the BatchNorm folded into the convolutions.

    Maps float (B, 3, 299, 299) in [-1, 1] to (B, dims, h, w). weights: "fid", "imagenet" (torchvision's own
    network) or the path of a state dict with torchvision's names. Raises ValueError for a layer that is
    missing or misshapen, FileNotFoundError."""
    from torchvision.models import inception  # takes two seconds: only who measures waits for them
    state, net = read_weights(weights), nn.Sequential()
    with torch.device("meta"):  # built without memory, then filled
        whole = inception.Inception3(aux_logits=False, init_weights=False)
    for name, layer in whole.named_children():
        net.add_module(name, layer)
        if name == LAST[dims]:
            break
    for key, value in net.state_dict().items():
        if key not in state and not key.endswith("num_batches_tracked"):
            raise ValueError(f"weights {weights}: no layer {key}, which --dims {dims} needs")
        if key in state and state[key].shape != value.shape:
            raise ValueError(f"weights {weights}: {key} is {[*state[key].shape]}, not {[*value.shape]}")
    net.load_state_dict(state, strict=False, assign=True)
    for block in list(net.eval().modules()):
        if isinstance(block, inception.BasicConv2d):
            block.conv, block.bn = fuse_conv_bn_eval(block.conv, block.bn), nn.Identity()
        elif hasattr(block, "branch_pool") and weights != "imagenet":
            block.branch_pool = nn.Sequential(WithoutPadding(), block.branch_pool)
    if dims == 2048 and weights != "imagenet":
        last, pool, forward = net[-1], net[-1].branch_pool[1], net[-1]._forward
        last._forward = lambda x: [*forward(x)[:-1], pool(F.max_pool2d(x, 3, stride=1, padding=1))]
    return net.requires_grad_(False)


def read_weights(weights):
    if weights in URLS:
        try:
            return torch.hub.load_state_dict_from_url(URLS[weights], map_location="cpu", check_hash=True,
                                                      weights_only=True)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(f"Inception weights could not be fetched from {URLS[weights]} ({error}); "
                                    "name a file with --weights") from error
    state = data.read_torch(weights)
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"weights {weights}: not a state dict")
    return state


# ----------------------------------------------------------------------------------------------------
# Images to features.

def check_images(images):
    """Arrays or tensors, (N, C, H, W) or (N, H, W, C), C 1 or 3 -> a tensor (N, C, H, W), uint8 or float in
    [0, 1]. All else is a ValueError that names it: images in [-1, 1] would give a wrong figure."""
    x = torch.as_tensor(images)
    if x.dtype != torch.uint8 and not x.dtype.is_floating_point:
        raise ValueError(f"images are {x.dtype}, not uint8 or floats in [0, 1]")
    first, last = (x.ndim == 4 and x.shape[i] in (1, 3) for i in (1, 3))
    if x.numel() == 0 or first == last:
        raise ValueError(f"images are {tuple(x.shape)}, not (N, C, H, W) or (N, H, W, C)" + (
            ": channels first or last?" if first else " with 1 or 3 channels"))
    if x.dtype != torch.uint8 and not (0 <= x.min() and x.max() <= 1):  # false for NaN as well
        raise ValueError(f"float images lie in [{x.min():.4g}, {x.max():.4g}], not in [0, 1]; map them there")
    return x if first else x.permute(0, 3, 1, 2)


@torch.inference_mode()
def features(images, dims=2048, weights="fid", device=None):
    """Inception features of images as check_images() has them, or of a list of such sets: float32 (N, dims).
    Input as in pytorch-fid: [0, 1], bilinear to 299 x 299, then [-1, 1]; all in fp32."""
    device = torch.device(device or data.device())
    batch = 100 if device.type == "cuda" else 8  # 8 fit a CPU's cache
    sets = images if isinstance(images, list) else [images]
    chunks = [x for part in sets for x in check_images(part).split(batch)]
    net = network(dims, weights).to(device, memory_format=torch.channels_last)
    out = [torch.zeros(len(x), dims, device=device) for x in chunks]
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False  # it would round
    wait = {} if sys.stderr.isatty() else {  # no terminal: a line a minute
        "delay": 60, "mininterval": 60, "bar_format": "{desc}: {percentage:.0f} %, {remaining} left\n"}
    bar = tqdm(range(rank, len(chunks), world), "Inception", leave=False, **wait)
    try:
        for i in bar:
            x = chunks[i].to(device)
            x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
            x = x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
            x = F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
            out[i].copy_(net(2 * x - 1).mean((2, 3)))
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    out = torch.cat(out)
    if world > 1:  # each process has filled its rows
        dist.all_reduce(out)
    return out.cpu().numpy()


def kept_features(images, dims=2048, weights="fid", device=None, folder="out"):
    """features(), kept in `folder` under a hash of images and weights; a broken file is made anew."""
    sets = images if isinstance(images, list) else [images]
    sha = hashlib.sha256(f"{dims} {file_hash(weights)}".encode())
    for part in sets:
        sha.update(f"{part.dtype} {tuple(part.shape)}".encode() + part.contiguous().numpy().tobytes())
    path = Path(folder) / f"features-{dims}-{sha.hexdigest()[:16]}.npy"
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):  # none, or a broken one
        kept = features(images, dims, weights, device)
        data.save(path, lambda file: np.save(file, kept))
        return kept


def file_hash(path):
    """sha256 of a file; a name that stands for no file (fid, imagenet) is its own hash."""
    return str(path) if path in URLS else hashlib.sha256(Path(path).read_bytes()).hexdigest()


# ----------------------------------------------------------------------------------------------------
# The paper's protocol, and the command.

def how_many(wanted, there):
    """The images of a draw: as wanted, else 10,000 or all there are. Raises UsageError where there are
    fewer."""
    if wanted and wanted > there:
        raise data.UsageError(f"--fid-samples {wanted}: there are {there} real images")
    if (wanted or there) < 4:
        raise data.UsageError(f"{wanted or there} images in a draw: precision and recall need 4")
    if not wanted and there < 10000:
        print(f"--fid-samples {there}: there are no more real images, the protocol takes 10000")
    return wanted or min(10000, there)


def protocol(draw, real, runs=5, n=None, seed=100, dims=2048, weights="fid", device=None, folder="out"):
    """`runs` draws on one model: run k, with seed + 100 k, compares n real images drawn without replacement
    with the n of draw(n, seed), uint8 (n, C, H, W), and with as many of the other real ones, the floor.
    Prints a table, returns all of it; the real features are kept in `folder`. Raises UsageError for images of
    another shape."""
    n, device, rows, floors = how_many(n, len(real)), torch.device(device or data.device()), [], []
    kept = kept_features(real, dims, weights, device, folder=folder)
    for s in range(seed, seed + 100 * runs, 100):
        began, rng = time.time(), np.random.default_rng(s)
        chosen = rng.choice(len(real), n, replace=False)
        others = rng.permutation(np.setdiff1d(np.arange(len(real)), chosen))[:n]
        images = draw(n, s)
        if images.shape[1:] != real.shape[1:]:
            raise data.UsageError(f"drawn are {[*images.shape[1:]]}, the real ones {[*real.shape[1:]]}")
        drawn = time.time()
        rows.append({"seed": s, **measures(kept[chosen], features(images, dims, weights, device)),
                     "sampling_seconds": drawn - began, "measuring_seconds": time.time() - drawn})
        if len(others) > 3:
            floors.append(measures(kept[chosen], kept[others]))
        print(f"seed {s}: " + "  ".join(f"{k} {rows[-1][k]:.4g}" for k in MEASURES), flush=True)
    print(f"{runs} x {n} of {len(real)} images, {dims} features, weights {Path(weights).name}")
    result = {"dims": dims, "weights": Path(weights).name, "weights_sha256": file_hash(weights), "images": n,
              "of": len(real), "others": len(others), "runs": rows}
    for title, values in (("drawn", rows), ("floor", floors)):
        result[title] = {k: summary([row[k] for row in values]) for k in MEASURES if values}
        if values:
            print(f"{title}: " + "  ".join(f"{k} {v['text']}" for k, v in result[title].items()))
    versions = {name: metadata.version(name) for name in ("torch", "torchvision", "numpy", "scipy")}
    where = (torch.cuda.get_device_name(device) if device.type == "cuda" else
             f"{device} ({torch.get_num_threads()} threads)")
    world = dist.get_world_size() if dist.is_initialized() else 1
    return result | {"device": f"{world} x {where}" if world > 1 else where,
                     "versions": {"python": platform.python_version(), **versions}}


def summary(values):
    """Mean and standard deviation of several runs, and both as text."""
    mean, std = float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": mean, "std": std, "text": f"{mean:.4g}" + (f" ± {std:.2g}" if len(values) > 1 else "")}


def read_images(source, root=None):
    """Images of a data set's name, an .npz file (key images, or MedMNIST's keys) or a folder and all below
    it: a tensor (N, C, H, W), or a list of such, one for each size of picture."""
    path = Path(source)
    if data.is_folder(source):
        files, sizes = data.pictures(path), {}
        if skipped := sum(f.is_file() for f in path.rglob("*")) - len(files):
            print(f"{source}: {skipped} files skipped, which are no pictures", file=sys.stderr)
        for f in tqdm(files, desc=f"reading {source}", disable=None, leave=False):
            x = np.asarray(data.read_picture(f).convert("RGB"))
            sizes.setdefault(x.shape, []).append(x)
        if not files:
            raise ValueError(f"folder {source} holds no pictures ({', '.join(data.PICTURES)})")
        return [check_images(np.stack(x)) for x in sizes.values()]
    if path.suffix == ".npz" and path.is_file():
        try:
            with np.load(path, allow_pickle=False) as file:
                if "images" in file:
                    return check_images(file["images"])
        except Exception as error:  # numpy and zipfile meet foreign bytes with a dozen types
            raise ValueError(f"{path} is not a readable set of images: {data.one_line(error)}") from None
    return data.load(str(source), root)[0]


def main(argv=None):
    p = data.Parser(__doc__)
    p.add_argument("a", metavar="A", help="a MedMNIST name, an .npz file, a folder of pictures or statistics")
    p.add_argument("b", metavar="B", nargs="?", help="the set to compare with: the real one of the two")
    data.common(p.add_argument, "root", "device", "dims", "weights")
    p.add_argument("--save-stats", type=Path, metavar="FILE", help="no B: write A's mean and covariance")
    p.add_argument("--few", action="store_true", help="measure fewer than 50 images all the same")
    p.add_argument("--cache", default="out", metavar="DIR", help="where features are kept")
    p.add_argument("--json", action="store_true", help="print all that there is to know, as JSON")
    args = p.parse_args(argv)
    if (args.b is None) == (args.save_stats is None):
        p.error("name a set B to compare with, or --save-stats FILE")
    stats, kept, counts = [], [], []
    for source in filter(None, (args.a, args.b)):
        if Path(source).suffix == ".npz" and Path(source).is_file():
            with np.load(source, allow_pickle=False) as file:
                if "mu" in file and "sigma" in file:  # pytorch-fid's, or --save-stats'
                    if "weights" in file and str(file["weights"]) != file_hash(args.weights):
                        raise data.UsageError(f"{source} was made with other weights than {args.weights}")
                    stats.append((file["mu"], file["sigma"]))
                    continue
        images = read_images(source, args.root)
        counts.append(sum(map(len, images)) if isinstance(images, list) else len(images))
        if counts[-1] < 50 and not args.few:
            raise data.UsageError(f"{source}: {counts[-1]} images say nothing; --few takes them anyway")
        kept.append(kept_features(images, args.dims, args.weights, args.device, args.cache))
        stats.append(statistics(kept[-1]))
    if args.save_stats:
        mu, sigma = (v.astype(np.float32) for v in stats[0])
        return data.save(args.save_stats, lambda file: np.savez_compressed(
            file, mu=mu, sigma=sigma, weights=file_hash(args.weights)))
    result = measures(kept[1], kept[0]) if len(kept) == 2 else {"fid": frechet_distance(*stats[0], *stats[1])}
    line = f"FID {result['fid']:.4g}" + (
        "  KID {kid:.4g} ± {kid_std:.2g}  precision {precision:.4g}  recall {recall:.4g}".format(**result)
        if "kid" in result else "")
    result |= {"a": args.a, "b": args.b, "images": counts, "dims": args.dims,
               "weights": Path(args.weights).name, "weights_sha256": file_hash(args.weights)}
    print(json.dumps(result, indent=1) if args.json else
          f"{line}  ({args.a} against {args.b}, {args.dims} features, weights {result['weights']})")


if __name__ == "__main__":
    data.command(main)
