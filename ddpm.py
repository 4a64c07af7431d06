"""Denoising diffusion on 28 x 28 blood cells (Ho et al., 2020).

A U-Net learns to say what is noise in a noised image; run backwards from pure noise, step by step, it
uncovers an image that never was.

    python ddpm.py --sample 64                        draw cells from the trained model that comes along
    python ddpm.py --epochs 500 --device cuda         train on BloodMNIST, into out/ddpm
    python ddpm.py --epochs 500 --resume              go on where a run was stopped
    python ddpm.py --unet small --epochs 80           a network that a CPU can train
    torchrun --nproc_per_node=2 ddpm.py               on several GPUs, or in several processes on a CPU

Measured: FID-768 0.01696 ± 0.00044 after 240 epochs of `--unet small` (five draws of 10,000 cells; a CPU
core, torch 2.14.1). README.md says what the figure means, RESULTS.md how it came about.
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
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import data
import fid

NAME, LOSSES, SAMPLER = "ddpm", ("loss",), ("steps", "eta", "guidance")
PAPER = dict(schedule="linear", predict="epsilon", attention=False, guide=False, optimizer="adam", lr=1e-4,
             decay="none", ema=0, steps=0)


def get_args(argv=None):
    p = data.Parser(__doc__)
    add = p.add_argument_group("model").add_argument
    add("--timesteps", type=data.number(int, 2, 10000), default=500, help="T, the number of noise levels")
    add("--schedule", choices=("linear", "cosine"), default="cosine", help="of the noise (paper: linear)")
    add("--predict", choices=("v", "epsilon"), default="v", help="what the network says (paper: epsilon)")
    add("--unet", choices=tuple(UNETS), default="deeper", help="the paper's two, or others for a CPU")
    add("--attention", action=argparse.BooleanOptionalAction, default=True, help="at 7 x 7 (paper: none)")
    add("--guide", action=argparse.BooleanOptionalAction, default=True,
        help="a tiny network that learns beside it, for --guidance (paper: none)")
    add = p.add_argument_group("training").add_argument
    add("--epochs", type=data.number(int, 1, 10**6), default=500, help="passes over the data")
    add("--batch-size", type=data.number(int, 1, 10**5), default=128, help="images per step")
    add("--optimizer", choices=("muon", "adam"), default="muon", help="of the hidden layers (paper: adam)")
    add("--muon-lr", type=data.number(float, 0), default=0.02, help="learning rate of Muon")
    add("--lr", type=data.number(float, 0), default=1e-3, help="learning rate of Adam (paper: 1e-4)")
    add("--decay", choices=("cosine", "none"), default="cosine", help="of the learning rates to 0, after a "
        "warm-up of 5 %% of the run, 500 steps at most (paper: none of both)")
    add("--ema", type=data.number(float, 0, 1), default=0.05, help="half-life of the averaged weights that "
        "draw, as a share of the training so far; 0: none (paper)")
    add("--compile", choices=("auto", "on", "off"), default="auto", help="auto: in a long run on a GPU")
    add = p.add_argument_group("sampling").add_argument
    add("--steps", type=data.number(int, 0), default=50, help="of the DDIM solver; 30 are better after a "
        "training of few epochs; 0: all T (paper)")
    add("--eta", type=data.number(float, 0, 1), default=1.0, help="noise added anew; 1: as in Ho et al.")
    add("--guidance", type=data.number(float, 0), help="away from the guide; if not given, 0.6 with one")
    args = p.parse(argv, NAME, PAPER, SAMPLER)
    if args.steps > args.timesteps and not (args.sample or args.ckpt):
        p.error(f"--steps {args.steps} is more than the {args.timesteps} of --timesteps")
    if "RANK" in os.environ and not dist.is_initialized():  # torchrun: a process a GPU, or several on a CPU
        if args.device.type == "cuda":
            args.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
        sys.stdout = open(os.devnull, "w") if data.RANK else sys.stdout
    return args


# ----------------------------------------------------------------------------------------------------
# Model: a U-Net that takes a noised image and its timestep, and gives an image of the same shape.

UNETS = {  # side of the patches that it works on, channels at full resolution around them (0: none),
    # channels of each level, bottleneck last
    "baseline": (1, 0, (64, 128, 256)), "deeper": (1, 0, (64, 128, 256, 512)),
    "small": (2, 16, (64, 128, 192)), "tiny": (2, 16, (16, 64, 64))}
EMBED = 256


class GroupNorm(nn.GroupNorm):
    """In fp32 under bf16 autocast too: its sums need the digits, and on a CPU it is the faster kernel."""

    def forward(self, x):
        return super().forward(x.float())


class Block(nn.Module):
    """Residual: two 3 x 3 convolutions; timestep and label scale and shift the features between them."""

    def __init__(self, c_in, c_out, attention=False):
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(8, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.condition = nn.Linear(EMBED, 2 * c_out)
        self.norm2, self.conv2 = GroupNorm(8, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = Attention(c_out) if attention else nn.Identity()
        nn.init.zeros_(self.conv2.weight)                 # each block starts as its skip connection

    def forward(self, x, c):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.condition(c)[:, :, None, None].chunk(2, 1)
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return self.attention(self.skip(x) + h)


class Attention(nn.Module):
    """Self-attention over all positions, heads of 64 channels (Vaswani et al., 2017)."""

    def __init__(self, channels):
        super().__init__()
        self.norm, self.qkv = GroupNorm(8, channels), nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x):                                 # (B, C, h, w)
        q, k, v = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, -1, 64)).transpose(3, 4).unbind(1)
        if x.is_cuda:
            h = F.scaled_dot_product_attention(q, k, v)   # (B, heads, h w, 64)
        else:                                             # in full: twice as fast backward on a CPU
            h = (q @ k.mT / 8).softmax(-1) @ v
        return x + self.out(h.transpose(2, 3).reshape(x.shape))


class UNet(nn.Module):
    """(x_t, t, label) -> epsilon or v. classes: {name: images of it in the training data}, or none.
    guide: with a tiny network beside it, which makes the same mistakes and larger ones."""

    def __init__(self, shape=(3, 28, 28), classes=(), unet="deeper", attention=True, timesteps=500,
                 schedule="cosine", predict="v", guide=False):
        super().__init__()
        self.settings = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.shape, self.classes = tuple(shape), dict(classes)
        self.diffusion = Diffusion(timesteps, schedule, predict)
        self.patch, fine, (*widths, bottom) = UNETS[unet]
        pixels, up = (fine or shape[0]) * self.patch ** 2, widths[::-1]
        where = [False] * (len(widths) - 1) + [attention]  # from 7 x 7 on: above, it costs more than it gives
        self.embed = nn.Sequential(nn.Linear(EMBED, EMBED), nn.SiLU(), nn.Linear(EMBED, EMBED))
        self.label = nn.Embedding(len(classes), EMBED) if classes else None
        self.first = nn.Conv2d(shape[0], fine, 3, padding=1) if fine else nn.Identity()  # sees grain
        self.stem = nn.Conv2d(pixels, widths[0], 3, padding=1)
        self.down = nn.ModuleList(map(Block, [widths[0], *widths], widths, where))
        self.middle = Block(widths[-1], bottom, attention)
        self.narrow = nn.ModuleList(map(nn.Conv2d, [bottom, *up], up, [1] * len(up)))
        self.up = nn.ModuleList(Block(2 * a, a, w) for a, w in zip(up, where[::-1], strict=True))
        self.head = nn.Sequential(GroupNorm(8, up[-1]), nn.SiLU(), nn.Conv2d(up[-1], pixels, 3, padding=1))
        self.last = nn.Sequential(nn.SiLU(), nn.Conv2d(2 * fine, fine, 3, padding=1), nn.SiLU(),
                                  nn.Conv2d(fine, shape[0], 3, padding=1)) if fine else None
        nn.init.zeros_((self.last or self.head)[-1].weight)
        if classes:
            nn.init.zeros_(self.label.weight)
        self.guide = UNet(shape, classes, "tiny", attention) if guide else None

    def forward(self, x, t, y=None):                      # x: (B, C, 28, 28), t and y: (B,)
        """(1, B, C, 28, 28), or (2, ...) with what the guide says."""
        others = [] if self.guide is None else [self.guide(x, t, y)]
        c = self.embed(timestep_embedding(t, EMBED))
        c = F.silu(c + self.label(y) if self.label else c)
        fine, skips = self.first(x), []
        x = self.stem(F.pixel_unshuffle(fine, self.patch))
        for block in self.down:                           # 28 -> 14 -> 7 -> 4
            x = block(x, c)
            skips.append(x)
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        x = self.middle(x, c)                             # (B, 512, 4, 4)
        for narrow, block in zip(self.narrow, self.up, strict=True):  # 4 -> 7 -> 14 -> 28
            skip = skips.pop()
            x = F.interpolate(narrow(x), size=skip.shape[2:])
            x = block(torch.cat([x, skip], 1), c)
        x = F.pixel_shuffle(self.head(x), self.patch)
        x = self.last(torch.cat([x, fine], 1)) if self.last else x
        return torch.cat([x[None], *others])


def timestep_embedding(t, dim):
    """Sines and cosines of t at dim/2 frequencies from 1 to 1/10000: (B,) -> (B, dim)."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


Model = UNet


# ----------------------------------------------------------------------------------------------------
# Objective and sampling. alpha_bar[t] is the share of the signal's variance left at step t, 0 .. T-1.

class Diffusion(nn.Module):
    """The noising process and its reversal. A `model` here is a function (x_t, t) -> epsilon or v."""

    def __init__(self, timesteps=500, schedule="cosine", predict="v"):
        super().__init__()
        if schedule == "linear":                          # Ho et al. 2020
            betas = torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64)
        else:                                             # cosine: Nichol & Dhariwal 2021, eq. 17
            s = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
            f = torch.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        self.T, self.predict_v = timesteps, predict == "v"
        self.register_buffer("alpha_bar", torch.cumprod(1 - betas, 0).float(), persistent=False)

    def q_sample(self, x0, t, epsilon):
        """x_t ~ q(x_t | x_0) = N(sqrt(alpha_bar) x_0, (1 - alpha_bar) I), Ho et al. eq. 4."""
        a = self.alpha_bar[t][:, None, None, None]
        return a.sqrt() * x0 + (1 - a).sqrt() * epsilon

    def loss(self, model, x0, t, epsilon):
        """E |target - model(x_t, t)|^2 over t uniform and epsilon normal, of each network (k,). The target is
        epsilon (Ho et al. eq. 14) or v = sqrt(alpha_bar) epsilon - sqrt(1 - alpha_bar) x_0 (Salimans & Ho
        2022)."""
        a = self.alpha_bar[t][:, None, None, None]
        target = a.sqrt() * epsilon - (1 - a).sqrt() * x0 if self.predict_v else epsilon
        return (model(self.q_sample(x0, t, epsilon), t).float() - target).square().mean((-4, -3, -2, -1))

    def predict(self, model, x, t):
        """The image x_0 that the network sees in x_t, kept in the range of images."""
        a, out = self.alpha_bar[t], model(x, torch.full((len(x),), t, device=x.device)).float()
        x0 = a.sqrt() * x - (1 - a).sqrt() * out if self.predict_v else (x - (1 - a).sqrt() * out) / a.sqrt()
        return x0.clamp(-1, 1)

    def solve(self, model, x, generator, steps, eta=1.0):
        """x_T -> x_0 through `steps` of the T noise levels, denser towards the image, whose grain is decided
        there: DDIM, Song et al. 2021 eq. 12, 16. eta 0 is deterministic, eta 1 adds noise anew: with all T
        levels, Ho et al.'s ancestral sampling."""
        left = [1 - i / max(steps - 1, 1) for i in range(steps)]
        times = [max(steps - 1 - i, round((self.T - 1) * u ** 2)) for i, u in enumerate(left)]
        for t, t_prev in zip(times, [*times[1:], None], strict=True):
            a = self.alpha_bar[t]
            a_prev = torch.ones_like(a) if t_prev is None else self.alpha_bar[t_prev]
            x0 = self.predict(model, x, t)
            epsilon = (x - a.sqrt() * x0) / (1 - a).sqrt()  # of the clamped x0: x stays on the noise level
            sigma = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).sqrt()
            x = a_prev.sqrt() * x0 + (1 - a_prev - sigma ** 2).clamp(min=0).sqrt() * epsilon
            if eta > 0:
                x = x + sigma * torch.randn(x.shape, generator=generator, device=x.device)
        return x


def guided(model, y, w):
    """(1 + w) model(x, t, y) - w guide(x, t, y): away from the guide's mistakes, Karras et al. 2024 eq. 3."""
    def denoise(x, t):
        out = model(x, t, y).float()
        return (1 + w) * out[0] - w * out[-1]             # without a guide: out[0]
    return denoise


@torch.inference_mode()
def sample(model, n, label=None, seed=0, dtype="auto", steps=50, eta=1.0, guidance=None, batch=500):
    """n images, uint8 (n, C, H, W) on the CPU; the seed fixes them. label: a class's number or name, a tensor
    (n,) of numbers, or None for the training data's proportions. The rest: as the flags of these names."""
    diffusion, device = model.diffusion, model.stem.weight.device
    y = data.draw_labels(model.classes, n, label, seed)
    if steps > diffusion.T:
        raise data.UsageError(f"steps {steps}: the model has {diffusion.T}")
    if guidance and model.guide is None:
        raise data.UsageError(f"guidance {guidance}: the model was trained with --no-guide")
    w = 0.6 if guidance is None and model.guide else guidance or 0.0
    images = torch.zeros(n, *model.shape, dtype=torch.uint8, device=device)
    world = data.WORLD if n > batch else 1                # each process draws its share of the batches
    for i in range(data.RANK % world * batch, n, world * batch):
        generator = torch.Generator(device).manual_seed(seed * 100003 + i)
        x = torch.randn(min(batch, n - i), *model.shape, generator=generator, device=device)
        net = guided(model, None if y is None else y[i:i + batch].to(device), w)
        with data.autocast(device, dtype):
            x = diffusion.solve(net, x.contiguous(memory_format=torch.channels_last), generator,
                                steps or diffusion.T, eta)
        images[i:i + batch] = from_model(x)
    if world > 1:
        dist.all_reduce(images)
    return images.cpu()


def to_model(images):
    """uint8 [0, 255] -> float [-1, 1], what the network sees."""
    return images.float() / 127.5 - 1


def from_model(x):
    """float [-1, 1] -> uint8 [0, 255]."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# ----------------------------------------------------------------------------------------------------
# Training.

class Muon(torch.optim.Optimizer):
    """Momentum whose singular values are all brought to about 1, so that rare directions learn as fast as
    frequent ones (Jordan et al., 2024). For hidden convolutions, as matrices (C_out, the rest)."""

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                m.mul_(group["momentum"]).add_(p.grad)
                update = orthogonalize((p.grad + group["momentum"] * m).flatten(1))  # Nesterov's look ahead
                scale = max(1, update.shape[0] / update.shape[1]) ** 0.5
                p.add_(update.view_as(p), alpha=-group["lr"] * scale)


def orthogonalize(g, steps=5):
    """g (m, n) with its singular values brought to about 1, by a quintic Newton-Schulz iteration
    x <- p(x x^T) x, which needs the small square a = x x^T only: half the work of iterating x itself."""
    x = (g if len(g) <= g.shape[1] else g.T) / (g.norm() + 1e-7)
    one = product = torch.eye(len(x), device=g.device)
    a = x @ x.T
    for _ in range(steps):
        p = 3.4445 * one - 4.7750 * a + 2.0315 * a @ a
        a, product = p @ a @ p, p @ product
    x = product @ x
    return x if len(g) <= g.shape[1] else x.T


def train(args):
    images, labels, classes = training_data(args)
    torch.manual_seed(args.seed)
    model = UNet(tuple(images.shape[1:]), classes, args.unet, args.attention, args.timesteps, args.schedule,
                 args.predict, args.guide).to(args.device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model).requires_grad_(False)
    hidden = [p for p in model.parameters() if p.ndim == 4 and min(p.shape[:2]) > 3]  # that touch no pixels
    hidden = hidden if args.optimizer == "muon" else []
    others = [p for p in model.parameters() if all(p is not h for h in hidden)]
    optimizers = [torch.optim.Adam(others, lr=args.lr, fused=True)]
    if hidden:
        optimizers.append(Muon(hidden, args.muon_lr))
    state = {"model": model, "ema": ema} | {f"optimizer{i}": o for i, o in enumerate(optimizers)}
    last = args.epochs * math.ceil(len(images) / args.batch_size)
    net = nn.parallel.DistributedDataParallel(model) if data.WORLD > 1 else model
    net = compiled(net, args.compile, last)
    losses = []

    def save(epoch):
        save_model(args, ema, epoch, steps=min(20, args.timesteps))

    for batches in epochs(args, images, labels, state, losses, save):
        for step, x, y in batches:
            x0 = to_model(x)
            t, epsilon = torch.randint(args.timesteps, (len(x),), device=x.device), torch.randn_like(x0)
            mine = slice(data.RANK, None, data.WORLD) if data.RANK < len(x) else slice(1)  # its share of all
            x0, t, epsilon, y = x0[mine], t[mine], epsilon[mine], y[mine]
            with data.autocast(args.device, args.dtype):
                loss = model.diffusion.loss(lambda x, t, y=y: net(x, t, y), x0, t, epsilon)
            share = len(range(data.RANK, len(x), data.WORLD)) / len(x)  # a short batch's differ
            loss = loss * share * data.WORLD
            model.zero_grad()
            loss.sum().backward()
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = optimizer.defaults["lr"] * rate(step, last, args.decay)
                optimizer.step()
            update_ema(ema, model, 0.5 ** (1 / (args.ema * step)) if args.ema else 0)
            losses.append(mean_over_processes(loss[:1]))  # the guide's is not told
    if data.WORLD > 1:
        dist.barrier()                                    # model.pt is there for all of them


def rate(step, last, decay):
    """The share of the learning rate at a step: a rise over 5 % of the run (500 at most), a cosine to 0."""
    rise, fall = min(1, step / min(500, 0.05 * last)), 0.5 + 0.5 * math.cos(math.pi * step / last)
    return rise * fall if decay == "cosine" else 1


@torch.no_grad()
def update_ema(ema, model, decay):
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def mean_over_processes(loss):
    loss = loss.detach().clone()
    if data.WORLD > 1:
        dist.all_reduce(loss)
    return loss / data.WORLD


def compiled(net, when, n_steps):
    """net through torch.compile; as it is where that does not pay (on a CPU, in a short run) or fails."""
    if when == "off" or when == "auto" and (n_steps < 2000 or not next(net.parameters()).is_cuda):
        return net
    fast = torch.compile(net, dynamic=False)              # a kernel a shape: the same ones after a --resume

    def forward(*inputs):
        nonlocal fast
        try:
            return fast(*inputs)
        except torch._dynamo.exc.TorchDynamoException as error:  # no compiler, or one of its many failures
            print(f"torch.compile failed ({data.one_line(error)}); going on without it", file=sys.stderr)
            fast = net
            return net(*inputs)
    return forward


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
