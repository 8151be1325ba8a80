"""Convolution as a product: images to columns of patches, and back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

__all__ = ["Patches"]

Pair = tuple[int, int]


class Patches(NamedTuple):
    """How a convolution's kernel visits an image: (height, width) of each."""

    kernel: Pair
    stride: Pair
    padding: tuple[int, int, int, int]  # left, right, top, bottom
    dilation: Pair

    def out_size(self, size: Pair) -> Pair:
        """Height and width of the convolution's result."""
        left, right, top, bottom = self.padding
        padded = (size[0] + top + bottom, size[1] + left + right)
        return tuple(
            (n - d * (k - 1) - 1) // s + 1
            for n, d, k, s in zip(padded, self.dilation, self.kernel, self.stride, strict=True)
        )  # type: ignore[return-value]

    def _taps(self, out: Pair) -> Iterator[tuple[slice, slice]]:
        """Where each element of the kernel falls in the padded image."""
        (kh, kw), (sh, sw), (dh, dw) = self.kernel, self.stride, self.dilation
        for i in range(kh):
            rows = slice(i * dh, i * dh + (out[0] - 1) * sh + 1, sh)
            for j in range(kw):
                yield rows, slice(j * dw, j * dw + (out[1] - 1) * sw + 1, sw)

    def columns(self, x: Tensor) -> Tensor:
        """The patches of images ``[b, c, h, w]``: ``[c * kh * kw, b * out_h * out_w]``."""
        b, c, *size = x.shape
        out = self.out_size((size[0], size[1]))
        padded = F.pad(x.transpose(0, 1), self.padding)
        kh, kw = self.kernel
        columns = x.new_empty(c, kh * kw, b, *out)
        for tap, (rows, cols) in enumerate(self._taps(out)):
            columns[:, tap] = padded[:, :, rows, cols]
        return columns.view(c * kh * kw, b * math.prod(out))

    def images(self, columns: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The transpose of :meth:`columns`: patches added up to images of ``shape``."""
        b, c, h, w = shape
        left, right, top, bottom = self.padding
        out = self.out_size((h, w))
        columns = columns.view(c, math.prod(self.kernel), b, *out)
        padded = columns.new_zeros(c, b, h + top + bottom, w + left + right)
        for tap, (rows, cols) in enumerate(self._taps(out)):
            padded[:, :, rows, cols] += columns[:, tap]
        return padded[:, :, top : top + h, left : left + w].transpose(0, 1)

    def kernel_gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """The gradient of a dense kernel.

        :param x: ``[b, c, h, w]``.
        :param g: ``[b, n, out_h, out_w]``.
        :return: ``[n, c, kh, kw]``.
        """
        shape = (g.shape[1], x.shape[1], *self.kernel)
        x = F.pad(x, self.padding)
        return conv2d_weight(plain(x), shape, plain(g), self.stride, 0, self.dilation)


def plain(images: Tensor) -> Tensor:
    """A copy in the usual memory format, whose strides can be taken for no other.

    With others, and small kernels, torch's gradient on CPU has written where it should not
    (torch 2.14); contiguous() makes no copy where sizes of 1 leave the strides open.
    """
    return images.clone(memory_format=torch.contiguous_format)
