"""Constraints as plain data, so that a file tells what its parameters mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from pyro.distributions import constraints as pyro_constraints
from torch import Tensor
from torch.distributions import constraints, transform_to
from torch.distributions.constraints import Constraint

from .plain_data import check_form, check_tensor

__all__ = ["check_constrained", "constraint_difference", "constraint_state", "read_constraint"]


def constraint_state(constraint: Any) -> Any:
    """A constraint of torch or Pyro by its class and fields; ``None`` for one of the user's."""
    if not isinstance(constraint, Constraint):
        return constraint.item() if isinstance(constraint, np.generic) else constraint
    if _constraint_class(type(constraint).__name__) is not type(constraint):
        return None
    fields = {}
    for name, value in vars(constraint).items():
        several = isinstance(value, list | tuple)
        fields[name] = [constraint_state(v) for v in value] if several else constraint_state(value)
    return {"class": type(constraint).__name__, "fields": fields}


def _constraint_class(name: str) -> type[Constraint] | None:
    for module in (constraints, pyro_constraints):
        found = getattr(module, name, None)
        if isinstance(found, type) and issubclass(found, Constraint):
            return found
    return None


def read_constraint(state: Any) -> Any:
    if isinstance(state, list):
        return [read_constraint(item) for item in state]
    if not isinstance(state, dict):
        return state
    check_form(state, {"class": str, "fields": {str: object}}, "the constraint")
    found = _constraint_class(state["class"])
    if found is None:
        raise ValueError(f"unknown constraint {state['class']!r}: upgrade torch or pyro-ppl")
    constraint = found.__new__(found)
    for name, value in state["fields"].items():
        if callable(getattr(found, name, None)):
            raise ValueError(f"{name!r} is no field of {state['class']}")
        constraint.__dict__[name] = read_constraint(value)
    return constraint


def check_constrained(name: str, entry: Mapping[str, Any]) -> Any:
    """The constraint of a parameter in a file, which has been seen to serve its value.

    :param entry: ``{"value": unconstrained, "constraint": what constraint_state() gave}``.
    :return: ``None`` for one of the user's.
    :raises ValueError: if it does not.
    """
    check_tensor(entry["value"], f"parameter {name!r}")
    if not (entry["value"].is_floating_point() or entry["value"].is_complex()):
        raise ValueError(f"parameter {name!r} is of {entry['value'].dtype}")
    try:
        constraint = read_constraint(entry["constraint"])
        if constraint is not None:
            transform_to(constraint)(entry["value"])
    except Exception as error:
        raise ValueError(f"the constraint of parameter {name!r} is damaged: {error}") from error
    return constraint


def constraint_difference(saved: Any, constraint: Any) -> str | None:
    """How a constraint in a file differs from one here, in words; ``None`` if it does not.

    Of a user's constraint nothing is known.
    """
    state = constraint_state(constraint)
    if saved is None or state is None or _same(saved, state):
        return None
    try:
        words = repr(read_constraint(saved))
    except Exception:  # of a later version, or damaged
        words = repr(saved)
    return f"saved as {words}, here it is {constraint}"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a.cpu(), b.cpu())
    numbers = all(type(each) in (int, float) for each in (a, b))
    return (numbers or type(a) is type(b)) and a == b
