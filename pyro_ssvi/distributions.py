"""Sparse normals, and priors limited to a subspace."""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, Independent, constraints, kl_divergence, register_kl
from torch.distributions.utils import lazy_property

from .active_set import ActiveSet
from .sparse_tensor import SparseTensor, dense_fallbacks

__all__ = [
    "SparseDelta",
    "SparseNormal",
    "SubspaceMessenger",
    "SubspacePrior",
    "TransformedDelta",
    "elementwise_base",
]


class _SparseDistribution(TorchDistribution):
    """Independent numbers at the active coordinates, and exactly 0 at all others.

    :param active: the active set, for values of ``active.shape``.
    :param event_dim: how many dimensions of ``active.shape`` form one event (default: all);
        the others are batch dimensions.
    :param parameters: ``[*extra, K]`` each, by name.
    """

    has_rsample = True

    def __init__(
        self,
        active: ActiveSet,
        event_dim: int | None,
        validate_args: bool | None,
        **parameters: Tensor,
    ) -> None:
        name = type(self).__name__
        site_dims = len(active.shape)
        event_dim = site_dims if event_dim is None else event_dim
        shapes = [tuple(value.shape) for value in parameters.values()]
        if len(set(shapes)) > 1 or shapes[0][-1:] != (len(active),):
            raise ValueError(
                f"{name} expects {' and '.join(parameters)} [*extra, {len(active)}] for {active}, "
                f"got {' and '.join(map(str, shapes))}"
            )
        if not 0 <= event_dim <= site_dims:
            raise ValueError(f"{name} expects 0 <= event_dim <= {site_dims}, got {event_dim}")
        self.__dict__.update(parameters)
        self.active = active
        self._names = tuple(parameters)
        self._batch_dims = site_dims - event_dim
        super().__init__(
            torch.Size(shapes[0][:-1]) + active.shape[: self._batch_dims],
            active.shape[self._batch_dims :],
            validate_args=validate_args,
        )

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        batch_shape = torch.Size(batch_shape)
        own = self.active.shape[: self._batch_dims]
        extra = batch_shape[: len(batch_shape) - len(own)]
        if batch_shape[len(extra) :] != own:
            raise ValueError(
                f"{type(self).__name__} of batch shape {tuple(self.batch_shape)} cannot be "
                f"expanded to {tuple(batch_shape)}: its active set has batch shape {tuple(own)}"
            )
        if batch_shape == self.batch_shape:
            return self
        shape = (*extra, len(self.active))
        family: Any = type(self)
        return family(
            **{name: getattr(self, name).expand(shape) for name in self._names},
            active=self.active,
            event_dim=len(self.event_shape),
            validate_args=False,
        )

    def _log_prob(self, values: Tensor) -> Tensor:
        """Log density of the active entries ``[*extra, K]``: ``[*batch_shape]``."""
        raise NotImplementedError

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density on the subspace, ``[*batch_shape]``; -inf off it.

        :param value: a SparseTensor with this active set, or a dense tensor.
        """
        own = isinstance(value, SparseTensor) and not value.transposed
        if own and self.active.same(value.active):  # type: ignore[attr-defined]
            return self._log_prob(value.values)  # type: ignore[arg-type]
        dense = value.to_dense()
        log_prob = self._log_prob(self.active.gather(dense))
        off = (dense != 0) & ~self.active.mask
        event = tuple(range(-len(self.event_shape), 0))
        outside = off.any(-1) if len(event) == 1 else off.sum(event) > 0 if event else off
        return log_prob.masked_fill(outside, -math.inf)

    @property
    def mode(self) -> SparseTensor:
        return self.mean


class SparseNormal(_SparseDistribution):
    """Independent normals at the active coordinates, and exactly 0 at all others.

    This is the variational family of SSVI (arXiv 2402.11025, section 3.1): densities are with
    respect to the subspace of the active coordinates.

    :param loc: ``[*extra, K]``.
    :param scale: ``[*extra, K]``, positive.
    :param active: the active set, for values of ``active.shape``.
    :param event_dim: how many dimensions of ``active.shape`` form one event (default: all);
        the others are batch dimensions.
    """

    arg_constraints = {  # noqa: RUF012
        "loc": constraints.real,
        "scale": constraints.positive,
    }

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor,
        active: ActiveSet,
        event_dim: int | None = None,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(active, event_dim, validate_args, loc=loc, scale=scale)

    def rsample(self, sample_shape: Any = ()) -> SparseTensor:
        shape = (*sample_shape, *self.loc.shape)
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return SparseTensor(torch.addcmul(self.loc, self.scale, noise), self.active)

    @lazy_property
    def coordinates(self) -> dist.Normal:
        """The distribution of the active coordinates, batch shape ``[*extra, K]``."""
        return dist.Normal(self.loc, self.scale, validate_args=False)

    def _log_prob(self, values: Tensor) -> Tensor:
        # Normal.log_prob(), in fewer passes.
        z = (values - self.loc) / self.scale
        log_prob = -0.5 * z.square() - self.scale.log()
        batch_dims, k = self._batch_dims, values.shape[-1]
        if batch_dims == 0:
            return log_prob.sum(-1) - 0.5 * math.log(2 * math.pi) * k
        return sum_to_batch(log_prob - 0.5 * math.log(2 * math.pi), self.active, batch_dims)

    def entropy(self) -> Tensor:
        return sum_to_batch(self.coordinates.entropy(), self.active, self._batch_dims)

    @property
    def mean(self) -> SparseTensor:
        return SparseTensor(self.loc, self.active)

    @property
    def variance(self) -> SparseTensor:
        return SparseTensor(self.scale.square(), self.active)

    @property
    def stddev(self) -> SparseTensor:
        return SparseTensor(self.scale, self.active)


class SparseDelta(_SparseDistribution):
    """A point: given values at the active coordinates, and exactly 0 at all others.

    :param v: ``[*extra, K]``.
    :param active: the active set, for values of ``active.shape``.
    :param event_dim: as for :class:`SparseNormal`.
    """

    arg_constraints = {"v": constraints.real}  # noqa: RUF012

    def __init__(
        self,
        v: Tensor,
        active: ActiveSet,
        event_dim: int | None = None,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(active, event_dim, validate_args, v=v)

    def rsample(self, sample_shape: Any = ()) -> SparseTensor:
        return SparseTensor(self.v.expand(*sample_shape, *self.v.shape), self.active)

    def _log_prob(self, values: Tensor) -> Tensor:
        return sum_to_batch((values == self.v).to(values).log(), self.active, self._batch_dims)

    @property
    def mean(self) -> SparseTensor:
        return SparseTensor(self.v, self.active)

    @property
    def variance(self) -> SparseTensor:
        return SparseTensor(torch.zeros_like(self.v), self.active)


class TransformedDelta(dist.Delta):
    """A point made from a draw by a transform, which gives it a density.

    Pyro's closed form for a Delta would leave that out.
    """


def sum_to_batch(x: Tensor, active: ActiveSet, batch_dims: int) -> Tensor:
    """Sum the active coordinates of each batch element.

    :param x: ``[*extra, K]``.
    :return: ``[*extra, *active.shape[:batch_dims]]``.
    """
    if batch_dims == 0:
        return x.sum(-1)
    batch = active.shape[:batch_dims]
    sums = x.new_zeros(*x.shape[:-1], math.prod(batch))
    sums = sums.index_add(-1, active.batch_index(batch_dims), x)
    return sums.reshape(*x.shape[:-1], *batch)


class SubspacePrior(TorchDistribution):
    """A prior that, for a sparse value, covers the active coordinates only.

    For any other value, and for sampling, it is the prior itself. So it may stand at a site
    whatever the site's value turns out to be.

    :param prior: a distribution whose elements are independent and real-valued.
    """

    arg_constraints: dict = {}  # noqa: RUF012

    def __init__(self, prior: TorchDistribution) -> None:
        self.prior = prior
        super().__init__(prior.batch_shape, prior.event_shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:
        return self.prior.has_rsample

    @property
    def support(self) -> constraints.Constraint:
        return self.prior.support

    @property
    def mean(self) -> Tensor:
        return self.prior.mean

    @property
    def variance(self) -> Tensor:
        return self.prior.variance

    def expand(self, batch_shape: Any, _instance: Any = None) -> SubspacePrior:
        return SubspacePrior(self.prior.expand(batch_shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.prior.sample(torch.Size(sample_shape))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.prior.rsample(torch.Size(sample_shape))

    def entropy(self) -> Tensor:
        return self.prior.entropy()

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of the active coordinates, or of all where ``value`` is dense."""
        if not isinstance(value, SparseTensor) or value.transposed:
            return self.prior.log_prob(value)
        base, mask = elementwise_base(self.prior)
        restricted = restrict(base, value.active)
        if restricted is not None:
            log_prob = restricted.log_prob(value.values)
        else:
            dense_fallbacks[f"{type(base).__name__}.log_prob"] += 1
            log_prob = value.active.gather(base.log_prob(value.to_dense()))
        if mask is not None:
            active = value.active
            log_prob = log_prob.masked_fill(~taken(mask, active.shape, active.indices), 0.0)
        return sum_to_batch(log_prob, value.active, len(value.active.shape) - self.event_dim)


def elementwise_base(fn: Distribution) -> tuple[Distribution, Tensor | None]:
    """The distribution of single elements under ``to_event()`` and ``mask()``, and their mask."""
    mask = None
    while isinstance(fn, Independent | dist.MaskedDistribution):
        if isinstance(fn, dist.MaskedDistribution):
            own = torch.as_tensor(fn._mask)
            own = own.reshape(own.shape + (1,) * len(fn.event_shape))
            mask = own if mask is None else mask & own
        fn = fn.base_dist
    return fn, None if mask is None else mask.expand(fn.batch_shape)


def is_elementwise_real(fn: Distribution) -> bool:
    """Whether a distribution's elements are independent and real-valued."""
    base, _ = elementwise_base(fn)
    try:
        support = base.support
    except NotImplementedError:
        return False
    return base.event_shape == () and isinstance(support, type(constraints.real))


def restrict(base: Distribution, active: ActiveSet) -> Distribution | None:
    """The distribution of the active elements of a distribution of single elements.

    :param base: batch shape ``[*extra, *active.shape]``.
    :return: batch shape ``[*extra, K]`` (or broadcasting to it), or ``None`` where the
        distribution is not given by parameters for each element.
    """
    family: Any = type(base)
    if not _is_given_by_parameters(family):
        return None
    values = {}
    for name in base.arg_constraints:
        param = getattr(base, name, None)
        if not isinstance(param, Tensor) or param.shape != base.batch_shape:
            return None
        values[name] = taken(param, active.shape, active.indices)
    return family(**values, validate_args=False)


@functools.cache
def _is_given_by_parameters(family: Any) -> bool:
    """Whether a family's constructor takes its parameters and nothing else."""
    names = set(inspect.signature(family.__init__).parameters) - {"self", "validate_args"}
    return bool(names) and names == set(family.arg_constraints)


def taken(param: Tensor, shape: torch.Size, indices: Tensor) -> Tensor:
    """Entries of ``param [*extra, *shape]``, reading a repeated number once.

    :param indices: flat, in ``shape``, ``[n]``.
    :return: ``[*extra, n]``, or ``[*extra, 1]`` if all are one number.
    """
    extra = param.dim() - len(shape)
    small = without_repeats(param)
    sizes = small.shape
    if sizes == param.shape:
        return param.reshape(*sizes[:extra], -1).index_select(-1, indices)
    if all(size == 1 for size in sizes[extra:]):
        return small.reshape(*sizes[:extra], 1)
    places = torch.unravel_index(indices, shape)
    flat = torch.zeros_like(indices)
    for size, place in zip(sizes[extra:], places, strict=True):
        flat = flat * size + (place if size > 1 else 0)
    return small.reshape(*sizes[:extra], -1).index_select(-1, flat)


def rows_of(param: Tensor, start: int, stop: int) -> Tensor:
    """Rows of ``param [*shape]`` as a matrix, or the number ``[1]`` that all its entries are."""
    number = single_number(param)
    return param[start:stop].reshape(stop - start, -1) if number is None else number


def single_number(param: Tensor) -> Tensor | None:
    """The number ``[1]`` that ``expand()`` repeated to make a tensor, or None."""
    small = without_repeats(param)
    return small.reshape(1) if small.numel() == 1 else None


def without_repeats(param: Tensor) -> Tensor:
    """A tensor with the dimensions along which it repeats cut down to size 1."""
    sizes = [
        1 if stride == 0 else size for size, stride in zip(param.shape, param.stride(), strict=True)
    ]
    if sizes == list(param.shape):
        return param
    if not param.requires_grad:
        return param.as_strided(sizes, param.stride(), param.storage_offset())
    if param._base is not None and _is_plain_view(param):
        # Past the view itself: the gradient of an expanded tensor has its full size.
        return param._base.as_strided(sizes, param.stride(), param.storage_offset())
    for dim, size in enumerate(sizes):
        param = param.narrow(dim, 0, size)
    return param


_VIEWS = {
    f"{name}Backward0"
    for name in ("Expand", "Permute", "Select", "Slice", "Squeeze", "T", "Transpose", "Unsqueeze")
} | {"SqueezeBackward1", "ViewBackward0"}


def _is_plain_view(param: Tensor) -> bool:
    """Whether autograd, too, has nothing but views between a tensor and its base."""
    base, node = param._base, param.grad_fn
    assert base is not None
    if not base.requires_grad or base.dtype != param.dtype:
        return False
    while type(node).__name__ in _VIEWS and node is not base.grad_fn:
        node = node.next_functions[0][0]  # type: ignore[union-attr]
    return node is not None and (node is base.grad_fn or getattr(node, "variable", None) is base)


@register_kl(Distribution, SubspacePrior)
def _kl_any(p: Distribution, q: SubspacePrior) -> Tensor:
    return kl_divergence(p, q.prior)


@register_kl(dist.Delta, SubspacePrior)
def _kl_delta(p: dist.Delta, q: SubspacePrior) -> Tensor:
    return kl_divergence(p, q.prior)


@register_kl(SparseNormal, SubspacePrior)
def _kl_sparse(p: SparseNormal, q: SubspacePrior) -> Tensor:
    base, mask = elementwise_base(q.prior)
    restricted = restrict(base, p.active)
    if restricted is None or mask is not None:
        raise NotImplementedError  # Pyro then estimates it from the sample
    kl = kl_divergence(p.coordinates, restricted)
    return sum_to_batch(kl, p.active, p._batch_dims)


@register_kl(TransformedDelta, dist.Distribution)  # Pyro's, as in the rule for its Delta
def _kl_transformed_delta(p: TransformedDelta, q: dist.Distribution) -> Tensor:
    return p.log_density - q.log_prob(p.v)


@register_kl(SparseDelta, SubspacePrior)
def _kl_sparse_delta(p: SparseDelta, q: SubspacePrior) -> Tensor:
    return -q.log_prob(p.mean)


class SubspaceMessenger(Messenger):
    """Limits the priors of a model to the active coordinates of whatever sparse values it gets.

    Sites with dense values keep their prior: sampling, conditioning and prediction are as
    without this handler.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or site_is_subsample(msg):
            return
        fn = msg["fn"]
        if isinstance(fn, SubspacePrior) or not isinstance(fn, Distribution):
            return
        if is_elementwise_real(fn):
            msg["fn"] = SubspacePrior(fn)

    def _pyro_post_sample(self, msg: Any) -> None:
        # Before the model uses the value, for there it would fail with less to say.
        fn, value = msg["fn"], msg["value"]
        if isinstance(fn, SubspacePrior) and isinstance(value, SparseTensor):
            event_shape = value.shape[len(value.shape) - fn.event_dim :]
            if event_shape != fn.event_shape:
                raise ValueError(
                    f"site {msg['name']!r} has shape {tuple(fn.event_shape)} in the model, but "
                    f"{tuple(event_shape)} in the guide, which saw another model or other data: "
                    "make a new guide"
                )
