"""The one loader: a MedMNIST .npz file -> uint8 images and labels; shuffled batches on the device.

    images, labels = data.load("bloodmnist")            # uint8 (17092, 3, 28, 28), int64 (17092,)
    for x in data.batches(images, 128, generator): ...  # uint8 (128, 3, 28, 28), every image once

Behind it: files that are written whole or not at all, and what a command line takes. MedMNIST v2: Yang et al., Scientific Data 2023, https://medmnist.com
"""
import argparse
import math
import os
import struct
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.utils import make_grid

NAMES = ("pathmnist", "chestmnist", "dermamnist", "octmnist", "pneumoniamnist", "retinamnist", "breastmnist",
         "bloodmnist", "tissuemnist", "organamnist", "organcmnist", "organsmnist")
SPLITS = ("train", "val", "test")
SIZES = (28, 64, 128, 224)
UNREADABLE = (ValueError, OSError, EOFError, KeyError, TypeError, SyntaxError, MemoryError, NotImplementedError, RuntimeError,
              struct.error, zipfile.BadZipFile, zlib.error)  # what numpy and zipfile meet foreign bytes with
DEMO = Path(__file__).parent / "assets" / "demo.npz"  # cells that the DDPM drew: see README.md


def name(text):
    """argparse type of --data: a 2-D MedMNIST name, "demo" or the path of an .npz file."""
    if text.endswith("mnist3d"):
        raise argparse.ArgumentTypeError(f"{text} is a 3-D set; the 2-D sets are {', '.join(NAMES)}")
    if text not in (*NAMES, "demo") and not text.endswith(".npz"):
        raise argparse.ArgumentTypeError(f"no data set is called {text!r}; use demo, a path that ends in .npz or one of {', '.join(NAMES)}")
    return text


def locate(data, root=None, size=28):
    """The .npz file of a data set: the path itself, the demo's, or <root>/<name>[_<size>].npz with root from the argument,
    $MEDMNIST_ROOT or ~/.medmnist. Downloads a named set that is not there (md5 checked by the medmnist package).
    Raises FileNotFoundError where there is neither file nor network."""
    if data.endswith(".npz") or data == "demo":
        path = DEMO if data == "demo" else Path(data)
        if not path.is_file():
            raise FileNotFoundError(f"no data file at {path}")
        return path
    root = Path(root or os.environ.get("MEDMNIST_ROOT") or Path.home() / ".medmnist").expanduser()
    path = root / (f"{data}.npz" if size == 28 else f"{data}_{size}.npz")
    if not path.is_file():
        download(data, path, size)
    return path


def download(data, path, size):
    """Fetch a named set with the medmnist package; it appears at `path` only when it is whole."""
    import medmnist  # here alone: reading a local file needs numpy only
    info = medmnist.INFO[data]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as tmp:
            getattr(medmnist, info["python_class"])(split="train", root=tmp, download=True, size=size)
            os.replace(Path(tmp) / path.name, path)
    except Exception as error:  # no network, a proxy's page, a wrong md5, no space: the user's next step is the same
        url = info["url"] if size == 28 else info[f"url_{size}"]
        raise FileNotFoundError(f"no file at {path}, and the download from {url} failed "
                                f"({type(error).__name__}); fetch it by hand and put it there, or point --root at its folder") from error


def load(data="bloodmnist", root=None, split="all", size=28):
    """Read a MedMNIST set.

    data: a name of NAMES or the path of an .npz file with the keys {train,val,test}_{images,labels}.
    split: "train", "val", "test" or "all" (the three in this order). size: the side of a named set's images, one of SIZES.
    Returns images uint8 (N, C, H, W), C 1 or 3, and labels int64 (N,). The multi-label ChestMNIST gets the number of
    its first finding, from 1, or 0 for none. Raises ValueError where the file is not such a set.
    """
    try:
        name(data)
    except argparse.ArgumentTypeError as error:
        raise ValueError(str(error)) from None
    path = locate(data, root, size)
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
        if images.shape[1] != images.shape[2] or images.shape[1] not in range(16, 257, 4):
            raise ValueError(f"images are {images.shape[1]} x {images.shape[2]}, not square with a side of 16 to 256 in steps of 4")
        if labels.ndim == 2 and labels.shape[1] > 1:
            labels = np.where(labels.any(1), labels.argmax(1) + 1, 0)
        if labels.size != len(images) or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() > 999:
            raise ValueError(f"labels are {labels.dtype} {labels.shape}, not one whole number from 0 to 999 an image")
    except UNREADABLE as error:
        raise ValueError(f"{path} is not a readable MedMNIST file: {error}; delete it to have it fetched again") from error
    images = torch.from_numpy(images.reshape(*images.shape[:3], -1)).permute(0, 3, 1, 2).contiguous()
    return images, torch.from_numpy(labels.reshape(-1).astype(np.int64))


def check_zip(path):
    """Raises ValueError where a part of a zip file is damaged: torch.load reads its .pt files without a look at their checksums."""
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()
        if damaged:
            raise ValueError(f"{damaged} in it is damaged")


def class_number(text, data, classes):
    """The number of a class of `classes` from itself or from its MedMNIST name (its first letters will do, if no other has
    them). Raises argparse.ArgumentTypeError."""
    names, data = {}, "bloodmnist" if data == "demo" else data
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
    order = torch.randperm(len(images), generator=generator).to(images.device)
    turns = (torch.rand(3, len(images), generator=generator) < 0.5).to(images.device) if augment else None
    for i in range(0, len(images), batch_size):
        chosen = order[i:i + batch_size]
        x = images[chosen]
        if augment:
            across, down, swap = turns[:, i:i + batch_size, None, None, None]
            x = torch.where(across, x.flip(3), x)
            x = torch.where(down, x.flip(2), x)
            x = torch.where(swap, x.transpose(2, 3), x)
        x = x.contiguous(memory_format=torch.channels_last)
        yield x if labels is None else (x, labels[chosen])


def plain_batches(images, batch_size, generator, augment, labels):
    """batches() the way a tutorial does it, to measure what that costs: PIL images one by one through a torch DataLoader."""
    from torchvision import transforms
    turns = [transforms.RandomHorizontalFlip(), transforms.RandomVerticalFlip()] if augment else []
    transform = transforms.Compose([transforms.ToPILImage(), *turns, transforms.PILToTensor()])
    pairs = [(image, label) for image, label in zip(images.cpu(), labels.cpu())]
    for x, y in torch.utils.data.DataLoader(pairs, batch_size, shuffle=True, generator=generator,
                                            collate_fn=lambda batch: (torch.stack([transform(x) for x, _ in batch]), torch.stack([y for _, y in batch]))):
        yield x.to(images.device), y.to(images.device)


# ---------------------------------------------------------------------------------------------------------------------
# Files that are written: whole or not at all.

RANK = int(os.environ.get("RANK", 0))  # of torchrun's processes the first alone writes


def save(path, write):
    """write(file) into a temporary file, which takes the name only when it is whole and on the disk."""
    if RANK:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(path.name + ".tmp")
    try:
        with open(tmp, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    except RuntimeError as error:  # torch.save hides the disk's error behind one of its own
        raise error.__context__ if isinstance(error.__context__, OSError) else error
    finally:
        tmp.unlink(missing_ok=True)


def read_checkpoint(path, script, hint):
    """The checkpoint that `script` wrote; weights_only, so that no file can run code. Raises FileNotFoundError with the hint
    where there is none, ValueError where it is damaged or another script's."""
    try:
        check_zip(path)
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        if ckpt["script"] != script:
            raise ValueError(f"{ckpt['script']}.py wrote it")
        return ckpt
    except FileNotFoundError:
        raise FileNotFoundError(f"no checkpoint at {path}; {hint}") from None
    except Exception as error:  # torch.load meets foreign bytes with a dozen types
        raise ValueError(f"{path} is not a checkpoint of {script}.py: {(str(error) or repr(error)).splitlines()[0]}") from None


def save_samples(folder, batches, shape, labels=None):
    """samples.npz, from batches (B, C, H, W) that make up uint8 images of `shape` (N, C, H, W): each is written as it comes, so
    memory does not grow with N. And samples.png, the first 64; with labels (N,) of several classes, eight of each in a row."""
    if RANK:  # draws along and writes nothing
        for _ in batches:
            pass
        return
    n, c, h, w = shape
    rows = labels is not None and len(labels.unique()) > 1
    shown = torch.cat([(labels == k).nonzero()[:8, 0] for k in labels.unique()]).sort()[0] if rows else torch.arange(min(n, 64))
    images = []

    def write(file):
        done = 0
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            with archive.open("images.npy", "w", force_zip64=True) as part:
                np.lib.format.write_array_header_1_0(part, {"descr": "|u1", "fortran_order": False, "shape": (n, h, w, c)})
                for batch in batches:
                    part.write(batch.permute(0, 2, 3, 1).contiguous().numpy())
                    images.append(batch[shown[(shown >= done) & (shown < done + len(batch))] - done])
                    done += len(batch)
            if labels is not None:
                with archive.open("labels.npy", "w", force_zip64=True) as part:
                    np.lib.format.write_array(part, labels[:, None].numpy())
    save(folder / "samples.npz", write)
    save_grid(folder / "samples.png", torch.cat(images), labels[shown] if rows else None)


def save_grid(path, images, labels=None):
    """A .png of up to 64 uint8 images, enlarged; with labels, up to eight of each class in a row of their own."""
    if labels is not None:
        rows = [images[labels == k][:8] for k in labels.unique()]
        images = torch.cat([torch.cat([row, row.new_full((8 - len(row), *row.shape[1:]), 255)]) for row in rows])
    grid = make_grid(images if labels is not None else images[:64], 8, padding=1, pad_value=255).permute(1, 2, 0).numpy()
    save(path, lambda file: Image.fromarray(grid).resize((3 * grid.shape[1], 3 * grid.shape[0]), Image.Resampling.NEAREST).save(file, "PNG"))


def save_log(folder, names, rows):
    """log.csv, a row an epoch."""
    lines = [("epoch", *names, "seconds", "images/s"), *((f"{v:.6g}" if isinstance(v, float) else str(v) for v in row) for row in rows)]
    save(folder / "log.csv", lambda file: file.write("".join(",".join(line) + "\n" for line in lines).encode()))


def save_curve(folder, names, rows):
    """loss.png of the same rows, where matplotlib is found."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    axes = Figure(figsize=(6, 4)).add_subplot(xlabel="epoch")
    for k, values in zip(names, list(zip(*rows))[1:]):
        axes.plot([row[0] for row in rows], values, label=k)
    axes.legend()
    save(folder / "loss.png", lambda file: axes.figure.savefig(file, format="png"))


# ---------------------------------------------------------------------------------------------------------------------
# The command line.

def number(kind, low, high=math.inf):
    """argparse type: an int or a float from low to high."""
    def parse_number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)
    parse_number.__name__ = kind.__name__
    return parse_number


def device(text):
    """argparse type: a device that this machine has; auto is the best of them."""
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"no device {text!r} here: {(str(error) or repr(error)).splitlines()[0]}") from None


def command(main):
    """Runs main(). What a user can cause ends with one line: exit code 2 for bad usage, 1 for failure, 130 for Ctrl-C."""
    script = Path(sys.argv[0]).name
    try:
        main()
    except argparse.ArgumentTypeError as error:  # a --label that only the model can tell wrong
        print(f"{script}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"{script}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
