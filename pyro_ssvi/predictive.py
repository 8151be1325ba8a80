"""Predictions by sparse draws, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator
from contextlib import closing
from itertools import repeat
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from .ensemble import Ensemble
from .guides import AutoSparseGuide
from .sparse_tensor import SparseTensor

__all__ = ["SparsePredictive"]


class SparsePredictive(torch.nn.Module):
    """The posterior predictive distribution of a large model, in little memory.

    :class:`pyro.infer.Predictive` makes dense tensors of all weights of all samples before it
    runs the model. This draws one sample after another: weights stay sparse, products are sparse,
    and of each run only what is returned is kept::

        predictive = SparsePredictive(model, guide, num_samples=16)
        y = predictive(x)["obs"]                                    # [16, len(x)]

    Models and arguments are those of :class:`~pyro.infer.Predictive`, and so are the shapes of
    results; those sites are returned that the guide does not have.

    :param model: a Pyro model.
    :param guide: its guide, which need not be sparse, or an :class:`~pyro_ssvi.Ensemble`: its
        members' draws come one member after another, as many from each.
    :param num_samples: number of draws S.
    :param return_sites: names of sites to return instead, and ``"_RETURN"`` for what the model
        returns. A sparse site is returned as a dense tensor ``[S, *shape]``.
    :raises ValueError: at the call, for a name that the model does not have.
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        num_samples: int,
        return_sites: Collection[str] = (),
    ) -> None:
        super().__init__()
        if num_samples < 1:
            raise ValueError(f"expected num_samples >= 1, got {num_samples!r}")
        self.model, self.guide = model, guide
        self.num_samples = num_samples
        self.return_sites = tuple(return_sites)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Run the model on each of the draws.

        :return: ``[S, ...]`` for each site.
        """
        values: dict[str, list[Tensor]] = {}
        with closing(self._guides()) as guides:
            for guide in guides:
                guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
                replayed = poutine.replay(poutine.mask(self.model, mask=False), trace=guide_trace)
                trace = prune_subsample_sites(poutine.trace(replayed).get_trace(*args, **kwargs))
                if not values:
                    padding = self._padding(trace, guide_trace)
                    values = {name: [] for name in padding}
                for name, kept in values.items():
                    value = trace.nodes[name]["value"]
                    kept.append(value.to_dense() if isinstance(value, SparseTensor) else value)
        return {
            name: torch.stack(kept).reshape(self.num_samples, *(1,) * padding[name], *kept[0].shape)
            for name, kept in values.items()
        }

    def _guides(self) -> Generator[Callable, None, None]:
        """The guide of each draw."""
        if isinstance(self.guide, Ensemble):
            yield from self.guide.in_turns(self.num_samples)
        elif isinstance(self.guide, AutoSparseGuide):
            yield from repeat(_SameParams()(self.guide), self.num_samples)
        else:
            yield from repeat(self.guide, self.num_samples)

    def _padding(self, trace: Trace, guide_trace: Trace) -> dict[str, int]:
        """The sites to return, and how many dimensions each lacks to have those of all plates."""
        sites: dict[str, Any] = {
            name: site for name, site in trace.nodes.items() if site["type"] == "sample"
        }
        frames = [frame for site in sites.values() for frame in site["cond_indep_stack"]]
        plates = max((-frame.dim for frame in frames if frame.vectorized), default=0)
        unknown = [name for name in self.return_sites if name not in sites and name != "_RETURN"]
        if unknown:
            raise ValueError(f"return_sites has {unknown}, but the model has {list(sites)}")
        names = self.return_sites or [name for name in sites if name not in guide_trace]
        return {
            name: 0 if name == "_RETURN" else plates - len(sites[name]["fn"].batch_shape)
            for name in names
        }


class _SameParams(Messenger):
    """Has one sparse guide compute its parameters once: they are the same for all draws.

    The scales of all coordinates take as long as a draw of them. Guides of other kinds may have
    parts with parameters of one name, or parameters that a plate narrows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, Tensor] = {}

    def _pyro_param(self, msg: Any) -> None:
        if msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True

    def _pyro_post_param(self, msg: Any) -> None:
        self.values[msg["name"]] = msg["value"]
