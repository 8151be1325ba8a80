"""An optimizer's memory of each coordinate."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import Optimizer

from .exchange import carry

__all__ = ["carry_state"]


def carry_state(optim: PyroOptim | Optimizer, param: Tensor, source: Tensor) -> None:
    """Move an optimizer's state along with its coordinates; new ones start as at a first step.

    This covers every tensor of the parameter's shape in the parameter's state: moments,
    momentum, running squares, step sizes. What counts steps for the whole parameter stays.

    :param optim: SSVI's optimizer, or the torch optimizer of a loop of your own.
    :param source: as in :class:`~pyro_ssvi.exchange.Move`, ``[K]``.
    """
    own: Any = optim
    if isinstance(optim, PyroOptim):
        own = optim.optim_objs.get(param)
        # A PyroLRScheduler holds a torch scheduler, which holds the optimizer.
        own = getattr(own, "optimizer", own)
    if own is None or param not in own.state:
        return
    first = _first_state(own, param)
    for key, value in own.state[param].items():
        if isinstance(value, Tensor) and value.shape == param.shape:
            start = first.get(key, value.new_zeros(()))
            carry(value, source, start.to(value).expand_as(value))


def _first_state(optim: Optimizer, param: Tensor) -> dict[str, Tensor]:
    """What the optimizer holds of a coordinate that has had one step, with gradient 0.

    Mostly 0, but not always: Rprop and Adagrad start at numbers of their own.
    """
    group = next(g for g in optim.param_groups if any(p is param for p in g["params"]))
    options = inspect.signature(type(optim)).parameters.keys() & group.keys() - {"params"}
    coordinate = torch.zeros(1, dtype=param.dtype, device=param.device, requires_grad=True)
    coordinate.grad = torch.zeros_like(coordinate)
    stand_in = type(optim)([coordinate], **{name: group[name] for name in options})
    stand_in.step()
    state = stand_in.state[coordinate]
    return {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == (1,)}
