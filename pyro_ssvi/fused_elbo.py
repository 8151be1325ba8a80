"""The ELBO of a sparse guide with one draw and one density for all sites.

A guide of many small sites spends most of a step in bookkeeping: messengers, a trace, a
distribution and its checks for each site. Where nothing needs them, this computes the very
estimates of Trace_ELBO and TraceMeanField_ELBO from the guide's flat parameters.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro import distributions as dist
from pyro.distributions.util import scale_and_mask
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from pyro.util import check_site_shape
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributions import kl_divergence

from .distributions import SubspacePrior, elementwise_base, is_elementwise_real, single_number
from .guides import AutoSparseDelta, AutoSparseLowRankMultivariateNormal, AutoSparseNormal
from .guides.site_table import Site
from .low_rank_draw import low_rank_draw
from .sparse_tensor import SparseTensor

__all__ = ["FusedELBO", "NotFusedError"]

_GUIDES = (AutoSparseNormal, AutoSparseDelta, AutoSparseLowRankMultivariateNormal)


class NotFusedError(Exception):
    """The model has something that only Pyro's own ELBO knows how to treat."""


class FusedELBO:
    """Trace_ELBO or TraceMeanField_ELBO for one particle and a sparse guide of this package.

    Distributions and values are not validated: take the first step with Pyro's ELBO. Shapes are.

    :param loss: the ELBO to stand in for.
    :param guide: the guide.
    :param args: of the model, as are ``kwargs``: for a guide that is loaded from a file and has
        not seen the model yet.
    :raises NotFusedError: if it is another loss, or another guide.
    """

    def __init__(self, loss: Any, guide: Any, *args: Any, **kwargs: Any) -> None:
        if not _draws_as_ours(guide):
            raise NotFusedError
        if type(loss) not in (Trace_ELBO, TraceMeanField_ELBO):
            raise NotFusedError
        guide.set_up(*args, **kwargs)
        frames = [frame for site in guide.sites for frame in site.frames]
        subsampled = any(frame.full_size not in (None, frame.size) for frame in frames)
        if subsampled or len({site.dtype for site in guide.sites}) > 1:
            raise NotFusedError
        self.loss, self.guide = loss, guide
        self.closed_form = isinstance(loss, TraceMeanField_ELBO)
        self._sizes: tuple[tuple[int, ...], Tensor] | None = None

    def __call__(
        self,
        model: Any,
        args: tuple,
        kwargs: dict,
        kl_weight: float = 1.0,
        local_reparam: bool = False,
    ) -> Tensor:
        """The loss, differentiable.

        :param model: the user's model.
        :param kl_weight: factor of the latent sites' densities.
        :param local_reparam: whether products draw their own result.
        :raises NotFusedError: if the model has something that only Pyro's own ELBO can treat.
        """
        loss, guide = self.loss, self.guide
        if loss.num_particles != 1 or loss.retain_graph:
            raise NotFusedError
        if guide._forward_hooks or guide._forward_pre_hooks:
            raise NotFusedError
        with _Run({}) as plates:
            if guide.create_plates is not None:
                guide.create_plates(*args, **kwargs)
        with guide._pyro_context:  # so that reading them is a pyro.param statement
            flat = guide.flat_parameters()
        if flat[0].dtype != guide.sites[0].dtype:  # it was moved to another precision
            raise NotFusedError
        draw, log_density, noise = _draw(guide, flat)
        whole = (draw,) if noise is None else (draw, *flat, noise)
        parts = guide.split(*whole)

        def posterior(site: Site, z: Tensor, *normal: Tensor) -> Any:
            """Of one site, given its parts of ``whole``."""
            if noise is None:
                return guide.site_value(site, z)
            loc, scale, _ = normal
            return guide.site_posterior(site, loc, scale)

        values, posteriors = {}, {}
        for site, part in zip(guide.sites, parts, strict=True):
            z = part[0]
            if site.is_sparse:
                value: Any = SparseTensor(z, guide.active_sets[site.name])
                if local_reparam:
                    value.posterior = posterior(site, *part)
            elif site.transform is None:
                value = z.reshape(site.shape)
            else:
                q = posteriors[site.name] = posterior(site, *part)
                value = q.v if noise is None else q.transforms[0](z.reshape(site.shape))
            values[site.name] = value

        with _Run(values, plates.subsamples) as run:
            model(*args, **kwargs)
        if len(run.latent) != len(values):
            raise NotFusedError
        likelihood: Any = 0.0
        for msg in run.observed:
            msg["log_prob"] = _log_prob(msg["fn"], msg)
            if is_validation_enabled():
                check_site_shape(msg, loss.max_plate_nesting)
            likelihood = likelihood + msg["log_prob"].sum()

        divergence: Any = log_density
        plain, means, stds = [], [], []  # sites whose prior is a normal with two numbers
        for site, part in zip(guide.sites, parts, strict=True):
            msg = run.latent[site.name]
            numbers = self._numbers(site, msg)
            if numbers is not None:
                plain.append(part)
                means.append(numbers[0])
                stds.append(numbers[1])
                continue
            q = posteriors.get(site.name) or posterior(site, *part)
            divergence = divergence + self._divergence(q, msg)
        if plain:
            sizes = tuple(len(part[0]) for part in plain)
            if len(plain) < len(parts):
                whole = tuple(torch.cat(each) for each in zip(*plain, strict=True))
            prior = torch.cat(means), torch.cat(stds), sizes
            divergence = divergence + self._plain_divergence(prior, *whole)
        return kl_weight * divergence - likelihood

    def _as_tensor(self, sizes: tuple[int, ...], like: Tensor) -> Tensor:
        if self._sizes is None or self._sizes[0] != sizes:  # copied to a device once
            self._sizes = sizes, torch.tensor(sizes, dtype=like.dtype, device=like.device)
        return self._sizes[1]

    @staticmethod
    def _numbers(site: Site, msg: Any) -> tuple[Tensor, Tensor] | None:
        """The one mean and the one standard deviation of a site with such a normal prior."""
        scaled = isinstance(msg["scale"], Tensor) or msg["scale"] != 1.0
        if site.transform is not None or msg["mask"] is not None or scaled:
            return None
        base: Any
        base, mask = elementwise_base(msg["fn"])
        if mask is not None or type(base) is not dist.Normal:
            return None
        mean, std = single_number(base.loc), single_number(base.scale)
        return None if mean is None or std is None else (mean, std)

    def _plain_divergence(
        self,
        prior: tuple[Tensor, Tensor, tuple[int, ...]],
        draw: Tensor,
        loc: Tensor | None = None,
        scale: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """The KL divergence from normal priors, or its estimate from the draw.

        :param prior: mean, standard deviation and size of each of several sites, ``[n]`` each.
        :param draw: of their coordinates, ``[K]``.
        :param loc: ``[K]``, as are ``scale`` and ``noise``: of independent normals. Without them
            the draw's own density is left out.
        """
        mean, std, sizes = prior
        result = torch.dot(self._as_tensor(sizes, std), std.log())
        if loc is None or scale is None or noise is None:
            constant = 0.5 * math.log(2 * math.pi) * sum(sizes)
            return result + 0.5 * _squares(draw, mean, std, sizes) + constant
        result = result - scale.log().sum()
        if self.closed_form:
            square = _squares(loc, mean, std, sizes)
            square = square + _squares(scale, torch.zeros_like(mean), std, sizes) - sum(sizes)
        else:
            square = _squares(draw, mean, std, sizes) - torch.dot(noise, noise)
        return result + 0.5 * square

    def _divergence(self, q: Any, msg: Any) -> Tensor:
        """The same for any site, as Pyro has it."""
        prior = SubspacePrior(msg["fn"]) if is_elementwise_real(msg["fn"]) else msg["fn"]
        if self.closed_form:
            try:
                return kl_divergence(q, prior).sum()
            except NotImplementedError:
                pass
        return q.log_prob(msg["value"]).sum() - _log_prob(prior, msg).sum()


def _draws_as_ours(guide: Any) -> bool:
    """Whether its class is one of this package, or differs in constants only, such as
    ``scale_constraint``."""
    classes = type(guide).__mro__
    ours = next((kind for kind in classes if kind in _GUIDES), None)
    if ours is None:
        return False
    own = [kind for kind in classes if kind not in ours.__mro__]
    return not any(hasattr(value, "__get__") for kind in own for value in vars(kind).values())


def _draw(guide: Any, flat: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | float, Tensor | None]:
    """A draw of all coordinates, with the numbers that the guide itself would draw.

    :return: ``[K]``; its log density, or 0 where sites have densities of their own; and, of
        independent normals, the noise it is made from.
    """
    if isinstance(guide, AutoSparseDelta):
        return flat[0], 0.0, None
    if isinstance(guide, AutoSparseLowRankMultivariateNormal):
        return *low_rank_draw(*flat), None
    loc, scale = flat
    noise = torch.empty_like(loc)
    for (z,) in guide.split(noise):
        z.normal_()  # site by site, for the numbers that the guide would draw
    return torch.addcmul(loc, scale, noise), 0.0, noise


class _Squares(torch.autograd.Function):
    """One pass over all sites, and one vector kept, where elementwise functions take several."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, std: Tensor, sizes: tuple[int, ...]) -> Tensor:
        z = torch.empty_like(x)
        parts = zip(x.split(sizes), z.split(sizes), mean.unbind(), std.unbind(), strict=True)
        squares = []
        for x_i, z_i, mean_i, std_i in parts:
            torch.sub(x_i, mean_i, out=z_i).div_(std_i)
            squares.append(torch.dot(z_i, z_i))
        squares_of = torch.stack(squares)
        ctx.save_for_backward(z, std, squares_of)
        ctx.sizes = sizes
        return squares_of.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        z, std, squares = ctx.saved_tensors
        factor = 2 * g / std
        grad_x = torch.empty_like(z)
        parts = zip(grad_x.split(ctx.sizes), z.split(ctx.sizes), factor.unbind(), strict=True)
        for grad_i, z_i, factor_i in parts:
            torch.mul(z_i, factor_i, out=grad_i)
        grad_mean = grad_std = None
        if ctx.needs_input_grad[1]:
            grad_mean = -torch.stack([part.sum() for part in grad_x.split(ctx.sizes)])
        if ctx.needs_input_grad[2]:
            grad_std = -factor * squares
        return grad_x, grad_mean, grad_std, None


def _squares(x: Tensor, mean: Tensor, std: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The sum of ``((x - mean) / std)^2``.

    :param x: ``[K]``, of ``n`` sites with so many elements as ``sizes`` says.
    :param mean: ``[n]``, as is ``std``.
    """
    return _Squares.apply(x, mean, std, sizes)


def _log_prob(fn: Any, msg: Any) -> Tensor:
    try:
        log_prob = fn.log_prob(msg["value"], *msg["args"], **msg["kwargs"])
    except ValueError:
        raise NotFusedError from None  # Pyro says it better
    return scale_and_mask(log_prob, msg["scale"], msg["mask"])


class _Run(Messenger):
    """Gives latent sites their values, and keeps what has a density."""

    def __init__(self, values: dict[str, Any], subsamples: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        self.values = values
        self.subsamples = {} if subsamples is None else subsamples
        self.latent: dict[str, Any] = {}
        self.observed: list[Any] = []
        self.names: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if site_is_subsample(msg):
            if name in self.subsamples:
                msg["value"], msg["done"] = self.subsamples[name], True
            return
        if name in self.names:
            raise NotFusedError
        self.names.add(name)
        if msg["is_observed"]:
            return
        if isinstance(msg["fn"], SubspacePrior):  # of a model that was wrapped before
            msg["fn"] = msg["fn"].prior
        if name not in self.values or msg["fn"].shape() != self.values[name].shape:
            raise NotFusedError
        msg["value"], msg["done"] = self.values[name], True
        self.latent[name] = msg

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self.subsamples[msg["name"]] = msg["value"]
        elif msg["is_observed"] and not msg["infer"].get("_deterministic"):
            self.observed.append(msg)
