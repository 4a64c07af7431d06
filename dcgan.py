"""Deep convolutional GAN on 28 x 28 blood cells (DCGAN, Radford et al., 2016).

A generator turns random numbers into images. A discriminator learns to tell them from real ones, and the
generator learns to fool it.

Measured: FID-768 0.03062 ± 0.00075 after 1,778 epochs (five draws of 10,000 samples; a CPU core, torch
2.14.1). README.md says what the figure means, RESULTS.md how it was measured.

    python dcgan.py --sample 64              sample from the pretrained model
    python dcgan.py                          train on BloodMNIST, into out/dcgan
    python dcgan.py --resume                 continue a run that was stopped
    python dcgan.py --paper                  train with the paper's settings
    python dcgan.py --resume --fid-runs 5    measure what was trained: FID, mean ± std of five draws
"""
import argparse
import copy
import json
import math
import os
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
PAPER = dict(epochs=40, width=256, start=3, d_norm="batch", loss="standard", batch_size=128, lr=1e-3,
             d_lr=1e-3, label_smoothing=0.1, g_steps=3, diffaugment=False, ema=0.0)
NORMS = ("spectral", "batch")


def get_args(argv=None):
    p = argparse.ArgumentParser(epilog=__doc__, formatter_class=data.Help, allow_abbrev=False)
    add = p.add_argument_group("model").add_argument
    add("--latent-dim", type=data.number(int, 1, 1000), default=100, help="size of the latent")
    add("--width", type=data.number(int, 16, 4096), default=128,
        help="channels of the generator's first features and of the discriminator's last (paper: 256)")
    add("--start", type=int, choices=(3, 7), default=7, help="side of the first features (paper: 3)")
    add("--d-norm", choices=NORMS, default="spectral",
        help="normalisation of the discriminator's weights or features (paper: batch)")
    add = p.add_argument_group("training").add_argument
    add("--loss", choices=("relativistic", "standard"), default="relativistic",
        help="whether the discriminator judges pairs or single images (paper: standard)")
    add("--epochs", type=data.number(int, 1, 10**6), default=240, help="passes over the data (paper: 40)")
    add("--batch-size", type=data.number(int, 2, 10**5), default=64, help="images per step (paper: 128)")
    add("--lr", type=data.number(float, 0), default=2e-4, help="the generator's learning rate (paper: 1e-3)")
    add("--d-lr", type=data.number(float, 0), default=4e-4, help="the discriminator's (paper: 1e-3)")
    add("--label-smoothing", type=data.number(float, 0, 0.5), default=0.0, metavar="S",
        help="the discriminator's targets are 1 - S and S (paper: 0.1)")
    add("--g-steps", type=data.number(int, 1, 100), default=1,
        help="generator updates per discriminator update (paper: 3)")
    add("--diffaugment", action=argparse.BooleanOptionalAction, default=True,
        help="move, cut and recolour all images that the discriminator sees (paper: no)")
    add("--ema", type=data.number(float, 0, 1), default=0.05,
        help="half-life of the weights' moving average, as a share of the steps so far; 0: none (paper)")
    add("--seed", type=data.number(int, 0, 2**31), default=0, help="of the training, or of --sample")
    add("--classes", action="store_true", help="learn the class of each image, for --label")
    add("--augment", action="store_true", help="flip and turn the training images at random")
    add("--balance", type=data.number(float, 0, 1), default=0.0, metavar="B",
        help="draw a class of n images in proportion to n^(1-B); 1: all classes alike")
    add("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where it is fast")
    add("--device", type=data.device, default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--out", type=Path, help=f"folder of the run; else out/{NAME}")
    add("--resume", action="store_true", help="continue the run in --out, with its own settings")
    add("--overwrite", action="store_true", help="replace the run, or the samples, in --out")
    add("--paper", action="store_true", help="the paper's settings for all flags that are not given")
    add = p.add_argument_group("data, sampling and measuring").add_argument
    add("--data", default="bloodmnist", help="a 2-D MedMNIST name, an .npz, a folder of pictures, or demo")
    add("--root", help="folder of MedMNIST's files; else $MEDMNIST_ROOT or ~/.medmnist")
    add("--split", choices=("train", "val", "test", "all"), default="all",
        help="part to train on, or to measure against")
    add("--size", type=data.number(int, 16, 256), help="side of the images in pixels; else 28")
    add("--sample", type=data.number(int, 1, 10**6), metavar="N", help="no training: make N samples")
    add("--ckpt", metavar="FILE", help="no training: use this model.pt, or `pretrained`")
    add("--label", help="with --sample: a class, by name or number; else as in the training data")
    add("--png", action="store_true", help="with --sample: .png files as well, a folder a class")
    add("--fid-runs", type=data.number(int, 0, 1000), default=0, metavar="N", help="sets to measure")
    add("--fid-samples", type=data.number(int, 4), metavar="N", help="samples in a set; else 10000 or all")
    add("--dims", type=int, choices=tuple(fid.LAST), default=2048, help="features of the FID")
    add("--weights", default="fid", help="of Inception: fid, imagenet or a file")
    return read_args(p, argv)


# ----------------------------------------------------------------------------------------------------
# Model. Each layer of the two networks halves or doubles the image, whatever its size: 28 <-> 14 <-> 7 <-> 3.

class Generator(nn.Module):
    """Latent (B, latent) -> image (B, C, 28, 28) in [-1, 1]. classes: {name: images of it in the training
    data}."""

    def __init__(self, shape=(3, 28, 28), classes=(), latent_dim=100, start=7, width=128):
        super().__init__()
        data.choose("start", start, (3, 7))
        self.model_args = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.shape, self.classes, self.latent_dim = tuple(shape), dict(classes), latent_dim
        code = latent_dim + len(classes)                     # the label, one-hot, goes in with the latent
        widths = [width // 2 ** k for k in range(4 if start == 3 else 3)]  # 128, 64, 32
        sizes = [shape[1] // 2 ** k for k in reversed(range(len(widths)))]  # 3, 7, 14, 28 or 7, 14, 28
        layers = [nn.Unflatten(1, (code, 1, 1)), nn.ConvTranspose2d(code, widths[0], sizes[0], bias=False)]
        for a, b, size in zip(widths, widths[1:], sizes[1:], strict=False):
            layers += [nn.BatchNorm2d(a), nn.ReLU(), nn.ConvTranspose2d(
                a, b, 4, stride=2, padding=1, output_padding=size % 2, bias=False)]
        self.layers = nn.Sequential(*layers, nn.BatchNorm2d(widths[-1]), nn.ReLU(),
                                    nn.Conv2d(widths[-1], shape[0], 3, padding=1), nn.Tanh())
        self.apply(init)

    def forward(self, z, y=None):
        return self.layers(torch.cat([z, F.one_hot(y, len(self.classes))], 1) if self.classes else z)


class Discriminator(nn.Module):
    """Image (B, C, 28, 28) in [-1, 1] -> logit (B,), high for real; a label adds its projection (Miyato &
    Koyama, 2018).

    norm: "batch" as in the paper; "spectral" bounds how steep each layer is (Miyato et al., 2018), hence the
    factor at the end, and its first layer is at full resolution, where grain shows."""

    def __init__(self, shape=(3, 28, 28), classes=(), norm="spectral", width=128):
        super().__init__()
        data.choose("norm", norm, NORMS)
        spectral = norm == "spectral"                        # 28 -> 28 -> 14 -> 7 -> 3, else 14, 7, 3, 1
        self.scale = 32 if spectral else 1
        widths, layers = [width // k for k in (8, 4, 2, 1)], []
        for k, (a, b) in enumerate(zip((shape[0], *widths), widths, strict=False)):
            conv = nn.Conv2d(a, b, 3, padding=1) if spectral and k == 0 else nn.Conv2d(a, b, 4, 2, padding=1)
            layers += [conv, nn.Identity() if spectral or k == 0 else nn.BatchNorm2d(b), nn.LeakyReLU(0.2)]
        last = width * (shape[1] // (8 if spectral else 16)) ** 2
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(last, 1))
        self.label = nn.Embedding(len(classes), last) if classes else None
        self.apply(init)
        for module in list(self.modules()):
            if spectral and isinstance(module, (nn.Conv2d, nn.Linear, nn.Embedding)):
                nn.utils.parametrizations.spectral_norm(module)

    def forward(self, x, y=None):
        h = self.layers[:-1](x)
        logit = self.layers[-1](h)[:, 0]
        return self.scale * (logit + (self.label(y) * h).sum(1) if self.label else logit)


def init(module):
    """Weights from N(0, 0.02), Radford et al. sec. 4."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, 0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1, 0.02)


Model = Generator


# ----------------------------------------------------------------------------------------------------
# Objective.

def discriminator_loss(real_logits, fake_logits, relativistic=False, smoothing=0.0):
    """-log D(x) - log(1 - D(G(z))), Goodfellow et al. 2014, D the logit's sigmoid. Relativistic: of each pair
    the first is real, the second fake, -log sigmoid(logit(x) - logit(G(z))), Jolicoeur-Martineau 2019. The
    targets 1 and 0 are 1 - smoothing and smoothing."""
    pair = [real_logits - fake_logits] if relativistic else [real_logits, -fake_logits]
    return sum(F.binary_cross_entropy_with_logits(x, torch.full_like(x, 1 - smoothing)) for x in pair)


def generator_loss(fake_logits, real_logits=0):
    """-log D(G(z)), the non-saturating form, Goodfellow et al. 2014 sec. 3. Relativistic, with the logits of
    real images: -log sigmoid(logit(G(z)) - logit(x))."""
    return F.softplus(real_logits - fake_logits).mean()


def diffaugment(x):
    """Each image of (B, C, H, W) moved by up to an eighth, a square of half its side cut out, its brightness,
    saturation and contrast changed; differentiable, so that the generator learns through it (Zhao et al.,
    2020)."""
    b, c, h, w = x.shape
    u = torch.rand(7, b, 1, 1, 1, device=x.device)
    x = x + u[0] - 0.5
    mean = x.mean(1, keepdim=True)
    x = (x - mean) * 2 * u[1] + mean
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * (u[2] + 0.5) + mean
    rows, columns = torch.arange(h, device=x.device)[:, None], torch.arange(w, device=x.device)
    down, across = ((2 * v - 1) * (n // 8 + 0.5) for v, n in ((u[3], h), (u[4], w)))
    i = (rows + down.round().long()).expand(b, 1, h, w)
    j = (columns + across.round().long()).expand(b, 1, h, w)
    inside = (i >= 0) & (i < h) & (j >= 0) & (j < w)
    source = (i.clamp(0, h - 1) * w + j.clamp(0, w - 1)).flatten(2).expand(-1, c, -1)
    x = x.flatten(2).gather(2, source).view(b, c, h, w) * inside
    hole = ((rows - u[5] * h).abs() < h / 4) & ((columns - u[6] * w).abs() < w / 4)
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
    """n samples, uint8 (n, C, H, W) on the CPU, which the seed fixes. label: as data.draw_labels has it.
    batch: samples at a time; None: 1000 of 28 x 28, fewer of larger."""
    labels, device = data.draw_labels(model.classes, n, label, seed), model.layers[1].weight.device
    generator, model, images = torch.Generator(device).manual_seed(int(seed)), model.eval(), []
    batch = batch or max(1, 1000 * 28 ** 2 // math.prod(model.shape[1:]))
    for i in data.progress(range(0, n, batch), "sampling"):
        z = torch.randn(min(batch, n - i), model.latent_dim, generator=generator, device=device)
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
    rows = begin(args, state, about)
    relativistic = args.loss == "relativistic"
    view = diffaugment if args.diffaugment else lambda x: x

    per_epoch = data.n_batches(len(images), args.batch_size)
    saved = time.monotonic()
    for epoch in range(len(rows), args.epochs):
        torch.manual_seed(args.seed * 100003 + epoch)        # an epoch's randomness: from (seed, epoch) alone
        began, losses, step = time.time(), [], epoch * per_epoch
        for x, y in data.batches(images, labels, args.batch_size, args.augment, args.balance):
            step += 1
            real = to_model(x)

            # ---- (1) the discriminator: maximise log D(x) + log(1 - D(G(z))) ----
            with data.autocast(args.device, args.dtype):
                fake = generator(torch.randn(len(x), args.latent_dim, device=x.device), y)
                real_logits = discriminator(view(real), y).float()
                fake_logits = discriminator(view(fake.detach()), y).float()
                d_loss = discriminator_loss(real_logits, fake_logits, relativistic, args.label_smoothing)
            d_optimizer.zero_grad()
            d_loss.backward()
            d_optimizer.step()

            # ---- (2) the generator: maximise log D(G(z)) ----
            real_logits = real_logits.detach() if relativistic else 0
            for k in range(args.g_steps):
                with data.autocast(args.device, args.dtype):
                    if k:  # the first step learns from the images that the discriminator has just seen
                        fake = generator(torch.randn(len(x), args.latent_dim, device=x.device), y)
                    g_loss = generator_loss(discriminator(view(fake), y).float(), real_logits)
                g_optimizer.zero_grad()
                g_loss.backward(inputs=[*generator.parameters()])  # and not those of the discriminator
                g_optimizer.step()

            # after h = ema * step further steps a weight counts half: decay^h = 1/2
            update_ema(ema, generator, 0.5 ** (1 / (args.ema * step)) if args.ema else 0)
            losses.append(torch.stack([d_loss, g_loss]).detach())
        log(args, rows, losses, len(images), time.time() - began)
        if len(rows) == args.epochs or time.monotonic() - saved > data.SAVE_EVERY:
            save_model(args, ema, about, len(rows))
            save_checkpoint(args, state, rows, about)        # last: a run killed before it repeats the epoch
            saved = time.monotonic()


@torch.no_grad()
def update_ema(ema, model, decay):
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for mean, buffer in zip(ema.buffers(), model.buffers(), strict=True):  # BatchNorm's, averages already
        mean.copy_(buffer)


# ---- bookkeeping: the same lines in cvae.py, dcgan.py and ddpm.py ----

def read_args(p, argv):
    """The flags. --paper and --resume set the defaults of what is not given. Nothing is replaced unasked."""
    p.error = data.refuse
    args = p.parse_args(argv)
    if args.paper:
        p.set_defaults(**PAPER)
        args = p.parse_args(argv)
        print("the paper's settings:", *(
            f"--{k}={v}".replace("_", "-") for k, v in vars(args).items() if k in PAPER and v is not False),
            *(f"--no-{k}" for k in PAPER if getattr(args, k) is False))
    if "TORCHELASTIC_RUN_ID" in os.environ and (NAME != "ddpm" or args.sample or args.ckpt):
        raise data.Error("torchrun is for the training of ddpm.py alone; all else runs in one process")
    if args.ckpt and not (args.sample or args.fid_runs):
        p.error("--ckpt needs --sample N or --fid-runs N")
    named, args.out = args.out, args.out or Path("out") / NAME
    model, ckpt = args.out / "model.pt", args.out / "ckpt.pt"
    if Path(args.data).is_dir() and args.out.resolve().is_relative_to(Path(args.data).resolve()):
        raise data.Error(f"--out {args.out} lies in --data {args.data}, where samples.png would become data")
    if not (args.sample or args.ckpt):  # a training
        if args.resume:
            then = read(ckpt, "settings")["settings"]
            paper = {k: getattr(args, k) for k in PAPER} if args.paper else {}
            p.set_defaults(**then)
            now = vars(p.parse_args(argv)) | paper
            if other := [k for k in then if k not in ("data", "root", "epochs") and now[k] != then[k]]:
                raise data.Error("--resume with other settings: " + ", ".join(
                    f"{k} {then[k]} then, {now[k]} now" for k in other))
            vars(args).update({k: now[k] for k in then})
        elif not args.overwrite and (model.exists() or ckpt.exists()):
            raise data.Error(f"{args.out} holds a run: --resume continues it, --overwrite trains anew")
        return args
    if not args.ckpt:
        if not model.exists() and (named or ckpt.exists()):
            raise data.Error(f"there is no {model} yet: train it, or name a model: --ckpt FILE or pretrained")
        args.ckpt = model if model.exists() else "pretrained"
    elif (model.exists() or ckpt.exists()) and Path(args.ckpt).resolve() != model.resolve():
        raise data.Error(f"{args.out} holds another run than --ckpt {args.ckpt}: name another --out")
    there = (args.out / "samples.npz").exists() or (args.out / "samples").exists()
    if args.sample and there and not args.overwrite:
        raise data.Error(f"{args.out} holds samples: --overwrite replaces them; see --out")
    trained = load(args.ckpt, "cpu").trained  # what it is measured against, if nothing else is named
    p.set_defaults(**{k: v for k, v in trained.items() if k in ("data", "root", "split", "size")})
    now = p.parse_args(argv)
    if args.sample and now.data != trained["data"]:
        raise data.Error(f"--data {now.data}: {args.ckpt} has learned {trained['data']}; see --ckpt")
    vars(args).update({k: getattr(now, k) for k in ("data", "root", "split", "size")})
    return args


def settings(args):
    """What makes a training what it is; --resume starts from it."""
    free = {"device", "out", "resume", "overwrite", "paper", "compile", "sample", "ckpt", "label", "png",
            "fid_runs", "fid_samples", "dims", "weights", *SAMPLER}
    return {k: v for k, v in vars(args).items() if k not in free}


def validation_part(args, n):
    """Images and labels of the val part, where --split train leaves one, else None. A twelfth of n at most:
    the loss on them takes less than 3 % of an epoch."""
    if args.split != "train":
        return None
    try:
        images, labels, _ = data.load(args.data, args.root, "val", args.size)
    except data.Error as error:
        print(f"no validation loss: {error}")
        return None
    n = max(1, n // 12)
    return images[:n].to(args.device), labels[:n].to(args.device)


def begin(args, state, about):
    """The rows of the log that --resume continues, else []. Checks what can be known by now."""
    n, rows = sum(about["classes"].values()), []
    if args.fid_runs:
        fid.check(n, args.fid_samples, args.dims, args.weights)
    if args.resume:
        ckpt = data.read_torch(args.out / "ckpt.pt")
        for k, then in ckpt["data"].items():
            if str(about[k]) != str(then):  # the order of the classes counts
                raise data.Error(f"--resume with other data: {k} {then} then, {about[k]} now")
        for k, part in state.items():
            fill(part, ckpt[k], args.out / "ckpt.pt")
        rows = ckpt["rows"]
    steps = data.n_batches(n, args.batch_size)
    print(f"{args.data}, {args.split}: {n:,} images of {about['shape']}; {len(about['classes'])} classes:",
          ", ".join(f"{name} {count}" for name, count in about["classes"].items()))
    print(f"{sum(p.numel() for p in state['model'].parameters()) / 1e6:.1f} M parameters; {args.device}, "
          f"{'bf16' if data.bf16(args.device, args.dtype) else 'fp32'}; {steps} steps an epoch, "
          f"{steps * args.epochs:,} in all; {len(rows)} of {args.epochs} epochs done", flush=True)
    if not rows:
        save_checkpoint(args, state, rows, about)  # a disk that takes none is found now
    if len(rows) < args.epochs:  # results do not outlive what they came from
        for stale in ("fid.json",) if rows else ("fid.json", "model.pt", "log.csv", "samples.npz"):
            (args.out / stale).unlink(missing_ok=True)
    return rows


def log(args, rows, losses, n, seconds, val_loss=None):
    """Adds the epoch's row, prints it, writes log.csv. losses: a tensor a step, its values as in LOSSES."""
    means = torch.stack(losses).float().mean(0).tolist()
    if len(means) != len(LOSSES):
        raise TypeError(f"a step logs {len(means)} losses, LOSSES names {len(LOSSES)}: {', '.join(LOSSES)}")
    row = {"epoch": len(rows) + 1} | dict(zip(LOSSES, means, strict=True))
    if not all(map(math.isfinite, means)):
        raise data.Error(f"not finite: {row}; try a lower --lr", 1)
    row |= {} if val_loss is None else {"val_loss": val_loss}
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
    """model.pt, and samples.png: eight samples of each of the first eight classes, or 64."""
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
    file = read(path, "weights")
    try:
        model = Model(**file["model_args"])
        model.trained = file["trained"]
    except (KeyError, TypeError) as error:
        raise data.Error(f"{path} is of another version of {NAME}.py: {data.one_line(error)}", 1) from None
    fill(model, file["weights"], path)
    return model.to(device or data.device(), memory_format=torch.channels_last).eval()


def read(path, key):
    """The dict of a file that save_model (key "weights") or save_checkpoint ("settings") wrote."""
    file = data.read_torch(path)
    script = file.get("script") if isinstance(file, dict) and key in file else None
    if script != NAME:
        what = "model.pt" if key == "weights" else "ckpt.pt"
        raise data.Error(f"{path} is no {what} of {NAME}.py" + f", but of {script}.py" * bool(script), 1)
    return file


def fill(part, state, path):
    """part.load_state_dict(state), with one line for a network that has changed since."""
    if isinstance(part, nn.Module):
        mine = {k: v.shape for k, v in part.state_dict().items()}
        theirs = {k: v.shape for k, v in state.items()}
        if other := [k for k in mine | theirs if mine.get(k) != theirs.get(k)]:
            raise data.Error(f"{path}: {len(other)} weights do not fit the network, such as {other[0]}", 1)
    part.load_state_dict(state)


def main(argv=None):
    args = get_args(argv)
    if not (args.sample or args.ckpt):
        try:
            train(args)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped; --resume --out {args.out} continues it") from None
    if not (args.sample or args.fid_runs):
        return
    path = args.ckpt or args.out / "model.pt"
    model = load(path, args.device)
    trained, sampler = model.trained, {k: getattr(args, k) for k in ("dtype", *SAMPLER)}
    print(f"{path}: trained on {trained['data']} for {trained['epochs']} epochs")
    if args.sample:
        labels, began = data.draw_labels(model.classes, args.sample, args.label, args.seed), time.time()
        images = sample(model, args.sample, labels, args.seed, **sampler)
        data.save_samples(args.out, images, labels, [*model.classes], args.png)
        seconds = time.time() - began
        print(f"{args.sample} samples in {args.out}/samples.npz and samples.png, after {seconds:.1f} s")
    if args.fid_runs:
        real, _, _ = data.load(args.data, args.root, args.split, args.size)
        print(f"against {args.data}, {args.split}")
        net = fid.network(args.dims, args.weights, args.device)
        result = fid.protocol(lambda n, seed: sample(model, n, None, seed, **sampler), real, args.fid_runs,
                              args.fid_samples, net, args.out.parent)
        result |= {"data": args.data, "split": args.split, "size": real.shape[2], "trained": trained,
                   "parameters": sum(p.numel() for p in model.parameters()), "sampler": sampler,
                   "command": " ".join(["python", *sys.argv])}
        with data.atomic(args.out / "fid.json") as file:
            file.write(json.dumps(result, indent=1).encode())
        print(fid.text(result))


if __name__ == "__main__":
    data.command(main)
