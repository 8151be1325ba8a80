"""A training loop with a progress bar."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from statistics import fmean
from typing import Any

from pyro.infer import SVI

from .svi import SSVI

__all__ = ["progress"]

#: How many of the last steps the bar averages over.
WINDOW = 100


def progress(svi: SVI, batches: Iterable, **options: Any) -> Iterator[Any]:
    """Take a step for each batch, and show how training goes.

    The bar has the loss (the negative ELBO) and the milliseconds of a step, means over the last
    100 steps, and the share of coordinates that the last exchange of the schedule replaced. It is
    quiet where stderr is not a terminal. It needs tqdm::

        losses = list(progress(svi, [(x, y)] * 100))

        for loss in progress(svi, batches, desc="training"):
            if svi.steps % 1000 == 0:
                svi.save("training.ckpt")

    :param svi: an :class:`~pyro_ssvi.SSVI`, or Pyro's own :class:`~pyro.infer.SVI`.
    :param batches: for each step the arguments of ``svi.step``, as a tuple or a list, or its only
        argument.
    :param options: of :class:`tqdm.tqdm`: ``desc``, ``total``, ``disable``, ``leave``.
    :return: an iterator over the losses; a step is taken when its loss is asked for.
    :raises ImportError: without tqdm.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        raise ImportError(
            "progress() needs tqdm: pip install tqdm, or install pyro-ssvi with the extra "
            "'examples'"
        ) from None
    return _steps(svi, tqdm(batches, **{"disable": None, "unit": "step"} | options))


def _steps(svi: SVI, bar: Any) -> Iterator[Any]:
    losses: deque[float] = deque(maxlen=WINDOW)
    seconds: deque[float] = deque(maxlen=WINDOW)
    shown: dict[str, str] = {}
    for batch in bar:
        args = batch if isinstance(batch, tuple | list) else (batch,)
        start = time.perf_counter()
        loss = svi.step(*args)
        seconds.append(time.perf_counter() - start)
        if not isinstance(loss, tuple):  # as that of ReweightedWakeSleep
            losses.append(loss)
            shown["loss"] = f"{fmean(losses):.4g}"
        shown["ms/step"] = f"{1000 * fmean(seconds):.3g}"
        if isinstance(svi, SSVI) and svi.schedule.due(svi.steps):
            shown["exchanged"] = f"{svi.schedule.share(svi.steps):.1%}"
        bar.set_postfix(shown, refresh=False)
        yield loss
