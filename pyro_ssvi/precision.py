"""Sparse products and gradients in their own precision, whatever autocast says."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

__all__ = ["as_it_is"]

F = TypeVar("F", bound=Callable[..., Any])


def as_it_is(function: F) -> F:
    """A function in the dtype of its inputs: autocast is for those who multiply densely.

    :param function: its second argument, after ``self`` or ``ctx``, is on the device it uses.
    """

    @functools.wraps(function)
    def wrapped(first: Any, second: Any, *args: Any) -> Any:
        device = second.device.type
        if not torch.is_autocast_enabled(device):
            return function(first, second, *args)
        with torch.autocast(device, enabled=False):
            return function(first, second, *args)

    return cast(F, wrapped)
