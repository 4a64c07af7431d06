"""Deep convolutional GAN on 28 x 28 blood cells (DCGAN, Radford et al., 2016).

A generator turns random numbers into images. A discriminator learns to tell them from real ones, and the
generator learns to fool it.

Measured: FID-768 0.03062 ± 0.00075 with `--classes --split train --epochs 1778` (five draws of 10,000
samples; a CPU core, torch 2.14.1). RESULTS.md says how, README.md what the figure means. "The paper" below is
Matos (2025), see README.md.

    python dcgan.py --ckpt pretrained --sample 64     sample from the pretrained model
    python dcgan.py                                   train on BloodMNIST, into out/dcgan
    python dcgan.py --resume                          continue a run that was stopped
    python dcgan.py --sample 64                       sample from the model in out/dcgan
    python dcgan.py --ckpt out/dcgan/model.pt --fid-runs 5    its FID against what it has learned; see --split
    python dcgan.py --paper --out out/paper           train with the paper's settings
"""
import argparse
import copy
import json
import math
import os
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import fid

NAME = "dcgan"
LOSSES = ("d_loss", "g_loss")  # the losses in log.csv
SAMPLER = ()                   # the flags that sample() takes
# what --paper sets: the settings of Matos (2025) that are not the defaults
PAPER = dict(epochs=40, width=256, start=3, d_norm="batch", loss="standard", batch_size=128, lr=1e-3,
             d_lr=1e-3, label_smoothing=0.1, g_steps=3, diffaugment=False, ema=0.0)
NORMS = ("spectral", "batch")


def get_args(argv=None):
    p = argparse.ArgumentParser(epilog=__doc__, formatter_class=data.Help, allow_abbrev=False)
    add = p.add_argument_group("model").add_argument
    add("--latent-dim", type=data.number(int, 1, 1000), default=100,
        help="random numbers that the generator starts from")
    add("--width", type=data.number(int, 16, 4096), default=128,
        help="channels of the generator's first features and of the discriminator's last (paper: 256)")
    add("--start", type=int, choices=(3, 7), default=7,
        help="side of the generator's first features: 7, a quarter of 28, or 3, an eighth (paper: 3)")
    add("--d-norm", choices=NORMS, default="spectral",
        help="normalisation of the discriminator's weights or features (paper: batch)")
    add = p.add_argument_group("training").add_argument
    add("--loss", choices=("relativistic", "standard"), default="relativistic",
        help="relativistic: the score of a real image against that of a generated one; standard: each alone "
        "(paper)")
    add("--epochs", type=data.number(int, 1, 10**6), default=240, help="passes over the data (paper: 40)")
    add("--batch-size", type=data.number(int, 2, 10**5), default=64, help="images per step (paper: 128)")
    add("--lr", type=data.number(float, 0), default=2e-4, help="the generator's learning rate (paper: 1e-3)")
    add("--d-lr", type=data.number(float, 0), default=4e-4,
        help="the discriminator's learning rate (paper: 1e-3)")
    add("--label-smoothing", type=data.number(float, 0, 0.5), default=0.0, metavar="S",
        help="the discriminator's target is 1 - S for real images, S for generated ones (paper: 0.1)")
    add("--g-steps", type=data.number(int, 1, 100), default=1,
        help="generator updates per discriminator update (paper: 3)")
    add("--diffaugment", action=argparse.BooleanOptionalAction, default=True,
        help="move, cut and recolour all images that the discriminator sees (paper: --no-diffaugment)")
    add("--ema", type=data.number(float, 0, 1), default=0.05,
        help="half-life of the weights' moving average, as a share of the steps so far; 0: none (paper)")
    add("--seed", type=data.number(int, 0, 2**31), default=0,
        help="seed of the training, or of --sample; --fid-runs takes 100, 200, ..")
    add("--classes", action="store_true", help="learn the class of each image, for --label")
    add("--augment", action="store_true", help="flip and turn the training images at random")
    add("--balance", type=data.number(float, 0, 1), default=0.0, metavar="B",
        help="draw a class of n images in proportion to n^(1-B); 1: all classes equally often")
    add("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where that is faster")
    add("--device", type=data.device, default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--out", type=Path,
        help=f"folder of the run; default: out/{NAME}; with --ckpt: the model.pt's, or out/{NAME}-pretrained")
    add("--resume", action="store_true", help="continue the run in --out, with its own settings")
    add("--overwrite", action="store_true", help="replace the run, or the samples, in --out")
    add("--paper", action="store_true", help="settings of Matos (2025) for all flags not given")
    add = p.add_argument_group("data, sampling and measuring").add_argument
    add("--data", default="bloodmnist", help="a 2-D MedMNIST name, an .npz, a folder of pictures, or demo")
    add("--root", help="folder of MedMNIST's files; default: $MEDMNIST_ROOT or ~/.medmnist")
    add("--split", choices=("train", "val", "test", "all"), default="all",
        help="part to train on; with --ckpt: to measure against, by default the part that it was trained on")
    add("--size", type=data.number(int, 16, 256),
        help="side of the images, 16, 20 .. 256 pixels; default: 28, or what an .npz has")
    add("--sample", type=data.number(int, 1, 10**6), metavar="N", help="no training: make N samples")
    add("--ckpt", metavar="FILE", help="for --sample and --fid-runs: a model.pt, or `pretrained`")
    add("--label", help="with --sample: one class, by name or number; else all, as often as in the data")
    add("--png", action="store_true", help="with --sample: .png files as well, one folder per class")
    add("--fid-runs", type=data.number(int, 0, 1000), default=0, metavar="N",
        help="measure the FID of N sets of samples; without --ckpt or --sample: after the training")
    add("--fid-samples", type=data.number(int, 4), metavar="N",
        help="samples in each set; default: 10000, or as many as there are real images")
    add("--dims", type=int, choices=tuple(fid.LAST), default=2048, help="number of features of the FID")
    add("--weights", default="fid", help="Inception's weights: fid (the usual ones), imagenet or a file")
    return read_args(p, argv)


# ----------------------------------------------------------------------------------------------------
# Model. Generator: latent -> 7 -> 14 -> 28 pixels a side; with --start 3 from 3 on. Discriminator: 28 ->
# 28 -> 14 -> 7 -> 3 -> one logit; with --d-norm batch 28 -> 14 -> 7 -> 3 -> 1 -> one logit.

class Generator(nn.Module):
    """Latent (B, latent) -> image (B, C, 28, 28) in [-1, 1]. classes: {name: number of training images},
    empty for a model without labels."""

    def __init__(self, shape=(3, 28, 28), classes=(), latent_dim=100, start=7, width=128):
        super().__init__()
        data.choose("start", start, (3, 7))
        # the arguments above, which model.pt keeps to build the network again
        self.model_args = dict(shape=shape, classes=classes, latent_dim=latent_dim, start=start, width=width)
        self.shape, self.classes, self.latent_dim = tuple(shape), dict(classes), latent_dim
        inputs = latent_dim + len(classes)                   # latent and label, one-hot
        widths = [width // 2 ** k for k in range(4 if start == 3 else 3)]  # 128, 64, 32
        sizes = [shape[1] // 2 ** k for k in reversed(range(len(widths)))]  # 3, 7, 14, 28 or 7, 14, 28
        layers = [
            nn.Unflatten(1, (inputs, 1, 1)),
            nn.ConvTranspose2d(inputs, widths[0], sizes[0], bias=False)]
        for a, b, size in zip(widths, widths[1:], sizes[1:], strict=False):
            layers += [nn.BatchNorm2d(a), nn.ReLU(), nn.ConvTranspose2d(
                a, b, 4, stride=2, padding=1, output_padding=size % 2, bias=False)]
        self.layers = nn.Sequential(*layers, nn.BatchNorm2d(widths[-1]), nn.ReLU(),
                                    nn.Conv2d(widths[-1], shape[0], 3, padding=1), nn.Tanh())
        self.apply(init_weights)

    def forward(self, z, y=None):
        if self.classes:
            z = torch.cat([z, F.one_hot(y, len(self.classes))], 1)
        return self.layers(z)


class Discriminator(nn.Module):
    """Image (B, C, 28, 28) in [-1, 1] -> logit (B,), high for real. With labels, the inner product of the
    features and the class's embedding is added (projection, Miyato & Koyama, 2018).

    norm: "batch" as in the paper. "spectral": each layer's weights are divided by their largest singular
    value (Miyato et al., 2018); `scale` makes up for the small logits. The first layer then keeps the
    full resolution, where the fine texture shows."""

    def __init__(self, shape=(3, 28, 28), classes=(), norm="spectral", width=128):
        super().__init__()
        data.choose("norm", norm, NORMS)
        spectral = norm == "spectral"
        self.scale = 32 if spectral else 1                   # 32: found by trial
        widths, layers = [width // k for k in (8, 4, 2, 1)], []
        for k, (a, b) in enumerate(zip((shape[0], *widths), widths, strict=False)):
            if spectral and k == 0:
                conv = nn.Conv2d(a, b, 3, padding=1)
            else:
                conv = nn.Conv2d(a, b, 4, stride=2, padding=1)
            layers += [conv, nn.Identity() if spectral or k == 0 else nn.BatchNorm2d(b), nn.LeakyReLU(0.2)]
        last = width * (shape[1] // (8 if spectral else 16)) ** 2
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(last, 1))
        self.label = nn.Embedding(len(classes), last) if classes else None
        self.apply(init_weights)
        for module in list(self.modules()):
            if spectral and isinstance(module, (nn.Conv2d, nn.Linear, nn.Embedding)):
                nn.utils.parametrizations.spectral_norm(module)

    def forward(self, x, y=None):
        h = self.layers[:-1](x)
        logit = self.layers[-1](h)[:, 0]
        if self.label:
            logit = logit + (self.label(y) * h).sum(1)
        return self.scale * logit


def init_weights(module):
    """Weights with standard deviation 0.02, Radford et al. sec. 4."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, 0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1, 0.02)


Model = Generator  # its name in the bookkeeping


# ----------------------------------------------------------------------------------------------------
# Objective.

def discriminator_loss(real_logits, fake_logits, relativistic=False, smoothing=0.0):
    """Standard: -log D(x) - log(1 - D(G(z))), D = sigmoid(logit), Goodfellow et al. 2014. Relativistic: for
    pairs of a real and a generated image -log sigmoid(logit(x) - logit(G(z))), Jolicoeur-Martineau 2019.
    smoothing: the target is 1 - smoothing, not 1, for real images and pairs; smoothing, not 0, for generated
    images."""
    if relativistic:
        return bce(real_logits - fake_logits, 1 - smoothing)
    return bce(real_logits, 1 - smoothing) + bce(fake_logits, smoothing)


def bce(logits, target):
    """Binary cross-entropy of sigmoid(logits) with one target for all."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def generator_loss(fake_logits, real_logits=0):
    """Standard: -log D(G(z)), whose gradient does not vanish while the discriminator wins, Goodfellow et al.
    2014 sec. 3; real_logits is 0. Relativistic, with the logits of real images: -log sigmoid(logit(G(z)) -
    logit(x))."""
    return F.softplus(real_logits - fake_logits).mean()      # softplus(-u) = -log sigmoid(u)


def diffaugment(x):
    """Each image of (B, C, H, W) with its brightness, saturation and contrast changed, moved by up to an
    eighth of its side, and with a square of half its side cut out. Differentiable, so that the generator
    learns through it (Zhao et al., 2020)."""
    b, c, h, w = x.shape
    colour, move, cut = torch.rand(7, b, 1, 1, 1, device=x.device).split((3, 2, 2))
    x = x + colour[0] - 0.5                                  # brightness
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * 2 * colour[1] + grey                    # saturation
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * (colour[2] + 0.5) + mean                # contrast
    rows, columns = torch.arange(h, device=x.device)[:, None], torch.arange(w, device=x.device)
    # + 0.5: after rounding all shifts are equally likely
    dy, dx = ((2 * v - 1) * (n // 8 + 0.5) for v, n in zip(move, (h, w), strict=True))
    i = (rows + dy.round().long()).expand(b, 1, h, w)        # row and column where a pixel comes from
    j = (columns + dx.round().long()).expand(b, 1, h, w)
    inside = (i >= 0) & (i < h) & (j >= 0) & (j < w)
    source = (i.clamp(0, h - 1) * w + j.clamp(0, w - 1)).flatten(2).expand(-1, c, -1)
    x = x.flatten(2).gather(2, source).view(b, c, h, w) * inside  # from outside comes 0, a mid-grey
    hole = ((rows - cut[0] * h).abs() < h / 4) & ((columns - cut[1] * w).abs() < w / 4)
    return (x * ~hole).contiguous(memory_format=torch.channels_last)


def to_model(images):
    """uint8 [0, 255] -> float [-1, 1], the range of the generator's tanh."""
    return images.float() / 127.5 - 1


def from_model(x):
    """float [-1, 1] -> uint8 [0, 255]."""
    return ((x.float() + 1) * 127.5).round().to(torch.uint8)


# ----------------------------------------------------------------------------------------------------
# Sampling: the generator on latents from N(0, I).

@torch.inference_mode()
def sample(model, n, label=None, seed=0, dtype="auto", batch=None):
    """n samples, uint8 (n, C, H, W) on the CPU; the same seed gives the same ones. label: see
    data.draw_labels. batch: samples at a time; None: 1000 of 28 x 28, fewer of larger."""
    model, device, images = model.eval(), next(model.parameters()).device, []
    labels = data.draw_labels(model.classes, n, label, seed)
    rng = torch.Generator(device).manual_seed(int(seed))
    batch = batch or max(1, 1000 * 28 ** 2 // math.prod(model.shape[1:]))
    for i in data.progress(range(0, n, batch), "sampling"):
        z = torch.randn(min(batch, n - i), model.latent_dim, generator=rng, device=device)
        y = None if labels is None else labels[i:i + batch].to(device)
        with data.autocast(device, dtype):
            images.append(from_model(model(z, y)).cpu())
    return torch.cat(images)


# ----------------------------------------------------------------------------------------------------
# Training.

def train(args):
    images, labels, names = data.load(args.data, args.root, args.split, args.size)
    about = data.describe(images, labels, names)
    images, labels = images.to(args.device), labels.to(args.device)
    classes = about["classes"] if args.classes else {}
    torch.manual_seed(args.seed)
    generator = Generator(about["shape"], classes, args.latent_dim, args.start, args.width)
    discriminator = Discriminator(about["shape"], classes, args.d_norm, args.width)
    for net in (generator, discriminator):
        net.to(args.device, memory_format=torch.channels_last)
    ema = copy.deepcopy(generator).requires_grad_(False)
    g_optimizer = torch.optim.Adam(generator.parameters(), lr=args.lr, betas=(0.5, 0.999), fused=True)
    d_optimizer = torch.optim.Adam(discriminator.parameters(), lr=args.d_lr, betas=(0.5, 0.999), fused=True)
    state = {"model": generator, "ema": ema, "discriminator": discriminator, "g_optimizer": g_optimizer,
             "d_optimizer": d_optimizer}
    rows = begin(args, state, about)                      # of log.csv: one per epoch done; log() adds them
    relativistic = args.loss == "relativistic"
    change = diffaugment if args.diffaugment else lambda x: x

    per_epoch = data.n_batches(len(images), args.batch_size)
    saved = time.monotonic()
    for epoch in range(len(rows), args.epochs):
        torch.manual_seed(args.seed * 100003 + epoch)        # an epoch's randomness: from (seed, epoch) alone
        began, losses, step = time.time(), [], epoch * per_epoch
        for x, y in data.batches(images, labels, args.batch_size, args.augment, args.balance):
            step += 1
            real = to_model(x)

            # ---- (1) the discriminator learns to score real images higher than generated ones: maximise
            # log D(x) + log(1 - D(G(z))), or the pair's form ----
            with data.autocast(args.device, args.dtype):
                fake = generator(torch.randn(len(x), args.latent_dim, device=x.device), y)
                real_logits = discriminator(change(real), y).float()
                fake_logits = discriminator(change(fake.detach()), y).float()
                d_loss = discriminator_loss(real_logits, fake_logits, relativistic, args.label_smoothing)
            d_optimizer.zero_grad()
            d_loss.backward()
            d_optimizer.step()

            # ---- (2) the generator learns to raise the score of its images: maximise log D(G(z)), or the
            # pair's form. Its logits of the real images are those of (1), before the discriminator's step:
            # this saves a pass ----
            real_logits = real_logits.detach() if relativistic else 0
            for k in range(args.g_steps):
                with data.autocast(args.device, args.dtype):
                    if k:  # the first step learns from the images that the discriminator has just seen
                        fake = generator(torch.randn(len(x), args.latent_dim, device=x.device), y)
                    g_loss = generator_loss(discriminator(change(fake), y).float(), real_logits)
                g_optimizer.zero_grad()
                g_loss.backward(inputs=[*generator.parameters()])  # no gradients for the discriminator
                g_optimizer.step()

            # the average's half-life is h = args.ema * step steps: decay^h = 1/2
            update_ema(ema, generator, 0.5 ** (1 / (args.ema * step)) if args.ema else 0)
            losses.append(torch.stack([d_loss, g_loss]).detach())
        log(args, rows, losses, len(images), time.time() - began)
        if len(rows) == args.epochs or time.monotonic() - saved > data.SAVE_EVERY:
            save_model(args, ema, about, len(rows))
            save_checkpoint(args, state, rows, about)        # last: killed between, --resume makes both anew
            saved = time.monotonic()


@torch.no_grad()
def update_ema(ema, model, decay):
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for kept, buffer in zip(ema.buffers(), model.buffers(), strict=True):  # BatchNorm's are averages already
        kept.copy_(buffer)


# ---- bookkeeping: the same lines in cvae.py, dcgan.py and ddpm.py, so that each is complete ----

def read_args(p, argv):
    """The flags. What the command line names goes first; then, with --resume, the settings of the run; then,
    with --paper, the paper's; then the defaults. Checks what can be known now."""
    p.error = data.refuse
    defaults = vars(p.parse_args([]))
    given = vars(p.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults))))
    # argparse sets no default where the namespace has the name: None is what the command line does not name
    given = {k: v for k, v in given.items() if v is not None}
    args = argparse.Namespace(**defaults | (PAPER if given.get("paper") else {}) | given)
    training = not (args.sample or args.ckpt)
    if args.paper and training and not args.resume:
        flags = [f"no-{k}" if v is False else f"{k}={v}" for k, v in PAPER.items() if k not in given]
        print("the paper's settings:", *(f"--{flag}".replace("_", "-") for flag in flags))
    if "TORCHELASTIC_RUN_ID" in os.environ and not (NAME == "ddpm" and training):
        raise data.Error("torchrun is for the training of ddpm.py alone; all else runs in one process")
    if args.ckpt and not (args.sample or args.fid_runs):
        p.error("--ckpt needs --sample N or --fid-runs N")
    if (args.label or args.png) and not args.sample:
        p.error("--label and --png need --sample N")
    args.out = args.out or Path("out") / NAME
    if training:
        training_args(args, given)
    else:
        sampling_args(args, given)
    data.check_out(args.out, args.data if training or "data" in given else "")
    return args


def training_args(args, given):
    """A new run, in a folder that holds nothing yet; or with --resume the settings of the run in --out."""
    if not args.resume:
        files = ("ckpt.pt", "model.pt", "log.csv", "samples.npz", "samples", "samples.png", "fid.json")
        there = [name for name in files if (args.out / name).exists()]
        if there and not args.overwrite:
            resume = "--resume continues it, " if there[0] == "ckpt.pt" else ""
            raise data.Error(f"{args.out} holds {there[0]}: {resume}--overwrite replaces it; see --out")
        data.check_samples(args.out)
        return
    saved = read_file(args.out / "ckpt.pt", "settings")["settings"]
    if other := ", ".join(sorted(saved.keys() ^ settings(args).keys())):
        raise data.Error(f"{args.out / 'ckpt.pt'} is of another version of {NAME}.py (it differs in {other}):"
                         " continue it with that version, or train anew in another --out", 1)
    wanted = saved | {k: v for k, v in given.items() if k in saved}
    free = ("data", "root", "epochs", *SAMPLER)
    if other := [k for k in saved if k not in free and wanted[k] != saved[k]]:
        raise data.Error("--resume with other settings: " + ", ".join(
            f"{k} {saved[k]} then, {wanted[k]} now" for k in other))
    vars(args).update(wanted)


def sampling_args(args, given):
    """Which model: --ckpt, else that of the run in --out, else the pretrained one. Unless named, the data to
    measure against and the sampler's settings are those of its training."""
    model, ckpt = args.out / "model.pt", args.out / "ckpt.pt"
    if not args.ckpt:
        if not model.exists() and ("out" in given or ckpt.exists()):
            raise data.Error(f"there is no {model} yet: train it, or name a model: --ckpt FILE or pretrained")
        args.ckpt = model if model.exists() else "pretrained"
    if "out" not in given:
        args.out = Path("out") / f"{NAME}-pretrained" if args.ckpt == "pretrained" else Path(args.ckpt).parent
    elif (model.exists() or ckpt.exists()) and Path(args.ckpt).resolve() != model.resolve():
        raise data.Error(f"{args.out} holds another run than --ckpt {args.ckpt}: name another --out")
    files = ["samples.npz", "samples"] * bool(args.sample) + ["fid.json"] * bool(args.fid_runs)
    there = [name for name in files if (args.out / name).exists()]
    if there and not args.overwrite:
        raise data.Error(f"{args.out} holds {there[0]}: --overwrite replaces it; see --out")
    if args.sample:
        data.check_samples(args.out)
    trained = load(args.ckpt, "cpu").trained
    wanted = vars(args) | trained | (PAPER if args.paper else {}) | given
    vars(args).update({k: wanted[k] for k in ("data", "root", "split", "size", *SAMPLER)})
    if args.sample and args.data != trained["data"]:
        raise data.Error(f"--data {args.data}: {args.ckpt} has learned {trained['data']}; see --ckpt")


def settings(args):
    """The settings that a run keeps: all but these."""
    own = {"device", "out", "resume", "overwrite", "compile", "sample", "ckpt", "label", "png", "fid_runs",
           "fid_samples", "dims", "weights"}
    return {k: v for k, v in vars(args).items() if k not in own}


def begin(args, state, about):
    """Before the first epoch. With --resume: fills the networks and optimizers of `state` from ckpt.pt, and
    returns the rows of its log; else []. Checks what can fail, says what begins, and removes what is of an
    earlier run. about: what data.describe() says."""
    n, rows = sum(about["classes"].values()), []
    if n < 2:
        raise data.Error(f"{args.data}, {args.split}: one image is too few to learn from")
    if args.fid_runs:
        fid.check(n, args.fid_samples, args.dims, args.weights)
    if args.resume:
        ckpt = data.read_torch(args.out / "ckpt.pt")
        for k, then in ckpt["data"].items():
            if str(about[k]) != str(then):  # as text: two dicts are equal in any order of the classes
                raise data.Error(f"--resume with other data: {k} {then} then, {about[k]} now")
        for k, part in state.items():
            load_state(part, ckpt[k], args.out / "ckpt.pt")
        rows = ckpt["rows"]
        if rows and not rows[0].keys() >= {*LOSSES}:
            raise data.Error(f"{args.out / 'ckpt.pt'} is of another version of {NAME}.py", 1)
    steps = data.n_batches(n, args.batch_size)
    print(f"{args.data}, {args.split}: {n:,} images of {about['shape']}; {len(about['classes'])} classes:",
          ", ".join(f"{name} {count}" for name, count in about["classes"].items()))
    print(f"{sum(p.numel() for p in state['model'].parameters()) / 1e6:.1f} M parameters; {args.device}, "
          f"{'bf16' if data.bf16(args.device, args.dtype) else 'fp32'}; {steps} steps an epoch, "
          f"{steps * args.epochs:,} in all; {len(rows)} of {args.epochs} epochs done", flush=True)
    if not rows:
        save_checkpoint(args, state, rows, about)  # a full disk fails here, not after an epoch
    if len(rows) < args.epochs:
        for stale in ("fid.json",) if rows else ("fid.json", "model.pt", "log.csv", "samples.npz", "samples"):
            data.remove(args.out / stale)
    args.resume = True  # from here on --out holds this run
    return rows


def log(args, rows, losses, n, seconds, val_loss=None):
    """Adds the epoch's row, prints it, writes log.csv. losses: one tensor per step, with the values that
    LOSSES names. Raises Error where they are not finite."""
    means = torch.stack(losses).float().mean(0).tolist()
    row = {"epoch": len(rows) + 1} | dict(zip(LOSSES, means, strict=True))
    if not all(map(math.isfinite, (*means, val_loss or 0))):
        raise data.Error(f"not finite: {row}; try a lower --lr", 1)
    if rows and "val_loss" in rows[0] and val_loss is None:  # since --resume there is no val part any more
        val_loss = math.nan
    if val_loss is not None and (not rows or "val_loss" in rows[0]):
        row["val_loss"] = val_loss
    rows.append(row | {"seconds": seconds, "images/s": n / seconds})
    left = f"{(args.epochs - len(rows)) * seconds / 60:.0f} minutes left"
    print(*(f"{k} {v:.5g}" for k, v in rows[-1].items()), left, sep="  ", flush=True)
    with data.atomic(args.out / "log.csv") as file:
        np.savetxt(file, [[*r.values()] for r in rows], "%.6g", ",", header=",".join(rows[-1]), comments="")


def save_checkpoint(args, state, rows, about):
    ckpt = {k: part.state_dict() for k, part in state.items()}
    with data.atomic(args.out / "ckpt.pt") as file:
        torch.save(ckpt | {"script": NAME, "settings": settings(args), "data": about, "rows": rows}, file)


def save_model(args, net, about, epochs, **sampler):
    """Writes model.pt, and samples.png: eight samples of each of the first eight classes, or 64."""
    if not all(value.isfinite().all() for value in net.state_dict().values()):
        raise data.Error(f"the weights are not finite after epoch {epochs}; try a lower --lr", 1)
    seen = [k for k, count in enumerate(net.classes.values()) if count][:8]
    kinds = torch.tensor(seen).repeat_interleave(8) if seen else None
    images = sample(net, len(kinds) if seen else 64, kinds, dtype=args.dtype, **sampler)
    data.save_grid(args.out / "samples.png", data.sample_rows(images, kinds, [*net.classes]))
    trained = settings(args) | {"epochs": epochs, "of": about, "on": fid.machine(args.device)}
    with data.atomic(args.out / "model.pt") as file:
        torch.save({"script": NAME, "model_args": net.model_args, "weights": net.state_dict(),
                    "trained": trained}, file)


def load(path="pretrained", device=None):
    """The model of a model.pt, or the pretrained one, in eval mode. Raises Error for other files."""
    path = Path(__file__).parent / "checkpoints" / f"{NAME}.pt" if path == "pretrained" else path
    file = read_file(path, "weights")
    try:
        model = Model(**file["model_args"])
        model.trained = file["trained"]
    except (KeyError, TypeError) as error:
        raise data.Error(f"{path} is of another version of {NAME}.py: {data.one_line(error)}", 1) from None
    load_state(model, file["weights"], path)
    return model.to(device or data.device(), memory_format=torch.channels_last).eval()


def read_file(path, key):
    """The dict of a file that save_model (key "weights") or save_checkpoint ("settings") wrote."""
    file = data.read_torch(path)
    script = file.get("script") if isinstance(file, dict) and isinstance(file.get(key), dict) else None
    if script != NAME:
        what = "model.pt" if key == "weights" else "ckpt.pt"
        other = f", but of {script}.py" if script else ""
        raise data.Error(f"{path} is no {what} of {NAME}.py{other}", 1)
    return file


def load_state(part, state, path):
    """part.load_state_dict(state). Raises Error where the file is of another network."""
    try:
        part.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise data.Error(f"the weights in {path} do not fit the network: {reason:.99}", 1) from None


def main(argv=None):
    args = get_args(argv)
    if not (args.sample or args.ckpt):
        try:
            train(args)
        except KeyboardInterrupt:
            how = f"; --resume --out {args.out} continues it" if args.resume else ""
            raise KeyboardInterrupt(f"stopped{how}") from None
    if not (args.sample or args.fid_runs):
        return
    path = args.ckpt or args.out / "model.pt"
    model = load(path, args.device)
    trained, sampler = model.trained, {k: getattr(args, k) for k in ("dtype", *SAMPLER)}
    print(f"{path}: trained on {trained['data']}, {trained['split']}, for {trained['epochs']} epochs")
    if args.sample:
        labels, began = data.draw_labels(model.classes, args.sample, args.label, args.seed), time.time()
        images = sample(model, args.sample, labels, args.seed, **sampler)
        data.save_samples(args.out, images, labels, [*model.classes], args.png)
        seconds = time.time() - began
        print(f"{args.sample} samples in {args.out}/samples.npz and samples.png, after {seconds:.3g} s")
    if args.fid_runs:
        real, _, _ = data.load(args.data, args.root, args.split, args.size)
        known = ""
        if args.data == trained["data"] and trained["split"] in (args.split, "all"):
            known = ", which it was trained on"
        elif args.data == trained["data"] and args.split == "all":
            known = f", whose {trained['split']} part it was trained on"
        print(f"against {args.data}, {args.split}{known}")
        one = sample(model, 1, **sampler)  # flags and images that do not fit fail here
        if one.shape[1:] != real.shape[1:]:
            raise data.Error(f"samples are {[*one.shape[1:]]}, the real images {[*real.shape[1:]]}")
        net = fid.network(args.dims, args.weights, args.device)
        result = fid.protocol(lambda n, seed: sample(model, n, None, seed, **sampler), real, args.fid_runs,
                              args.fid_samples, net, args.out.parent)
        result |= {"data": args.data, "split": args.split, "size": real.shape[2], "trained": trained,
                   "parameters": sum(p.numel() for p in model.parameters()), "sampler": sampler,
                   "command": shlex.join(["python", f"{NAME}.py", *(sys.argv[1:] if argv is None else argv)])}
        with data.atomic(args.out / "fid.json") as file:
            file.write(json.dumps(result, indent=1).encode())
        print(fid.text(result))


if __name__ == "__main__":
    data.command(main)
