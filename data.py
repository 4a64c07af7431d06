"""The one loader: a MedMNIST .npz file -> uint8 images and labels; shuffled batches on the device.

    images, labels = data.load("bloodmnist")            # uint8 (17092, 3, 28, 28), int64 (17092,)
    for x in data.batches(images, 128, generator): ...  # uint8 (128, 3, 28, 28), every image once

MedMNIST v2: Yang et al., Scientific Data 2023, https://medmnist.com
"""
import argparse
import os
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch

NAMES = ("pathmnist", "chestmnist", "dermamnist", "octmnist", "pneumoniamnist", "retinamnist", "breastmnist",
         "bloodmnist", "tissuemnist", "organamnist", "organcmnist", "organsmnist")
SPLITS = ("train", "val", "test")


def name(text):
    """argparse type of --data: a 2-D MedMNIST name or the path of an .npz file."""
    if text.endswith("mnist3d"):
        raise argparse.ArgumentTypeError(f"{text} is a 3-D set; the 2-D sets are {', '.join(NAMES)}")
    if text not in NAMES and not text.endswith(".npz"):
        raise argparse.ArgumentTypeError(f"no data set is called {text!r}; use a path that ends in .npz or one of {', '.join(NAMES)}")
    return text


def locate(data, root=None):
    """The .npz file of a data set: the path itself, or <root>/<name>.npz with root from the argument, $MEDMNIST_ROOT
    or ~/.medmnist. Downloads a named set that is not there (md5 checked by the medmnist package).
    Raises FileNotFoundError where there is neither file nor network."""
    if data.endswith(".npz"):
        if not Path(data).is_file():
            raise FileNotFoundError(f"no data file at {data}")
        return Path(data)
    root = Path(root or os.environ.get("MEDMNIST_ROOT") or Path.home() / ".medmnist").expanduser()
    path = root / f"{data}.npz"
    if not path.is_file():
        download(data, path)
    return path


def download(data, path):
    """Fetch a named set with the medmnist package; it appears at `path` only when it is whole."""
    import medmnist  # here alone: reading a local file needs numpy only
    info = medmnist.INFO[data]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as tmp:
            getattr(medmnist, info["python_class"])(split="train", root=tmp, download=True)
            os.replace(Path(tmp) / path.name, path)
    except Exception as error:  # no network, a proxy's page, a wrong md5, no space: the user's next step is the same
        raise FileNotFoundError(f"no file at {path}, and the download from {info['url']} failed "
                                f"({type(error).__name__}); fetch it by hand and put it there, or point --root at its folder") from error


def load(data="bloodmnist", root=None, split="all"):
    """Read a MedMNIST set.

    data: a name of NAMES or the path of an .npz file with the keys {train,val,test}_{images,labels}.
    split: "train", "val", "test" or "all" (the three in this order).
    Returns images uint8 (N, C, H, W), C 1 or 3, and labels int64 (N,). The multi-label ChestMNIST gets the number of
    its first finding, from 1, or 0 for none. Raises ValueError where the file is not such a set.
    """
    try:
        name(data)
    except argparse.ArgumentTypeError as error:
        raise ValueError(str(error)) from None
    path = locate(data, root)
    splits = SPLITS if split == "all" else (split,)
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [f"{s}_{kind}" for s in splits for kind in ("images", "labels") if f"{s}_{kind}" not in file]
            if missing:
                raise ValueError(f"it has no {', '.join(missing)}")
            images = [file[f"{s}_images"] for s in splits]
            labels = [file[f"{s}_labels"] for s in splits]
        if any(len(x) != len(y) for x, y in zip(images, labels)):
            raise ValueError(f"{[len(x) for x in images]} images, but {[len(y) for y in labels]} labels")
        if len({x.shape[1:] for x in images}) > 1 or len({y.shape[1:] for y in labels}) > 1:
            raise ValueError(f"its splits differ in shape: images {[x.shape for x in images]}, labels {[y.shape for y in labels]}")
        images, labels = np.concatenate(images), np.concatenate(labels)
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.ndim == 4 and images.shape[3] not in (1, 3):
            raise ValueError(f"images are {images.dtype} {images.shape}, not uint8 (N, H, W) or (N, H, W, 1 or 3)")
        if images.size == 0:
            raise ValueError(f"split {split} has no images")
        if labels.ndim == 2 and labels.shape[1] > 1:
            labels = np.where(labels.any(1), labels.argmax(1) + 1, 0)
        if labels.size != len(images) or labels.dtype.kind not in "iu" or labels.min() < 0:
            raise ValueError(f"labels are {labels.dtype} {labels.shape}, not one whole number from 0 an image")
    except (ValueError, OSError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zipfile.zlib.error, NotImplementedError) as error:
        raise ValueError(f"{path} is not a readable MedMNIST file: {error}; delete it to have it fetched again") from error
    images = torch.from_numpy(images.reshape(*images.shape[:3], -1)).permute(0, 3, 1, 2).contiguous()
    return images, torch.from_numpy(labels.reshape(-1).astype(np.int64))


def class_number(text, data, classes):
    """The number of a class of `classes` from itself or from its MedMNIST name (its first letters will do, if no other has
    them). Raises argparse.ArgumentTypeError."""
    names = {}
    if not text.isdigit() and data in NAMES:
        try:
            from medmnist import INFO  # the names are its alone; numbers do without it
        except ImportError:
            raise argparse.ArgumentTypeError(f"--label {text}: names need the medmnist package, numbers from 0 do not") from None
        names = {int(k): v for k, v in INFO[data]["label"].items() if int(k) < classes}
    found = [int(text)] if text.isdigit() else [k for k, v in names.items() if v.lower().startswith(text.lower())]
    if len(found) != 1 or found[0] >= classes:
        raise argparse.ArgumentTypeError(f"--label {text} is not one of {', '.join(names.values()) or f'0 to {classes - 1}'}")
    return found[0]


def batches(images, batch_size, generator, augment=False, labels=None):
    """One epoch: yields uint8 (B, C, H, W) batches on the images' device, every image exactly once, the last batch short;
    with labels (N,) on that device, pairs of a batch and its labels (B,).

    generator: a CPU torch.Generator; the same state gives the same epoch.
    augment: each image gets one of the eight flips and quarter turns of the square (a cell has no up or left).
    """
    order = torch.randperm(len(images), generator=generator)
    turns = torch.rand(3, len(images), generator=generator) < 0.5 if augment else None
    for i in range(0, len(images), batch_size):
        chosen = order[i:i + batch_size].to(images.device)
        x = images[chosen]
        if augment:
            across, down, swap = turns[:, i:i + batch_size, None, None, None].to(images.device)
            x = torch.where(across, x.flip(3), x)
            x = torch.where(down, x.flip(2), x)
            x = torch.where(swap, x.transpose(2, 3), x)
        yield x if labels is None else (x, labels[chosen])
