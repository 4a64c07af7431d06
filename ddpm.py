"""Denoising diffusion on 28 x 28 blood cells (Ho et al., 2020): a U-Net learns to predict the noise in a noised image.

    python ddpm.py --sample 64                        draw cells from the trained model that comes along, or one's own
    python ddpm.py --epochs 500 --device cuda         train on BloodMNIST, into out/ddpm
    python ddpm.py --epochs 500 --resume              go on where a run was stopped
    python ddpm.py --unet patches --epochs 80         a network that a CPU can train
    python ddpm.py --resume --fid-runs 5              measure what was trained: prints FID mean ± std (5 runs)
    torchrun --nproc_per_node=2 ddpm.py               on several GPUs, or in several processes on a CPU

Measured: FID-768 0.07987 ± 0.0043 after 150 epochs (five draws of 2,000 cells, seeds 100 to 500; two CPU cores, torch 2.15.0).
The commands and what the figure means: README.md. The diffusion itself is class Diffusion.
"""
import argparse
import copy
import ctypes
import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import data
import fid

MODEL, LOSSES = "ddpm", ("loss",)
PAPER = dict(schedule="linear", predict="epsilon", attention=False, lr=1e-4, warmup=0, ema=0, steps=0)


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    g = p.add_argument_group("model")
    g.add_argument("--timesteps", type=data.number(int, 2, 10000), default=500, help="T, the number of noise levels")
    g.add_argument("--schedule", choices=("linear", "cosine"), default="cosine", help="how the noise grows with t (paper: linear)")
    g.add_argument("--predict", choices=("v", "epsilon"), default="v", help="what the network learns to say: the noise, or a mix of noise and image (paper: epsilon)")
    g.add_argument("--unet", choices=tuple(UNETS), default="deeper", help="the network: the paper's two depths, or one that starts from 2 x 2 patches, for a CPU")
    g.add_argument("--attention", action=argparse.BooleanOptionalAction, default=True, help="self-attention at 7 x 7 and below (paper: none)")
    g = p.add_argument_group("training")
    g.add_argument("--epochs", type=data.number(int, 1, 10**6), default=500, help="passes over the data")
    g.add_argument("--batch-size", type=data.number(int, 1, 10**5), default=128, help="images per step")
    g.add_argument("--lr", type=data.number(float, 0), default=1e-3, help="Adam's learning rate (paper: 1e-4)")
    g.add_argument("--warmup", type=data.number(int, 0), default=500, metavar="STEPS", help="steps in which the learning rate grows; then it falls to 0 as a cosine. 0: constant (paper)")
    g.add_argument("--min-snr", type=data.number(float, 0), default=0.0, metavar="GAMMA", help="cap of the loss's weight at low noise; 0: none (paper)")
    g.add_argument("--ema", type=data.number(float, 0, 1), default=0.05, help="half-life of the averaged weights that draw the samples, as a share of the training so far; 0: none (paper)")
    g.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help="torch.compile; auto: on a GPU, where the run is long enough to win back its minute")
    add_shared_flags(p)
    g = p.add_argument_group("sampling")
    g.add_argument("--steps", type=data.number(int, 0), default=30, help="network evaluations of the solver; 0: ancestral sampling, all T steps (paper)")
    g.add_argument("--order", type=int, choices=(1, 2), default=1, help="of the solver: 1 is DDIM, 2 is DPM-Solver++")
    g.add_argument("--eta", type=data.number(float, 0, 1), default=1.0, help="noise that the solver adds: 0 none, 1 as much as ancestral sampling")
    g.add_argument("--guidance", type=data.number(float, 0), default=0.0, help="of a model with --classes: how far to move from any image towards the class's")
    args = parse(p, argv)
    if args.steps > args.timesteps:
        p.error(f"--steps {args.steps} is more than the {args.timesteps} of --timesteps")
    if "RANK" in os.environ and not dist.is_initialized():  # torchrun: a process for each GPU, or several on a CPU
        if args.device.type == "cuda":
            args.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
        sys.stdout = open(os.devnull, "w") if data.RANK else sys.stdout
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Model: a U-Net that takes a noised image and its timestep, and gives an image of the same shape.

UNETS = {  # the side of the patches that the network starts from, and the channels of each level, bottleneck last
    "baseline": (1, (64, 128, 256)), "deeper": (1, (64, 128, 256, 512)), "patches": (2, (96, 192, 256))}
EMBED = 256


class GroupNorm(nn.GroupNorm):
    """In fp32 under bf16 autocast too: its sums need the digits, and on a CPU it is the faster kernel."""

    def forward(self, x):
        return super().forward(x.float())


class Block(nn.Module):
    """Residual block: two 3 x 3 convolutions; timestep and label scale and shift the features between them."""

    def __init__(self, c_in, c_out, attention=False):
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(8, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.condition = nn.Linear(EMBED, 2 * c_out)
        self.norm2, self.conv2 = GroupNorm(8, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = Attention(c_out) if attention else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # each block starts as its skip connection: deep nets train from step one

    def forward(self, x, c):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.condition(c)[:, :, None, None].chunk(2, 1)
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return self.attention(self.skip(x) + h)


class Attention(nn.Module):
    """Self-attention over all positions, heads of 64 channels (Vaswani et al., 2017)."""

    def __init__(self, channels):
        super().__init__()
        self.norm, self.qkv, self.out = GroupNorm(8, channels), nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x):                                 # (B, C, h, w)
        q, k, v = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, -1, 64)).transpose(3, 4).unbind(1)
        if x.is_cuda:
            h = F.scaled_dot_product_attention(q, k, v)   # (B, heads, h w, 64)
        else:                                             # the same in full: on a CPU, its backward pass is twice as fast
            h = (q @ k.mT / 8).softmax(-1) @ v
        return x + self.out(h.transpose(2, 3).reshape(x.shape))


class UNet(nn.Module):
    def __init__(self, channels=3, kind="deeper", classes=0, attention=True):
        super().__init__()
        self.patch, (*widths, bottom) = UNETS[kind]
        self.embed = nn.Sequential(nn.Linear(EMBED, EMBED), nn.SiLU(), nn.Linear(EMBED, EMBED))
        self.label = nn.Embedding.from_pretrained(torch.zeros(classes + 1, EMBED), freeze=False) if classes else None  # the last: no label
        self.stem = nn.Conv2d(channels * self.patch ** 2, widths[0], 3, padding=1)
        where = [False] * (len(widths) - 1) + [attention]  # attention from 7 x 7 on: above, it costs more than it gives
        self.down = nn.ModuleList(Block(a, b, w) for a, b, w in zip([widths[0], *widths], widths, where))
        self.middle = Block(widths[-1], bottom, attention)
        self.narrow = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip([bottom, *widths[::-1]], widths[::-1]))
        self.up = nn.ModuleList(Block(2 * a, a, w) for a, w in zip(widths[::-1], where[::-1]))
        self.head = nn.Sequential(GroupNorm(8, widths[0]), nn.SiLU(), nn.Conv2d(widths[0], channels * self.patch ** 2, 3, padding=1))
        nn.init.zeros_(self.head[-1].weight)

    def forward(self, x, t, y=None):                      # x: (B, C, 28, 28), t and y: (B,)
        c = self.embed(timestep_embedding(t, EMBED))
        c = F.silu(c + self.label(y) if self.label else c)
        x, skips = self.stem(F.pixel_unshuffle(x, self.patch)), []
        for block in self.down:                           # 28 -> 14 -> 7 -> 4
            x = block(x, c)
            skips.append(x)
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        x = self.middle(x, c)                             # (B, 512, 4, 4)
        for narrow, block in zip(self.narrow, self.up):   # 4 -> 7 -> 14 -> 28
            skip = skips.pop()
            x = F.interpolate(narrow(x), size=skip.shape[2:])
            x = block(torch.cat([x, skip], 1), c)
        return F.pixel_shuffle(self.head(x), self.patch)


def timestep_embedding(t, dim):
    """Sines and cosines of t at dim/2 frequencies from 1 to 1/10000: (B,) -> (B, dim)."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


# ---------------------------------------------------------------------------------------------------------------------
# Objective and sampling. alpha_bar[t] is the share of the signal's variance that is left at step t, t = 0 .. T-1.

class Diffusion:
    """The noising process and its reversal. A `model` here is any function (x_t, t) -> epsilon or v, of x_t's shape."""

    def __init__(self, timesteps=500, schedule="cosine", predict="v", device="cpu"):
        if schedule == "linear":                          # Ho et al. 2020
            betas = torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64)
        else:                                             # cosine: Nichol & Dhariwal 2021, eq. 17
            s = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
            f = torch.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        self.T, self.predict_v, self.device = timesteps, predict == "v", device
        self.alpha_bar = torch.cumprod(1 - betas, 0).float().to(device)

    def q_sample(self, x0, t, epsilon):
        """x_t ~ q(x_t | x_0) = N(sqrt(alpha_bar) x_0, (1 - alpha_bar) I), Ho et al. eq. 4."""
        a = self.alpha_bar[t][:, None, None, None]
        return a.sqrt() * x0 + (1 - a).sqrt() * epsilon

    def loss(self, model, x0, t, epsilon, min_snr=0.0):
        """E w |target - model(x_t, t)|^2 over t uniform and epsilon normal. The target is epsilon (Ho et al. eq. 14) or
        v = sqrt(alpha_bar) epsilon - sqrt(1 - alpha_bar) x_0 (Salimans & Ho 2022); the weight w is 1, or with min_snr = gamma
        that of an error in x_0 that counts SNR = alpha_bar / (1 - alpha_bar) times, but gamma times at most (Hang et al. 2023)."""
        a = self.alpha_bar[t][:, None, None, None]
        target = a.sqrt() * epsilon - (1 - a).sqrt() * x0 if self.predict_v else epsilon
        error = (model(self.q_sample(x0, t, epsilon), t).float() - target) ** 2
        if min_snr:
            snr = a / (1 - a)
            error = error * snr.clamp(max=min_snr) / (snr + 1 if self.predict_v else snr)
        return error.mean()

    def predict(self, model, x, t):
        """The image x_0 that the network sees in x_t, kept in the range of images."""
        a, out = self.alpha_bar[t], model(x, torch.full((len(x),), t, device=x.device)).float()
        x0 = a.sqrt() * x - (1 - a).sqrt() * out if self.predict_v else (x - (1 - a).sqrt() * out) / a.sqrt()
        return x0.clamp(-1, 1)

    def ancestral(self, model, x, generator):
        """x_T -> x_0 through all T steps, each a draw from q(x_{t-1} | x_t, x_0), Ho et al. eq. 6 and 7."""
        for t in reversed(range(self.T)):
            x0 = self.predict(model, x, t)
            a, a_prev = self.alpha_bar[t], self.alpha_bar[t - 1] if t else torch.ones((), device=x.device)
            beta = 1 - a / a_prev
            mean = a_prev.sqrt() * beta / (1 - a) * x0 + (1 - beta).sqrt() * (1 - a_prev) / (1 - a) * x
            variance = (1 - a_prev) / (1 - a) * beta
            x = mean + variance.sqrt() * torch.randn(x.shape, generator=generator, device=x.device)
        return x

    def solve(self, model, x, generator, steps, order=2, eta=0.0):
        """x_T -> x_0 through `steps` of the T noise levels. Order 1 is DDIM (Song et al. 2021 eq. 12 and 16; eta 0 is
        deterministic), the levels evenly spaced in t. Order 2 is DPM-Solver++ (2M, Lu et al. 2022, alg. 2): the same step with
        an x_0 extrapolated from the last two, evenly spaced in lambda = log(sqrt(alpha_bar) / sqrt(1 - alpha_bar))."""
        levels, before = torch.logit(self.alpha_bar.double().cpu(), eps=1e-12) / 2, None
        times = torch.linspace(self.T - 1, 0, steps).round().long()
        if order == 2:                                    # below -5 nothing of the image is left to see
            wanted = torch.linspace(max(levels[-1], -5), levels[0], steps, dtype=torch.float64)
            times = (levels - wanted[:, None]).abs().argmin(1).unique().flip(0)
            times[0] = self.T - 1
        for t, t_prev in zip(times.tolist(), [*times[1:].tolist(), None]):
            x0 = image = self.predict(model, x, t)
            a, a_prev = self.alpha_bar[t], self.alpha_bar[t_prev] if t_prev is not None else torch.ones((), device=x.device)
            if order == 2 and before and t_prev is not None:  # the last step goes to lambda = infinity, at order 1
                r = (levels[t] - levels[before[1]]) / (levels[t_prev] - levels[t])
                x0 = image + (image - before[0]) / (2 * r.item())
            before = image, t
            epsilon = (x - a.sqrt() * x0) / (1 - a).sqrt()  # of the clamped x0, so that x stays on the noise level
            sigma = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).sqrt()
            x = a_prev.sqrt() * x0 + (1 - a_prev - sigma ** 2).clamp(min=0).sqrt() * epsilon
            if eta > 0:
                x = x + sigma * torch.randn(x.shape, generator=generator, device=x.device)
        return x


def guided(model, y, w):
    """The prediction for the class, w times further away from that for any image: (1 + w) e(x, y) - w e(x), Ho & Salimans 2022."""
    if w == 0:
        return lambda x, t: model(x, t, y)
    none = torch.full_like(y, model.label.num_embeddings - 1)
    return lambda x, t: (1 + w) * model(x, t, y).float() - w * model(x, t, none).float()


@torch.inference_mode()
def draw(model, n, args, seed, labels=None, n_steps=None, batch_size=500):
    """Yields n images in batches, uint8 (B, C, H, W) on the CPU; the seed fixes them. n_steps: --steps, if not given."""
    n_steps = args.steps if n_steps is None else min(n_steps, args.timesteps)
    diffusion = Diffusion(args.timesteps, args.schedule, args.predict, args.device)
    world, rank = (WORLD, data.RANK) if n > batch_size else (1, 0)
    for start in tqdm(range(0, n, world * batch_size), desc="sampling", disable=not sys.stderr.isatty() or n <= 64, leave=False):
        images = torch.zeros(min(world * batch_size, n - start), *args.shape, dtype=torch.uint8, device=args.device)
        i = start + rank * batch_size
        if i < n:
            generator = torch.Generator(args.device).manual_seed(seed * 100003 + i)
            x = torch.randn(min(batch_size, n - i), *args.shape, generator=generator, device=args.device).contiguous(memory_format=args.layout)
            net = guided(model, labels[i:i + batch_size].to(args.device), args.guidance) if labels is not None else model
            with autocast(args):
                x = diffusion.solve(net, x, generator, n_steps, args.order, args.eta) if n_steps else diffusion.ancestral(net, x, generator)
            images[i - start:i - start + batch_size] = from_model(x)
        if world > 1:  # each process has drawn a batch, the sum holds all
            dist.all_reduce(images)
        yield images.cpu()


def sample(*args, **kwargs):
    """All that draw() yields, uint8 (n, C, H, W)."""
    return torch.cat(list(draw(*args, **kwargs)))


def to_model(images):
    """uint8 [0, 255] -> float [-1, 1], what the network sees."""
    return images.float() / 127.5 - 1


def from_model(x):
    """float [-1, 1] -> uint8 [0, 255]."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Training.

def build(args):
    """The network that draws the samples, from the settings that model.pt keeps."""
    return UNet(args.shape[0], args.unet, len(args.class_counts), args.attention).to(args.device, memory_format=args.layout)


def train(args):
    images, labels = data.load(args.data, args.root, args.split, args.size)
    args.shape = tuple(images.shape[1:])
    if args.classes:
        args.class_counts = labels.bincount().tolist()
    images, labels = images.to(args.device), labels.to(args.device)

    torch.manual_seed(args.seed)
    diffusion = Diffusion(args.timesteps, args.schedule, args.predict, args.device)
    model = build(args)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=not args.plain, foreach=False)
    state, last = {"model": model, "ema": ema, "optimizer": optimizer}, args.epochs * math.ceil(len(images) / args.batch_size)
    net = compiled(args, nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model, last)

    for step, x, y in steps(args, images, labels, state, ema, lambda: sample(ema, 64, args, 0, rows_of_types(args), n_steps=20)):
        x = to_model(x)
        share = slice(data.RANK, None, WORLD) if data.RANK < len(x) else slice(1)  # every process draws all the noise and takes its share
        t, epsilon = torch.randint(args.timesteps, (len(x),), device=x.device), torch.randn_like(x)
        if args.classes:  # one in ten learns without its label, for --guidance
            y = torch.where(torch.rand(len(y), device=y.device) < 0.1, len(args.class_counts), y)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step / last, step)
        with autocast(args):
            loss = diffusion.loss(lambda x, t: net(x, t, y[share]), x[share], t[share], epsilon[share], args.min_snr)
        loss = loss * (len(range(data.RANK, len(x), WORLD)) * WORLD / len(x))  # a short batch's shares differ; DDP takes the plain mean
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_ema(ema, model, 0.5 ** (1 / (args.ema * step)) if args.ema else 0)
        record(mean_over_processes(loss))
    return ema


WORLD = int(os.environ.get("WORLD_SIZE", 1))  # torchrun's number of processes


def mean_over_processes(loss):
    loss = loss.detach().clone()
    if WORLD > 1:
        dist.all_reduce(loss)
    return loss / WORLD


def compiled(args, net, n_steps):
    """net through torch.compile; eager where that does not pay (on a CPU, in a run too short to win back a minute) or fails."""
    if args.compile == "off" or args.compile == "auto" and (args.device.type != "cuda" or args.plain or n_steps < 2000):
        return net
    fast = [torch.compile(net, dynamic=False)]            # a kernel for each shape: the same ones after a --resume

    def forward(*inputs):
        try:
            return fast[0](*inputs)
        except Exception as error:  # no compiler, or one of its many failures
            if fast[0] is net:
                raise
            print(f"torch.compile failed ({type(error).__name__}: {str(error).strip().splitlines()[0]}); training goes on without it", file=sys.stderr)
            fast[0] = net
            return net(*inputs)
    return forward


def learning_rate(args, share, step):
    """Grows over the first --warmup steps, then falls as a cosine to 0 at the end of the training (share 1)."""
    return args.lr * min(1, step / args.warmup) * (0.5 + 0.5 * math.cos(math.pi * share)) if args.warmup else args.lr


@torch.no_grad()
def update_ema(ema, model, decay):
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


# ---- plumbing: the same lines in cvae.py, dcgan.py and ddpm.py ----

def add_shared_flags(p):
    g = p.add_argument_group("data, device and files")
    g.add_argument("--data", type=data.name, default="bloodmnist", help="a 2-D MedMNIST name, the path of an .npz file, or demo: synthetic cells that come along")
    g.add_argument("--size", type=int, choices=data.SIZES, default=28, help="side of a named set's images, pixels (above 28: MedMNIST+)")
    g.add_argument("--root", help="folder of the .npz files; else $MEDMNIST_ROOT, else ~/.medmnist")
    g.add_argument("--split", choices=("train", "val", "test", "all"), default="all", help="which part to train on and to compare with")
    g.add_argument("--augment", action="store_true", help="random flips and quarter turns of the training images")
    g.add_argument("--classes", action="store_true", help="learn the labels as a condition")
    g.add_argument("--label", metavar="NAME", help="the class to draw, a name or number (a model trained with --classes; default: as in the data)")
    g.add_argument("--seed", type=data.number(int, 0, 2**31), default=0, help="of the weights, the training and --sample")
    g.add_argument("--device", type=data.device, default="auto", help="auto, cpu, cuda, cuda:N or mps")
    g.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="of the networks' products; auto: bf16 where the hardware has it")
    g.add_argument("--out", type=Path, default=Path("out") / MODEL, metavar="DIR", help="folder of ckpt.pt, model.pt, samples, log.csv, fid.json")
    g.add_argument("--resume", action="store_true", help="go on from DIR/ckpt.pt")
    g.add_argument("--save-every", type=data.number(int, 1), default=10, metavar="N", help="write ckpt.pt every N epochs or N minutes, whichever comes first")
    g.add_argument("--overwrite", action="store_true", help="train anew in a DIR that holds a run")
    g.add_argument("--sample", type=data.number(int, 1, 10**6), metavar="N", help="no training: draw N images into DIR/samples.npz and samples.png")
    g.add_argument("--ckpt", type=Path, metavar="FILE", help="no training: the model to draw from or to measure (--sample alone: DIR/model.pt, else the one in checkpoints/)")
    g.add_argument("--paper", action="store_true", help="the paper's settings for all that is not given; prints them")
    g.add_argument("--plain", action="store_true", help="train as a tutorial does, to compare the speed: fp32, DataLoader over PIL images, no fused optimizer")
    g = p.add_argument_group("evaluation")
    g.add_argument("--fid-runs", type=data.number(int, 0, 1000), default=0, metavar="N", help="runs of the FID after training, or of --ckpt")
    g.add_argument("--fid-samples", type=data.number(int, 2), default=10000, metavar="N", help="real and generated images in each run")
    g.add_argument("--fid-seed", type=data.number(int, 0, 2**31), default=100, metavar="N", help="of the first run; each further run adds 100")
    g.add_argument("--dims", type=int, choices=fid.DIMS, default=2048, help="Inception features that the FID compares")
    g.add_argument("--weights", default="fid", help="Inception's weights: fid, imagenet or a file")


def parse(p, argv):
    args = p.parse_args(argv)
    if args.paper:
        p.set_defaults(**PAPER)
        args = p.parse_args(argv)
        print("the paper's settings: " + " ".join(f"--{k.replace('_', '-')} {getattr(args, k)}" for k in PAPER))
    args.class_counts, args.layout = [], torch.contiguous_format if args.plain else torch.channels_last
    if args.label is not None and not args.sample:
        p.error("--label goes with --sample")
    if args.ckpt and not (args.sample or args.fid_runs):
        p.error("--ckpt goes with --sample or --fid-runs")
    if args.dtype == "auto":
        has_bf16 = {"cuda": torch.cuda.is_bf16_supported, "cpu": getattr(torch.cpu, "_is_avx512_bf16_supported", bool)}.get(args.device.type, bool)
        args.dtype = "bf16" if has_bf16() and not args.plain else "fp32"
    if sys.platform == "linux" and not args.plain:  # keep freed memory: the next step asks for as much again
        ctypes.CDLL(None).mallopt(-4, 0)          # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    return args


def autocast(args):
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.dtype == "bf16")


def settings(args):
    """What makes a run what it is: model.pt carries it, and --resume goes on only where it is the same."""
    other = ("root device out resume save_every overwrite sample ckpt paper plain layout fid_runs fid_samples fid_seed dims weights epochs "
             "prior steps order eta guidance compile trained classes label").split()
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


def load(args):
    """The trained network of --ckpt, DIR/model.pt or the one that comes along, with the settings that it was trained with."""
    path, shipped = args.ckpt or args.out / "model.pt", Path(__file__).parent / "checkpoints" / f"{MODEL}.pt"
    if not args.ckpt and not path.exists() and shipped.exists():
        path = shipped
    ckpt = data.read_checkpoint(path, MODEL, "train first, or name one with --ckpt")
    print(f"the model of {path}, {ckpt.get('epochs', 0):g} epochs")
    try:
        args.trained = ckpt["settings"] | {"epochs": ckpt["epochs"]}
        vars(args).update({k: v for k, v in args.trained.items() if k not in ("data", "size", "split", "seed", "dtype", "augment")})
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
    if args.resume:
        ckpt = data.read_checkpoint(args.out / "ckpt.pt", MODEL, "there is nothing to resume")
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
    args.out.mkdir(parents=True, exist_ok=True)
    data.save_log(args.out, LOSSES, rows)  # a folder that cannot be written is found now, not after an hour
    need, free = 4 * sum(v.nbytes for v in net.state_dict().values()), shutil.disk_usage(args.out).free
    if free < need:
        raise OSError(f"{args.out} has {free >> 20} MiB free, a checkpoint needs {need >> 20}; name another folder with --out")

    def checkpoint(step):
        check(epoch)
        common = {"script": MODEL, "settings": settings(args), "epochs": step / per_epoch}
        ckpt = common | {k: part.state_dict() for k, part in state.items()} | {
            "step": step, "rows": rows, "records": torch.stack(records).cpu() if records else torch.empty(0),
            "rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state(args.device) if args.device.type == "cuda" else None}
        data.save_grid(args.out / "samples.png", preview())
        data.save(args.out / "model.pt", lambda file: torch.save(common | {"weights": net.state_dict()}, file))
        if rows:
            data.save_curve(args.out, LOSSES, rows)
        data.save(args.out / "ckpt.pt", lambda file: torch.save(ckpt, file))  # last: a run that is killed before it does the step again
        return time.time()

    stop, saved, last = [], time.time(), args.epochs * per_epoch
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, signal.SIG_IGN if data.RANK else lambda number, frame: stop.append(number))
    bar, load_batches = tqdm(total=last, initial=start, disable=True if data.RANK else None, unit="step"), data.plain_batches if args.plain else data.batches
    for epoch in range(start // per_epoch, args.epochs):
        began, done = time.time(), max(start - epoch * per_epoch, 0)
        shuffle = torch.Generator().manual_seed(args.seed * 100003 + epoch)
        for i, x in enumerate(load_batches(images, args.batch_size, shuffle, args.augment, labels), 1):
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
                data.save_log(args.out, LOSSES, rows)
                line = f"epoch {epoch + 1}/{args.epochs}  " + "  ".join(f"{k} {v:.5g}" for k, v in zip((*LOSSES, "seconds", "images/s"), rows[-1][1:]))
                bar.set_description(line) if not bar.disable else print(line, flush=True)
            due = i == per_epoch and (epoch + 1) % args.save_every == 0 or time.time() - saved > 60 * args.save_every
            if stop or step == last or due:
                saved = checkpoint(step)
            if stop:
                print(f"\n{MODEL}.py: stopped after epoch {step // per_epoch}, step {step % per_epoch}; the same command with --resume goes on", file=sys.stderr)
                sys.exit(128 + stop[0])
    bar.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def evaluate(args, net):
    """fid.json: the FID of --fid-runs draws, by the protocol of fid.benchmark."""
    args.trained = getattr(args, "trained", settings(args) | {"epochs": args.epochs})
    result = fid.benchmark(lambda n, seed: sample(net, n, args, seed, draw_labels(args, n, seed)), args)
    data.save(args.out / "fid.json", lambda file: file.write((json.dumps(result, indent=1) + "\n").encode()))
    print(f"FID {result['fid']:.4g} ± {result['std']:.2g} ({args.fid_runs} runs)")


def main(argv=None):
    args = get_args(argv)
    net = load(args) if args.sample or args.ckpt else train(args)
    if args.sample:
        if args.label is not None and not args.class_counts:
            raise ValueError(f"--label {args.label}: the model was trained without --classes")
        labels = draw_labels(args, args.sample, args.seed)
        began = time.time()
        data.save_samples(args.out, draw(net, args.sample, args, args.seed, labels), (args.sample, *args.shape), labels)
        print(f"{args.sample} images in {args.out}/samples.npz and samples.png, drawn in {time.time() - began:.1f} s")
    if args.fid_runs:
        evaluate(args, net)


if __name__ == "__main__":
    data.command(main)
