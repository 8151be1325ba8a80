"""Schedules: when to exchange, and what share of a site's active coordinates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

__all__ = [
    "ConstantSchedule",
    "CosineSchedule",
    "CyclicSchedule",
    "InverseSqrtSchedule",
    "LinearSchedule",
    "Schedule",
]


class Schedule(Protocol):
    """What a schedule must offer; ``step`` counts completed optimizer steps, from 1."""

    @property
    def every(self) -> int:
        """Steps from one exchange to the next."""

    def due(self, step: int) -> bool:
        """Whether an exchange follows this step."""

    def share(self, step: int) -> float:
        """The share of active coordinates exchanged after this step, in [0, 1]."""


def _check(name: str, every: int, **shares: float) -> None:
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"{name} expects every to be a positive int, got {every!r}: try every=100")
    for key, share in shares.items():
        if not 0 < share <= 1:
            raise ValueError(f"{name} expects {key} in (0, 1], got {share!r}: try {key}=0.3")


@dataclass(frozen=True)
class _Periodic:
    every: int = 100
    fraction: float = 0.3
    stop: int | None = None

    endless: ClassVar[bool] = False

    def __post_init__(self) -> None:
        name = type(self).__name__
        _check(name, self.every, fraction=self.fraction)
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
class InverseSqrtSchedule(_Periodic):
    """``fraction sqrt(every / step)``, which asks for no number of steps; it is the default.

    The share falls fast at first, and always on: after 100 exchanges it is a tenth of what it was.
    Exchanges never end. They follow the first step after each multiple of ``every``: a training
    for a round number of steps would end in one otherwise, and predict with coordinates that have
    had no step. Where hardly more coordinates are active than
    count, as in a sparse regression, the weakest one that counts goes and comes back time and
    again: there, :class:`CosineSchedule` is better, which ends.

    :param every: steps from one exchange to the next.
    :param fraction: share at step ``every``, just before the first exchange, in (0, 1].
    :param stop: from this step on there are no exchanges; by default there is no such step.
    """

    every: int = 50

    endless: ClassVar[bool] = True

    def due(self, step: int) -> bool:
        """Whether an exchange follows this step: one after a positive multiple of ``every``, and
        < ``stop``."""
        return super().due(step - 1) and not self._over(step)

    def _decay(self, step: int) -> float:
        return math.sqrt(self.every / max(step, self.every))


@dataclass(frozen=True)
class ConstantSchedule(_Periodic):
    """``fraction`` at every exchange, without end where ``stop`` is ``None``."""

    endless: ClassVar[bool] = True


@dataclass(frozen=True)
class CyclicSchedule:
    """Explore, then go in cycles, each of which ends in a posterior of its own.

    For an :class:`~pyro_ssvi.Ensemble` from one training (Jantre, Bhattacharya, Urban, Yoon,
    Maiti, Balaprakash, Madireddy, arXiv 2206.00794). The first exchange of a cycle is a large
    one, which leaves the last posterior behind; the others of a phase, the exploration or a cycle,
    follow a cosine to 0 at three quarters of it. The last quarter has no exchanges.

    :param explore: steps before the first cycle; 0 for none.
    :param cycle: steps of a cycle.
    :param every: steps from one exchange to the next within a phase.
    :param fraction: share exchanged at the start of a phase, in (0, 1].
    :param restart: share of the first exchange of a cycle, in (0, 1].
    """

    explore: int
    cycle: int
    every: int = 100
    fraction: float = 0.3
    restart: float = 0.5

    def __post_init__(self) -> None:
        _check(type(self).__name__, self.every, fraction=self.fraction, restart=self.restart)
        if not isinstance(self.cycle, int) or 3 * self.cycle <= 4 * self.every:
            raise ValueError(
                f"CyclicSchedule expects cycle to be an int with an exchange in three quarters of "
                f"it, every={self.every} steps from its start, got {self.cycle!r}"
            )
        if not isinstance(self.explore, int) or self.explore < 0:
            raise ValueError(
                f"CyclicSchedule expects explore to be an int >= 0, got {self.explore!r}"
            )

    def due(self, step: int) -> bool:
        """Whether an exchange follows this step."""
        place, length = self._place(step)
        return place >= 1 and place % self.every == 0 and 4 * place < 3 * length

    def share(self, step: int) -> float:
        """The share of active coordinates exchanged after this step."""
        place, length = self._place(step)
        if 4 * place >= 3 * length:
            return 0.0
        if step >= self.explore and place <= self.every:
            return self.restart
        return self.fraction * (1 + math.cos(math.pi * place / (0.75 * length))) / 2

    def ends_cycle(self, step: int) -> bool:
        """Whether this step is the last of a cycle: the posterior is one to keep."""
        return step > self.explore and (step - self.explore) % self.cycle == 0

    def rate(self, step: int) -> float:
        """A factor for the learning rate after this many steps, from 1 to 0 in each phase.

        It is for Pyro's schedulers::

            schedule = CyclicSchedule(explore=9_000, cycle=4_500)
            options = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 5e-3}}
            optim = pyro.optim.LambdaLR({**options, "lr_lambda": schedule.rate})
        """
        place, length = self._place(step)
        return (1 + math.cos(math.pi * place / length)) / 2

    def _place(self, step: int) -> tuple[int, int]:
        """The place in a phase, from 0, and the phase's length."""
        if step < self.explore:
            return step, self.explore
        return (step - self.explore) % self.cycle, self.cycle
