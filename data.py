"""The loader: a MedMNIST set, an .npz or a folder of pictures in; samples and checkpoints out.

    images, labels, names = data.load("bloodmnist")     # uint8 (17092, 3, 28, 28), int64 (17092,), 8 names
    for x, y in data.batches(images, labels, 128): ...  # uint8 (128, 3, 28, 28), int64 (128,): one epoch
"""
import argparse
import contextlib
import hashlib
import io
import os
import re
import shutil
import sys
import tempfile
import time
import unicodedata
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

NAMES = ("pathmnist", "chestmnist", "dermamnist", "octmnist", "pneumoniamnist", "retinamnist", "breastmnist",
         "bloodmnist", "tissuemnist", "organamnist", "organcmnist", "organsmnist")
SPLITS = ("train", "val", "test")
SPELLINGS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
             "test": "test", "testing": "test"}
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".webp")
LEFT = ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", "Thumbs.db", "desktop.ini")
SAVE_EVERY = 60  # seconds between the checkpoints of a training
DEMO = Path(__file__).parent / "assets" / "demo.npz"  # synthetic cells, samples of a DDPM


class Error(ValueError):
    """What a user can cause and mend: one line. code: the exit code, 2 for bad usage, 1 for a failure."""

    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


# ---- images in ----

def load(source="bloodmnist", root=None, split="all", size=None):
    """Images uint8 (N, C, H, W), C 1 or 3, labels int64 (N,) and the names of the classes, a list.

    source: a 2-D MedMNIST name (Yang et al., 2023), "demo", an .npz or a folder of pictures, a subfolder a
    class. root: folder of the named sets, else $MEDMNIST_ROOT, else ~/.medmnist. split: "train", "val",
    "test" or "all". size: side of the images; None: 28, or what an .npz has; 0: pictures at their own size.
    Of an image's several findings (ChestMNIST) the first counts, from 1. Raises Error."""
    choose("split", split, (*SPLITS, "all"))
    if size and size not in range(16, 257, 4):
        raise Error(f"--size {size}: it can be 16, 20 .. 256")
    if source not in (*NAMES, "demo", "") and Path(source).is_dir():
        return load_folder(Path(source), split, 28 if size is None else size)
    path = locate(source, root, size or 28)
    try:
        with np.load(path, allow_pickle=False) as file:
            if split == "all" and "images" in file:  # samples.npz, which has no splits
                x = [file["images"]]
                y = [file["labels"] if "labels" in file else np.zeros(len(x[0]), int)]
            else:
                if "images" in file:
                    raise Error(f"--split {split}: {path} has no parts; --split all")
                parts = SPLITS if split == "all" else (split,)
                x, y = ([file[f"{part}_{kind}"] for part in parts] for kind in ("images", "labels"))
            names = file["class_names"].reshape(-1).astype(str).tolist() if "class_names" in file else []
        x, y, several = check_arrays(x, y, source in NAMES)
    except (Error, MemoryError):
        raise
    except Exception as error:  # numpy and zipfile raise a dozen types for a broken file
        advice = "delete it to have it fetched again" if source in NAMES else \
            f"a set has the keys {', '.join(f'{s}_images, {s}_labels' for s in SPLITS)}, or images, labels"
        raise Error(f"{path} is not a readable MedMNIST file: {one_line(error)}; {advice}", 1) from error
    if size and x.shape[1] != size:
        raise Error(f"--size {size}: {path} holds images of {x.shape[1]} x {x.shape[1]}")
    if source in NAMES:
        from medmnist import INFO  # here alone: it takes seconds
        names = ["none"] * several + [*INFO[source]["label"].values()]  # none: without any finding
    names = names or [str(k) for k in range(y.max() + 1)]
    if not len(set(names)) == len(names) > y.max():
        raise Error(f"{path}: class_names {names} do not name each of its classes, 0 to {y.max()}", 1)
    return channels_first(x), torch.from_numpy(y), names


def check_arrays(x, y, findings):
    """Lists of arrays -> images uint8 (N, S, S[, C]), labels int64 (N,), and whether an image has several
    labels: findings, of a MedMNIST set."""
    shapes = ", ".join(f"{name} " + ", ".join(f"{a.dtype} {a.shape}" for a in part)
                       for name, part in (("images", x), ("labels", y)))
    fit = len({a.shape[1:] for a in x}) == 1 and all(len(a) == len(b) for a, b in zip(x, y, strict=True))
    if fit:
        x, y = (arrays[0] if len(arrays) == 1 else np.concatenate(arrays) for arrays in (x, y))
    several = fit and findings and y.ndim == 2 and y.shape[1] > 1
    if several:
        y = np.where(y.any(1), y.argmax(1) + 1, 0)
    if not (fit and x.dtype == np.uint8 and x.ndim in (3, 4) and x.shape[3:] in ((), (1,), (3,)) and x.size
            and x.shape[1] == x.shape[2] and x.shape[1] in range(16, 257, 4)
            and y.size == len(x) and y.dtype.kind in "iu" and 0 <= y.min() <= y.max() <= 999):
        raise ValueError(f"{shapes}, not uint8 N x S x S (x 3), S 16, 20 .. 256, a label below 1000 each")
    return x, y.reshape(-1).astype(np.int64), several


def channels_first(x):
    """An array (N, H, W[, C]) as a tensor (N, C, H, W), which stays channels last in memory."""
    return torch.from_numpy(x.reshape(*x.shape[:3], -1)).permute(0, 3, 1, 2)


def locate(source, root=None, size=28):
    """The .npz file of a set: itself or <root>/<name>[_<size>].npz, which medmnist fetches."""
    if source not in NAMES:
        path = DEMO if source == "demo" else Path(source)
        if path.suffix != ".npz":
            raise Error(f"{str(source)!r} is no .npz, no folder, not demo and not one of {', '.join(NAMES)}")
        if not path.is_file():
            raise Error(f"no file at {path}", 1)
        return path
    if size not in (28, 64, 128, 224):
        raise Error(f"--size {size}: MedMNIST has 28, 64, 128 and 224")
    root = Path(root or os.environ.get("MEDMNIST_ROOT") or os.path.expanduser("~/.medmnist"))
    path = root / (f"{source}.npz" if size == 28 else f"{source}_{size}.npz")
    if not path.is_file():
        import medmnist
        info = medmnist.INFO[source]
        try:
            with tempfile.TemporaryDirectory() as tmp:  # it appears at `path` only when it is whole
                getattr(medmnist, info["python_class"])(split="train", root=tmp, download=True, size=size)
                with open(Path(tmp) / path.name, "rb") as whole, atomic(path) as file:
                    shutil.copyfileobj(whole, file)
        except Exception as error:  # no network, a wrong md5, no space: the user's next step is the same
            url = info["url" if size == 28 else f"url_{size}"]
            raise Error(f"no file at {path}, and the download from {url} failed ({one_line(error):.60}); "
                        "put it there, or name its folder with --root", 1) from error
    return path


def load_folder(folder, split, size):
    """load() of <class>/, of <split>/<class>/, or of pictures alone. Without splits, a hash of each picture's
    name and folder makes them: a tenth is val, a fifth is test."""
    below = subfolders(folder)
    for place in (folder, *(folder / name for name in below)):
        if any((place / name).exists() for name in ("ckpt.pt", "model.pt", "samples.npz")):
            raise Error(f"{place} holds a run: name its samples.npz, or its folder samples")
    parts = {folder / name: SPELLINGS[name.lower()] for name in below if name.lower() in SPELLINGS}
    if parts and len(parts) < len(below):
        others = ", ".join(name for name in below if folder / name not in parts)
        raise Error(f"{folder}: {others} lies beside its splits {', '.join(part.name for part in parts)}")
    parts = parts or {folder: None}
    names = sorted({name for part in parts for name in subfolders(part)})
    if len({unicodedata.normalize("NFC", name).casefold().strip() for name in names}) < len(names):
        raise Error(f"{folder}: some of its classes differ in spelling only: {', '.join(names)}")
    files, others = [], Counter()
    for place in {folder, *parts}:
        beside = [f.name for f in place.iterdir() if f.is_file() and not hidden(f.name)]
        loose = sum(map(is_picture, beside))
        if loose and (names or place not in parts):
            raise Error(f"{place}: {loose} pictures lie loose beside its subfolders; move them into a class")
        others.update(Path(name).suffix.lower() or "without an ending" for name in beside if names)
    for name in names if None in parts.values() else ():
        if deep := [sub for sub in subfolders(folder / name) if sub.lower() in SPELLINGS]:
            raise Error(f"{folder / name} holds {deep[0]}: splits go above the classes, {deep[0]}/{name}")
    for part, of in parts.items():
        for path, k in list_files(part, names or ["."]):
            if not is_picture(path):
                others[Path(path).suffix.lower() or "without an ending"] += 1
            elif split in ("all", of or part_of(path)):
                files.append((Path(path), k))
    if others:
        print(f"{folder}: not read: {', '.join(f'{n} {end}' for end, n in others.items())}", file=sys.stderr)
    if not files:
        raise Error(f"{folder} holds no pictures ({', '.join(PICTURES)}) of split {split}", 1)
    images = read_pictures(folder, [path for path, _ in files], size)
    return images, torch.tensor([k for _, k in files]), names or ["all"]


def subfolders(folder):
    found = [f for f in folder.iterdir() if not hidden(f.name)]
    if lost := [f for f in found if not f.exists()]:
        raise Error(f"{lost[0]} is a link to nothing; remove it, or mend it", 1)
    return sorted(f.name for f in found if f.is_dir())


def hidden(name):
    """What systems and notebooks leave: .DS_Store, ._x.png, .ipynb_checkpoints, a NAS's thumbnails, .."""
    return name.startswith(".") or name in LEFT


def is_picture(name):
    return Path(name).suffix.lower() in PICTURES and not hidden(Path(name).name)


def list_files(folder, names):
    """[(path, class)] of a folder's files: links followed, each file once a class, no hidden ones."""
    def stop(error):  # a folder that may not be read, which os.walk would leave out
        if not isinstance(error, FileNotFoundError):  # a split need not have every class
            raise error

    found = []
    for k, name in enumerate(names):
        start = os.path.realpath(folder / name)
        seen = {start}

        def first_visit(path, start=start, seen=seen):
            real = os.path.realpath(path)
            known = real in seen or hidden(os.path.basename(path)) or Path(start).is_relative_to(real)
            seen.add(real)
            return not known

        for place, below, files in os.walk(folder / name, onerror=stop, followlinks=True):
            below[:] = [sub for sub in sorted(below) if first_visit(os.path.join(place, sub))]
            paths = [os.path.join(place, file) for file in sorted(files)]
            found += [(path, k) for path in paths if first_visit(path)]
    return found


def part_of(path):
    """The split of a picture, by a hash of the last folder and its name: other pictures may come and go, and
    cells/neutrophil alone has the parts that it has in cells."""
    name = "/".join(Path(os.path.abspath(path)).parts[-2:])
    n = int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:4], "big") % 10
    return "val" if n == 0 else "test" if n < 3 else "train"


def read_pictures(folder, files, size):
    """uint8 (N, C, H, W): centre squares, resized with MedMNIST's filter, or, with size 0, as they are."""
    images, bad, peaks = [], [], []
    for path in progress(files, f"reading {folder}"):
        try:
            image = read_picture(path)
        except Error as error:
            bad.append(str(error))
            continue
        peaks += [image.info["peak"]] if "peak" in image.info else []
        if size:
            side = min(image.size)
            left, top = ((n - side) // 2 for n in image.size)
            square = image.crop((left, top, left + side, top + side))
            image = square.resize((size, size), Image.Resampling.BICUBIC)
        images.append(image)
    if bad:
        more = f"; and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise Error(f"{len(bad)} of {len(files)} pictures cannot be used: {'; '.join(bad[:10])}{more}", 1)
    if peaks and max(peaks) < 2 ** 14:
        raise Error(f"{folder}: no value of its 16-bit pictures is above {max(peaks)} of 65535, they would "
                    "be too dark; multiply 12-bit values by 16, 14-bit ones by 4, or save with 8 bits", 1)
    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        two = " and ".join(f"{w} x {h}" for w, h in sizes[:2])
        raise Error(f"{folder} holds pictures of {len(sizes)} sizes, as {two}; --size 28 makes them alike")
    mode = "L" if all(image.mode == "L" for image in images) else "RGB"
    return channels_first(np.stack([np.asarray(image.convert(mode)) for image in images]))


def read_picture(path):
    """A picture, upright, as PIL has it: "L" or "RGB", 8 bits a channel. Raises Error for all else."""
    try:
        with Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise ValueError(f"{image.n_frames} frames, of which one would be read; save each as a file")
            if image.mode.startswith("I;16"):  # PIL's own conversion would clip all above 255 to white
                if getattr(image, "tag_v2", {}).get(262) == 0:
                    raise ValueError("a 16-bit TIFF whose 0 is white; save it with 0 for black")
                values = np.asarray(ImageOps.exif_transpose(image))
                image = Image.fromarray((values / 257).round().astype(np.uint8))
                image.info["peak"] = int(values.max())
                return image
            if ";16" in str(image.tile):  # 16-bit colours, of which PIL gives the high byte
                image.info["peak"] = 256 * max(high for _, high in image.getextrema()) + 255
            if image.mode in "IF" or image.convert("RGBA").getextrema()[3][0] < 255:
                raise ValueError("32-bit values or transparency, whose look is not certain")
            upright = ImageOps.exif_transpose(image).convert("L" if image.mode in ("1", "L", "LA") else "RGB")
            upright.info |= {k: v for k, v in image.info.items() if k == "peak"}
            return upright
    except Exception as error:  # Pillow raises a dozen types for a broken file
        raise Error(f"{path} is not a usable picture: {one_line(error)}", 1) from None


def describe(images, labels, names):
    """What a set is, by which --resume knows it: classes and counts, shape, a hash of pixels and labels."""
    sha = hashlib.sha256(images.permute(0, 2, 3, 1).contiguous().numpy())
    sha.update(labels.numpy())
    counts = labels.bincount(minlength=len(names)).tolist()
    return {"classes": dict(zip(names, counts, strict=True)), "shape": [*images.shape[1:]],
            "sha256": sha.hexdigest()}


def validation_part(source, root, split, size, training, n_classes):
    """[images, labels] of the val part, where a training on images of split "train" leaves one, else []. A
    twelfth of their number at most: the loss on them takes less than 3 % of an epoch."""
    if split != "train":
        return []
    try:
        images, labels, _ = load(source, root, "val", size)
        if images.shape[1:] != training.shape[1:] or labels.max() >= n_classes:
            raise Error("the val part has images of another shape, or more classes")
    except Error as error:
        print(f"no validation loss: {error}")
        return []
    step = -(-len(images) // max(1, len(training) // 12))  # some of each class of a folder
    return [images[::step], labels[::step]]


# ---- batches and labels ----

def n_batches(n, batch_size):
    """Batches in an epoch of n images. A last batch of one joins the one before: BatchNorm needs two."""
    whole, rest = divmod(n, batch_size)
    return max(1, whole + (rest > 1))


def batches(images, labels, batch_size, augment=False, balance=0.0):
    """One epoch in an order of torch's random state: images (B, C, H, W), channels last, and labels (B,).

    augment: each image in one of the square's eight flips and quarter turns (a cell has no up or left).
    balance: 0: every image once. Else as many images, drawn with replacement: a class of n images as often as
    n ** (1 - balance), so that at 1 all classes are as frequent."""
    n, device = len(images), images.device
    if balance:
        of = labels.cpu()
        order = of.bincount().double().pow(-balance)[of].multinomial(n, replacement=True).to(device)
    else:
        order = torch.randperm(n).to(device)
    turns = (torch.rand(3, n, 1, 1, 1) < 0.5).to(device)
    starts = range(0, n, batch_size)[:n_batches(n, batch_size)]
    for start, stop in zip(starts, [*starts[1:], n], strict=True):
        part = slice(start, stop)
        x = images[order[part]]
        if augment:
            across, down, swap = turns[:, part]
            x = torch.where(across, x.flip(3), x)
            x = torch.where(down, x.flip(2), x)
            x = torch.where(swap, x.transpose(2, 3), x)
        yield x.contiguous(memory_format=torch.channels_last), labels[order[part]]


def draw_labels(classes, n, label=None, seed=0):
    """The classes of n samples, int64 (n,), or None where a model has none. classes: {name: training images}.

    label: None for the proportions of the training data; a class's number, name or first letters; or n of
    them: a list, an array or a tensor, (n,) or (n, 1). Raises Error."""
    if n < 1:
        raise Error(f"{n} samples: it can be 1 or more")
    if label is None:
        if not classes:
            return None
        counts = torch.tensor([*classes.values()]).float()
        return counts.multinomial(n, True, generator=torch.Generator().manual_seed(int(seed)))
    if not classes:
        raise Error(f"label {label}: the model was trained without --classes")
    label = np.asarray(label.cpu() if torch.is_tensor(label) else label)
    label = label.astype(str) if label.dtype == object else label  # a column of names
    if label.dtype.kind not in "iuU" or label.size not in (1, n) or label.ndim > 2:
        raise Error(f"label: {label.dtype} {label.shape}, not one class or {n} of them, by number or name")
    found = {one: find_class(classes, one) for one in set(label.reshape(-1).tolist())}
    return torch.tensor([found[one] for one in label.reshape(-1).tolist()]).expand(n).clone()


def find_class(classes, label):
    """A class's number: an exact name goes before a number, a number before a name's first letters."""
    seen = [(k, name) for k, (name, count) in enumerate(classes.items()) if count]
    ways = [lambda k, name: name == label, lambda k, name: str(k) == str(label),
            lambda k, name: name.lower().startswith(str(label).lower()) and label != ""]
    for way in ways:
        if found := [(k, name) for k, name in seen if way(k, name)]:
            break
    if len(found) != 1:
        raise Error(f"label {label}: it can be {' or '.join(f'{k} {name}' for k, name in found or seen)}")
    return found[0][0]


# ---- files out, and checkpoints in ----

def processes():
    """(rank, number) of torchrun's processes, of which the first alone writes; (0, 1) where there is one."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if several else (0, 1)


@contextlib.contextmanager
def atomic(path):
    """A binary file to write, which takes the name `path` only when it is whole and on the disk."""
    if processes()[0]:
        yield io.BytesIO()
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(tmp, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace(tmp, path)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError):  # torch.save hides a full disk and Ctrl-C behind one of its own
            error = error.__context__ or error
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise error from None
    finally:
        tmp.unlink(missing_ok=True)


def check_outside(path, source):
    """Raises Error where a file or folder to be written lies in `source`, a folder of pictures."""
    own = source not in (*NAMES, "demo", "") and Path(source).is_dir()
    if own and path.resolve().is_relative_to(Path(source).resolve()):
        raise Error(f"{path} lies in {source}, where it would become data; name another place")


def check_out(folder, source):
    """Raises Error where a run in `folder` would become part of `source`, a set that is read, or replace it.
    source: "" where none is read."""
    check_outside(folder, source)
    path, out = Path(source).resolve(), folder.resolve()
    if source and path.exists() and (path == out / "samples.npz" or path.is_relative_to(out / "samples")):
        raise Error(f"--out {folder} would replace --data {source}; name another --out")


def check_samples(folder):
    """Raises Error where samples/ holds what save_samples() has not written, before it is replaced."""
    for path in (folder / "samples").rglob("*"):
        if path.is_file() and not hidden(path.name) and not re.fullmatch(r"\d{6,}\.png", path.name):
            raise Error(f"--out {folder} would replace {path}, which is no sample; name another --out")


def remove(path):
    """A file or a folder, if it is there."""
    if processes()[0]:
        return
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def replace(tmp, path):
    """os.replace, which Windows refuses while a viewer holds the file: a log or a picture can wait."""
    for _ in range(10):
        try:
            return os.replace(tmp, path)
        except PermissionError:
            time.sleep(0.1)
    if path.suffix not in (".csv", ".png"):
        return os.replace(tmp, path)
    print(f"{path} is held by another program and was not refreshed", file=sys.stderr)


def read_torch(path):
    """A file of torch.save, read so that it can run no code. Raises Error for other and for damaged files."""
    try:
        if not zipfile.is_zipfile(path):
            raise Error(f"{path} is damaged, or no checkpoint at all" if Path(path).is_file() else
                        f"no file at {path}", 1)
        with zipfile.ZipFile(path) as file:  # torch.load does not look at the checksums
            if damaged := file.testzip():
                raise Error(f"{path} is damaged at {damaged}", 1)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Error:
        raise
    except Exception as error:  # torch.load raises a dozen types for a broken file
        if out_of_memory(error):
            raise
        raise Error(f"{path} is no checkpoint: it is damaged, or holds more than tensors and settings",
                    1) from None


def save_grid(path, rows, across=8):
    """A .png of {title: uint8 images (N, C, H, W)}, `across` in a line. The titles stand at the left, without
    what is in brackets."""
    side = next(iter(rows.values())).shape[2]
    zoom = max(1, 84 // side)
    cell = side * zoom + 3
    pen = ImageDraw.Draw(Image.new("L", (1, 1)))
    titles = [" ".join(title.split("(")[0].split()) for title in rows]
    left = max(int(pen.textlength(title)) for title in titles)
    left += 12 * bool(left)
    lines = [-(-len(images) // across) for images in rows.values()]
    sheet = Image.new("RGB", (left + across * cell, sum(lines) * cell), "white")
    top = 0
    for title, n_lines, images in zip(titles, lines, rows.values(), strict=True):
        middle = top + n_lines * cell // 2
        ImageDraw.Draw(sheet).text((4, middle - 6), title, fill="black")
        for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
            image = ImageOps.scale(Image.fromarray(image.squeeze()), zoom, Image.Resampling.NEAREST)
            sheet.paste(image, (left + i % across * cell, top + i // across * cell))
        top += n_lines * cell
    with atomic(path) as file:
        sheet.save(file, "PNG")


def sample_rows(images, labels=None, names=()):
    """The rows of a sheet: the first 64 images, or eight of each class."""
    if labels is None or len(labels.unique()) == 1:
        return {"": images[:64]}
    return {names[k]: images[labels == k][:8] for k in labels.unique().tolist()}


def save_samples(folder, images, labels=None, names=(), png=False):
    """samples.npz (images (N, H, W, C), labels (N, 1), class_names), samples.png and, with png,
    samples/<class>/<number>.png, which replace those of an earlier call."""
    pixels, extra = images.permute(0, 2, 3, 1).numpy(), {}
    if labels is not None:
        extra = {"labels": labels[:, None].numpy(), "class_names": np.array(names)}
    new, old, places = folder / "samples.tmp", folder / "samples", folder_names(names)
    remove(new)  # of a call that was killed
    for i, x in enumerate(pixels if png else ()):
        kind = "." if labels is None else places[labels[i]]
        (new / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(x.squeeze()).save(new / kind / f"{i:06}.png")
    remove(old)  # first: no kill leaves pictures of one call beside the arrays of another
    with atomic(folder / "samples.npz") as file:
        np.savez_compressed(file, images=pixels, **extra)
    save_grid(folder / "samples.png", sample_rows(images, labels, names))
    if png:
        os.replace(new, old)


def folder_names(names):
    """Of classes: without what a file system may refuse. Two that would be the same get their numbers."""
    plain = [re.sub(r"[^\w +.-]", "-", name).strip(" .") or "class" for name in names]
    times = Counter(name.casefold() for name in plain)
    return [name if times[name.casefold()] == 1 else f"{name} {k}" for k, name in enumerate(plain)]


# ---- what the command lines share ----

class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):  # no "(default: None)"
        plain = action.default is None or action.default is False
        return action.help if plain else super()._get_help_string(action)


def refuse(message):
    """In the place of a parser's error(): one line, not the list of all flags."""
    raise Error(f"{message}; --help lists the flags")


def number(kind, low, high=sys.float_info.max):
    """argparse type: an int or a float from low to high."""
    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)
    parse.__name__ = {int: "whole number", float: "number"}[kind]  # as argparse calls it in its errors
    return parse


def choose(name, value, choices):
    """Raises Error for a value that is none of the choices."""
    if value not in choices:
        raise Error(f"{name} {value!r}: choose from {', '.join(map(str, choices))}")


def device(text="auto"):
    """argparse type: a device that this machine has; auto is the best of them."""
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"no device {text!r} here: {one_line(error)}") from None


def bf16(device, dtype="auto"):
    """Whether the networks compute in bf16: where dtype says so; auto: where that is faster than fp32."""
    choose("dtype", dtype, ("auto", "fp32", "bf16"))
    if dtype != "auto" or device.type not in ("cuda", "cpu"):
        return dtype == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch cannot tell
    amd = "AMD" in cpu.get("cpu_name", "")                # an Intel with AVX-512 alone is slower in bf16
    return bool(cpu.get("amx_bf16") or amd and cpu.get("avx512_bf16"))


def autocast(device, dtype="auto"):
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16(device, dtype))


def progress(steps, title):
    """tqdm: a bar on a terminal, a line a minute elsewhere."""
    elsewhere = {} if sys.stderr.isatty() else {
        "delay": 60, "mininterval": 60, "bar_format": "{desc}: {percentage:.0f} %, {remaining} left\n"}
    return tqdm(steps, title, leave=False, **elsewhere)


def out_of_memory(error):
    """Whether it says that memory is short, of which torch on a CPU speaks in a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def one_line(error):
    return (str(error).strip() or repr(error)).splitlines()[0]


def command(main):
    """Runs main(). What a user can cause ends in one line, a bug in a traceback; exit 130 after Ctrl-C."""
    script = Path(sys.argv[0]).name
    warnings.formatwarning = lambda message, *args: f"{message}\n"
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # where a terminal has no ±
    try:
        main()
        sys.stdout.flush()
        return
    except Error as error:
        message, code = error, error.code
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        message, code = f"{one_line(error)}; smaller batches, images and sets need less memory", 1
    except BrokenPipeError:  # `| head` has read enough; what python writes at its end shall go nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        message, code = "stopped, since its output was closed", 1
    except OSError as error:
        if not error.filename:
            raise
        message, code = f"{error.filename}: {error.strerror}", 1
    except KeyboardInterrupt as error:
        message, code = str(error) or "stopped", 130
    print(f"{script}: {message}", file=sys.stderr)
    sys.exit(code)
