"""Convolutional variational autoencoder on 28 x 28 blood cells (Kingma & Welling, 2014).

An encoder turns an image into a Gaussian over codes, a decoder turns a code into an image; they learn
together a bound of the data's likelihood.

    python cvae.py --sample 64              draw cells from the trained model that comes along
    python cvae.py                          train on BloodMNIST, into out/cvae
    python cvae.py --resume                 go on where a run was stopped
    python cvae.py --paper                  train with the paper's settings
    python cvae.py --resume --fid-runs 5    measure what was trained: prints FID mean ± std

Measured: FID-768 0.4059 ± 0.0012 after 26 epochs (five draws of 10,000 cells; a CPU core,
torch 2.14.1). README.md says what the figure means, RESULTS.md by which commands it came about.
"""
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import fid

NAME, LOSSES, SAMPLER = "cvae", ("loss", "nll", "kl"), ("prior",)
PAPER = dict(latent_dim=64, decoder="transposed", likelihood="bernoulli", prior="normal", kl_weight=0.75)


def get_args(argv=None):
    p = data.Parser(__doc__)
    add = p.add_argument_group("model and training").add_argument
    add("--latent-dim", type=data.number(int, 1, 1000), default=128, help="size of the code (paper: 64)")
    add("--decoder", choices=("residual", "transposed"), default="residual",
        help="residual blocks, or the paper's transposed convolutions")
    add("--likelihood", choices=("gaussian", "bernoulli"), default="gaussian",
        help="of a pixel: with a learned width, or the paper's cross-entropy")
    add("--epochs", type=data.number(int, 1, 10**6), default=100, help="passes over the data")
    add("--batch-size", type=data.number(int, 1, 10**5), default=128, help="images per step")
    add("--lr", type=data.number(float, 0), default=1e-3, help="learning rate of Adam")
    add("--kl-weight", type=data.number(float, 0), default=1.0, help="beta, of the KL term (paper: 0.75)")
    add = p.add_argument_group("sampling").add_argument
    add("--prior", choices=("fitted", "normal"), default="fitted",
        help="codes to draw from: a Gaussian fitted to the codes of each class, or N(0, I) (paper)")
    return p.parse(argv, NAME, PAPER, SAMPLER)


# ----------------------------------------------------------------------------------------------------
# Model.

class GroupNorm(nn.GroupNorm):
    """In fp32 under bf16 autocast too: its sums need the digits, and on a CPU it is the faster kernel."""

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
    """Encoder: image -> mean and log-variance of the code. Decoder: code -> logits of the image.
    classes: {name: images of it in the training data}, empty for a model without labels."""

    def __init__(self, shape=(3, 28, 28), classes=(), latent_dim=128, decoder="residual"):
        super().__init__()
        self.settings = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.classes, self.latent_dim = dict(classes), latent_dim
        self.label = nn.Embedding(len(classes), 2 * latent_dim) if classes else None
        code = latent_dim + len(classes)                     # the decoder sees the label, one-hot
        full, half, quarter, eighth = (shape[1] // 2 ** k for k in range(4))  # 28, 14, 7, 3
        self.encoder = nn.Sequential(
            nn.Conv2d(shape[0], 32, 4, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(64, 128, 4, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(128 * eighth ** 2, 2 * latent_dim))
        if decoder == "transposed":                          # output_padding: the row that halving dropped
            self.decoder = nn.Sequential(
                nn.Linear(code, 128 * eighth ** 2), nn.ReLU(), nn.Unflatten(1, (128, eighth, eighth)),
                nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1, output_padding=quarter % 2), nn.ReLU(),
                nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1, output_padding=half % 2), nn.ReLU(),
                nn.ConvTranspose2d(32, shape[0], 4, stride=2, padding=1, output_padding=full % 2))
        else:                                                # upsampling leaves no checkerboard
            self.decoder = nn.Sequential(
                nn.Linear(code, 128 * quarter ** 2), nn.Unflatten(1, (128, quarter, quarter)),
                Residual(128), nn.Upsample(half), nn.Conv2d(128, 64, 3, padding=1),
                Residual(64), nn.Upsample(full), nn.Conv2d(64, 32, 3, padding=1),
                Residual(32), GroupNorm(8, 32), nn.SiLU(), nn.Conv2d(32, shape[0], 3, padding=1))
        groups = max(len(classes), 1)                        # the prior: N(mean, root root^T), one a class
        self.register_buffer("mean", torch.zeros(groups, latent_dim))
        self.register_buffer("root", torch.eye(latent_dim).repeat(groups, 1, 1))
        if classes:
            nn.init.zeros_(self.label.weight)

    def encode(self, x, y=None):                             # (B, C, 28, 28) -> (B, latent), (B, latent)
        h = self.encoder(x).float()
        return (h + self.label(y) if self.classes else h).chunk(2, dim=1)

    def decode(self, z, y=None):                             # (B, latent) -> (B, C, 28, 28), logits
        return self.decoder(torch.cat([z, F.one_hot(y, len(self.classes))], 1) if self.classes else z)


Model = VAE


# ----------------------------------------------------------------------------------------------------
# Objective.

def reparameterize(mu, logvar):
    """z = mu + sigma * epsilon: a draw from N(mu, sigma^2) that gradients pass through, Kingma & Welling sec.
    2.4."""
    return mu + (0.5 * logvar).exp() * torch.randn_like(mu)


def kl_divergence(mu, logvar):
    """KL(N(mu, sigma^2) || N(0, I)), summed over the code: (B, latent) -> (B,). Kingma & Welling app. B."""
    return 0.5 * (mu ** 2 + logvar.exp() - 1 - logvar).sum(1)


def negative_log_likelihood(logits, x, likelihood):
    """-log p(x | z) in nats an image, x (B, C, H, W) in [0, 1].

    bernoulli: binary cross-entropy. gaussian: each pixel from N(sigmoid(logits), s^2), with the one width s
    that makes the batch most likely, its mean squared error (Rybkin et al., 2021, eq. 4): the sharper the
    decoder, the more detail counts."""
    if likelihood == "bernoulli":
        return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)
    mse = F.mse_loss(logits.sigmoid(), x)
    return 0.5 * x[0].numel() * (1 + math.log(2 * math.pi) + mse.log())


def objective(model, x, y, kl_weight=1.0, likelihood="gaussian"):
    """The negative evidence bound, NLL + beta KL (Higgins et al., 2017), in nats an image.

    x: (B, C, H, W) in [0, 1], which both likelihoods need. y: labels (B,) or None. Returns loss, nll, kl."""
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
# Sampling: codes from the prior, decoded to each pixel's mean.

@torch.inference_mode()
def sample(model, n, label=None, seed=0, dtype="auto", prior="fitted", batch_size=1000):
    """n images, uint8 (n, C, H, W) on the CPU; the seed fixes them. label: a class's number or name, a tensor
    (n,) of numbers, or None for the proportions of the training data. prior: "fitted" or "normal"."""
    labels, device, images = data.draw_labels(model.classes, n, label, seed), model.mean.device, []
    generator = torch.Generator(device).manual_seed(seed)
    for i in range(0, n, batch_size):
        z = torch.randn(min(batch_size, n - i), model.latent_dim, generator=generator, device=device)
        y = None if labels is None else labels[i:i + batch_size].to(device)
        if prior == "fitted":
            k = slice(1) if y is None else y
            z = model.mean[k] + (model.root[k] @ z[..., None])[..., 0]
        with data.autocast(device, dtype):
            images.append(from_model(model.decode(z, y)).cpu())
    return torch.cat(images)


@torch.inference_mode()
def fit_prior(model, images, labels):
    """Fits a Gaussian to the codes z ~ q(z | x) of each class (Ghosh et al., 2020). Its covariance is drawn
    towards that of all codes, as by D more of them: that of few would be singular."""
    generator, codes = torch.Generator(images.device).manual_seed(0), []
    for i in range(0, len(images), 1000):
        mu, logvar = model.encode(to_model(images[i:i + 1000]), labels[i:i + 1000])
        codes.append(mu + (0.5 * logvar).exp() * torch.randn(mu.shape, generator=generator, device=mu.device))
    codes, d = torch.cat(codes), model.latent_dim
    whole = codes.T.cov(correction=0) + 1e-4 * torch.eye(d, device=codes.device)
    for k in range(len(model.mean)):
        z = codes[labels == k] if model.classes else codes
        if n := len(z):
            model.mean[k] = z.mean(0)
            model.root[k] = torch.linalg.cholesky((n * z.T.cov(correction=0) + d * whole) / (n + d))


# ----------------------------------------------------------------------------------------------------
# Training.

def train(args):
    images, labels, classes = training_data(args)
    torch.manual_seed(args.seed)
    model = VAE(tuple(images.shape[1:]), classes, args.latent_dim, args.decoder)
    model = model.to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
    state = {"model": model, "optimizer": optimizer}

    def save(epoch):
        fit_prior(model, images, labels)
        save_model(args, model, epoch)

    losses = []
    for batches in epochs(args, images, labels, state, losses, save):
        for _, x, y in batches:
            with data.autocast(args.device, args.dtype):
                loss, nll, kl = objective(model, to_model(x), y, args.kl_weight, args.likelihood)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(torch.stack([loss, nll, kl]).detach())


# ---- plumbing: the same lines in cvae.py, dcgan.py and ddpm.py ----

def training_data(args):
    """Images, labels and {class: images of it}. Checks here what can be known before the first step."""
    images, labels = data.load(args.data, args.root, args.split, args.size)
    if args.fid_runs:  # what the FID after the training will need
        fid.how_many(args.fid_samples, len(images))
        fid.network(args.dims, args.weights)
    classes = data.classes(args.data, labels) if args.classes else {}
    return images.to(args.device), labels.to(args.device), classes


def epochs(args, images, labels, state, losses, save_model):
    """Yields each epoch's batches of (step, images, labels) and keeps the books: log.csv, model.pt, ckpt.pt.
    Crash-only: what is random in epoch k comes from (seed, k), what lasts is in `state`, ckpt.pt is the end
    of an epoch: a run that was killed anywhere goes on from there, to the same end."""
    path, n, rows = args.out / "ckpt.pt", len(images), []
    names, per_epoch = ("epoch", *LOSSES, "seconds", "images/s"), math.ceil(n / args.batch_size)
    if args.resume:
        ckpt = data.read_torch(path)
        then, now, rows = ckpt["settings"], args.settings, ckpt["rows"]
        if other := [k for k in then | now if then.get(k) != now.get(k)]:
            raise data.UsageError("--resume with other settings: " + ", ".join(
                f"{k} {then.get(k)} then, {now.get(k)} now" for k in other))
        for k, part in state.items():
            part.load_state_dict(ckpt[k])
    start, size = len(rows), sum(p.numel() for p in state["model"].parameters()) / 1e6
    precision = "bf16" if data.bf16(args.device, args.dtype) else "fp32"
    print(f"{args.data}, {args.split}: {n:,} images of {[*images.shape[1:]]}; {size:.1f} M parameters; "
          f"{args.device}, {precision}; {start} of {args.epochs} epochs done", flush=True)

    def checkpoint():
        ckpt = {k: part.state_dict() for k, part in state.items()} | {"settings": args.settings, "rows": rows}
        data.save(path, lambda file: torch.save(ckpt, file))

    def batches():
        for i, (x, y) in enumerate(data.batches(images, labels, args.batch_size, args.augment), 1):
            yield epoch * per_epoch + i, x, y
            if i == 10 and epoch == start:
                minutes = (time.time() - began) / 600 * (per_epoch * (args.epochs - start) - 10)
                print(f"about {minutes:.0f} minutes to epoch {args.epochs}", flush=True)

    if not rows:
        checkpoint()  # a disk that takes none is found now
        for stale in ("model.pt", "log.csv", "fid.json"):
            (args.out / stale).unlink(missing_ok=True)
    for epoch in range(start, args.epochs):
        torch.manual_seed(args.seed * 100003 + epoch)
        began = time.time()
        losses.clear()
        yield batches()
        values = torch.stack(losses).float().cpu()
        if not values.isfinite().all():
            i = values.isfinite().all(1).long().argmin().item()
            raise ValueError(f"{', '.join(LOSSES)} {values[i].tolist()} at epoch {epoch + 1}, step {i + 1}; "
                             "try a lower --lr")
        seconds = time.time() - began
        rows.append([epoch + 1, *values.mean(0).tolist(), seconds, n / seconds])
        print("  ".join(f"{k} {v:.5g}" for k, v in zip(names, rows[-1], strict=True)), flush=True)
        data.save(args.out / "log.csv", lambda file: np.savetxt(
            file, rows, "%.6g", ",", header=",".join(names), comments=""))
        if epoch + 1 == args.epochs or time.time() - path.stat().st_mtime > 60:
            save_model(epoch + 1)
            checkpoint()  # last: a run that is killed before it does the epoch again


def save_model(args, net, epoch, **sampler):
    """model.pt, and samples.png: eight images of each of the first eight classes, or 64."""
    kinds = torch.arange(len(net.classes))[:8].repeat_interleave(8) if net.classes else None
    images = sample(net, len(kinds) if net.classes else 64, kinds, dtype=args.dtype, **sampler)
    data.save_grid(args.out / "samples.png", images, kinds, [*net.classes])
    trained = args.settings | {"epochs": epoch}
    model = {"script": NAME, "model": net.settings, "weights": net.state_dict(), "trained": trained}
    data.save(args.out / "model.pt", lambda file: torch.save(model, file))


def load(path=None, device=None):
    """The trained model of a model.pt, else the one that comes along. Raises ValueError for other files."""
    path = Path(path or Path(__file__).parent / "checkpoints" / f"{NAME}.pt")
    ckpt = data.read_torch(path)
    try:
        model = Model(**ckpt["model"]) if ckpt["script"] == NAME else None
        model.load_state_dict(ckpt["weights"])
        model.trained = ckpt["trained"]
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is no model.pt of {NAME}.py: {data.one_line(error)}") from None
    return model.to(device or data.device(), memory_format=torch.channels_last).eval()


def main(argv=None):
    args = get_args(argv)
    if not (args.sample or args.ckpt):
        train(args)
    if not (args.sample or args.fid_runs):
        return
    path = args.ckpt or args.out / "model.pt"
    shipped = not args.ckpt and not path.exists()
    model = load(None if shipped else path, args.device)
    trained, sampler = model.trained, {k: getattr(args, k) for k in ("dtype", *SAMPLER)}
    print(f"{args.out} holds no model: this is the one that comes along" if shipped else path,
          trained["data"], f"{trained['epochs']} epochs", sep=", ")
    if args.sample:
        if "data" in args.given and args.data != trained["data"]:
            raise data.UsageError(f"--data {args.data}: this model has learned {trained['data']}; see --ckpt")
        labels, began = data.draw_labels(model.classes, args.sample, args.label, args.seed), time.time()
        images = sample(model, args.sample, labels, args.seed, **sampler)
        data.save_samples(args.out, images, labels, [*model.classes], args.png)
        seconds = time.time() - began
        print(f"{args.sample} images in {args.out}/samples.npz and samples.png, drawn in {seconds:.1f} s")
    if args.fid_runs:
        of = {k: getattr(args, k) if k in args.given else trained[k] for k in ("data", "split", "size")}
        real, _ = data.load(of["data"], args.root, of["split"], of["size"])
        print("against", *of.values())
        result = fid.protocol(lambda n, seed: sample(model, n, None, seed, **sampler), real, args.fid_runs,
                              args.fid_samples, args.fid_seed, args.dims, args.weights, args.device,
                              args.out.parent)
        result |= {**of, "parameters": sum(p.numel() for p in model.parameters()), "trained": trained,
                   "sampler": sampler, "command": " ".join([data.LAUNCHER, *sys.argv])}
        data.save(args.out / "fid.json", lambda file: file.write(json.dumps(result, indent=1).encode()))


if __name__ == "__main__":
    data.command(main)
