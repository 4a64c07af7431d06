"""Convolutional variational autoencoder on 28 x 28 blood cells (Kingma & Welling, 2014).

    python cvae.py --sample 64              draw cells from the trained model that comes along, or one's own
    python cvae.py                          train on BloodMNIST, into out/cvae
    python cvae.py --resume                 go on where a run was stopped
    python cvae.py --paper                  train with the paper's settings
    python cvae.py --resume --fid-runs 5    measure what was trained: prints FID mean ± std (5 runs)

An encoder gives a Gaussian over latent codes, a decoder turns a code into an image, and both are trained together on a
bound of the data's likelihood.

Measured: FID-768 0.4109 ± 0.0087 after 26 epochs (five draws of 2,000 cells, seeds 100 to 500; two CPU cores, torch 2.15.0).
The commands and what the figure means: README.md.
"""
import argparse
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

MODEL, LOSSES = "cvae", ("loss", "nll", "kl")
PAPER = dict(latent_dim=64, decoder="transposed", likelihood="bernoulli", prior="normal", kl_weight=0.75)


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    g = p.add_argument_group("model")
    g.add_argument("--latent-dim", type=data.number(int, 1, 1000), default=128, help="size of the latent code (paper: 64)")
    g.add_argument("--decoder", choices=("residual", "transposed"), default="residual", help="residual blocks, or the paper's transposed convolutions")
    g.add_argument("--likelihood", choices=("gaussian", "bernoulli"), default="gaussian", help="of a pixel: with a learned width, or the paper's cross-entropy")
    g.add_argument("--prior", choices=("gmm", "normal"), default="gmm", help="codes to draw from: a mixture fitted to the codes of the data, or N(0, I) (paper)")
    g.add_argument("--components", type=data.number(int, 1, 100), default=4, help="Gaussians in the mixture, of each class with --classes")
    g = p.add_argument_group("training")
    g.add_argument("--epochs", type=data.number(int, 1, 10**6), default=100, help="passes over the data")
    g.add_argument("--batch-size", type=data.number(int, 1, 10**5), default=128, help="images per step")
    g.add_argument("--lr", type=data.number(float, 0), default=1e-3, help="Adam's learning rate")
    g.add_argument("--kl-weight", type=data.number(float, 0), default=1.0, help="beta, the weight of the KL term (paper: 0.75)")
    add_shared_flags(p)
    return parse(p, argv)


# ---------------------------------------------------------------------------------------------------------------------
# Model.

class GroupNorm(nn.GroupNorm):
    """In fp32 under bf16 autocast too: its sums need the digits, and on a CPU it is the faster kernel."""

    def forward(self, x):
        return super().forward(x.float())


class Residual(nn.Module):
    """Two 3 x 3 convolutions that are added to their input."""

    def __init__(self, channels):
        super().__init__()
        self.layers = nn.Sequential(GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
                                    GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x):
        return x + self.layers(x)


class VAE(nn.Module):
    """Encoder: image -> mean and log-variance of the code. Decoder: code -> logits of the image."""

    def __init__(self, shape=(3, 28, 28), latent_dim=128, classes=0, decoder="residual", components=4):
        super().__init__()
        self.classes = classes
        self.label = nn.Embedding.from_pretrained(torch.zeros(classes, 2 * latent_dim), freeze=False) if classes else None
        sizes = [shape[1]]
        for _ in range(3):
            sizes.append(sizes[-1] // 2)                     # 28 -> 14 -> 7 -> 3
        self.small = (128, sizes[3], sizes[3])
        self.encoder = nn.Sequential(
            nn.Conv2d(shape[0], 32, 4, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(64, 128, 4, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(math.prod(self.small), 2 * latent_dim))
        layers, odd = [], [size % 2 for size in sizes]       # the row that halving dropped: 3 -> 7 -> 14 -> 28
        if decoder == "transposed":
            layers += [nn.Linear(latent_dim + classes, math.prod(self.small)), nn.ReLU(), nn.Unflatten(1, self.small)]
            layers += [nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1, output_padding=odd[2]), nn.ReLU()]
            layers += [nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1, output_padding=odd[1]), nn.ReLU()]
            layers += [nn.ConvTranspose2d(32, shape[0], 4, stride=2, padding=1, output_padding=odd[0])]
        else:                                                # an upsampled pixel is seen by every tap alike: no checkerboard
            layers += [nn.Linear(latent_dim + classes, 128 * sizes[2] ** 2), nn.Unflatten(1, (128, sizes[2], sizes[2]))]
            layers += [Residual(128), nn.Upsample(sizes[1]), nn.Conv2d(128, 64, 3, padding=1)]
            layers += [Residual(64), nn.Upsample(sizes[0]), nn.Conv2d(64, 32, 3, padding=1)]
            layers += [Residual(32), GroupNorm(8, 32), nn.SiLU(), nn.Conv2d(32, shape[0], 3, padding=1)]
        self.decoder = nn.Sequential(*layers)
        groups = max(classes, 1)                             # the mixture of each class: weight, mean and the root of the covariance
        self.register_buffer("weight", torch.full((groups, components), 1 / components))
        self.register_buffer("mean", torch.zeros(groups, components, latent_dim))
        self.register_buffer("root", torch.eye(latent_dim).repeat(groups, components, 1, 1))

    def encode(self, x, y=None):                             # (B, C, 28, 28) -> (B, latent), (B, latent)
        h = self.encoder(x).float()
        mu, logvar = (h + self.label(y) if self.classes else h).chunk(2, dim=1)
        return mu, logvar

    def decode(self, z, y=None):                             # (B, latent) -> (B, C, 28, 28), logits
        return self.decoder(torch.cat([z, F.one_hot(y, self.classes)], 1) if self.classes else z)


# ---------------------------------------------------------------------------------------------------------------------
# Objective and sampling.

def reparameterize(mu, logvar):
    """z = mu + sigma * epsilon: a draw from N(mu, sigma^2) that gradients pass through, Kingma & Welling sec. 2.4."""
    return mu + (0.5 * logvar).exp() * torch.randn_like(mu)


def kl_divergence(mu, logvar):
    """KL(N(mu, sigma^2) || N(0, I)), summed over the code: (B, latent) -> (B,). Kingma & Welling app. B."""
    return 0.5 * (mu ** 2 + logvar.exp() - 1 - logvar).sum(1)


def negative_log_likelihood(logits, x, likelihood):
    """-log p(x | z) in nats an image, x (B, C, H, W) in [0, 1].

    bernoulli: binary cross-entropy. gaussian: every pixel from N(sigmoid(logits), s^2), with the one width s that makes the
    batch most likely, which is its mean squared error (Rybkin et al., 2021, eq. 4): the sharper the decoder, the more detail counts."""
    if likelihood == "bernoulli":
        return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)
    mse = F.mse_loss(logits.sigmoid(), x)
    return 0.5 * x[0].numel() * (1 + math.log(2 * math.pi) + mse.log())


def objective(model, x, y, kl_weight=1.0, likelihood="gaussian"):
    """The negative evidence bound with weight beta on the KL (Higgins et al., 2017), in nats an image: NLL + beta KL.

    x: (B, C, H, W) in [0, 1], which both likelihoods need. y: labels (B,) or None. Returns loss, nll, kl."""
    mu, logvar = model.encode(x, y)
    nll = negative_log_likelihood(model.decode(reparameterize(mu, logvar), y).float(), x, likelihood)
    kl = kl_divergence(mu, logvar).mean()
    return nll + kl_weight * kl, nll, kl


@torch.inference_mode()
def fit_prior(model, images, labels, args):
    """Fits the mixture of each class to codes of its images, z ~ q(z | x), by expectation maximisation (Ghosh et al., 2020)."""
    rng = torch.Generator(args.device).manual_seed(0)
    codes = []
    for i in range(0, len(images), 1000):
        mu, logvar = model.encode(to_model(images[i:i + 1000]), labels[i:i + 1000])
        codes.append(mu + (0.5 * logvar).exp() * torch.randn(mu.shape, generator=rng, device=mu.device))
    codes = torch.cat(codes)
    for k in range(len(model.mean)):
        z = codes[labels == k] if model.classes else codes
        if len(z):
            model.weight[k], model.mean[k], model.root[k] = mixture(z, args.components, rng)


def mixture(z, components, rng, rounds=30):
    """The Gaussian mixture of z (N, D) by expectation maximisation: weights (K,), means (K, D), roots L of the covariances
    L L^T (K, D, D). Each covariance is drawn towards that of all z, as if D more points had it: few points cannot collapse one."""
    n, d = z.shape
    centred = z - z.mean(0)
    whole = centred.T @ centred / n + 1e-4 * torch.eye(d, device=z.device)
    mean = z[torch.randint(n, (components,), generator=rng, device=z.device)]
    root, weight = torch.linalg.cholesky(whole).repeat(components, 1, 1), torch.full((components,), 1 / components, device=z.device)
    for _ in range(rounds):
        white = torch.linalg.solve_triangular(root, (z - mean[:, None]).mT, upper=False)     # (K, D, N)
        log_density = weight.log()[:, None] - root.diagonal(dim1=1, dim2=2).log().sum(1)[:, None] - 0.5 * (white ** 2).sum(1)
        share = log_density.softmax(0)                                                       # (K, N): whose point is it?
        count = share.sum(1).clamp(min=1e-3)
        weight, mean = count / count.sum(), share @ z / count[:, None]
        away = z - mean[:, None]
        root = torch.linalg.cholesky(((away * share[..., None]).mT @ away + d * whole) / (count + d)[:, None, None])
    return weight, mean, root


@torch.inference_mode()
def draw(model, n, args, seed, labels=None, batch_size=1000):
    """Yields n images in batches, uint8 (B, C, H, W) on the CPU: codes from the prior, decoded to each pixel's mean."""
    generator = torch.Generator(args.device).manual_seed(seed)
    for i in range(0, n, batch_size):
        z = torch.randn(min(batch_size, n - i), args.latent_dim, generator=generator, device=args.device)
        y = labels[i:i + batch_size].to(args.device) if labels is not None else None
        if args.prior == "gmm":
            group = y if y is not None else torch.zeros(len(z), dtype=torch.long, device=args.device)
            k = model.weight[group].multinomial(1, generator=generator)[:, 0]
            z = model.mean[group, k] + (model.root[group, k] @ z[..., None])[..., 0]
        with autocast(args):
            x = model.decode(z, y).float().sigmoid()
        yield (x * 255).round().to(torch.uint8).cpu()


def sample(*args, **kwargs):
    """All that draw() yields, uint8 (n, C, H, W)."""
    return torch.cat(list(draw(*args, **kwargs)))


def to_model(images):
    """uint8 [0, 255] -> float [0, 1], what the network sees and what its sigmoid gives back."""
    return images.float() / 255


# ---------------------------------------------------------------------------------------------------------------------
# Training.

def build(args):
    """The network that draws the samples, from the settings that model.pt keeps."""
    model = VAE(args.shape, args.latent_dim, len(args.class_counts), args.decoder, args.components)
    return model.to(args.device, memory_format=args.layout)


def train(args):
    images, labels = data.load(args.data, args.root, args.split, args.size)
    args.shape = tuple(images.shape[1:])
    if args.classes:
        args.class_counts = labels.bincount().tolist()
    images, labels = images.to(args.device), labels.to(args.device)

    torch.manual_seed(args.seed)
    model = build(args)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=not args.plain, foreach=False)
    state = {"model": model, "optimizer": optimizer}

    def preview():
        fit_prior(model, images, labels, args)
        return sample(model, 64, args, 0, rows_of_types(args))

    for step, x, y in steps(args, images, labels, state, model, preview):
        with autocast(args):
            loss, nll, kl = objective(model, to_model(x), y, args.kl_weight, args.likelihood)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        record(loss, nll, kl)
    return model


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
