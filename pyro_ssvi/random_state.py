"""The state of every global random generator, and runs of a model that do not change it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

__all__ = ["check_random_state", "leaving_no_trace", "random_state", "set_random_state"]


def random_state() -> dict[str, Any]:
    """The generators of torch (CUDA's where it is in use), numpy and Python, as plain data."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [str(name), torch.as_tensor(np.asarray(keys, dtype=np.int64)), *rest],
        "python": [version, list(internal), gauss],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators back; those of CUDA devices that are not here are left out."""
    torch.set_rng_state(state["torch"].cpu())
    for device, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda.cpu(), device)
    np.random.set_state(_numpy(state))  # noqa: NPY002
    random.setstate(_python(state))


def check_random_state(state: dict[str, Any]) -> None:
    """Raise what :func:`set_random_state` would raise, and set nothing."""
    torch.Generator().set_state(state["torch"].cpu())
    for cuda in state["cuda"]:
        cuda.cpu()
    np.random.RandomState().set_state(_numpy(state))
    random.Random().setstate(_python(state))


def _numpy(state: dict[str, Any]) -> tuple:
    name, keys, *rest = state["numpy"]
    return (name, keys.cpu().numpy().astype(np.uint32), *rest)


def _python(state: dict[str, Any]) -> tuple:
    version, internal, gauss = state["python"]
    return (version, tuple(internal), gauss)


@contextmanager
def leaving_no_trace() -> Iterator[None]:
    """Run a model as if it had not run: random generators and modules' buffers are put back."""
    state = random_state()
    kept: dict[nn.Module, dict[str, tuple[Tensor, Tensor]]] = {}

    def keep(module: nn.Module, args: Any) -> None:
        # Any module that is called: one in the closure of a function cannot be found beforehand.
        for part in module.modules():
            if part not in kept:
                buffers = part.named_buffers(recurse=False)
                kept[part] = {name: (buffer, buffer.clone()) for name, buffer in buffers}

    hook = register_module_forward_pre_hook(keep)
    try:
        yield
    finally:
        hook.remove()
        set_random_state(state)
        with torch.no_grad():
            for part, buffers in kept.items():
                for name, (buffer, value) in buffers.items():
                    part._buffers[name] = buffer
                    buffer.data.copy_(value)  # does not count as a change
