"""Denoising diffusion on 28 x 28 blood cells (DDPM, Ho et al., 2020).

A U-Net learns to tell image and noise apart in a noised image. Sampling starts from pure noise and removes
it step by step, until an image is left. In the flags' help "paper" is Matos (2025), see README.md.

    python ddpm.py --ckpt pretrained --sample 64      sample from the pretrained model
    python ddpm.py --epochs 500 --device cuda         train on BloodMNIST, into out/ddpm
    python ddpm.py --resume                           continue a run that was stopped
    python ddpm.py --unet narrow --epochs 10          train a network that suits a CPU: half an hour of a core
    python ddpm.py --init pretrained --classes --lr 3e-4 --muon-lr 0.005 --epochs 100    from its weights
    torchrun --nproc_per_node=2 ddpm.py               train on several GPUs, or in several processes

These train on all images; without --classes they do not learn the types.

Measured: the pretrained model has an FID-768 of 0.01696 ± 0.00044 (five draws of 10,000 samples; a CPU core,
torch 2.14.1). It was trained with `--classes --split train --unet small --batch-size 64 --epochs 240`, by an
earlier version and in two parts. RESULTS.md says how, README.md what the figure means.
"""
import argparse
import copy
import functools
import json
import math
import os
import shlex
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

NAME = "ddpm"
LOSSES = ("loss", "guide_loss")         # the losses in log.csv
SAMPLER = ("steps", "eta", "guidance")  # the flags that sample() takes
# what --paper sets: the settings of Matos (2025) that are not the defaults
PAPER = dict(schedule="linear", predict="epsilon", attention=False, guide=False, optimizer="adam", lr=1e-4,
             decay="none", ema=0.0, t_power=1.0, steps=0)


def get_args(argv=None):
    p = argparse.ArgumentParser(epilog=__doc__, formatter_class=data.Help, allow_abbrev=False)
    add = p.add_argument_group("model").add_argument
    add("--timesteps", type=data.number(int, 2, 10000), default=500, help="T, the number of noise levels")
    add("--schedule", choices=SCHEDULES, default="cosine", help="noise schedule (paper: linear)")
    add("--predict", choices=PREDICTIONS, default="v",
        help="what the network predicts: the noise epsilon (paper), or v, a mix of noise and image")
    add("--unet", choices=tuple(UNETS), default="deeper",
        help="baseline, deeper: with the paper's widths, for a GPU; narrow: for a CPU; overnight: narrow, "
        "but two blocks a level; small: on patches of 2 x 2 pixels, for speed; tiny, tiny-pixels: guides")
    add("--attention", action=argparse.BooleanOptionalAction, default=True,
        help="self-attention at the two lowest resolutions (paper: none)")
    add("--qk-norm", action=argparse.BooleanOptionalAction, default=True,
        help="scale queries and keys of the attention to one length; without, Muon lets its logits explode")
    add("--guide", action=argparse.BooleanOptionalAction, default=True,
        help="train a tiny network as well, for --guidance (paper: none)")
    add = p.add_argument_group("training").add_argument
    add("--epochs", type=data.number(int, 1, 10**6), default=500, help="passes over the data")
    add("--batch-size", type=data.number(int, 1, 10**5), default=128, help="images per step")
    add("--optimizer", choices=("muon", "adam"), default="muon",
        help="for the hidden convolutions (paper: adam)")
    add("--muon-lr", type=data.number(float, 0), default=0.02, help="learning rate of Muon")
    add("--lr", type=data.number(float, 0), default=1e-3, help="learning rate of Adam (paper: 1e-4)")
    add("--decay", choices=("cosine", "none"), default="cosine",
        help="how the learning rates fall to 0, after a warm-up of 5 %% of the run, at most 500 steps "
        "(paper: none)")
    add("--ema", type=data.number(float, 0, 1), default=0.05,
        help="half-life of the weights' moving average, as a share of the steps so far; 0: none (paper)")
    add("--t-power", type=data.number(float, 0.01, 100), default=1.5, metavar="P",
        help="draw timesteps as T u^P, u uniform and stratified over the batch; 1: uniform (paper, not "
        "stratified); above: more of low noise, where the texture is")
    add("--init", metavar="FILE", help="start from the weights of this model.pt, or of `pretrained`, "
        "and from its model flags (pretrained: --unet small --no-qk-norm); the embedding of the labels then "
        "learns at 10 times --lr")
    add("--compile", action=argparse.BooleanOptionalAction, default=False,
        help="torch.compile the network: takes minutes, for long runs on a GPU")
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
    add("--steps", type=data.number(int, 0), default=50, help="sampling steps (DDIM); 0: all T (paper)")
    add("--eta", type=data.number(float, 0, 1), default=1.0, help="share of fresh noise; 1: as in Ho et al.")
    add("--guidance", type=data.number(float, 0), help="w in net + w (net - guide); default: 0.6 with one")
    p.error = data.refuse
    init = p.parse_known_args(argv)[0].init
    if init:                                              # the network is that of the file
        network = load(init, "cpu").model_args
        p.set_defaults(**{k: v for k, v in network.items() if k not in ("shape", "classes")})
        p.set_defaults(guide=bool(network["guide"]))
    args = read_args(p, argv)
    if not (args.sample or args.ckpt):  # sampling checks these itself; a training would fail at its end only
        if args.fid_runs and args.steps > args.timesteps:
            p.error(f"--steps {args.steps} is more than the {args.timesteps} of --timesteps")
        if args.guidance and not args.guide:
            p.error(f"--guidance {args.guidance} needs a guide, not --no-guide")
    return args


# ----------------------------------------------------------------------------------------------------
# Model: a U-Net that takes a noised image and its timestep, and gives an image of the same shape.

# patch: side of the squares of pixels that the U-Net works on; full: channels of extra layers on single
# pixels, 0: none; widths: channels of each level, the bottleneck last; depth: blocks in a row at each level
UNETS = {
    "baseline": dict(patch=1, full=0, widths=(64, 128, 256), depth=1),
    "deeper": dict(patch=1, full=0, widths=(64, 128, 256, 512), depth=1),
    "overnight": dict(patch=1, full=0, widths=(32, 64, 128, 192), depth=2),
    "narrow": dict(patch=1, full=0, widths=(32, 64, 128, 192), depth=1),
    "tiny-pixels": dict(patch=1, full=0, widths=(16, 32, 64, 64), depth=1),
    "small": dict(patch=2, full=16, widths=(64, 128, 192), depth=1),
    "tiny": dict(patch=2, full=16, widths=(16, 64, 64), depth=1),
}
GUIDES = {1: "tiny-pixels", 2: "tiny"}  # by the patch of the network: its guide should make the same mistakes
EMBED = 256


class GroupNorm(nn.GroupNorm):
    """Computes in fp32 even under autocast: bf16 is too coarse for mean and variance, and slower on a CPU."""

    def forward(self, x):
        return super().forward(x.float())


class Block(nn.Module):
    """Residual: two 3 x 3 convolutions; timestep and label scale and shift the features between them.
    attention: None, or a function that makes the layer. depth: the number of such blocks in a row."""

    def __init__(self, c_in, c_out, attention=None, depth=1):
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(8, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.condition = nn.Linear(EMBED, 2 * c_out)
        self.norm2, self.conv2 = GroupNorm(8, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = attention(c_out) if attention else nn.Identity()
        self.next = Block(c_out, c_out, attention, depth - 1) if depth > 1 else None
        nn.init.zeros_(self.conv2.weight)                 # each block starts close to its skip connection

    def forward(self, x, c):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.condition(c)[:, :, None, None].chunk(2, 1)
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        x = self.attention(self.skip(x) + h)
        return self.next(x, c) if self.next else x


class Attention(nn.Module):
    """Self-attention over all positions, heads of 64 channels (Vaswani et al., 2017). qk_norm: queries and
    keys are scaled to length 8 = sqrt(64), so that a logit is at most 8 (Henry et al., 2020). Without, Muon
    lets the weights grow, and the logits with them, until each position attends to a single one."""

    def __init__(self, channels, qk_norm=True):
        super().__init__()
        self.qk_norm = qk_norm
        self.norm = GroupNorm(8, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x):                                 # (B, C, h, w)
        qkv = self.qkv(self.norm(x)).flatten(2)           # (B, 3 C, h w)
        qkv = qkv.unflatten(1, (3, -1, 64))               # (B, 3, heads, 64, h w)
        q, k, v = qkv.transpose(3, 4).unbind(1)           # (B, heads, h w, 64) each
        if self.qk_norm:
            q, k = (8 * F.normalize(z, dim=-1) for z in (q, k))
        if x.is_cuda or torch.compiler.is_compiling():
            h = F.scaled_dot_product_attention(q, k, v)
        else:                                             # the same; training on a CPU is twice as fast so
            h = (q @ k.mT / math.sqrt(64)).softmax(-1) @ v
        return x + self.out(h.transpose(2, 3).reshape(x.shape))


class UNet(nn.Module):
    """(x_t, t, label) -> epsilon or v: (B, C, H, W), (B,), (B,) -> (B, C, H, W)."""

    def __init__(self, shape, n_classes, unet, attention, qk_norm):
        super().__init__()
        data.choose("unet", unet, UNETS)
        self.patch, full, (*widths, bottom), depth = UNETS[unet].values()
        patch_channels = (full or shape[0]) * self.patch ** 2
        up = widths[::-1]
        attention = functools.partial(Attention, qk_norm=qk_norm) if attention else None
        attend = [None] * (len(widths) - 1) + [attention]  # at higher resolution it costs more than it gives
        self.embed = nn.Sequential(nn.Linear(EMBED, EMBED), nn.SiLU(), nn.Linear(EMBED, EMBED))
        self.label = nn.Embedding(n_classes, EMBED) if n_classes else None
        self.first = nn.Conv2d(shape[0], full, 3, padding=1) if full else nn.Identity()
        self.stem = nn.Conv2d(patch_channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList(Block(a, b, at, depth) for a, b, at in
                                  zip([widths[0], *widths[:-1]], widths, attend, strict=True))
        self.middle = Block(widths[-1], bottom, attention, depth)
        self.narrow = nn.ModuleList(  # 1 x 1: to the width of the level above
            nn.Conv2d(a, b, 1) for a, b in zip([bottom, *up[:-1]], up, strict=True))
        self.up = nn.ModuleList(Block(2 * a, a, at, depth) for a, at in zip(up, attend[::-1], strict=True))
        self.head = nn.Sequential(
            GroupNorm(8, up[-1]), nn.SiLU(), nn.Conv2d(up[-1], patch_channels, 3, padding=1))
        self.last = nn.Sequential(nn.SiLU(), nn.Conv2d(2 * full, full, 3, padding=1), nn.SiLU(),
                                  nn.Conv2d(full, shape[0], 3, padding=1)) if full else None
        nn.init.zeros_((self.last or self.head)[-1].weight)  # the first prediction is about 0
        if n_classes:
            nn.init.zeros_(self.label.weight)

    def forward(self, x, t, y=None):                      # x: (B, C, 28, 28), t and y: (B,)
        c = self.embed(timestep_embedding(t, EMBED))
        if self.label:
            c = c + self.label(y)
        c = F.silu(c)
        pixels, skips = self.first(x), []                 # the shapes below are those of "deeper"
        x = self.stem(F.pixel_unshuffle(pixels, self.patch))
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
        return self.last(torch.cat([x, pixels], 1)) if self.last else x


def timestep_embedding(t, dim):
    """Sines and cosines of t at dim/2 frequencies from 1 to 1/10000: (B,) -> (B, dim)."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


class DDPM(nn.Module):
    """The U-Net, its guide (see guided) or None, and the noise schedule. classes: {name: number of training
    images}, empty for a model without labels. guide: the name of the guide's U-Net, or None. The defaults of
    guide and qk_norm are those of files from before there was a choice, in which guide may be True."""

    def __init__(self, shape=(3, 28, 28), classes=(), unet="deeper", attention=True, timesteps=500,
                 schedule="cosine", predict="v", guide=None, qk_norm=False):
        super().__init__()
        guide = "tiny" if guide is True else guide
        # the arguments above, which model.pt keeps to build the network again
        self.model_args = dict(shape=shape, classes=classes, unet=unet, attention=attention,
                               timesteps=timesteps, schedule=schedule, predict=predict, guide=guide,
                               qk_norm=qk_norm)
        self.shape, self.classes = tuple(shape), dict(classes)
        self.net = UNet(shape, len(classes), unet, attention, qk_norm)
        self.guide = UNet(shape, len(classes), guide, attention, qk_norm) if guide else None
        self.diffusion = Diffusion(timesteps, schedule, predict)


Model = DDPM  # its name in the bookkeeping


# ----------------------------------------------------------------------------------------------------
# Objective and sampling.
#
# One step of noise:     x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise
# Many steps make one:   x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) epsilon,
#                        alpha_bar_t the product of all 1 - beta up to t.
# So training takes any t at once (q_sample). Only sampling goes through the steps (solve). In the code t
# counts from 0, and x_0 is the image before the first step: alpha_bar[0] belongs to Ho et al.'s t = 1.

SCHEDULES = ("linear", "cosine")
PREDICTIONS = ("v", "epsilon")


class Diffusion(nn.Module):
    """The noising process and its reversal. `network` is a function (x_t, t, ..) -> epsilon or v."""

    def __init__(self, timesteps=500, schedule="cosine", predict="v"):
        super().__init__()
        data.choose("schedule", schedule, SCHEDULES)
        data.choose("predict", predict, PREDICTIONS)
        if schedule == "linear":                          # Ho et al. 2020
            betas = torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64)
        else:                                             # Nichol & Dhariwal 2021, eq. 17: f is alpha_bar
            s = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
            f = torch.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        self.T, self.predict_v = timesteps, predict == "v"
        self.register_buffer("alpha_bar", torch.cumprod(1 - betas, 0).float(), persistent=False)

    def q_sample(self, x0, t, epsilon):
        """x_t ~ q(x_t | x_0) = N(sqrt(alpha_bar) x_0, (1 - alpha_bar) I), Ho et al. eq. 4."""
        a = self.alpha_bar[t][:, None, None, None]
        return a.sqrt() * x0 + (1 - a).sqrt() * epsilon

    def loss(self, network, x0, t, epsilon, *y):
        """E |target - network(x_t, t)|^2 over t and normal epsilon. The target is epsilon (Ho et al.
        eq. 14) or v = sqrt(alpha_bar) epsilon - sqrt(1 - alpha_bar) x_0 (Salimans & Ho 2022). v is nearly
        epsilon where there is little noise, and nearly -x_0 where there is much: always what x_t hides."""
        a = self.alpha_bar[t][:, None, None, None]
        target = a.sqrt() * epsilon - (1 - a).sqrt() * x0 if self.predict_v else epsilon
        return (network(self.q_sample(x0, t, epsilon), t, *y).float() - target).square().mean()

    def predict_x0(self, network, x, t):
        """The network's estimate of the image x_0 from x_t, clamped to the range of images."""
        a = self.alpha_bar[t]
        out = network(x, torch.full((len(x),), t, device=x.device)).float()
        if self.predict_v:  # in this sum of x and v the two epsilon cancel
            x0 = a.sqrt() * x - (1 - a).sqrt() * out
        else:               # x = sqrt(a) x0 + sqrt(1 - a) epsilon, solved for x0
            x0 = (x - (1 - a).sqrt() * out) / a.sqrt()
        return x0.clamp(-1, 1)

    def solve(self, network, x, generator, steps, eta=1.0):
        """From noise to an image in `steps` of the T noise levels, most of them at low noise, where the fine
        texture appears: of 500 in 50 steps, t = 499, 479, 459, .. 5, 4, 3, 2, 1, 0. DDIM, Song et al. 2021
        eq. 12 and 16. eta 0: no new noise, the start decides all. eta 1: new noise at each step; with
        steps = T this is the sampling of Ho et al."""
        shares = np.linspace(1, 0, steps).tolist()        # of the steps to come
        # the square puts more steps at low noise; max keeps them apart
        times = [max(steps - 1 - i, round((self.T - 1) * share ** 2)) for i, share in enumerate(shares)]
        for t, t_prev in zip(times, [*times[1:], None], strict=True):
            a = self.alpha_bar[t]
            a_prev = torch.ones_like(a) if t_prev is None else self.alpha_bar[t_prev]
            # estimate the image; then noise it to the next, lower level: in part with the noise that was in
            # x (epsilon), in part with new noise. At eta 1 sigma is the standard deviation of x at t_prev,
            # given x at t and x0 (Ho et al. eq. 7)
            x0 = self.predict_x0(network, x, t)
            epsilon = (x - a.sqrt() * x0) / (1 - a).sqrt()  # anew, as x0 may have been clamped
            sigma = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).sqrt()
            x = a_prev.sqrt() * x0 + (1 - a_prev - sigma ** 2).clamp(min=0).sqrt() * epsilon
            if eta > 0:
                x = x + sigma * torch.randn(x.shape, generator=generator, device=x.device)
        return x


def guided(model, y, w):
    """net + w (net - guide). The guide is a tiny network that makes the same mistakes as net, only larger; so
    the step from guide to net, continued, leads away from them. Autoguidance, Karras et al. 2024 eq. 3, whose
    w is 1 + w here."""
    def network(x, t):
        out = model.net(x, t, y).float()
        if not w:
            return out
        return (1 + w) * out - w * model.guide(x, t, y).float()
    return network


@torch.inference_mode()
def sample(model, n, label=None, seed=0, dtype="auto", steps=50, eta=1.0, guidance=None, batch=None):
    """n samples, uint8 (n, C, H, W) on the CPU; the same arguments give the same ones. label: see
    data.draw_labels. steps, eta, guidance: as the flags. batch: samples at a time, each batch with its own
    noise; None: 500 of 28 x 28, fewer of larger."""
    diffusion, device = model.diffusion, model.net.stem.weight.device
    y = data.draw_labels(model.classes, n, label, seed)
    if not 0 <= steps <= diffusion.T:
        raise data.Error(f"steps {steps}: the model has {diffusion.T}; --steps 0 takes all")
    if guidance and model.guide is None:
        raise data.Error(f"guidance {guidance}: the model was trained with --no-guide, so take --guidance 0")
    if guidance is None:
        guidance = 0.6 if model.guide else 0.0
    batch = batch or max(1, 500 * 28 ** 2 // math.prod(model.shape[1:]))
    images = []
    for i in data.progress(range(0, n, batch), "sampling"):
        generator = torch.Generator(device).manual_seed(int(seed) * 100003 + i)
        x = torch.randn(min(batch, n - i), *model.shape, generator=generator, device=device)
        network = guided(model, None if y is None else y[i:i + batch].to(device), guidance)
        with data.autocast(device, dtype):
            x = diffusion.solve(network, x.contiguous(memory_format=torch.channels_last), generator,
                                steps or diffusion.T, eta)
        images.append(from_model(x).cpu())
    return torch.cat(images)


def to_model(images):
    """uint8 [0, 255] -> float [-1, 1], what the network sees."""
    return images.float() / 127.5 - 1


def from_model(x):
    """float [-1, 1] -> uint8 [0, 255]."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# ----------------------------------------------------------------------------------------------------
# Training.

def train(args):
    # ---- several processes (torchrun): each takes its share of every batch, gradients are averaged ----
    rank, world = 0, 1
    if "TORCHELASTIC_RUN_ID" in os.environ:
        if args.device.type == "cuda":
            args.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
        dist.barrier()                                    # all have read their flags before one writes
        rank, world = data.processes()
        sys.stdout = open(os.devnull, "w") if rank else sys.stdout  # the first process alone prints

    images, labels, names = data.load(args.data, args.root, args.split, args.size)
    about = data.describe(images, labels, names)
    held_out = data.validation_part(args.data, args.root, args.split, args.size, images, len(names))
    held_out = [x.to(args.device) for x in held_out]
    images, labels = images.to(args.device), labels.to(args.device)
    torch.manual_seed(args.seed)
    kind = GUIDES[UNETS[args.unet]["patch"]] if args.guide else None
    model = DDPM(about["shape"], about["classes"] if args.classes else {}, args.unet, args.attention,
                 args.timesteps, args.schedule, args.predict, kind, args.qk_norm)
    if args.init and not args.resume:
        initialize(model, args.init)
    model = model.to(args.device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model).requires_grad_(False)      # the average makes better samples than the weights
    optimizers = make_optimizers(args, model)
    state = {"model": model, "ema": ema} | {f"optimizer{i}": o for i, o in enumerate(optimizers)}
    if world > 1:
        dist.barrier()                                    # all have read --init before begin() removes files
    rows = begin(args, state, about)                      # of log.csv: one per epoch done; log() adds them
    signal = model.diffusion.alpha_bar[-1].sqrt().item()
    if signal > 0.02:
        print(f"--schedule {args.schedule}: {signal:.0%} of the image is left at the last timestep, "
              "but sampling starts from pure noise; cosine leaves none")

    diffusion, net, guide = model.diffusion, model.net, model.guide
    if args.compile:
        net = torch.compile(net)
    if world > 1:
        net = nn.parallel.DistributedDataParallel(net)
        guide = guide and nn.parallel.DistributedDataParallel(guide)

    per_epoch = data.n_batches(len(images), args.batch_size)
    n_steps = args.epochs * per_epoch
    saved = time.monotonic()
    for epoch in range(len(rows), args.epochs):
        torch.manual_seed(args.seed * 100003 + epoch)     # an epoch's randomness: from (seed, epoch) alone
        began, losses, step = time.time(), [], epoch * per_epoch
        for x, y in data.batches(images, labels, args.batch_size, args.augment, args.balance):
            step += 1
            x0 = to_model(x)
            t = draw_timesteps(len(x), args.timesteps, args.t_power, x.device)
            epsilon = torch.randn_like(x0)
            batch = x0, t, epsilon, y                     # by the seed the same in every process
            quarter = [z[::4] for z in batch]             # enough for the guide, which should err more
            if world > 1:
                batch, quarter = (own_rows(tensors, rank, world) for tensors in (batch, quarter))
            with data.autocast(args.device, args.dtype):
                loss = diffusion.loss(net, *batch)
                guide_loss = diffusion.loss(guide, *quarter) if guide else torch.zeros_like(loss)
            model.zero_grad()
            (loss + guide_loss).backward()
            for optimizer in optimizers:
                lr = optimizer.defaults["lr"] * lr_scale(step, n_steps, args.decay)
                for group in optimizer.param_groups:
                    group["lr"] = lr * group.get("times", 1)
                optimizer.step()
            # the average's half-life is h = args.ema * step steps: decay^h = 1/2
            update_ema(ema, model, 0.5 ** (1 / (args.ema * step)) if args.ema else 0)
            both = torch.stack([loss, guide_loss]).detach()
            if world > 1:
                dist.all_reduce(both)
                both /= world
            losses.append(both)
        val_loss = validate(args, model, *held_out) if held_out else None
        log(args, rows, losses, len(images), time.time() - began, val_loss)
        if len(rows) == args.epochs or time.monotonic() - saved > data.SAVE_EVERY:
            save_model(args, ema, about, len(rows), steps=min(20, args.timesteps))  # a quick look
            save_checkpoint(args, state, rows, about)     # last: killed between, --resume makes both anew
            saved = time.monotonic()
    if world > 1:
        dist.destroy_process_group()
        if rank:
            sys.exit()                                    # the first process samples and measures


def own_rows(tensors, rank, world):
    """The rows for this process. All processes get equally many, so a few rows may come twice."""
    n = len(tensors[0])
    mine = torch.arange(math.ceil(n / world) * world)[rank::world] % n
    return [z[mine] for z in tensors]


def make_optimizers(args, model):
    """Muon for the hidden convolutions; Adam for all else, and for the convolutions from or to pixels (1 or 3
    channels)."""
    hidden, labels, others = [], [], []
    for name, p in model.named_parameters():
        if args.init and name.endswith("label.weight"):
            labels.append(p)
        elif args.optimizer == "muon" and p.ndim == 4 and min(p.shape[:2]) > 3:
            hidden.append(p)
        else:
            others.append(p)
    groups = [{"params": others}]
    if labels:                                            # the row of a new class has far to go
        groups.append({"params": labels, "times": 10})
    adam = torch.optim.Adam(groups, lr=args.lr, fused=True)
    return [adam, Muon(hidden, args.muon_lr)] if hidden else [adam]


def draw_timesteps(n, timesteps, power, device=None):
    """n timesteps t = T u^power, 0 to T - 1, u uniform. A power above 1 favours small t, where the texture of
    the image is. Stratified: one u from each interval of length 1/n, so the gradients vary less (similar to
    Kingma et al., 2021). In random order, since the guide sees every fourth."""
    u = (torch.randperm(n, device=device) + torch.rand(n, device=device)) / n
    t = timesteps * u ** power
    return t.long().clamp(max=timesteps - 1)              # in fp32, T u may be rounded up to T


@torch.no_grad()
def validate(args, model, images, labels):
    """The loss of the weights, not of their average, on held-out images; timesteps are drawn as in training,
    but the same and with the same noise each time, so that epochs compare."""
    torch.manual_seed(0)
    total = 0
    for x, y in zip(images.split(args.batch_size), labels.split(args.batch_size), strict=True):
        x0 = to_model(x)
        t = draw_timesteps(len(x), args.timesteps, args.t_power, x.device)
        with data.autocast(args.device, args.dtype):
            total += len(x) * model.diffusion.loss(model.net, x0, t, torch.randn_like(x0), y)
    return total.item() / len(images)


def initialize(model, path):
    """From another model.pt, takes the tensors that fit by name and shape; rows of the label embedding by the
    class's name in any case, or by what stands before brackets; for a new class their mean. Raises Error
    where nothing fits."""
    other = load(path, "cpu")
    mine, theirs = model.state_dict(), other.state_dict()
    taken = {k: v for k, v in theirs.items() if k in mine and v.shape == mine[k].shape}
    if not any(k.startswith("net.") and v.ndim == 4 for k, v in taken.items()):
        raise data.Error(f"--init {path}: none of its layers fits into this network")

    learned = {i: name.lower() for i, (name, count) in enumerate(other.classes.items()) if count}

    def row(name):
        """The number of the class in the other embedding, or None."""
        for part in (str, lambda text: text.split("(")[0]):  # the whole name, else up to brackets
            alike = [i for i, known in learned.items() if part(known).strip() == part(name.lower()).strip()]
            if len(alike) == 1:
                return alike[0]
        return None

    old = [row(name) for name in model.classes]
    for k in ("net.label.weight", "guide.label.weight"):
        if k in mine and k in theirs:
            mean = theirs[k][[*learned]].mean(0)
            taken[k] = torch.stack([mean if i is None else theirs[k][i] for i in old])
    model.load_state_dict(taken, strict=False)
    new = [name for name, i in zip(model.classes, old, strict=True) if i is None]
    print(f"--init {path}: took {len(taken)} of {len(mine)} tensors; new classes: {', '.join(new) or 'none'}")


def lr_scale(step, n_steps, decay):
    """Factor of the learning rate. decay "cosine": a rise over 5 % of the run (500 steps at most), times a
    cosine to 0; "none": 1."""
    rise = min(1, step / min(500, 0.05 * n_steps))
    fall = 0.5 + 0.5 * math.cos(math.pi * step / n_steps)
    return rise * fall if decay == "cosine" else 1


@torch.no_grad()
def update_ema(ema, model, decay):
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


# ----------------------------------------------------------------------------------------------------
# Optimizer. It can be skipped on a first reading: --optimizer adam does without it.

class Muon(torch.optim.Optimizer):
    """Momentum whose singular values are all brought to about 1, so that rare directions learn as fast as
    frequent ones (Jordan et al., 2024). For hidden convolutions, as matrices (C_out, the rest)."""

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, beta = group["params"], group["momentum"]
            grads = [p.grad for p in params]
            momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
            torch._foreach_mul_(momenta, beta)
            torch._foreach_add_(momenta, grads)
            updates = torch._foreach_add(grads, momenta, alpha=beta)  # Nesterov's look ahead
            updates = orthogonalize([u.flatten(1) for u in updates])
            torch._foreach_mul_(updates, [-group["lr"] * max(1, len(u) / u.shape[1]) ** 0.5 for u in updates])
            torch._foreach_add_(params, [u.view_as(p) for u, p in zip(updates, params, strict=True)])


def orthogonalize(matrices, steps=5):
    """Matrices g (m, n) with their singular values brought to about 1, by a quintic Newton-Schulz iteration
    x <- p(x x^T) x, which needs the small square a = x x^T only: half the work of iterating x itself. Squares
    of one size are iterated together: on a GPU their launches would cost more than they do."""
    wide = [g if len(g) <= g.shape[1] else g.T for g in matrices]
    wide = list(torch._foreach_div(wide, torch._foreach_add(torch._foreach_norm(wide), 1e-7)))
    for side in {len(x) for x in wide}:
        members = [i for i, x in enumerate(wide) if len(x) == side]
        one = torch.eye(side, device=wide[0].device)
        a = torch.stack([wide[i] @ wide[i].T for i in members])
        product = one.expand_as(a)
        for _ in range(steps):
            p = 3.4445 * one + torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
            a, product = p @ a @ p, p @ product
        for i, q in zip(members, product, strict=True):
            wide[i] = q @ wide[i]
    return [x if x.shape == g.shape else x.T for x, g in zip(wide, matrices, strict=True)]


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
