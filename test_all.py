"""The tests: python -m pytest -q -n 2 test_all.py

The real data ($MEDMNIST_ROOT or ~/.medmnist) and real Inception weights ($FID_WEIGHTS, a file) are used where
they are at hand; the tests that need them are skipped elsewhere, with the reason.
"""
import functools
import hashlib
import http.server
import inspect
import io
import json
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn as nn
import torchvision
from PIL import Image
from pytest import approx, raises
from scipy import linalg, stats
from torch._subclasses.fake_tensor import FakeTensorMode

import cvae
import data
import dcgan
import ddpm
import fid
from bench import report, scarce, speed, trust

HERE = Path(__file__).parent
SCRIPTS = [cvae, dcgan, ddpm]
each_script = pytest.mark.parametrize("script", SCRIPTS)
FEW = {cvae: "", dcgan: "", ddpm: "--steps 2"}
SMALL = {cvae: "--decoder transposed --latent-dim 8", dcgan: "--width 32",
         ddpm: "--unet tiny --timesteps 3 --steps 2 --optimizer adam"}
ROOT = Path(os.environ.get("MEDMNIST_ROOT") or Path.home() / ".medmnist").expanduser()
WEIGHTS = os.environ.get("FID_WEIGHTS")
needs_data = pytest.mark.skipif(not (ROOT / "bloodmnist.npz").is_file(), reason=f"no data set in {ROOT}")
needs_weights = pytest.mark.skipif(not WEIGHTS, reason="no Inception weights; set FID_WEIGHTS to a file")
quiet = "ignore:.*the covariance is singular", "ignore:KID over", "ignore:.*images say little"
pytestmark = pytest.mark.filterwarnings(*quiet)
os.environ["OMP_NUM_THREADS"] = "1"  # the tests run side by side
torch.set_num_threads(1)


def fake_set(path, n=(96, 8, 8), size=28, channels=3, seed=0, change=()):
    """A MedMNIST file of smooth made-up blobs, so that a model has something to learn."""
    rng, found = np.random.default_rng(seed), {}
    y, x = np.mgrid[:size, :size] / size
    for split, k in zip(data.SPLITS, n, strict=True):
        centre, width = rng.uniform(0.3, 0.7, (k, 2, 1, 1)), rng.uniform(0.1, 0.3, (k, 1, 1))
        blob = np.exp(-((x - centre[:, 0]) ** 2 + (y - centre[:, 1]) ** 2) / width**2)
        images = (255 * (1 - blob[..., None] * rng.uniform(0.3, 0.9, (k, 1, 1, channels)))).astype(np.uint8)
        found[f"{split}_images"] = images if channels == 3 else images[..., 0]
        found[f"{split}_labels"] = rng.integers(0, 8, (k, 1)).astype(np.uint8)
    np.savez(path, **{k: v for k, v in (found | dict(change)).items() if v is not None})
    return str(path)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    return fake_set(tmp_path_factory.mktemp("data") / "small.npz")


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Seeded random weights of the whole network, statistics of the BatchNorm included."""
    torch.manual_seed(0)
    net = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.1)
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(net.state_dict(), path)
    return str(path)


@pytest.fixture(scope="session")
def stem_file(inception_file):
    """The layers of it that 64 features need: a file that is read, checked and hashed in no time."""
    path, state = Path(inception_file).with_name("stem.pth"), torch.load(inception_file, weights_only=True)
    stem = ("Conv2d_1a", "Conv2d_2a", "Conv2d_2b")
    torch.save({k: v for k, v in state.items() if k.startswith(stem)}, path)
    return str(path)


def words(*argv):
    """What a shell makes of a command line."""
    return " ".join(map(str, argv)).split()


def call(script, *argv):
    """The script in this process, on the CPU in fp32."""
    script.main([*words(*argv), "--device", "cpu", "--dtype", "fp32"])


def refused(said, script, *argv, code=2):
    """What a user can cause and mend: an Error of one line."""
    with raises(data.Error, match=said) as error:
        call(script, *argv)
    assert error.value.code == code and "\n" not in str(error.value), error.value


def start(script, *argv, first="", **kwargs):
    """The script as a user runs it, or with a line of Python before it."""
    run = ["-c", f"import data, {script.__name__} as script; {first}; data.command(script.main)"]
    command = [sys.executable, "-u", *(run if first else [HERE / f"{script.__name__}.py"]), *words(*argv)]
    kwargs["env"] = os.environ | {"PYTHONPATH": str(HERE)} | kwargs.pop("env", {})
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def fails(script, code, said, *argv, **kwargs):
    """A user's mistake: this exit code, no traceback, the cause in the last line. Gives what was printed."""
    process = start(script, *argv, **kwargs)
    printed, errors = process.communicate(timeout=200)
    assert process.returncode == code and "Traceback" not in errors, errors
    assert said in errors.splitlines()[-1], errors
    return printed


def log(out):
    """The names and the rows of a log.csv."""
    lines = (Path(out) / "log.csv").read_text().splitlines()
    return lines[0].split(","), [[float(v) for v in line.split(",")] for line in lines[1:]]


def measured(out):
    return json.loads((Path(out) / "fid.json").read_text())


def samples(out):
    with np.load(Path(out) / "samples.npz") as file:
        return dict(file)


def saved(path):
    return torch.load(path, weights_only=True)


def bits(*size, seed=0):
    """Random uint8 images."""
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# ---- data.py: images in ----

@pytest.mark.parametrize("channels", [1, 3])
def test_load_gives_every_split_in_order(tmp_path, channels):
    path = fake_set(tmp_path / "x.npz", n=(5, 3, 2), channels=channels)
    file, (images, labels, names) = np.load(path), data.load(path)
    assert images.dtype == torch.uint8 and images.shape == (10, channels, 28, 28)
    assert labels.dtype == torch.int64 and labels.shape == (10,)
    assert names == [str(k) for k in range(labels.max() + 1)]
    for split, part in zip(data.SPLITS, (slice(0, 5), slice(5, 8), slice(8, 10)), strict=True):
        x, y, _ = data.load(path, split=split)
        assert torch.equal(x, images[part]) and torch.equal(y, labels[part])
        raw = file[f"{split}_images"].reshape(len(x), 28, 28, channels)
        assert np.array_equal(x.permute(0, 2, 3, 1), raw) and np.array_equal(y, file[f"{split}_labels"][:, 0])


def test_load_takes_its_own_samples_and_the_names_in_them(tmp_path):
    images, labels, names = bits(6, 3, 28, 28), torch.tensor([0, 2, 2, 0, 2, 0]), ["a", "b", "c"]
    data.save_samples(tmp_path, images, labels, names)
    x, y, kinds = data.load(tmp_path / "samples.npz")
    assert torch.equal(x, images) and torch.equal(y, labels) and kinds == names
    np.savez(tmp_path / "bytes.npz", **samples(tmp_path) | {"class_names": [[b"a"], [b"b"], [b"c"]]})
    assert data.load(tmp_path / "bytes.npz")[2] == names
    with raises(data.Error, match="--split test: .*samples.npz has no parts"):
        data.load(tmp_path / "samples.npz", split="test")
    for wrong in (["a", "b"], ["a", "b", "b"]):  # too few, or one twice
        np.savez(tmp_path / "x.npz", **samples(tmp_path) | {"class_names": wrong})
        with raises(data.Error, match="class_names"):
            data.load(tmp_path / "x.npz")


def test_of_several_findings_the_first_counts_and_all_have_their_names(tmp_path):
    hot = np.zeros((4, 14), np.uint8)
    hot[1, 1:4] = hot[2, 0] = hot[3, 13] = 1
    change = {f"{s}_labels": hot[:n] for s, n in zip(data.SPLITS, (4, 1, 1), strict=True)}
    fake_set(tmp_path / "chestmnist.npz", n=(4, 1, 1), change=change)
    _, labels, names = data.load("chestmnist", tmp_path, "train")
    assert len(names) == 15
    assert [names[k] for k in labels] == ["none", "cardiomegaly", "atelectasis", "hernia"]
    os.rename(tmp_path / "chestmnist.npz", tmp_path / "own.npz")  # it may hold anything: [class, patient], ..
    with raises(data.Error, match=r"labels uint8 \(4, 14\), not .* a label below 1000 each"):
        data.load(tmp_path / "own.npz", split="train")


@needs_data
def test_load_real_data():
    images, labels, names = data.load(root=ROOT)
    assert images.shape == (17092, 3, 28, 28)
    assert labels.bincount().tolist() == [1218, 3117, 1551, 2895, 1214, 1420, 3329, 2348]
    assert names[0] == "basophil" and names[6:] == ["neutrophil", "platelet"]


def test_an_npz_needs_memory_for_one_copy_more(tmp_path):
    rng = np.random.default_rng(0)
    change = {f"{s}_images": rng.integers(0, 256, (4000, 28, 28, 3), np.uint8) for s in data.SPLITS}
    change |= {f"{s}_labels": np.zeros((4000, 1), np.uint8) for s in data.SPLITS}
    path = fake_set(tmp_path / "x.npz", (1, 1, 1), change=change)
    lines = ("import data, resource", "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss",
             f"before = peak(); data.load({path!r}); print(peak() - before)")
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=HERE, capture_output=True, text=True)
    assert int(done.stdout) * (1 if sys.platform == "darwin" else 1024) < 2.4 * 12000 * 28 * 28 * 3


def test_a_download_checks_the_md5_and_leaves_nothing_half(tmp_path):
    import medmnist

    served, root = tmp_path / "www" / "bloodmnist.npz", tmp_path / "root"
    served.parent.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=served.parent)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/bloodmnist.npz"
    with mock.patch.dict(medmnist.INFO["bloodmnist"], {"url": url}):
        with raises(data.Error, match=f"{root}/bloodmnist.npz.*{url}"):  # nothing there: 404
            data.load("bloodmnist", root)
        fake_set(served, n=(4, 2, 2))
        with raises(data.Error, match="download"):  # there, with another md5
            data.load("bloodmnist", root)
        assert not list(tmp_path.glob("root/*"))
        medmnist.INFO["bloodmnist"]["MD5"] = hashlib.md5(served.read_bytes()).hexdigest()
        assert len(data.load("bloodmnist", root)[0]) == 8
        assert [f.name for f in root.iterdir()] == ["bloodmnist.npz"]
    server.shutdown()


def test_root_is_the_argument_then_the_variable_and_only_named_sets_need_it(tmp_path, monkeypatch):
    for folder, k in (("a", 3), ("b", 5)):
        (tmp_path / folder).mkdir()
        fake_set(tmp_path / folder / "bloodmnist.npz", n=(k, 1, 1))
    monkeypatch.setenv("MEDMNIST_ROOT", str(tmp_path / "a"))
    assert len(data.load("bloodmnist")[0]) == 5
    assert len(data.load("bloodmnist", tmp_path / "b")[0]) == 7
    for variable in ("MEDMNIST_ROOT", "HOME"):  # as for a user whom the system does not know
        monkeypatch.delenv(variable)
    with mock.patch("pwd.getpwuid", side_effect=KeyError):
        assert len(data.load(str(tmp_path / "b" / "bloodmnist.npz"))[0]) == 7


SIDES = {f"{s}_images": n for s, n in zip(data.SPLITS, (96, 8, 8), strict=True)}


@pytest.mark.parametrize("change, said", [
    ({"train_images": None}, "train_images"),
    ({"train_labels": np.zeros((95, 1), np.uint8)}, r"labels uint8 .*\(95, 1\)"),
    ({"train_labels": np.zeros((95, 1), np.uint8), "val_labels": np.zeros((9, 1), np.uint8)}, "label"),
    ({"train_images": np.zeros((96, 28, 28, 3), np.float32)}, "float"),
    ({k: np.zeros((n, 28, 28, 4), np.uint8) for k, n in SIDES.items()}, "28, 4"),
    ({"train_images": np.zeros((96, 64, 64, 3), np.uint8)}, "96, 64, 64"),
    ({"train_labels": np.full((96, 1), -1)}, "label"), ({"train_labels": np.full((96, 1), 1000)}, "label"),
    ({"train_labels": np.zeros((96, 1), np.float32)}, "float"),
    ({k: np.zeros((n, 30, 30), np.uint8) for k, n in SIDES.items()}, "30, 30"),
    ({k: np.zeros((n, 28, 32), np.uint8) for k, n in SIDES.items()}, "28, 32"),
    ({k: np.zeros((0, 28, 28), np.uint8) for k in SIDES}, r"\(0, 28, 28\)"),
    ({"train_images": np.array([{}] * 96, dtype=object)}, "allow_pickle")])
def test_foreign_contents_are_named_with_what_is_wanted(tmp_path, change, said):
    path = fake_set(tmp_path / "x.npz", change=change)
    with raises(data.Error, match=said) as error:
        data.load(path)
    assert path in str(error.value) and "\n" not in str(error.value)
    assert "test_images, test_labels" in str(error.value) and "delete it" not in str(error.value)


def test_what_is_not_there_or_spoilt_or_of_another_size_is_told(tmp_path, small):
    (tmp_path / "bloodmnist.npz").write_bytes(b"half a download")
    for arguments, said in ((["bloodmist"], "bloodmist.*bloodmnist.*organsmnist"),
                            (["nowhere.npz"], "nowhere.npz"), ([small, None, "dev"], "dev.*train, val, test"),
                            (["bloodmnist", tmp_path], "not a readable MedMNIST file.*delete it"),
                            (["bloodmnist", tmp_path, "all", 32], "32.*28, 64, 128 and 224"),
                            (["demo", None, "all", 64], "64.*28 x 28"),
                            ([small, None, "all", 64], "64.*28 x 28")):
        with raises(data.Error, match=said):
            data.load(*arguments)


# ---- data.py: folders of pictures ----

def save_pictures(folder, images, suffix="png"):
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(np.asarray(image)).save(folder / f"{i:03}.{suffix}")
    return folder


def grey(value, size=(28, 28)):
    return np.full((*size, 3), value, np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Ten pictures of each of two classes, 40 x 36, whose grey tells which is which."""
    for k, name in enumerate(("lymphocyte", "neutrophil")):
        (tmp_path / "cells" / name / "deep").mkdir(parents=True)
        for i in range(10):
            image = Image.fromarray(grey(100 * k + i, (40, 36)))
            image.save(tmp_path / "cells" / name / ("deep" if i % 2 else "") / f"{i}.png")
    return tmp_path / "cells"


def greys(folder, **kwargs):
    """The greys of a folder's pictures by class: what of it is read."""
    images, labels, names = data.load(str(folder), **kwargs)
    return {name: sorted(images[labels == k, 0, 9, 9].tolist()) for k, name in enumerate(names)}


def test_a_folder_is_a_set_with_a_class_a_subfolder(folder):
    images, labels, names = data.load(str(folder))
    assert images.shape == (20, 3, 28, 28) and labels.tolist() == [0] * 10 + [1] * 10
    assert greys(folder) == {"lymphocyte": [*range(10)], "neutrophil": [*range(100, 110)]}
    assert [*greys(folder / "lymphocyte" / "deep").values()] == [[1, 3, 5, 7, 9]]  # pictures alone: one class


def test_the_split_of_a_picture_hangs_on_its_own_name(tmp_path):
    for name in "ab":
        save_pictures(tmp_path / name, map(grey, range(100)))
    parts = {s: greys(tmp_path, split=s) for s in data.SPLITS}
    for name in "ab":  # each picture in one part
        assert sorted(sum((part[name] for part in parts.values()), [])) == [*range(100)]
    for s in data.SPLITS:  # a class alone, by any path to it
        for a in tmp_path / "a", tmp_path / "b" / ".." / "a":
            assert [*greys(a, split=s).values()] == [parts[s]["a"]]
    sizes = [sum(map(len, part.values())) for part in parts.values()]
    assert stats.chisquare(sizes, [140, 20, 40]).pvalue > 1e-3
    Image.fromarray(grey(250)).save(tmp_path / "a" / "!.png")  # one that sorts before all others
    (tmp_path / "b" / "099.png").unlink()
    now = [greys(tmp_path, split=s) for s in data.SPLITS]
    for name, left in ("a", range(100)), ("b", range(99)):
        assert [[v for v in part[name] if v in left] for part in now] == [
            [v for v in part[name] if v in left] for part in parts.values()]


def test_the_split_of_a_picture_is_the_same_from_the_set_and_from_its_class(tmp_path):
    for k, patient in enumerate(("p1", "p2")):
        save_pictures(tmp_path / "cells" / "a" / patient, map(grey, range(100 * k, 100 * k + 60)))
    save_pictures(tmp_path / "elsewhere", map(grey, range(60)))
    (tmp_path / "cells" / "b").symlink_to(tmp_path / "elsewhere")
    for split in data.SPLITS:
        whole = greys(tmp_path / "cells", split=split)
        assert sorted(sum(greys(tmp_path / "cells" / "a", split=split).values(), [])) == whole["a"]
        assert [*greys(tmp_path / "cells" / "b", split=split).values()] == [whole["b"]]


@pytest.mark.parametrize("train, test", [("train", "test"), ("Training", "Testing"), ("TRAIN", "Validation")])
def test_subfolders_that_name_splits_are_splits(tmp_path, train, test):
    save_pictures(tmp_path / train / "a", [grey(1), grey(2)])
    save_pictures(tmp_path / test / "b", [grey(3)])
    part = {"Validation": "val"}.get(test, "test")
    assert greys(tmp_path, split="train") == {"a": [1, 2], "b": []}
    assert greys(tmp_path, split=part) == {"a": [], "b": [3]} and greys(tmp_path) == {"a": [1, 2], "b": [3]}
    with raises(data.Error, match="no pictures"):
        data.load(str(tmp_path), split="val" if part == "test" else "test")
    save_pictures(tmp_path / "c", [grey(4)])
    with raises(data.Error, match=f"c lies beside its splits .*{train}"):
        data.load(str(tmp_path))


def test_what_systems_and_notebooks_leave_in_a_folder_is_no_picture_and_no_class(folder):
    before, copy = greys(folder), folder / "lymphocyte" / "0.png"
    for name in (".ipynb_checkpoints/0.png", "__MACOSX/a/0.png", "lymphocyte/.ipynb_checkpoints/0-copy.png",
                 "lymphocyte/._0.png", "neutrophil/.hidden.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(copy, folder / name)
    (folder / ".git").mkdir()
    assert greys(folder) == before


def test_nothing_in_a_folder_is_dropped_or_doubled_without_a_word(folder, tmp_path, capsys):
    (tmp_path / "more").mkdir()
    Image.fromarray(grey(50)).save(tmp_path / "more" / "x.png")
    (folder / "lymphocyte" / "more").symlink_to(tmp_path / "more")  # links are followed
    (folder / "neutrophil" / "again").symlink_to(folder / "neutrophil")  # in a circle: each picture once
    (folder / "neutrophil" / "0.png").rename(folder / "neutrophil" / "0.jp2")
    (folder / "neutrophil" / "notes.txt").write_text("")
    (folder / "neutrophil" / "x.png").symlink_to(folder / "lymphocyte" / "4.png")  # in both classes
    assert greys(folder) == {"lymphocyte": [*range(10), 50], "neutrophil": [4, *range(101, 110)]}
    assert "1 .jp2, 1 .txt" in capsys.readouterr().err
    for i in range(3):
        Image.fromarray(grey(i)).save(folder / f"{i}.png")
    with raises(data.Error, match="3 pictures lie loose"):
        data.load(str(folder))
    (folder / "model.pt").write_text("")
    with raises(data.Error, match="holds a run.*samples.npz"):
        data.load(str(folder))


def test_a_folders_pictures_are_cropped_to_the_centre_square_and_resized(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (56, 80), np.uint8)
    save_pictures(tmp_path / "a", [pixels])
    images, _, _ = data.load(str(tmp_path))
    expected = Image.fromarray(pixels[:, 12:68]).resize((28, 28), Image.Resampling.BICUBIC)
    assert images.shape == (1, 1, 28, 28) and np.array_equal(images[0, 0], expected)
    assert np.array_equal(data.load(str(tmp_path), size=0)[0][0, 0], pixels)  # as they are
    save_pictures(tmp_path / "b", [pixels.T])
    with raises(data.Error, match="2 sizes, as 56 x 80 and 80 x 56; --size 28"):
        data.load(str(tmp_path), size=0)


def test_pictures_of_every_kind_are_read_right_or_refused(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9), np.uint8)
    deep, image = Image.fromarray(pixels.astype(np.uint16) * 257), Image.fromarray(pixels)
    half, turned = image.convert("RGBA"), Image.Exif()
    half.putalpha(100)
    turned[0x0112] = 6  # a camera that was held upright
    kinds = {"grey.png": image, "grey.bmp": image, "deep.png": deep, "deep.tif": deep, "gif.gif": image,
             "palette.png": image.convert("RGB").quantize(256), "opaque.png": image.convert("RGBA"),
             "turned.png": Image.fromarray(np.rot90(pixels).copy()),
             "turned-deep.png": Image.fromarray(np.rot90(pixels).astype(np.uint16) * 257),
             "alpha.png": half, "float.tif": Image.fromarray(pixels.astype(np.float32))}
    for name, picture in kinds.items():
        picture.save(tmp_path / name, **({"exif": turned} if name.startswith("turned") else {}))
    for name in [*kinds][:-2]:
        read = np.asarray(data.read_picture(tmp_path / name).convert("L"))
        assert np.abs(read.astype(int) - pixels).max() <= (1 if name == "palette.png" else 0), name
    (tmp_path / "text.png").write_text("no picture")
    image.save(tmp_path / "stack.tif", save_all=True, append_images=[image, image])
    deep.save(tmp_path / "white.tif", tiffinfo={262: 0})  # its 0 is white
    bad = "alpha.png", "float.tif", "stack.tif", "text.png", "white.tif"
    for name in bad:
        with raises(data.Error, match=name):
            data.read_picture(tmp_path / name)
    with raises(data.Error, match=".*".join(["5 of 14 pictures", *bad])):  # all are named
        data.load(str(tmp_path))
    for i in range(9):
        (tmp_path / f"a{i}.png").write_text("no picture")
    with raises(data.Error, match="14 of 23 pictures.*a0.png.*a8.png.*; and 4 more$"):  # the first ten
        data.load(str(tmp_path))


def test_12_or_14_bits_in_16_are_refused_since_they_would_be_too_dark(tmp_path):
    deep = np.random.default_rng(0).integers(3000, 4096, (3, 28, 28)).astype(np.uint16)
    save_pictures(tmp_path / "a", deep)
    with raises(data.Error, match="16-bit.* 40.. of 65535.*multiply"):
        data.load(str(tmp_path))
    Image.fromarray(np.full((28, 28), 20000, np.uint16)).save(tmp_path / "a" / "x.png")  # one that has more
    assert len(data.load(str(tmp_path))[0]) == 4


# ---- data.py: batches and labels ----

def test_what_a_laboratorys_folder_may_hold(tmp_path, capsys):
    """Read right, counted in a line or refused in one, never silently something else."""
    def cells(name, classes=("a", "b"), value=200):
        for kind in classes:
            (tmp_path / name / kind).mkdir(parents=True)
            for i in range(3):
                Image.new("L", (20, 20), value + i).save(tmp_path / name / kind / f"{i}.png")
        return tmp_path / name

    def refuses(folder, said):
        with raises(data.Error, match=said) as error:
            data.load(str(folder))
        assert "\n" not in str(error.value)

    loops = cells("loops")
    (loops / "a" / "self").symlink_to(loops / "a")
    (loops / "a" / "up").symlink_to(loops)
    os.rename(loops / "b" / "0.png", os.fsencode(loops / "b") + b"/Z\xe4hne.png")  # not UTF-8
    (loops / "labels.csv").write_text("a,b")
    images, labels, names = data.load(str(loops))
    assert labels.tolist() == [0] * 3 + [1] * 3 and names == ["a", "b"]
    assert "not read: 1 .csv" in capsys.readouterr().err
    (loops / "a" / "@eaDir" / "1.png").mkdir(parents=True)  # a NAS's thumbnails
    shutil.copy(loops / "a" / "1.png", loops / "a" / "@eaDir" / "1.png" / "SYNOPHOTO_THUMB_M.png")
    assert len(data.load(str(loops))[0]) == 6
    (loops / "c").symlink_to(tmp_path / "unmounted")
    refuses(loops, "c is a link to nothing")
    (loops / "c").unlink()
    refuses(cells("spelled", ("Cell", "cell ")), "differ in spelling only: Cell, cell ")
    refuses(cells("deep", ("a/train", "a/test")), "holds test: splits go above the classes, test/a")
    dark = cells("dark", ("a",))
    values = np.full((20, 20, 3), 4095, ">u2")
    header = struct.pack(">IIBBBBB", 20, 20, 16, 2, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in values))
    chunks = [(b"IHDR", header), (b"IDAT", body), (b"IEND", b"")]
    (dark / "a" / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(x)) + kind + x + struct.pack(">I", zlib.crc32(kind + x)) for kind, x in chunks))
    refuses(dark, "16-bit pictures is above 4095 of 65535")
    refused("run lies in .*loops, where", cvae, f"--data {loops} --out {loops / 'run'}")
    for program, flags in ((trust, f"cas samples.npz {loops} --out {loops / 'x'}"),
                           (scarce, f"rows --data {loops} --rows {loops / 'x.json'}"),
                           (scarce, f"picture --sets demo {loops} --out {loops / 'x.png'}")):
        with raises(data.Error, match="x.* lies in .*loops, where"):
            program.main(words(flags))
    one = fake_set(tmp_path / "one.npz", (1, 1, 1))
    refused("one image is too few", dcgan, f"--data {one} --split train --out {tmp_path / 'run'}")
    with raises(data.Error, match="'' is no .npz"):  # an unset variable of a shell
        cvae.main(["--data", "", "--out", str(tmp_path / "run")])


@pytest.mark.parametrize("augment", [False, True])
def test_an_epoch_visits_each_image_once_with_its_label(augment):
    labels = torch.arange(1000)
    images = torch.stack([labels % 251, labels % 7, labels // 251], 1).to(torch.uint8)

    def epoch(seed):
        torch.manual_seed(seed)
        return list(data.batches(images[..., None, None].expand(-1, 3, 28, 28), labels, 128, augment))

    seen = epoch(1)
    assert [len(x) for x, _ in seen] == [128] * 7 + [104]
    x, y = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert torch.equal(x[:, 0, 3, 4] + 251 * x[:, 2, 3, 4].long(), y) and sorted(y.tolist()) == [*range(1000)]
    again, other = (torch.cat([y for _, y in epoch(seed)]) for seed in (1, 2))
    assert torch.equal(y, again) and not torch.equal(y, other)


@pytest.mark.parametrize("n, batch_size, sizes", [
    (129, 64, [64, 65]), (128, 64, [64, 64]), (130, 64, [64, 64, 2]), (1, 64, [1]), (3, 1, [1, 1, 1])])
def test_a_last_batch_of_one_joins_the_one_before(n, batch_size, sizes):
    x = torch.zeros(n, 1, 4, 4, dtype=torch.uint8)
    seen = [len(part) for part, _ in data.batches(x, torch.zeros(n), batch_size)]
    assert seen == sizes and data.n_batches(n, batch_size) == len(sizes)


@pytest.mark.parametrize("balance, expected", [
    (0, [100, 400, 3500]), (1, [1, 1, 1]), (0.5, [10, 20, 3500**0.5])])
def test_balance_draws_a_class_of_n_images_in_proportion_to_n_to_the_1_minus_b(balance, expected):
    labels = torch.arange(3).repeat_interleave(torch.tensor([100, 400, 3500]))
    torch.manual_seed(0)
    images = torch.arange(4000, dtype=torch.int32).view(-1, 1, 1, 1)
    seen = list(data.batches(images, labels, 100, balance=balance))
    x, y = (torch.cat(parts).flatten() for parts in zip(*seen, strict=True))
    assert [len(part) for part, _ in seen] == [100] * 40 and torch.equal(y, labels[x])
    shares = 4000 * np.array(expected) / np.sum(expected)
    assert stats.chisquare(y.bincount(), shares).pvalue > 1e-3
    assert (len(x.unique()) == 4000) == (balance == 0)
    if balance:  # and within a class all alike
        assert stats.chisquare(x[y == 0].bincount(minlength=100)).pvalue > 1e-3


def test_augmentation_is_the_eight_symmetries_of_the_square():
    image = torch.arange(16, dtype=torch.uint8).reshape(1, 1, 4, 4)
    symmetries = [x.rot90(k, (2, 3)).flatten().tolist() for x in (image, image.flip(3)) for k in range(4)]
    torch.manual_seed(0)
    drawn = data.batches(image.repeat(8000, 1, 1, 1), torch.zeros(8000), 1000, True)
    forms, counts = torch.cat([x for x, _ in drawn]).flatten(1).unique(dim=0, return_counts=True)
    assert sorted(forms.tolist()) == sorted(symmetries) and stats.chisquare(counts).pvalue > 1e-3


CELLS = {"basophil": 30, "eosinophil": 70, "erythroblast": 40, "platelet": 0}


def test_labels_to_draw():
    labels = data.draw_labels(CELLS, 5000, None, np.int64(0))
    assert stats.chisquare(labels.bincount(), np.array([30, 70, 40]) * 5000 / 140).pvalue > 1e-3
    for label in (1, "1", "eosinophil", "Eos", np.uint8(1), np.array([[1]]), [1], torch.tensor(1)):
        assert data.draw_labels(CELLS, 3, label, 0).tolist() == [1, 1, 1]
    assert data.draw_labels({}, 3, None, 0) is None
    anything = "can be 0 basophil or 1 eosinophil or 2 erythroblast$"  # of the platelet there was none
    for label, said in (("e", "can be 1 eosinophil or 2 erythroblast$"), ("cat", anything), ("4", anything),
                        ("", anything), ("plate", anything), (3, anything), (-1, anything)):
        with raises(data.Error, match=said):
            data.draw_labels(CELLS, 3, label, 0)
    with raises(data.Error, match="--classes"):
        data.draw_labels({}, 3, "basophil", 0)
    folders = {"1": 9, "2": 9, "3": 9}  # an exact name goes before a number
    assert [data.draw_labels(folders, 1, label).item() for label in ("1", "2", "3", "0")] == [0, 1, 2, 0]


def test_a_label_for_each_sample_in_whatever_form_a_user_has_them():
    numbers = [2, 0, 1, 1]
    forms = [numbers, tuple(numbers), np.array(numbers, np.uint8)[:, None], np.array(numbers, np.uint64),
             ["ery", "basophil", "1", "eosinophil"], np.array(["ery", "0", "1", "eos"]),
             *(torch.tensor(numbers, dtype=t) for t in (torch.uint8, torch.int16, torch.int32, torch.int64))]
    for form in forms:
        labels = data.draw_labels(CELLS, 4, form)
        assert labels.tolist() == numbers and labels.dtype == torch.int64
    for wrong, said in ((numbers[:3], r"\(3,\)"), ([0, 1, 2, 3], "label 3"), ([0, 1, 2, -1], "label -1"),
                        ([0.0] * 4, "float"), ([[[0]] * 2] * 2, r"\(2, 2, 1\)"), ([True] * 4, "bool")):
        with raises(data.Error, match=said):
            data.draw_labels(CELLS, 4, wrong)


# ---- data.py: files out ----

@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_kill_in_the_midst_of_a_write_leaves_a_whole_file(tmp_path):
    path, rng = tmp_path / "ckpt.pt", np.random.default_rng(0)
    path.write_bytes(bytes(1 << 17))
    for _ in range(60):
        child = os.fork()
        if child == 0:
            for k in range(10**6):
                with data.atomic(path) as file:
                    file.write(bytes([k % 256]) * (1 << 17))
        time.sleep(rng.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert len(path.read_bytes()) == 1 << 17 and len(set(path.read_bytes())) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_stops_a_write_is_not_hidden(tmp_path, error):
    """torch.save turns an error in the midst of it, Ctrl-C too, into a RuntimeError of its own."""
    full = mock.Mock(write=mock.Mock(side_effect=error))
    with raises(type(error) if isinstance(error, OSError) else error), data.atomic(tmp_path / "x.pt"):
        torch.save({"a": torch.zeros(9)}, full)
    assert not list(tmp_path.iterdir())


def test_an_error_of_a_write_names_the_file_that_was_asked_for(tmp_path):
    path, denied = tmp_path / "log.csv", PermissionError(13, "Permission denied", "log.csv.123.tmp")
    with mock.patch("builtins.open", side_effect=denied), raises(OSError) as caught, data.atomic(path):
        pass
    assert caught.value.filename == str(path)


def test_a_viewer_that_holds_a_file_stops_checkpoints_alone(tmp_path, monkeypatch, capsys):
    """As on Windows: os.replace fails for as long as another program has the file open."""
    held, real, naps = [3], os.replace, []

    def replace(*paths):
        held[0] -= 1
        if held[0] >= 0:
            raise PermissionError(13, "held", str(paths[1]))
        real(*paths)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(time, "sleep", naps.append)
    for name, tries in (("ckpt.pt", 3), ("log.csv", 99)):  # for a moment; for good
        held[0] = tries
        with data.atomic(tmp_path / name) as file:
            file.write(b"new")
    assert (tmp_path / "ckpt.pt").read_bytes() == b"new" and sum(naps) <= 2
    assert "log.csv is held by another program" in capsys.readouterr().err
    held[0] = 99
    with raises(PermissionError), data.atomic(tmp_path / "ckpt.pt") as file:
        file.write(b"newer")
    assert [f.name for f in tmp_path.iterdir()] == ["ckpt.pt"]


def test_samples_and_their_grid(tmp_path):
    images, labels, names = bits(20, 3, 28, 28), torch.arange(20) % 2, ["a/b", "immature granulocyte"]
    data.save_samples(tmp_path, images, labels, names, png=True)
    file = samples(tmp_path)
    assert np.array_equal(file["images"], images.permute(0, 2, 3, 1))
    assert np.array_equal(file["labels"][:, 0], labels) and file["class_names"].tolist() == names
    for i, kind in ((4, "a-b"), (5, names[1])):
        with Image.open(tmp_path / "samples" / kind / f"{i:06}.png") as image:
            assert np.array_equal(image, file["images"][i])
    with Image.open(tmp_path / "samples.png") as grid:  # a row a class: its whole name, then its first eight
        left = grid.width - 8 * 87
        assert grid.height == 2 * 87 and left > 6 * len(names[1]) - 20
        assert np.array_equal(np.asarray(grid)[87:171:3, left:left + 84:3], file["images"][1])
        assert (np.asarray(grid)[:87, :left] < 100).any()
        assert (np.asarray(grid)[:, left - 4:left] == 255).all()
    for kept in (4, 0):  # those of an earlier call go: no mixture is left
        data.save_samples(tmp_path, images[:4], labels[:4], names, png=kept)
        assert len([*tmp_path.glob("samples/*/*.png")]) == kept
    other = save_pictures(tmp_path / "other", images[:3].permute(0, 2, 3, 1))
    (tmp_path / "samples").symlink_to(other)  # which is not ours: only the link goes
    save_pictures(tmp_path / "samples.tmp" / "a-b", images[:9].permute(0, 2, 3, 1))  # of a killed call
    data.save_samples(tmp_path, images[:4], labels[:4], names, png=True)
    assert len([*tmp_path.glob("samples/*/*.png")]) == 4 and len([*Path(other).iterdir()]) == 3
    with raises(KeyboardInterrupt), mock.patch.object(data, "save_grid", side_effect=KeyboardInterrupt):
        data.save_samples(tmp_path, images[:2], labels[:2], names)
    assert len(samples(tmp_path)["images"]) == 2 and not (tmp_path / "samples").exists()  # no mixture
    data.remove(Path(other))
    assert not list(tmp_path.glob("**/*.tmp"))
    data.save_grid(tmp_path / "two.png", {"a\nb (c)": bits(3, 1, 28, 28), "a b (d)": bits(9, 1, 28, 28)})
    with Image.open(tmp_path / "two.png") as grid:
        assert grid.size[1] == 3 * 87
    data.save_grid(tmp_path / "large.png", {"": bits(3, 1, 200, 200)})
    with Image.open(tmp_path / "large.png") as grid:
        assert grid.size == (8 * 203, 203)


def test_classes_whose_folders_would_have_one_name_stay_apart_and_are_known_again(tmp_path):
    names, labels = ["T (CD4)", "T [CD4]", "Cell", "cell", "b/c"], torch.arange(5)
    data.save_samples(tmp_path, bits(5, 3, 28, 28), labels, names, png=True)
    images, found, theirs = data.load(tmp_path / "samples")
    assert len({name.casefold() for name in theirs}) == 5
    assert pixels(trust.labelled("a", "b", names, images, found, theirs)[0]) == pixels(images)
    order = trust.labelled("a", "b", names, images, found, theirs)[1]
    assert pixels(images[order.argsort()]) == pixels(bits(5, 3, 28, 28))


def test_a_run_replaces_nothing_that_is_not_its_own(tmp_path, small, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("notes").mkdir()
    for name in ("log.csv", "samples.png"):
        (tmp_path / "notes" / name).write_text("mine")
        refused(f"notes holds {name}: --overwrite", cvae, f"--data {small} --out notes")
        (tmp_path / "notes" / name).unlink()
    save_pictures(tmp_path / "lab" / "samples" / "a", bits(9, 28, 28, 3))
    run = f"--epochs 1 {SMALL[cvae]} --overwrite"
    assert cvae.get_args(words("--ckpt pretrained --fid-runs 1 --out lab")).fid_runs  # nothing is replaced
    for flags in ("--data lab/samples", f"--data {small}", "--ckpt pretrained --sample 4"):
        refused("--out lab would replace", cvae, flags, "--out lab", run)
    assert len([*Path("lab/samples/a").iterdir()]) == 9
    call(cvae, f"--data {small} --out run {run}")
    call(cvae, "--out run --sample 9 --png")
    Path("run/samples/.DS_Store").touch()  # left by who looks at them
    call(cvae, "--out run --sample 8 --png --overwrite")
    refused("--out run would replace --data run/samples.npz", cvae, "--data run/samples.npz --out run", run)
    stop = mock.patch.object(data, "load", side_effect=KeyboardInterrupt)
    with stop, raises(KeyboardInterrupt, match="stopped$"):  # --resume would continue the run of before
        call(cvae, f"--data {small} --out run {run}")
    (tmp_path / "demo").mkdir()  # the name of a set is not that folder
    (tmp_path / "bloodmnist").mkdir()
    assert cvae.get_args(words("--data demo --out demo/a")).data == "demo"
    assert cvae.get_args(words("--ckpt pretrained --sample 2 --out bloodmnist/a")).sample == 2
    os.rename("lab/samples", "cells")  # what was learned may be called otherwise by now, or lie elsewhere
    monkeypatch.chdir(tmp_path / "cells")
    call(cvae, f"--data . --out ../b {run}")
    monkeypatch.chdir(tmp_path)
    call(cvae, "--sample 4 --out b")


# ---- data.py: what the command lines share ----

def test_a_users_mistake_is_one_line_and_a_learners_a_traceback(capsys, monkeypatch):
    def run(error):
        with raises(SystemExit) as stop:
            data.command(mock.Mock(side_effect=error))
        return stop.value.code, capsys.readouterr().err.split(": ", 1)[1]

    missing = FileNotFoundError(2, "No such file or directory", "x.npz")
    assert run(data.Error("so")) == (2, "so\n") and run(data.Error("so", 1)) == (1, "so\n")
    assert run(missing) == (1, "x.npz: No such file or directory\n")
    code, said = run(KeyboardInterrupt())
    assert code == 130 and "--resume" not in said  # where nothing is trained
    for short in (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), MemoryError(),
                  RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")):
        code, said = run(short)
        assert code == 1 and said.endswith("need less memory\n")

    for error in (ValueError("too many values to unpack"), OSError("no name"), RuntimeError("shapes")):
        with raises(type(error)):
            data.command(mock.Mock(side_effect=error))
    for lines in (9, 99999):  # `| head -1`, which has ended before the last line or before the next one
        told = start(data, first=f"script.main = lambda: print('x\\n' * {lines})")
        told.stdout.close()
        assert (told.wait(200), told.stderr.read()) == (1, "-c: stopped, since its output was closed\n")
    for name in ("stdout", "stderr"):  # a terminal without ±
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), "ascii"))
    data.command(lambda: print("0.4 ± 0.1", flush=True))
    assert sys.stdout.buffer.getvalue() == b"0.4 ? 0.1\n"


def test_dtype_auto_takes_bf16_where_it_is_faster(monkeypatch):
    asked = mock.Mock(side_effect=lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", asked)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert not data.bf16(cuda) and data.bf16(cuda, "bf16") and not data.bf16(cpu, "fp32")
    asked.side_effect = lambda including_emulation=True: True
    assert data.bf16(cuda) and not data.bf16(cuda, "fp32")
    amd, xeon = "AMD EPYC 9B45 128-Core Processor", "Intel(R) Xeon(R) Processor"
    for name, amx, avx, fast in ((amd, False, True, True), (xeon, False, True, False),
                                 (xeon, True, True, True), (amd, False, False, False)):
        cpu_has = {"cpu_name": name, "amx_bf16": amx, "avx512_bf16": avx}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=cpu_has: has, raising=False)
        assert data.bf16(cpu) is fast and data.bf16(cpu, "bf16")
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not data.bf16(cpu)
    with raises(data.Error, match="'fp16'.*auto, fp32, bf16"):
        data.bf16(cpu, "fp16")


def test_progress_is_a_line_a_minute_where_there_is_no_terminal(capsys, monkeypatch):
    assert [*data.progress(range(5), "sampling")] == [*range(5)] and capsys.readouterr().err == ""
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    for _ in data.progress(range(10), "sampling"):
        now[0] += 25
    lines = capsys.readouterr().err.split("\n")
    assert lines.pop().strip() == "" and len(lines) in (2, 3)
    assert all(re.fullmatch(r"\r?sampling: \d+ %, \d\d:\d\d left", line) for line in lines)


# ---- the models ----

@pytest.mark.parametrize("channels, size", [(3, 28), (1, 28), (3, 64)])
@each_script
def test_shapes_and_ranges_from_door_to_door(script, channels, size):
    torch.manual_seed(0)
    shape, few = (channels, size, size), {"steps": 2} if script is ddpm else {}
    net = script.Model(shape, **({"guide": True, "unet": "small"} if script is ddpm else {}))
    images, low = bits(4, channels, size, size), 0 if script is cvae else -1
    x = script.to_model(images)
    assert x.shape == images.shape and x.dtype == torch.float32
    assert torch.equal(((x - low) / (1 - low) * 255).round().to(torch.uint8), images)  # [low, 1]
    assert torch.equal(script.from_model(x.double().logit() if script is cvae else x), images)  # and back
    if script is cvae:
        mu, logvar = net.encode(x)
        assert mu.shape == logvar.shape == (4, 128) and net.decode(mu).shape == x.shape
    elif script is dcgan:
        discriminator = dcgan.Discriminator(shape)
        assert discriminator(x).shape == (4,) and net(torch.randn(4, 100)).shape == x.shape
    else:
        assert net.net(x, torch.arange(4)).shape == net.guide(x, torch.arange(4)).shape == x.shape
    drawn, again, other = (script.sample(net, 5, seed=seed, **few) for seed in (3, np.int64(3), 4))
    assert drawn.shape == (5, *shape) and drawn.dtype == torch.uint8
    assert torch.equal(drawn, again) and not torch.equal(drawn, other)


@each_script
def test_samples_are_drawn_in_batches_that_go_with_their_size(script):
    """So that drawing takes no more memory than training: 21 MB an image of 224 pixels."""
    few = {"steps": 1, "guidance": 0} if script is ddpm else {}
    for size, largest in ((28, 1000), (224, 16)):
        net, seen = script.Model((3, size, size), **({"unet": "tiny"} if few else {})), []

        def grey(x, *rest, shape=net.shape, seen=seen):
            seen.append(len(x))
            return torch.zeros(len(x), *shape)

        part = net.net if script is ddpm else net
        with mock.patch.object(part, "decode" if script is cvae else "forward", grey):
            assert script.sample(net, largest + 4, **few).shape == (largest + 4, 3, size, size)
            assert len(seen) > 1 and max(seen) <= largest and sum(seen) == largest + 4
            seen.clear()
            with mock.patch.object(data, "progress", side_effect=data.progress) as shown:
                script.sample(net, 5, batch=2, **few)
            assert seen == [2, 2, 1] and shown.call_args[0] == (range(0, 5, 2), "sampling")


MISSPELT = [
    (lambda: ddpm.Diffusion(schedule="sigmoyd"), "linear, cosine"),
    (lambda: ddpm.DDPM(predict="x0"), "v, epsilon"), (lambda: ddpm.DDPM(unet="smal"), "small, tiny"),
    (lambda: cvae.VAE(decoder="res"), "residual, transposed"),
    (lambda: cvae.negative_log_likelihood(torch.ones(1), torch.ones(1), "gauss"), "gaussian, bernoulli"),
    (lambda: cvae.sample(cvae.VAE(latent_dim=2), 1, prior="fit"), "fitted, normal"),
    (lambda: cvae.sample(cvae.VAE(latent_dim=2), 1, dtype="fp16"), "auto, fp32, bf16"),
    (lambda: dcgan.Discriminator(norm="batchnorm"), "spectral, batch"),
    (lambda: dcgan.Generator(start=5), "3, 7"),
    (lambda: fid.network(100), "64, 192, 768, 2048")]


@pytest.mark.parametrize("made, choices", MISSPELT)
def test_a_misspelt_choice_is_an_error_that_lists_the_choices(made, choices):
    with raises(data.Error, match=f"'?(sigmoyd|x0|smal|res|gauss|fit|fp16|batchnorm|5|100)'?: .*{choices}"):
        made()


@each_script
def test_samplers_have_the_flags_defaults_and_the_same_first_arguments(script):
    parameters = inspect.signature(script.sample).parameters
    assert [*parameters] == ["model", "n", "label", "seed", "dtype", *script.SAMPLER, "batch"]
    args = script.get_args(["--device", "cpu", "--overwrite"])
    for k in script.SAMPLER:
        assert parameters[k].default == getattr(args, k), k


def test_every_tensor_is_on_the_models_device():
    """On a made-up GPU, which knows shapes and devices only."""
    generator = mock.Mock()
    generator.return_value.manual_seed.return_value = None
    for script in SCRIPTS:
        with FakeTensorMode(), mock.patch.object(torch, "Generator", generator):
            with torch.device("cuda"):
                net = script.Model(classes={"a": 3, "b": 5}, **({"guide": True} if script is ddpm else {}))
                d = dcgan.Discriminator(classes={"a": 3, "b": 5})
                x = script.to_model(torch.zeros(4, 3, 28, 28, dtype=torch.uint8))
                y, t = torch.zeros(4, dtype=torch.long), torch.randint(500, (4,))
            if script is cvae:
                loss = cvae.objective(net, x, y)[0]
            elif script is dcgan:
                drawn = net(torch.randn(4, 100, device="cuda"), y)
                loss = dcgan.discriminator_loss(d(dcgan.diffaugment(x), y), d(dcgan.diffaugment(drawn), y))
            else:
                loss = net.diffusion.loss(net.net, x, t, torch.randn_like(x), y)
            assert loss.device.type == "cuda"
            few = {"steps": 3} if script is ddpm else {}
            assert script.sample(net, 5, **few).shape == (5, 3, 28, 28)


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
    ours, widths = cvae.negative_log_likelihood(logits, x, "gaussian"), torch.linspace(0.05, 1, 2000)
    normal = torch.distributions.Normal
    theirs = torch.stack([-normal(logits.sigmoid(), s).log_prob(x).sum() / 5 for s in widths])
    assert ours.item() == approx(theirs.min().item(), rel=1e-4) and (ours <= theirs + 1e-2).all()
    black = torch.zeros(5, 3, 28, 28)  # which a decoder can have exactly: no narrower than rounding to uint8
    ours = cvae.negative_log_likelihood(black - 99, black, "gaussian")
    rounding = torch.tensor(stats.uniform(0, 1 / 255).std())
    torch.testing.assert_close(ours, -normal(0.0, rounding).log_prob(black).sum() / 5 + 3 * 28 * 28 / 2)


def test_the_fitted_prior_draws_codes_like_those_of_the_data():
    """Codes of two classes far from N(0, I), a covariance each; that of a class of one cell is regular."""
    torch.manual_seed(0)
    model = cvae.VAE((1, 28, 28), {"a": 500, "b": 500, "c": 1}, latent_dim=3)
    images, labels = torch.zeros(1001, 1, 28, 28, dtype=torch.uint8), torch.arange(1001) % 2
    labels[1000] = 2
    centre, spread = torch.tensor([[9.0, 0, 0], [0, -9.0, 0], [5.0, 5, 5]]), torch.randn(3, 3, 3)
    codes = centre[labels] + (spread[labels] @ torch.randn(1001, 3, 1))[..., 0]
    parts, drawn = iter(codes.split(1000)), []
    model.encode = lambda x, y: (next(parts), torch.full((len(x), 3), -9.0))
    cvae.fit_prior(model, images, labels)
    model.decode = lambda z, y: drawn.append(z) or torch.zeros(len(z), 1, 28, 28)
    cvae.sample(model, 9000, torch.arange(9000) % 3)
    z = torch.cat(drawn)
    for k in range(3):
        torch.testing.assert_close(z[k::3].mean(0), codes[labels == k].mean(0), atol=0.5, rtol=0)
        if k < 2:
            torch.testing.assert_close(z[k::3].T.cov(), spread[k] @ spread[k].T, atol=1.0, rtol=0.2)


def test_gan_losses_are_the_papers():
    real, fake = torch.randn(64), torch.randn(64)
    p, q = real.sigmoid(), fake.sigmoid()
    torch.testing.assert_close(dcgan.discriminator_loss(real, fake), -(p.log() + (1 - q).log()).mean())
    smooth = -(0.9 * p.log() + 0.1 * (1 - p).log()).mean() - (0.1 * q.log() + 0.9 * (1 - q).log()).mean()
    torch.testing.assert_close(dcgan.discriminator_loss(real, fake, smoothing=0.1), smooth)
    torch.testing.assert_close(dcgan.generator_loss(fake), -q.log().mean())
    odds = (real.double() - fake).exp()  # that of the two the real one is the more real
    relativistic = dcgan.discriminator_loss(real, fake, True), dcgan.generator_loss(fake, real)
    expected = (1 + 1 / odds).log().mean().float(), (1 + odds).log().mean().float()
    torch.testing.assert_close(relativistic, expected)


def test_diffaugment_moves_cuts_and_recolours_and_passes_gradients():
    torch.manual_seed(0)
    x = torch.rand(4000, 3, 28, 28, requires_grad=True)
    y = dcgan.diffaugment(x)
    dark = (y == 0).all(1).float().mean((1, 2))
    # what moving by up to 3 and a hole of 14 x 14, centred anywhere, leave black on average
    kept = np.mean([(28 - abs(a)) / 28 for a in range(-3, 4)]) ** 2
    hole = np.mean([np.mean(np.abs(np.arange(28) - c) < 7) for c in np.linspace(0, 28, 1000)]) ** 2
    assert dark.mean().item() == approx(1 - kept * (1 - hole), abs=0.02)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert (gradient != 0).any((1, 2, 3)).all()
    flat = dcgan.diffaugment(torch.full((4000, 3, 28, 28), 0.2))  # one grey: brightness alone changes it
    shades = flat.amax((1, 2, 3)) - 0.2
    assert stats.kstest(shades[shades > -0.2], stats.uniform(-0.2, 0.7).cdf).pvalue > 1e-3  # U(-0.5, 0.5)


def test_spectral_norm_bounds_each_layer():
    net = dcgan.Discriminator(classes=range(8))
    for _ in range(50):
        net(torch.randn(8, 3, 28, 28), torch.arange(8))
    layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.Embedding))]
    norms = [torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2).item() for layer in layers]
    assert norms == approx([1] * 6, abs=0.05)


def test_paper_sized_networks():
    """The paper's deeper U-Net has 7.76 M parameters and 0.85 GFLOP; this is its sibling, no copy."""
    from torch.utils.flop_counter import FlopCounterMode

    net = ddpm.UNet((3, 28, 28), 0, "deeper", False, False)
    with FlopCounterMode(display=False) as counter:
        net(torch.randn(1, 3, 28, 28), torch.zeros(1))
    assert 7e6 < sum(p.numel() for p in net.parameters()) < 9e6 and 0.8e9 < counter.get_total_flops() < 1.1e9


@pytest.mark.parametrize("power", [1, 1.5, 3])
def test_timesteps_are_drawn_in_proportion_to_a_power(power):
    torch.manual_seed(0)
    expected = np.diff((np.arange(11) / 10) ** (1 / power))  # P(t < k) = P(u < (k / T)^(1 / power))
    for n, every in (400000, 1), (20, 1), (20, 4):  # in one batch; over many; of each the guide's quarter
        t = torch.cat([ddpm.draw_timesteps(n, 10, power)[::every] for _ in range(every * 400000 // n)])
        np.testing.assert_allclose(t.bincount(minlength=10) / len(t), expected, atol=0.003)
    bounds = 10**6 * (torch.arange(101) / 100) ** power
    t = ddpm.draw_timesteps(100, 10**6, power).sort().values  # u: one from each hundredth
    assert ((t > bounds[:-1] - 2) & (t < bounds[1:] + 2)).all()
    with mock.patch.object(torch, "rand", lambda n, **kw: torch.full((n,), 1 - 2 ** -24)):
        assert ddpm.draw_timesteps(2, 10000, power).max() == 9999


def test_a_training_draws_its_timesteps_by_the_power(tmp_path, small):
    powers, draw = [], ddpm.draw_timesteps
    with mock.patch.object(ddpm, "draw_timesteps", lambda n, T, p, d: powers.append(p) or draw(n, T, p, d)):
        for power in (1, 1.5):
            call(ddpm, f"--data {small} --split val --epochs 1 --batch-size 8 --t-power {power} "
                       f"--out {tmp_path / str(power)} {SMALL[ddpm]}")
    assert powers == [1, 1.5]


def test_the_guide_is_small_and_of_the_kind_of_its_network():
    assert {net["patch"] for net in ddpm.UNETS.values()} == {*ddpm.GUIDES}
    for patch, name in ddpm.GUIDES.items():
        guide = ddpm.UNETS[name]
        for net in ddpm.UNETS.values():
            if net["patch"] == patch:
                assert guide["patch"] == patch and bool(guide["full"]) == bool(net["full"])
                assert max(guide["widths"]) <= min(net["widths"][-2:])


def test_a_guide_by_name_and_of_a_file_from_before(tmp_path, small):
    run = f"--data {small} --split val --epochs 1 --batch-size 64 --steps 2 --out"
    call(ddpm, run, tmp_path / "new", "--unet tiny-pixels --timesteps 3")
    file = saved(tmp_path / "new" / "model.pt")
    assert file["model_args"]["guide"] == "tiny-pixels" and "guide.last.1.weight" not in file["weights"]
    torch.manual_seed(0)
    model = ddpm.DDPM(unet="tiny-pixels", guide=True, timesteps=3)  # then every guide was on patches
    old = {k: v for k, v in model.model_args.items() if k != "qk_norm"} | {"guide": True}
    path = tmp_path / "old.pt"
    torch.save(file | {"model_args": old, "weights": model.state_dict()}, path)
    images = ddpm.sample(ddpm.load(path, "cpu"), 2, steps=2)
    assert torch.equal(images, ddpm.sample(model, 2, steps=2)) and ddpm.load(path, "cpu").guide.patch == 2
    call(ddpm, run, tmp_path / "on", f"--init {path}")
    args = saved(tmp_path / "on" / "model.pt")["model_args"]
    assert (args["unet"], args["guide"], args["qk_norm"]) == ("tiny-pixels", "tiny-pixels", False)


def test_the_guide_learns_from_a_quarter_of_each_batch(tmp_path, small):
    loss, seen = ddpm.Diffusion.loss, []

    def watched(self, network, x0, t, epsilon, y):
        seen.append([network.stem.weight.shape[0]] + [z.clone() for z in (x0, t, epsilon, y)])
        return loss(self, network, x0, t, epsilon, y)

    with mock.patch.object(ddpm.Diffusion, "loss", watched):
        call(ddpm, f"--data {small} --split train --classes --epochs 1 --unet small --batch-size 10 "
                   f"--optimizer adam --timesteps 9 --steps 2 --out {tmp_path}")
    pairs = list(zip(seen, seen[1:], strict=False))
    pairs = [(a, b) for a, b in pairs if (a[0], b[0]) == (64, 16)]
    assert len(pairs) > 1
    for whole, quarter in pairs:
        assert len(quarter[1]) == (len(whole[1]) + 3) // 4
        for a, b in zip(whole[1:], quarter[1:], strict=True):
            assert torch.equal(a[::4], b)


def test_blocks_in_a_row():
    torch.manual_seed(0)
    two, one = ddpm.Block(8, 16, depth=2), ddpm.Block(8, 16)
    one.load_state_dict({k: v for k, v in two.state_dict().items() if not k.startswith("next.")})
    x, c = torch.randn(2, 8, 6, 6), torch.randn(2, ddpm.EMBED)
    torch.testing.assert_close(two(x, c), two.next(one(x, c), c))
    for unet, n in {"small": 5, "overnight": 14}.items():  # two or three ways down, the middle, as many up
        net = ddpm.UNet((3, 28, 28), 8, unet, True, True)
        assert sum(isinstance(m, ddpm.Block) for m in net.modules()) == n
        out = net(torch.randn(2, 3, 28, 28), torch.arange(2), torch.arange(2))
        assert out.shape == (2, 3, 28, 28) and out[0, :, 0, 0].abs().max() < 0.2  # about 0


def test_attention_is_that_of_torch():
    torch.manual_seed(0)
    ours, theirs = ddpm.Attention(128, False), nn.MultiheadAttention(128, 2, batch_first=True)
    nn.init.normal_(ours.out.weight)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight[:, :, 0, 0])
        theirs.in_proj_bias.copy_(ours.qkv.bias)
        theirs.out_proj.weight.copy_(ours.out.weight[:, :, 0, 0])
        theirs.out_proj.bias.copy_(ours.out.bias)
        x = torch.randn(3, 128, 7, 7)
        tokens = ours.norm(x).flatten(2).transpose(1, 2)
        expected = x + theirs(tokens, tokens, tokens)[0].transpose(1, 2).reshape(x.shape)
        torch.testing.assert_close(ours(x), expected, atol=1e-4, rtol=1e-4)


def test_normalised_queries_and_keys():
    torch.manual_seed(0)
    x, plain, ours = torch.randn(3, 128, 7, 7), ddpm.Attention(128, False), ddpm.Attention(128)
    for one in (plain, ours):
        one.load_state_dict(plain.state_dict() | {"out.weight": torch.eye(128)[:, :, None, None]})
    q, k, v = (z.unflatten(1, (2, 64)) for z in ours.qkv(ours.norm(x)).flatten(2).chunk(3, 1))
    q, k = (z / z.square().sum(2, keepdim=True).sqrt() for z in (q, k))
    weights = (8 * torch.einsum("bhci,bhcj->bhij", q, k)).softmax(-1)  # 8 * 8 / sqrt(64) times the cosine
    expected = x + torch.einsum("bhij,bhcj->bhci", weights, v).reshape(x.shape) + ours.out.bias[:, None, None]
    torch.testing.assert_close(ours(x), expected)
    before = [one(x) for one in (plain, ours)]
    with torch.no_grad():  # ten times the queries and keys: nothing changes
        for one in (plain, ours):
            one.qkv.weight[:256] *= 10
            one.qkv.bias[:256] *= 10
    torch.testing.assert_close(ours(x), before[1])
    assert (plain(x) - before[0]).abs().max() > 0.1


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_forward_process_has_the_closed_form_mean_and_variance(schedule):
    torch.manual_seed(0)
    d = ddpm.Diffusion(100, schedule)
    x0, a = torch.full((100000, 1, 1, 1), 0.7), torch.cat([torch.ones(1), d.alpha_bar])
    for t in (0, 30, 99):
        x = x0  # the one-step chain x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise, run step by step
        for s in range(t + 1):
            keep = a[s + 1] / a[s]
            x = keep.sqrt() * x + (1 - keep).sqrt() * torch.randn_like(x)
        for y in (x, d.q_sample(x0, torch.full((len(x0),), t), torch.randn_like(x0))):
            assert y.mean().item() == approx(0.7 * a[t + 1].sqrt().item(), abs=0.015)
            assert y.var().item() == approx(1 - a[t + 1].item(), rel=0.02, abs=1e-4)


def test_schedules():
    linear, cosine = ddpm.Diffusion(500, "linear"), ddpm.Diffusion(500, "cosine")
    assert linear.alpha_bar[-1].sqrt().item() == approx(0.08, abs=0.005)  # the paper's: signal is left at T
    assert linear.alpha_bar[0].item() == approx(1 - 1e-4) and cosine.alpha_bar[-1].sqrt().item() < 0.001
    assert all((d.alpha_bar.diff() < 0).all() for d in (linear, cosine))


MEAN, STD = 0.2, 0.15


def toy(diffusion):
    """The exact prediction for data from N(MEAN, STD^2), where it is known in closed form."""
    def model(x, t):
        a = diffusion.alpha_bar[t][:, None, None, None]
        epsilon = (1 - a).sqrt() * (x - a.sqrt() * MEAN) / (a * STD**2 + 1 - a)
        return (epsilon - (1 - a).sqrt() * x) / a.sqrt() if diffusion.predict_v else epsilon
    return model


def ancestral(d, model, x, generator):
    """Ho et al. 2020, algorithm 2, by eq. 6 and 7: every step a draw from q(x_{t-1} | x_t, x_0)."""
    a = torch.cat([torch.ones(1), d.alpha_bar])
    for t in range(d.T, 0, -1):
        x0, beta = d.predict_x0(model, x, t - 1), 1 - a[t] / a[t - 1]
        mean = a[t - 1].sqrt() * beta / (1 - a[t]) * x0 + (1 - beta).sqrt() * (1 - a[t - 1]) / (1 - a[t]) * x
        noise = torch.randn(x.shape, generator=generator)
        x = mean + (beta * (1 - a[t - 1]) / (1 - a[t])).sqrt() * noise
    return x


@pytest.mark.parametrize("predict", ["epsilon", "v"])
def test_the_solver_at_eta_1_with_all_steps_is_ancestral_sampling(predict):
    d = ddpm.Diffusion(200, "cosine", predict)
    first, second, third = (torch.Generator().manual_seed(seed) for seed in (1, 1, 2))
    noise = torch.randn(20000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    expected = ancestral(d, toy(d), noise, first)
    drawn, other = (d.solve(toy(d), noise, generator, 200, eta=1.0) for generator in (second, third))
    torch.testing.assert_close(drawn, expected, atol=1e-3, rtol=0)
    assert stats.ks_2samp(drawn.flatten(), other.flatten()).pvalue > 1e-3
    assert drawn.mean().item() == approx(MEAN, abs=0.01) and drawn.std().item() == approx(STD, rel=0.1)


@pytest.mark.parametrize("steps", [2, 50, 499, 500])
def test_the_solver_goes_from_noise_to_image_in_ever_smaller_steps(steps):
    seen, d = [], ddpm.Diffusion(500)
    noise = torch.zeros(1, 1, 1, 1)
    d.solve(lambda x, t: seen.append(t[0].item()) or torch.zeros_like(x), noise, None, steps, eta=0)
    gaps = -np.diff(seen)
    assert (len(seen), seen[0], seen[-1]) == (steps, 499, 0) and gaps.min() >= 1
    assert (np.diff(gaps) <= 1).all()  # but for rounding


def test_the_solver_at_eta_0_is_deterministic_and_follows_the_exact_path():
    """For Gaussian data the path is known: x keeps its distance from the mean in standard deviations."""
    d = ddpm.Diffusion(1000, "cosine", "v")
    noise = torch.linspace(-2, 2, 41).reshape(-1, 1, 1, 1)
    a = d.alpha_bar[-1]
    exact = MEAN + STD * (noise - a.sqrt() * MEAN) / (a * STD**2 + 1 - a).sqrt()
    errors = [(d.solve(toy(d), noise, None, n, eta=0.0) - exact).abs().mean().item() for n in (10, 40, 160)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 0.01
    assert d.solve(toy(d), noise, None, 1, eta=0.0).isfinite().all()


def test_ddpm_loss_is_0_for_the_truth_alone():
    d, v = ddpm.Diffusion(100, "linear", "epsilon"), ddpm.Diffusion(100, "linear", "v")
    x0, t, epsilon = torch.rand(64, 3, 8, 8) * 2 - 1, torch.randint(100, (64,)), torch.randn(64, 3, 8, 8)
    a = d.alpha_bar[t][:, None, None, None]

    def truth(x, t):
        return (x - a.sqrt() * x0) / (1 - a).sqrt()

    assert d.loss(truth, x0, t, epsilon).item() < 1e-5
    assert v.loss(lambda x, t: a.sqrt() * truth(x, t) - (1 - a).sqrt() * x0, x0, t, epsilon).item() < 1e-5
    nothing = d.loss(lambda x, t: torch.zeros_like(x), x0, t, epsilon).item()
    assert nothing == approx((epsilon**2).mean().item())


def test_the_learning_rate_rises_and_falls():
    rates = [ddpm.lr_scale(step, 200, "cosine") for step in range(1, 201)]
    assert rates[0] == approx(0.1, rel=0.01) and np.argmax(rates) == 9 and rates[99] == approx(0.5)
    assert rates[-1] == approx(0, abs=1e-9) and ddpm.lr_scale(90, 100, "none") == 1
    assert np.argmax([ddpm.lr_scale(s, 10**5, "cosine") for s in range(1, 1000)]) == 499


def test_muon_makes_every_direction_count_alike():
    """An update is the momentum with singular values of about 1: nearly the U V^T of its SVD."""
    torch.manual_seed(0)
    shapes = (20, 50), (50, 20), (16, 8, 3, 3), (20, 4, 3, 3)
    params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    muon, momenta = ddpm.Muon(params, lr=0.5), [torch.zeros_like(p) for p in params]
    for _ in range(3):
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.randn_like(p)
        muon.step()
        for p, old, momentum in zip(params, before, momenta, strict=True):
            momentum.mul_(0.95).add_(p.grad)
            matrix = (p.grad + 0.95 * momentum).flatten(1)  # Nesterov
            u, _, v = torch.linalg.svd(matrix, full_matrices=False)
            update = (old - p.detach()).flatten(1) / 0.5 / max(1, len(matrix) / matrix.shape[1]) ** 0.5
            singular = torch.linalg.svdvals(update)
            assert 0.6 < singular.min() and singular.max() < 1.3  # the quintic iteration goes no nearer
            assert (update * (u @ v)).sum() / update.norm() / (u @ v).norm() > 0.98


def test_ema_is_the_weighted_mean():
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    expected = 0.9 * a.weight.detach() + 0.1 * b.weight.detach()
    ddpm.update_ema(a, b, 0.9)
    torch.testing.assert_close(a.weight.detach(), expected)


def test_guidance_moves_away_from_what_the_guide_says():
    torch.manual_seed(0)
    model = ddpm.DDPM((1, 28, 28), dict.fromkeys("abcdefgh", 1), "small", guide=True)
    x, t, y = torch.randn(3, 1, 28, 28), torch.arange(3), torch.tensor([1, 2, 3])
    for p in model.parameters():
        nn.init.normal_(p, 0, 0.1)
    with torch.no_grad():
        strong, weak = model.net(x, t, y), model.guide(x, t, y)
        torch.testing.assert_close(ddpm.guided(model, y, 0.0)(x, t), strong)
        torch.testing.assert_close(ddpm.guided(model, y, 2.0)(x, t), strong + 2 * (strong - weak))
        model.guide = None
        torch.testing.assert_close(ddpm.guided(model, y, 0.0)(x, t), strong)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_attention_compiles_on_a_cpu():
    attention, x = ddpm.Attention(64), torch.randn(2, 64, 4, 4, requires_grad=True)
    nn.init.normal_(attention.out.weight)
    compiled = torch.compile(attention)(x)
    torch.testing.assert_close(compiled, attention(x))
    compiled.sum().backward()


@needs_data
@pytest.mark.parametrize("script, n, epochs, column, own", [
    (cvae, 256, 5, "loss", ""), (dcgan, 384, 4, "d_loss", "--paper --g-steps 1 --width 128"),
    (ddpm, 96, 3, "loss", "--timesteps 500")])
def test_losses_fall_on_real_cells(tmp_path, script, n, epochs, column, own):
    with np.load(ROOT / "bloodmnist.npz") as file:
        np.savez(tmp_path / "real.npz", **{k: file[k][: n if "train" in k else 8] for k in file})
    common = f"--data {tmp_path / 'real.npz'} --batch-size 16 --lr 1e-3 --out {tmp_path / 'out'}"
    call(script, common, f"--epochs {epochs} {SMALL[script]} {own}")
    names, rows = log(tmp_path / "out")
    losses = [row[names.index(column)] for row in rows]
    assert len(losses) == epochs and losses[-1] < 0.95 * losses[0]


# ---- the scripts, as a user runs them ----

@each_script
def test_train_measure_and_draw(script, tmp_path, small, stem_file, capsys):
    out, other = tmp_path / "runs" / "a", tmp_path / "runs" / "b"
    measure = f"--fid-runs 2 --fid-samples 20 --dims 64 --weights {stem_file}"
    run = words(f"--data {small} --epochs 2 --out {out} --classes --balance 1 {SMALL[script]} {measure}")
    call(script, *run)
    text, (images, labels, kinds) = capsys.readouterr().out, data.load(small)
    counts = labels.bincount().tolist()
    listed = ", ".join(f"{name} {count}" for name, count in zip(kinds, counts, strict=True))
    assert f"112 images of [3, 28, 28]; 8 classes: {listed}\n" in text
    steps = 2 if script is dcgan else 1
    assert re.search(rf"\d M parameters; cpu, fp32; {steps} steps an epoch, {2 * steps} in all; 0 of 2", text)
    names, rows = log(out)
    assert names == ["epoch", *script.LOSSES, "seconds", "images/s"] and [row[0] for row in rows] == [1, 2]
    assert np.isfinite(rows).all() and len(re.findall(r"\nepoch \d .* \d+ minutes left", text)) == 2
    model, result = saved(out / "model.pt"), measured(out)
    assert model["script"] == script.NAME and model["trained"]["epochs"] == 2
    assert model["trained"]["of"] == data.describe(images, labels, kinds)
    assert model["trained"]["on"] == "cpu (1 threads)"
    assert [*model["model_args"]["classes"].values()] == counts  # whatever --balance: it draws as in the data
    values = [r["fid"] for r in result["runs"]]
    assert [r["seed"] for r in result["runs"]] == [100, 200] and result["images"] == result["others"] == 20
    assert result["drawn"]["fid"]["mean"] == approx(np.mean(values))
    assert result["drawn"]["fid"]["std"] == approx(np.std(values, ddof=1))
    assert result["floor"]["fid"]["mean"] < result["drawn"]["fid"]["mean"]
    for said in (f"drawn: fid {result['drawn']['fid']['text']}  kid", "floor: fid", f"against {small}, all",
                 "64 features, weights stem.pth"):
        assert said in text
    assert result["data"] == small and result["size"] == 28
    run += words("--device cpu --dtype fp32")
    assert shlex.split(result["command"]) == ["python", f"{script.NAME}.py", *run]

    # measured again, from the file: the same, even where the kept features are spoilt
    (kept,) = (tmp_path / "runs").glob("features-64-*.npy")
    kept.write_bytes(kept.read_bytes()[:100])
    call(script, f"--ckpt {out / 'model.pt'} {measure} --out {other} {FEW[script]}")
    again = measured(other)
    assert [r["fid"] for r in again["runs"]] == approx(values, rel=1e-5) and again["data"] == small
    assert f"against {small}, all, which it was trained on\n" in capsys.readouterr().out
    refused("another run", script, f"--ckpt pretrained {measure} --out {out} {FEW[script]}")
    assert measured(out) == result

    call(script, f"--sample 10 --out {out} --seed 5 {FEW[script]}")
    drawn, few = samples(out), {"steps": 2} if script is ddpm else {}
    assert drawn["images"].shape == (10, 28, 28, 3) and drawn["images"].dtype == np.uint8
    net = script.load(out / "model.pt", "cpu")  # the labels of a samples.npz go back in
    same = script.sample(net, 10, drawn["labels"], 5, "fp32", **few)
    assert np.array_equal(same.permute(0, 2, 3, 1), drawn["images"])
    refused("holds samples.*--overwrite", script, f"--sample 10 --out {out} {FEW[script]}")
    call(script, f"--sample 3 --label 3 --overwrite --out {out} {FEW[script]}")
    assert samples(out)["labels"].tolist() == [[3]] * 3
    refused("label 8: it can be 0 0 or 1 1 or", script,
            f"--sample 3 --label 8 --overwrite --out {out} {FEW[script]}")


@pytest.mark.parametrize("script, n, own, stop, code", [
    (cvae, 20, "--classes --balance 0.5", signal.SIGINT, 130), (dcgan, 12, "--classes", signal.SIGTERM, -15),
    (ddpm, 6, "--optimizer muon", signal.SIGKILL, -9)])
def test_a_run_that_was_killed_goes_on_as_if_it_had_not(script, n, own, stop, code, tmp_path, small):
    """--resume after kill -9, SIGTERM and Ctrl-C at some moment ends with the bytes of a run in one go."""
    command = f"--data {small} --split val --batch-size 4 --augment --epochs {n} {SMALL[script]} {own}"
    command += " --dtype fp32 --device cpu --out"
    a, b = tmp_path / "a", tmp_path / "b"
    script.main(words(command, a))
    for again in (command, "--resume --device cpu --out"):  # with its own settings
        process = start(script, again, b, first="data.SAVE_EVERY = 0")  # each epoch is saved
        process.stdout.readline()  # what is trained
        while process.poll() is None and not (b / "ckpt.pt").exists():
            time.sleep(0.01)
        time.sleep(np.random.default_rng(len(again)).uniform(0.05, 0.5))
        process.send_signal(stop)
        errors = process.communicate(timeout=100)[1]
        assert process.returncode in (code, 0) and "Traceback" not in errors, errors
        assert process.returncode != 130 or f"--resume --out {b}" in errors.splitlines()[-1]
    script.main(words("--resume --device cpu --out", b))
    assert (b / "model.pt").read_bytes() == (a / "model.pt").read_bytes()
    assert [row[:-2] for row in log(b)[1]] == [row[:-2] for row in log(a)[1]]
    # ckpt.pt, written last, holds what model.pt does, a fitted prior included
    ckpt = saved(a / "ckpt.pt")["model" if script is cvae else "ema"]
    assert all(torch.equal(ckpt[k], v) for k, v in saved(a / "model.pt")["weights"].items())
    assert (a / "ckpt.pt").stat().st_mtime_ns >= (a / "model.pt").stat().st_mtime_ns


def test_what_resume_says_and_refuses(tmp_path, small, capsys):
    out, resume = tmp_path / "a", f"--resume --out {tmp_path / 'a'}"
    first = f"--data {small} --split val --out {out} {SMALL[cvae]} --epochs"
    call(cvae, first, 1)
    model, result = (out / "model.pt").read_bytes(), out / "fid.json"
    result.write_text("{}")
    call(cvae, resume)  # nothing to do
    assert "1 of 1 epochs done" in capsys.readouterr().out
    assert model == (out / "model.pt").read_bytes() and result.exists()
    call(cvae, resume, "--epochs 3")  # more epochs, whose model has not been measured
    assert len(log(out)[1]) == 3 and not result.exists()
    call(cvae, resume)
    assert "3 of 3 epochs done" in capsys.readouterr().out
    refused("lr 0.001 then, 0.5 now", cvae, resume, "--epochs 4 --lr 0.5")
    refused("paper False then, True now", cvae, resume, "--paper")
    refused("--resume.*--overwrite", cvae, first, 1)
    refused("new/ckpt.pt", cvae, "--resume --out", tmp_path / "new", code=1)
    result.write_text("{}")
    call(cvae, f"--sample 4 --png --out {out}")
    call(cvae, first, "1 --overwrite --seed 1")  # and nothing of the old run stays
    assert len(log(out)[1]) == 1 and not result.exists()
    assert not (out / "samples").exists() and not (out / "samples.npz").exists()
    assert saved(out / "ckpt.pt")["settings"]["seed"] == 1


def test_a_run_knows_its_data(folder, tmp_path):
    """--resume with classes that were renamed or added, or with other pictures, would exchange the labels."""
    run, lymphocyte = f"--resume --epochs 2 --out {tmp_path / 'run'}", folder / "lymphocyte"
    call(cvae, f"--data {folder} --classes --epochs 1 --out {tmp_path / 'run'} {SMALL[cvae]}")
    lymphocyte.rename(folder / "zymphocyte")
    refused(r"classes .*'lymphocyte': 10.* then, .*'zymphocyte': 10.* now", cvae, run)
    (folder / "zymphocyte").rename(lymphocyte)
    save_pictures(folder / "new", [grey(1)])
    refused("'new': 1", cvae, run)
    shutil.rmtree(folder / "new")
    shutil.copy(lymphocyte / "2.png", lymphocyte / "0.png")
    refused("sha256", cvae, run)
    Image.fromarray(grey(0, (40, 36))).save(lymphocyte / "0.png")
    call(cvae, run, "--data", folder.rename(tmp_path / "moved"))  # by another path it is the same set
    assert len(log(tmp_path / "run")[1]) == 2
    for k, names in enumerate((["a", "b"], ["b", "a"])):  # as many of each
        change = {f"{s}_labels": (np.arange(4) % 2)[:, None] for s in data.SPLITS} | {"class_names": names}
        path = fake_set(tmp_path / "x.npz", (4, 4, 4), change=change)
        if k:
            refused("classes.* then, .* now", cvae, "--resume --epochs 2 --out", tmp_path / "npz")
        else:
            call(cvae, f"--data {path} --classes --epochs 1 --out {tmp_path / 'npz'} {SMALL[cvae]}")


def test_epochs_are_saved_a_minute_apart_and_at_the_end(tmp_path, small, monkeypatch):
    """An interruption costs the epoch under way and a minute, whatever the clock of the file server says."""
    found, now, save, log_it = [], [0.0], cvae.save_checkpoint, cvae.log

    def later(args, state, rows, about):
        save(args, state, rows, about)
        os.utime(args.out / "ckpt.pt", (4e9, 4e9))
        found.append(len(rows))

    def an_epoch(*args):
        now[0] += 25
        log_it(*args)

    monkeypatch.setattr(cvae, "save_checkpoint", later)
    monkeypatch.setattr(cvae, "log", an_epoch)
    monkeypatch.setattr(cvae, "time", mock.Mock(time=time.time, monotonic=lambda: now[0]))
    call(cvae, f"--data {small} --split val --batch-size 4 --epochs 7 --out {tmp_path} {SMALL[cvae]}")
    assert found == [0, 3, 6, 7]


@pytest.mark.parametrize("script", [cvae, ddpm])
def test_the_loss_on_the_val_part_is_logged_with_the_same_noise_each_epoch(script, tmp_path, small):
    call(script, f"--data {small} --split train --lr 0 --epochs 2 --out {tmp_path} {SMALL[script]}")
    names, rows = log(tmp_path)
    first, second = (row[names.index("val_loss")] for row in rows)
    assert first == second and rows[0][1] != rows[1][1]
    x, net = script.to_model(data.load(small, split="val")[0]), script.load(tmp_path / "model.pt", "cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        if script is cvae:
            expected = cvae.objective(net, x, None)[0]
        else:
            t = (3 * ((torch.randperm(8) + torch.rand(8)) / 8) ** 1.5).long()
            expected = net.diffusion.loss(net.net, x, t, torch.randn_like(x))
    assert first == approx(expected.item(), rel=1e-4)


def test_the_validation_part_has_some_of_each_class_of_a_folder(tmp_path):
    parts = {}
    for part, n in {"train": 120, "val": 30, "test": 3}.items():
        parts |= {f"{part}_images": np.zeros((n, 16, 16), np.uint8)}
        parts |= {f"{part}_labels": np.repeat(np.arange(3), n // 3)[:, None]}  # by class, as folders are read
    np.savez(tmp_path / "x.npz", **parts)
    path = str(tmp_path / "x.npz")
    for n, counts in (120, [4, 3, 3]), (10000, [10, 10, 10]), (11, [1, 0, 0]):
        training = torch.zeros(n, 1, 16, 16)
        images, labels = data.validation_part(path, None, "train", None, training, 3)
        assert labels.bincount(minlength=3).tolist() == counts and len(images) == len(labels)
    assert data.validation_part(path, None, "all", None, training, 3) == []
    assert data.validation_part(path, None, "train", None, training, 2) == []  # it has classes that are new
    assert data.validation_part(path, None, "train", None, training.expand(-1, 3, -1, -1), 3) == []


def test_a_val_part_may_come_and_go_during_a_run(tmp_path):
    save_pictures(tmp_path / "cells" / "a", map(grey, range(60)))
    run = f"--split train --epochs 1 --data {tmp_path / 'cells'} --out {tmp_path / 'run'} {SMALL[cvae]}"
    call(cvae, run)
    for path in (tmp_path / "cells" / "a").iterdir():
        if data.part_of(Path("a") / path.name) == "val":
            path.unlink()
    call(cvae, f"--resume --epochs 2 --out {tmp_path / 'run'}")
    names, rows = log(tmp_path / "run")
    assert np.isfinite(rows[0]).all() and np.isnan(rows[1][names.index("val_loss")]) and len(rows) == 2


def test_a_guide_that_is_not_finite_ends_the_run_too(tmp_path, small):
    loss = ddpm.Diffusion.loss

    def spoilt(self, network, *rest):
        tiny = isinstance(network, ddpm.UNet) and network.stem.weight.shape[0] == 16
        return loss(self, network, *rest) * (np.nan if tiny else 1)

    run = f"--data {small} --split val --epochs 1 --unet small --batch-size 4 --timesteps 6 --out {tmp_path}"
    with mock.patch.object(ddpm.Diffusion, "loss", spoilt):
        refused("not finite: .*guide_loss': nan", ddpm, run, code=1)


@each_script
def test_a_loss_that_is_not_finite_ends_the_run(script, tmp_path, small):
    run = f"--data {small} --out {tmp_path} {SMALL[script]} --lr 1e+30 --batch-size 16 --epochs 9"
    refused(f"'epoch': [12], '{script.LOSSES[0]}'.*(nan|inf).*--lr", script, run, code=1)
    assert not (tmp_path / "model.pt").exists()


@each_script
def test_weights_that_are_not_finite_are_not_saved(script, tmp_path, small):
    """The last step of an epoch can spoil them when all its losses have been computed."""
    step, steps = torch.optim.Adam.step, []

    def spoil(self, *args):
        step(self, *args)
        steps.append(self)
        if script is not dcgan or len(steps) == 2:  # the discriminator's would spoil the generator's loss
            self.param_groups[0]["params"][0].data.fill_(np.nan)

    with mock.patch.object(torch.optim.Adam, "step", spoil):
        run = f"--data {small} --split val --epochs 1 --out {tmp_path} {SMALL[script]} --batch-size 64"
        refused("not finite after epoch 1; try|latents have grown beyond all bounds", script, run, code=1)
    assert not (tmp_path / "model.pt").exists() and not saved(tmp_path / "ckpt.pt")["rows"]


BAD_USAGE = """--epochs 0; --epochs many; --epochs 1000000000000000000; --lr -1; --lr nan; --lr inf
--batch-size 1.5; --batch-size 0; --seed -1; --size 8; --fid-runs -1; --fid-samples 1; --split none
--sample 0; --dims 100
--sample 1000000000000; --dtype fp64; --weights; --device cuda:77; --device abacus; --frobnicate; --balance 2
--sample 4 --epoch 3"""
BAD_USAGE = [(line, SCRIPTS) for line in re.split("; |\n", BAD_USAGE)] + [
    ("--kl-weight nan", [cvae]), ("--prior flat", [cvae]), ("--start 4", [dcgan]), ("--ema 2", [dcgan, ddpm]),
    ("--timesteps 1", [ddpm]), ("--eta 1.1", [ddpm]), ("--unet x", [ddpm]),
    ("--fid-runs 1 --steps 501", [ddpm])]


@pytest.mark.parametrize("line, scripts", BAD_USAGE)
def test_bad_usage_is_told_in_a_line_before_anything_is_written(line, scripts, tmp_path):
    last = re.findall(r"--[a-z-]+", line)[-1]
    for script in scripts:
        with raises(data.Error, match=f"{last}.*--help") as error:
            script.main(words(line, "--out", tmp_path / "out"))
        assert "\n" not in str(error.value) and error.value.code == 2
    assert not (tmp_path / "out").exists()


@each_script
def test_a_run_of_another_version_is_not_continued(script, tmp_path, small, capsys):
    call(script, f"--data {small} --split val --epochs 1 --paper --out {tmp_path} {SMALL[script]}")
    path, again = tmp_path / "ckpt.pt", f"--resume --paper --epochs 2 --out {tmp_path}"
    capsys.readouterr()
    call(script, again)
    assert "paper's settings" not in capsys.readouterr().out  # the run keeps its own
    file = saved(path)
    own = file["settings"]
    less = {k: v for k, v in own.items() if k != "seed"}
    for settings, said in (less, r"version .*in seed\)"), (own | {"new": 1}, r"in new\): continue it"), (
            [1], "is no ckpt.pt"):
        torch.save(file | {"settings": settings}, path)
        before = path.read_bytes()
        refused(said, script, again, code=1)
        assert path.read_bytes() == before


def test_what_a_model_cannot_do_is_told_in_a_line(tmp_path, small, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call(ddpm, f"--data {small} --split val --epochs 1 --out plain {SMALL[ddpm]}")
    call(ddpm, f"--data {small} --split val --epochs 1 --out alone --no-guide {SMALL[ddpm]}")
    refused("guidance 1.0.*--no-guide.*--guidance 0", ddpm, "--sample 2 --out alone --steps 2 --guidance 1")
    refused("guidance 1.0.*--no-guide", ddpm, "--no-guide --guidance 1 --out none")
    for flags, said in (("--label a", "label a.*--classes"), ("--steps 7", "steps 7.*3"),
                        ("--data bloodmnist", "has learned .*small.npz")):
        refused(said, ddpm, "--sample 2 --out plain --steps 2", flags)
    refused("dermamnist.*has learned bloodmnist", ddpm, "--sample 2 --data dermamnist")  # not blood cells
    said = "cvae.py: label e: it can be 1 eosinophil or 2 erythroblast"
    fails(cvae, 2, said, "--sample 2 --label e", cwd=tmp_path)


@each_script
def test_only_a_call_that_names_no_folder_and_no_model_takes_the_pretrained(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw = f"--sample 2 {FEW[script]}"
    refused("no lab/model.pt yet", script, draw, "--out lab")
    call(script, draw, "--ckpt pretrained --out lab")
    call(script, draw)
    drawn = samples(f"out/{script.NAME}-pretrained")["images"]
    assert samples("lab")["images"].tobytes() == drawn.tobytes()
    Path(f"out/{script.NAME}").mkdir()
    Path(f"out/{script.NAME}/ckpt.pt").write_text("a training that has saved no model yet")
    refused("model.pt yet", script, draw, "--overwrite")
    call(script, draw, "--ckpt pretrained --overwrite")  # in its own folder, beside the run
    refused("lab holds samples.npz", script, "--out lab --epochs 1")  # not thrown away by a training


def test_what_the_fid_after_a_training_needs_is_checked_before_it(tmp_path, small, stem_file, capsys):
    measure = f"--fid-runs 1 --dims 64 --out {tmp_path / 'a'}"
    common = f"--data {small} --epochs 1 {measure} {SMALL[cvae]}"
    refused("--fid-samples 200: there are 112", cvae, f"{common} --fid-samples 200 --weights {stem_file}")
    refused("none.pth", cvae, f"{common} --weights none.pth", code=1)
    assert not (tmp_path / "a" / "ckpt.pt").exists()
    call(cvae, f"{common} --split val --weights {stem_file}")  # as many as there are
    assert "--fid-samples 8" in capsys.readouterr().out
    big = fake_set(tmp_path / "big.npz", n=(9, 8, 2), size=32)
    measure += f" --data {big} --weights {stem_file} --ckpt {tmp_path / 'a' / 'model.pt'}"
    refused("holds fid.json: --overwrite replaces it", cvae, measure)
    refused(r"3, 28, 28\].*3, 32, 32\]", cvae, f"{measure} --overwrite")


@each_script
def test_paper_sets_the_papers_settings_and_says_so(script, capsys):
    common = ["--device", "cpu", "--overwrite"]
    paper, own = script.get_args(["--paper", *common]), script.get_args(common)
    printed = re.search("paper's settings: (.*)", capsys.readouterr().out)[1].split()
    changed = {k for k in vars(own) if vars(own)[k] != vars(paper)[k]} - {"paper"}
    assert changed == set(script.PAPER)
    said = script.get_args([*printed, *common])  # flags that there are, with the values in force
    assert vars(said) | {"paper": True} == vars(paper) and len(printed) == len(script.PAPER)
    assert script.get_args(["--paper", "--lr", "0.25", *common]).lr == 0.25  # what is given wins
    assert "--lr=" not in capsys.readouterr().out


@pytest.mark.parametrize("script, flags, then", [
    (cvae, "--prior normal", "--prior fitted"), (ddpm, "--steps 2 --eta 0", "--steps 3 --eta 0")])
def test_a_model_samples_as_its_training_said(script, flags, then, tmp_path, small, capsys):
    """So that a model of --paper gives the paper's samples; what the command line names goes before it."""
    run = f"--data {small} --classes --epochs 1 --out {tmp_path / 'run'} {SMALL[script]} {flags}"
    call(script, run)
    sample = f"--sample 9 --ckpt {tmp_path / 'run' / 'model.pt'} --device cpu --dtype fp32 --out"
    for i, own in enumerate(("", flags, then)):
        call(script, sample, tmp_path / str(i), own)
    one, same, other = (samples(tmp_path / str(i))["images"].tobytes() for i in range(3))
    assert one == same != other
    if script is cvae:  # --paper is named, too: a prior of N(0, I), as in the training here
        call(script, sample, tmp_path / "3", "--paper")
        assert samples(tmp_path / "3")["images"].tobytes() == one
        pretrained = "--sample 9 --ckpt pretrained --device cpu --dtype fp32 --out"
        call(script, pretrained, tmp_path / "4", "--paper")
        call(script, pretrained, tmp_path / "5", "--prior normal")
        a, b = (samples(tmp_path / i)["images"].tobytes() for i in "45")
        assert a == b
    refused("--label and --png need --sample", script, run, "--overwrite --label 1")
    assert (tmp_path / "run" / "model.pt").exists()


@pytest.mark.parametrize("script", [*SCRIPTS, fid])
def test_help_explains_every_flag_and_ends_with_the_commands_of_the_docstring(script, capsys):
    with raises(SystemExit):
        script.main(["--help"])
    text = capsys.readouterr().out
    assert "(default: None)" not in text and "(default: False)" not in text
    assert script is fid or "(default: 0)" in text
    assert text.rstrip().endswith(script.__doc__.strip().splitlines()[-1])


def test_a_learners_slip_in_a_changed_loss_shows_its_line(tmp_path, small):
    common = f"--data {small} --epochs 1 --out {tmp_path} {SMALL[cvae]}"
    with mock.patch.object(cvae, "to_model", lambda images: int("a")), raises(ValueError) as error:
        call(cvae, common)  # data.command() takes one line of an Error alone
    assert not isinstance(error.value, data.Error)
    with mock.patch.object(cvae, "LOSSES", ("loss", "nll")), raises(ValueError, match="zip"):
        call(cvae, common, "--overwrite")


def test_a_clusters_environment_does_not_make_a_script_a_part_of_a_run(tmp_path, small, monkeypatch):
    common = f"--data {small} --epochs 1 {SMALL[cvae]} --out"
    process = start(cvae, common, tmp_path / "a", env={"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"})
    process.communicate(timeout=100)
    assert (tmp_path / "a" / "model.pt").exists()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for script in (cvae, dcgan):
        refused("torchrun is for .* ddpm.py alone", script, f"--data {small} --out {tmp_path / 'b'}")


def test_a_schedule_that_leaves_signal_at_the_end_says_how_much(tmp_path, small, capsys):
    common = f"--data {small} --split val --overwrite --out {tmp_path} {SMALL[ddpm]} --timesteps 100"
    for schedule, share in ("linear", "60%"), ("cosine", None):  # Ho et al. have 1,000 timesteps
        with mock.patch.object(data, "batches", side_effect=KeyboardInterrupt), raises(KeyboardInterrupt):
            call(ddpm, common, "--schedule", schedule)
        found = re.search(r"(\S+) of the image is left", capsys.readouterr().out)
        assert (found and found[1]) == share


def test_init_takes_what_fits_and_the_rows_of_the_labels_by_name(tmp_path, capsys):
    torch.manual_seed(0)
    classes = {"c": 4, "none": 0, "a": 4, "b": 4, "a (old)": 4}
    other = ddpm.DDPM((3, 28, 28), classes, "tiny", True, 3, guide=True)
    for p in other.parameters():
        nn.init.normal_(p, 0, 0.1)
    file = tmp_path / "other.pt"
    trained = {"data": "x", "epochs": 9}
    torch.save({"script": "ddpm", "model_args": other.model_args, "weights": other.state_dict(),
                "trained": trained}, file)
    change = {f"{s}_labels": (np.arange(12) % 4)[:, None] for s in data.SPLITS}
    change["class_names"] = ["A ", "b(left)", "new", "none"]
    path = fake_set(tmp_path / "x.npz", (12, 12, 12), change=change)
    common = f"--data {path} --classes --epochs 1 --steps 2 --lr 0 --optimizer adam --init {file} --out"
    call(ddpm, common, tmp_path / "a")  # which learns nothing
    ours, theirs = saved(tmp_path / "a" / "model.pt")["weights"], other.state_dict()
    for k, v in ours.items():
        if k.endswith("label.weight"):
            c, _, a, b, old = theirs[k]
            mean = (a + b + c + old) / 4
            theirs[k] = torch.stack([a, b, mean, mean])  # of "none" it has seen no image either
        torch.testing.assert_close(v, theirs[k])
    printed = capsys.readouterr().out
    assert f"{len(ours)} of {len(ours)} tensors; new classes: new, none" in printed
    call(ddpm, common, tmp_path / "one", "--lr 1e-3 --decay none")  # a first step of Adam is its rate
    moved = {k: (v - theirs[k]).abs() for k, v in saved(tmp_path / "one" / "ckpt.pt")["model"].items()}
    for k, rate in ("net.label.weight", 0.01), ("guide.label.weight", 0.01), ("net.embed.2.bias", 0.001):
        assert moved[k].median().item() == approx(rate, rel=0.02)
    grey = fake_set(tmp_path / "grey.npz", (12, 2, 2), channels=1)
    call(ddpm, common, tmp_path / "b", f"--data {grey} --no-guide")  # the ends of the network are new
    taken = saved(tmp_path / "b" / "model.pt")
    assert taken["model_args"]["guide"] is None and taken["model_args"]["timesteps"] == 3
    left = [k for k, v in taken["weights"].items() if v.shape != theirs[k].shape]
    assert left and {k.split(".")[1] for k in left} <= {"label", "first", "last"}
    assert torch.equal(taken["weights"]["net.middle.conv1.weight"], theirs["net.middle.conv1.weight"])
    refused("none of its layers fits", ddpm, common, tmp_path / "c", "--unet baseline")
    refused("cvae.pt is no model.pt of ddpm.py", ddpm, "--init", HERE / "checkpoints" / "cvae.pt", code=1)
    file.unlink()
    call(ddpm, "--resume --epochs 2 --out", tmp_path / "a")  # a run that has begun needs it no more


def test_the_papers_dcgan_takes_a_last_batch_of_one(tmp_path):
    """BatchNorm has no statistics of one image: OrganAMNIST's train part has 270 x 128 + 1."""
    path = fake_set(tmp_path / "x.npz", (31, 1, 1))
    call(dcgan, f"--data {path} --paper --width 32 --batch-size 16 --epochs 1 --out {tmp_path / 'a'}")


@pytest.mark.parametrize("script, own", [(cvae, ""), (dcgan, ""), (dcgan, "--paper --width 32"), (ddpm, "")])
def test_pictures_of_any_side_can_be_learned_or_are_refused_in_a_line(script, own, folder, tmp_path):
    for size in (16, 52):
        out = tmp_path / str(size)
        call(script, f"--data {folder} --size {size} --epochs 1 --out {out} {SMALL[script]} {own}")
        assert script.load(out / "model.pt", "cpu").shape == (3, size, size)
    refused("--size 29", script, f"--data {folder} --size 29 --out {tmp_path / 'a'}")


def test_disks_and_folders_that_take_no_checkpoint(tmp_path, small):
    common = f"--data {small} --epochs 1 {SMALL[cvae]}"
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with raises(OSError, match=str(out)):
            call(cvae, f"{common} --out {out}")
    if sys.platform == "linux":  # a disk that is full, at the start and in mid-run: no file may pass a size
        import resource

        def full(size):
            return {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))}

        printed = fails(cvae, 1, "File too large", f"{common} --out {tmp_path / 'new'}", **full(10**5))
        assert "epoch 1 " not in printed  # before the first step
        out = tmp_path / "run"
        call(cvae, f"{common} --out {out}")
        before = (out / "ckpt.pt").read_bytes()
        fails(cvae, 1, "File too large", f"--epochs 2 --device cpu --resume --out {out}", **full(10**6))
        assert (out / "ckpt.pt").read_bytes() == before and not list(out.glob("*.tmp"))


@pytest.mark.parametrize("script, channels", [(cvae, 1), (dcgan, 3)])
def test_sets_of_medmnist_plus(script, channels, tmp_path, stem_file):
    """--size 64 finds MedMNIST+'s file; size and channels come from the data, up to the FID."""
    fake_set(tmp_path / "bloodmnist_64.npz", n=(24, 8, 8), size=64, channels=channels)
    common = f"--root {tmp_path} --size 64 --epochs 1 --out {tmp_path / 'out'} {SMALL[script]}"
    call(script, common, f"--fid-runs 1 --fid-samples 8 --dims 64 --weights {stem_file}")
    result = measured(tmp_path / "out")
    assert np.isfinite(result["drawn"]["fid"]["mean"]) and result["size"] == 64
    call(script, f"--sample 3 --out {tmp_path / 'out'} {FEW[script]}")
    assert samples(tmp_path / "out")["images"].shape == (3, 64, 64, channels)


def torchrun(*argv):
    command = f"-m torch.distributed.run --nproc_per_node=2 --master_port={29500 + os.getpid() % 500}"
    command = [sys.executable, *words(command, HERE / "ddpm.py", *argv)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_learn_what_one_learns(tmp_path, small, stem_file):  # the last of 98 = 6 x 16 + 2 too
    path = fake_set(tmp_path / "x.npz", (98, 8, 8))
    common = f"--data {path} --split train --epochs 2 --batch-size 16 --classes {SMALL[ddpm]} --device cpu "
    common += "--optimizer muon --dtype fp32 --fid-runs 1 --fid-samples 20 --dims 64 "
    common += f"--weights {stem_file} --out"
    call(ddpm, common, tmp_path / "one")
    save_pictures(tmp_path / "two" / "samples" / "a", [grey(0)] * 300)  # which only one of them removes
    for file in (tmp_path / "two" / "samples" / "a").iterdir():
        file.rename(file.with_stem(f"000{file.stem}"))
    process = torchrun(common, tmp_path / "two", "--overwrite")
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert out.count("epoch 2 ") == out.count("drawn: fid") == 1  # one process speaks
    (names, one), (_, two) = (log(tmp_path / n) for n in ("one", "two"))
    assert "val_loss" in names
    np.testing.assert_allclose(np.array(one)[:, 1:3], np.array(two)[:, 1:3], atol=1e-4)
    a, b = (saved(tmp_path / n / "model.pt")["weights"] for n in ("one", "two"))
    assert a["net.last.3.weight"].any() and a["guide.last.3.weight"].any()  # zero at first: both have learned
    for k in a:
        torch.testing.assert_close(a[k], b[k], atol=2e-3, rtol=1e-2)
    one, two = (measured(tmp_path / n) for n in ("one", "two"))
    assert one["drawn"]["fid"]["mean"] == approx(two["drawn"]["fid"]["mean"], rel=0.05)
    assert two["trained"]["on"] == "2 x cpu (1 threads)" and two["device"] == "cpu (1 threads)"


@pytest.mark.skipif(sys.platform != "linux", reason="finds the worker in /proc")
def test_a_dead_worker_ends_the_run_and_leaves_a_checkpoint(tmp_path, small):
    common = f"--data {small} --split val --device cpu {SMALL[ddpm]}"
    process = torchrun(f"{common} --epochs 100000 --out {tmp_path}")
    try:
        while "epoch 2 " not in process.stdout.readline():
            assert process.poll() is None
        mine = f"--out\0{tmp_path}".encode()
        pids = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and int(pid) != process.pid]
        os.kill(max(pid for pid in pids if mine in Path(f"/proc/{pid}/cmdline").read_bytes()), signal.SIGKILL)
        _, errors = process.communicate(timeout=100)
        assert process.returncode != 0 and "Signal 9" in errors
    finally:
        process.kill()
    assert "rows" in saved(tmp_path / "ckpt.pt")


def spoilt(raw, rng):
    """A few bytes changed, cut out, doubled, or all after them cut off."""
    at, n = int(rng.integers(len(raw))), int(rng.integers(1, 64))
    forms = (rng.bytes(n), at + n), (b"", at + n), (raw[at:at + n], at), (b"", len(raw))
    middle, rest = forms[rng.integers(4)]
    return raw[:at] + middle + raw[rest:]


def test_fuzz_of_what_is_read(tmp_path):
    """Of hundreds of spoilt files the right contents come out, or one line that names the file."""
    images, labels, names = data.load(fake_set(tmp_path / "good.npz", n=(6, 2, 2)))
    data.save_samples(tmp_path, images, labels, names)
    Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(tmp_path / "cell.png")
    net = cvae.VAE(latent_dim=2, decoder="transposed")
    model = {"script": "cvae", "model_args": net.model_args, "trained": {}, "weights": net.state_dict()}
    torch.save(model, tmp_path / "model.pt")

    def right(got):
        return torch.equal(got[0], images) and torch.equal(got[1], labels)

    readers = {  # file: what reads its spoilt copy, whether what it gave is right
        "good.npz": (data.load, right), "samples.npz": (data.load, lambda got: torch.equal(got[0], images)),
        "cell.png": (data.read_picture, lambda got: got.size == (28, 28)),
        "model.pt": (lambda p: cvae.load(p, "cpu").state_dict(),
                     lambda got: all(torch.equal(v, got[k]) for k, v in net.state_dict().items()))}
    rng, wrong = np.random.default_rng(0), 0
    for name, (reader, right) in readers.items():
        raw, copy = (tmp_path / name).read_bytes(), tmp_path / f"bad{Path(name).suffix}"
        for _ in range(100):
            copy.write_bytes(spoilt(raw, rng))
            try:
                assert right(reader(copy)), name
            except data.Error as error:
                wrong += 1
                assert "\n" not in str(error) and str(tmp_path) in str(error), error
    assert wrong > 200


def test_files_that_are_no_models_and_no_checkpoints(tmp_path, small, stem_file):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "boom"),)

    run = tmp_path / "v"
    call(cvae, f"--data {small} --split val --epochs 1 --out {run} {SMALL[cvae]}")
    model, ckpt = saved(run / "model.pt"), saved(run / "ckpt.pt")
    torch.save(model | {"model_args": model["model_args"] | {"gone": 1}}, tmp_path / "args.pt")
    torch.save(model | {"weights": model["weights"] | {"gone": torch.ones(1)}}, tmp_path / "keys.pt")
    torch.save({k: v for k, v in model.items() if k != "trained"}, tmp_path / "part.pt")
    torch.save({"script": "cvae", "x": Bomb()}, tmp_path / "bomb.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    torch.save(ckpt | {"model": ckpt["model"] | {"gone": torch.ones(1)}}, tmp_path / "net.pt")
    (tmp_path / "noise.pt").write_bytes(os.urandom(1000))
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("weights")
    common = [tmp_path / f for f in ("bomb.pt", "noise.pt", "empty.pt", "text.pt", "tensor.pt", "no.pt")]
    own = [tmp_path / f"{f}.pt" for f in ("args", "keys", "part", "v/ckpt")]
    for path in (*common, *own, stem_file, HERE / "checkpoints" / "dcgan.pt"):
        said = f"{re.escape(str(path))}(?!.*weights_only).*" + "gone" * (path == tmp_path / "keys.pt")
        refused(said, cvae, f"--ckpt {path} --sample 4 --out {tmp_path / 'out'}", code=1)
    call(dcgan, f"--data {small} --split val --epochs 1 --out {tmp_path / 'd'} {SMALL[dcgan]}")
    (tmp_path / "dir.pt").mkdir()
    mine = run / "ckpt.pt"
    for path in (*common[:5], *(tmp_path / f"{f}.pt" for f in ("net", "v/model", "d/ckpt", "dir"))):
        mine.unlink()
        mine.symlink_to(path)
        said = f"{re.escape(str(mine))}(?!.*weights_only).*" + "gone" * (path == tmp_path / "net.pt")
        refused(said, cvae, f"--resume --epochs 2 --out {run}", code=1)
    assert not (tmp_path / "boom").exists() and not (tmp_path / "out").exists()


# ---- fid.py ----

@pytest.fixture(scope="session")
def stem(stem_file):
    """The network of 64 features."""
    return fid.network(64, stem_file, "cpu")


@pytest.fixture(scope="session")
def tiny():
    """In the place of Inception where any network will do: 8 features, in no time."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 20, stride=20), nn.ReLU()).requires_grad_(False)
    net.dims, net.weights, net.sha256 = 8, "tiny.pth", "0123"
    return net


def frechet(a, b):
    return fid.frechet_distance(*fid.statistics(a), *fid.statistics(b))


def test_distance_closed_forms():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(50, 8))
    mu, sigma = fid.statistics(a)
    np.testing.assert_allclose(sigma, np.cov(a.T))
    assert fid.frechet_distance(mu, sigma, mu, sigma) == approx(0, abs=1e-6)
    assert fid.frechet_distance(mu, sigma, mu + 2, sigma) == approx(8 * 4)
    s, t = rng.uniform(0.1, 4, (2, 8))  # commuting covariances: sum (sqrt s - sqrt t)^2
    commuting = fid.frechet_distance(np.zeros(8), np.diag(s), np.zeros(8), np.diag(t))
    assert commuting == approx(((s**0.5 - t**0.5) ** 2).sum())
    assert fid.frechet_distance(1.0, 4.0, 3.0, 9.0) == approx(4 + 1)  # one dimension
    assert np.isfinite(frechet(a[:, :2] @ rng.normal(size=(2, 8)), a))  # singular
    for moments, said in (((mu, sigma, mu[:4], sigma), "do not go"),
                          ((mu, sigma, mu, sigma[:4]), "do not go"), ((mu * np.nan, sigma, mu, sigma), "NaN"),
                          (([0, 0], np.diag([1.0, -1.0]), [0, 0], np.eye(2)), "not real")):
        with raises(data.Error, match=said):
            fid.frechet_distance(*moments)


def reference_distance(*moments):
    from pytorch_fid import fid_score

    sqrtm = linalg.sqrtm
    with mock.patch.object(fid_score.linalg, "sqrtm", lambda a, disp=False: (sqrtm(a), 0)):  # gone from SciPy
        return fid_score.calculate_frechet_distance(*moments)


def test_distance_equals_pytorch_fid():
    rng = np.random.default_rng(1)
    for d in (3, 64):
        x, y = rng.normal(size=(500, d)) @ rng.normal(size=(d, d)), rng.normal(size=(400, d)) + 0.3
        theirs = reference_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
        assert frechet(x, y) == approx(theirs, rel=1e-3)


def double_loop(x, y):
    """The unbiased squared MMD, pair by pair."""
    def kernel(a, b):
        return (a @ b / len(a) + 1) ** 3

    n = range(len(x))
    xx, yy = (np.mean([kernel(z[i], z[j]) for i in n for j in n if i != j]) for z in (x, y))
    return xx + yy - 2 * np.mean([kernel(a, b) for a in x for b in y])


def test_kid_is_the_double_loop():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 5)), rng.normal(size=(40, 5)) + 0.5
    draws, values = np.random.default_rng(7), []
    for _ in range(3):
        values.append(double_loop(*(z[draws.choice(len(z), 12, replace=False)] for z in (x, y))))
    found = fid.kernel_distance(x, y, subsets=3, size=12, seed=7)
    assert found == approx((np.mean(values), np.std(values)))


def test_kid_of_a_small_set_has_subsets_that_differ():
    """Of all images at most half, so that its ± says something: at 60 it was rounding noise, about 1e-17."""
    x, y = np.random.default_rng(0).normal(size=(2, 60, 5)) + np.array([0, 0.5])[:, None, None]
    fid.warn.cache_clear()
    with pytest.warns(UserWarning, match="subsets of 30, not 1000"):
        mean, std = fid.kernel_distance(x, y)
    assert mean == approx(double_loop(x, y), rel=0.1) and std > 0.02 * mean
    fid.warn.cache_clear()
    with pytest.warns(UserWarning, match="subsets of 5, not 1000"):
        fid.kernel_distance(x, y[:10])  # of the smaller of the two
    assert np.isfinite(fid.kernel_distance(x[:4], y[:4])).all()


def test_kid_is_unbiased():
    """Its mean over equal distributions is 0, and over N(0, 1) and N(1/2, 1) it has a closed form."""
    x, y, z = np.random.default_rng(0).normal(size=(3, 20000, 1)) + np.array([0, 0, 0.5])[:, None, None]
    mean, std = fid.kernel_distance(x, y, subsets=36)
    assert abs(mean) < 3 * std / 6
    # E (xy + 1)^3 = sum over the moments of x and y: 1 + 3 m1 m1' + 3 m2 m2' + m3 m3'
    p, q = np.array([0, 1, 0]), np.array([0.5, 1.25, 0.5**3 + 1.5])
    assert fid.kernel_distance(x, z, subsets=36)[0] == approx(np.array([3, 3, 1]) @ (p - q) ** 2, rel=0.1)


def test_precision_and_recall_tell_lost_modes_from_noise():
    rng = np.random.default_rng(0)
    centres = np.repeat(10 * np.eye(8)[:4], 100, 0)
    real, same = (centres + rng.normal(size=centres.shape) for _ in range(2))
    assert fid.precision_recall(real, real) == (1, 1) and fid.precision_recall(real, same + 100) == (0, 0)
    precision, recall = fid.precision_recall(real, same, block=33)
    assert fid.precision_recall(real, same) == approx((precision, recall)) and min(precision, recall) > 0.6
    lost = fid.precision_recall(real, same[:200])  # half of the modes
    assert lost[0] == approx(precision, abs=0.1) and lost[1] == approx(recall / 2, abs=0.1)
    noisy = fid.precision_recall(real, same + 3 * rng.normal(size=same.shape))
    assert noisy[0] < 0.3 and noisy[1] > 0.8
    # a point is within the ball that reaches the third neighbour of a centre, itself not counted
    line = np.arange(6.0)[:, None]
    assert fid.precision_recall(line, np.array([[7.9], [8.1], [2.0], [-2.9]]))[0] == 0.75
    with raises(data.Error, match="more than 3"):
        fid.precision_recall(line, line[:3])


@pytest.mark.parametrize("dims", fid.LAST)
def test_features_equal_pytorch_fid(dims, inception_file):
    import pytorch_fid.inception as reference

    with mock.patch.object(reference, "load_state_dict_from_url", lambda *a, **k: saved(inception_file)):
        theirs = reference.InceptionV3([reference.InceptionV3.BLOCK_INDEX_BY_DIM[dims]]).eval()
    images = bits(4, 3, 28, 28, seed=dims)
    with torch.no_grad():
        expected = theirs(images.float() / 255)[0].mean((2, 3)).numpy()
    ours = fid.features(images, fid.network(dims, inception_file, "cpu"))
    assert ours.shape == (4, dims) and ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).mean())


def test_the_network_says_what_it_is(stem_file, stem, tmp_path):
    assert (stem.dims, stem.weights) == (64, "stem.pth")
    assert not stem.training and not any(p.requires_grad for p in stem.parameters())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in stem.modules())
    with raises(data.Error, match="dims 100: choose from 64, 192, 768, 2048"):
        fid.network(100, stem_file)
    images = bits(2, 3, 28, 28)
    torch.save({k: v.half() for k, v in saved(stem_file).items()}, tmp_path / "half.pth")
    torch.save(saved(stem_file), tmp_path / "old.pth", _use_new_zipfile_serialization=False)  # as pytorch-fid
    for name, close in (("half.pth", 1e-2), ("old.pth", 1e-6)):
        found = fid.features(images, fid.network(64, tmp_path / name, "cpu"))
        np.testing.assert_allclose(found, fid.features(images, stem), rtol=close, atol=close)


def test_weights_are_known_by_the_layers_in_use(tmp_path, inception_file):
    """A download, a whole file and one cut after the block are the same weights, one other value is not."""
    state, images = saved(inception_file), bits(2, 1, 28, 28)
    order = [*torchvision.models.inception_v3(init_weights=False).state_dict()]
    last = max(i for i, key in enumerate(order) if key.startswith("Mixed_6e"))
    torch.save({key: state[key] for key in order[:last + 1] if key in state}, tmp_path / "cut.pth")
    key = "Mixed_6e.branch1x1.conv.weight"
    torch.save(state | {key: state[key] + 1e-3}, tmp_path / "other.pth")
    with mock.patch.object(torch.hub, "load_state_dict_from_url", lambda url, *a, **k: state):
        nets = [fid.network(768, weights, "cpu") for weights in
                ("imagenet", inception_file, tmp_path / "cut.pth", tmp_path / "other.pth")]
    assert [net.weights for net in nets] == ["imagenet", Path(inception_file).name, "cut.pth", "other.pth"]
    fetched, whole, cut, other = (net.sha256 for net in nets)
    assert fetched == whole == cut != other and len(other) == 64
    assert fid.network(192, tmp_path / "other.pth", "cpu").sha256 == fid.network(192, inception_file).sha256
    np.testing.assert_array_equal(fid.features(images, nets[0]), fid.features(images, nets[2]))


def test_weights_are_fetched_with_their_hash_and_need_the_layers_up_to_the_block(tmp_path, stem_file, stem):
    with mock.patch.object(torch.hub, "load_state_dict_from_url", side_effect=OSError("no route")) as fetch:
        for failing in (lambda: fid.network(64, "fid"), lambda: fid.check(100, None, 64, "fid")):
            with raises(data.Error, match="mseitzer.*no route.*--weights") as error:
                failing()
            assert error.value.code == 1
    assert fetch.call_args.kwargs["check_hash"] and fetch.call_args.kwargs["weights_only"]
    assert all(re.search(r"-[0-9a-f]{8}\.pth$", url) for url in fid.URLS.values())
    assert len(stem) == 4
    torch.save(saved(stem_file) | {"Conv2d_2a_3x3.conv.weight": torch.zeros(32, 32, 5, 5)},
               tmp_path / "misshapen.pth")
    torch.save({k: v for k, v in saved(stem_file).items() if "2a" not in k}, tmp_path / "gap.pth")
    with raises(data.Error, match="misshapen.pth does not fit.*Conv2d_2a_3x3.conv.weight.*5, 5"):
        fid.network(64, str(tmp_path / "misshapen.pth"))
    with raises(data.Error, match="gap.pth lacks Conv2d_2a_3x3.conv.weight"):
        fid.network(64, str(tmp_path / "gap.pth"))
    torch.save({"model": saved(stem_file)}, tmp_path / "nested.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "noise.pth").write_bytes(os.urandom(1000))
    (tmp_path / "cut.pth").write_bytes(Path(stem_file).read_bytes()[:5000])
    for name, dims, said in (
            (stem_file, 192, "no layer Conv2d_4a_3x3, which --dims 192 needs"),
            ("nested.pth", 64, "no layer"), ("list.pth", 64, ""), ("noise.pth", 64, ""), ("cut.pth", 64, ""),
            ("none.pth", 64, "No such file"), ("", 64, "")):
        path = tmp_path / name
        for failing in (fid.network, lambda *args: fid.check(100, None, *args)):
            with raises(data.Error, match=f"{re.escape(str(path))}.*{said}") as error:
                failing(dims, str(path))
            assert "\n" not in str(error.value) and len(str(error.value)) < 240 and error.value.code == 1


def test_what_the_measuring_needs_is_checked_without_a_network(inception_file, capsys):
    with mock.patch.object(fid, "network", side_effect=AssertionError):
        for dims in fid.LAST:
            fid.check(12000, 10000, dims, inception_file)
            fid.check(12000, None, dims, inception_file)
        assert capsys.readouterr().out == ""
        fid.check(112, None, 64, inception_file)
        assert "--fid-samples 112" in capsys.readouterr().out
        for wanted, n, said in ((200, 112, "--fid-samples 200: there are 112"), (None, 3, "need 4"),
                                (2, 9, "need 4")):
            with raises(data.Error, match=said) as error:
                fid.check(n, wanted, 64, inception_file)
            assert error.value.code == 2
        with raises(data.Error, match="choose from 64, 192"):
            fid.check(100, None, 65, inception_file)


GOOD = np.random.default_rng(0).random((4, 3, 28, 28), np.float32)


@pytest.mark.parametrize("images, said", [
    (GOOD * 2 - 1, r"\[-1, 0.9999\], not uint8 or floats in \[0, 1\]"), (GOOD * 255, r"\[0, 1\]"),
    (GOOD - 1e-3, r"\[0, 1\]"), (np.where(GOOD < 0.5, np.nan, GOOD), "nan"), (GOOD[:0], "0, 3, 28, 28"),
    (GOOD[:, :2], r"\(4, 2, 28, 28\)"), (GOOD[0, 0], r"\(28, 28\)"), (GOOD > 0.5, "bool"),
    (GOOD.astype(np.int64), "int64"), ((GOOD * 65535).astype(np.uint16), "uint16"),
    (np.zeros((4, 3, 28, 3), np.uint8), r"\(4, 3, 28, 3\), not clearly"),
    (np.moveaxis(GOOD[0], 0, 2), "not clearly"), (GOOD[..., ::-1], "no array"), (["a", "b"], "no array"),
    ([[1.0], [0.5, 0.5]], "no array"), (None, "no array")])
def test_images_that_are_refused(images, said, stem):
    with raises(data.Error, match=said) as error:
        fid.features(images, stem)
    assert "\n" not in str(error.value)


def test_images_that_are_taken(tiny):
    """Arrays and tensors in each layout, grey as (N, H, W), and of either float."""
    images = bits(10, 3, 28, 28)
    expected, pixels = fid.features(images, tiny), images.permute(0, 2, 3, 1).numpy()
    floats = images.float() / 255
    for same in (pixels, np.asfortranarray(pixels), floats, floats.double(), floats.numpy().astype(float)):
        np.testing.assert_allclose(fid.features(same, tiny), expected, rtol=1e-4, atol=1e-5)
    grey = images[:, :1]
    expected = fid.features(grey.expand(-1, 3, -1, -1), tiny)
    for same in (grey, grey[:, 0], grey[:, 0].numpy(), grey.permute(0, 2, 3, 1)):
        np.testing.assert_allclose(fid.features(same, tiny), expected, rtol=1e-4, atol=1e-5)


def test_features_are_in_fp32_whatever_a_program_allows(stem):
    images, seen, cudnn = bits(9, 3, 28, 28), [], torch.backends.cudnn
    expected, new = fid.features(images, stem), hasattr(cudnn, "conv")
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(fid.features(images, stem), expected)
    if not new:  # before torch 2.9
        assert cudnn.allow_tf32
        return
    switches = cudnn.conv, torch.backends.mkldnn.conv
    hook = stem.register_forward_hook(lambda *args: seen.append([s.fp32_precision for s in switches]))
    before = [s.fp32_precision for s in switches]
    try:
        for values in (("ieee", "bf16"), ("tf32", "tf32")):  # with the first, reading allow_tf32 raises
            for switch, value in zip(switches, values, strict=True):
                switch.fp32_precision = value
            np.testing.assert_array_equal(fid.features(images, stem), expected)
            assert tuple(s.fp32_precision for s in switches) == values and seen[-1] == ["ieee", "ieee"]
            with mock.patch.object(stem, "forward", side_effect=KeyboardInterrupt), raises(KeyboardInterrupt):
                fid.features(images, stem)
            assert tuple(s.fp32_precision for s in switches) == values
    finally:
        hook.remove()
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


def test_features_on_a_gpu_that_is_made_up():
    class Net(nn.Module):
        dims = 64

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, device="cuda"))

        def forward(self, x):
            assert x.device.type == "cuda" and x.shape[1:] == (3, 299, 299)
            return (x * self.weight)[:, :1].expand(-1, 64, -1, -1)

    with FakeTensorMode(allow_non_fake_inputs=True):
        net = Net()
        with mock.patch.object(torch.Tensor, "numpy", lambda x: x):  # which a made-up tensor does not have
            assert fid.features(torch.zeros(205, 3, 28, 28, dtype=torch.uint8), net).shape == (205, 64)


def test_too_few_images_are_warned_of(recwarn):
    fid.warn.cache_clear()
    with pytest.warns(UserWarning, match="5 images for 10 dimensions.*too high"):
        fid.statistics(GOOD[0, 0, :5, :10])
    recwarn.clear()
    fid.statistics(GOOD[0, 0, :, :10])
    assert not recwarn
    with raises(data.Error, match="two"):
        fid.statistics(np.zeros((1, 10)))


def test_features_are_kept_under_images_and_weights(tmp_path, tiny, capsys):
    images, folder = bits(6, 3, 28, 28), tmp_path / "a" / "b"
    expected = fid.features(images, tiny)
    with mock.patch.object(fid, "features", side_effect=fid.features) as computed:
        for same in (images, images.permute(0, 2, 3, 1).numpy(),
                     images.contiguous(memory_format=torch.channels_last)):
            np.testing.assert_array_equal(fid.kept_features(same, tiny, folder), expected)
        assert computed.call_count == 1
        (path,) = folder.iterdir()
        whole = path.read_bytes()
        for broken in (whole[:100], b"", whole[:-4], b"PK\3\4 nonsense", os.urandom(500)):
            path.write_bytes(broken)
            np.testing.assert_array_equal(fid.kept_features(images, tiny, folder), expected)
            assert path.read_bytes() == whole
        assert computed.call_count == 6 and len([*folder.iterdir()]) == 1
        fid.kept_features(images + 1, tiny, folder)
        with mock.patch.object(tiny, "sha256", "4567"):
            fid.kept_features(images, tiny, folder)
        assert len([*folder.iterdir()]) == 3
    (tmp_path / "file").write_text("in the way")  # a folder that cannot be written: a line and on
    np.testing.assert_array_equal(fid.kept_features(images, tiny, tmp_path / "file"), expected)
    (line,) = capsys.readouterr().err.splitlines()
    assert "not kept" in line and str(tmp_path / "file") in line


# ---- fid.py: the protocol ----

def made_up(n, seed):
    return bits(n, 3, 28, 28, seed=seed)


def test_the_protocol_compares_draws_and_real_images(tmp_path, small, tiny, capsys):
    real = data.load(small)[0]
    with mock.patch.object(fid, "network", side_effect=AssertionError):  # built once, and passed on
        result = fid.protocol(made_up, real, runs=2, n=40, net=tiny, folder=tmp_path)
    printed, kept, expected = capsys.readouterr().out.splitlines(), fid.features(real, tiny), []
    for seed in (100, 200):
        rng = np.random.default_rng(seed)
        chosen = rng.choice(112, 40, replace=False)
        others = [k for k in rng.permutation([k for k in range(112) if k not in set(chosen)])][:40]
        one, fake = kept[chosen], fid.features(made_up(40, seed), tiny)
        moments = [(x.astype(float).mean(0), np.cov(x.astype(float).T)) for x in (one, fake, kept[others])]
        expected.append((fid.frechet_distance(*moments[0], *moments[1]),
                         fid.frechet_distance(*moments[0], *moments[2])))
    drawn, floor = zip(*expected, strict=True)
    assert [r["seed"] for r in result["runs"]] == [100, 200]
    assert [r["fid"] for r in result["runs"]] == approx(drawn, rel=1e-4)
    assert result["drawn"]["fid"]["mean"] == approx(np.mean(drawn), rel=1e-4)
    assert result["drawn"]["fid"]["std"] == approx(np.std(drawn, ddof=1), rel=1e-3)
    assert result["floor"]["fid"]["mean"] == approx(np.mean(floor), rel=1e-3)
    assert {*result["runs"][0]} == {"seed", *fid.MEASURES, "kid_std", "sampling_seconds", "measuring_seconds"}
    assert [result[k] for k in ("images", "of", "others", "floor_images")] == [40, 112, 40, [40, 40]]
    assert (result["dims"], result["weights"], result["weights_sha256"]) == (8, "tiny.pth", tiny.sha256)
    assert {*result["versions"]} == {"python", "torch", "torchvision", "numpy", "scipy"}
    assert printed == [f"seed {row['seed']}: " + "  ".join(f"{k} {row[k]:.4g}" for k in fid.MEASURES)
                       for row in result["runs"]]
    head, *rest = fid.text(json.loads(json.dumps(result))).splitlines()  # what a script prints after its file
    assert head == "2 x 40 of 112 images, 8 features, weights tiny.pth"
    assert [line.split("  ")[0] for line in rest] == [
        f"{k}: fid {result[k]['fid']['text']}" for k in ("drawn", "floor")]


def test_the_protocol_computes_the_real_features_that_it_needs(tmp_path, small, tiny):
    real, asked = data.load(small)[0], []

    def counted(images, net):
        asked.append(len(images))
        return features(images, net)

    features = fid.features
    with mock.patch.object(fid, "features", counted):
        fid.protocol(made_up, real, runs=1, n=5, net=tiny, folder=tmp_path)
        assert asked == [10, 5]  # the real ones of the draw and of the floor, then the drawn ones
        fid.protocol(made_up, real, runs=1, n=5, net=tiny, folder=tmp_path)
        assert asked == [10, 5, 5]  # they were kept
        fid.protocol(made_up, real, runs=1, n=60, net=tiny, folder=tmp_path)
        assert asked[3:] == [112, 60]
    for draw in (lambda n, seed: made_up(n, seed)[..., :24], lambda n, seed: made_up(n - 1, seed),
                 lambda n, seed: made_up(n, seed)[:, :1]):
        with raises(data.Error, match=r"\[\d, \d, 28, \d\d\].*\[5, 3, 28, 28\]"):
            fid.protocol(draw, real, runs=1, n=5, net=tiny, folder=tmp_path)


def test_the_floor_of_a_small_set_is_that_of_two_halves(tmp_path, small, tiny, capsys):
    real = data.load(small)[0]
    result = fid.protocol(made_up, real, runs=2, net=tiny, folder=tmp_path)
    assert "--fid-samples 112" in capsys.readouterr().out
    kept, expected = fid.features(real, tiny), []
    for seed in (100, 200):
        order = np.random.default_rng(seed).choice(112, 112, replace=False)
        expected.append(frechet(kept[order[:56]], kept[order[56:]]))
    assert result["floor"]["fid"]["mean"] == approx(np.mean(expected), rel=1e-3)
    assert (result["images"], result["others"], result["floor_images"]) == (112, 0, [56, 56])
    assert re.search(r"^floor \(two halves of 112\): fid [\d.]+ ± ", fid.text(result), re.M)
    result = fid.protocol(made_up, real, runs=1, n=110, net=tiny, folder=tmp_path)
    assert result["floor_images"] == [55, 55]  # two others are too few
    for n, images in ((80, [40, 40]), (70, [70, 42])):  # with fewer than half as many an FID would be high
        result = fid.protocol(made_up, real, runs=1, n=n, net=tiny, folder=tmp_path)
        assert result["floor_images"] == images
    result = fid.protocol(made_up, real[:5], runs=1, net=tiny, folder=tmp_path)
    assert result["floor"] == {} and "floor" not in fid.text(result)  # and so are halves of two


# ---- fid.py: the command ----

@pytest.fixture
def command(tiny, tmp_path, capsys, monkeypatch):
    """The command's output, with 8 features, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fid, "network", lambda dims, weights, device: tiny)

    def printed(*argv):
        capsys.readouterr()
        fid.main(words(*argv, "--device cpu"))
        return capsys.readouterr().out
    return printed


def test_fid_command_on_names_files_and_folders(tmp_path, small, tiny, command):
    images = np.load(small)["train_images"][:60]
    np.savez(tmp_path / "samples.npz", images=255 - images)
    folder = tmp_path / "folder"
    save_pictures(folder / "a", images[:30])
    save_pictures(folder / "b", images[30:])
    value = json.loads(command(tmp_path / "samples.npz", folder, "--json"))
    a, b = (fid.features(x, tiny) for x in (255 - images, images))
    assert value["fid"] == approx(frechet(a, b), rel=1e-3)
    precision, recall = fid.precision_recall(b, a)
    assert (value["precision"], value["recall"]) == (precision, recall)
    assert value["images"] == [60, 60] and value["size"] == [28, 28] and value["split"] == "all"
    assert (value["dims"], value["weights"], value["sha256"]) == (8, "tiny.pth", tiny.sha256)
    line = command(tmp_path / "samples.npz", folder)  # the features were kept
    measured = r"FID [\d.]+  KID \S+ ± \S+  precision \S+  recall \S+  \(.*8 features, weights tiny.pth\)\n"
    assert re.fullmatch(measured, line) and len([*(tmp_path / "out").iterdir()]) == 2
    with raises(data.Error, match="cells"):
        command(small, "cells")
    for wrong in (small, f"{small} {small} --save-stats x.npz", f"{small} {small} --dims 100",
                  f"{small} {small} --split none", f"{small} {small} --size 8", f"{small} {small} --few"):
        with raises(data.Error, match="--help") as error:
            command(wrong)
        assert error.value.code == 2


def test_one_set_of_pictures_has_one_reading(tmp_path, command):
    """28-pixel samples against pictures of 152 x 112: refused, then read as training reads them."""
    rng, cells = np.random.default_rng(0), tmp_path / "cells"
    blurred = [Image.fromarray(x).resize((152, 112)) for x in rng.integers(0, 256, (60, 7, 9, 3), np.uint8)]
    save_pictures(cells / "neutrophil", blurred)
    own = save_pictures(tmp_path / "samples", data.load(str(cells))[0].permute(0, 2, 3, 1))
    np.savez(tmp_path / "samples.npz", images=data.load(str(cells))[0].permute(0, 2, 3, 1))
    for a in (own, tmp_path / "samples.npz", "demo"):
        with raises(data.Error, match="28 x 28.*152 x 112.*--size N") as error:
            command(a, cells)
        assert error.value.code == 2 and not (tmp_path / "out").exists()
    for a in (own, tmp_path / "samples.npz"):
        value = json.loads(command(a, cells, "--size 28 --json"))
        assert value["fid"] == approx(0, abs=1e-4) and value["precision"] == value["recall"] == 1
        assert value["size"] == [28, 28]
    assert json.loads(command(cells, cells, "--json"))["size"] == [112, 152]  # the true ones, height first
    with raises(data.Error, match="--size 32.*28 x 28"):
        command(tmp_path / "samples.npz", cells, "--size 32")
    with raises(data.Error, match="--size 32.*demo"):
        command("demo", cells, "--size 32")
    save_pictures(cells / "platelet", [x[:90] for x in np.zeros((2, 112, 152, 3), np.uint8)])
    with raises(data.Error, match="2 sizes"):
        command(cells, cells)
    (tmp_path / "samples" / "model.pt").write_bytes(b"")  # a run's sheet is no cell
    with raises(data.Error, match="holds a run"):
        command(own, cells, "--size 28")


def test_16_bits_and_grey_go_into_the_fid_as_they_are(tmp_path, command):
    images = np.load(fake_set(tmp_path / "x.npz", (60, 1, 1), size=32, channels=1))["train_images"]
    a, b = save_pictures(tmp_path / "a", images), tmp_path / "b"
    save_pictures(b, images.astype(np.uint16) * 257, "tif")
    save_pictures(tmp_path / "c", np.repeat(images[..., None], 3, 3))
    for other in (b, tmp_path / "c"):
        value = json.loads(command(a, other, "--json"))
        assert value["fid"] == approx(0, abs=1e-5) and value["precision"] == value["recall"] == 1
    (b / "bad.tif").write_bytes(b"no picture")
    with raises(data.Error, match="bad.tif"):
        command(b, a)
    with raises(data.Error, match="no pictures"):
        command(a, tmp_path / "out")


def test_fewer_than_50_images_are_a_warning(tmp_path, small, command):
    few = save_pictures(tmp_path / "few", np.load(small)["train_images"][:10])
    fid.warn.cache_clear()
    with pytest.warns(UserWarning, match="few: only 10 images"):
        assert "FID" in command(few, small)
    save_pictures(tmp_path / "three", np.load(small)["train_images"][:3])
    with raises(data.Error, match="more than 3"):
        command(tmp_path / "three", small)


def test_the_split_is_that_of_the_sets_that_have_splits(tmp_path, small, tiny, command):
    parts = {s: np.load(small)[f"{s}_images"] for s in data.SPLITS}
    np.savez(tmp_path / "samples.npz", images=parts["train"][:20])
    for split, part in (("train", parts["train"]), ("test", parts["test"])):
        folder = tmp_path / "split" / split / "cell"
        save_pictures(folder, part)
    save_pictures(tmp_path / "plain", parts["train"][:20])
    (tmp_path / "p").symlink_to("plain")
    of_plain = len(data.load("plain", split="test")[0])
    for a, b, counts in (("samples.npz", small, [20, 8]), (small, small, [8, 8]), ("plain", small, [20, 8]),
                         ("split", small, [8, 8]), (small, "split", [8, 8]), ("p", "p", [20, of_plain])):
        value = json.loads(command(a, b, "--split test --json"))
        assert value["images"] == counts and value["split"] == "test", (a, b)
    expected = frechet(fid.features(parts["train"][:20], tiny), fid.features(parts["test"], tiny))
    value = json.loads(command("samples.npz", small, "--split test --json"))
    assert value["fid"] == approx(expected, rel=1e-3)
    value = json.loads(command(small, "plain", "--split train --json"))  # B's part, as in a training
    assert value["images"] == [96, len(data.load("plain", split="train")[0])]
    command(small, "--split test --save-stats test.npz")
    mu = fid.features(parts["test"], tiny).mean(0)
    np.testing.assert_allclose(np.load("test.npz")["mu"], mu, rtol=1e-3)


def test_statistics_files_go_to_pytorch_fid_and_come_from_it(tmp_path, small, tiny, command):
    ours, theirs = tmp_path / "ours.npz", tmp_path / "theirs.npz"
    kept = fid.features(data.load(small)[0], tiny)
    np.savez(theirs, mu=kept.mean(0) + 1, sigma=np.cov(kept.T))  # as pytorch-fid --save-stats does
    command(small, "--save-stats", ours)
    with np.load(ours) as a, np.load(theirs) as b:
        reference = reference_distance(a["mu"], a["sigma"], b["mu"], b["sigma"])
        assert str(a["weights"]) == tiny.sha256
    value = json.loads(command(ours, theirs, "--json"))
    assert value["fid"] == approx(reference, rel=1e-3) == approx(8, rel=1e-3) and "kid" not in value
    assert json.loads(command(small, ours, "--json"))["fid"] == approx(0, abs=1e-4)
    assert re.fullmatch(r"FID [\d.e-]+  \(.*tiny.pth\)\n", command(small, ours))
    with mock.patch.object(fid, "network", side_effect=AssertionError):  # two of them need no weights
        assert command(ours, theirs).startswith("FID 8")
    np.savez(theirs, mu=kept.mean(0), sigma=np.cov(kept.T), weights="another hash")
    for a in (small, ours):  # a figure that would mean nothing
        with raises(data.Error, match="different weights"):
            command(a, theirs)
    np.savez(theirs, mu=kept.mean(0)[:5], sigma=np.cov(kept.T)[:5, :5])
    with raises(data.Error, match="theirs.npz holds 5 features, not the 8 of --dims"):
        command(small, theirs)
    with raises(data.Error, match="do not go together"):
        command(ours, theirs)
    with raises(data.Error, match="--split test: .*ours.npz holds statistics"):
        command(small, ours, "--split test")
    theirs.write_bytes(ours.read_bytes()[:-100])
    with raises(data.Error, match="theirs.npz"):
        command(small, theirs)


def test_statistics_replace_nothing(tmp_path, small, command):
    for name in ("model.pt", "there.npz"):
        (tmp_path / name).write_bytes(b"a year's work")
        with raises(data.Error, match=f"--save-stats.*{name}") as error:
            command(small, "--save-stats", tmp_path / name)
        assert (tmp_path / name).read_bytes() == b"a year's work" and error.value.code == 2
    with raises(data.Error, match="--save-stats.*stats"):
        command(small, "--save-stats", tmp_path / "stats")
    assert not (tmp_path / "out").exists()  # it is said before anything is computed


def test_an_unwritable_cache_and_a_stdout_without_plus_minus_lose_nothing(tmp_path, small, stem_file):
    """As a user runs it: the line comes all the same."""
    (tmp_path / "out").write_text("in the way")
    argv = words(small, small, "--dims 64 --device cpu --split test --weights", stem_file)
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    argv = [sys.executable, HERE / "fid.py", *argv]
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"FID \S+  KID \S+ \? \S+  precision 1  recall 1  .*\n", done.stdout)
    assert "not kept" in done.stderr and "Traceback" not in done.stderr


@needs_data
@needs_weights
def test_real_cells_are_near_the_whole_set_and_far_from_noise():
    images, net = data.load(root=ROOT)[0], fid.network(768, WEIGHTS, "cpu")
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:24]
    with np.load(HERE / "assets" / "bloodmnist-768.npz") as file:  # the whole set's, as they come along
        assert str(file["weights"]) == net.sha256
        whole = file["mu"], file["sigma"]
    near, far = (fid.frechet_distance(*whole, *fid.statistics(fid.features(x, net)))
                 for x in (images[chosen], bits(4, 3, 28, 28)))
    assert near < 0.6 and far > 5 * near  # 24 images leave a bias; all of them give 0.005


# ---- bench/ and bench.sh ----

@each_script
def test_the_plain_loop_trains_the_same_model(script):
    """The tutorial's loop, with which bench.speed compares, sees each image once and its loss falls."""
    images = bits(96, 3, 28, 28)
    seen = torch.cat(list(speed.plain_loader(images, 32)))
    assert sorted((255 * seen).round().sum((1, 2, 3)).tolist()) == sorted(images.sum((1, 2, 3)).tolist())
    torch.manual_seed(0)
    assert speed.plain_training(script, images[:16], torch.device("cpu")) > 0


def test_speed_reads_what_the_scripts_print_and_log(tmp_path):
    args = mock.Mock(out=tmp_path, data="demo", root=None, device=torch.device("cpu"), rounds=1)
    bench = speed.Bench(args)
    assert bench.sampled(dcgan, 8, "--ckpt", "pretrained") > 0 and bench.peak > 100
    log = bench.work / "cvae" / "log.csv"
    log.parent.mkdir()
    with mock.patch.object(bench, "script") as script:
        script.side_effect = lambda *flags: log.write_text("epoch,seconds,images/s\n1,3,4\n2,4,5.5\n")
        assert bench.trained(cvae, 96) == 5.5
    flags = script.call_args[0][1:]
    assert flags[flags.index("--epochs") + 1] == 2 and len(data.load(flags[1], split="train")[0]) == 96


# ---- bench/trust.py ----

@pytest.fixture
def trusted(stem_file, tmp_path, capsys):
    """What bench.trust prints, with 64 features. Its results go to tmp_path/out/trust."""
    def result(*argv):
        capsys.readouterr()
        out = tmp_path / "out" / "trust"
        trust.main(words(*argv, f"--dims 64 --weights {stem_file} --device cpu --out {out}"))
        printed = json.loads(capsys.readouterr().out)
        assert printed == json.loads((out / f"{printed['what']}.json").read_text())
        return printed
    return result


def test_floors_are_distances_between_real_images(stem_file, trusted, tmp_path):
    small = fake_set(tmp_path / "small.npz", n=(44, 4, 8))
    result = trusted("floors", small, "--images 20")
    net, images = fid.network(64, stem_file, "cpu"), data.load(small)[0]
    kept, order = fid.features(images, net), np.random.default_rng(100).permutation(56)
    floors = result["floors"]
    parts = approx(frechet(kept[:44], kept[48:]), rel=1e-3)
    assert floors["train part (44) against test part (8)"]["mean"] == parts
    halves = floors["two disjoint draws of 28"]
    assert halves["runs"][0] == approx(frechet(kept[order[:28]], kept[order[28:]]), rel=1e-3)
    assert len(floors["two disjoint draws of 20"]["runs"]) == 5
    fault = next(v for k, v in floors.items() if "fault" in k)["mean"]
    drawn = np.random.default_rng(100).choice(56, 20, replace=False)
    with mock.patch.object(fid, "check_images", torch.as_tensor):  # which refuses this range
        wrong = fid.features(images[drawn].float() / 127.5 - 1, net)
    assert fault == approx(frechet(kept[drawn], wrong), rel=1e-3) and fault > 5 * halves["mean"]
    assert result["weights_sha256"] == net.sha256 and result["a"] == small
    two = np.load(small)
    np.savez(tmp_path / "two.npz", **{k: two[k] for k in two if not k.startswith("val")})
    without = trusted("floors", tmp_path / "two.npz", "--images 20")["floors"]
    assert without["train part (44) against test part (8)"]["mean"] == parts


def test_neighbours_find_copies(tmp_path, trusted):
    real = fake_set(tmp_path / "real.npz", n=(48, 8, 60), seed=3, change={"val_images": None})
    train, made = data.load(real, split="train")[0], data.load(fake_set(tmp_path / "made.npz", seed=9))[0]
    for images, copied in ((made[:24], 0), (torch.cat([made[:12], train[:12]]), 12)):
        pixels = images.permute(0, 2, 3, 1).numpy()
        np.savez(tmp_path / "a.npz", images=pixels)
        result = trusted("neighbours", tmp_path / "a.npz", real)
        share = next(v for k, v in result.items() if k.startswith("share"))
        assert result["pixel-identical to a training image"] == copied
        assert share >= 0.5 if copied else share < 0.2
    np.savez(tmp_path / "turned.npz", images=train[:12].transpose(2, 3).flip(3).permute(0, 2, 3, 1).numpy())
    for flags, copied in (("", 0), ("--augment", 12)):
        turned = trusted("neighbours", tmp_path / "turned.npz", real, flags)
        assert turned["pixel-identical to a training image"] == copied
    trusted("neighbours", tmp_path / "a.npz", real)
    with Image.open(tmp_path / "out" / "trust" / "neighbours.png") as picture:
        assert picture.height == 2 * 87 and picture.width > 8 * 87
        shown = np.asarray(picture.convert("RGB"))[:, picture.width - 8 * 87:]
    assert (shown[:84, :84] == shown[87:171, :84]).all()  # the closest one is a copy
    again = trusted("neighbours", save_pictures(tmp_path / "pictures", pixels), real)
    assert again | {"a": 0} == result | {"a": 0}
    big = fake_set(tmp_path / "big.npz", size=32)
    with mock.patch.object(fid, "features"), raises(data.Error, match="32, 32"):
        trusted("neighbours", big, real)  # before any feature is computed
    save_pictures(tmp_path / "pictures" / "more", np.zeros((1, 32, 32, 3), np.uint8))
    with raises(data.Error):
        trusted("neighbours", tmp_path / "pictures", real)


def test_neighbours_of_known_features():
    """On a line: training images at 0 and 10, held-out ones at 1 to 100 from the nearest."""
    line = lambda *x: torch.tensor(x, dtype=torch.float)[:, None]  # noqa: E731
    held_out = line(*range(11, 111))
    result, near, which = trust.copies(line(-0.5, 0.1, 10.2, 14), line(0, 10), held_out)
    assert near.tolist() == approx([0.5, 0.1, 0.2, 4]) and which.tolist() == [0, 0, 1, 1]
    share = next(v for k, v in result.items() if k.startswith("share"))
    assert share == 0.75  # the closest 1 % of 1 .. 100 lie below 1.99


def shades(path, side=16):
    """A set of two classes, dark and bright, without a val part, and its images and labels."""
    labels = np.random.default_rng(0).integers(0, 2, 100)
    noise = np.random.default_rng(1).normal(0, 20, (100, side, side, 3))
    images = np.clip(60 + 120 * labels[:, None, None, None] + noise, 0, 255).astype(np.uint8)
    cut = {"train": slice(62), "test": slice(62, 100)}
    both = {"images": images, "labels": labels[:, None]}
    parts = {f"{s}_{k}": v[c] for s, c in cut.items() for k, v in both.items()}
    np.savez(path, class_names=["dark", "bright"], **parts)
    return images[:40], labels[:40]


def test_the_accuracy_score_tells_right_labels_from_wrong(tmp_path, trusted, monkeypatch):
    monkeypatch.setattr(trust, "SEEDS", (1,))
    images, right = shades(tmp_path / "real.npz")
    sets = tmp_path / "a.npz", tmp_path / "real.npz"
    for labels, share in ((right, 1), (1 - right, 0)):
        np.savez(sets[0], images=images, labels=labels)
        result = trusted("cas", *sets, "--steps 40")
        assert result["images"] == 40 and len(result["real name generated"]["of each class"]) == 2
        for who, wanted in (("real name held-out", 1), ("as many real name held-out", 1),
                            ("real name generated", share), ("generated name held-out", share)):
            assert result[who]["all"]["mean"] == approx(wanted, abs=0.05), who
    np.savez(sets[0], images=images)
    with raises(data.Error, match="no labels.*--classes"):
        trusted("cas", *sets)
    np.savez(sets[0], images=images, labels=1 - right, class_names=["bright", "dark"])
    theirs = data.load(sets[0])
    assert trust.labelled("a", "b", ["dark", "bright"], *theirs)[1].tolist() == right.tolist()  # by name
    for names, wanted in ((["0", "10", "1"], [0, 2]), (["a", "b"], [0, 1])):  # numbers that are names, or not
        found = trust.labelled("a", "b", names, theirs[0][:2], torch.tensor([0, 1]), ["0", "1"])
        assert found[1].tolist() == wanted
    np.savez(sets[0], images=images, labels=right, class_names=["dark", "pale"])
    with raises(data.Error, match="no class pale; it has dark, bright"):
        trusted("cas", *sets)
    with raises(data.Error, match="two"):
        trusted("cas", sets[0])
    padded = np.pad(images, [(0, 0), (2, 2), (2, 2), (0, 0)])
    np.savez(sets[0], images=padded, labels=right, class_names=["dark", "bright"])
    for what in ("cas", "neighbours"):
        with raises(data.Error, match=r"a.npz holds images \[3, 20, 20\], .*real.npz \[3, 16, 16\]"):
            trusted(what, *sets)
    for k, name in enumerate(("dark", "bright")):
        save_pictures(tmp_path / "lab" / "train" / name, images[right == k])
        save_pictures(tmp_path / "lab" / "test" / name, images[right == k][:3])
    assert trusted("cas", sets[0], tmp_path / "lab", "--steps 2")["of as many real"] == 40  # at 20 x 20
    parts = {k: v for k, v in np.load(sets[1]).items() if k != "class_names"}
    np.savez(sets[1], **parts | {"test_labels": np.full((38, 1), 2)})
    np.savez(sets[0], images=images, labels=right)
    with raises(data.Error, match="test part has a class 2, its train part 2 classes"):
        trusted("cas", *sets)


def test_a_folder_without_a_val_part_can_be_trusted(tmp_path, trusted):
    images, labels = shades(tmp_path / "real.npz", 28)
    for k, image in enumerate(images[:24]):
        folder = tmp_path / "lab" / ("Testing" if k % 2 else "Training") / str(labels[k])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{k}.png")
    result = trusted("neighbours", tmp_path / "lab", tmp_path / "lab")
    assert result["images"] == 24 and result["pixel-identical to a training image"] == 12
    assert list(trusted("floors", tmp_path / "lab")["floors"])[0] == "train part (12) against test part (12)"


def test_a_classifier_is_fixed_by_its_seed_and_learns_on(tmp_path):
    images, labels = map(torch.from_numpy, shades(tmp_path / "real.npz"))
    images = images.permute(0, 3, 1, 2)
    one, same, other = (trust.classifier(images, labels, 2, 20, seed) for seed in (1, 1, 2))
    assert torch.equal(one[0].weight, same[0].weight) and not torch.equal(one[0].weight, other[0].weight)
    assert trust.classifier(images, labels, 2, 20, 1, net=same) is same
    assert not torch.equal(one[0].weight, same[0].weight)
    only_dark = trust.classifier(images, labels, 2, 20, 1, weight=torch.tensor([1.0, 0.0]))
    assert trust.accuracy(trust.classify(only_dark, images), labels) == [1, 0]


def test_average_precision_counts_the_images_that_stand_above():
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])
    found, labels = torch.stack([1 - scores, scores], 1), torch.tensor([1, 0, 1, 0, 0])
    assert trust.average_precision(found, labels) == approx([(1 + 1 + 3 / 4) / 3, (1 + 2 / 3) / 2])
    found = torch.rand(200, 3, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.arange(200) % 3
    brute = [np.mean([(labels[found[:, k] >= x] == k).double().mean() for x in found[labels == k, k]])
             for k in range(3)]
    assert trust.average_precision(found, labels) == approx(brute)


def test_turns_are_the_eight_that_augment_makes():
    images = torch.arange(2 * 3 * 25).reshape(2, 3, 5, 5)
    wanted = [np.rot90(x, k, (2, 3)) for x in (images.numpy(), images.numpy()[:, :, ::-1]) for k in range(4)]
    assert sorted(pixels(trust.turns(images))) == sorted(y.tobytes() for x in wanted for y in x)


# ---- bench/scarce.py ----

def kinds(path, n=60):
    """A set of three types, and a file of 30 samples with its own order of the types."""
    images, rng = bits(3 * n, 28, 28, 3, seed=5).numpy(), np.random.default_rng(0)
    labels = rng.integers(0, 3, (n, 1))
    parts = {f"{s}_{k}": v for i, s in enumerate(data.SPLITS) for k, v in
             (("images", images[i * n:(i + 1) * n]), ("labels", labels))}
    np.savez(path / "real.npz", class_names=["red", "green", "blue"], **parts)
    made = bits(30, 28, 28, 3, seed=6).numpy()
    np.savez(path / "samples.npz", images=made, labels=[0, 1] * 15, class_names=["green", "red"])
    return path / "real.npz"


def pixels(images):
    return [image.numpy().tobytes() for image in images]


def test_the_generator_sees_the_cells_that_are_left_and_no_others(tmp_path):
    real = kinds(tmp_path)
    x, y, names = data.load(real, split="train")
    mine, others = pixels(x[y == 1]), pixels(x[y != 1])
    found = {}
    for choice in (0, 1):
        for left in (0, 7):
            out = tmp_path / f"few-{choice}-{left}.npz"
            which = f"--type green --left {left} --choice {choice}"
            scarce.main(words(f"prepare --data {real} {which} --out {out}"))
            images, labels, classes = data.load(out, split="train")
            assert classes == names and sorted(pixels(images[labels != 1])) == sorted(others)
            found[choice, left] = pixels(images[labels == 1])
            assert len(set(found[choice, left])) == left and set(found[choice, left]) <= set(mine)
            for part in ("val", "test"):
                a, b = data.load(out, split=part), data.load(real, split=part)
                assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert set(found[0, 7]) != set(found[1, 7])
    few, rest = scarce.split(y, 1, 7, 0)
    assert pixels(x[few]) == found[0, 7] and sorted(found[0, 7] + pixels(x[rest])) == sorted(mine)
    with raises(data.Error, match="--left 61: there are"):
        scarce.main(words(f"prepare --data {real} --type green --left 61 --out {tmp_path / 'x.npz'}"))
    with raises(data.Error, match="prepare needs --type, --left, --out"):
        scarce.main(["prepare"])


@pytest.fixture
def taught(monkeypatch):
    """What bench.scarce has its classifiers learn, [(images, labels, steps, seed, weight, net)]. Each names
    0.8 of the first type right, of the others as many thousandths as it has learned images."""
    calls = []

    def classifier(images, labels, classes, steps, seed, device, weight=None, net=None):
        calls.append((images, labels, steps, seed, weight, net))
        return len(images)

    monkeypatch.setattr(trust, "classifier", classifier)
    monkeypatch.setattr(trust, "classify", lambda net, x: net)
    monkeypatch.setattr(scarce, "tuned", lambda kind, val, test: {
        "tuned_mean": (kind + len(val[1]) + test[0]) / 1000})
    monkeypatch.setattr(trust, "accuracy", lambda n, y: (
        n.tolist() if torch.is_tensor(n) else [0.8, n / 1000, n / 1000]))
    monkeypatch.setattr(trust, "average_precision", lambda n, y: [0.9, n / 500, 0])
    return calls


def test_rows_are_of_the_cells_left_repeats_and_samples_and_are_kept(tmp_path, taught):
    real, kept = kinds(tmp_path), tmp_path / "rows.json"
    x, y, _ = data.load(real, split="train")
    few, _ = scarce.split(y, 1, 7, 0)
    common = f"rows --data {real} --type 1 --left 7 --rows {kept} --part val"
    made = f"--samples {tmp_path / 'samples.npz'} --generator ddpm"
    scarce.main(words(f"{common} --seeds 1 --repeats 0 17 --counts 0 4 {made}"))
    left, samples = torch.cat([x[y != 1], x[few]]), data.load(tmp_path / "samples.npz")[0][::2]
    for call, repeats, count in zip(taught, (0, 0, 17, 17), (0, 4, 0, 4), strict=True):
        images, labels, *rest = call
        assert pixels(images) == pixels(left) + pixels(x[few.repeat(3)[:repeats]]) + pixels(samples[:count])
        assert rest == [1500, 1, None, None] and (labels == 1).sum() == 7 + repeats + count
    assert all("tuned_mean" not in row for row in json.loads(kept.read_text()))  # it is chosen on this part
    rows, n = json.loads(kept.read_text()), len(left) / 1000
    assert rows[0] == {"data": "real", "type": "green", "left": 7, "choice": 0, "generator": "", "before": "",
                       "steps": 1500, "repeats": 0, "samples": 0, "weighted": False, "part": "val", "seed": 1,
                       "accuracy": n, "mean": approx((0.8 + 2 * n) / 3, abs=1e-5),
                       "average_precision": 2 * n, "types": {"red": 0.8, "green": n, "blue": n},
                       "average_precisions": {"red": 0.9, "green": 2 * n, "blue": 0},
                       "by_frequency": approx((1000 * n / taught[0][1].bincount()).mean().item(), abs=1e-5),
                       "of": rows[2]["of"]}
    assert rows[1]["of"][0] == rows[0]["of"][0] and len(rows[1]["of"]) == 2
    assert rows[1]["generator"] == "ddpm" and rows[1]["samples"] == 4
    scarce.main(words(f"{common} --repeats 0 30 --seeds 1"))  # what is there is not computed again
    assert len(taught) == 5 and len(taught[-1][0]) == len(left) + 30
    scarce.main(words(f"{common} --weighted --seeds 1"))
    assert taught[-1][4] * taught[-1][1].bincount() == approx(torch.ones(3))
    common = f"rows --data {real} --rows {kept} --type 2"
    scarce.main(words(f"{common} --left 7 --seeds 1"))  # the best of the val part: most images, here
    assert len(taught) == 7 and len(taught[-1][0]) == (y != 2).sum() + 7 + 30
    row = json.loads(kept.read_text())[-1]
    assert row["part"] == "test" and row["tuned_mean"] == (2 + 60 + len(taught[-1][0])) / 1000
    share = taught[-1][1].bincount() / len(taught[-1][0])
    assert row["by_frequency"] == approx((1 / share).mean().item(), abs=1e-5)
    for flags, said in (("--left 8", "no comparable results on val"), ("", "rows needs --left"),
                        (f"--left 7 --counts 40 {made}", "--counts 40: there are ")):
        with raises(data.Error, match=said):
            scarce.main(words(common, flags))
    inverted = {part: (255 - x, y) for part in data.SPLITS}  # another set of that name, of any type or none
    (tmp_path / "b").mkdir()
    scarce.save(tmp_path / "b" / "real.npz", ["red", "green", "blue"], inverted)
    for flags in ("--type 0 --left 5", ""):
        with raises(data.Error, match="results of other cells or samples under these names"):
            scarce.main(words(f"rows --data {tmp_path / 'b' / 'real.npz'} --rows {kept} --counts 0", flags))
    images, labels, names = data.load(tmp_path / "samples.npz")
    pixels_of = images.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "samples.npz", images=255 - pixels_of, labels=labels, class_names=names)
    common = f"rows --data {real} --type 1 --left 7 --rows {kept} --part val --seeds 1"
    with raises(data.Error, match="results of other cells or samples under these names"):
        scarce.main(words(f"{common} --counts 4 {made}"))
    np.savez(tmp_path / "samples.npz", images=pixels_of)
    with raises(data.Error, match="holds no labels"):
        scarce.main(words(f"{common} --counts 4 {made}"))
    _, _, names = data.load(real)
    for missing in (2, 0):
        other = (x[y != missing], y[y != missing])
        scarce.save(tmp_path / "none.npz", names, {"train": (x, y), "val": other, "test": (x, y)})
        with raises(data.Error, match="none.npz: its val part has no "):
            scarce.main(words(f"rows --data {tmp_path / 'none.npz'} --type 2 --left 7"))
    scarce.save(tmp_path / "none.npz", names, {"train": (x, y), "val": (x, y), "test": other})
    with raises(data.Error, match="has no .* in its test part"):
        scarce.main(words(f"rows --data {tmp_path / 'none.npz'} --type 0 --left 7"))
    scarce.save(tmp_path / "none.npz", names, {"train": other, "val": (x, y), "test": (x, y)})
    with raises(data.Error, match="its test part has .*, which its train part has not"):
        scarce.main(words(f"rows --data {tmp_path / 'none.npz'} --counts 0"))
    for content in ("{}", "[1]", '{"a": 1}', '[{"part": "test"}]', "[", "7"):
        kept.write_text(content)
        with raises(data.Error, match="damaged, or holds other things"):
            scarce.main(words(common, "--counts 0"))
        assert kept.read_text() == content
    kinds(tmp_path)
    for flags, said in (("rows --left 7", "--left 7 needs --type"),
                        ("table --rows nowhere.json", "no results"),
                        (f"prepare --data {real} --type 1 --left 7 --out {real}", "--out .*a new .npz"),
                        (f"picture --data {real} --sets {real} --out {real}", "--out .*a new .png"),
                        (f"{common} --counts 4", "--counts 4: there are 0 samples of green; see --samples"),
                        (f"{common} --repeats 3 {made}", "needs --counts"),
                        (f"move --data {real} --left 0 --out x.npz", "--left 0: it can be 1 or more"),
                        (f"named --data {real} --type blue --left 1 --out x.json --sets "
                         f"{tmp_path / 'samples.npz'}", "samples.npz has no blue"),
                        (f"move --data {real} --left 500 --out x.npz", "--left 500: the test part of ")):
        with raises(data.Error, match=said):
            scarce.main(words(flags))


def test_a_tuned_classifier_names_a_type_as_readily_as_is_best_on_the_val_part():
    def part(labels, *odds):  # log-odds for type 1 against 0
        odds = torch.tensor(odds)
        return torch.stack([-odds, odds], 1).mul(0.5).softmax(1), torch.tensor(labels)

    def means(val, test):
        found = scarce.tuned(1, val, test)
        return found["tuned_mean"], found["tuned_with"]

    val = part([1, 1, 1, 1, 0, 0], 3.0, 1, -0.5, -1.2, -3, -4)
    assert np.mean(trust.accuracy(*val)) == 0.75 and means(val, val)[0] == 1
    assert means(val, part([1, 0], -1.2, -1.3))[0] == 1  # the constant is 1.25
    assert means(val, part([1, 0], -1.3, -1.2))[0] == 0
    assert means(part([1, 0], 1.0, -1.0), part([1, 0], 0.1, -0.1))[0] == 1  # it is 0
    # of 50 cells one needs the constant 1.25: all 50 show it, and a draw of n does in n / 50 of the draws
    mean, fewer = means(part([1] * 50 + [0], *[3.0] * 49, -1.2, -3), part([1, 0], -1.2, -1.3))
    assert mean == 1 and [*fewer] == ["10", "20", "50"] and fewer["50"] == 1
    assert fewer["10"] == approx(0.5 + 0.5 * 10 / 50, abs=0.1) and fewer["20"] == approx(0.7, abs=0.1)
    assert [*means(part([1] * 49 + [0], *[3.0] * 49, -3), part([1, 0], 1.0, -1.0))[1]] == ["10", "20"]


def test_without_a_type_nothing_is_left_out_and_a_rival_learns_first(tmp_path, taught):
    real, kept = kinds(tmp_path), tmp_path / "rows.json"
    few = tmp_path / "mild-4-c1.npz"
    scarce.main(words(f"move --data {real} --left 4 --choice 1 --out {few}"))
    scarce.main(words(f"rows --data {few} --counts 0 20 --repeats 5 --seeds 3 --rows {kept} --before {real}"
                      f" --samples {tmp_path / 'samples.npz'} --generator ddpm"))
    first, plain, more = taught
    assert pixels(first[0]) == pixels(data.load(real, split="train")[0]) and first[5] is None
    assert [len(call[0]) for call in (plain, more)] == [17, 37] and plain[5] == more[5] == 60
    assert plain[1].bincount().tolist() == [4 + 2, 4 + 2, 4 + 1]  # five repeats, of each type in turn
    assert more[1].bincount().tolist() == [6 + 10, 6 + 10, 5]
    rows = json.loads(kept.read_text())
    assert {k: rows[1][k] for k in ("data", "type", "left", "choice", "before")} == {
        "data": "mild-4", "type": None, "left": None, "choice": 1, "before": str(real)}
    assert rows[0]["accuracy"] == rows[0]["mean"]
    data.save_samples(tmp_path / "run", *data.load(tmp_path / "samples.npz"), png=True)  # read class by class
    scarce.main(words(f"rows --data {few} --counts 6 --seeds 3 --rows {tmp_path / 'other.json'}"
                      f" --samples {tmp_path / 'run' / 'samples'} --generator ddpm"))
    assert taught[-1][1].bincount().tolist() == [4 + 3, 4 + 3, 4]
    parts = {part: data.load(real, split=part)[:2] for part in data.SPLITS}
    scarce.save(real, ["red", "green", "blue"], {part: (255 - x, y) for part, (x, y) in parts.items()})
    with raises(data.Error, match="results of other cells or samples"):  # what was learned first
        scarce.main(words(f"rows --data {few} --repeats 5 --seeds 3 --rows {kept} --before {real}"))
    few.unlink()
    scarce.main(words(f"move --data {real} --left 4 --choice 1 --out {few}"))
    with raises(data.Error, match="results of other cells or samples"):  # no table shall compare the two
        scarce.main(words(f"rows --data {few} --counts 0 --repeats 7 --seeds 3 --rows {kept}"))


def test_moved_cells_are_the_test_parts_and_moved_as_it_says(tmp_path):
    real = kinds(tmp_path)
    x, y, _ = data.load(real, split="test")
    for how in ("mild", "strong"):
        moved = dict(zip(pixels(scarce.moved(x, how)), y.tolist(), strict=True))
        held_out = {part: set() for part in data.SPLITS}
        for choice in range(3):
            out = tmp_path / f"{how}-{choice}.npz"
            scarce.main(words(f"move --data {real} --how {how} --left 4 --choice {choice} --out {out}"))
            images, labels, _ = data.load(out)
            assert labels[:12].bincount().tolist() == [4, 4, 4]
            assert dict(zip(pixels(images), labels.tolist(), strict=True)) == moved  # each cell once
            for part in data.SPLITS:
                held_out[part] |= set(pixels(data.load(out, split=part)[0]))
        assert not held_out["val"] & held_out["test"] and len(held_out["train"]) > 12
    shades = torch.tensor([0, 60, 200], dtype=torch.uint8)[:, None, None, None].expand(3, 3, 28, 28)
    assert (scarce.moved(shades, "strong")[:, :, 14, 14] == torch.tensor([255, 195, 55])[:, None]).all()
    red = torch.zeros(1, 3, 28, 28, dtype=torch.uint8)
    red[:, 0] = 240  # hue 0: a quarter of the circle on it is (120, 240, 0), whose mean 120 becomes 135
    assert (scarce.moved(red, "strong")[0, :, 0, 0] - torch.tensor([135, 255, 15])).abs().max() <= 2
    half = torch.cat([shades[1:2, :, :, :14], shades[2:, :, :, :14]], 3)
    mild = scarce.moved(half, "mild")[0, 0, 14].float()
    assert mild[27] - mild[0] == approx(0.8 * 140, abs=2)
    assert mild[0] + 5 < mild[13] < mild[14] < mild[27] - 5  # blurred


def test_the_table_of_scarce_cells(tmp_path, capsys):
    rows, file = [], tmp_path / "rows.json"

    def add(part, kind, accuracies, generator="", repeats=0, samples=0, steps=1500):
        for choice, values in enumerate(accuracies):
            for seed, value in enumerate(values):
                rows.append({"data": "d", "type": kind, "left": kind and 50, "choice": choice, "before": "",
                             "generator": generator, "steps": steps, "repeats": repeats, "samples": samples,
                             "weighted": False, "part": part, "seed": seed, "accuracy": value,
                             "mean": value / 2, "types": {"red": value, "green": 0.9 + seed / 5},
                             "average_precision": value / 4, "average_precisions": {"green": 0.3}})

    add("val", "red", [[0.7]], repeats=500)
    add("val", "red", [[0.6, 0.9]])  # 0.9 is not compared: the other setting has no second network
    add("val", "red", [[0.8]], repeats=500, samples=250, generator="ddpm")
    add("val", "red", [[0.6]], repeats=500, samples=500, generator="ddpm")
    add("test", "green", [[0.5, 0.7], [0.5, 0.5]], repeats=500)  # 0.6 and 0.5: 0.55 ± 0.071
    add("test", "green", [[0.7, 0.8], [0.5, 0.6]], repeats=500, samples=250, generator="ddpm")
    add("test", "green", [[0.99]], repeats=500, steps=3000)  # not what is compared
    add("test", None, [[0.2, 0.4]])
    for row, value in zip([r for r in rows if r["repeats"] == 500 and r["part"] == "test"], (0.1, 0.2, 0.6),
                          strict=False):  # the first three networks, of two choices
        row |= {"tuned_mean": value, "by_frequency": value + 1,
                "tuned_with": {"10": 3, "20": 4, "50": value + 5}}
    file.write_text(json.dumps(rows))
    scarce.main(words(f"table --rows {file}"))
    text = capsys.readouterr().out
    for kind, setting, values in (
            ("green, 50 left", "**real cells, 500 repeats**",
             "0.55 ± 0.071 | 0.275 ± 0.035 | 1.375 ± 0.32 | 0.375 ± 0.32 | 0.1375 ± 0.018 | 2 x 2"),
            ("green, 50 left", "**real cells, 500 repeats**",
             "0.275 ± 0.035 | 1.375 ± 0.32 | 3 ± 0 | 4 ± 0 | 5.375 ± 0.32 | 0.375 ± 0.32 | 2 x 1.5"),
            ("green, 50 left", "**real cells, 500 repeats, 250 samples of ddpm**",
             "0.65 ± 0.14 (+0.100 ± 0.071) | 0.325 ± 0.071 (+0.050 ± 0.035) |  |  | "
             "0.1625 ± 0.035 (+0.025 ± 0.018) | 2 x 2"),  # 0.15 and 0.05
            ("green, 50 left", "real cells, 500 repeats, 3,000 steps", "0.99 | 0.495 |  |  | 0.2475 | 1 x 1"),
            ("d, all", "real cells", "0.15 | 0.075 | 1 x 2"),
            ("green, all", "real cells; ± over networks", "1 ± 0.14 | 0.15 ± 0.071 |  |  | 0.3 ± 0 | 1 x 2")):
        assert f"| {kind} | {setting} | {values} |\n" in text
    assert text.startswith((tmp_path / "test.md").read_text())
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes
    with mock.patch.object(Axes, "errorbar", autospec=True, side_effect=Axes.errorbar) as drawn:
        scarce.main(words(f"table --part val --rows {file}"))
    points = [call[0][1:] for call in drawn.call_args_list]
    assert points == [([0, 250, 500], [approx(v * share) for v in (0.7, 0.8, 0.6)], [0] * 3)
                      for share in (1, 0.5, 0.25)]


def test_the_picture_of_sets_of_cells(tmp_path):
    real = kinds(tmp_path)
    scarce.main(words(f"picture --sets {real} {tmp_path / 'samples.npz'} --out {tmp_path / 'sets.png'}"))
    sheet = np.asarray(Image.open(tmp_path / "sets.png"))
    assert sheet.shape[0] == 2 * 87 and sheet.shape[1] > 6 * 87  # two lines, of titles and six cells
    for i, source in enumerate((real, tmp_path / "samples.npz")):
        x, y, names = data.load(source)
        shown = torch.cat([x[y == k][:2] for k in range(len(names))]).permute(0, 2, 3, 1).numpy()
        line = sheet[87 * i:87 * i + 84, sheet.shape[1] - 6 * 87:]
        for j, image in enumerate(shown):
            assert np.array_equal(line[1:84:3, 87 * j + 1:87 * j + 84:3], image)


def test_copies_of_the_cells_left_are_found(tmp_path, stem_file):
    n = {"train": 40, "val": 4, "test": 4}
    labels = {f"{part}_labels": np.zeros((k, 1), int) for part, k in n.items()}
    real = fake_set(tmp_path / "real.npz", n.values(), change=labels)
    x, y, _ = data.load(real, split="train")
    few, others = scarce.split(y, 0, 15, 3)
    for chosen, share in ((few, 1), (others[:15], 0)):
        samples, out = tmp_path / "samples.npz", tmp_path / f"copies-{share}.json"
        np.savez(samples, images=x[chosen].permute(0, 2, 3, 1).numpy(), labels=np.zeros(15, int))
        scarce.main(words(f"copies --data {real} --type 0 --left 15 --choice 3 --samples {samples}"
                          f" --out {out} --dims 64 --weights {stem_file}"))
        result = json.loads(out.read_text())
        assert next(v for k, v in result.items() if k.startswith("share")) == approx(share, abs=0.1)
        assert result["samples"] == result["left"] == 15
    for part, k in n.items():  # a folder of larger pictures is read in the size of the samples
        save_pictures(tmp_path / "cells" / part / "a", bits(k, 32, 32, 3, seed=k))
    x, out = data.load(tmp_path / "cells", split="train", size=32)[0], tmp_path / "copies.json"
    data.save_samples(tmp_path / "run", x[few], torch.zeros(15, dtype=int), ["a"])
    scarce.main(words(f"copies --data {tmp_path / 'cells'} --type a --left 15 --choice 3 --out {out}"
                      f" --samples {tmp_path / 'run' / 'samples.npz'} --dims 64 --weights {stem_file}"))
    assert next(v for k, v in json.loads(out.read_text()).items() if k.startswith("share")) == 1


def test_samples_that_are_of_another_type_are_found(tmp_path):
    y = torch.arange(60) % 3
    x = (bits(60, 3, 28, 28) // 8 + 80 * y[:, None, None, None]).byte()  # dark, grey and bright ones
    real = tmp_path / "real.npz"
    scarce.save(real, ["dark", "green", "bright"], {part: (x, y) for part in data.SPLITS})
    sets = {"right": x[y == 1], "mixed": torch.cat([x[y == 1], x[y != 1], x[y != 1]])}
    for name, images in sets.items():
        np.savez(tmp_path / f"{name}.npz", images=images.permute(0, 2, 3, 1).numpy(),
                 labels=np.zeros(len(images), int), class_names=["green"])
    files = [tmp_path / f"{name}.npz" for name in sets]
    out = tmp_path / "named.json"
    with mock.patch.object(trust, "classifier", side_effect=trust.classifier) as learned:
        scarce.main(words(f"named --data {real} --type green --left 5 --choice 3 --sets {files[0]} {files[1]}"
                          f" --out {out} --steps 60 --seeds 1 2"))
    few, _ = scarce.split(y, 1, 5, 3)  # which the generator has learned
    for call in learned.call_args_list:
        assert sorted(pixels(call[0][0]) + pixels(x[few])) == sorted(pixels(x))
    result = json.loads(out.read_text())
    assert result["real cells"]["named right"]["mean"] == result[str(files[0])]["named right"]["mean"] == 1
    mixed = result[str(files[1])]
    assert mixed["images"] == 100 and mixed["named right"]["mean"] == approx(0.2)
    assert mixed["named"] == {"dark": 0.4, "green": 0.2, "bright": 0.4}


def test_the_study_of_scarce_cells_gives_commands_that_work_and_chooses_on_val(tmp_path, monkeypatch):
    """The whole study, with a python that writes down its command and makes the file of --out."""
    log, python = tmp_path / "log", tmp_path / "python"
    python.write_text(f"""#!/bin/bash
        echo "$*" >> {log}
        case "$*" in *--sample\\ *) made=samples.npz ;; esac
        while [ "$1" != --out ] && [ $# != 0 ]; do shift; done
        case "$2" in
          "") ;;
          *.npz|*.png|*.json) touch "$2" ;;
          *) mkdir -p "$2"; touch "$2/${{made:-ckpt.pt}}" ;;
        esac
        """)
    python.chmod(0o755)
    env = os.environ | {"PYTHON": str(python), "OUT": str(tmp_path / "o"), "ROOT": str(tmp_path)}
    (tmp_path / "o" / "scarce").mkdir(parents=True)
    subprocess.run(["bash", HERE / "bench.sh", "scarce"], env=env, check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(tmp_path / "o")  # no file is written twice
    monkeypatch.setattr(ddpm, "load", lambda *_: ddpm.DDPM(unet="tiny"))
    for script in SCRIPTS:
        monkeypatch.setattr(script, "read_args", lambda p, argv: p.parse_args(argv))
    sets, learned, drawn, of_test = {}, {}, {}, 0
    for command in log.read_text().splitlines():
        program, argv = command.removeprefix("-m bench.").split(maxsplit=1)
        args = {"scarce": scarce, "trust": trust, "fid.py": fid, "cvae.py": cvae, "dcgan.py": dcgan,
                "ddpm.py": ddpm}[program].get_args(argv.split())
        if program.endswith(".py") and program != "fid.py":
            assert str(args.out) not in (drawn if args.sample else learned)  # once
            if args.sample:
                model = str(Path(args.ckpt).parent if args.ckpt else args.out)
                drawn[str(args.out)] = learned.get(model), args.sample
            else:
                assert args.split == "train" and args.classes and args.augment
                learned[str(args.out)] = args.data
        elif program == "scarce" and args.what in ("prepare", "move"):
            sets[str(args.out)] = args.type, args.left, args.choice
        elif program == "scarce" and args.what == "rows":
            if args.part == "test":
                of_test += 1
                alike = args.type and args.left + args.repeats[0] == 1550 if args.repeats else True
                assert args.counts is None and (alike or args.repeats == [0] and not args.type)
            if args.samples:
                source, n = drawn[args.samples.removesuffix("/samples.npz")]
                assert max(args.counts or [0]) <= n
                honest = not args.type or sets.get(source) == (args.type, args.left, args.choice)
                assert honest or args.generator == "knows-852" and args.part == "val"
    assert of_test > 80 and len(learned) > 60


# ---- bench/report.py and bench.sh ----

def test_bench_runs_the_comparison_and_does_nothing_twice(tmp_path, small, stem_file):
    env = os.environ | {
        "PYTHON": sys.executable, "OUT": str(tmp_path), "DATA": small, "SPLIT": "all", "EPOCHS": "1",
        "DIMS": "64", "WEIGHTS": stem_file, "DEVICE": "cpu", "FID_SAMPLES": "30",
        "CVAE": "--classes", "DCGAN": "--classes --width 32", "DDPM": f"--classes {SMALL[ddpm]}"}

    def bench(**more):
        command = ["bash", HERE / "bench.sh", "quick"]
        done = subprocess.run(command, env=env | more, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    first, out = bench(), tmp_path / "quick"
    table = (out / "results.md").read_text()
    for script in SCRIPTS:
        value = measured(out / script.NAME)["drawn"]["fid"]["text"]
        size = sum(p.numel() for p in script.load(out / script.NAME / "model.pt", "cpu").parameters()) / 1e6
        row = (rf"^\| {script.NAME.upper()} \| {size:.2g} \| 1 \| [\d.e-]+ \| [\d.e-]+ \| \*\*{value}\*\* "
               r".*2 x 30 \| 64, stem.pth \| sampling")
        assert re.search(row, table, re.M)
    assert table in first
    for name, width, height in (("cells", 16, 8), ("types", 20, 8), ("denoising", 15, 4)):
        with Image.open(out / f"{name}.png") as picture:
            assert picture.height == height * 87 and picture.width > width * 87
    (out / "cvae" / "fid.json").unlink()  # stopped before the measuring: it goes on there
    again = bench(PYTHON="echo")
    assert again.count("is finished") == 2 and re.search(r"^cvae.py .*--resume$", again, re.M)
    assert "dcgan.py" not in again and "-m bench.report table" in again
    assert subprocess.run(["bash", HERE / "bench.sh", "nonsense"], capture_output=True).returncode == 2


def test_pictures_show_real_cells_first_and_each_type_in_its_line(tmp_path, small):
    x, y, _ = data.load(small)
    model = ddpm.DDPM(classes=dict.fromkeys("abcdefgh", 1), unet="tiny", timesteps=6)
    (tmp_path / "ddpm").mkdir()
    torch.save({"script": "ddpm", "model_args": model.model_args, "weights": model.state_dict(),
                "trained": {"data": small, "epochs": 1}}, tmp_path / "ddpm" / "model.pt")
    seen = {}

    def save_grid(path, rows, across=8):
        seen[path.name] = rows, across

    with mock.patch.object(data, "save_grid", save_grid):
        report.main(["pictures", str(tmp_path), "--data", small])
    cells, across = seen["cells.png"]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    assert list(cells) == ["real", "DDPM"] and across == 16 and torch.equal(cells["real"], x[order[:32]])
    types, across = seen["types.png"]
    assert list(types) == list("abcdefgh") and across == 10
    for k, row in enumerate(types.values()):
        real = {image.numpy().tobytes() for image in x[y == k]}
        assert [image.numpy().tobytes() in real for image in row] == [True] * 5 + [False] * 5
        assert torch.equal(row[5:], ddpm.sample(model.eval(), 5, k, steps=6))
    strips, across = seen["denoising.png"]
    assert list(strips) == list("abcd") and across == 15
    for k, strip in enumerate(strips.values()):  # the last that it sees is the sample
        assert len(strip) == 15 and torch.equal(strip[-1:], ddpm.sample(model, 1, k, seed=k, steps=6))


def test_the_curve_counts_images_and_core_hours(tmp_path, capsys):
    run = tmp_path / "curve-ddpm"
    run.mkdir()
    epochs = "".join(f"{k},0.5,1800,20\n" for k in range(1, 11))  # half an hour each, of 36,000 images
    (run / "log.csv").write_text("epoch,loss,seconds,images/s\n" + epochs)
    for k, value in ((5, 0.4), (9, 0.05), (10, 0.1)):  # 9 is too near to 10 to tell how fast it falls
        result = {"drawn": {"fid": {"mean": value}}, "floor": {"fid": {"mean": 0.025}}, "dims": 768,
                  "images": 2000, "device": "cpu (2 threads)"}
        (run / f"fid-{k}.json").write_text(json.dumps(result))
    report.main(["curve", str(tmp_path)])
    rows, left = json.loads((tmp_path / "curve.json").read_text()).values()
    assert left == {"ddpm": approx(0.075 / 0.375)}
    assert [row["images"] for row in rows] == [180000, 324000, 360000]
    assert [row["fid"] for row in rows] == [0.4, 0.05, 0.1]
    assert [row["core-hours"] for row in rows] == [5, 9, 10] and "epochs 10" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.size == (800, 300)
    with mock.patch("matplotlib.axes.Axes.set") as labels:
        report.main(["curve", str(tmp_path)])
    assert mock.call(ylabel="FID-768 of 2,000 samples") in labels.call_args_list


def test_the_table_joins_the_five_trainings(tmp_path, capsys):
    for seed, value in ((100, 1.0), (200, 2.0), (300, 3.0)):
        (tmp_path / f"cvae-seed{seed}").mkdir()
        run = dict.fromkeys(fid.MEASURES, value) | {"sampling_seconds": 10 * value}
        result = {"runs": [run], "trained": {"epochs": 5}, "parameters": 2e6, "dims": 768, "images": 10000,
                  "weights": "w.pth", "others": 7092, "device": "cpu (2 threads)", "floor": {}}
        (tmp_path / f"cvae-seed{seed}" / "fid.json").write_text(json.dumps(result))
    (tmp_path / "cvae-seed100" / "log.csv").write_text("epoch,seconds,images/s\n" + "1,900,20\n" * 5)
    (tmp_path / "earlier").mkdir()
    earlier = {k: v for k, v in result.items() if k != "parameters"}
    (tmp_path / "earlier" / "fid.json").write_text(json.dumps(earlier))
    report.main(["table", str(tmp_path)])
    printed = capsys.readouterr().out
    values = "**2 ± 1** | 2 ± 1 | 2 ± 1 | 2 ± 1 | 3 x 10,000 | 768, w.pth | 3 trainings | 500"
    assert f"| CVAE | 2 | 5 | 0.09 | 2.5 | {values} | cpu (2 threads) |" in printed
    assert "| earlier |  | 5 |  |  | **3** |" in printed
    (tmp_path / "table-ddpm").mkdir()  # trained in two processes of three threads, measured by one of two
    result |= {"trained": {"epochs": 5, "on": "2 x cpu (3 threads)"}, "others": 0,
               "floor_images": [5000, 5000], "floor": {k: {"mean": 0.5} for k in fid.MEASURES}}
    (tmp_path / "table-ddpm" / "fid.json").write_text(json.dumps(result))
    (tmp_path / "table-ddpm" / "log.csv").write_text("epoch,seconds,images/s\n" + "1,900,20\n" * 5)
    report.main(["table", str(tmp_path), "table-ddpm"])
    printed = capsys.readouterr().out
    assert "| table-ddpm | 2 | 5 | 0.09 | 7.5 |" in printed and "CVAE" not in printed
    assert "| real, 5,000 against 5,000 | | | | | 0.5 | 0.5 | 0.5 | 0.5 |" in printed


# ---- what is shipped ----

@each_script
def test_a_fresh_clone_draws_cells(script, tmp_path, capsys, monkeypatch):
    """With neither data nor network nor a run; of the type asked for; one's own run goes before it."""
    own, few = saved(HERE / "checkpoints" / f"{script.NAME}.pt"), "--steps 5" if script is ddpm else ""
    assert {v.dtype for v in own["weights"].values() if v.is_floating_point()} == {torch.float16}
    monkeypatch.chdir(tmp_path)
    call(script, f"--sample 8 --label neutrophil --root {tmp_path / 'none'} {few}")
    epochs = own["trained"]["epochs"]
    assert f"pretrained: trained on bloodmnist, train, for {epochs} epochs" in capsys.readouterr().out
    file = samples(tmp_path / "out" / f"{script.NAME}-pretrained")
    assert file["images"].shape == (8, 28, 28, 3) and file["images"].std(0).mean() > 5  # eight, not one
    assert (file["labels"] == 6).all() and file["class_names"][6] == "neutrophil"
    (tmp_path / "b").mkdir()
    own["trained"]["epochs"] = 3
    torch.save(own, tmp_path / "b" / "model.pt")
    call(script, f"--sample 2 --out {tmp_path / 'b'} {few}")
    assert "b/model.pt: trained on bloodmnist, train, for 3 epochs" in capsys.readouterr().out
    kwargs = {"steps": 5} if script is ddpm else {}  # and as in a notebook
    cells = script.sample(script.load(device="cpu"), 8, label="neutrophil", dtype="fp32", **kwargs)
    assert np.array_equal(cells.permute(0, 2, 3, 1), file["images"])


def test_what_is_shipped_is_small_and_quick_and_the_demo_is_a_medmnist_set(tmp_path):
    began = time.time()
    call(ddpm, f"--sample 64 --ckpt pretrained --out {tmp_path}")
    assert time.time() - began < 60
    call(cvae, f"--data demo --split val --epochs 1 --out {tmp_path / 'demo'} {SMALL[cvae]}")
    assert (tmp_path / "demo" / "model.pt").exists()
    assert sum(f.stat().st_size for f in (HERE / "checkpoints").iterdir()) <= 25e6
    assert data.DEMO.stat().st_size <= 5e6
    images, labels, _ = data.load("demo")
    assert images.shape == (2048, 3, 28, 28) and (labels.bincount(minlength=8) > 20).all()
    if (ROOT / "bloodmnist.npz").is_file():  # synthetic: not one is a real cell
        real = {image.numpy().tobytes() for image in data.load(root=ROOT)[0]}
        assert not any(image.numpy().tobytes() in real for image in images)


def test_the_plumbing_is_the_same_to_the_letter():
    line = "# ---- bookkeeping: the same lines in cvae.py, dcgan.py and ddpm.py, so that each is complete"
    heads, tails = zip(*((HERE / f"{s.NAME}.py").read_text().split(line) for s in SCRIPTS), strict=True)
    assert len(set(tails)) == 1 and len(tails[0]) > 5000
    flags = {re.search(r'    add\("--seed".*?    add\("--weights".*?\n', head, re.S)[0] for head in heads}
    assert len(flags) == 1
    assert not any(re.search(r"^(import|from) (cvae|dcgan|ddpm|bench)", head, re.M) for head in heads)


def test_the_readme_links_to_the_lines_it_names():
    links = re.findall(r"\[`([\w.]+)`\]\((\w+\.py)#L(\d+)\)", (HERE / "README.md").read_text())
    assert len(links) > 10
    for name, file, line in links:
        named = (HERE / file).read_text().splitlines()[int(line) - 1]
        assert re.search(rf"^\s*(def|class) {name.split('.')[-1]}\b", named), (name, file, line)


def test_the_readmes_python_runs_as_it_stands(folder, tmp_path, monkeypatch, stem_file):
    """On a folder of pictures; only the weights are named, which the README leaves to be fetched."""
    block = re.search(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S).group(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fid, "network", functools.partial(fid.network, 64, stem_file, "cpu"))
    namespace = {}
    exec(block, namespace)
    assert namespace["images"].shape == (64, 3, 28, 28)
    assert namespace["own"].classes == {"lymphocyte": 10, "neutrophil": 10}


def test_figures_in_the_texts_come_from_the_files_of_their_runs():
    readme, results = (HERE / "README.md").read_text(), HERE / "assets" / "results"
    texts = readme + (HERE / "RESULTS.md").read_text()
    texts += (results / "notebook.md").read_text() + (results / "scarce.md").read_text()
    precision = (results / "precision.md").read_text()
    wanted = [f"| {row} |" for row in re.findall(r"^\| \w+-(?:fp32|bf16) .*?\*\*(.*?)\*\*", precision, re.M)]
    found = {file: json.loads(file.read_text()) for file in sorted(results.glob("*.json"))}
    found.pop(results / "scarce-rows.json")  # see the next test
    assert {"cvae", "dcgan", "ddpm", "floors"} <= {file.stem for file in found}
    for file, result in found.items():
        before = len(wanted)
        wanted += [f"{np.mean(floor['runs']):.4g}" for floor in result.get("floors", {}).values()]
        for row in result.get("rows", ()):  # of bench.sh speed
            wanted.append(f"**{row['ratio']:.3g} ± {row['spread']:.1g}**")
            wanted.append(f"{np.mean(row['this']):.4g} {row['unit']}")
        wanted += [f"| {row['flags']} | {row['fid']:.3g} |" for row in result.get("tried", ())]
        wanted += [f"| {r['script']} | {r['epochs']} | {r['fid']:.3g} |" for r in result.get("curve", ())]
        for layers in result.get("attention", {}).values():
            values = [[*layer["t 400"].values()] for layer in layers.values()]
            wanted.append(" | ".join(f"{logit:.3g} ({entropy:.2f})" for logit, _, entropy in values))
        wanted += [f"{v['variance']:.3g}" for v in result.get("gradient", {}).values() if isinstance(v, dict)]
        if "runs" in result:
            values = [r["fid"] for r in result["runs"]]
            text = f"{np.mean(values):.4g} ± {np.std(values, ddof=1):.2g}"
            wanted += [text, result["command"]]
            assert len(values) == 5 and (file.stem.startswith("paper") or text in readme and text in (
                HERE / f"{file.stem}.py").read_text().split('"""')[1]), file
        if result.get("what") in ("cas", "scarce"):
            means = re.findall(r'"all": \{.*?"text": "(.*?)"', json.dumps(result, ensure_ascii=False))
            wanted += [f"**{text}**" for text in means]
        wanted += [f"{100 * v:.1f} %" for k, v in result.items() if k.startswith("share")]
        named = [v for v in result.values() if isinstance(v, dict) and "named right" in v]
        wanted += [f"| {v['named right']['text']} |" for v in named]
        wanted += [f"{result[k]:.4g}" for k in ("fid", "precision", "recall") if k in result]  # of fid.py
        assert len(wanted) > before, file
    missing = [text for text in wanted if text not in texts and text not in texts.replace("`", "")]
    for kind in ("basophil", "immature"):
        named = found[results / f"scarce-named-50-{kind}.json"]
        for of in ("real cells", next(name for name in named if name.endswith("-init"))):
            text = f"{100 * named[of]['named right']['mean']:.1f} %"
            missing += [text for page in (readme, (HERE / "RESULTS.md").read_text()) if text not in page]
    assert not missing


def test_the_figures_of_a_scarce_type_are_those_of_its_rows(tmp_path):
    shutil.copy(HERE / "assets" / "results" / "scarce-rows.json", tmp_path / "rows.json")
    tables = []
    for part in ("val", "test"):
        scarce.main(words(f"table --part {part} --rows {tmp_path / 'rows.json'}"))
        tables.append((tmp_path / f"{part}.md").read_text())
    every = (HERE / "assets" / "results" / "scarce.md").read_text()
    assert all(table.strip() in every for table in tables)
    table = "".join(tables)
    pages = ((HERE / page).read_text() for page in ("README.md", "RESULTS.md"))
    readme, results = (page.split("\n## Where real cells are scarce")[1].split("\n## ")[0] for page in pages)
    lines = [line for line in results.splitlines() if line.endswith((" x 2 |", " x 3 |", " x 5 |"))]
    missing = [line for line in lines if line not in table]
    figures = re.findall(r"(?:\| |\()([+-]?0\.\d+[ ±.\d]*?)(?= [|(]|\))", readme)
    figures += re.findall(r"-?0\.\d+ ± [\d.e-]*\d", readme + results)
    missing += [figure for figure in figures if figure not in table]
    assert not missing and len(lines) > 10 and len(figures) > 50
