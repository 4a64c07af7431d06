"""A tiny loader: a MedMNIST set, an .npz or a folder of pictures in; samples and checkpoints out.

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
import time
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
SAVE_EVERY = 60  # seconds between the checkpoints of a training
DEMO = Path(__file__).parent / "assets" / "demo.npz"  # synthetic cells, samples of a DDPM


class Error(ValueError):
    """What a user can cause and mend: one line. code: 2 for bad usage, 1 for a failure."""

    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


# ---- images in ----

def load(source="bloodmnist", root=None, split="all", size=None):
    """Images uint8 (N, C, H, W), C 1 or 3, labels int64 (N,) and the names of the classes, a list.

    source: a 2-D MedMNIST name (Yang et al., 2023), "demo", an .npz file or a folder of pictures, a subfolder a
    class. root: the folder of named sets, else $MEDMNIST_ROOT, else ~/.medmnist. split: "train", "val", "test"
    or "all". size: the side of the images. None: 28, or what an .npz has; 0: pictures at their own size.
    Of several findings (ChestMNIST) the first counts, from 1. Raises Error."""
    choose("split", split, (*SPLITS, "all"))
    if source not in (*NAMES, "demo") and Path(source).is_dir():
        return load_folder(Path(source), split, 28 if size is None else size)
    path = locate(source, root, size or 28)
    try:
        with np.load(path, allow_pickle=False) as file:
            whole = "images" in file and split == "all"  # samples.npz, which has no splits
            prefixes = [""] if whole else [f"{s}_" for s in (SPLITS if split == "all" else (split,))]
            x = [file[f"{p}images"] for p in prefixes]
            y = [file[f"{p}labels"] if f"{p}labels" in file or not whole else np.zeros(len(x[0]), int)
                 for p in prefixes]
            names = file["class_names"].tolist() if "class_names" in file else []
        if not all(len(a) == len(b) for a, b in zip(x, y, strict=True)):
            raise ValueError(f"{[*map(len, x)]} images, {[*map(len, y)]} labels")
        x = x[0] if len(x) == 1 else np.concatenate(x)
        labels, several = read_labels(np.concatenate(y))
        check_array(x, labels)
    except Exception as error:  # numpy and zipfile meet foreign bytes with a dozen types
        advice = "delete it to have it fetched again" if source in NAMES else \
            f"an .npz set has the keys {', '.join(f'{s}_images, {s}_labels' for s in SPLITS)}, or images, labels"
        raise Error(f"{path} is not a readable MedMNIST file: {one_line(error)}; {advice}", 1) from error
    if size and x.shape[1] != size:
        raise Error(f"--size {size}: {path} holds images of {x.shape[1]} x {x.shape[2]}")
    if source in NAMES:
        from medmnist import INFO  # here alone: it takes seconds
        names = ["none"] * several + [*INFO[source]["label"].values()]
    classes = int(labels.max()) + 1
    if names and not len(set(names)) == len(names) >= classes:
        raise Error(f"{path}: class_names {names} do not name the {classes} classes of its labels", 1)
    x = torch.from_numpy(x.reshape(*x.shape[:3], -1)).permute(0, 3, 1, 2)  # stays channels last in memory
    return x, labels, [str(name) for name in names] or [str(k) for k in range(classes)]


def read_labels(y):
    """An array of labels, (N,), (N, 1) or (N, K) of 0 and 1 -> int64 (N,), and whether there were several."""
    several = y.ndim == 2 and y.shape[1] > 1
    if several:
        y = np.where(y.any(1), y.argmax(1) + 1, 0)
    if y.dtype.kind not in "iu" or not (y.size and 0 <= y.min() <= y.max() <= 999):
        raise ValueError(f"labels {y.dtype} {y.shape}, not a whole number from 0 to 999 each")
    return torch.from_numpy(y.reshape(-1).astype(np.int64)), several


def check_array(x, labels):
    side, other, channels = (*x.shape[1:], 1)[:3] if x.ndim in (3, 4) else (0, 1, 0)
    if not (x.dtype == np.uint8 and side == other and side in range(16, 257, 4) and channels in (1, 3)
            and len(x) == len(labels)):
        raise ValueError(f"images {x.dtype} {x.shape}, labels {tuple(labels.shape)}, not uint8 N x S x S (x 3), "
                         "S 16, 20 .. 256, and a label each")


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
    root = root or os.environ.get("MEDMNIST_ROOT")
    root = Path(root) if root else Path(os.path.expanduser("~")) / ".medmnist"
    path = root.expanduser() / (f"{source}.npz" if size == 28 else f"{source}_{size}.npz")
    if not path.is_file():
        fetch(source, path, size)
    return path


def fetch(source, path, size):
    """medmnist's download into a folder of its own, so that the file appears at `path` only when it is whole."""
    import medmnist
    info, there = medmnist.INFO[source], path.parent.is_dir()
    try:
        tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        tmp.mkdir(parents=True)
        getattr(medmnist, info["python_class"])(split="train", root=tmp, download=True, size=size)
        os.replace(tmp / path.name, path)
    except Exception as error:  # no network, a wrong md5, no space: the user's next step is the same
        url = info["url"] if size == 28 else info[f"url_{size}"]
        raise Error(f"no file at {path}, and the download from {url} failed ({one_line(error):.60}); "
                    "put it there, or name its folder with --root", 1) from error
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        if not there and path.parent.is_dir() and not any(path.parent.iterdir()):
            path.parent.rmdir()


def load_folder(folder, split, size):
    """load() of <class>/, of <split>/<class>/, or of pictures alone: centre squares, resized by MedMNIST's filter."""
    if any((folder / name).exists() for name in ("ckpt.pt", "model.pt", "samples.npz")):
        raise Error(f"{folder} holds a run: name its samples.npz, or its folder samples")
    below = subfolders(folder)
    parts = {folder / name: SPELLINGS[name.lower()] for name in below if name.lower() in SPELLINGS}
    if parts and len(parts) < len(below):
        others = ", ".join(name for name in below if folder / name not in parts)
        raise Error(f"{folder}: beside its splits ({', '.join(p.name for p in parts)}) lies {others}; move it")
    parts = parts or {folder: None}
    names = sorted({name for part in parts for name in subfolders(part)})
    files, others = [], Counter()
    for part in {folder: None} | parts:
        loose = [f for f in part.iterdir() if f.is_file() and is_picture(f, part)]
        if loose and (names or part not in parts):
            raise Error(f"{part}: {len(loose)} pictures lie loose beside the subfolders; move them into a class")
    for part, of in parts.items():
        found = list_pictures(part, names or ["."], others)
        files += [(path, k) for path, k in found if split in ("all", of or tenth(path.relative_to(folder)))]
    if others:
        print(f"{folder}: not read: {', '.join(f'{n} {end}' for end, n in others.items())}", file=sys.stderr)
    if split != "all" and None in parts.values():
        warnings.warn(f"{folder} is not split: by a hash of their names a tenth of the pictures is val, a fifth test",
                      stacklevel=3)
    if not files:
        raise Error(f"{folder} holds no pictures ({', '.join(PICTURES)}) of split {split}", 1)
    return read_pictures(folder, [f for f, _ in files], size), torch.tensor([k for _, k in files]), names or ["all"]


def subfolders(folder):
    return sorted(f.name for f in folder.iterdir() if f.is_dir() and visible(f.name))


def visible(name):
    """False for hidden files and for those that macOS adds."""
    return not name.startswith(".") and name != "__MACOSX"


def is_picture(path, folder):
    return path.suffix.lower() in PICTURES and all(map(visible, path.relative_to(folder).parts))


def list_pictures(folder, names, others):
    """[(path, class)] of a folder's classes, links followed, each picture once; counts other files by ending."""
    from torchvision.datasets import ImageFolder  # here alone: it takes seconds

    class Folder(ImageFolder):
        def find_classes(self, directory):
            return names, {name: k for k, name in enumerate(names)}

    seen = set()

    def valid(name):
        path, real = Path(name), os.path.realpath(name)
        if real in seen or not all(map(visible, path.relative_to(folder).parts)):
            return False
        seen.add(real)
        if not is_picture(path, folder):
            others[path.suffix.lower() or "without an ending"] += 1
        return is_picture(path, folder)

    found = Folder(folder, loader=read_picture, is_valid_file=valid, allow_empty=True).samples
    return [(Path(path), k) for path, k in found]


def tenth(path):
    """The split of a picture, from its own name: others may come and go."""
    n = int.from_bytes(hashlib.sha256(path.as_posix().encode()).digest()[:4], "big") % 10
    return "val" if n == 0 else "test" if n < 3 else "train"


def read_pictures(folder, files, size):
    """uint8 (N, C, H, W): centre squares of side `size`, or, with 0, whole pictures, which must be alike."""
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
        more = f"; and {len(bad) - 10} more" * (len(bad) > 10)
        raise Error(f"{len(bad)} of {len(files)} pictures cannot be used: {'; '.join(bad[:10])}{more}", 1)
    if peaks and max(peaks) < 4096:
        raise Error(f"{folder}: no value of its 16-bit pictures is above {max(peaks)} of 65535, so they would be "
                    "black; save them with 8 bits, or multiply 12-bit values by 16", 1)
    if len(sizes := {image.size for image in images}) > 1:
        raise Error(f"{folder} holds pictures of {len(sizes)} sizes, such as "
                    f"{' and '.join(f'{w} x {h}' for w, h in sorted(sizes)[:2])}; --size 28 makes them alike")
    mode = "L" if all(image.mode == "L" for image in images) else "RGB"
    x = np.stack([np.asarray(image.convert(mode)) for image in images])
    return torch.from_numpy(x.reshape(*x.shape[:3], -1)).permute(0, 3, 1, 2)


def read_picture(path):
    """A picture as PIL has it, upright, "L" or "RGB", 8 bits a channel. Raises Error for what has no such form."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16"):  # PIL's own conversion would clip all above 255 to white
                values = np.asarray(image)
                image = Image.fromarray((values / 257).round().astype(np.uint8))
                image.info["peak"] = int(values.max())
                return image
            if image.mode in "IF" or image.convert("RGBA").getextrema()[3][0] < 255:
                raise ValueError("32-bit values or transparency, whose look is not certain")
            return ImageOps.exif_transpose(image).convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    except Exception as error:  # Pillow meets foreign bytes with a dozen types
        raise Error(f"{path} is not a usable picture: {one_line(error)}", 1) from None


def describe(images, labels, names):
    """What a set is, so that --resume knows it: its classes and counts, the shape, a hash of pixels and labels."""
    sha = hashlib.sha256(images.permute(0, 2, 3, 1).contiguous().numpy())
    sha.update(labels.contiguous().numpy())
    counts = labels.bincount(minlength=len(names)).tolist()
    return {"classes": dict(zip(names, counts, strict=True)), "shape": [*images.shape[1:]], "sha256": sha.hexdigest()}


# ---- batches and labels ----

def n_batches(n, batch_size):
    """Batches of an epoch of n images. A last batch of one image joins the one before: BatchNorm needs two."""
    return max(1, -(-n // batch_size) - (batch_size > 1 and n % batch_size == 1))


def batches(images, labels, batch_size, augment=False, balance=0.0):
    """One epoch in an order of torch's random state: images (B, C, H, W), channels last, and labels (B,).

    augment: each image in one of the square's eight flips and quarter turns (a cell has no up or left).
    balance: 0: every image once. Else as many images, drawn with replacement: a class of n images as often as
    n ** (1 - balance), so that at 1 all classes are as frequent."""
    n, device = len(images), images.device
    if balance:
        weights = labels.bincount().double().pow(-balance)[labels]
        order = weights.cpu().multinomial(n, replacement=True).to(device)
    else:
        order = torch.randperm(n).to(device)
    turns = (torch.rand(3, n, 1, 1, 1) < 0.5).to(device)
    last = n_batches(n, batch_size) - 1
    for i in range(last + 1):
        part = slice(i * batch_size, (i + 1) * batch_size if i < last else n)
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
    if label is None:
        if not classes:
            return None
        counts = torch.tensor([*classes.values()]).float()
        return counts.multinomial(n, True, generator=torch.Generator().manual_seed(int(seed)))
    if not classes:
        raise Error(f"label {label}: the model was trained without --classes")
    label = np.asarray(label.cpu() if torch.is_tensor(label) else label)
    if label.dtype.kind not in "iuU" or label.size not in (1, n) or label.ndim > 2:
        raise Error(f"label: {label.dtype} {label.shape}, not one class or {n} of them, by number or name")
    found = {one: find_class(classes, one) for one in set(label.reshape(-1).tolist())}
    return torch.tensor([found[one] for one in label.reshape(-1).tolist()] * (n if label.size == 1 < n else 1))


def find_class(classes, label):
    """The number of a class: an exact name goes before a number, and a number before a name's first letters."""
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

@contextlib.contextmanager
def atomic(path):
    """A binary file to write, which takes the name `path` only when it is whole and on the disk."""
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        yield io.BytesIO()  # of torchrun's processes the first alone writes
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
    except RuntimeError as error:  # torch.save hides a full disk and Ctrl-C behind an error of its own
        cause = error.__context__
        raise cause if isinstance(cause, (OSError, KeyboardInterrupt)) else error from None
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or str(path)) from None
    finally:
        tmp.unlink(missing_ok=True)


def replace(tmp, path):
    """os.replace, which Windows refuses while a viewer holds the file: a log or picture can wait for the next."""
    for _ in range(10):
        try:
            return os.replace(tmp, path)
        except PermissionError:
            time.sleep(0.1)
    if path.suffix not in (".csv", ".png"):
        return os.replace(tmp, path)
    print(f"{path} is held by another program and was not refreshed", file=sys.stderr)


def read_torch(path):
    """What torch.save wrote, which can run no code. Raises Error for other and for damaged files."""
    try:
        if not zipfile.is_zipfile(path):
            raise Error(f"{path} is no checkpoint: torch.save did not write it" if Path(path).is_file() else
                        f"no file at {path}", 1)
        with zipfile.ZipFile(path) as file:  # torch.load does not look at the checksums
            if damaged := file.testzip():
                raise Error(f"{path} is damaged at {damaged}", 1)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (Error, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch.load meets foreign bytes with a dozen types
        raise Error(f"{path} is no checkpoint: {type(error).__name__}, more than tensors and settings, or damage",
                    1) from None


def save_grid(path, rows, across=8):
    """A .png of {title: uint8 images (N, C, H, W)}, `across` in a line, the titles at the left."""
    side = next(iter(rows.values())).shape[2]
    zoom = max(1, 84 // side)
    cell = side * zoom + 3
    left = max(int(ImageDraw.Draw(Image.new("L", (1, 1))).textlength(title)) for title in rows)
    left += 12 * bool(left)
    lines = {title: -(-len(images) // across) for title, images in rows.items()}
    sheet = Image.new("RGB", (left + across * cell, sum(lines.values()) * cell), "white")
    top = 0
    for title, images in rows.items():
        ImageDraw.Draw(sheet).text((4, top + lines[title] * cell // 2 - 6), title, fill="black")
        for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
            image = ImageOps.scale(Image.fromarray(image.squeeze()), zoom, Image.Resampling.NEAREST)
            sheet.paste(image, (left + i % across * cell, top + i // across * cell))
        top += lines[title] * cell
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
    with atomic(folder / "samples.npz") as file:
        np.savez_compressed(file, images=pixels, **extra)
    save_grid(folder / "samples.png", sample_rows(images, labels, names))
    new, old = folder / f"samples.{os.getpid()}.tmp", folder / "samples"
    for i, x in enumerate(pixels if png else ()):
        kind = re.sub(r"[^\w +.-]", "-", names[labels[i]]).strip(" .") or "class" if extra else "."
        (new / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(x.squeeze()).save(new / kind / f"{i:06}.png")
    shutil.rmtree(old, ignore_errors=True)
    if png:
        os.replace(new, old)


# ---- what the command lines share ----

class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):  # no "(default: None)"
        plain = action.default is None or action.default is False
        return action.help if plain else super()._get_help_string(action)


def refuse(message):
    """In the place of a parser's error(): one line, not the list of all flags."""
    raise Error(f"{message}; --help lists the flags")


def number(kind, low, high=float("inf")):
    """argparse type: an int or a float from low to high."""
    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)
    return number


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
    """Whether the networks compute in bf16: where dtype says so; auto: where the hardware has it."""
    choose("dtype", dtype, ("auto", "fp32", "bf16"))
    fast = {"cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
            "cpu": getattr(torch.cpu, "_is_avx512_bf16_supported", bool)}
    return dtype == "bf16" or dtype == "auto" and fast.get(device.type, bool)()


def autocast(device, dtype="auto"):
    """The networks' precision. Without the cache of cast weights on a GPU: CUDA graphs do not allow it."""
    return torch.autocast(device.type, torch.bfloat16, bf16(device, dtype), cache_enabled=device.type != "cuda")


def progress(steps, title):
    """tqdm: a bar on a terminal, a line a minute elsewhere."""
    elsewhere = {} if sys.stderr.isatty() else {
        "delay": 60, "mininterval": 60, "bar_format": "{desc}: {percentage:.0f} %, {remaining} left\n"}
    return tqdm(steps, title, leave=False, **elsewhere)


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
    except Error as error:
        sys.exit(print(f"{script}: {error}", file=sys.stderr) or error.code)
    except torch.OutOfMemoryError as error:
        sys.exit(print(f"{script}: {one_line(error)}; try a smaller --batch-size", file=sys.stderr) or 1)
    except OSError as error:
        if not error.filename:
            raise
        sys.exit(print(f"{script}: {error.filename}: {error.strerror}", file=sys.stderr) or 1)
    except KeyboardInterrupt as error:
        sys.exit(print(f"\n{script}: {str(error) or 'stopped'}", file=sys.stderr) or 130)
