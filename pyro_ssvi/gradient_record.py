"""The gradient of whole sites, inactive coordinates too, for the few steps that need it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from contextvars import ContextVar, Token
from typing import NamedTuple

import torch
from torch import Tensor

from .active_set import ActiveSet
from .patches import Patches
from .plain_data import check_tensor
from .precision import as_it_is

__all__ = ["GradientRecord", "Prior", "check_parts", "recording"]

_CURRENT: ContextVar[GradientRecord | None] = ContextVar("gradient_record", default=None)


def recording() -> GradientRecord | None:
    """The record that is open now, if any.

    Read in a forward pass and handed to its backward pass, which may run in another thread.
    """
    return _CURRENT.get()


class Product(NamedTuple):
    """The gradient ``g @ x.T`` with ``g [rows, b]`` and ``x [cols, b]``."""

    g: Tensor
    x: Tensor

    def block(self, start: int, stop: int) -> Tensor:
        return self.g[start:stop] @ self.x.t()

    def squares(self, start: int, stop: int) -> Tensor:
        return self.g[start:stop].square() @ self.x.t().square()


class Convolution(NamedTuple):
    """The gradient of a kernel, with ``g [b, n, out_h, out_w]`` and ``x [b, c, h, w]``."""

    g: Tensor
    x: Tensor
    patches: tuple  # the fields of Patches
    groups: int

    def block(self, start: int, stop: int) -> Tensor:
        # The output channels of the block, in as many groups as they come from.
        per_group = self.g.shape[1] // self.groups
        parts = []
        while start < stop:
            group = start // per_group
            end = min(stop, (group + 1) * per_group)
            images = self.x.chunk(self.groups, 1)[group]
            gradient = Patches(*self.patches).kernel_gradient(images, self.g[:, start:end])
            parts.append(gradient.flatten(1))
            start = end
        return torch.cat(parts)

    def squares(self, start: int, stop: int) -> Tensor:
        images = zip(self.g.split(1), self.x.split(1), strict=True)
        first, *others = (
            Convolution(g, x, self.patches, self.groups).block(start, stop).square_()
            for g, x in images
        )
        for other in others:
            first += other
        return first


class Rows(NamedTuple):
    """The gradient with each row of ``g [b, cols]`` at the row that ``place [b]`` names."""

    place: Tensor
    g: Tensor

    def block(self, start: int, stop: int) -> Tensor:
        # One row more, for the indices outside of the block.
        inside = (self.place >= start) & (self.place < stop)
        place = (self.place - start).where(inside, stop - start)
        block = self.g.new_zeros(stop - start + 1, self.g.shape[1])
        return block.index_add_(0, place, self.g)[:-1]

    def squares(self, start: int, stop: int) -> Tensor:
        return Rows(self.place, self.g.square()).block(start, stop)


class Dense(NamedTuple):
    """The gradient itself, ``[rows, cols]``."""

    g: Tensor

    def block(self, start: int, stop: int) -> Tensor:
        return self.g[start:stop]

    def squares(self, start: int, stop: int) -> Tensor:
        raise ValueError(
            "it was used as a dense tensor, whose gradient does not tell examples apart: use "
            "addition='gradient', or products that have a sparse rule (see dense_fallbacks)"
        )


Part = Product | Convolution | Rows | Dense
_PARTS: dict[str, type[Part]] = {
    part.__name__: part for part in (Product, Convolution, Rows, Dense)
}


def check_parts(parts: Iterable[Part], shape: torch.Size) -> None:
    """Whether parts from a file are of a site of this shape.

    :raises ValueError: if they are not, and what their products raise if their own do not match.
    """
    rows, cols = shape[0], shape[1:].numel()
    for part in parts:
        for field in part:
            if isinstance(field, Tensor):
                check_tensor(field, "a gradient")
        ends = [part.block(i, i + 1).shape for i in (0, rows - 1)]
        if ends != [(1, cols)] * 2:
            raise ValueError(f"expected parts of shape {(rows, cols)}, got another")


class Prior(NamedTuple):
    """The prior of a site whose elements are normal around 0.

    :param scale: the standard deviation of each, ``[*shape]``.
    :param weight: what its log density is multiplied by in the loss, such as the KL weight.
    """

    scale: Tensor
    weight: float


class GradientRecord:
    """Collects the loss's gradient with respect to every coordinate of each sparse value.

    A product ``W @ x`` has the gradient ``g @ x.T``: the record keeps the two factors, of the
    size of the layer's activations, and multiplies them out only block by block of rows as an
    exchange reads them. Gradients add up over uses of a value and over backward passes. Values
    are to be used, and backward passes made, inside::

        with GradientRecord() as record:
            F.linear(x, guide(x, y)["w0"]).square().sum().backward()
        record.block(guide.active_sets["w0"], 0, 10)
    """

    def __init__(self) -> None:
        #: The prior of each sparse value, from the last run of the model; kept in no file, since
        #: the step that comes before an exchange tells it.
        self.priors: dict[ActiveSet, Prior] = {}
        #: What the log likelihood was multiplied by, in each run of the model.
        self.scales: list[float] = []
        self._parts: defaultdict[ActiveSet, list[Part]] = defaultdict(list)
        self._token: Token | None = None

    def copy(self) -> GradientRecord:
        """A record of the same, to which what is added here from now on is not added."""
        other = GradientRecord()
        other.priors, other.scales = dict(self.priors), list(self.scales)
        other._parts.update({active: list(parts) for active, parts in self._parts.items()})
        return other

    def __enter__(self) -> GradientRecord:
        self._token = _CURRENT.set(self)
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._token is not None
        _CURRENT.reset(self._token)

    def add_product(self, active: ActiveSet, g: Tensor, x: Tensor) -> None:
        """Add ``g @ x.T`` with ``g [rows, b]`` and ``x [cols, b]``."""
        self._parts[active].append(Product(g.detach(), x.detach()))

    def add_convolution(
        self, active: ActiveSet, g: Tensor, x: Tensor, patches: Patches, groups: int
    ) -> None:
        """Add the gradient of a convolution's kernel.

        :param g: ``[b, n, out_h, out_w]``.
        :param x: ``[b, c, h, w]``.
        """
        self._parts[active].append(Convolution(g.detach(), x.detach(), tuple(patches), groups))

    def add_rows(self, active: ActiveSet, index: Tensor, g: Tensor) -> None:
        """Add each row of ``g [b, cols]`` to the row of the site that ``index [b]`` names."""
        self._parts[active].append(Rows(index.detach(), g.detach()))

    def add_dense(self, active: ActiveSet, grad: Tensor) -> None:
        """Add a gradient ``[*batch, *shape]``, summed over ``batch``."""
        total = grad.detach().reshape(-1, *active.matrix_shape).sum(0)
        self._parts[active].append(Dense(total))

    def __contains__(self, active: ActiveSet) -> bool:
        return active in self._parts

    def discard(self, active: ActiveSet) -> None:
        """Forget what was added for this set, if anything was."""
        self._parts.pop(active, None)

    @as_it_is
    def block(self, active: ActiveSet, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of the gradient as a matrix of ``active.matrix_shape``."""
        first, *others = self._parts[active]
        total = first.block(start, stop)
        for part in others:
            total = total + part.block(start, stop)
        return total

    @as_it_is
    def squares(self, active: ActiveSet, start: int, stop: int) -> Tensor:
        """The same rows of the sum over examples of their gradients' squares.

        An example is a column of a product, an image, or a row that is looked up.

        :raises ValueError: if examples cannot be told apart.
        """
        return torch.stack([part.squares(start, stop) for part in self._parts[active]]).sum(0)

    def parts_of(self, active: ActiveSet) -> list[Part]:
        """What was added."""
        return self._parts[active]

    def parts(self, active: ActiveSet) -> list[list]:
        """What was added, as plain data for a file: for each part its kind and its fields."""
        return [[type(part).__name__, *part] for part in self._parts.get(active, [])]

    @staticmethod
    def read_parts(parts: Iterable[list]) -> list[Part]:
        """What :meth:`parts` gave, to be added.

        :raises KeyError: for a kind of part that is not known, and TypeError for fields missing.
        """
        return [_PARTS[kind](*fields) for kind, *fields in parts]

    def add_parts(self, active: ActiveSet, parts: list[Part]) -> None:
        """Add what :meth:`read_parts` gave."""
        self._parts[active].extend(parts)
