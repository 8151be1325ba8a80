"""The examples' loaders, on small files in the formats of the real ones."""

import gzip
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import datasets  # noqa: E402

rng = np.random.default_rng(0)
PARTS = {"train": 20, "t10k": 10}


def write_idx(folder: Path, compress: bool):
    """Files as those of MNIST and Fashion-MNIST, 28x28."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for part, n in PARTS.items():
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = np.arange(n, dtype=np.uint8) % 10
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            data = b"\0\0\x08" + bytes([array.ndim])
            data += struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
            name = folder / f"{part}-{kind}-ubyte"
            if compress:
                name.with_suffix(".gz").write_bytes(gzip.compress(data))
            else:
                name.write_bytes(data)
            arrays[part, kind] = array
    return arrays


def assert_holds(data, train_images, train_labels, test_images, test_labels):
    for found, images in ((data.train_x, train_images), (data.test_x, test_images)):
        scaled = (images.reshape(len(images), -1) - train_images.mean()) / train_images.std()
        torch.testing.assert_close(found, torch.as_tensor(scaled).float(), rtol=1e-4, atol=1e-4)
    assert data.train_y.tolist() == list(train_labels)
    assert data.test_y.tolist() == list(test_labels)
    assert data.num_classes == 10


def test_digits_need_no_files():
    data = datasets.load("digits")
    assert data.train_x.shape == (1437, 64)
    assert data.test_x.shape == (360, 64)
    assert data.image_shape == (8, 8, 1)
    assert data.train_x.mean().abs() < 1e-5
    assert (data.train_x.std() - 1).abs() < 1e-3
    assert torch.bincount(data.test_y).min() >= 34  # stratified
    assert torch.equal(datasets.load("digits").train_y, data.train_y)


def test_fashion_mnist_from_the_gz_files_themselves(tmp_path):
    arrays = write_idx(tmp_path, compress=True)
    data = datasets.load("fashion-mnist", str(tmp_path))
    assert_holds(data, *arrays.values())
    assert data.image_shape == (28, 28, 1)


@pytest.mark.parametrize(
    ("name", "folder"), [("fashion-mnist", "FashionMNIST"), ("mnist", "MNIST")]
)
def test_idx_files_where_torchvision_keeps_them(tmp_path, name, folder):
    arrays = write_idx(tmp_path / folder / "raw", compress=False)
    assert_holds(datasets.load(name, str(tmp_path)), *arrays.values())


def test_cifar10(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    images, labels = {}, {}
    for file, _ in CIFAR10.train_list + CIFAR10.test_list:
        images[file] = rng.integers(0, 256, (10, 3 * 32 * 32), dtype=np.uint8)
        labels[file] = list(range(10))
        (folder / file).write_bytes(pickle.dumps({"data": images[file], "labels": labels[file]}))
    names = {"label_names": [str(i) for i in range(10)]}
    (folder / CIFAR10.meta["filename"]).write_bytes(pickle.dumps(names))
    # The check sums are those of the real files.
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: True)
    data = datasets.load("cifar10", str(tmp_path))
    rows = [images[file].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) for file in images]
    train = np.concatenate(rows[:-1])
    assert_holds(data, train, [*range(10)] * 5, rows[-1], [*range(10)])
    assert data.image_shape == (32, 32, 3)


def test_missing_folder():
    with pytest.raises(ValueError, match="'mnist' needs --data-dir"):
        datasets.load("mnist")


def test_files_that_cannot_be_downloaded(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr("torchvision.datasets.MNIST.download", offline)
    with pytest.raises(SystemExit, match=r"could not be downloaded.*\n.*datasets.MNIST"):
        datasets.load("mnist", str(tmp_path))


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: b"\1" + d[1:], lambda d: d[:3]])
def test_damaged_idx_file(tmp_path, damage):
    write_idx(tmp_path, compress=True)
    path = tmp_path / datasets.IDX_FILES[0]
    path.write_bytes(gzip.compress(damage(gzip.decompress(path.read_bytes()))))
    with pytest.raises(ValueError, match="not an idx file of bytes, or it is truncated"):
        datasets.load("fashion-mnist", str(tmp_path))
