"""The paper's experiment, on a few images in CIFAR's file format."""

import csv
import math
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import resnet_cifar

from pyro_ssvi.addition import ADDITION, Gradient

FEW = "--limit 8 --batch-size 4 --exchange-every 2 --samples 2 --epochs 2 --lr 0.1 --kl-weight 1e-6"


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Folders of CIFAR-10 and CIFAR-100, whose check sums are not those of the real files."""
    from torchvision.datasets import CIFAR10, CIFAR100

    rng = np.random.default_rng(0)
    for kind, labels, classes in ((CIFAR10, "labels", 10), (CIFAR100, "fine_labels", 100)):
        folder = tmp_path / kind.base_folder
        folder.mkdir()
        for file, _ in kind.train_list + kind.test_list:
            images = rng.integers(0, 256, (8, 3 * 32 * 32), dtype=np.uint8)
            entry = {"data": images, labels: [9, *rng.integers(0, 10, 7).tolist()]}
            (folder / file).write_bytes(pickle.dumps(entry))
        names = {kind.meta["key"]: [str(i) for i in range(classes)]}
        (folder / kind.meta["filename"]).write_bytes(pickle.dumps(names))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: True)
    return tmp_path


def run(cifar, out, more=""):
    arguments = f"--data-dir {cifar} --out {cifar / out} {FEW} {more}"
    resnet_cifar.main(arguments.split())
    with (cifar / out / "log.csv").open() as file:
        return list(csv.DictReader(file))


def without_time(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def check_active_weights(lines, total):
    """All weights but the first layer's, which are all active, have a density of 10 %."""
    found = {line.split()[0]: line.split() for line in lines if line.startswith("net.")}
    shapes = resnet_cifar.Classifier(10, 0.005).net.shapes
    assert list(found) == [f"net.{name}" for name in shapes]
    assert len(shapes) == 21  # weights only: biases have no posterior
    active = {
        name: math.floor((1 if name == "conv1.weight" else 0.1) * shape.numel() + 0.5)
        for name, shape in shapes.items()
    }
    assert all(f"{k:,}" in found[f"net.{name}"] for name, k in active.items())
    assert total == sum(active.values())


def test_a_training_that_was_stopped_goes_on_as_if_it_had_not_been(cifar, capsys):
    whole = run(cifar, "whole")
    lines = capsys.readouterr().out.splitlines()
    assert [row["epoch"] for row in whole] == ["1", "2"]
    assert all(0 <= float(row["accuracy"]) <= 1 and float(row["kl"]) > 0 for row in whole)
    assert [float(row["lr"]) for row in whole] == pytest.approx([0.1, 0.05])  # a cosine
    check_active_weights(lines, int(whole[-1]["active"]))
    first = run(cifar, "parts", "--stop-after 1")
    assert len(first) == 1
    capsys.readouterr()
    # As if it had been killed in the second epoch, when that was logged and not yet saved.
    with (cifar / "parts/log.csv").open("a") as file:
        file.write(",".join(["2", *["0"] * (len(whole[0]) - 1)]) + "\n")
    for _ in range(2):  # the second time there is nothing left to train
        both = run(cifar, "parts", "--resume")
        assert without_time(both) == without_time(whole)
        assert capsys.readouterr().out.splitlines()[-1] == lines[-1]


@pytest.mark.parametrize(
    "options",
    [
        "--dataset cifar100 --policy erk --density 0.02 --no-local-reparam --removal abs_mean "
        "--gradient-samples 2 --gradient-at sample --new-scale 1e-3 --epochs 1",
        "--policy uniform --density 0.02 --gradient-at mean --gradient-batches 2 --removal snr",
        "--density 0.02 --addition random --weight-decay 0 --epochs 1",
    ],
)
def test_options_of_the_recipe(cifar, options):
    rows = run(cifar, "out", options)
    assert all(float(row["loss"]) > 0 for row in rows)


def test_augmentation_moves_and_flips():
    images = torch.arange(2 * 3 * 32 * 32).reshape(2, 3, 32, 32).to(torch.uint8)
    generator = torch.Generator().manual_seed(0)
    found = resnet_cifar.augment(images, generator)
    assert found.dtype == torch.uint8
    generator.manual_seed(0)
    top, left = torch.randint(9, (2, 2, 1), generator=generator)
    flip = torch.rand(2, 1, generator=generator) < 0.5
    assert flip[0] != flip[1]  # the seed was chosen so
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    for i in range(2):
        part = padded[i, :, top[i] : top[i] + 32, left[i] : left[i] + 32]
        assert torch.equal(found[i], part.flip(-1) if flip[i] else part)


def test_images_are_standardised_by_channel(cifar):
    args = resnet_cifar.parse_args(["--data-dir", str(cifar)])
    data = resnet_cifar.load(args)
    assert data.train_x.shape == (40, 3, 32, 32)
    with (cifar / "cifar-10-batches-py/test_batch").open("rb") as file:
        raw = pickle.load(file)["data"].reshape(-1, 3, 32, 32) / 255
    expected = (raw[:, 1] - 0.4822) / 0.1994
    np.testing.assert_allclose(data.inputs(data.test_x)[:, 1], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(ADDITION))
def test_every_addition_criterion_is_offered(name):
    arguments = f"--data-dir x --addition {name} --gradient-batches 2 --exchange-every 20"
    args = resnet_cifar.parse_args(arguments.split())
    svi = resnet_cifar.make_svi(args, resnet_cifar.Classifier(10, 0.005), 50_000)
    gradient = isinstance(ADDITION[name], Gradient)
    assert svi.addition == (replace(ADDITION[name], batches=2) if gradient else ADDITION[name])
    assert resnet_cifar.parse_args(["--data-dir", "x"]).addition == "gradient"  # as published


def test_options_of_the_optimizer_depend_on_the_parameter():
    args = resnet_cifar.parse_args(["--data-dir", "x", "--lr", "0.3", "--scale-lr", "0.2"])
    options = resnet_cifar.make_optim(args).pt_optim_args
    assert options("AutoSparseNormal.loc") == {"lr": 0.3, "momentum": 0.9, "weight_decay": 5e-4}
    assert options("AutoSparseNormal.scale") == {"lr": 0.2, "momentum": 0.9}


def test_what_cannot_be_resumed(cifar):
    with pytest.raises(SystemExit, match=r"there is no .*last\.ckpt to resume from"):
        run(cifar, "out", "--resume")
    run(cifar, "out", "--stop-after 1 --limit 3")
    with (
        pytest.warns(UserWarning, match="saved with the schedule"),
        pytest.raises(SystemExit, match="saved with another --batch-size or --limit"),
    ):
        run(cifar, "out", "--resume --limit 5")


def test_files_that_are_not_there(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise RuntimeError("Error downloading")

    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", offline)
    with pytest.raises(SystemExit, match=r"cifar10 is not in .* and could not be downloaded"):
        resnet_cifar.main(["--data-dir", str(tmp_path)])
