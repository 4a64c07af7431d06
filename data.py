"""Images in, files out, and the flags that the scripts share.

    images, labels = data.load("bloodmnist")            # uint8 (17092, 3, 28, 28), int64 (17092,)
    for x, y in data.batches(images, labels, 128): ...  # uint8 (128, 3, 28, 28), int64 (128,): every image
"""
import argparse
import ctypes
import os
import signal
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

NAMES = ("pathmnist", "chestmnist", "dermamnist", "octmnist", "pneumoniamnist", "retinamnist", "breastmnist",
         "bloodmnist", "tissuemnist", "organamnist", "organcmnist", "organsmnist")
SPLITS = ("train", "val", "test")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".webp")
DEMO = Path(__file__).parent / "assets" / "demo.npz"  # synthetic cells, drawn by the DDPM
RANK = int(os.environ.get("RANK", 0))  # of torchrun's processes the first alone writes
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # how many they are
LAUNCHER = "python" if WORLD == 1 else f"torchrun --nproc_per_node={WORLD}"  # of fid.json's command


class UsageError(ValueError):
    """A wrong value that the user gave: exit code 2."""


# ---- images in ----

def load(source="bloodmnist", root=None, split="all", size=28):
    """Images uint8 (N, C, H, W), C 1 or 3, and labels int64 (N,) of a set.

    source: a 2-D MedMNIST name (Yang et al., 2023), "demo", an .npz or a folder of pictures, a subfolder a
    class. root: where named sets are, else $MEDMNIST_ROOT, else ~/.medmnist. split: "train", "val", "test" or
    "all". size: the side of a named set's or a folder's images. Of several findings (ChestMNIST) the first
    counts, from 1. Raises ValueError where it is not such a set, FileNotFoundError where there is none."""
    if is_folder(source):
        return load_folder(Path(source), split, size)
    path, splits = locate(source, root, size), SPLITS if split == "all" else (split,)
    try:
        with np.load(path, allow_pickle=False) as file:
            parts = [(file[f"{s}_images"], file[f"{s}_labels"]) for s in splits]
        x, y = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        found = f"images {x.dtype} {x.shape}, labels {y.dtype} {y.shape}"
        if y.ndim == 2 and y.shape[1] > 1:
            y = np.where(y.any(1), y.argmax(1) + 1, 0)
        side, other, channels = (*x.shape[1:], 1)[:3]
        if not (x.size and x.dtype == np.uint8 and x.ndim in (3, 4) and channels in (1, 3)
                and side == other and side in range(16, 257, 4) and all(len(a) == len(b) for a, b in parts)
                and y.size == len(x) and y.dtype.kind in "iu" and 0 <= y.min() <= y.max() <= 999):
            raise ValueError(f"{found}, not uint8 N x S x S (x 3), S 16, 20 .. 256, a label below 1000 each")
    except Exception as error:  # numpy and zipfile meet foreign bytes with a dozen types
        advice = "delete it to have it fetched again" if source in NAMES else \
            f"--data takes an .npz with the keys {', '.join(f'{s}_images, {s}_labels' for s in SPLITS)}"
        raise ValueError(f"{path} is not a readable MedMNIST file: {one_line(error)}; {advice}") from error
    labels = torch.from_numpy(y.reshape(-1).astype(np.int64))
    return channels_first(x.reshape(len(x), side, side, channels)), labels


def channels_first(x):
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()


def locate(source, root=None, size=28):
    """The .npz file of a set: itself or <root>/<name>[_<size>].npz, fetched by medmnist."""
    root = Path(root or os.environ.get("MEDMNIST_ROOT") or Path.home() / ".medmnist").expanduser()
    path = root / (f"{source}.npz" if size == 28 else f"{source}_{size}.npz")
    if source not in NAMES:
        path = DEMO if source == "demo" else Path(source)
        if path.suffix != ".npz":
            raise UsageError(f"{source!r} is no .npz, no folder, not demo and not one of {', '.join(NAMES)}")
        if not path.is_file():
            raise FileNotFoundError(f"no data file at {path}")
    elif not path.is_file():
        import medmnist  # here alone: a local file needs numpy only
        info = medmnist.INFO[source]
        try:
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root) as tmp:  # it appears at `path` only when it is whole
                getattr(medmnist, info["python_class"])(split="train", root=tmp, download=True, size=size)
                os.replace(Path(tmp) / path.name, path)
        except Exception as error:  # no network, a wrong md5, no space: the user's next step is the same
            url = info["url"] if size == 28 else info[f"url_{size}"]
            raise FileNotFoundError(f"no file at {path}, and the download from {url} failed ({error!r:.60}); "
                                    "put it there, or name its folder with --root") from error
    return path


def is_folder(source):
    return source not in (*NAMES, "demo") and Path(source).is_dir()


def subfolders(folder):
    parts = [folder / s for s in SPLITS if (folder / s).is_dir()] or [folder]
    return sorted({f.name for part in parts for f in part.iterdir() if f.is_dir()}) or ["."]


def pictures(folder):
    return sorted(f for f in folder.rglob("*") if f.suffix.lower() in PICTURES)


def load_folder(folder, split, size):
    """load() of <class>/ or <split>/<class>/: centre squares, resized with the filter of MedMNIST."""
    parts = [folder / s for s in SPLITS if (folder / s).is_dir() and split in ("all", s)] or [folder]
    names = subfolders(folder)
    files = [(f, k) for part in parts for k, name in enumerate(names) for f in pictures(part / name)]
    if parts == [folder] and split != "all":
        warnings.warn(f"{folder} is not split: a seeded tenth is val, a fifth is test", stacklevel=3)
        order, n = np.random.default_rng(0).permutation(len(files)), len(files) // 10
        cut = {"val": order[:n], "test": order[n:3 * n], "train": order[3 * n:]}
        files = [files[i] for i in sorted(cut[split])]
    if not files:
        raise ValueError(f"{folder} holds no pictures ({', '.join(PICTURES)}) of split {split}")
    images, bad = [], []
    for path, _ in tqdm(files, desc=f"reading {folder}", disable=None, leave=False):
        try:
            image = read_picture(path)
            left, top = ((n - min(image.size)) // 2 for n in image.size)
            square = image.crop((left, top, left + min(image.size), top + min(image.size)))
            images.append(square.resize((size, size), Image.Resampling.BICUBIC))
        except ValueError as error:
            bad.append(error)
    if bad:
        raise ValueError(f"{len(bad)} of {len(files)} pictures cannot be used, the first: {bad[0]}")
    mode = "L" if all(image.mode == "L" for image in images) else "RGB"
    x = np.stack([np.asarray(image.convert(mode)) for image in images]).reshape(len(images), size, size, -1)
    return channels_first(x), torch.tensor([k for _, k in files])


def read_picture(path):
    """A picture as PIL has it, "L" or "RGB", 8 bits a channel; ValueError for what has no such form."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16"):  # PIL's own conversion would clip all above 255 to white
                return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
            if image.mode in "IF" or image.convert("RGBA").getextrema()[3][0] < 255:
                raise ValueError("32-bit values or transparency, whose look is not certain")
            return image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    except Exception as error:  # Pillow meets foreign bytes with a dozen types
        raise ValueError(f"{path} is not a usable picture: {one_line(error)}") from None


def classes(source, labels):
    """{name: images of it} of a set's labels (N,). The names are a folder's subfolders, MedMNIST's, an .npz's
    `class_names`, or numbers where there are none."""
    counts = labels.bincount().tolist()
    if is_folder(source):
        names = subfolders(Path(source))
    elif source in NAMES:
        from medmnist import INFO
        names = list(INFO[source]["label"].values())
    else:
        with np.load(locate(source), allow_pickle=False) as file:
            names = file["class_names"].tolist() if "class_names" in file else []
    if not len(set(names)) == len(names) >= len(counts):
        names = [str(k) for k in range(len(counts))]
    return dict(zip(names, counts + [0] * (len(names) - len(counts)), strict=True))


def batches(images, labels, batch_size, augment=False):
    """One epoch: images (B, C, H, W) and labels (B,), every image once, in an order of torch's random state.
    augment: each image in one of the square's eight flips and quarter turns (a cell has no up or left)."""
    order = torch.randperm(len(images)).to(images.device)
    turns = (torch.rand(3, len(images), 1, 1, 1) < 0.5).to(images.device)
    for i in range(0, len(images), batch_size):
        x = images[order[i:i + batch_size]]
        if augment:
            across, down, swap = turns[:, i:i + batch_size]
            x = torch.where(across, x.flip(3), x)
            x = torch.where(down, x.flip(2), x)
            x = torch.where(swap, x.transpose(2, 3), x)
        yield x.contiguous(memory_format=torch.channels_last), labels[order[i:i + batch_size]]


def draw_labels(classes, n, label, seed):
    """The classes (n,) of n images to draw, None where a model has none. classes: {name: images in the
    training data}. label: a number, a name or its first letters, a tensor (n,), or None for the training
    data's proportions."""
    if torch.is_tensor(label) or not classes and label is None:
        return label
    counts, names = torch.tensor([*classes.values()]), [*classes]
    if label is None:
        return counts.float().multinomial(n, True, generator=torch.Generator().manual_seed(seed))
    seen = [k for k, count in enumerate(counts) if count]
    found = [k for k in seen if str(label) in (names[k], str(k))] or [
        k for k in seen if names[k].lower().startswith(str(label).lower())]
    if len(found) != 1:
        known = " or ".join(f"{k} {names[k]}" for k in found or seen)
        raise UsageError(f"label {label}: " + (
            f"it can be {known}" if known else "the model was trained without --classes"))
    return torch.full((n,), found[0])


# ---- files out, and checkpoints in ----

def save(path, write):
    """write(file) into a temporary file, which takes the name only when it is whole and on the disk."""
    if RANK:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(tmp, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    except RuntimeError as error:  # torch.save hides a full disk and Ctrl-C behind an error of its own
        cause = error.__context__
        raise cause if isinstance(cause, (OSError, KeyboardInterrupt)) else error from None
    finally:
        tmp.unlink(missing_ok=True)


def read_torch(path):
    """What torch.save wrote, which can run no code; ValueError where it is damaged or foreign."""
    try:
        if zipfile.is_zipfile(path):  # torch.load does not look at the checksums of its zip files
            with zipfile.ZipFile(path) as file:
                if damaged := file.testzip():
                    raise ValueError(f"{damaged} in it is damaged")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"no file at {path}") from None
    except Exception as error:  # torch.load meets foreign bytes with a dozen types
        raise ValueError(f"{path} is not a checkpoint or state dict: {one_line(error)}") from None


def save_grid(path, images, labels=None, names=()):
    """A .png of uint8 images in rows of eight: the first 64, or, with labels, eight a class, named at the
    left."""
    kinds = [None] if labels is None else labels.unique().tolist()
    rows = images[:64].split(8) if labels is None else [images[labels == k][:8] for k in kinds]
    zoom, left = max(1, 84 // images.shape[3]), 0 if labels is None else 120
    side = images.shape[3] * zoom + 3
    sheet = Image.new("RGB", (left + 8 * side, len(rows) * side), "white")
    for i, row in enumerate(rows):
        if left:
            ImageDraw.Draw(sheet).text((4, i * side + side // 2 - 6), names[kinds[i]][:19], fill="black")
        for j, image in enumerate(row.permute(0, 2, 3, 1).numpy()):
            image = ImageOps.scale(Image.fromarray(image.squeeze()), zoom, Image.Resampling.NEAREST)
            sheet.paste(image, (left + j * side, i * side))
    save(path, lambda file: sheet.save(file, "PNG"))


def save_samples(folder, images, labels=None, names=(), png=False):
    """samples.npz and samples.png of uint8 images (N, C, H, W); png: also samples/<class>/<number>.png."""
    pixels, extra = images.permute(0, 2, 3, 1).numpy(), {}
    if labels is not None:
        extra = {"labels": labels[:, None].numpy(), "class_names": np.array(names)}
    for i, x in enumerate(pixels if png else ()):
        path = folder / "samples" / (names[labels[i]].replace("/", "-") if extra else "") / f"{i:06}.png"
        save(path, lambda file, x=x: Image.fromarray(x.squeeze()).save(file, "PNG"))
    save_grid(folder / "samples.png", images, labels if extra and len(labels.unique()) > 1 else None, names)
    save(folder / "samples.npz", lambda file: np.savez_compressed(file, images=pixels, **extra))


# ---- the command line ----

class Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):  # no "(default: None)"
        plain = action.default is None or action.default is False
        return action.help if plain else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with one line for a wrong flag, and the flags that cvae.py, dcgan.py and ddpm.py share."""

    def __init__(self, doc):
        super().__init__(description=doc.split("\n")[0], formatter_class=Help, allow_abbrev=False)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}; --help lists the flags\n")

    def parse(self, argv, name, paper, sampler):
        """Adds the shared flags and reads all. paper: what --paper sets where it is not given; sampler: the
        flags of drawing. What would do nothing, or replace a run unasked, is an error. args.settings is what
        makes a training what it is."""
        add = self.add_argument_group("data, device and files").add_argument
        add("--data", default="bloodmnist", help="a 2-D MedMNIST name, an .npz, a folder of pictures, demo")
        add("--size", type=int, choices=(28, 64, 128, 224), default=28, help="side of the images, pixels")
        common(add, "root", "device")
        add("--split", choices=(*SPLITS, "all"), default="all", help="the part to learn")
        add("--augment", action="store_true", help="flip and turn the training images at random")
        add("--classes", action="store_true", help="learn the labels as a condition")
        add("--seed", type=number(int, 0, 2**31), default=0, help="of the training, or of --sample")
        add("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where it is fast")
        add("--out", type=Path, default=Path("out") / name, help="folder of the run")
        add("--resume", action="store_true", help="go on after the last whole epoch that --out holds")
        add("--overwrite", action="store_true", help="replace the run, or the samples, in --out")
        add("--paper", action="store_true", help="the paper's settings for all that is not given")
        add = self.add_argument_group("drawing and measuring").add_argument
        add("--sample", type=number(int, 1, 10**6), metavar="N", help="no training: draw N images")
        add("--ckpt", type=Path, help="no training: this model.pt; else that of --out, else the shipped one")
        add("--label", help="with --sample: a class, name or number; else as in the training data")
        add("--png", action="store_true", help="with --sample: .png files too, a folder a class")
        add("--fid-runs", type=number(int, 0, 1000), default=0, metavar="N", help="draws to measure")
        add("--fid-samples", type=number(int, 2), metavar="N", help="in a draw; else 10000, or all there are")
        add("--fid-seed", type=number(int, 0, 2**31), default=100, help="of the first draw, then 100 more")
        common(add, "dims", "weights")
        argv = sys.argv[1:] if argv is None else argv
        if "--paper" in argv:
            self.set_defaults(**paper)
            print("the paper's settings:", *(f"--{k.replace('_', '-')} {v}" for k, v in paper.items()))
        args = self.parse_args(argv)
        given = args.given = {a[2:].split("=")[0].replace("-", "_") for a in argv if a[:2] == "--"}
        free = {*sampler, *"root device out overwrite paper sample ckpt label png".split(),
                *"fid_runs fid_samples fid_seed dims weights".split()}
        args.settings = {k: v for k, v in vars(args).items()
                         if k not in free | {"given", "epochs", "resume", "compile"}}
        training = given - free - {"data", "size", "split", "seed", "dtype"}
        for flags, idle, why in (
                (training, args.sample or args.ckpt, "where nothing is trained"),
                ({"label", "png"}, not args.sample, "without --sample"),
                ({"ckpt"}, not (args.sample or args.fid_runs), "without --sample or --fid-runs")):
            for flag in given & flags if idle else ():
                self.error(f"--{flag.replace('_', '-')} does nothing {why}")
        files = ["samples.npz"] if args.sample else [] if args.ckpt else ["ckpt.pt", "model.pt"]
        if any((args.out / file).exists() for file in files) and not (args.resume or args.overwrite):
            raise UsageError(f"{args.out} holds " + (
                "samples: --overwrite replaces them; see --out" if args.sample else
                "a run: --resume goes on with it, --overwrite trains anew"))
        keep_memory()
        return args


def common(add, *names):
    """Adds the flags that are the same wherever they are."""
    flags = {"root": {"help": "folder of the .npz files; else $MEDMNIST_ROOT, else ~/.medmnist"},
             "device": {"type": device, "default": "auto", "help": "auto, cpu, cuda, cuda:N or mps"},
             "dims": {"type": int, "choices": (64, 192, 768, 2048), "default": 2048, "help": "features"},
             "weights": {"default": "fid", "help": "Inception's: fid (as pytorch-fid), imagenet or a file"}}
    for name in names:
        add(f"--{name}", **flags[name])


def keep_memory():
    """Freed memory stays with the process, since the next step asks for as much: glibc's M_MMAP_MAX and
    M_TRIM_THRESHOLD."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)
        libc.mallopt(-1, 2**31 - 1)


def number(kind, low, high=float("inf")):
    """argparse type: an int or a float from low to high."""
    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)
    return number


def device(text="auto"):
    """argparse type: a device that this machine has; auto is the best of them."""
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"no device {text!r} here: {one_line(error)}") from None


def bf16(device, dtype="auto"):
    """Whether the networks' products are in bf16: if dtype says so; auto: where the hardware has it."""
    cpu = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)
    fast = {"cuda": torch.cuda.is_bf16_supported, "cpu": cpu}.get(device.type, bool)
    return dtype == "bf16" or dtype == "auto" and fast()


def autocast(device, dtype="auto"):
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16(device, dtype))


def one_line(error):
    return (str(error) or repr(error)).splitlines()[0]


def command(main):
    """Runs main(). What a user can cause ends in one line; exit 2: bad usage, 1: failure, 130: Ctrl-C."""
    script = Path(sys.argv[0]).name
    warnings.formatwarning = lambda message, *args: f"{message}\n"
    try:
        main()
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"{script}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        print(f"\n{script}: stopped; a training goes on with the same command and --resume", file=sys.stderr)
        sys.exit(130)
    finally:  # Python's own end takes a moment, and Ctrl-C has nothing to stop in it
        signal.signal(signal.SIGINT, signal.SIG_IGN)
