"""Schedules: when to exchange, and what share of a site's active coordinates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

__all__ = ["ConstantSchedule", "CosineSchedule", "LinearSchedule", "Schedule"]


class Schedule(Protocol):
    """What a schedule must offer; ``step`` counts completed optimizer steps, from 1."""

    @property
    def every(self) -> int:
        """Steps from one exchange to the next."""

    def due(self, step: int) -> bool:
        """Whether an exchange follows this step."""

    def share(self, step: int) -> float:
        """The share of active coordinates exchanged after this step, in [0, 1]."""


@dataclass(frozen=True)
class _Periodic:
    every: int = 100
    fraction: float = 0.3
    stop: int | None = None

    endless: ClassVar[bool] = False

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not isinstance(self.every, int) or self.every < 1:
            raise ValueError(
                f"{name} expects every to be a positive int, got {self.every!r}: try every=100"
            )
        if not 0 < self.fraction <= 1:
            raise ValueError(
                f"{name} expects fraction in (0, 1], got {self.fraction!r}: try fraction=0.3"
            )
        if self.stop is None and self.endless:
            return
        if not isinstance(self.stop, int) or self.stop < self.every:
            raise ValueError(
                f"{name} expects stop to be an int no smaller than every={self.every}, "
                f"got {self.stop!r}: try stop=int(0.75 * steps), or a smaller every"
            )

    def due(self, step: int) -> bool:
        """Whether an exchange follows this step: a positive multiple of ``every`` < ``stop``."""
        return step >= 1 and step % self.every == 0 and not self._over(step)

    def share(self, step: int) -> float:
        """The share of active coordinates exchanged after this step; 0 from ``stop`` on."""
        return 0.0 if self._over(step) else self.fraction * self._decay(step)

    def _over(self, step: int) -> bool:
        return self.stop is not None and step >= self.stop

    def _decay(self, step: int) -> float:
        return 1.0


@dataclass(frozen=True)
class CosineSchedule(_Periodic):
    """The paper's schedule: ``fraction/2 (1 + cos(pi step / stop))``.

    :param every: steps from one exchange to the next.
    :param fraction: share exchanged at the start, in (0, 1].
    :param stop: from this step on there are no exchanges; the paper takes 75 % of training.
    """

    stop: int = 75_000

    def _decay(self, step: int) -> float:
        return (1 + math.cos(math.pi * step / self.stop)) / 2


@dataclass(frozen=True)
class LinearSchedule(_Periodic):
    """``fraction (1 - step / stop)``; parameters as in :class:`CosineSchedule`."""

    stop: int = 75_000

    def _decay(self, step: int) -> float:
        return 1 - step / self.stop


@dataclass(frozen=True)
class ConstantSchedule(_Periodic):
    """``fraction`` at every exchange, without end where ``stop`` is ``None``."""

    endless: ClassVar[bool] = True
