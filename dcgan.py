"""Deep convolutional GAN on 28 x 28 blood cells (Radford et al., 2016): a generator learns to fool a discriminator.

    python dcgan.py --sample 64              draw cells from the trained model that comes along, or one's own
    python dcgan.py                          train on BloodMNIST, into out/dcgan
    python dcgan.py --resume                 go on where a run was stopped
    python dcgan.py --paper                  train with the paper's settings
    python dcgan.py --resume --fid-runs 5    measure what was trained: prints FID mean ± std (5 runs)

Measured: FID-768 0.5061 ± 0.01 after 40 epochs (five draws of 2,000 cells, seeds 100 to 500; two CPU cores, torch 2.15.0).
The commands and what the figure means: README.md.
"""
import argparse
import copy
import ctypes
import json
import math
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import data
import fid

MODEL, LOSSES = "dcgan", ("d_loss", "g_loss")
PAPER = dict(start=3, d_norm="batch", batch_size=128, lr=1e-3, d_lr=1e-3, label_smoothing=0.1, g_steps=3, diffaugment=False, ema=0)


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    g = p.add_argument_group("model")
    g.add_argument("--latent-dim", type=data.number(int, 1, 1000), default=100, help="size of the generator's input")
    g.add_argument("--start", type=int, choices=(3, 7), default=7, help="side of the generator's first features (paper: an eighth of the image, 3)")
    g.add_argument("--d-norm", choices=("spectral", "batch", "none"), default="spectral", help="of the discriminator's weights or features (paper: batch)")
    g = p.add_argument_group("training")
    g.add_argument("--epochs", type=data.number(int, 1, 10**6), default=40, help="passes over the data")
    g.add_argument("--batch-size", type=data.number(int, 2, 10**5), default=64, help="images per step (paper: 128)")
    g.add_argument("--lr", type=data.number(float, 0), default=2e-4, help="the generator's learning rate (paper: 1e-3)")
    g.add_argument("--d-lr", type=data.number(float, 0), default=4e-4, help="the discriminator's (paper: 1e-3)")
    g.add_argument("--label-smoothing", type=data.number(float, 0, 0.5), default=0.0, help="the discriminator's targets are 1 - this and this (paper: 0.1)")
    g.add_argument("--g-steps", type=data.number(int, 1, 100), default=1, help="generator updates per discriminator update (paper: 3)")
    g.add_argument("--r1", type=data.number(float, 0), default=0.0, metavar="GAMMA", help="weight of the penalty on the discriminator's slope at real images (paper: 0)")
    g.add_argument("--diffaugment", action=argparse.BooleanOptionalAction, default=True, help="the discriminator sees all images, real and drawn, moved and recoloured (paper: no)")
    g.add_argument("--ema", type=data.number(float, 0, 1), default=0.05, help="half-life of the averaged generator that draws, as a share of the training so far; 0: none (paper)")
    add_shared_flags(p)
    return parse(p, argv)


# ---------------------------------------------------------------------------------------------------------------------
# Model. Each layer of the two networks halves or doubles the image, whatever its size: 28 <-> 14 <-> 7 <-> 3.

class Generator(nn.Module):
    """Code (B, latent) -> image (B, C, 28, 28) in [-1, 1]."""

    def __init__(self, shape=(3, 28, 28), latent_dim=100, classes=0, start=7):
        super().__init__()
        self.classes = classes
        latent_dim = latent_dim + classes                    # the label, one-hot, is a part of the code
        halvings = 3 if start == 3 else 2
        sizes = [shape[1] // 2 ** k for k in range(halvings, -1, -1)]  # 7, 14, 28
        widths = [32 * 2 ** k for k in range(halvings, -1, -1)] if start == 3 else [256, 128, 64]
        layers = [nn.Unflatten(1, (latent_dim, 1, 1)), nn.ConvTranspose2d(latent_dim, widths[0], sizes[0], bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
        for a, b, size in zip(widths, widths[1:], sizes[1:]):
            layers += [nn.ConvTranspose2d(a, b, 4, stride=2, padding=1, output_padding=size % 2, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], shape[0], 3, padding=1), nn.Tanh())
        self.apply(init)

    def forward(self, z, y=None):
        return self.layers(torch.cat([z, F.one_hot(y, self.classes)], 1) if self.classes else z)


class Discriminator(nn.Module):
    """Image (B, C, 28, 28) in [-1, 1] -> logit (B,), high for real; a label adds its projection (Miyato & Koyama, 2018).

    norm: "batch" as in the paper; "spectral" bounds how steep each layer is (Miyato et al., 2018); "none"."""

    def __init__(self, shape=(3, 28, 28), classes=0, norm="spectral"):
        super().__init__()
        bound = nn.utils.parametrizations.spectral_norm if norm == "spectral" else lambda layer: layer
        widths, layers = (32, 64, 128, 256) if norm == "batch" else (64, 128, 256, 256), []
        for a, b in zip((shape[0], *widths), widths):        # 28 -> 14 -> 7 -> 3 -> 1
            layers += [nn.Conv2d(a, b, 4, stride=2, padding=1), nn.BatchNorm2d(b) if norm == "batch" and a > 3 else nn.Identity(), nn.LeakyReLU(0.2)]
        width = widths[-1] * (shape[1] // 16) ** 2
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, 1))
        self.label = nn.Embedding(classes, width) if classes else None
        self.apply(init)
        for module in list(self.modules()):
            if isinstance(module, (nn.Conv2d, nn.Linear, nn.Embedding)):
                bound(module)

    def forward(self, x, y=None):
        h = self.layers[:-1](x)
        logit = self.layers[-1](h)[:, 0]
        return logit + (self.label(y) * h).sum(1) if self.label else logit


def init(module):
    """Weights from N(0, 0.02), Radford et al. sec. 4."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, 0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1, 0.02)


# ---------------------------------------------------------------------------------------------------------------------
# Objective and sampling.

def discriminator_loss(real_logits, fake_logits, smoothing=0.0):
    """-log D(x) - log(1 - D(G(z))), Goodfellow et al. 2014, with targets 1 - smoothing and smoothing for 1 and 0."""
    real = F.binary_cross_entropy_with_logits(real_logits, torch.full_like(real_logits, 1 - smoothing))
    fake = F.binary_cross_entropy_with_logits(fake_logits, torch.full_like(fake_logits, smoothing))
    return real + fake


def generator_loss(fake_logits):
    """-log D(G(z)), the non-saturating form, Goodfellow et al. 2014 sec. 3."""
    return F.softplus(-fake_logits).mean()


def gradient_penalty(discriminator, x, y=None):
    """R1 = 1/2 E |grad_x D(x)|^2 at real images, Mescheder et al. 2018 eq. 9."""
    x = x.detach().requires_grad_()
    gradient, = torch.autograd.grad(discriminator(x, y).sum(), x, create_graph=True)
    return 0.5 * (gradient ** 2).sum((1, 2, 3)).mean()


def diffaugment(x):
    """Each image of (B, C, H, W) moved by up to an eighth, a square of half its side cut out, its brightness, saturation and
    contrast changed; differentiable, so that the generator learns through it (Zhao et al., 2020)."""
    b, c, h, w = x.shape
    u = torch.rand(7, b, 1, 1, 1, device=x.device)
    x = x + u[0] - 0.5
    mean = x.mean(1, keepdim=True)
    x = (x - mean) * 2 * u[1] + mean
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * (u[2] + 0.5) + mean
    rows, columns = torch.arange(h, device=x.device)[:, None], torch.arange(w, device=x.device)
    down, across = ((2 * v - 1) * (n // 8 + 0.5) for v, n in ((u[3], h), (u[4], w)))
    i, j = (rows + down.round().long()).expand(b, 1, h, w), (columns + across.round().long()).expand(b, 1, h, w)
    inside = (i >= 0) & (i < h) & (j >= 0) & (j < w)
    x = x.flatten(2).gather(2, (i.clamp(0, h - 1) * w + j.clamp(0, w - 1)).flatten(2).expand(-1, c, -1)).view(b, c, h, w) * inside
    hole = ((rows - u[5] * h).abs() < h / 4) & ((columns - u[6] * w).abs() < w / 4)
    return (x * ~hole).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def draw(generator, n, args, seed, labels=None, batch_size=1000):
    """Yields n images in batches, uint8 (B, C, H, W) on the CPU: the generator, in eval mode, on codes from N(0, I)."""
    rng = torch.Generator(args.device).manual_seed(seed)
    generator.eval()
    for i in range(0, n, batch_size):
        z = torch.randn(min(batch_size, n - i), args.latent_dim, generator=rng, device=args.device)
        with autocast(args):
            x = generator(z, labels[i:i + batch_size].to(args.device) if labels is not None else None).float()
        yield ((x + 1) * 127.5).round().to(torch.uint8).cpu()


def sample(*args, **kwargs):
    """All that draw() yields, uint8 (n, C, H, W)."""
    return torch.cat(list(draw(*args, **kwargs)))


def to_model(images):
    """uint8 [0, 255] -> float [-1, 1], the range of the generator's tanh."""
    return images.float() / 127.5 - 1


# ---------------------------------------------------------------------------------------------------------------------
# Training.

def build(args):
    """The network that draws the samples, from the settings that model.pt keeps."""
    return Generator(args.shape, args.latent_dim, len(args.class_counts), args.start).to(args.device, memory_format=args.layout)


def train(args):
    images, labels = data.load(args.data, args.root, args.split, args.size)
    args.shape = tuple(images.shape[1:])
    if args.classes:
        args.class_counts = labels.bincount().tolist()
    images, labels = images.to(args.device), labels.to(args.device)

    torch.manual_seed(args.seed)
    generator, discriminator = build(args), Discriminator(args.shape, len(args.class_counts), args.d_norm).to(args.device, memory_format=args.layout)
    ema = copy.deepcopy(generator).requires_grad_(False)
    g_optimizer = torch.optim.Adam(generator.parameters(), lr=args.lr, betas=(0.5, 0.999), fused=not args.plain, foreach=False)
    d_optimizer = torch.optim.Adam(discriminator.parameters(), lr=args.d_lr, betas=(0.5, 0.999), fused=not args.plain, foreach=False)
    state = {"model": generator, "ema": ema, "discriminator": discriminator, "g_optimizer": g_optimizer, "d_optimizer": d_optimizer}
    view = diffaugment if args.diffaugment else lambda x: x

    for step, x, y in steps(args, images, labels, state, ema, lambda: sample(ema, 64, args, 0, rows_of_types(args))):
        real, noise = to_model(x), lambda: torch.randn(len(x), args.latent_dim, device=args.device)
        with autocast(args):
            fake = generator(noise(), y).detach()
            d_loss = discriminator_loss(discriminator(view(real), y).float(), discriminator(view(fake), y).float(), args.label_smoothing)
        loss = d_loss
        if args.r1 and step % 16 == 0:  # now and then with 16 times the weight: the same on average (Karras et al., 2020)
            loss = d_loss + 16 * args.r1 * gradient_penalty(discriminator, view(real), y)
        d_optimizer.zero_grad()
        loss.backward()
        d_optimizer.step()
        for _ in range(args.g_steps):
            with autocast(args):
                g_loss = generator_loss(discriminator(view(generator(noise(), y)), y).float())
            g_optimizer.zero_grad()
            g_loss.backward()
            g_optimizer.step()
        update_ema(ema, generator, 0.5 ** (1 / (args.ema * step)) if args.ema else 0)
        record(d_loss, g_loss)
    return ema


@torch.no_grad()
def update_ema(ema, model, decay):
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for mean, buffer in zip(ema.buffers(), model.buffers()):  # BatchNorm's statistics are averages already
        mean.copy_(buffer)


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
