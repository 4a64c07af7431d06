"""Convolutional variational autoencoder on 28 x 28 blood cells (VAE, Kingma & Welling, 2014).

An encoder turns an image into a Gaussian over latents, a decoder turns a latent into an image. Training
maximises a lower bound of the data's log-likelihood, the ELBO (evidence lower bound). "The paper" below is
Matos (2025), see README.md.

Measured: FID-768 0.4059 ± 0.0012 with `--classes --split train --epochs 26` in an earlier version (five
draws of 10,000 samples; a CPU core, torch 2.14.1). RESULTS.md says how, README.md what the figure means.

    python cvae.py --ckpt pretrained --sample 64      sample from the pretrained model
    python cvae.py                                    train on BloodMNIST, into out/cvae
    python cvae.py --resume                           continue a run that was stopped
    python cvae.py --sample 64                        sample from the model in out/cvae
    python cvae.py --ckpt out/cvae/model.pt --fid-runs 5    its FID against what it has learned; see --split
    python cvae.py --paper --out out/paper            train with the paper's settings
"""
import argparse
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

NAME = "cvae"
LOSSES = ("loss", "nll", "kl")  # the losses in log.csv
SAMPLER = ("prior",)            # the flags that sample() takes
# what --paper sets: the settings of Matos (2025) that are not the defaults
PAPER = dict(latent_dim=64, decoder="transposed", likelihood="bernoulli", prior="normal", kl_weight=0.75)
DECODERS = ("residual", "transposed")
LIKELIHOODS = ("gaussian", "bernoulli")
PRIORS = ("fitted", "normal")


def get_args(argv=None):
    p = argparse.ArgumentParser(epilog=__doc__, formatter_class=data.Help, allow_abbrev=False)
    add = p.add_argument_group("model").add_argument
    add("--latent-dim", type=data.number(int, 1, 1000), default=128, help="size of the latent (paper: 64)")
    add("--decoder", choices=DECODERS, default="residual",
        help="residual blocks, or the paper's transposed convolutions")
    add("--likelihood", choices=LIKELIHOODS, default="gaussian",
        help="noise model of a pixel: a Gaussian of the best width, or cross-entropy (paper)")
    add("--kl-weight", type=data.number(float, 0), default=1.0, help="weight of the KL term (paper: 0.75)")
    add = p.add_argument_group("training").add_argument
    add("--epochs", type=data.number(int, 1, 10**6), default=100, help="passes over the data")
    add("--batch-size", type=data.number(int, 1, 10**5), default=128, help="images per step")
    add("--lr", type=data.number(float, 0), default=1e-3, help="learning rate of Adam")
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
    add("--prior", choices=PRIORS, default="fitted",
        help="sample latents from a Gaussian fitted to those of each class, or from N(0, I) (paper)")
    return read_args(p, argv)


# ----------------------------------------------------------------------------------------------------
# Model.

class GroupNorm(nn.GroupNorm):
    """Computes in fp32 even under autocast: bf16 is too coarse for mean and variance, and slower on a CPU."""

    def forward(self, x):
        return super().forward(x.float())


class Residual(nn.Module):
    """Two 3 x 3 convolutions that are added to their input."""

    def __init__(self, channels):
        super().__init__()
        self.layers = nn.Sequential(
            GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
            GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x):
        return x + self.layers(x)


class VAE(nn.Module):
    """Encoder: image -> mean and log-variance of the latent. Decoder: latent -> logits of the image.
    classes: {name: number of training images}, empty for a model without labels."""

    def __init__(self, shape=(3, 28, 28), classes=(), latent_dim=128, decoder="residual"):
        super().__init__()
        data.choose("decoder", decoder, DECODERS)
        # the arguments above, which model.pt keeps to build the network again
        self.model_args = dict(shape=shape, classes=classes, latent_dim=latent_dim, decoder=decoder)
        self.shape, self.classes, self.latent_dim = tuple(shape), dict(classes), latent_dim
        self.label = nn.Embedding(len(classes), 2 * latent_dim) if classes else None  # added to mu, logvar
        inputs = latent_dim + len(classes)                   # the decoder sees latent and label, one-hot
        full, half, quarter, eighth = (shape[1] // 2 ** k for k in range(4))  # 28, 14, 7, 3
        self.encoder = nn.Sequential(
            nn.Conv2d(shape[0], 32, 4, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(64, 128, 4, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(128 * eighth ** 2, 2 * latent_dim))
        if decoder == "transposed":                          # output_padding: 3 doubled is 6, with it 7
            self.decoder = nn.Sequential(
                nn.Linear(inputs, 128 * eighth ** 2), nn.ReLU(), nn.Unflatten(1, (128, eighth, eighth)),
                nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1, output_padding=quarter % 2), nn.ReLU(),
                nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1, output_padding=half % 2), nn.ReLU(),
                nn.ConvTranspose2d(32, shape[0], 4, stride=2, padding=1, output_padding=full % 2))
        else:                                                # the others leave checkerboards
            self.decoder = nn.Sequential(
                nn.Linear(inputs, 128 * quarter ** 2), nn.Unflatten(1, (128, quarter, quarter)),
                Residual(128), nn.Upsample(half), nn.Conv2d(128, 64, 3, padding=1),
                Residual(64), nn.Upsample(full), nn.Conv2d(64, 32, 3, padding=1),
                Residual(32), GroupNorm(8, 32), nn.SiLU(), nn.Conv2d(32, shape[0], 3, padding=1))
        groups = max(len(classes), 1)                        # the prior: N(mean, L L^T), one a class
        self.register_buffer("mean", torch.zeros(groups, latent_dim))
        self.register_buffer("cholesky", torch.eye(latent_dim).repeat(groups, 1, 1))
        if classes:
            nn.init.zeros_(self.label.weight)

    def encode(self, x, y=None):                             # (B, C, 28, 28) -> mu, logvar, (B, latent) each
        h = self.encoder(x).float()
        if self.classes:
            h = h + self.label(y)
        return h.chunk(2, dim=1)

    def decode(self, z, y=None):                             # (B, latent) -> (B, C, 28, 28), logits
        if self.classes:
            z = torch.cat([z, F.one_hot(y, len(self.classes))], 1)
        return self.decoder(z)


Model = VAE  # its name in the bookkeeping


# ----------------------------------------------------------------------------------------------------
# Objective.

def reparameterize(mu, logvar, generator=None):
    """A draw z = mu + sigma * epsilon from N(mu, sigma^2), epsilon from N(0, I), so that gradients reach mu
    and sigma. Kingma & Welling sec. 2.4."""
    epsilon = torch.randn(mu.shape, generator=generator, device=mu.device)
    return mu + (0.5 * logvar).exp() * epsilon


def kl_divergence(mu, logvar):
    """KL(N(mu, sigma^2) || N(0, I)), summed over the latent: (B, latent) -> (B,). Kingma & Welling app. B."""
    return 0.5 * (mu ** 2 + logvar.exp() - 1 - logvar).sum(1)


def negative_log_likelihood(logits, x, likelihood):
    """-log p(x | z) in nats, the mean over the images. x: (B, C, H, W) in [0, 1].

    bernoulli: binary cross-entropy, which is no density of grey values (Loaiza-Ganem & Cunningham, 2019).
    gaussian: each pixel from N(sigmoid(logits), sigma^2), with one sigma for the batch. A pixel then costs
    (log(2 pi sigma^2) + mse / sigma^2) / 2. That is least at sigma^2 = mse (Rybkin et al., 2021, eq. 4) and
    becomes (log(2 pi mse) + 1) / 2: no weight between NLL and KL has to be tuned. A density may exceed 1, so
    the NLL can be negative. mse is at least the variance of rounding to 1/255, (1/255)^2 / 12."""
    data.choose("likelihood", likelihood, LIKELIHOODS)
    if likelihood == "bernoulli":
        return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)
    mse = F.mse_loss(logits.sigmoid(), x).clamp(min=(1 / 255) ** 2 / 12)
    return 0.5 * x[0].numel() * (1 + math.log(2 * math.pi) + mse.log())


def objective(model, x, y, kl_weight=1.0, likelihood="gaussian"):
    """(loss, nll, kl), means over the images. loss = nll + kl_weight kl, with gaussian and weight 1 the
    negative ELBO; the weight is the beta of Higgins et al. (2017). x: (B, C, H, W) in [0, 1], what
    to_model() gives. y: labels (B,) or None."""
    mu, logvar = model.encode(x, y)
    nll = negative_log_likelihood(model.decode(reparameterize(mu, logvar), y).float(), x, likelihood)
    kl = kl_divergence(mu, logvar).mean()
    return nll + kl_weight * kl, nll, kl


def to_model(images):
    """uint8 [0, 255] -> float [0, 1], what the network sees."""
    return images.float() / 255


def from_model(logits):
    """The decoder's logits -> uint8 [0, 255]."""
    return (logits.float().sigmoid() * 255).round().to(torch.uint8)


# ----------------------------------------------------------------------------------------------------
# Sampling: latents from the prior, decoded to each pixel's mean.

@torch.inference_mode()
def sample(model, n, label=None, seed=0, dtype="auto", prior="fitted", batch=None):
    """n samples, uint8 (n, C, H, W) on the CPU; the same seed gives the same ones. label: see
    data.draw_labels. prior: "fitted" or "normal". batch: samples at a time; None: 1000 of 28 x 28, fewer of
    larger."""
    data.choose("prior", prior, PRIORS)
    device, images = next(model.parameters()).device, []
    labels = data.draw_labels(model.classes, n, label, seed)
    generator = torch.Generator(device).manual_seed(int(seed))
    batch = batch or max(1, 1000 * 28 ** 2 // math.prod(model.shape[1:]))
    for i in data.progress(range(0, n, batch), "sampling"):
        z = torch.randn(min(batch, n - i), model.latent_dim, generator=generator, device=device)
        y = None if labels is None else labels[i:i + batch].to(device)
        if prior == "fitted":
            k = 0 if y is None else y                        # without classes there is one prior
            z = model.mean[k] + (model.cholesky[k] @ z[..., None])[..., 0]
        with data.autocast(device, dtype):
            images.append(from_model(model.decode(z, y)).cpu())
    return torch.cat(images)


@torch.inference_mode()
def fit_prior(model, images, labels):
    """Fits a Gaussian to the latents of each class (Ghosh et al., 2020). Training pulls them towards N(0, I),
    but they do not fill it, and a latent from where none lies gives a bad image. With fewer images than
    latent dimensions d a covariance would be singular. So it is a weighted mean: n parts the covariance of
    the class's n latents, d parts that of all. A class without images keeps N(0, I)."""
    generator, latents = torch.Generator(images.device).manual_seed(0), []
    for i in range(0, len(images), 1000):
        mu, logvar = model.encode(to_model(images[i:i + 1000]), labels[i:i + 1000])
        latents.append(reparameterize(mu, logvar, generator))  # draws, as the decoder has learned them
    latents, d = torch.cat(latents), model.latent_dim
    whole = latents.T.cov(correction=0) + 1e-4 * torch.eye(d, device=latents.device)  # stable to factorize
    for k in range(len(model.mean)):
        z = latents[labels == k] if model.classes else latents
        if n := len(z):
            model.mean[k] = z.mean(0)
            covariance = (n * z.T.cov(correction=0) + d * whole) / (n + d)
            try:
                model.cholesky[k] = torch.linalg.cholesky(covariance)
            except torch.linalg.LinAlgError:
                raise data.Error("the latents have grown beyond all bounds; try a lower --lr", 1) from None


# ----------------------------------------------------------------------------------------------------
# Training.

def train(args):
    images, labels, names = data.load(args.data, args.root, args.split, args.size)
    about = data.describe(images, labels, names)
    held_out = data.validation_part(args.data, args.root, args.split, args.size, images, len(names))
    held_out = [x.to(args.device) for x in held_out]
    images, labels = images.to(args.device), labels.to(args.device)
    torch.manual_seed(args.seed)
    model = VAE(about["shape"], about["classes"] if args.classes else {}, args.latent_dim, args.decoder)
    model = model.to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
    state = {"model": model, "optimizer": optimizer}
    rows = begin(args, state, about)                      # of log.csv: one per epoch done; log() adds them

    saved = time.monotonic()
    for epoch in range(len(rows), args.epochs):
        torch.manual_seed(args.seed * 100003 + epoch)        # an epoch's randomness: from (seed, epoch) alone
        began, losses = time.time(), []
        for x, y in data.batches(images, labels, args.batch_size, args.augment, args.balance):
            with data.autocast(args.device, args.dtype):
                loss, nll, kl = objective(model, to_model(x), y, args.kl_weight, args.likelihood)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(torch.stack([loss, nll, kl]).detach())
        val_loss = validate(args, model, *held_out) if held_out else None
        log(args, rows, losses, len(images), time.time() - began, val_loss)
        if len(rows) == args.epochs or time.monotonic() - saved > data.SAVE_EVERY:
            fit_prior(model, images, labels)                 # it is not learned by gradients
            save_model(args, model, about, len(rows), prior=args.prior)
            save_checkpoint(args, state, rows, about)        # last: killed between, --resume makes both anew
            saved = time.monotonic()


@torch.no_grad()
def validate(args, model, images, labels):
    """The loss on held-out images, with the same noise each time, so that epochs compare."""
    torch.manual_seed(0)
    total = 0
    for x, y in zip(images.split(args.batch_size), labels.split(args.batch_size), strict=True):
        with data.autocast(args.device, args.dtype):
            total += len(x) * objective(model, to_model(x), y, args.kl_weight, args.likelihood)[0]
    return total.item() / len(images)


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
