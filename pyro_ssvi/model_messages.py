"""What evidence needs to know of a run of the model."""

from __future__ import annotations

from typing import Any

from pyro import distributions as dist
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .distributions import SubspacePrior, elementwise_base, without_repeats
from .gradient_record import GradientRecord, Prior
from .sparse_tensor import SparseTensor

__all__ = ["EvidenceMessenger"]


class EvidenceMessenger(Messenger):
    """Notes the priors of sparse values, and what the likelihood is multiplied by.

    A prior may depend on other sites, such as a scale of all weights: then it is that of this
    run's draw. Likelihoods must all be multiplied by one number, as by
    ``plate(..., subsample_size)`` or ``poutine.scale``.

    :param record: where to. Use it around one run of the model.
    :raises ValueError: for a prior that is not normal around 0, with the site's name.
    """

    def __init__(self, record: GradientRecord) -> None:
        super().__init__()
        self.record = record
        self._first: str | None = None  # observed site of this run

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) or msg["infer"].get("_deterministic"):
            return
        if msg["is_observed"]:
            self._observed(msg["name"], _number(msg))
        elif isinstance(msg["fn"], SubspacePrior) and isinstance(msg["value"], SparseTensor):
            active = msg["value"].active
            self.record.priors[active] = _prior(msg, active.shape)

    def _observed(self, name: str, scale: float) -> None:
        scales = self.record.scales
        if self._first is None:
            self._first = name
            scales.append(scale)
        elif scales[-1] != scale:
            raise ValueError(
                f"evidence needs one factor for all likelihoods, but that of site {self._first!r} "
                f"is multiplied by {scales[-1]:g} and that of {name!r} by {scale:g}"
            )


def _number(msg: Any) -> float:
    scale = msg["scale"]
    if isinstance(scale, Tensor) and scale.numel() != 1:
        raise ValueError(
            f"evidence needs one factor for a likelihood, but that of site {msg['name']!r} has "
            f"shape {tuple(scale.shape)}"
        )
    return float(scale)


def _prior(msg: Any, shape: Any) -> Prior:
    base: Any
    base, mask = elementwise_base(msg["fn"].prior)
    normal = isinstance(base, dist.Normal) and base.batch_shape == shape and mask is None
    if not normal or bool((without_repeats(base.loc) != 0).any()):
        raise ValueError(
            f"evidence needs a normal prior around 0, but that of site {msg['name']!r} is "
            f"{msg['fn'].prior}: use other criteria, or leave the site dense"
        )
    weight = _number(msg)
    if not weight > 0:
        raise ValueError(f"evidence needs a KL weight > 0, got {weight:g} at {msg['name']!r}")
    return Prior(base.scale.detach(), weight)
