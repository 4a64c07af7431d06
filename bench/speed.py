"""How fast? Training, sampling and measuring against the loop that a tutorial would have, in turns.

    python -m bench.speed out      about ten minutes on two cores; prints a table, writes out/speed.json

The tutorial's loop: the same networks in fp32, contiguous memory, a DataLoader over PIL images, Adam without
fusion, all T steps of sampling. FID is compared with the pytorch-fid package.
"""
import argparse
import csv
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
import torchvision
from torchvision import transforms

import cvae
import data
import dcgan
import ddpm
import fid

# ---- the tutorial's loop ----


def plain_loader(images, batch_size):
    transform = transforms.Compose([transforms.ToPILImage(), transforms.ToTensor()])  # uint8 -> PIL -> [0, 1]

    def collate(batch):
        return torch.stack([transform(image) for image in batch])

    return torch.utils.data.DataLoader(list(images), batch_size, shuffle=True, collate_fn=collate)


def plain_step(script, device):
    """A function that trains on a batch in [0, 1]: the script's own losses, the rest a textbook's."""
    model, rates, betas = script.Model().to(device), (1e-3,), (0.9, 0.999)
    if script is cvae:
        losses = [lambda x: cvae.objective(model, x, None)[0]]
    elif script is ddpm:
        def loss(x):
            t, epsilon = torch.randint(500, (len(x),), device=device), torch.randn_like(x)
            return model.diffusion.loss(model.net, 2 * x - 1, t, epsilon)

        losses = [loss]
    else:
        d, rates, betas = dcgan.Discriminator().to(device), (2e-4, 4e-4), (0.5, 0.999)

        def fake(x):
            return dcgan.diffaugment(model(torch.randn(len(x), 100, device=device))).contiguous()

        def d_loss(x):
            real = dcgan.diffaugment(2 * x - 1).contiguous()
            return dcgan.discriminator_loss(d(real), d(fake(x).detach()))

        losses = [lambda x: dcgan.generator_loss(d(fake(x))), d_loss]
    networks = (model, d) if script is dcgan else (model,)
    optimizers = [torch.optim.Adam(net.parameters(), lr=lr, betas=betas, foreach=False)
                  for net, lr in zip(networks, rates, strict=True)]

    def step(x):
        for optimizer, loss in zip(optimizers[::-1], losses[::-1], strict=True):  # the discriminator first
            optimizer.zero_grad()
            loss(x).backward()
            optimizer.step()

    return step


def plain_training(script, images, device):
    """images/s of the second of two epochs."""
    step = plain_step(script, device)
    for _ in range(2):
        began = time.time()
        for x in plain_loader(images, 64 if script is dcgan else 128):
            step(x.to(device))
        seconds = time.time() - began
    return len(images) / seconds


# ---- the measurements ----


class Bench:
    def __init__(self, args):
        self.args, self.gpu, self.peak = args, args.device.type == "cuda", 0
        self.images, self.labels, _ = data.load(args.data, args.root)
        args.out.mkdir(parents=True, exist_ok=True)
        self.work, self.rows = Path(tempfile.mkdtemp(dir=args.out)), []

    def part(self, n):
        """A data set of the first n images."""
        path, n_of = self.work / f"{n}.npz", {"train": n, "val": 1, "test": 1}
        both = {"images": self.images.permute(0, 2, 3, 1).numpy(), "labels": self.labels[:, None].numpy()}
        if not path.exists():
            np.savez(path, **{f"{s}_{k}": v[:m] for s, m in n_of.items() for k, v in both.items()})
        return path

    def script(self, script, *flags):
        """Runs a script in a process of its own: what it printed, its seconds; self.peak is its MiB."""
        began, log = time.time(), open(self.work / "log", "w+")
        command = [sys.executable, "-W", "ignore", f"{script.NAME}.py", "--device", self.args.device, *flags]
        command = [str(part) for part in command]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        log.seek(0)
        if status:
            raise data.Error(f"{' '.join(command)}: {log.read()}", 1)
        self.peak = usage.ru_maxrss // 1024
        return log.read(), time.time() - began

    def train(self, script, n, *flags):
        return self.script(script, "--data", self.part(n), "--split", "train", "--overwrite", *flags)

    def trained(self, script, n, *flags):
        """images/s of the last of two epochs: the first has warmed up."""
        out = self.work / script.NAME
        self.train(script, n, "--epochs", 2, "--out", out, *flags)
        return float(list(csv.DictReader(open(out / "log.csv")))[-1]["images/s"])

    def sampled(self, script, n, *flags):
        """images/s of --sample n."""
        text, _ = self.script(script, "--sample", n, "--out", self.work / "samples", "--overwrite", *flags)
        return n / float(re.search(r"after ([\d.]+) s", text).group(1))

    def compare(self, what, unit, plain, fast):
        """A row of the table: both measured in turns."""
        pairs = [(plain(), fast()) for _ in range(self.args.rounds)]
        faster = [b / a if unit == "images/s" else a / b for a, b in pairs]
        spread = stdev(faster) if len(faster) > 1 else 0.0
        row = dict(zip(("plain", "this"), map(list, zip(*pairs, strict=True)), strict=True))
        row |= {"what": what, "unit": unit, "ratio": mean(faster), "spread": spread, "peak MiB": self.peak}
        self.rows.append(row)
        self.peak = 0
        text = f"{mean(row['plain']):.4g} -> {mean(row['this']):.4g} {unit}, {row['ratio']:.3g} x"
        print(f"{what}: {text}", flush=True)

    def run(self):
        many, few, lot = (len(self.images), 2000, 10000) if self.gpu else (512, 8, 128)
        for script in (cvae, dcgan, ddpm):
            self.compare(
                f"training the {script.NAME.upper()}", "images/s",
                lambda s=script: plain_training(s, self.images[:many], self.args.device),
                lambda s=script: self.trained(s, many, *["--no-guide"] * (s is ddpm)))
        model = ddpm.load(device=self.args.device)

        def all_steps():
            began = time.time()
            ddpm.sample(model, few, dtype="fp32", steps=0, batch=few)
            return few / (time.time() - began)

        self.compare("sampling from the DDPM: all T steps against the solver's", "images/s", all_steps,
                     lambda: self.sampled(ddpm, lot, "--ckpt", "pretrained"))
        self.measuring(self.images[: 2000 if self.gpu else 64], 100 if self.gpu else 8)
        start = ("--epochs", 1, "--out", self.work / "start")
        self.start = {s.NAME: round(self.train(s, 128, *start)[1], 1) for s in (cvae, dcgan, ddpm)}

    def measuring(self, images, batch):
        """Features and distance against pytorch-fid; with random weights, which cost as much as any."""
        import pytorch_fid.fid_score
        import pytorch_fid.inception as reference

        dims, device, file = self.args.dims, self.args.device, self.work / "random.pth"
        state = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
        state = state.state_dict()
        torch.save(state, file)
        reference.load_state_dict_from_url = lambda *args, **kwargs: state  # in the place of a download
        theirs = reference.InceptionV3([reference.InceptionV3.BLOCK_INDEX_BY_DIM[dims]]).eval().to(device)
        net = fid.network(dims, file, device)

        def timed(call):
            began = time.time()
            call()
            return time.time() - began

        @torch.inference_mode()
        def reference_features():
            for x in images.split(batch):
                theirs(x.to(device).float() / 255)[0].cpu()

        self.compare(f"FID-{dims}: features, pytorch-fid against fid.py, batches of {batch}", "images/s",
                     lambda: len(images) / timed(reference_features),
                     lambda: len(images) / timed(lambda: fid.features(images, net)))
        x, y = np.random.default_rng(0).normal(size=(2, 10000, dims))
        moments = [*fid.statistics(x), *fid.statistics(y)]
        sqrtm = pytorch_fid.fid_score.linalg.sqrtm
        pytorch_fid.fid_score.linalg.sqrtm = lambda a, disp=False: (sqrtm(a), 0)  # SciPy 1.18 has no disp
        self.compare(f"FID-{dims}: the distance", "s",
                     lambda: timed(lambda: pytorch_fid.fid_score.calculate_frechet_distance(*moments)),
                     lambda: timed(lambda: fid.frechet_distance(*moments)))
        pytorch_fid.fid_score.linalg.sqrtm = sqrtm

    def write(self):
        name = torch.cuda.get_device_name() if self.gpu else f"{torch.get_num_threads()} CPU threads"
        result = {"device": name, "torch": torch.__version__, "torchvision": torchvision.__version__,
                  "python": platform.python_version(), "rounds": self.args.rounds, "rows": self.rows,
                  "start to the end of one step, s": self.start}
        with data.atomic(self.args.out / "speed.json") as file:
            file.write(json.dumps(result, indent=1).encode())
        print("| | plain loop | this | ratio ± spread | peak MiB |\n|---|---|---|---|---|")
        for r in self.rows:
            plain, this = (f"{mean(r[k]):.4g} {r['unit']}" for k in ("plain", "this"))
            ratio = f"**{r['ratio']:.3g} ± {r['spread']:.1g}**"
            print(f"| {r['what']} | {plain} | {this} | {ratio} | {r['peak MiB'] or ''} |")


def main(argv=None):
    p = argparse.ArgumentParser(epilog=__doc__, formatter_class=data.Help, allow_abbrev=False)
    p.error = data.refuse
    p.add_argument("out", type=Path, help="folder of the results")
    p.add_argument("--data", default="bloodmnist", help="the images to train on")
    p.add_argument("--root", help="folder of MedMNIST's files; else $MEDMNIST_ROOT, else ~/.medmnist")
    p.add_argument("--device", type=data.device, default="auto", help="auto, cpu, cuda, cuda:N or mps")
    p.add_argument("--dims", type=int, choices=tuple(fid.LAST), default=768, help="features of the FID")
    p.add_argument("--rounds", type=data.number(int, 1), default=2, help="measurements of each, in turns")
    bench = Bench(p.parse_args(argv))
    try:
        bench.run()
        bench.write()
    finally:
        shutil.rmtree(bench.work)


if __name__ == "__main__":
    data.command(main)
