"""Fréchet Inception Distance (Heusel et al., 2017): the distance between two sets of images, 0 for the same distribution.

    python fid.py bloodmnist samples.npz                    two sets: names, .npz files or folders of images
    python fid.py A B --dims 768 --weights inception.pth    with a file of Inception's weights
    python fid.py bloodmnist                                the floor: real images against other real images
    python fid.py samples.npz bloodmnist --neighbours       does a generator hand out its training images?
    python fid.py samples.npz bloodmnist --classifier       are its cells of the type that their labels say?

Each set of images becomes a Gaussian over Inception features, and the FID is the distance between the two Gaussians.
The features equal pytorch-fid's. Images come in one range only: uint8, or floats in [0, 1].
"""
import argparse
import hashlib
import json
import os
import platform
import sys
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import scipy
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from scipy.linalg import sqrtm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models import inception
from tqdm import tqdm

import data

DIMS = (64, 192, 768, 2048)
URLS = {"fid": "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "imagenet": inception.Inception_V3_Weights.IMAGENET1K_V1.url}


# ---------------------------------------------------------------------------------------------------------------------
# The distance.

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), Dowson & Landau 1982.

    mu: (D,), sigma: (D, D) symmetric positive semi-definite. Returns a float, not below 0.
    Raises ValueError where shapes differ, values are not finite or the root is not real.
    """
    mu1, mu2 = np.atleast_1d(mu1).astype(np.float64), np.atleast_1d(mu2).astype(np.float64)
    sigma1, sigma2 = np.atleast_2d(sigma1).astype(np.float64), np.atleast_2d(sigma2).astype(np.float64)
    if not mu1.shape == mu2.shape == sigma1.shape[:1] == sigma2.shape[:1] or sigma1.shape != sigma2.shape or sigma1.shape != (len(mu1),) * 2:
        raise ValueError(f"means {mu1.shape} and {mu2.shape} do not go with covariances {sigma1.shape} and {sigma2.shape}")
    if not all(np.isfinite(x).all() for x in (mu1, mu2, sigma1, sigma2)):
        raise ValueError("a mean or a covariance holds NaN or infinity")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a singular product; the next lines deal with it
        root = sqrtm(sigma1 @ sigma2)
        if not np.isfinite(root).all():
            eps = 1e-6 * np.eye(len(mu1))
            root = sqrtm((sigma1 + eps) @ (sigma2 + eps))
    if np.iscomplexobj(root):
        if not np.allclose(np.diagonal(root).imag, 0, atol=1e-3):
            raise ValueError(f"the root of the covariances is not real (imaginary part {np.abs(root.imag).max():.3g})")
        root = root.real
    return max(0.0, float(np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root)))


def statistics(x):
    """features (N, D), N of 2 or more -> mean (D,) and covariance (D, D), float64."""
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"statistics need two rows of features or more, these are {x.shape}")
    if len(x) <= x.shape[1]:
        warnings.warn(f"{len(x)} images for {x.shape[1]} dimensions: the covariance is singular and the FID comes out too high; "
                      "compare it only with FIDs of as many images", stacklevel=2)
    return x.mean(0), np.cov(x, rowvar=False).reshape(x.shape[1], -1)


def fid(images_a, images_b, dims=2048, weights="fid", device=None, amp=False):
    """The FID of two sets of images, each as features() takes them."""
    a, b = (features(images, dims, weights, device, amp) for images in (images_a, images_b))
    return frechet_distance(*statistics(a), *statistics(b))


# ---------------------------------------------------------------------------------------------------------------------
# Inception v3 from torchvision's blocks. TensorFlow's average pooling leaves out the padding; its last block takes the
# maximum, which its FID network does too (pytorch-fid found it; it is likely a slip, and part of the measure by now).

def tf_pool(x):
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class BlockA(inception.InceptionA):
    def forward(self, x):
        return torch.cat([self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)),
                          self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))), self.branch_pool(tf_pool(x))], 1)


class BlockC(inception.InceptionC):
    def forward(self, x):
        y = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return torch.cat([self.branch1x1(x), self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
                          self.branch7x7dbl_5(self.branch7x7dbl_4(y)), self.branch_pool(tf_pool(x))], 1)


class BlockE(inception.InceptionE):
    pool = staticmethod(tf_pool)

    def forward(self, x):
        y, z = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat([self.branch1x1(x), self.branch3x3_2a(y), self.branch3x3_2b(y),
                          self.branch3x3dbl_3a(z), self.branch3x3dbl_3b(z), self.branch_pool(self.pool(x))], 1)


class BlockEMax(BlockE):
    pool = staticmethod(lambda x: F.max_pool2d(x, 3, stride=1, padding=1))


def network(dims=2048, weights="fid"):
    """Inception up to the block of `dims` features, in eval mode, with the BatchNorm folded into the convolutions.

    Maps float (B, 3, 299, 299) in [-1, 1] to (B, dims, h, w). weights: "fid", "imagenet" or the path of a state dict with
    torchvision's names. Raises ValueError where a layer is missing or has another shape, FileNotFoundError for no file.
    """
    conv, torchvisions = inception.BasicConv2d, weights == "imagenet"
    A, C, E, E_last = (inception.InceptionA, inception.InceptionC, inception.InceptionE, inception.InceptionE) if torchvisions else (BlockA, BlockC, BlockE, BlockEMax)
    blocks = {  # name: how to build it. What lies behind the block that is asked for is never built
        64: {"Conv2d_1a_3x3": lambda: conv(3, 32, kernel_size=3, stride=2), "Conv2d_2a_3x3": lambda: conv(32, 32, kernel_size=3),
             "Conv2d_2b_3x3": lambda: conv(32, 64, kernel_size=3, padding=1), "maxpool1": lambda: nn.MaxPool2d(3, 2)},
        192: {"Conv2d_3b_1x1": lambda: conv(64, 80, kernel_size=1), "Conv2d_4a_3x3": lambda: conv(80, 192, kernel_size=3), "maxpool2": lambda: nn.MaxPool2d(3, 2)},
        768: {"Mixed_5b": lambda: A(192, 32), "Mixed_5c": lambda: A(256, 64), "Mixed_5d": lambda: A(288, 64), "Mixed_6a": lambda: inception.InceptionB(288),
              "Mixed_6b": lambda: C(768, 128), "Mixed_6c": lambda: C(768, 160), "Mixed_6d": lambda: C(768, 160), "Mixed_6e": lambda: C(768, 192)},
        2048: {"Mixed_7a": lambda: inception.InceptionD(768), "Mixed_7b": lambda: E(1280), "Mixed_7c": lambda: E_last(2048)}}
    net = nn.Sequential()
    for d in DIMS[:DIMS.index(dims) + 1]:
        for name, build in blocks[d].items():
            net.add_module(name, build())

    state = read_weights(weights)
    for key, value in net.state_dict().items():
        if key not in state and not key.endswith("num_batches_tracked"):
            raise ValueError(f"weights {weights}: no layer {key}, which --dims {dims} needs")
        if key in state and state[key].shape != value.shape:
            raise ValueError(f"weights {weights}: layer {key} is {tuple(state[key].shape)}, not {tuple(value.shape)}")
    net.load_state_dict({key: state.get(key, value) for key, value in net.state_dict().items()})
    net.eval()
    for block in list(net.modules()):
        if isinstance(block, conv):
            block.conv, block.bn = fuse_conv_bn_eval(block.conv, block.bn), nn.Identity()
    return net.requires_grad_(False)


def read_weights(weights):
    if weights in URLS:
        try:
            return torch.hub.load_state_dict_from_url(URLS[weights], map_location="cpu", check_hash=True, weights_only=True)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(f"Inception's weights could not be fetched from {URLS[weights]} ({error}); fetch them by hand into "
                                    f"{torch.hub.get_dir()}/checkpoints, or name a file with --weights") from error
    try:
        if zipfile.is_zipfile(weights):
            data.check_zip(weights)
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"no weights at {weights}; --weights is fid, imagenet or a file") from None
    except Exception as error:  # torch.load meets foreign bytes with a dozen types
        raise ValueError(f"weights {weights}: not a state dict ({(str(error) or repr(error)).splitlines()[0]})") from None
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"weights {weights}: not a state dict")
    return state


# ---------------------------------------------------------------------------------------------------------------------
# Images to features.

def check_images(images):
    """Any accepted images -> a tensor (N, C, H, W), uint8 or float in [0, 1]; all else is a ValueError that names it.

    Accepts arrays and tensors, (N, C, H, W) or (N, H, W, C) with C 1 or 3 where only one of the two readings is possible.
    Floats are taken only where all of them lie in [0, 1]: images in [-1, 1] would give a wrong figure.
    """
    x = torch.as_tensor(images)
    if x.dtype != torch.uint8 and not x.dtype.is_floating_point:
        raise ValueError(f"images are {x.dtype}, not uint8 or floats in [0, 1]")
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(f"images are {tuple(x.shape)}, not (N, C, H, W) or (N, H, W, C) with 1 or 3 channels")
    first, last = x.shape[1] in (1, 3), x.shape[3] in (1, 3)
    if first == last:
        raise ValueError(f"images are {tuple(x.shape)}: " + ("channels first or last?" if first else "no axis holds 1 or 3 channels"))
    if len(x) < 2:
        raise ValueError("one image has no covariance; two are the least")
    if x.dtype != torch.uint8:
        low, high = x.min().item(), x.max().item()
        if not (0 <= low and high <= 1):  # false for NaN as well
            raise ValueError(f"float images lie in [{low:.4g}, {high:.4g}], not in [0, 1]: map them there, or give uint8")
    return x if first else x.permute(0, 3, 1, 2)


def features(images, dims=2048, weights="fid", device=None, amp=False):
    """Inception features of images (see check_images), averaged over positions: float32 (N, dims).

    Input as in pytorch-fid: [0, 1], bilinear to 299 x 299, then [-1, 1]; all of it in fp32, unless amp asks for bf16.
    """
    return extract(check_images(images), dims, weights, device, amp)


@torch.inference_mode()
def extract(images, dims, weights, device=None, amp=False):
    """features() without the look at the range: floors() alone has a use for it, to show what a wrong range does."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    net = network(dims, weights).to(device, memory_format=torch.channels_last)
    batch, out = 100 if device.type == "cuda" else 8, torch.zeros(len(images), dims, device=device)  # 8 fit a CPU's cache
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False  # a GPU would round its convolutions
    try:
        for i in tqdm(range(rank * batch, len(images), world * batch), desc=f"Inception {dims}", unit="batch", disable=None, leave=False):
            x = images[i:i + batch].to(device)
            x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
            x = x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
            x = F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                out[i:i + batch] = net(2 * x - 1).float().mean((2, 3))
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    if world > 1:  # each process has filled its rows
        dist.all_reduce(out)
    return out.cpu().numpy()


def kept_features(images, dims, weights, device, folder):
    """features(), kept in `folder` under a name made of the images' hash, the weights' and dims; a broken file is made anew."""
    sha = hashlib.sha256(np.ascontiguousarray(images).tobytes())
    sha.update(f"{tuple(images.shape)} {dims} {file_hash(weights)} fp32".encode())
    path = Path(folder) / f"features-{dims}-{sha.hexdigest()[:16]}.npy"
    try:
        kept = np.load(path, allow_pickle=False)
        if kept.shape == (len(images), dims) and kept.dtype == np.float32 and np.isfinite(kept).all():
            return kept
    except (OSError, ValueError, EOFError):
        pass
    kept = features(images, dims, weights, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_suffix(f".{os.getpid()}.tmp")         # another run may be at the same file
    with open(tmp, "wb") as file:
        np.save(file, kept)
    os.replace(tmp, path)
    return kept


def file_hash(path):
    """sha256 of a file; a name that stands for no file (fid, imagenet) is its own hash."""
    return str(path) if path in URLS else hashlib.sha256(Path(path).read_bytes()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# The paper's protocol, and the command.

def benchmark(draw, args):
    """The FID of args.fid_runs draws: run k, with seed fid_seed + 100 k, compares fid_samples real images drawn without
    replacement with as many of draw(n, seed) -> uint8 (n, C, H, W). Returns a dict with fid, std and all that says how they came about."""
    real, _ = data.load(args.data, args.root, args.split, args.size)
    n, seeds = args.fid_samples, [args.fid_seed + 100 * k for k in range(args.fid_runs)]
    if n > len(real):
        raise ValueError(f"{n} real images are asked for, split {args.split} has {len(real)}; lower --fid-samples")
    kept = kept_features(real, args.dims, args.weights, args.device, args.out.parent)
    runs = []
    for seed in seeds:
        began = time.time()
        chosen = np.random.default_rng(seed).choice(len(real), n, replace=False)
        images = draw(n, seed)
        drawn = time.time()
        fake = features(images, args.dims, args.weights, args.device)
        runs.append({"seed": seed, "fid": frechet_distance(*statistics(kept[chosen]), *statistics(fake)),
                     "sampling_seconds": round(drawn - began, 1), "fid_seconds": round(time.time() - drawn, 1)})
        print(f"seed {seed}: FID {runs[-1]['fid']:.4f}", flush=True)
    values = [run["fid"] for run in runs]
    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else f"{args.device} ({torch.get_num_threads()} threads)"
    result = {"fid": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0, "runs": runs,
              "dims": args.dims, "weights": Path(args.weights).name, "weights_sha256": file_hash(args.weights), "real_images": n, "generated_images": n,
              "data": args.data, "split": args.split, "data_sha256": file_hash(data.locate(args.data, args.root, args.size)),
              "trained": args.trained, "sampler": {k: getattr(args, k) for k in ("dtype", "prior", "steps", "order", "eta", "guidance") if hasattr(args, k)},
              "command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]), "device": device,
              "versions": {"python": platform.python_version(), **{m.__name__: m.__version__ for m in (torch, torchvision, np, scipy)}}}
    return result


def read_images(source, root=None):
    """Images of a data set's name, an .npz file (key images, or MedMNIST's keys) or a folder of images of one size."""
    path = Path(source)
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix.lower() in (".png", ".jpg", ".jpeg", ".gif", ".webp"))
        if not files:
            raise ValueError(f"folder {source} holds no .png, .jpg, .gif or .webp images")
        images = []
        for f in files:
            try:
                images.append(np.asarray(Image.open(f).convert("RGB")))
            except (OSError, ValueError, SyntaxError) as error:  # Pillow's, for foreign bytes
                raise ValueError(f"{f} is not a readable image: {(str(error) or repr(error)).splitlines()[0]}") from None
            if images[-1].shape != images[0].shape:
                raise ValueError(f"{f} is {images[-1].shape}, {files[0]} is {images[0].shape}: one size is needed")
        return check_images(np.stack(images))
    if path.suffix == ".npz" and path.is_file():
        try:
            with np.load(path, allow_pickle=False) as file:
                if "images" in file:
                    return check_images(file["images"])
        except data.UNREADABLE as error:
            raise ValueError(f"{path} is not a readable set of images: {error}") from None
    return data.load(str(source), root)[0]


def real_parts(name, args):
    """{split: (images, labels, features)} of a data set; its features are computed once and kept in args.cache."""
    parts = {split: data.load(name, args.root, split) for split in data.SPLITS}
    kept = kept_features(torch.cat([images for images, _ in parts.values()]), args.dims, args.weights, args.device, args.cache)
    rows = torch.from_numpy(kept).split([len(images) for images, _ in parts.values()])
    return {split: (*part, row) for (split, part), row in zip(parts.items(), rows)}


def floors(args):
    """What a perfect generator would score: FIDs of real images of set A against others of it, mean and std over the five seeds.
    And what the paper's slip gives perfect images: real images in [0, 1] against the same ones in [-1, 1]."""
    real = real_parts(args.a, args)
    train, test, kept = (x.numpy() for x in (real["train"][2], real["test"][2], torch.cat([rows for *_, rows in real.values()])))

    def distance(one, two):
        return frechet_distance(*statistics(one), *statistics(two))
    found = {f"train part ({len(train)}) against test part ({len(test)})": [distance(train, test)]}
    for n in sorted({min(args.images, len(kept) // 2), len(kept) // 2}):
        pairs = [np.random.default_rng(seed).permutation(len(kept)) for seed in (100, 200, 300, 400, 500)]
        found[f"two disjoint draws of {n}"] = [distance(kept[order[:n]], kept[order[n:2 * n]]) for order in pairs]
    if len(kept) > 10000:                                 # the protocol's count; of 17,092 two such draws overlap
        draws = [np.random.default_rng(seed) for seed in (100, 200, 300, 400, 500)]
        found["two draws of 10000, which overlap"] = [distance(*(kept[rng.choice(len(kept), 10000, replace=False)] for _ in range(2))) for rng in draws]
    n, images = min(args.images, len(kept)), torch.cat([images for images, *_ in real.values()])
    chosen = np.random.default_rng(100).choice(len(kept), n, replace=False)
    wrong = extract(images[chosen].float() / 127.5 - 1, args.dims, args.weights, args.device)
    found[f"the same {n} images, once in [0, 1] and once in [-1, 1]: the paper's fault"] = [distance(kept[chosen], wrong)]
    return {"floors": {k: {"fid": float(np.mean(v)), "std": float(np.std(v, ddof=1)) if len(v) > 1 else 0.0, "runs": v} for k, v in found.items()}}


def neighbours(args):
    """Does set A hand out training images? The distance, in features, from each image of A to the nearest image of B's train
    part, beside the same for the real images of B's test part. Writes the eight closest pairs to <cache>/neighbours.png."""
    images, real = read_images(args.a, args.root), real_parts(args.b, args)
    (train, _, b), held_out = real["train"], real["test"][2]
    a = torch.from_numpy(features(images, args.dims, args.weights, args.device))
    (near, which), (usual, _) = (torch.cdist(x, b).min(1) for x in (a, held_out))
    closest = near.argsort()[:8]
    pairs = torch.cat([images[closest], train[which[closest]]]).repeat_interleave(3, 2).repeat_interleave(3, 3)
    grid = torchvision.utils.make_grid(pairs, 8, padding=3, pad_value=255).permute(1, 2, 0).numpy()
    Image.fromarray(grid).save(Path(args.cache) / "neighbours.png")
    quantiles = torch.tensor([0.01, 0.1, 0.5])
    return {"images": len(images),
            "distance to the nearest training image at the quantiles 0.01, 0.1, 0.5": {"generated": near.quantile(quantiles).tolist(), "held-out real": usual.quantile(quantiles).tolist()},
            "share of the generated nearer than 0.99 of the held-out (0.01 if nothing is copied)": (near < usual.quantile(quantiles[0])).float().mean().item(),
            "pixel-identical to a training image": sum(bool((train == x).flatten(1).all(1).any()) for x in images)}


def classifier(args):
    """Do the images of A, an .npz file with labels, show the classes that their labels say? A linear classifier (multinomial
    logistic regression) over the features learns B's train part; its accuracy on B's test part says what A's can mean."""
    real, images = real_parts(args.b, args), read_images(args.a, args.root)
    try:
        with np.load(args.a, allow_pickle=False) as file:
            labels = torch.from_numpy(file["labels"].reshape(-1).astype(np.int64)) if "images" in file else data.load(args.a)[1]
    except data.UNREADABLE as error:
        raise ValueError(f"{args.a} holds no labels ({error}); draw from a model that was trained with --classes") from None
    if len(labels) != len(images):
        raise ValueError(f"{args.a} holds {len(images)} images, but {len(labels)} labels")
    sets = {"held-out real": real["test"][1:], "generated": (labels, torch.from_numpy(features(images, args.dims, args.weights, args.device)))}
    y, x = real["train"][1:]
    mean, std, classes = x.mean(0), x.std(0) + 1e-6, int(y.max()) + 1
    layer = nn.Linear(x.shape[1], classes)
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(layer((x - mean) / std), y) + 1e-3 * layer.weight.pow(2).sum()
        value.backward()
        return value
    optimizer.step(loss)
    right = {k: (layer((x - mean) / std).argmax(1) == y, y) for k, (y, x) in sets.items()}
    return {f"accuracy on {k} images": {"all": hit.float().mean().item(), "of each class": [hit[y == c].float().mean().item() for c in range(classes)], "images": len(y)}
            for k, (hit, y) in right.items()}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("a", metavar="A", help="a MedMNIST name, an .npz file or a folder of images")
    p.add_argument("b", metavar="B", nargs="?", help="the set to compare with; without it the floor of A, a data set with splits")
    p.add_argument("--dims", type=int, choices=DIMS, default=2048, help="Inception's block")
    p.add_argument("--weights", default="fid", help="fid (TensorFlow's of 2015, as pytorch-fid), imagenet (torchvision's) or a file")
    p.add_argument("--device", type=data.device, default="auto", help="auto, cpu, cuda, cuda:N or mps")
    p.add_argument("--root", help="folder of the MedMNIST files; else $MEDMNIST_ROOT, else ~/.medmnist")
    p.add_argument("--images", type=data.number(int, 2), default=10000, metavar="N", help="images on each side of the floor, half of A at most")
    p.add_argument("--cache", default="out", metavar="DIR", help="where the features of real images are kept")
    p.add_argument("--neighbours", action="store_true", help="does A copy from B's train part? in comparison with B's test part")
    p.add_argument("--classifier", action="store_true", help="are A's images of the classes that its labels say? by a classifier of B's train part")
    p.add_argument("--amp", action="store_true", help="features in bf16: faster, and FID-768 off by some 3 %%")
    p.add_argument("--json", action="store_true", help="print all that there is to know, as JSON")
    args = p.parse_args(argv)
    about = {"dims": args.dims, "weights": Path(args.weights).name, "command": " ".join(["python", "fid.py", *(argv or sys.argv[1:])])}
    if (args.neighbours or args.classifier) and args.b is None:
        p.error("--neighbours and --classifier compare A with a data set B: name it")
    if args.neighbours:
        result = neighbours(args)
        lines = [f"{k}: {v}" for k, v in result.items()] + [f"{args.cache}/neighbours.png: the closest, over their nearest training images"]
    elif args.classifier:
        result = classifier(args)
        lines = [f"{k}: {v['all']:.4f}, of each class {' '.join(f'{c:.3f}' for c in v['of each class'])}" for k, v in result.items()]
    elif args.b is None:
        result = floors(args)
        lines = [f"FID {v['fid']:.4g} ± {v['std']:.2g}  {k}" for k, v in result["floors"].items()]
    else:
        a, b = read_images(args.a, args.root), read_images(args.b, args.root)
        result = {"fid": fid(a, b, args.dims, args.weights, args.device, args.amp), "images": [len(a), len(b)]}
        lines = [f"FID {result['fid']:.4g}"]
    print(json.dumps(result | about | {"weights_sha256": file_hash(args.weights)}, indent=1) if args.json else "\n".join(lines))


if __name__ == "__main__":
    data.command(main)
