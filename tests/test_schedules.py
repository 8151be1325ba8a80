"""Schedules: when they are due, what they share out, and what they refuse."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyro_ssvi.schedules import ConstantSchedule, CosineSchedule, LinearSchedule, Schedule

ALL = [CosineSchedule, LinearSchedule, ConstantSchedule]


@pytest.mark.parametrize("kind", ALL)
def test_due_at_multiples_of_every_before_stop(kind: type) -> None:
    schedule: Schedule = kind(every=7, stop=35)
    assert [step for step in range(-7, 80) if schedule.due(step)] == [7, 14, 21, 28]


@pytest.mark.parametrize("kind", ALL)
def test_nothing_is_shared_from_stop_on(kind: type) -> None:
    schedule = kind(every=7, stop=30)
    assert schedule.share(29) > 0
    assert schedule.share(30) == schedule.share(31) == schedule.share(90) == 0


@pytest.mark.parametrize(
    ("kind", "shares"),
    [
        (CosineSchedule, [0.4, 0.2 + 0.1 * math.sqrt(2), 0.2, 0.2 - 0.1 * math.sqrt(2)]),
        (LinearSchedule, [0.4, 0.3, 0.2, 0.1]),
        (ConstantSchedule, [0.4, 0.4, 0.4, 0.4]),
    ],
)
def test_share_at_quarters_of_the_way(kind: type, shares: list[float]) -> None:
    schedule = kind(every=10, fraction=0.4, stop=400)
    assert [schedule.share(step) for step in (0, 100, 200, 300)] == pytest.approx(shares)


def test_constant_goes_on_for_ever_by_default() -> None:
    schedule = ConstantSchedule(every=5, fraction=0.2)
    assert schedule.due(5 * 10**12)
    assert schedule.share(5 * 10**12) == 0.2


@pytest.mark.parametrize("kind", ALL)
@given(data=st.data(), every=st.integers(1, 500), fraction=st.floats(1e-3, 1))
def test_share_falls_within_its_bounds(
    kind: type, data: st.DataObject, every: int, fraction: float
) -> None:
    stop = data.draw(st.integers(every, 10**6))
    early, late = sorted(data.draw(st.tuples(*2 * [st.integers(0, stop + every)])))
    schedule = kind(every, fraction, stop)
    assert 0 <= schedule.share(late) <= schedule.share(early) <= fraction
    assert (schedule.share(late) > 0) == (late < stop)


@pytest.mark.parametrize(("kind", "stop"), [*zip(ALL, (75_000, 75_000, None), strict=True)])
def test_defaults(kind: type, stop: int | None) -> None:
    assert kind() == kind(every=100, fraction=0.3, stop=stop)


@pytest.mark.parametrize("kind", ALL)
def test_frozen(kind: type) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        kind().every = 3


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"every": 0}, r"every to be a positive int, got 0: try every=100"),
        ({"every": 10.0}, r"every to be a positive int, got 10.0"),
        ({"fraction": 0.0}, r"fraction in \(0, 1\], got 0.0: try fraction=0.3"),
        ({"fraction": 1.5}, r"fraction in \(0, 1\], got 1.5"),
        ({"fraction": math.nan}, r"fraction in \(0, 1\], got nan"),
        ({"every": 100, "stop": 99}, r"stop to be an int no smaller than every=100, got 99: try"),
        ({"stop": 7.5e4}, r"stop to be an int no smaller than every=100, got 75000.0"),
    ],
)
def test_refusals_name_the_class_and_the_cure(kind: type, bad: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=f"^{kind.__name__} expects {says}"):
        kind(**bad)


@pytest.mark.parametrize("kind", [CosineSchedule, LinearSchedule])
def test_a_decay_needs_an_end(kind: type) -> None:
    with pytest.raises(ValueError, match="expects stop to be an int"):
        kind(stop=None)


def test_the_limits_are_allowed() -> None:
    assert ConstantSchedule(every=1, fraction=1.0, stop=1).stop == 1
