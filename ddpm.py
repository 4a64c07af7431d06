"""Denoising diffusion on 28 x 28 blood cells (Ho et al., 2020): a U-Net learns to predict the noise in a noised image.

    python ddpm.py --epochs 500 --device cuda         train on BloodMNIST, into out/ddpm
    python ddpm.py --epochs 500 --resume              go on where a run was stopped
    python ddpm.py --sample 64 --steps 50             draw cells from out/ddpm/model.pt with 50 DDIM steps
    python ddpm.py --resume --fid-runs 5 --steps 50   measure what was trained: prints FID mean ± std (5 runs)

Measured: FID-768 0.1082 ± 0.0052 after 30 epochs (five draws of 2,000 cells, seeds 100 to 500; two CPU cores, torch 2.15.0).
The command and what the figure means: README.md. The diffusion itself is class Diffusion.
"""
import argparse
import copy
import ctypes
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torchvision.utils import make_grid
from tqdm import tqdm

import data
import fid

MODEL, LOSSES = "ddpm", ("loss",)


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    g = p.add_argument_group("model")
    g.add_argument("--timesteps", type=number(int, 2, 10000), default=500, help="T, the number of noise levels")
    g.add_argument("--schedule", choices=("linear", "cosine"), default="linear", help="how the noise grows with t")
    g.add_argument("--depth", choices=tuple(WIDTHS), default="deeper", help="levels of the U-Net: two or three above the bottleneck")
    g.add_argument("--ema", type=number(float, 0, 1), default=0.9999, help="decay of the averaged weights that draw the samples (the paper has none: 0)")
    g = p.add_argument_group("training")
    g.add_argument("--epochs", type=number(int, 1), default=500, help="passes over the data")
    g.add_argument("--batch-size", type=number(int, 1), default=128, help="images per step")
    g.add_argument("--lr", type=number(float, 0), default=1e-4, help="Adam's learning rate")
    add_shared_flags(p)
    g = p.add_argument_group("sampling")
    g.add_argument("--steps", type=number(int, 1), help="network evaluations of the DDIM sampler; without it all T steps of ancestral sampling")
    g.add_argument("--guidance", type=number(float, 0), default=0.0, help="of a model with --classes: how far to move from any image towards the class's")
    g.add_argument("--eta", type=number(float, 0, 1), default=0.0, help="noise that DDIM adds: 0 none, 1 as much as ancestral sampling")
    args = parse(p, argv)
    if args.steps and args.steps > args.timesteps:
        p.error(f"--steps {args.steps} is more than the {args.timesteps} of --timesteps")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Model: a U-Net that takes a noised image and its timestep, and gives an image of the same shape.

WIDTHS = {"baseline": (64, 128, 256), "deeper": (64, 128, 256, 512)}  # channels of each level, bottleneck last
EMBED = 256


class Block(nn.Module):
    """Residual block: two 3 x 3 convolutions; the timestep shifts the features between them."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(EMBED, c_out)
        self.norm2, self.conv2 = nn.GroupNorm(8, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # each block starts as its skip connection: deep nets train from step one

    def forward(self, x, t):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(t)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.skip(x) + h


class UNet(nn.Module):
    def __init__(self, channels=3, depth="deeper", classes=0):
        super().__init__()
        self.label = nn.Embedding.from_pretrained(torch.zeros(classes + 1, EMBED), freeze=False) if classes else None  # the last: no label
        *widths, bottom = WIDTHS[depth]
        self.embed = nn.Sequential(nn.Linear(widths[0], EMBED), nn.SiLU(), nn.Linear(EMBED, EMBED), nn.SiLU())
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList(Block(a, b) for a, b in zip([widths[0], *widths], widths))
        self.middle = Block(widths[-1], bottom)
        self.narrow = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip([bottom, *widths[::-1]], widths[::-1]))
        self.up = nn.ModuleList(Block(2 * w, w) for w in widths[::-1])
        self.head = nn.Sequential(nn.GroupNorm(8, widths[0]), nn.SiLU(), nn.Conv2d(widths[0], channels, 3, padding=1))
        nn.init.zeros_(self.head[-1].weight)

    def forward(self, x, t, y=None):                      # x: (B, C, 28, 28), t and y: (B,)
        t = self.embed(timestep_embedding(t, self.stem.out_channels))
        t = t + self.label(y) if self.label else t
        x, skips = self.stem(x), []
        for block in self.down:                           # 28 -> 14 -> 7 -> 4
            x = block(x, t)
            skips.append(x)
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        x = self.middle(x, t)                             # (B, 512, 4, 4)
        for narrow, block in zip(self.narrow, self.up):   # 4 -> 7 -> 14 -> 28
            skip = skips.pop()
            x = F.interpolate(narrow(x), size=skip.shape[2:])
            x = block(torch.cat([x, skip], 1), t)
        return self.head(x)


def timestep_embedding(t, dim):
    """Sines and cosines of t at dim/2 frequencies from 1 to 1/10000: (B,) -> (B, dim)."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


# ---------------------------------------------------------------------------------------------------------------------
# Objective and sampling. alpha_bar[t] is the share of the signal's variance that is left at step t, t = 0 .. T-1.

class Diffusion:
    """The noising process and its reversal. A `model` here is any function (x_t, t) -> epsilon of x_t's shape."""

    def __init__(self, timesteps=500, schedule="linear", device="cpu"):
        if schedule == "linear":                          # Ho et al. 2020
            betas = torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64)
        else:                                             # cosine: Nichol & Dhariwal 2021, eq. 17
            s = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
            f = torch.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        self.T, self.device = timesteps, device
        self.alpha_bar = torch.cumprod(1 - betas, 0).float().to(device)

    def q_sample(self, x0, t, epsilon):
        """x_t ~ q(x_t | x_0) = N(sqrt(alpha_bar) x_0, (1 - alpha_bar) I), Ho et al. eq. 4."""
        a = self.alpha_bar[t][:, None, None, None]
        return a.sqrt() * x0 + (1 - a).sqrt() * epsilon

    def loss(self, model, x0):
        """E |epsilon - epsilon_theta(x_t, t)|^2 over t uniform and epsilon normal, Ho et al. eq. 14."""
        t = torch.randint(self.T, (len(x0),), device=x0.device)
        epsilon = torch.randn_like(x0)
        return F.mse_loss(model(self.q_sample(x0, t, epsilon), t).float(), epsilon)

    def predict(self, model, x, t):
        """epsilon and the image x_0 that it implies, kept in the range of images."""
        a = self.alpha_bar[t]
        epsilon = model(x, torch.full((len(x),), t, device=x.device)).float()
        return epsilon, ((x - (1 - a).sqrt() * epsilon) / a.sqrt()).clamp(-1, 1)

    def ancestral(self, model, x, generator):
        """x_T -> x_0 through all T steps, each a draw from q(x_{t-1} | x_t, x_0), Ho et al. eq. 6 and 7."""
        for t in reversed(range(self.T)):
            _, x0 = self.predict(model, x, t)
            a, a_prev = self.alpha_bar[t], self.alpha_bar[t - 1] if t else torch.ones((), device=x.device)
            beta = 1 - a / a_prev
            mean = a_prev.sqrt() * beta / (1 - a) * x0 + (1 - beta).sqrt() * (1 - a_prev) / (1 - a) * x
            variance = (1 - a_prev) / (1 - a) * beta
            x = mean + variance.sqrt() * torch.randn(x.shape, generator=generator, device=x.device)
        return x

    def ddim(self, model, x, generator, steps, eta=0.0):
        """x_T -> x_0 through `steps` of the T noise levels, Song et al. 2021 eq. 12 and 16; eta 0 is deterministic."""
        times = torch.linspace(self.T - 1, 0, steps).round().int().tolist()
        for t, t_prev in zip(times, [*times[1:], None]):
            _, x0 = self.predict(model, x, t)
            a, a_prev = self.alpha_bar[t], self.alpha_bar[t_prev] if t_prev is not None else torch.ones((), device=x.device)
            epsilon = (x - a.sqrt() * x0) / (1 - a).sqrt()  # of the clamped x0, so that x stays on the noise level
            sigma = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).sqrt()
            x = a_prev.sqrt() * x0 + (1 - a_prev - sigma ** 2).clamp(min=0).sqrt() * epsilon
            if eta > 0:
                x = x + sigma * torch.randn(x.shape, generator=generator, device=x.device)
        return x


def guided(model, y, w):
    """epsilon for the class, w times further away from the epsilon for any image: (1 + w) e(x, y) - w e(x), Ho & Salimans 2022."""
    if w == 0:
        return lambda x, t: model(x, t, y)
    none = torch.full_like(y, model.label.num_embeddings - 1)
    return lambda x, t: (1 + w) * model(x, t, y).float() - w * model(x, t, none).float()


@torch.inference_mode()
def sample(model, n, args, seed, labels=None, n_steps=None, batch_size=500):
    """n images, uint8 (n, C, H, W) on the CPU; the seed fixes them. n_steps: DDIM's, else --steps, else ancestral sampling."""
    n_steps = min(n_steps or args.steps or 0, args.timesteps)
    diffusion = Diffusion(args.timesteps, args.schedule, args.device)
    generator = torch.Generator(args.device).manual_seed(seed)
    images = torch.empty(n, *args.shape, dtype=torch.uint8)
    for i in tqdm(range(0, n, batch_size), desc="sampling", disable=not sys.stderr.isatty() or n <= 64, leave=False):
        x = torch.randn(min(batch_size, n - i), *args.shape, generator=generator, device=args.device)
        x = x.contiguous(memory_format=torch.channels_last)
        net = guided(model, labels[i:i + batch_size].to(args.device), args.guidance) if labels is not None else model
        with autocast(args):
            x = diffusion.ddim(net, x, generator, n_steps, args.eta) if n_steps else diffusion.ancestral(net, x, generator)
        images[i:i + batch_size] = from_model(x).cpu()
    return images


def to_model(images):
    """uint8 [0, 255] -> float [-1, 1], what the network sees."""
    return images.contiguous(memory_format=torch.channels_last).float() / 127.5 - 1


def from_model(x):
    """float [-1, 1] -> uint8 [0, 255]."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Training.

def build(args):
    """The network that draws the samples, from the settings that model.pt keeps."""
    return UNet(args.shape[0], args.depth, len(args.class_counts)).to(args.device, memory_format=torch.channels_last)


def train(args):
    images, labels = data.load(args.data, args.root, args.split)
    args.shape = tuple(images.shape[1:])
    if args.classes:
        args.class_counts = labels.bincount().tolist()
    images, labels = images.to(args.device), labels.to(args.device)

    torch.manual_seed(args.seed)
    diffusion = Diffusion(args.timesteps, args.schedule, args.device)
    model = build(args)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
    state = {"model": model, "ema": ema, "optimizer": optimizer}

    for step, x, y in steps(args, images, labels, state, ema, lambda: sample(ema, 64, args, 0, rows_of_types(args), n_steps=20)):
        if args.classes:  # one in ten learns without its label, for --guidance
            y = torch.where(torch.rand(len(y), device=y.device) < 0.1, len(args.class_counts), y)
        with autocast(args):
            loss = diffusion.loss(lambda x, t: model(x, t, y), to_model(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_ema(ema, model, min(args.ema, step / (step + 10)))  # a short memory while all is new
        record(loss)
    return ema


@torch.no_grad()
def update_ema(ema, model, decay):
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


# ---- plumbing: the same lines in cvae.py, dcgan.py and ddpm.py ----

def add_shared_flags(p):
    g = p.add_argument_group("data, device and files")
    g.add_argument("--data", type=data.name, default="bloodmnist", help="a 2-D MedMNIST name or the path of an .npz file")
    g.add_argument("--root", help="folder of the .npz files; else $MEDMNIST_ROOT, else ~/.medmnist")
    g.add_argument("--split", choices=("train", "val", "test", "all"), default="all", help="which part to train on and to compare with")
    g.add_argument("--augment", action="store_true", help="random flips and quarter turns of the training images")
    g.add_argument("--classes", action="store_true", help="learn the labels as a condition")
    g.add_argument("--label", metavar="NAME", help="the class to draw, a name or number (a model trained with --classes; default: as in the data)")
    g.add_argument("--seed", type=number(int, 0, 2**31), default=0, help="of the weights, the training and --sample")
    g.add_argument("--device", type=device, default="auto", help="auto, cpu, cuda, cuda:N or mps")
    g.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="of the networks' products; auto: bf16 where the hardware has it")
    g.add_argument("--out", type=Path, default=Path("out") / MODEL, metavar="DIR", help="folder of ckpt.pt, model.pt, samples, log.csv, fid.json")
    g.add_argument("--resume", action="store_true", help="go on from DIR/ckpt.pt")
    g.add_argument("--overwrite", action="store_true", help="train anew in a DIR that holds a run")
    g.add_argument("--sample", type=number(int, 1), metavar="N", help="no training: draw N images into DIR/samples.npz and samples.png")
    g.add_argument("--ckpt", type=Path, metavar="FILE", help="no training: the model to draw from or to measure (--sample alone: DIR/model.pt)")
    g = p.add_argument_group("evaluation")
    g.add_argument("--fid-runs", type=number(int, 0), default=0, metavar="N", help="runs of the FID after training, or of --ckpt")
    g.add_argument("--fid-samples", type=number(int, 2), default=10000, metavar="N", help="real and generated images in each run")
    g.add_argument("--fid-seed", type=number(int, 0, 2**31), default=100, metavar="N", help="of the first run; each further run adds 100")
    g.add_argument("--dims", type=int, choices=fid.DIMS, default=2048, help="Inception features that the FID compares")
    g.add_argument("--weights", default="fid", help="Inception's weights: fid, imagenet or a file")


def number(kind, low, high=math.inf):
    """argparse type: an int or a float from low to high."""
    def parse_number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)
    parse_number.__name__ = kind.__name__
    return parse_number


def device(text):
    """argparse type: a device that this machine has."""
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"no device {text!r} here: {(str(error) or repr(error)).splitlines()[0]}") from None


def parse(p, argv):
    args = p.parse_args(argv)
    args.class_counts = []
    if args.label is not None and not args.sample:
        p.error("--label goes with --sample")
    if args.ckpt and not (args.sample or args.fid_runs):
        p.error("--ckpt goes with --sample or --fid-runs")
    if args.dtype == "auto":
        has_bf16 = {"cuda": torch.cuda.is_bf16_supported, "cpu": getattr(torch.cpu, "_is_avx512_bf16_supported", bool)}.get(args.device.type, bool)
        args.dtype = "bf16" if has_bf16() else "fp32"
    if sys.platform == "linux":  # keep freed memory: the next step asks for as much again
        ctypes.CDLL(None).mallopt(-4, 0)          # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    return args


def autocast(args):
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.dtype == "bf16")


def settings(args):
    """What makes a run what it is: model.pt carries it, and --resume goes on only where it is the same."""
    other = "root device out resume overwrite sample ckpt fid_runs fid_samples fid_seed dims weights epochs steps eta guidance trained classes label".split()
    return {k: v for k, v in vars(args).items() if k not in other and v != []}


def draw_labels(args, n, seed):
    """The classes of n images, (n,): all --label, else in the proportions of the training data; None for a model without."""
    if not args.class_counts:
        return None
    if args.label is not None:
        return torch.full((n,), data.class_number(args.label, args.trained["data"], len(args.class_counts)))
    return torch.tensor(args.class_counts).float().multinomial(n, True, generator=torch.Generator().manual_seed(seed))


def rows_of_types(args):
    """Labels of a grid of 64 with a row a class."""
    return torch.arange(64) // 8 % len(args.class_counts) if args.class_counts else None


def save(path, write):
    """write(file) into a temporary file, which takes the name only when it is whole and on the disk."""
    tmp = path.with_name(path.name + ".tmp")
    with open(tmp, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(tmp, path)


def save_grid(path, images, labels=None):
    """A .png of up to 64 uint8 images, enlarged; with labels, up to eight of each class in a row of their own."""
    if labels is not None:
        rows = [images[labels == k][:8] for k in labels.unique()]
        images = torch.cat([torch.cat([row, row.new_full((8 - len(row), *row.shape[1:]), 255)]) for row in rows])
    grid = make_grid(images if labels is not None else images[:64], 8, padding=1, pad_value=255).permute(1, 2, 0).numpy()
    save(path, lambda file: Image.fromarray(grid).resize((3 * grid.shape[1], 3 * grid.shape[0]), Image.Resampling.NEAREST).save(file, "PNG"))


def read(path, hint):
    """A checkpoint of this script; weights_only, so that no file can run code."""
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        if ckpt["script"] != MODEL:
            raise ValueError(f"{ckpt['script']}.py wrote it")
        return ckpt
    except FileNotFoundError:
        raise FileNotFoundError(f"no checkpoint at {path}; {hint}") from None
    except Exception as error:  # torch.load meets foreign bytes with a dozen types
        raise ValueError(f"{path} is not a checkpoint of {MODEL}.py: {(str(error) or repr(error)).splitlines()[0]}") from None


def load(args):
    """The trained network of --ckpt or DIR/model.pt, with the settings that it was trained with."""
    path = args.ckpt or args.out / "model.pt"
    ckpt = read(path, "train first, or name one with --ckpt")
    try:
        args.trained = ckpt["settings"] | {"epochs": ckpt["epochs"]}
        vars(args).update({k: v for k, v in args.trained.items() if k not in ("data", "split", "seed", "dtype")})
        net = build(args)
        net.load_state_dict(ckpt["weights"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} holds no network to draw from (a run's is model.pt): {str(error).splitlines()[0]}") from None
    return net.eval()


records = []  # the losses of the epoch under way, left on the device: to read one is to wait for it


def record(*losses):
    records.append(torch.stack([loss.detach().float() for loss in losses]))


def check(epoch):
    """Ends the run at a loss that is not finite; the checkpoint before it stays."""
    for i, row in enumerate(torch.stack(records).tolist() if records else [], 1):
        for name, value in zip(LOSSES, row):
            if not math.isfinite(value):
                raise ValueError(f"{name} is {value} at epoch {epoch + 1}, step {i}; try a lower --lr, or --resume from the last checkpoint")


def steps(args, images, labels, state, net, preview):
    """Yields (step, images, labels) for each training step that is left, and between two of them keeps the books: ckpt.pt (state,
    all that --resume needs), model.pt (net, which draws the samples), samples.png (of preview()), log.csv, the progress."""
    per_epoch, start, rows = math.ceil(len(images) / args.batch_size), 0, []
    records.clear()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.resume:
        ckpt = read(args.out / "ckpt.pt", "there is nothing to resume")
        now, then = settings(args), ckpt["settings"]
        if now != then:
            raise ValueError("--resume with other settings than the checkpoint's: "
                             + ", ".join(f"{k} {then.get(k)} then, {now.get(k)} now" for k in then | now if then.get(k) != now.get(k)))
        for k, part in state.items():
            part.load_state_dict(ckpt[k])
        start, rows, records[:] = ckpt["step"], ckpt["rows"], ckpt["records"].to(args.device)
        torch.set_rng_state(ckpt["rng"])
        if args.device.type == "cuda":
            torch.cuda.set_rng_state(ckpt["cuda_rng"], args.device)
        print(f"resumed after epoch {start // per_epoch}, step {start % per_epoch}", flush=True)
    elif not args.overwrite and (args.out / "ckpt.pt").exists():
        raise FileExistsError(f"{args.out} holds a run already; --resume goes on with it, --overwrite trains anew")

    def checkpoint(step):
        check(epoch)
        common = {"script": MODEL, "settings": settings(args), "epochs": step / per_epoch}
        ckpt = common | {k: part.state_dict() for k, part in state.items()} | {
            "step": step, "rows": rows, "records": torch.stack(records).cpu() if records else torch.empty(0),
            "rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state(args.device) if args.device.type == "cuda" else None}
        save(args.out / "ckpt.pt", lambda file: torch.save(ckpt, file))
        save(args.out / "model.pt", lambda file: torch.save(common | {"weights": net.state_dict()}, file))
        save_grid(args.out / "samples.png", preview())
        if rows:
            save_curve(args, rows)
        return time.time()

    stop, saved, last = [], time.time(), args.epochs * per_epoch
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, lambda number, frame: stop.append(number))
    bar = tqdm(total=last, initial=start, disable=None, unit="step")
    for epoch in range(start // per_epoch, args.epochs):
        began, done = time.time(), max(start - epoch * per_epoch, 0)
        shuffle = torch.Generator().manual_seed(args.seed * 100003 + epoch)
        for i, x in enumerate(data.batches(images, args.batch_size, shuffle, args.augment, labels), 1):
            if i <= done:  # before the resume
                continue
            step = epoch * per_epoch + i
            yield step, *x
            bar.update()
            if args.device.type == "cpu" or i == per_epoch:  # a look at a GPU's losses waits for them
                check(epoch)
            if i == per_epoch:
                seconds = time.time() - began
                rows.append([epoch + 1, *torch.stack(records).mean(0).tolist(), round(seconds, 2), round((len(images) - done * args.batch_size) / seconds, 1)])
                records.clear()
                save_log(args, rows, bar)
            if stop or step == last or time.time() - saved > 60:
                saved = checkpoint(step)
            if stop:
                print(f"\n{MODEL}.py: stopped after epoch {step // per_epoch}, step {step % per_epoch}; the same command with --resume goes on", file=sys.stderr)
                sys.exit(128 + stop[0])
    bar.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def save_log(args, rows, bar):
    """log.csv, a row an epoch; and a line of progress."""
    lines = [",".join(("epoch", *LOSSES, "seconds", "images/s"))] + [",".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in row) for row in rows]
    save(args.out / "log.csv", lambda file: file.write(("\n".join(lines) + "\n").encode()))
    line = f"epoch {rows[-1][0]}/{args.epochs}  " + "  ".join(f"{k} {v:.5g}" for k, v in zip((*LOSSES, "seconds", "images/s"), rows[-1][1:]))
    bar.set_description(line) if not bar.disable else print(line, flush=True)


def save_curve(args, rows):
    """loss.png, where matplotlib is found."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    axes = Figure(figsize=(6, 4)).add_subplot(xlabel="epoch")
    for k, values in zip(LOSSES, list(zip(*rows))[1:]):
        axes.plot([row[0] for row in rows], values, label=k)
    axes.legend()
    save(args.out / "loss.png", lambda file: axes.figure.savefig(file, format="png"))


def evaluate(args, net):
    """fid.json: the FID of --fid-runs draws, by the protocol of fid.benchmark."""
    args.trained = getattr(args, "trained", settings(args) | {"epochs": args.epochs})
    fid.benchmark(lambda n, seed: sample(net, n, args, seed, draw_labels(args, n, seed)), args)


def main(argv=None):
    args = get_args(argv)
    net = load(args) if args.sample or args.ckpt else train(args)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.sample:
        if args.label is not None and not args.class_counts:
            raise ValueError(f"--label {args.label}: the model was trained without --classes")
        labels = draw_labels(args, args.sample, args.seed)
        images = sample(net, args.sample, args, args.seed, labels)
        arrays = {"images": images.permute(0, 2, 3, 1).numpy()} | ({"labels": labels[:, None].numpy()} if labels is not None else {})
        save(args.out / "samples.npz", lambda file: np.savez_compressed(file, **arrays))
        save_grid(args.out / "samples.png", images, None if args.label else labels)
        print(f"{args.sample} images in {args.out}/samples.npz and samples.png")
    if args.fid_runs:
        evaluate(args, net)


if __name__ == "__main__":
    try:
        main()
    except argparse.ArgumentTypeError as error:  # a --label that only the model can tell wrong
        print(f"{MODEL}.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"{MODEL}.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
