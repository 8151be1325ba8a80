"""What to look at while training, and after it, that the usual libraries do not have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import kl_divergence

from .active_set import ActiveSet
from .addition import Evidence
from .distributions import SubspaceMessenger, taken
from .evidence import removal_gain
from .exchange import rows_at_once
from .gradient_record import GradientRecord
from .guides import AutoSparseDelta
from .model_messages import EvidenceMessenger
from .random_state import leaving_no_trace

if TYPE_CHECKING:
    from .svi import SSVI

__all__ = [
    "ELBOParts",
    "Support",
    "Uncertainty",
    "class_calibration_error",
    "elbo_parts",
    "evidence_support",
    "overlap",
    "uncertainty",
]


class ELBOParts(NamedTuple):
    """The two sides of an ELBO, in nats.

    :ivar log_likelihood: expected log likelihood of what is observed.
    :ivar kl: divergence of the posterior from the prior, by site. A posterior that correlates
        sites has its own log density under a name of its own; only the sum is a divergence then.
    """

    log_likelihood: float
    kl: dict[str, float]

    @property
    def elbo(self) -> float:
        """The ELBO at a KL weight of 1."""
        return self.log_likelihood - sum(self.kl.values())


@torch.no_grad()
def elbo_parts(
    model: Callable, guide: Callable, *args: Any, num_particles: int = 1, **kwargs: Any
) -> ELBOParts:
    """Likelihood and KL divergence apart, for a sparse guide or any other::

        parts = elbo_parts(model, guide, x, y)
        print(f"log likelihood {parts.log_likelihood:.0f}, KL {sum(parts.kl.values()):.0f}")

    The KL divergence is in closed form where torch has one, else estimated. It is normal that
    it rises while the likelihood does: data move the posterior away from the prior.

    :param model: the model as :class:`~pyro_ssvi.SSVI` got it, without enumerated sites.
    :param guide: its guide; ``*args, **kwargs`` are those of both.
    :param num_particles: how many draws the expectations are averaged over.
    """
    log_likelihood = 0.0
    kl: dict[str, float] = {}
    for _ in range(num_particles):
        guide_trace = prune_subsample_sites(poutine.trace(guide).get_trace(*args, **kwargs))
        with SubspaceMessenger():
            model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(
                *args, **kwargs
            )
        for name, site in prune_subsample_sites(model_trace).nodes.items():
            if site["type"] != "sample":
                continue
            if site["is_observed"]:
                log_likelihood += float(_log_prob(site)) / num_particles
            elif name in guide_trace:
                each = _kl(guide_trace.nodes[name], site)
                kl[name] = kl.get(name, 0.0) + float(each) / num_particles
        for name, site in guide_trace.nodes.items():
            if site["type"] == "sample" and name not in model_trace:
                # What AutoNormal draws for a constrained site, and then transforms; or a joint
                # draw of all sites, whose density has no part for each.
                key = name.removesuffix("_unconstrained")
                kl[key] = kl.get(key, 0.0) + float(_log_prob(site)) / num_particles
    return ELBOParts(log_likelihood, kl)


def _kl(guide_site: Any, model_site: Any) -> Tensor:
    try:
        kl = kl_divergence(guide_site["fn"], model_site["fn"])
    except NotImplementedError:
        return _log_prob(guide_site) - _log_prob(model_site)
    return scale_and_mask(kl, guide_site["scale"], guide_site["mask"]).sum()


def _log_prob(site: Any) -> Tensor:
    log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(log_prob, site["scale"], site["mask"]).sum()


class Support(NamedTuple):
    """How many coordinates of a site the data pay for.

    :ivar numel: all of them.
    :ivar active: the active ones.
    :ivar kept: the active ones whose removal would cost evidence.
    :ivar promising: the inactive ones whose addition, each alone, would gain evidence.
    """

    numel: int
    active: int
    kept: int
    promising: int

    @property
    def density(self) -> float:
        """The share that evidence would have active, were each coordinate alone.

        Promising ones often want the same thing, so in a network it is too high; while ``kept``
        is well below ``active``, the density is higher than the data pay for.
        """
        return (self.kept + self.promising) / self.numel


def evidence_support(svi: SSVI, batches: Iterable[tuple]) -> dict[str, Support]:
    """What density the log evidence suggests for each sparse site, see :mod:`pyro_ssvi.evidence`::

        for name, support in evidence_support(svi, [(x, y)]).items():
            print(f"{name}: {support.kept} of {support.active} kept, {support.promising} more")

    :param svi: in training, or trained; nothing in it changes. Its guide has a posterior, and its
        sparse sites have normal priors around 0.
    :param batches: arguments of the model; ten batches or more, or one of all data.
    :raises ValueError: for an :class:`~pyro_ssvi.AutoSparseDelta`, or another prior.
    """
    if any(isinstance(guide, AutoSparseDelta) for guide in svi.guides):
        raise ValueError("evidence_support needs a posterior, and AutoSparseDelta has none")
    record = GradientRecord()
    with leaving_no_trace():
        for args in batches:
            with EvidenceMessenger(record):
                svi._backward(args, {}, record=record)
    result = {}
    with torch.no_grad():
        for guide in svi.guides:
            parts = guide.split(*guide.for_removal())
            for site, (loc, scale) in zip(guide.sites, parts, strict=True):
                active = guide.active_sets[site.name]
                if site.is_sparse and active in record:
                    prior = record.priors[active]
                    prior_scale = taken(prior.scale, active.shape, active.indices)
                    kept = int((removal_gain(loc, scale, prior_scale) < 0).sum())
                    promising = _promising(active, record)
                    result[site.name] = Support(active.numel(), len(active), kept, promising)
    return result


def _promising(active: ActiveSet, record: GradientRecord) -> int:
    criterion = Evidence(len(record.scales))
    rows, cols = active.matrix_shape
    step = rows_at_once(cols)
    total = sum(
        int((criterion.scores(active, start, min(start + step, rows), record) > 0).sum())
        for start in range(0, rows, step)
    )
    sums = criterion.read(active, active.indices, record)
    return total - int((criterion.scores_at(active, active.indices, sums, record) > 0).sum())


class Uncertainty(NamedTuple):
    """How unsure a prediction is, in nats, ``[N]`` each.

    :ivar total: entropy of the mean prediction.
    :ivar epistemic: what the weights share in it: the mutual information of label and weights.
    """

    total: Tensor
    epistemic: Tensor


def uncertainty(probs: Tensor) -> Uncertainty:
    """Entropy of a posterior prediction, and its epistemic part (Depeweg et al., ICML 2018).

    Out-of-distribution data should have more of both.

    :param probs: class probabilities of each posterior sample, ``[S, N, classes]``.
    """
    total = torch.special.entr(probs.mean(0)).sum(-1)
    return Uncertainty(total, total - torch.special.entr(probs).sum(-1).mean(0))


def class_calibration_error(probs: Tensor, labels: Tensor, bins: int = 15) -> Tensor:
    """Class-wise L2 calibration error, debiased: what the SSVI paper calls ECE.

    The root of the mean over classes of ``E (p - P(label | p))^2``, by bins of equal counts, from
    which the noise of the bins' frequencies is taken out (Kumar, Liang, Ma, NeurIPS 2019, section
    5). The usual top-label ECE is torchmetrics' ``multiclass_calibration_error``.

    :param probs: ``[N, classes]``.
    :param labels: int64 ``[N]``.
    :return: a number, 0 where the estimate of its square is negative.
    """
    hits = torch.nn.functional.one_hot(labels, probs.shape[-1]).to(probs)
    order = probs.argsort(0)
    squares = probs.new_zeros(probs.shape[-1])
    for part in order.tensor_split(bins):
        n = len(part)
        if n < 2:
            continue
        rate = hits.gather(0, part).mean(0)
        gap = (probs.gather(0, part).mean(0) - rate).square()
        squares += n / len(probs) * (gap - rate * (1 - rate) / (n - 1))
    return squares.mean().clamp(min=0).sqrt()


def overlap(before: Mapping[str, ActiveSet], after: Mapping[str, ActiveSet]) -> dict[str, float]:
    """How much of each site's active set is the same at two times, as intersection over union.

    Active sets never change, so ``guide.active_sets`` may be kept for later::

        before = guide.active_sets
        train(...)
        overlap(before, guide.active_sets)

    :return: 1 for a site whose active set is the same, 0 for one that shares nothing.
    """
    result = {}
    for name, first in before.items():
        both = int(torch.isin(first.indices, after[name].indices, assume_unique=True).sum())
        result[name] = both / (len(first) + len(after[name]) - both)
    return result
