"""An optimizer's memory of each coordinate."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import Optimizer

from .exchange import carry

__all__ = ["carry_state"]


def carry_state(optim: PyroOptim | Optimizer, param: Tensor, source: Tensor) -> None:
    """Move an optimizer's state along with its coordinates; new ones start at 0.

    This covers every tensor of the parameter's shape in the parameter's state: moments,
    momentum, running squares. What counts steps for the whole parameter stays.

    :param source: as in :class:`~pyro_ssvi.exchange.Move`, ``[K]``.
    """
    with torch.no_grad():
        for state in _states(optim, param):
            for value in state.values():
                if isinstance(value, Tensor) and value.shape == param.shape:
                    carry(value, source, torch.zeros_like(value))


def _states(optim: PyroOptim | Optimizer, param: Tensor) -> Iterator[dict]:
    if isinstance(optim, PyroOptim):
        own = optim.optim_objs.get(param)
        # A PyroLRScheduler holds a torch scheduler, which holds the optimizer.
        optim = getattr(own, "optimizer", own)
    if optim is not None and param in optim.state:
        yield optim.state[param]
