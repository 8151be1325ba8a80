"""What files are made of: numbers, strings, tensors, and lists, tuples and dicts of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Maybe", "check_form", "check_plain", "check_tensor", "plain"]

_SIMPLE = (bool, int, float, str, type(None))
_DEPTH = 100


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy as plain data, which nothing changes any more, and which can be loaded.

    :param where: what it is, for messages.
    :param depth: how many containers it is in.
    :raises TypeError: if it holds anything else.
    :raises ValueError: if a tensor has no numbers, or containers are nested too deeply.
    """
    if depth > _DEPTH - 10:  # a file has what this gives some levels down
        raise ValueError(f"{where} is nested too deeply for a checkpoint")
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Tensor):
        copied = value.detach().clone()
        if copied.layout == torch.strided:
            check_tensor(copied, where)
        if type(copied) is Tensor:
            return copied
    if type(value) in _SIMPLE:
        return value
    if isinstance(value, Mapping):
        items = {}
        for key, item in value.items():
            name = plain(key, f"a key of {where}", depth + 1)
            items[name] = plain(item, f"{where}[{key!r}]", depth + 1)
        return Counter(items) if isinstance(value, Counter) else items
    if type(value) in (list, tuple):
        return type(value)(plain(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value))
    raise TypeError(
        f"{where} is a {type(value).__name__}: a checkpoint takes numbers, strings, tensors, and "
        "lists, tuples and dicts of them"
    )


def check_plain(state: Any, items: int, memory: int) -> None:
    """Whether what was read from a file is plain data.

    :param items: how many there may be. One container in many places, or in itself, has few bytes
        and no end.
    :param memory: how many bytes of numbers the file has. Torch gives a tensor that asks for more
        what it finds.
    :raises ValueError: if it is not, or is nested too deeply.
    """
    storages: dict[int, int] = {}
    nodes = [iter([state])]
    while nodes:
        value = next(nodes[-1], nodes)
        if value is nodes:
            nodes.pop()
            continue
        items -= 1
        if items < 0 or len(nodes) > _DEPTH:
            raise ValueError("it holds itself, or the same again and again")
        if isinstance(value, Tensor):
            if value.layout == torch.strided:
                check_tensor(value, "a tensor")
                storage = value.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            nodes.append(_items(value))
        elif type(value) in (list, tuple):
            nodes.append(iter(value))
        elif type(value) not in _SIMPLE:
            raise ValueError(f"it holds a {type(value).__name__}")
    if sum(storages.values()) > memory:
        raise ValueError("it has tensors without numbers")


def _items(mapping: dict) -> Iterator[Any]:
    for key, value in mapping.items():
        yield key
        yield value


def check_tensor(value: Any, what: str) -> None:
    """Whether a tensor is an ordinary one, with memory for each of its elements.

    :raises ValueError: if it is not: one number, repeated, could stand for more than fit a machine.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"expected {what}, got {type(value).__name__}")
    if value.layout != torch.strided or value.device.type == "meta" or value.is_quantized:
        raise ValueError(f"{what} is not dense: {value.layout}, {value.dtype}, {value.device.type}")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(f"{what} of shape {tuple(value.shape)} has no numbers for all of it")


class Maybe(NamedTuple):
    """The form of what may be missing."""

    form: Any


def check_form(value: Any, form: Any, where: str = "") -> None:
    """Compare data with a form.

    :param form: a type or several; ``[form]`` for a list of any length; ``{name: form}`` for a
        dict that has these keys, ``{str: form}`` for one with keys of that type.
    :param where: how to get to ``value``, for messages.
    :raises ValueError: with the first difference.
    """
    if isinstance(form, list):
        _check_type(value, (list, tuple), where)
        for i, item in enumerate(value):
            check_form(item, form[0], f"{where}[{i}]")
    elif isinstance(form, dict):
        _check_type(value, (Mapping,), where)
        for name, part in form.items():
            if isinstance(name, type):
                for key, item in value.items():
                    _check_type(key, (name,), f"a key of {where or 'it'}")
                    check_form(item, part, f"{where}[{key!r}]")
            elif name in value:
                inner = part.form if isinstance(part, Maybe) else part
                check_form(value[name], inner, f"{where}[{name!r}]")
            elif not isinstance(part, Maybe):
                raise ValueError(f"{where or 'it'} has no {name!r}")
    else:
        _check_type(value, form if isinstance(form, tuple) else (form,), where)


def _check_type(value: Any, kinds: tuple[type, ...], where: str) -> None:
    # A bool is no number here.
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{where or 'it'} is a {type(value).__name__}, expected {names}")
