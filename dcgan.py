"""Deep convolutional GAN on 28 x 28 blood cells (Radford et al., 2016).

A generator turns random numbers into images and learns to fool a discriminator, which learns to tell them
from real ones.

    python dcgan.py --sample 64              draw cells from the trained model that comes along
    python dcgan.py                          train on BloodMNIST, into out/dcgan
    python dcgan.py --resume                 go on where a run was stopped
    python dcgan.py --paper                  train with the paper's settings
    python dcgan.py --resume --fid-runs 5    measure what was trained: prints FID mean ± std

Measured: FID-768 0.03062 ± 0.00075 after 1,778 epochs (five draws of 10,000 cells; a CPU core, torch
2.14.1). README.md says what the figure means, RESULTS.md by which commands it came about.
"""
import argparse
import copy
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

NAME, LOSSES, SAMPLER = "dcgan", ("d_loss", "g_loss"), ()
PAPER = dict(epochs=40, width=256, start=3, d_norm="batch", loss="standard", batch_size=128, lr=1e-3,
             d_lr=1e-3, label_smoothing=0.1, g_steps=3, diffaugment=False, ema=0)


def get_args(argv=None):
    p = data.Parser(__doc__)
    add = p.add_argument_group("model and training").add_argument
    add("--latent-dim", type=data.number(int, 1, 1000), default=100, help="size of the generator's input")
    add("--width", type=data.number(int, 16, 4096), default=128,
        help="channels of the generator's first features and of the discriminator's last (paper: 256)")
    add("--start", type=int, choices=(3, 7), default=7, help="side of the first features (paper: 3)")
    add("--d-norm", choices=("spectral", "batch"), default="spectral",
        help="of the discriminator's weights or features (paper: batch)")
    add("--loss", choices=("relativistic", "standard"), default="relativistic",
        help="whether the discriminator judges pairs or single images (paper: standard)")
    add("--epochs", type=data.number(int, 1, 10**6), default=240, help="passes over the data (paper: 40)")
    add("--batch-size", type=data.number(int, 2, 10**5), default=64, help="images per step (paper: 128)")
    add("--lr", type=data.number(float, 0), default=2e-4, help="the generator's learning rate (paper: 1e-3)")
    add("--d-lr", type=data.number(float, 0), default=4e-4, help="the discriminator's (paper: 1e-3)")
    add("--label-smoothing", type=data.number(float, 0, 0.5), default=0.0,
        help="the discriminator's targets are 1 - this and this (paper: 0.1)")
    add("--g-steps", type=data.number(int, 1, 100), default=1, help="generator updates a step (paper: 3)")
    add("--diffaugment", action=argparse.BooleanOptionalAction, default=True,
        help="the discriminator sees all images, real and drawn, moved and recoloured (paper: no)")
    add("--ema", type=data.number(float, 0, 1), default=0.05,
        help="half-life of the average that draws, as a share of the training so far; 0: none (paper)")
    return p.parse(argv, NAME, PAPER, SAMPLER)


# ----------------------------------------------------------------------------------------------------
# Model. Each layer of the two networks halves or doubles the image, whatever its size: 28 <-> 14 <-> 7 <-> 3.

class Generator(nn.Module):
    """Code (B, latent) -> image (B, C, 28, 28) in [-1, 1]. classes: {name: images of it in the training
    data}."""

    def __init__(self, shape=(3, 28, 28), classes=(), latent_dim=100, start=7, width=128):
        super().__init__()
        self.settings = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.classes, self.latent_dim = dict(classes), latent_dim
        code = latent_dim + len(classes)                     # the label, one-hot, is a part of the code
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
        fine = norm == "spectral"                            # 28 -> 28 -> 14 -> 7 -> 3, else 14, 7, 3, 1
        self.scale, widths, layers = 32 if fine else 1, [width // k for k in (8, 4, 2, 1)], []
        for k, (a, b) in enumerate(zip((shape[0], *widths), widths, strict=False)):
            conv = nn.Conv2d(a, b, 3, padding=1) if fine and k == 0 else nn.Conv2d(a, b, 4, 2, padding=1)
            layers += [conv, nn.Identity() if fine or k == 0 else nn.BatchNorm2d(b), nn.LeakyReLU(0.2)]
        last = width * (shape[1] // (8 if fine else 16)) ** 2
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(last, 1))
        self.label = nn.Embedding(len(classes), last) if classes else None
        self.apply(init)
        for module in list(self.modules()):
            if fine and isinstance(module, (nn.Conv2d, nn.Linear, nn.Embedding)):
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
    """-log D(x) - log(1 - D(G(z))), Goodfellow et al. 2014, D the logit's sigmoid. Relativistic: of each real
    and drawn image the real one is the more real, -log sigmoid(logit(x) - logit(G(z))), Jolicoeur-Martineau
    2019. The targets 1 and 0 are 1 - smoothing and smoothing."""
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
# Sampling: the generator on codes from N(0, I).

@torch.inference_mode()
def sample(model, n, label=None, seed=0, dtype="auto", batch_size=1000):
    """n images, uint8 (n, C, H, W) on the CPU; the seed fixes them. label: a class's number or name, a tensor
    (n,) of numbers, or None for the proportions of the training data."""
    labels, device = data.draw_labels(model.classes, n, label, seed), model.layers[1].weight.device
    generator, model, images = torch.Generator(device).manual_seed(seed), model.eval(), []
    for i in range(0, n, batch_size):
        z = torch.randn(min(batch_size, n - i), model.latent_dim, generator=generator, device=device)
        with data.autocast(device, dtype):
            y = None if labels is None else labels[i:i + batch_size].to(device)
            images.append(from_model(model(z, y)).cpu())
    return torch.cat(images)


# ----------------------------------------------------------------------------------------------------
# Training.

def train(args):
    images, labels, classes = training_data(args)
    torch.manual_seed(args.seed)
    generator = Generator(tuple(images.shape[1:]), classes, args.latent_dim, args.start, args.width)
    discriminator = Discriminator(images.shape[1:], classes, args.d_norm, args.width)
    for net in (generator, discriminator):
        net.to(args.device, memory_format=torch.channels_last)
    ema = copy.deepcopy(generator).requires_grad_(False)
    g_optimizer = torch.optim.Adam(generator.parameters(), lr=args.lr, betas=(0.5, 0.999), fused=True)
    d_optimizer = torch.optim.Adam(discriminator.parameters(), lr=args.d_lr, betas=(0.5, 0.999), fused=True)
    state = {"model": generator, "ema": ema, "discriminator": discriminator, "g_optimizer": g_optimizer,
             "d_optimizer": d_optimizer}
    relativistic = args.loss == "relativistic"
    view = diffaugment if args.diffaugment else lambda x: x

    losses = []
    for batches in epochs(args, images, labels, state, losses, lambda epoch: save_model(args, ema, epoch)):
        for step, x, y in batches:
            real = to_model(x)
            with data.autocast(args.device, args.dtype):
                fake = generator(torch.randn(len(x), args.latent_dim, device=x.device), y)
                logits = [discriminator(view(image), y).float() for image in (real, fake.detach())]
                d_loss = discriminator_loss(*logits, relativistic, args.label_smoothing)
            d_optimizer.zero_grad()
            d_loss.backward()
            d_optimizer.step()
            rival = logits[0].detach() if relativistic else 0
            for k in range(args.g_steps):
                with data.autocast(args.device, args.dtype):
                    if k:  # the first step learns from the images that the discriminator has just seen
                        fake = generator(torch.randn(len(x), args.latent_dim, device=x.device), y)
                    g_loss = generator_loss(discriminator(view(fake), y).float(), rival)
                g_optimizer.zero_grad()
                g_loss.backward(inputs=[*generator.parameters()])  # and not those of the discriminator
                g_optimizer.step()
            update_ema(ema, generator, 0.5 ** (1 / (args.ema * step)) if args.ema else 0)
            losses.append(torch.stack([d_loss, g_loss]).detach())


@torch.no_grad()
def update_ema(ema, model, decay):
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for mean, buffer in zip(ema.buffers(), model.buffers(), strict=True):  # BatchNorm's, averages already
        mean.copy_(buffer)


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
