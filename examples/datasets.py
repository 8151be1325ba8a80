"""Image data sets as tensors: one from scikit-learn's wheel, the others by torchvision."""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["NAMES", "Dataset", "load", "torchvision_arrays"]

NAMES = ("digits", "fashion-mnist", "mnist", "cifar10", "cifar100")

IDX_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


class Dataset(NamedTuple):
    """Images as rows ``[n, features]``, with mean 0 and variance 1 over the training set."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    image_shape: tuple[int, int, int]  # height, width, channels
    num_classes: int


def load(name: str, data_dir: str | None = None) -> Dataset:
    """Load a data set.

    :param name: one of :data:`NAMES`.
    :param data_dir: where torchvision keeps or puts its files; not needed for digits. For
        Fashion-MNIST it may also be a folder with the four gz files themselves.
    :raises ValueError: without a ``data_dir`` where one is needed.
    :raises SystemExit: where files are missing and cannot be downloaded.
    """
    if name == "digits":
        train_x, train_y, test_x, test_y = _digits()
    elif data_dir is None:
        raise ValueError(f"the data set {name!r} needs --data-dir, the folder with its files")
    elif name == "fashion-mnist" and all((Path(data_dir) / file).exists() for file in IDX_FILES):
        train_x, train_y, test_x, test_y = (read_idx(Path(data_dir) / file) for file in IDX_FILES)
    else:
        train_x, train_y, test_x, test_y = torchvision_arrays(name, data_dir)
    shape = (*train_x.shape[1:], 1)[:3]
    train_x, test_x = _standardise(train_x, test_x)
    return Dataset(
        train_x,
        torch.tensor(train_y, dtype=torch.int64),
        test_x,
        torch.tensor(test_y, dtype=torch.int64),
        shape,
        int(max(train_y)) + 1,
    )


def _digits() -> tuple[np.ndarray, ...]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        images.reshape(-1, 8, 8), labels, test_size=0.2, random_state=0, stratify=labels
    )
    return train_x, train_y, test_x, test_y


def read_idx(path: Path) -> np.ndarray:
    """Read a gz file in the format of MNIST: a magic number, sizes, bytes.

    :raises ValueError: if the file is not of this format.
    """
    with gzip.open(path) as file:
        data = file.read()
    dims = data[3] if len(data) >= 4 else 0
    sizes = np.frombuffer(data, ">u4", count=dims, offset=4) if len(data) >= 4 + 4 * dims else ()
    if data[:3] != b"\0\0\x08" or len(data) != 4 + 4 * dims + math.prod(map(int, sizes)):
        raise ValueError(f"{path} is not an idx file of bytes, or it is truncated")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(sizes)


def torchvision_arrays(name: str, data_dir: str) -> tuple[np.ndarray, ...]:
    """Images of bytes and labels, for training and test, as torchvision has them.

    :raises SystemExit: where files are missing and cannot be downloaded.
    """
    from torchvision import datasets

    kind = {
        "fashion-mnist": datasets.FashionMNIST,
        "mnist": datasets.MNIST,
        "cifar10": datasets.CIFAR10,
        "cifar100": datasets.CIFAR100,
    }[name]
    arrays: list[np.ndarray] = []
    for train in (True, False):
        try:
            part = kind(data_dir, train=train, download=True)
        except (OSError, RuntimeError) as error:
            raise SystemExit(
                f"{name} is not in {data_dir} and could not be downloaded ({error}).\n"
                f"Put the files of torchvision.datasets.{kind.__name__} there."
            ) from error
        arrays += [np.asarray(part.data), np.asarray(part.targets)]
    return tuple(arrays)


def _standardise(train: np.ndarray, test: np.ndarray) -> tuple[Tensor, Tensor]:
    # One mean and one scale for all pixels: some pixels never change.
    mean, std = float(train.mean()), float(train.std())
    train_x, test_x = (
        torch.as_tensor((x.reshape(len(x), -1).astype(np.float32) - mean) / std)
        for x in (train, test)
    )
    return train_x, test_x
