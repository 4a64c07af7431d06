"""The tests: python -m pytest -q test_all.py

The real data (a MedMNIST root, $MEDMNIST_ROOT or ~/.medmnist) and real Inception weights ($FID_WEIGHTS, a file) are used
where they are at hand; the tests that need them are skipped elsewhere, with the reason.
"""
import argparse
import functools
import http.server
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from hashlib import md5
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn as nn
import torchvision
from PIL import Image
from scipy import linalg, stats

import cvae
import data
import dcgan
import ddpm
import fid

HERE = Path(__file__).parent
SCRIPTS = [cvae, dcgan, ddpm]
SMALL = {cvae: [], dcgan: [], ddpm: ["--unet", "patches", "--timesteps", "6", "--steps", "4", "--warmup", "2"]}
ROOT = Path(os.environ.get("MEDMNIST_ROOT") or Path.home() / ".medmnist").expanduser()
needs_data = pytest.mark.skipif(not (ROOT / "bloodmnist.npz").is_file(), reason=f"no bloodmnist.npz in {ROOT}; set MEDMNIST_ROOT")
pytestmark = pytest.mark.filterwarnings("ignore:.*the covariance is singular", "ignore:The `disp` argument")
needs_weights = pytest.mark.skipif(not os.environ.get("FID_WEIGHTS"), reason="no Inception weights; set FID_WEIGHTS to a file")


def fake_set(path, n=(96, 8, 8), size=28, channels=3, seed=0, **change):
    """A MedMNIST file of smooth made-up blobs, so that a model has something to learn."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    arrays = {}
    for split, k in zip(data.SPLITS, n):
        centre, width = rng.uniform(0.3, 0.7, (k, 2, 1, 1)), rng.uniform(0.1, 0.3, (k, 1, 1))
        blob = np.exp(-((x - centre[:, 0]) ** 2 + (y - centre[:, 1]) ** 2) / width ** 2)
        images = 255 * (1 - blob[..., None] * rng.uniform(0.3, 0.9, (k, 1, 1, channels)))
        arrays[f"{split}_images"] = images.astype(np.uint8) if channels == 3 else images[..., 0].astype(np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, 8, (k, 1)).astype(np.uint8)
    arrays.update(change)
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return str(path)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    return fake_set(tmp_path_factory.mktemp("data") / "small.npz")


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Seeded random weights of the whole network, statistics of the BatchNorm included."""
    torch.manual_seed(0)
    net = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1), m.running_var.uniform_(0.5, 1.5), nn.init.normal_(m.bias, 0, 0.1)
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(net.state_dict(), path)
    return str(path)


@pytest.fixture(scope="session")
def stem_file(inception_file):
    """The layers of it that 64 features need: a file that is read, checked and hashed in no time."""
    path = Path(inception_file).with_name("stem.pth")
    torch.save({k: v for k, v in torch.load(inception_file, weights_only=True).items() if k.startswith(("Conv2d_1a", "Conv2d_2a", "Conv2d_2b"))}, path)
    return str(path)


def run(script, *argv, check=True, **kwargs):
    """The script as a user runs it."""
    done = subprocess.run([sys.executable, HERE / f"{script.__name__}.py", *map(str, argv)], capture_output=True, text=True, timeout=200, **kwargs)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def one_line(done, code, *words):
    """The answer to a user's mistake: this exit code, no traceback, the cause in the last line."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    for word in words:
        assert word in last, last


# ---- data.py --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("channels", [1, 3])
def test_load_gives_every_split_in_order(tmp_path, channels):
    path = fake_set(tmp_path / "x.npz", n=(5, 3, 2), channels=channels)
    file = np.load(path)
    images, labels = data.load(path)
    assert images.dtype == torch.uint8 and images.shape == (10, channels, 28, 28)
    assert labels.dtype == torch.int64 and labels.shape == (10,)
    for split, part in zip(data.SPLITS, (slice(0, 5), slice(5, 8), slice(8, 10))):
        x, y = data.load(path, split=split)
        assert torch.equal(x, images[part]) and torch.equal(y, labels[part])
        raw = file[f"{split}_images"].reshape(len(x), 28, 28, channels)
        assert np.array_equal(x.permute(0, 2, 3, 1).numpy(), raw) and np.array_equal(y.numpy(), file[f"{split}_labels"][:, 0])


def test_load_names_the_first_finding_of_several(tmp_path):
    hot = np.array([[0, 0, 0], [0, 1, 1], [1, 0, 0]], np.uint8)
    path = fake_set(tmp_path / "x.npz", n=(3, 1, 1), train_labels=hot, val_labels=hot[:1], test_labels=hot[:1])
    assert data.load(path, split="train")[1].tolist() == [0, 2, 1]


@needs_data
def test_load_real_data():
    images, labels = data.load(root=ROOT)
    assert images.shape == (17092, 3, 28, 28) and labels.bincount().tolist() == [1218, 3117, 1551, 2895, 1214, 1420, 3329, 2348]


def test_unknown_and_3d_names():
    with pytest.raises(ValueError, match="bloodmnist.*organsmnist"):
        data.load("bloodmist")
    with pytest.raises(ValueError, match="3-D"):
        data.load("organmnist3d")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def medmnist_at(tmp_path):
    """medmnist's entry of bloodmnist, pointed at a server on this machine that serves tmp_path/www."""
    import medmnist
    (tmp_path / "www").mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path / "www"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    entry = {"url": f"http://127.0.0.1:{server.server_port}/bloodmnist.npz"}
    with mock.patch.dict(medmnist.INFO["bloodmnist"], entry):
        yield tmp_path / "www" / "bloodmnist.npz", medmnist.INFO["bloodmnist"]
    server.shutdown()


def test_download_checks_the_md5_and_leaves_nothing_half(tmp_path, medmnist_at):
    served, info = medmnist_at
    root = tmp_path / "root"
    with pytest.raises(FileNotFoundError) as error:  # nothing there: 404
        data.load("bloodmnist", root)
    assert info["url"] in str(error.value) and str(root / "bloodmnist.npz") in str(error.value)
    fake_set(served, n=(4, 2, 2))
    with pytest.raises(FileNotFoundError):  # there, with another md5
        data.load("bloodmnist", root)
    assert list(root.iterdir()) == []
    info["MD5"] = md5(served.read_bytes()).hexdigest()
    assert len(data.load("bloodmnist", root)[0]) == 8
    assert [f.name for f in root.iterdir()] == ["bloodmnist.npz"]


def test_root_is_the_argument_then_the_variable(tmp_path, monkeypatch):
    for folder, k in (("a", 3), ("b", 5)):
        (tmp_path / folder).mkdir()
        fake_set(tmp_path / folder / "bloodmnist.npz", n=(k, 1, 1))
    monkeypatch.setenv("MEDMNIST_ROOT", str(tmp_path / "a"))
    assert len(data.load("bloodmnist")[0]) == 5
    assert len(data.load("bloodmnist", tmp_path / "b")[0]) == 7


@pytest.mark.parametrize("change, words", [
    (dict(train_images=None), "train_images"),
    (dict(train_labels=np.zeros((95, 1), np.uint8)), "labels"),
    (dict(train_images=np.zeros((96, 28, 28, 3), np.float32)), "float"),
    ({f"{s}_images": np.zeros((n, 28, 28, 4), np.uint8) for s, n in zip(data.SPLITS, (96, 8, 8))}, "28, 4"),
    (dict(train_images=np.zeros((96, 64, 64, 3), np.uint8)), "differ in shape"),
    (dict(train_labels=np.full((96, 1), -1)), "labels"), (dict(train_labels=np.full((96, 1), 10 ** 12)), "0 to 999"),
    ({f"{s}_images": np.zeros((n, 30, 30), np.uint8) for s, n in zip(data.SPLITS, (96, 8, 8))}, "30 x 30"),
    ({f"{s}_images": np.zeros((n, 28, 32), np.uint8) for s, n in zip(data.SPLITS, (96, 8, 8))}, "28 x 32"),
    (dict(train_labels=np.zeros((96, 1), np.float32)), "float"),
    (dict(train_images=np.array([{}] * 96, dtype=object)), "allow_pickle"),
])
def test_foreign_contents(tmp_path, change, words):
    path = fake_set(tmp_path / "x.npz", **change)
    with pytest.raises(ValueError, match=words) as error:
        data.load(path)
    assert path in str(error.value) and "\n" not in str(error.value)


def test_empty_set(tmp_path):
    with pytest.raises(ValueError, match="no images"):
        data.load(fake_set(tmp_path / "x.npz", n=(0, 0, 0)))


@pytest.mark.parametrize("spoil", [lambda b: b[:len(b) // 2], lambda b: b[:10], lambda b: b"", lambda b: bytes(range(256)) * 50,
                                   lambda b: b[:3000] + b"\xff" * 4000 + b[7000:]])
def test_spoilt_files(tmp_path, small, spoil):
    path = tmp_path / "x.npz"
    with np.load(small) as file:
        np.savez_compressed(path, **file)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match="not a readable MedMNIST file"):
        data.load(str(path))


def test_missing_path():
    with pytest.raises(FileNotFoundError, match="nowhere.npz"):
        data.load("nowhere.npz")


@pytest.mark.parametrize("augment", [False, True])
def test_an_epoch_visits_each_image_once(augment):
    images = torch.arange(1000).reshape(-1, 1, 1, 1).expand(-1, 3, 28, 28) % 251
    images = torch.stack([images[:, 0], images[:, 1] // 2, torch.arange(1000).reshape(-1, 1, 1).expand(-1, 28, 28) // 251], 1).to(torch.uint8)
    seen = list(data.batches(images, 128, torch.Generator().manual_seed(1), augment))
    assert [len(x) for x in seen] == [128] * 7 + [104]
    names = torch.cat(seen)[:, :, 3, 4].long()
    assert sorted((names[:, 0] + 251 * names[:, 2]).tolist()) == list(range(1000))
    again = torch.cat(list(data.batches(images, 128, torch.Generator().manual_seed(1), augment)))
    other = torch.cat(list(data.batches(images, 128, torch.Generator().manual_seed(2), augment)))
    assert torch.equal(torch.cat(seen), again) and not torch.equal(again, other)


def test_augmentation_is_the_eight_symmetries_of_the_square():
    image = torch.arange(16, dtype=torch.uint8).reshape(1, 1, 4, 4)
    symmetries = {tuple(torch.rot90(x, k, (2, 3)).flatten().tolist()) for x in (image, image.flip(3)) for k in range(4)}
    drawn = torch.cat(list(data.batches(image.repeat(8000, 1, 1, 1), 1000, torch.Generator().manual_seed(0), True)))
    forms, counts = drawn.flatten(1).unique(dim=0, return_counts=True)
    assert {tuple(f.tolist()) for f in forms} == symmetries
    assert stats.chisquare(counts).pvalue > 1e-3


# ---- the models -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [28, 64])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("script", SCRIPTS)
def test_shapes_and_ranges_from_door_to_door(script, channels, size):
    args = script.get_args(["--device", "cpu", *SMALL[script]])
    args.shape = (channels, size, size)
    torch.manual_seed(0)
    net = script.build(args)
    images = torch.randint(0, 256, (4, *args.shape), dtype=torch.uint8)
    x = script.to_model(images)
    low = 0 if script is cvae else -1
    assert x.shape == images.shape and x.dtype == torch.float32
    assert torch.equal(((x - low) / (1 - low) * 255).round().to(torch.uint8), images)  # the range is [low, 1], and nothing is lost
    if script is cvae:
        mu, logvar = net.encode(x)
        assert mu.shape == logvar.shape == (4, 128) and net.decode(mu).shape == x.shape
    elif script is dcgan:
        assert dcgan.Discriminator(args.shape)(x).shape == (4,) and net(torch.randn(4, 100)).shape == x.shape
    else:
        assert net(x, torch.arange(4)).shape == x.shape
    drawn = script.sample(net, 5, args, seed=3)
    assert drawn.shape == (5, *args.shape) and drawn.dtype == torch.uint8
    assert torch.equal(drawn, script.sample(net, 5, args, seed=3)) and not torch.equal(drawn, script.sample(net, 5, args, seed=4))


def test_kl_and_reparameterization_against_torch_distributions():
    torch.manual_seed(0)
    mu, logvar = torch.randn(7, 64), torch.randn(7, 64)
    q = torch.distributions.Normal(mu, (logvar / 2).exp())
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(cvae.kl_divergence(mu, logvar), expected)
    z = cvae.reparameterize(mu[:1, :1].expand(100000, 1), logvar[:1, :1].expand(100000, 1))
    assert stats.kstest(z[:, 0], "norm", args=(mu[0, 0].item(), q.stddev[0, 0].item())).pvalue > 1e-3


def test_cvae_objective_is_the_bernoulli_likelihood_and_beta_kl():
    torch.manual_seed(0)
    net, x = cvae.VAE(), (torch.rand(5, 3, 28, 28) > 0.5).float()
    torch.manual_seed(1)
    loss, nll, kl = cvae.objective(net, x, None, 0.3, "bernoulli")
    torch.manual_seed(1)
    mu, logvar = net.encode(x)
    logits = net.decode(cvae.reparameterize(mu, logvar))
    torch.testing.assert_close(nll, -torch.distributions.Bernoulli(logits=logits).log_prob(x).sum() / 5)
    torch.testing.assert_close(loss, nll + 0.3 * kl)
    torch.testing.assert_close(kl, cvae.kl_divergence(mu, logvar).mean())


def test_the_gaussian_likelihood_has_the_width_that_makes_the_batch_most_likely():
    torch.manual_seed(0)
    logits, x = torch.randn(5, 3, 28, 28), torch.rand(5, 3, 28, 28)
    ours = cvae.negative_log_likelihood(logits, x, "gaussian")
    widths = torch.linspace(0.05, 1, 2000)
    theirs = torch.stack([-torch.distributions.Normal(logits.sigmoid(), s).log_prob(x).sum() / 5 for s in widths])
    assert ours.item() == pytest.approx(theirs.min().item(), rel=1e-4) and (ours <= theirs + 1e-2).all()


def test_the_mixture_finds_the_clusters_that_made_the_points():
    rng = np.random.default_rng(0)
    weights, means = np.array([0.5, 0.3, 0.2]), np.array([[0, 0, 0], [6, 0, 3], [0, 8, -4]])
    roots = rng.normal(size=(3, 3, 3)) * 0.5
    which = rng.choice(3, 30000, p=weights)
    z = means[which] + (roots[which] @ rng.normal(size=(30000, 3, 1)))[..., 0]
    best = max((cvae.mixture(torch.tensor(z), 3, torch.Generator().manual_seed(s)) for s in range(5)), key=lambda m: likelihood(*m, z))
    order = np.argsort(-best[0].numpy())
    np.testing.assert_allclose(best[0][order], weights, atol=0.02)
    np.testing.assert_allclose(best[1][order], means, atol=0.1)
    np.testing.assert_allclose((best[2] @ best[2].mT)[order], roots @ roots.transpose(0, 2, 1), atol=0.15)


def likelihood(weight, mean, root, z):
    return np.mean(np.log(sum(w * stats.multivariate_normal(m, c).pdf(z) for w, m, c in zip(weight.numpy(), mean.numpy(), (root @ root.mT).numpy()))))


def test_the_fitted_prior_draws_codes_like_those_of_the_data():
    """Codes of two classes far from N(0, I): sample() must draw each class from its own mixture."""
    args = cvae.get_args(["--latent-dim", "4", "--device", "cpu", "--dtype", "fp32", "--components", "2"])
    args.shape, args.class_counts = (1, 28, 28), [50, 50]
    torch.manual_seed(0)
    model = cvae.build(args)
    images, labels = torch.randint(0, 256, (100, 1, 28, 28), dtype=torch.uint8), torch.arange(100) % 2
    centre = torch.tensor([[9.0, 0, 0, 0], [0, -9.0, 0, 0]])
    model.encode = lambda x, y: (centre[y], torch.full((len(x), 4), -4.0))
    cvae.fit_prior(model, images, labels, args)
    drawn = []
    model.decode = lambda z, y: drawn.append(z) or torch.zeros(len(z), 1, 28, 28)
    cvae.sample(model, 400, args, 0, torch.arange(400) % 2)
    for k in (0, 1):
        torch.testing.assert_close(drawn[0][k::2].mean(0), centre[k], atol=0.1, rtol=0)
        torch.testing.assert_close(drawn[0][k::2].std(0), torch.full((4,), math.exp(-2)), atol=0.06, rtol=0)


def test_gan_losses_are_the_papers():
    real, fake = torch.randn(64), torch.randn(64)
    p, q = real.sigmoid(), fake.sigmoid()
    torch.testing.assert_close(dcgan.discriminator_loss(real, fake), -(p.log() + (1 - q).log()).mean())
    smooth = -(0.9 * p.log() + 0.1 * (1 - p).log()).mean() - (0.1 * q.log() + 0.9 * (1 - q).log()).mean()
    torch.testing.assert_close(dcgan.discriminator_loss(real, fake, 0.1), smooth)
    torch.testing.assert_close(dcgan.generator_loss(fake), -q.log().mean())


def test_r1_of_a_linear_discriminator_is_half_its_squared_weights():
    w = torch.randn(3, 28, 28)
    penalty = dcgan.gradient_penalty(lambda x, y: (x * w).sum((1, 2, 3)), torch.randn(5, 3, 28, 28))
    torch.testing.assert_close(penalty, 0.5 * (w ** 2).sum())


def test_diffaugment_moves_cuts_and_recolours_and_passes_gradients():
    torch.manual_seed(0)
    x = torch.rand(4000, 3, 28, 28, requires_grad=True)
    y = dcgan.diffaugment(x)
    dark = (y == 0).all(1).float().mean((1, 2))
    # what moving by up to 3 and a hole of 14 x 14, centred anywhere, leave black on average
    kept = np.mean([(28 - abs(a)) / 28 for a in range(-3, 4)]) ** 2
    assert dark.mean().item() == pytest.approx(1 - kept * (1 - np.mean([np.mean(np.abs(np.arange(28) - c) < 7) for c in np.linspace(0, 28, 1000)]) ** 2), abs=0.02)
    gradient, = torch.autograd.grad(y.sum(), x)
    assert torch.equal((gradient != 0).any((1, 2, 3)), torch.ones(4000, dtype=torch.bool))
    flat = dcgan.diffaugment(torch.full((4000, 3, 28, 28), 0.2))  # one grey: brightness alone changes it, by U(-0.5, 0.5)
    shades = flat.amax((1, 2, 3)) - 0.2
    assert stats.kstest(shades[shades > -0.2].numpy(), stats.uniform(-0.2, 0.7).cdf).pvalue > 1e-3


def test_spectral_norm_bounds_each_layer():
    net = dcgan.Discriminator(classes=8)
    for _ in range(50):
        net(torch.randn(8, 3, 28, 28), torch.arange(8))
    layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.Embedding))]
    assert len(layers) == 6
    for layer in layers:
        assert torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2).item() == pytest.approx(1, abs=0.05)


def test_paper_sized_networks():
    """The paper's deeper U-Net has 7.76 M parameters and 0.85 GFLOP; this one is its sibling, not its copy."""
    from torch.utils.flop_counter import FlopCounterMode
    net = ddpm.UNet(attention=False)
    with FlopCounterMode(display=False) as counter:
        net(torch.randn(1, 3, 28, 28), torch.zeros(1))
    assert 7e6 < sum(p.numel() for p in net.parameters()) < 9e6
    assert 0.8e9 < counter.get_total_flops() < 1.1e9


def test_attention_is_that_of_torch():
    torch.manual_seed(0)
    ours, theirs = ddpm.Attention(128), nn.MultiheadAttention(128, 2, batch_first=True)
    nn.init.normal_(ours.out.weight)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight[:, :, 0, 0]), theirs.in_proj_bias.copy_(ours.qkv.bias)
        theirs.out_proj.weight.copy_(ours.out.weight[:, :, 0, 0]), theirs.out_proj.bias.copy_(ours.out.bias)
        x = torch.randn(3, 128, 7, 7)
        tokens = ours.norm(x).flatten(2).transpose(1, 2)
        expected = x + theirs(tokens, tokens, tokens)[0].transpose(1, 2).reshape(x.shape)
        torch.testing.assert_close(ours(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_forward_process_has_the_closed_form_mean_and_variance(schedule):
    torch.manual_seed(0)
    d = ddpm.Diffusion(100, schedule)
    x0 = torch.full((1, 1, 1, 1), 0.7)
    for t in (0, 30, 99):
        # the one-step chain x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise, run step by step
        x, a = x0.expand(200000, 1, 1, 1), torch.cat([torch.ones(1), d.alpha_bar])
        for s in range(t + 1):
            keep = a[s + 1] / a[s]
            x = keep.sqrt() * x + (1 - keep).sqrt() * torch.randn_like(x)
        jump = d.q_sample(x0.expand(200000, 1, 1, 1), torch.full((200000,), t), torch.randn(200000, 1, 1, 1))
        for y in (x, jump):
            assert y.mean().item() == pytest.approx(0.7 * a[t + 1].sqrt().item(), abs=0.01)
            assert y.var().item() == pytest.approx(1 - a[t + 1].item(), rel=0.02, abs=1e-4)


def test_schedules():
    linear, cosine = ddpm.Diffusion(500, "linear"), ddpm.Diffusion(500, "cosine")
    assert linear.alpha_bar[-1].sqrt().item() == pytest.approx(0.08, abs=0.005)  # the paper's: signal is left at T
    assert linear.alpha_bar[0].item() == pytest.approx(1 - 1e-4)
    assert cosine.alpha_bar[-1].sqrt().item() < 0.001
    for d in (linear, cosine):
        assert (d.alpha_bar.diff() < 0).all()


MEAN, STD = 0.2, 0.15


def toy(diffusion):
    """The exact prediction for data from N(MEAN, STD^2), where it is known in closed form."""
    def model(x, t):
        a = diffusion.alpha_bar[t][:, None, None, None]
        epsilon = (1 - a).sqrt() * (x - a.sqrt() * MEAN) / (a * STD ** 2 + 1 - a)
        return (epsilon - (1 - a).sqrt() * x) / a.sqrt() if diffusion.predict_v else epsilon  # v = (epsilon - sigma x) / alpha
    return model


@pytest.mark.parametrize("predict", ["epsilon", "v"])
def test_the_solver_at_eta_1_with_all_steps_is_ancestral_sampling(predict):
    d = ddpm.Diffusion(200, "cosine", predict)
    start = torch.randn(20000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    ancestral = d.ancestral(toy(d), start, torch.Generator().manual_seed(1)).flatten()
    ddim = d.solve(toy(d), start, torch.Generator().manual_seed(2), 200, order=1, eta=1.0).flatten()
    assert stats.ks_2samp(ancestral, ddim).pvalue > 1e-3
    for x in (ancestral, ddim):
        assert x.mean().item() == pytest.approx(MEAN, abs=0.01) and x.std().item() == pytest.approx(STD, rel=0.1)
    same_noise = d.solve(toy(d), start, torch.Generator().manual_seed(1), 200, order=1, eta=1.0).flatten()
    torch.testing.assert_close(same_noise, ancestral, atol=1e-3, rtol=0)


@pytest.mark.parametrize("order", [1, 2])
def test_the_solver_at_eta_0_is_deterministic_and_draws_the_data(order):
    d = ddpm.Diffusion(200, "cosine", "v")
    start = torch.randn(20000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    a = d.solve(toy(d), start, torch.Generator().manual_seed(1), 50, order)
    b = d.solve(toy(d), start, torch.Generator().manual_seed(2), 50, order)
    assert torch.equal(a, b)
    assert a.mean().item() == pytest.approx(MEAN, abs=0.01) and a.std().item() == pytest.approx(STD, rel=0.1)


def test_the_second_order_is_nearer_to_the_exact_path():
    """For Gaussian data the probability-flow ODE has a closed form: x keeps its distance from the mean in standard deviations."""
    d = ddpm.Diffusion(1000, "cosine", "v")
    start = torch.linspace(-2, 2, 41).reshape(-1, 1, 1, 1)
    a = d.alpha_bar[-1]
    exact = MEAN + STD * (start - a.sqrt() * MEAN) / (a * STD ** 2 + 1 - a).sqrt()
    errors = {(order, n): (d.solve(toy(d), start, None, n, order) - exact).abs().mean().item() for order in (1, 2) for n in (20, 40, 80)}
    assert errors[2, 20] < errors[1, 20] / 2 and errors[2, 40] < errors[1, 40] / 2
    assert errors[1, 80] < errors[1, 40] < errors[1, 20]


def test_ddpm_loss():
    d, v = ddpm.Diffusion(100, "linear", "epsilon"), ddpm.Diffusion(100, "linear", "v")
    x0, t, epsilon = torch.rand(64, 3, 8, 8) * 2 - 1, torch.randint(100, (64,)), torch.randn(64, 3, 8, 8)
    a = d.alpha_bar[t][:, None, None, None]
    truth = lambda x, t: (x - a.sqrt() * x0) / (1 - a).sqrt()
    assert d.loss(truth, x0, t, epsilon).item() < 1e-5
    assert v.loss(lambda x, t: a.sqrt() * truth(x, t) - (1 - a).sqrt() * x0, x0, t, epsilon).item() < 1e-5
    assert d.loss(lambda x, t: torch.zeros_like(x), x0, t, epsilon).item() == pytest.approx((epsilon ** 2).mean().item())
    # both are an error in x0: e of it is e alpha / sigma in epsilon, e / sigma in v; min-SNR weighs it by SNR, 5 at most
    off = 0.1 * torch.randn_like(x0)
    snr, sigma = a / (1 - a), (1 - a).sqrt()
    expected = (snr.clamp(max=5) * off ** 2).mean().item()
    assert d.loss(lambda x, t: truth(x, t) - off * a.sqrt() / sigma, x0, t, epsilon, 5.0).item() == pytest.approx(expected, rel=1e-3)
    assert v.loss(lambda x, t: a.sqrt() * truth(x, t) - sigma * x0 - off / sigma, x0, t, epsilon, 5.0).item() == pytest.approx(expected, rel=1e-3)


def test_the_learning_rate_rises_and_falls():
    args = ddpm.get_args(["--lr", "0.5", "--warmup", "10", "--device", "cpu"])
    rates = [ddpm.learning_rate(args, step / 100, step) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.05, rel=0.01) and np.argmax(rates) == 9 and rates[-1] == pytest.approx(0, abs=1e-9)
    assert rates[49] == pytest.approx(0.25)
    args.warmup = 0
    assert ddpm.learning_rate(args, 0.9, 90) == 0.5


def test_ema_is_the_weighted_mean():
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    expected = 0.9 * a.weight.detach() + 0.1 * b.weight.detach()
    ddpm.update_ema(a, b, 0.9)
    torch.testing.assert_close(a.weight.detach(), expected)


def rows(out):
    lines = (Path(out) / "log.csv").read_text().splitlines()
    return lines[0].split(","), [[float(v) for v in line.split(",")] for line in lines[1:]]


@needs_data
@pytest.mark.parametrize("script, epochs, column", [(cvae, 8, "loss"), (dcgan, 4, "d_loss"), (ddpm, 4, "loss")])
def test_losses_fall_on_real_cells(tmp_path, script, epochs, column):
    with np.load(ROOT / "bloodmnist.npz") as file:
        parts = {f"{s}_{k}": file[f"{s}_{k}"][:256 if s == "train" else 64] for s in data.SPLITS for k in ("images", "labels")}
    np.savez(tmp_path / "real.npz", **parts)
    script.main(["--data", f"{tmp_path}/real.npz", "--epochs", str(epochs), "--batch-size", "32", "--lr", "1e-3", "--out", f"{tmp_path}/out",
                 "--device", "cpu", *SMALL[script], *{cvae: [], dcgan: ["--paper", "--g-steps", "1"], ddpm: ["--timesteps", "500", "--warmup", "10"]}[script]])
    names, values = rows(tmp_path / "out")
    losses = [row[names.index(column)] for row in values]
    assert len(losses) == epochs and losses[-1] < 0.95 * losses[0]


# ---- the scripts, as a user runs them -------------------------------------------------------------------------------

@pytest.mark.parametrize("script", SCRIPTS)
def test_train_sample_and_measure(script, tmp_path, small, stem_file):
    out = tmp_path / "runs" / "a"
    common = ["--data", small, "--out", out, "--device", "cpu", *SMALL[script]]
    measure = ["--fid-runs", 2, "--fid-samples", 70, "--dims", 64, "--weights", stem_file]
    first = run(script, *common, "--epochs", 2, *measure)
    assert len([line for line in first.stdout.splitlines() if line.startswith("epoch ")]) == 2  # no terminal: a line an epoch
    names, values = rows(out)
    assert names == ["epoch", *script.LOSSES, "seconds", "images/s"] and [row[0] for row in values] == [1, 2]
    assert np.isfinite(values).all()
    saved = torch.load(out / "model.pt", weights_only=True)
    assert saved["script"] == script.MODEL and saved["epochs"] == 2 and saved["settings"]["shape"] == (3, 28, 28)

    result = json.loads((out / "fid.json").read_text())
    assert [r["seed"] for r in result["runs"]] == [100, 200]
    values = [r["fid"] for r in result["runs"]]
    assert result["fid"] == pytest.approx(np.mean(values)) and result["std"] == pytest.approx(np.std(values, ddof=1)) and result["fid"] > 0
    assert re.search(r"^FID [\d.]+ ± [\d.e-]+ \(2 runs\)$", first.stdout, re.M)
    assert result["dims"] == 64 and result["generated_images"] == 70 and result["data_sha256"] == fid.file_hash(small)
    assert result["trained"]["epochs"] == 2 and result["command"].startswith(f"python {script.MODEL}.py --data")

    # the runs again, from the file: the same figures, from the real features that were kept, even where the kept file is spoilt
    kept, = (tmp_path / "runs").glob("features-64-*.npy")
    for spoil in (lambda: None, lambda: kept.write_bytes(kept.read_bytes()[:100])):
        spoil()
        script.main([str(a) for a in (*common, "--ckpt", out / "model.pt", *measure, "--out", tmp_path / "runs" / "new")])
        measured = tmp_path / "runs" / "new" / "fid.json"
        assert [r["fid"] for r in json.loads(measured.read_text())["runs"]] == pytest.approx(values, rel=1e-6)
        measured.unlink()
    assert np.load(kept).shape == (112, 64)

    script.main(["--sample", "10", "--out", str(out), "--device", "cpu", "--seed", "5", *SMALL[script]])
    with np.load(out / "samples.npz") as file:
        drawn = file["images"]
    assert drawn.shape == (10, 28, 28, 3) and drawn.dtype == np.uint8
    with Image.open(out / "samples.png") as picture:
        assert picture.mode == "RGB" and picture.size == (8 * 29 * 3 + 3, 2 * 29 * 3 + 3)


@pytest.mark.parametrize("script", SCRIPTS)
def test_seeds_reproduce_bytes_and_a_stopped_run_goes_on_as_if_it_had_not(script, tmp_path, small, capsys):
    n = {cvae: 12, dcgan: 6, ddpm: 4}[script]  # epochs: long enough for the signal to arrive in time

    def command(out, *more):
        return ["--data", small, "--out", f"{tmp_path}/{out}", "--device", "cpu", "--dtype", "fp32", "--batch-size", "16", "--augment", *SMALL[script], *more]
    for out in ("a", "b"):
        script.main(command(out, "--epochs", str(n)))
    model = (tmp_path / "a" / "model.pt").read_bytes()
    assert model == (tmp_path / "b" / "model.pt").read_bytes()
    script.main(command("c", "--epochs", "1", "--seed", "1"))
    assert rows(tmp_path / "c")[1][0][1] != rows(tmp_path / "a")[1][0][1]

    # SIGTERM in the midst of an epoch, then --resume
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([sys.executable, "-u", HERE / f"{script.__name__}.py", *command("d", "--epochs", str(n))],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | threads)
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 143 and "--resume" in errors
    assert 7 <= torch.load(tmp_path / "d" / "ckpt.pt", weights_only=True)["step"] < 7 * n
    script.main(command("d", "--epochs", str(n), "--resume"))
    assert model == (tmp_path / "d" / "model.pt").read_bytes()
    assert [row[:-2] for row in rows(tmp_path / "d")[1]] == [row[:-2] for row in rows(tmp_path / "a")[1]]

    # a finished run has nothing left to do; more epochs go on
    script.main(command("a", "--epochs", str(n), "--resume"))
    assert model == (tmp_path / "a" / "model.pt").read_bytes() and len(rows(tmp_path / "a")[1]) == n
    script.main(command("a", "--epochs", str(n + 1), "--resume"))
    assert len(rows(tmp_path / "a")[1]) == n + 1

    # what --resume goes on from is what model.pt holds, a fitted prior included, and it is written last
    ckpt, weights = (torch.load(tmp_path / "a" / f, weights_only=True) for f in ("ckpt.pt", "model.pt"))
    for k, v in weights["weights"].items():
        assert torch.equal(ckpt["model" if script is cvae else "ema"][k], v), k
    assert (tmp_path / "a" / "ckpt.pt").stat().st_mtime_ns >= (tmp_path / "a" / "model.pt").stat().st_mtime_ns

    with pytest.raises(FileExistsError, match="--resume.*--overwrite"):
        script.main(command("a", "--epochs", str(n)))
    with pytest.raises(ValueError, match="lr .* then, 0.5 now"):
        script.main(command("a", "--epochs", str(n + 2), "--resume", "--lr", "0.5"))
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        script.main(command("new", "--resume"))


def test_samples_stream_to_the_disk(tmp_path):
    """However many are drawn, one batch is in memory at a time; the file is what numpy would have written of them all."""
    batches, alive = torch.randint(0, 256, (5, 40, 3, 28, 28), dtype=torch.uint8), []

    def stream():
        for batch in batches:
            batch = batch.clone()
            alive.append(weakref.ref(batch))
            yield batch
            del batch
            assert sum(ref() is not None for ref in alive) <= 1
    labels = torch.arange(200) % 3
    data.save_samples(tmp_path, stream(), (200, 3, 28, 28), labels)
    with np.load(tmp_path / "samples.npz") as file:
        assert np.array_equal(file["images"], batches.flatten(0, 1).permute(0, 2, 3, 1).numpy()) and np.array_equal(file["labels"], labels[:, None])
    data.save_grid(tmp_path / "expected.png", batches.flatten(0, 1), labels)
    assert (tmp_path / "samples.png").read_bytes() == (tmp_path / "expected.png").read_bytes()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["expected.png", "samples.npz", "samples.png"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_kill_in_the_midst_of_a_write_leaves_a_whole_file(tmp_path):
    path, rng = tmp_path / "ckpt.pt", np.random.default_rng(0)
    data.save(path, lambda file: file.write(bytes(1 << 17)))
    for _ in range(200):
        child = os.fork()
        if child == 0:
            for k in range(10 ** 6):
                data.save(path, lambda file: file.write(bytes([k % 256]) * (1 << 17)))
        time.sleep(rng.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert len(path.read_bytes()) == 1 << 17 and len(set(path.read_bytes())) == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_loss_that_is_not_finite_ends_the_run(script, tmp_path, small):
    with pytest.raises(ValueError, match="(nan|inf) at epoch 1, step"):
        script.main(["--data", small, "--out", str(tmp_path / "x"), "--device", "cpu", *SMALL[script], "--lr", "1e30", "--batch-size", "16", "--epochs", "9"])
    assert not (tmp_path / "x" / "model.pt").exists()


@pytest.mark.parametrize("argv, words", [
    (["--epochs", "0"], "--epochs"), (["--epochs", "many"], "many"), (["--lr", "-1"], "--lr"), (["--lr", "nan"], "--lr"), (["--batch-size", "1.5"], "1.5"),
    (["--epochs", str(10 ** 30)], "--epochs"), (["--batch-size", "0"], "--batch-size"), (["--seed", "-1"], "--seed"), (["--save-every", "0"], "--save-every"),
    (["--size", "29"], "--size"), (["--fid-runs", "-1"], "--fid-runs"), (["--fid-samples", "1"], "--fid-samples"), (["--split", "none"], "--split"),
    (["--label", "6"], "--sample"), (["--sample", str(10 ** 12)], "--sample"), (["--dtype", "fp64"], "--dtype"), (["--weights"], "--weights"),
    (["--data", "cells"], "bloodmnist"), (["--data", "vesselmnist3d"], "3-D"), (["--device", "cuda:77"], "cuda:77"), (["--device", "abacus"], "abacus"),
    (["--dims", "100"], "--dims"), (["--sample", "0"], "--sample"), (["--ckpt", "x.pt"], "--sample"), (["--frobnicate"], "frobnicate")])
def test_bad_usage_exits_with_2_before_anything_is_written(argv, words, tmp_path, capsys):
    for script in SCRIPTS:
        with pytest.raises(SystemExit) as stop:
            script.main([*argv, "--out", str(tmp_path / "out")])
        assert stop.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_the_training_is_not_one_to_draw_from(tmp_path, small):
    cvae.main(["--data", small, "--out", str(tmp_path), "--epochs", "1", "--device", "cpu"])
    with pytest.raises(ValueError, match="ckpt.pt holds no network.*model.pt"):
        cvae.main(["--ckpt", str(tmp_path / "ckpt.pt"), "--sample", "4", "--out", str(tmp_path)])


@pytest.mark.parametrize("script, argv", [(script, [flag, value]) for script, flags in {
    cvae: ("--latent-dim 0", "--latent-dim 100000", "--kl-weight -1", "--kl-weight nan", "--prior flat", "--components 0", "--decoder x", "--likelihood x"),
    dcgan: ("--latent-dim 0", "--label-smoothing 0.6", "--g-steps 0", "--r1 -1", "--start 4", "--d-norm x", "--d-lr inf_", "--ema 2", "--batch-size 1"),
    ddpm: ("--timesteps 1", "--timesteps 100000", "--steps 501", "--steps -1", "--eta 1.1", "--order 3", "--guidance -1", "--unet x", "--predict x",
           "--schedule x", "--warmup -1", "--min-snr -1", "--ema -0.1", "--compile maybe")}.items() for flag, value in (f.split() for f in flags)])
def test_wrong_values_of_each_scripts_own_flags(script, argv, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main([*argv, "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and argv[0] in error and argv[1] in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_paper_sets_the_papers_settings_and_says_so(script, capsys):
    paper, own = script.get_args(["--paper", "--device", "cpu"]), script.get_args(["--device", "cpu"])
    printed = capsys.readouterr().out
    changed = {k for k in vars(own) if vars(own)[k] != vars(paper)[k]} - {"paper"}
    assert changed == set(script.PAPER) and all(f"--{k.replace('_', '-')} {v}" in printed for k, v in script.PAPER.items())
    assert script.get_args(["--paper", "--lr", "0.25", "--device", "cpu"]).lr == 0.25  # what is given wins


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_plain_loop_trains_the_same_model(script, tmp_path, small):
    """--plain changes how fast, not what: the first epoch's losses agree but for the order of the images."""
    losses = []
    for out, more in (("a", ["--dtype", "fp32"]), ("b", ["--plain"])):
        script.main(["--data", small, "--out", str(tmp_path / out), "--device", "cpu", "--epochs", "1", "--batch-size", "16", *SMALL[script], *more])
        losses.append(rows(tmp_path / out)[1][0][1])
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    seen = [x for x, _ in data.plain_batches(data.load(small)[0], 16, torch.Generator().manual_seed(0), False, data.load(small)[1])]
    assert sorted(x.sum().item() for x in torch.cat(seen)) == sorted(x.sum().item() for x in data.load(small)[0])


def test_compile_falls_back_with_a_line_and_changes_nothing_else(capsys):
    args = ddpm.get_args(["--device", "cpu", "--compile", "on"])
    net, x = nn.Linear(4, 4), torch.randn(2, 4)
    with mock.patch.object(torch, "compile", lambda net, **kwargs: mock.Mock(side_effect=RuntimeError("no compiler\nfound"))):
        forward = ddpm.compiled(args, net, 10)
        for _ in range(2):
            assert torch.equal(forward(x), net(x))
    assert capsys.readouterr().err == "torch.compile failed (RuntimeError: no compiler); training goes on without it\n"
    with pytest.raises(RuntimeError, match="shapes"):  # an error of the network's own stays one
        forward(torch.randn(2, 5))
    args.compile = "auto"  # on a CPU it does not pay
    assert ddpm.compiled(args, net, 10 ** 6) is net


def test_a_kill_between_two_checkpoints_costs_nothing_but_time(tmp_path, small):
    """kill -9 at any moment, many times over: the files are those of a run in one go."""
    def command(out):
        return ["--data", small, "--out", f"{tmp_path}/{out}", "--device", "cpu", "--dtype", "fp32", "--batch-size", "16", "--latent-dim", "8",
                "--decoder", "transposed", "--epochs", "11", "--save-every", "1"]
    cvae.main(command("a"))
    rng, killed, threads = np.random.default_rng(0), 0, {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    while not (done := tmp_path / "b" / "ckpt.pt").exists() or torch.load(done, weights_only=True)["step"] < 11 * 7:
        assert killed < 20
        process = subprocess.Popen([sys.executable, "-u", HERE / "cvae.py", *command("b"), *(["--resume"] if done.exists() else [])],
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ | threads)
        for _ in range(rng.integers(2, 6)):  # lines of epochs
            process.stdout.readline()
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.wait()
        killed += 1
    cvae.main([*command("b"), "--resume"])
    assert killed > 2 and (tmp_path / "a" / "model.pt").read_bytes() == (tmp_path / "b" / "model.pt").read_bytes()
    assert [row[:-2] for row in rows(tmp_path / "a")[1]] == [row[:-2] for row in rows(tmp_path / "b")[1]]


def test_disks_and_folders_that_take_no_checkpoint(tmp_path, small):
    common = ["--data", small, "--device", "cpu", "--epochs", "1"]
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=str(out)):
            cvae.main([*common, "--out", str(out)])
    with mock.patch("shutil.disk_usage", return_value=mock.Mock(free=1 << 20)):
        with pytest.raises(OSError, match="1 MiB free, a checkpoint needs"):
            cvae.main([*common, "--out", str(tmp_path / "full")])
    if sys.platform == "linux":  # a disk that is full in mid-run: no file may pass 1 MB
        import resource
        cvae.main([*common, "--out", str(tmp_path / "run")])
        before = (tmp_path / "run" / "ckpt.pt").read_bytes()
        done = run(cvae, *common[:-1], "2", "--resume", "--out", tmp_path / "run", check=False, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10 ** 6, 10 ** 6)))
        one_line(done, 1, "File too large")
        assert (tmp_path / "run" / "ckpt.pt").read_bytes() == before and not list((tmp_path / "run").glob("*.tmp"))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("script", SCRIPTS)
def test_sets_of_medmnist_plus(script, channels, tmp_path, stem_file):
    """--size 64 finds MedMNIST+'s file; size and channels come from the data, up to the FID."""
    fake_set(tmp_path / "bloodmnist_64.npz", n=(24, 8, 8), size=64, channels=channels)
    small = ["--timesteps", "4", "--steps", "2", "--unet", "patches"] if script is ddpm else []
    script.main(["--root", str(tmp_path), "--size", "64", "--epochs", "1", "--device", "cpu", "--out", str(tmp_path / "out"), *small,
                 "--fid-runs", "1", "--fid-samples", "8", "--dims", "64", "--weights", stem_file])
    assert np.isfinite(json.loads((tmp_path / "out" / "fid.json").read_text())["fid"])
    script.main(["--sample", "3", "--out", str(tmp_path / "out"), "--device", "cpu", *small])
    with np.load(tmp_path / "out" / "samples.npz") as file:
        assert file["images"].shape == (3, 64, 64, channels)


def torchrun(n, *argv, **kwargs):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", f"--master_port={29500 + os.getpid() % 500}", HERE / "ddpm.py", *map(str, argv)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, **kwargs)


@pytest.mark.parametrize("n", [9, 22])
def test_processes_share_the_drawing(n):
    """Two processes' halves of each round add up to what one process draws, the last round short."""
    args = ddpm.get_args(["--device", "cpu", "--dtype", "fp32", *SMALL[ddpm]])
    args.shape = (3, 28, 28)
    torch.manual_seed(0)
    net = ddpm.build(args)
    alone = ddpm.sample(net, n, args, 7, batch_size=4)
    with mock.patch.object(ddpm, "WORLD", 2), mock.patch.object(ddpm.dist, "all_reduce"):
        halves = []
        for rank in (0, 1):
            with mock.patch.object(data, "RANK", rank):
                halves.append(ddpm.sample(net, n, args, 7, batch_size=4))
    assert (halves[0].flatten(1).any(1) != halves[1].flatten(1).any(1)).all() and torch.equal(halves[0] + halves[1], alone)


def test_two_processes_learn_what_one_learns(tmp_path, small, stem_file):
    common = ["--data", small, "--device", "cpu", "--dtype", "fp32", "--epochs", "2", "--batch-size", "16", "--classes", "--unet", "patches", "--warmup", "4",
              "--timesteps", "6", "--steps", "3", "--fid-runs", "1", "--fid-samples", "50", "--dims", "64", "--weights", stem_file]
    run(ddpm, *common, "--out", tmp_path / "one")
    process = torchrun(2, *common, "--out", tmp_path / "two")
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert out.count("epoch 2/2") == 1  # one process speaks
    one, two = (np.array(rows(tmp_path / n)[1])[:, 1] for n in ("one", "two"))
    np.testing.assert_allclose(one, two, atol=1e-4)
    a, b = (torch.load(tmp_path / n / "model.pt", weights_only=True)["weights"] for n in ("one", "two"))
    for k in a:
        torch.testing.assert_close(a[k], b[k], atol=1e-3, rtol=1e-2)
    a, b = (json.loads((tmp_path / n / "fid.json").read_text())["fid"] for n in ("one", "two"))
    assert a == pytest.approx(b, rel=0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the worker in /proc")
def test_a_dead_worker_ends_the_run_and_leaves_a_checkpoint(tmp_path, small):
    process = torchrun(2, "--data", small, "--device", "cpu", "--epochs", 1000, "--save-every", 1, "--unet", "patches", "--timesteps", 6, "--steps", 2, "--out", tmp_path)
    try:
        while "epoch 2/" not in process.stdout.readline():
            assert process.poll() is None
        workers = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and f"--out\0{tmp_path}".encode() in Path(f"/proc/{pid}/cmdline").read_bytes() and int(pid) != process.pid]
        os.kill(max(workers), signal.SIGKILL)
        _, errors = process.communicate(timeout=100)
        assert process.returncode != 0 and "Signal 9" in errors
    finally:
        process.kill()
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"] >= 1


def spoilt(raw, rng):
    """A few bytes changed, cut out, doubled or cut off."""
    raw = bytearray(raw)
    at, n = int(rng.integers(len(raw))), int(rng.integers(1, 64))
    match rng.integers(4):
        case 0:
            raw[at:at + n] = rng.integers(0, 256, n, dtype=np.uint8).tobytes()[:len(raw) - at]
        case 1:
            del raw[at:at + n]
        case 2:
            raw[at:at] = raw[at:at + n]
        case 3:
            del raw[at:]
    return bytes(raw)


def test_fuzz_of_what_is_read(tmp_path, stem_file):
    """Hundreds of spoilt copies of good files: the right contents come out, or one line that names the file."""
    good = fake_set(tmp_path / "good.npz", n=(6, 2, 2))
    images, labels = data.load(good)
    np.savez_compressed(tmp_path / "samples.npz", images=images.permute(0, 2, 3, 1).numpy())
    Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(tmp_path / "cell.png")
    args = cvae.get_args(["--latent-dim", "2", "--device", "cpu", "--sample", "1", "--ckpt", str(tmp_path / "bad.pt")])
    args.shape = (3, 28, 28)
    net = cvae.build(args)
    torch.save({"script": "cvae", "settings": cvae.settings(args), "epochs": 1.0, "weights": net.state_dict()}, tmp_path / "model.pt")

    def folder():
        return fid.read_images(tmp_path / "pictures")
    (tmp_path / "pictures").mkdir()
    Image.fromarray(images[1].permute(1, 2, 0).numpy()).save(tmp_path / "pictures" / "a.png")
    readers = {  # file: the copy that is spoilt, what reads it, whether what it gave is right
        "good.npz": ("bad.npz", lambda path: data.load(str(path)), lambda got: torch.equal(got[0], images) and torch.equal(got[1], labels)),
        "samples.npz": ("bad.npz", fid.read_images, lambda got: torch.equal(got, images)),
        "cell.png": ("pictures/b.png", lambda path: folder(), lambda got: len(got) == 2),
        "model.pt": ("bad.pt", lambda path: cvae.load(args), lambda got: all(torch.equal(a, b) for a, b in zip(got.state_dict().values(), net.state_dict().values()))),
    }
    rng, refused = np.random.default_rng(0), 0
    for name, (copy, reader, right) in readers.items():
        raw = (tmp_path / name).read_bytes()
        for _ in range(100):
            (tmp_path / copy).write_bytes(spoilt(raw, rng))
            try:
                assert right(reader(tmp_path / copy)), name
            except (ValueError, OSError) as error:
                refused += 1
                assert "\n" not in str(error) and str(tmp_path) in str(error), error
    assert refused > 200


def test_files_that_are_no_checkpoints(tmp_path, small, stem_file):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "boom"),)
    torch.save({"script": "cvae", "x": Bomb()}, tmp_path / "bomb.pt")
    (tmp_path / "noise.pt").write_bytes(os.urandom(1000))
    (tmp_path / "empty.pt").write_bytes(b"")
    dcgan.main(["--data", small, "--out", str(tmp_path / "g"), "--epochs", "1", "--device", "cpu"])
    for path in (tmp_path / "bomb.pt", tmp_path / "noise.pt", tmp_path / "empty.pt", stem_file, tmp_path, tmp_path / "g" / "model.pt", tmp_path / "no.pt"):
        with pytest.raises((ValueError, OSError), match=re.escape(str(path))) as error:
            cvae.main(["--ckpt", str(path), "--sample", "4", "--out", str(tmp_path / "out")])
        assert "\n" not in str(error.value)
    assert not (tmp_path / "boom").exists()
    one_line(run(cvae, "--sample", 4, "--ckpt", tmp_path / "no.pt", "--out", tmp_path / "nothing", check=False), 1, "no.pt; train first")
    one_line(run(cvae, "--data", "no.npz", "--out", tmp_path / "nothing", check=False), 1, "no.npz")


@pytest.mark.parametrize("script", SCRIPTS)
def test_classes(script, tmp_path, small, capsys):
    """Labels reach the network and the files: drawn in the data's proportions, or all of one class."""
    common = ["--out", str(tmp_path), "--device", "cpu"]
    script.main(["--data", small, "--epochs", "3", "--lr", "1e-3", "--batch-size", "16", "--classes", *common, *SMALL[script]])
    counts = data.load(small)[1].bincount().tolist()
    assert torch.load(tmp_path / "model.pt", weights_only=True)["settings"]["class_counts"] == counts

    def draw(*flags):
        script.main(["--sample", "160", *flags, *common, *SMALL[script]])
        with np.load(tmp_path / "samples.npz") as file:
            return file["images"], file["labels"]
    images, labels = draw()
    assert images.shape == (160, 28, 28, 3) and labels.shape == (160, 1)
    assert stats.chisquare(np.bincount(labels[:, 0], minlength=8), 160 * np.array(counts) / sum(counts)).pvalue > 1e-3
    three, labels = draw("--label", "3")
    assert (labels == 3).all() and not np.array_equal(three, draw("--label", "5")[0])
    for wrong in ("8", "neutrophil"):  # the set is a file: its classes have no names
        with pytest.raises(argparse.ArgumentTypeError, match="0 to 7"):
            draw("--label", wrong)


def test_guidance_moves_away_from_no_label():
    torch.manual_seed(0)
    net, x, t, y = ddpm.UNet(1, "patches", classes=8), torch.randn(3, 1, 28, 28), torch.arange(3), torch.tensor([1, 2, 3])
    for p in net.parameters():
        nn.init.normal_(p, 0, 0.1)
    with torch.no_grad():
        one, none = net(x, t, y), net(x, t, torch.full_like(y, 8))
        torch.testing.assert_close(ddpm.guided(net, y, 0.0)(x, t), one)
        torch.testing.assert_close(ddpm.guided(net, y, 2.0)(x, t), one + 2 * (one - none))


def test_class_names():
    assert data.class_number("6", "bloodmnist", 8) == data.class_number("neutrophil", "bloodmnist", 8) == data.class_number("Neutro", "bloodmnist", 8) == 6
    for wrong in ("8", "-1", "cat", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="basophil|0 to 7"):
            data.class_number(wrong, "bloodmnist", 8)


def test_an_epoch_pairs_images_with_their_labels():
    images, labels = torch.arange(200).reshape(-1, 1, 1, 1).expand(-1, 1, 4, 4).to(torch.uint8), torch.arange(200)
    for x, y in data.batches(images, 32, torch.Generator().manual_seed(0), True, labels):
        assert torch.equal(x[:, 0, 0, 0].long(), y)


# ---- fid.py ---------------------------------------------------------------------------------------------------------

def test_distance_closed_forms():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(50, 8))
    mu, sigma = fid.statistics(a)
    np.testing.assert_allclose(sigma, np.cov(a.T))
    assert fid.frechet_distance(mu, sigma, mu, sigma) == pytest.approx(0, abs=1e-6)
    assert fid.frechet_distance(mu, sigma, mu + 2, sigma) == pytest.approx(8 * 4)
    s, t = rng.uniform(0.1, 4, 8), rng.uniform(0.1, 4, 8)  # commuting covariances: sum (sqrt s - sqrt t)^2
    assert fid.frechet_distance(np.zeros(8), np.diag(s), np.zeros(8), np.diag(t)) == pytest.approx(((s ** 0.5 - t ** 0.5) ** 2).sum())
    assert fid.frechet_distance(1.0, 4.0, 3.0, 9.0) == pytest.approx(4 + 1)  # one dimension
    low = a[:, :2] @ rng.normal(size=(2, 8))  # singular
    assert np.isfinite(fid.frechet_distance(*fid.statistics(low), mu, sigma))
    with pytest.raises(ValueError, match="shape|go with"):
        fid.frechet_distance(mu, sigma, mu[:4], sigma)
    with pytest.raises(ValueError, match="NaN"):
        fid.frechet_distance(mu * np.nan, sigma, mu, sigma)


def test_distance_equals_pytorch_fid():
    from pytorch_fid import fid_score
    root = linalg.sqrtm
    rng = np.random.default_rng(1)
    for d in (3, 64):
        x, y = rng.normal(size=(500, d)) @ rng.normal(size=(d, d)), rng.normal(size=(400, d)) + 0.3
        ours = fid.frechet_distance(*fid.statistics(x), *fid.statistics(y))
        with mock.patch.object(fid_score.linalg, "sqrtm", lambda a, disp=False: (root(a), 0)):  # SciPy 1.18 has no disp
            theirs = fid_score.calculate_frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
        assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("dims", fid.DIMS)
def test_features_equal_pytorch_fid(dims, inception_file):
    import pytorch_fid.inception as reference
    state = torch.load(inception_file, weights_only=True)
    with mock.patch.object(reference, "load_state_dict_from_url", lambda *a, **k: state):
        net = reference.InceptionV3([reference.InceptionV3.BLOCK_INDEX_BY_DIM[dims]]).eval()
    images = torch.randint(0, 256, (10, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(dims))
    with torch.no_grad():
        theirs = net(images.float() / 255)[0].mean((2, 3)).numpy()
    ours = fid.features(images, dims, inception_file, "cpu")
    assert ours.shape == (10, dims) and ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).mean())
    layouts = images.permute(0, 2, 3, 1).numpy(), images.float() / 255, (images / 255).double().permute(0, 2, 3, 1)
    for same in layouts if dims == 64 else ():
        np.testing.assert_allclose(fid.features(same, 64, inception_file, "cpu"), ours, rtol=1e-5)


def test_imagenet_weights_pool_as_torchvision_does(inception_file):
    """--weights imagenet: torchvision's own network, given the same tensors, has the same 2048 features."""
    state = torch.load(inception_file, weights_only=True)
    net = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False).eval()
    net.load_state_dict(state)
    net.fc = nn.Identity()
    with mock.patch.object(torch.hub, "load_state_dict_from_url", lambda url, **k: state):
        images = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8)
        ours = fid.features(images, 2048, "imagenet", "cpu")
    x = nn.functional.interpolate(images.expand(-1, 3, -1, -1) / 255, size=(299, 299), mode="bilinear")
    with torch.no_grad():
        np.testing.assert_allclose(ours, net(2 * x - 1).numpy(), rtol=1e-3)


def test_named_weights_are_fetched_with_their_hash_checked():
    with mock.patch.object(torch.hub, "load_state_dict_from_url", side_effect=OSError("no route")) as fetch:
        with pytest.raises(FileNotFoundError, match="no route.*--weights"):
            fid.network(64, "fid")
    assert fetch.call_args.kwargs["check_hash"] and fetch.call_args.kwargs["weights_only"]
    assert all(re.search(r"-[0-9a-f]{8}\.pth$", url) for url in fid.URLS.values())


def test_weights_need_the_layers_up_to_the_block_and_no_more(tmp_path, inception_file):
    state = torch.load(inception_file, weights_only=True)
    stem = {k: v for k, v in state.items() if k.split(".")[0] in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3")}
    torch.save(stem, tmp_path / "stem.pth")
    assert len(fid.network(64, str(tmp_path / "stem.pth"))) == 4
    with pytest.raises(ValueError, match="Conv2d_3b_1x1.conv.weight"):
        fid.network(192, str(tmp_path / "stem.pth"))
    stem["Conv2d_2a_3x3.conv.weight"] = torch.zeros(32, 32, 5, 5)
    torch.save(stem, tmp_path / "stem.pth")
    with pytest.raises(ValueError, match="Conv2d_2a_3x3.conv.weight.*5, 5"):
        fid.network(64, str(tmp_path / "stem.pth"))
    (tmp_path / "noise.pth").write_bytes(os.urandom(500))
    with pytest.raises(ValueError, match="noise.pth"):
        fid.network(64, str(tmp_path / "noise.pth"))
    with pytest.raises(FileNotFoundError, match="none.pth"):
        fid.network(64, str(tmp_path / "none.pth"))


GOOD = np.random.default_rng(0).random((4, 3, 28, 28), np.float32)


@pytest.mark.parametrize("images, words", [
    (GOOD * 2 - 1, r"\[-1, 0.9999\], not in \[0, 1\]"), (GOOD * 255, r"\[0, 1\]"), (np.where(GOOD < 0.5, np.nan, GOOD), "nan"), (GOOD - 1e-3, r"\[0, 1\]"),
    (GOOD[:0], "0, 3, 28, 28"), (GOOD[:1], "one image"), (GOOD[:, :2], "no axis"), (GOOD[0, 0], r"\(28, 28\)"), (GOOD[:, 0], r"\(4, 28, 28\)"), (GOOD.astype(np.int64), "int64"),
    (np.zeros((4, 3, 28, 3), np.uint8), "first or last"), (GOOD > 0.5, "bool")])
def test_images_that_are_refused(images, words):
    with pytest.raises(ValueError, match=words):
        fid.features(images, 64, "never read", "cpu")


def test_too_few_images_are_warned_of(recwarn):
    with pytest.warns(UserWarning, match="5 images for 10 dimensions.*too high"):
        fid.statistics(np.random.default_rng(0).random((5, 10)))
    recwarn.clear()
    fid.statistics(np.random.default_rng(0).random((50, 10)))
    assert not recwarn
    with pytest.raises(ValueError, match="two"):
        fid.statistics(np.zeros((1, 10)))


def test_fid_command(tmp_path, small, stem_file, capsys):
    with np.load(small) as file:
        images = file["train_images"]
    np.savez(tmp_path / "samples.npz", images=255 - images[:40])
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(images[:40]):
        Image.fromarray(image).save(tmp_path / "folder" / f"{i:03}.png")
    common = ["--dims", "64", "--weights", stem_file, "--device", "cpu"]

    def printed(*argv):
        fid.main([str(a) for a in (*argv, *common)])
        return capsys.readouterr().out
    value = json.loads(printed(tmp_path / "folder", tmp_path / "samples.npz", "--json"))
    assert value["fid"] == pytest.approx(fid.fid(images[:40], 255 - images[:40], 64, stem_file, "cpu"), rel=1e-4) and value["images"] == [40, 40]

    floors = json.loads(printed(small, "--images", 40, "--cache", tmp_path, "--json"))["floors"]
    kept = fid.features(data.load(small)[0], 64, stem_file, "cpu")
    assert floors["train part (96) against test part (8)"]["fid"] == pytest.approx(fid.frechet_distance(*fid.statistics(kept[:96]), *fid.statistics(kept[104:])), rel=1e-3)
    order = np.random.default_rng(100).permutation(112)
    half = fid.frechet_distance(*fid.statistics(kept[order[:56]]), *fid.statistics(kept[order[56:]]))
    assert floors["two disjoint draws of 56"]["runs"][0] == pytest.approx(half, rel=1e-3) and len(floors["two disjoint draws of 40"]["runs"]) == 5

    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no .png"):
        printed(tmp_path / "empty", small)
    (tmp_path / "empty" / "x.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="x.png"):
        printed(tmp_path / "empty", small)
    assert re.fullmatch(r"FID [\d.]+\n", run(fid, small, tmp_path / "samples.npz", *common).stdout)
    one_line(run(fid, small, "cells", *common, check=False), 1, "cells")
    with pytest.raises(SystemExit, match="2"):
        printed(small, small, "--dims", 65)


def test_neighbours_find_copies(tmp_path, stem_file, capsys):
    real = fake_set(tmp_path / "real.npz", n=(96, 8, 100), seed=3)
    train, made = data.load(real, split="train")[0], data.load(fake_set(tmp_path / "made.npz", seed=9))[0]
    flags = [real, "--neighbours", "--dims", "64", "--weights", stem_file, "--device", "cpu", "--cache", str(tmp_path), "--json"]
    shares = []
    for images in (made[:50], torch.cat([made[:25], train[:25]])):
        np.savez(tmp_path / "a.npz", images=images.permute(0, 2, 3, 1).numpy())
        fid.main([str(tmp_path / "a.npz"), *flags])
        result = json.loads(capsys.readouterr().out)
        shares.append((result["pixel-identical to a training image"], next(v for k, v in result.items() if k.startswith("share"))))
    assert shares[0][0] == 0 and shares[0][1] < 0.2
    assert shares[1][0] == 25 and shares[1][1] >= 0.5
    with Image.open(tmp_path / "neighbours.png") as picture:
        assert picture.size == (8 * 87 + 3, 2 * 87 + 3)


def test_the_classifier_tells_labels_that_are_right_from_wrong_ones(tmp_path, stem_file, capsys):
    shades = np.random.default_rng(0).integers(0, 2, 100)
    images = np.clip(60 + 120 * shades[:, None, None, None] + np.random.default_rng(1).normal(0, 20, (100, 28, 28, 3)), 0, 255).astype(np.uint8)
    cut = {"train": slice(0, 60), "val": slice(60, 62), "test": slice(62, 100)}
    np.savez(tmp_path / "real.npz", **{f"{k}_{n}": v[c] for k, c in cut.items() for n, v in (("images", images), ("labels", shades[:, None]))})
    flags = [str(tmp_path / "real.npz"), "--classifier", "--dims", "64", "--weights", stem_file, "--device", "cpu", "--cache", str(tmp_path), "--json"]
    for labels, right in ((shades, 1.0), (1 - shades, 0.0)):
        np.savez(tmp_path / "a.npz", images=images[:20], labels=labels[:20, None])
        fid.main([str(tmp_path / "a.npz"), *flags])
        result = json.loads(capsys.readouterr().out)
        assert result["accuracy on held-out real images"]["all"] > 0.95 and result["accuracy on generated images"]["all"] == pytest.approx(right, abs=0.05)
    np.savez(tmp_path / "a.npz", images=images[:20])
    with pytest.raises(ValueError, match="no labels.*--classes"):
        fid.main([str(tmp_path / "a.npz"), *flags])
    with pytest.raises(SystemExit, match="2"):
        fid.main([str(tmp_path / "a.npz"), "--classifier"])


@needs_data
@needs_weights
def test_real_cells_are_near_each_other_and_far_from_noise():
    images, _ = data.load(root=ROOT)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    noise = torch.randint(0, 256, (50, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    a, b, c = (fid.statistics(fid.features(x, 768, os.environ["FID_WEIGHTS"])) for x in (images[order[:150]], images[order[150:300]], noise))
    near, far = fid.frechet_distance(*a, *b), fid.frechet_distance(*a, *c)
    assert near < 0.3 and far > 10 * near  # 150 images leave a bias; all of them give 0.005


# ---- bench.sh and the repository -------------------------------------------------------------------------------------------------

def test_bench_runs_the_comparison_and_does_nothing_twice(tmp_path, small, stem_file):
    settings = os.environ | dict(PYTHON=sys.executable, OUT=str(tmp_path), DATA=small, SPLIT="all", EPOCHS="1", DIMS="64", WEIGHTS=stem_file, DEVICE="cpu", FID_SAMPLES="70",
                                 CVAE="--classes", DCGAN="--classes", DDPM="--classes --unet patches --timesteps 20 --steps 4")
    first = subprocess.run(["bash", HERE / "bench.sh", "quick"], env=settings, capture_output=True, text=True, timeout=280)
    assert first.returncode == 0, first.stderr
    table = (tmp_path / "quick" / "results.md").read_text()
    for script in SCRIPTS:
        result = json.loads((tmp_path / "quick" / script.MODEL / "fid.json").read_text())
        assert re.search(rf"^\| {script.MODEL} \| 1 \| 64, .*\*\*{result['fid']:.4g} ± {result['std']:.2g}\*\* \| 2 x 70 \| sampling \(1 training\)", table, re.M)
    assert table in first.stdout
    for name, size in (("cells", (56 + 16 * 58, 4 * (2 * 58 + 6))), ("types", (16 + 20 * 58, 8 * (58 + 6)))):
        with Image.open(tmp_path / "quick" / f"{name}.png") as picture:
            assert picture.size == size
    assert (tmp_path / "quick" / "denoising.png").exists()

    (tmp_path / "quick" / "cvae" / "fid.json").unlink()  # stopped before the measuring: the training is not done again
    model = (tmp_path / "quick" / "cvae" / "model.pt").read_bytes()
    second = subprocess.run(["bash", HERE / "bench.sh", "quick"], env=settings, capture_output=True, text=True, timeout=280)
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("is finished") == 2 and "epoch 1/1" not in second.stdout
    assert model == (tmp_path / "quick" / "cvae" / "model.pt").read_bytes()


def test_the_table_joins_the_five_trainings(tmp_path):
    for seed, value in ((100, 1.0), (200, 2.0), (300, 3.0)):
        (tmp_path / f"cvae-seed{seed}").mkdir()
        (tmp_path / f"cvae-seed{seed}" / "fid.json").write_text(json.dumps({
            "runs": [{"seed": seed, "fid": value}], "trained": {"epochs": 5.0}, "dims": 768, "weights": "w.pth", "generated_images": 10000, "device": "cpu", "command": "python cvae.py"}))
    done = subprocess.run(["bash", HERE / "bench.sh", "report"], env=os.environ | dict(PYTHON=sys.executable, OUT=str(tmp_path), DATA="none.npz"), capture_output=True, text=True)
    assert "| cvae | 5 | 768, w.pth | **2 ± 1** | 3 x 10,000 | training and sampling (3 trainings) | cpu |" in done.stdout
    assert subprocess.run(["bash", HERE / "bench.sh", "nonsense"], capture_output=True).returncode == 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_fresh_clone_draws_cells(script, tmp_path, capsys):
    """With neither data nor network nor a run; of the type that is asked for; and a run of one's own goes before, --ckpt before both."""
    shipped = HERE / "checkpoints" / f"{script.MODEL}.pt"
    weights = torch.load(shipped, weights_only=True)["weights"]
    assert {v.dtype for v in weights.values() if v.is_floating_point()} == {torch.float16}
    script.main(["--sample", "8", "--label", "neutrophil", "--out", str(tmp_path / "a"), "--device", "cpu", "--root", str(tmp_path / "none")])
    assert str(shipped) in capsys.readouterr().out
    with np.load(tmp_path / "a" / "samples.npz") as file:
        assert file["images"].shape == (8, 28, 28, 3) and (file["labels"] == 6).all()
        assert file["images"].std(0).mean() > 5  # eight cells, not one
    (tmp_path / "b").mkdir()
    own = torch.load(shipped, weights_only=True) | {"epochs": 3.0}
    torch.save(own, tmp_path / "b" / "model.pt")
    script.main(["--sample", "2", "--out", str(tmp_path / "b")])
    assert "b/model.pt, 3 epochs" in capsys.readouterr().out
    script.main(["--sample", "2", "--out", str(tmp_path / "b"), "--ckpt", str(shipped)])
    assert str(shipped) in capsys.readouterr().out


def test_64_cells_of_the_shipped_ddpm_take_under_a_minute(tmp_path):
    began = time.time()
    run(ddpm, "--sample", 64, "--out", tmp_path, "--device", "cpu", env=os.environ | {"MEDMNIST_ROOT": "/nowhere"})
    assert time.time() - began < 60


def test_what_is_shipped_is_small_and_the_demo_is_a_medmnist_set(tmp_path):
    assert sum(f.stat().st_size for f in (HERE / "checkpoints").iterdir()) <= 25e6 and data.DEMO.stat().st_size <= 5e6
    images, labels = data.load("demo")
    assert images.shape == (2048, 3, 28, 28) and (labels.bincount(minlength=8) > 20).all()
    assert data.class_number("platelet", "demo", 8) == 7
    if (ROOT / "bloodmnist.npz").is_file():  # synthetic: not one is a real cell
        real = {image.numpy().tobytes() for image in data.load(root=ROOT)[0]}
        assert not any(image.numpy().tobytes() in real for image in images)
    cvae.main(["--data", "demo", "--root", str(tmp_path / "none"), "--epochs", "1", "--device", "cpu", "--out", str(tmp_path / "out"), "--decoder", "transposed"])
    assert (tmp_path / "out" / "model.pt").exists()


def test_the_plumbing_is_the_same_to_the_letter():
    parts = [(HERE / f"{s.__name__}.py").read_text().split("# ---- plumbing: the same lines in cvae.py, dcgan.py and ddpm.py ----") for s in SCRIPTS]
    assert all(len(p) == 2 for p in parts)
    assert parts[0][1] == parts[1][1] == parts[2][1]
    for head, _ in parts:
        assert not re.search(r"^(import|from) (cvae|dcgan|ddpm)", head, re.M)
        names = re.findall(r"^def (\w+)|^class (\w+)", head, re.M)
        assert [n for n, _ in names if n in ("get_args", "sample", "to_model", "build", "train")] == ["get_args", "sample", "to_model", "build", "train"]


def test_the_readme_links_to_the_lines_it_names():
    links = re.findall(r"\[`([\w.]+)`\]\((\w+\.py)#L(\d+)\)", (HERE / "README.md").read_text())
    assert len(links) > 10
    for name, file, line in links:
        assert re.search(rf"^\s*(def|class) {name.split('.')[-1]}\b", (HERE / file).read_text().splitlines()[int(line) - 1]), (name, file, line)


def test_the_readmes_figures_come_from_the_files_of_their_runs():
    readme, files = (HERE / "README.md").read_text(), sorted((HERE / "assets" / "results").glob("*.json"))
    for row in re.findall(r"^\| \w+-(?:fp32|bf16) .*?\*\*(.*?)\*\*", (HERE / "assets" / "results" / "precision.md").read_text(), re.M):
        assert f"| {row} |" in readme
    assert {"cvae", "dcgan", "ddpm", "floors"} <= {file.stem for file in files}
    for file in files:
        result = json.loads(file.read_text())
        if "floors" in result:
            for floor in result["floors"].values():
                assert f"{floor['fid']:.4g}" in readme and floor["fid"] == pytest.approx(np.mean(floor["runs"]))
        elif "rows" in result:  # of bench.sh speed
            for row in result["rows"]:
                assert f"**{row['ratio']:.3g} ± {row['spread']:.1g}**" in readme and f"{np.mean(row['this']):.4g} {row['unit']}" in readme, row["what"]
        elif "runs" in result:
            values = [r["fid"] for r in result["runs"]]
            assert result["fid"] == pytest.approx(np.mean(values)) and len(values) == 5
            assert f"{result['fid']:.4g} ± {result['std']:.2g}" in readme and result["command"] in readme, file
            if (script := HERE / f"{file.stem}.py").exists():
                assert f"{result['fid']:.4g} ± {result['std']:.2g}" in script.read_text().split('"""')[1], file
        elif "tried" in result:
            for row in result["tried"]:
                assert f"{row['fid']:.3g}" in readme and row["flags"] in readme, row
        else:  # of fid.py --neighbours and --classifier
            shown = [v["all"] for v in result.values() if isinstance(v, dict) and "all" in v] + [v for k, v in result.items() if k.startswith("share")]
            assert shown and all(f"{100 * v:.1f} %" in readme for v in shown) and result["command"] in readme, file
