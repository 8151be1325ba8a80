"""Whether an optimizer can go on from a saved state: it is asked to, with a copy."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from inspect import unwrap
from typing import Any

import numpy as np
import torch
from pyro.optim.optim import _load_state_dict, is_scheduler
from torch import Tensor

from .plain_data import check_tensor
from .random_state import leaving_no_trace

__all__ = ["refusals"]


def refusals(
    made: Any, parameter: Tensor, state: Mapping[str, Any], stepped: bool
) -> Iterator[str]:
    """Why an optimizer cannot go on from a state: it takes a step without it, and one with it.

    Only an optimizer can tell what it needs. One of the user's may need more than a gradient, and
    takes no step.

    :param made: a new one, as Pyro makes it, of ``parameter`` alone. Both are changed.
    :param state: what is to be loaded.
    :param stepped: whether there were steps before it was saved.
    :raises Exception: what the optimizer raises while it loads the state.
    """
    optimizer = made.optimizer if is_scheduler(made) else made
    start = parameter.detach().clone()
    options, first = dict(optimizer.param_groups[0]), dict(optimizer.state.get(parameter, {}))
    _load_state_dict(made, copy.deepcopy(state))
    for name, value in optimizer.param_groups[0].items():
        nan = isinstance(value, float) and math.isnan(value)
        if name != "params" and (nan or not _alike(value, options.get(name))):
            yield f"{name!r} was saved as {value!r}"
    loaded = dict(optimizer.state.get(parameter, {}))
    fresh = _after_a_step(optimizer, parameter, first)
    for name, value in loaded.items():
        if not isinstance(value, Tensor):
            continue
        check_tensor(value, repr(name))
        if fresh is not None:
            like = fresh.get(name)
        else:  # it was not asked: vectors are like a vector
            like = parameter if value.dim() == parameter.dim() == 1 else None
        if isinstance(like, Tensor) and value.shape != like.shape:
            words = f"{name!r} was saved with shape {tuple(value.shape)}"
            yield f"{words}, expected {tuple(like.shape)}"
    if fresh is None:
        return
    with torch.no_grad():
        parameter.copy_(start)
    if _after_a_step(optimizer, parameter, dict(loaded)) is None:
        yield f"it cannot go on from {sorted(loaded)} as they were saved"
    if stepped and not loaded and any(isinstance(value, Tensor) for value in fresh.values()):
        yield "what it had of earlier steps is not in it"


def _after_a_step(optimizer: Any, parameter: Tensor, state: dict[str, Any]) -> Any:
    """What an optimizer has after a step from some state.

    :return: ``None`` if it can take none that leaves finite numbers, or is not torch's or Pyro's.
    """
    own = type(optimizer).__module__.startswith(("torch.optim", "pyro.optim"))
    if not own or optimizer.param_groups[0].get("subsample_aware"):
        return None
    parameter.grad = torch.ones_like(parameter)
    optimizer.state[parameter] = state
    try:
        with leaving_no_trace(), torch.no_grad():
            unwrap(type(optimizer).step)(optimizer)  # past the hooks of others
    except Exception:
        return None
    return dict(optimizer.state[parameter]) if parameter.isfinite().all() else None


def _alike(saved: Any, ours: Any) -> bool:
    """Whether a setting of an optimizer can stand for another."""
    if isinstance(saved, (list, tuple)) and isinstance(ours, (list, tuple)):
        return len(saved) == len(ours) and all(map(_alike, saved, ours))
    return saved is None or ours is None or _kind(saved) is _kind(ours)


def _kind(value: Any) -> type:
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.dim() == 0):
        value = value.item()
    return float if type(value) is int else type(value)
