"""Schedules: when they are due, what they share out, and what they refuse."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyro_ssvi.schedules import (
    ConstantSchedule,
    CosineSchedule,
    CyclicSchedule,
    InverseSqrtSchedule,
    LinearSchedule,
    Schedule,
)

ALL = [CosineSchedule, LinearSchedule, ConstantSchedule, InverseSqrtSchedule]


@pytest.mark.parametrize("kind", ALL)
def test_due_at_multiples_of_every_before_stop(kind: type) -> None:
    schedule: Schedule = kind(every=7, stop=35)
    after = int(kind is InverseSqrtSchedule)
    due = [7 + after, 14 + after, 21 + after, 28 + after]
    assert [step for step in range(-7, 80) if schedule.due(step)] == due


@pytest.mark.parametrize("steps", [50, 100, 1000, 75_000])
def test_a_training_for_a_round_number_of_steps_does_not_end_in_an_exchange(steps: int) -> None:
    schedule = InverseSqrtSchedule()
    assert not any(schedule.due(step) for step in range(steps - 48, steps + 1))
    assert schedule.due(steps + 1)


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
        (InverseSqrtSchedule, [0.4, 0.4 / math.sqrt(10), 0.4 / math.sqrt(20), 0.4 / math.sqrt(30)]),
    ],
)
def test_share_at_quarters_of_the_way(kind: type, shares: list[float]) -> None:
    schedule = kind(every=10, fraction=0.4, stop=400)
    assert [schedule.share(step) for step in (0, 100, 200, 300)] == pytest.approx(shares)


@pytest.mark.parametrize(("kind", "share"), [(ConstantSchedule, 0.2), (InverseSqrtSchedule, 2e-7)])
def test_without_end_by_default(kind: type, share: float) -> None:
    schedule = kind(every=5, fraction=0.2)
    assert schedule.due(5 * 10**12) or schedule.due(5 * 10**12 + 1)
    assert schedule.share(5 * 10**12) == pytest.approx(share)


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


@pytest.mark.parametrize(("kind", "stop"), [*zip(ALL, (75_000, 75_000, None, None), strict=True)])
def test_defaults(kind: type, stop: int | None) -> None:
    every = 50 if kind is InverseSqrtSchedule else 100
    assert kind() == kind(every=every, fraction=0.3, stop=stop)


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
        (
            {"every": 100, "stop": 7.5e4},
            r"stop to be an int no smaller than every=100, got 75000.0",
        ),
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


# Cycles


def test_a_cycle_begins_with_a_large_share_and_ends_without_exchanges() -> None:
    schedule = CyclicSchedule(explore=40, cycle=20, every=5, fraction=0.4, restart=0.8)
    due = [step for step in range(-5, 81) if schedule.due(step)]
    assert due == [5, 10, 15, 20, 25, 45, 50, 65, 70]
    assert [step for step in range(-5, 101) if schedule.ends_cycle(step)] == [60, 80, 100]
    exploring = CosineSchedule(every=5, fraction=0.4, stop=30)
    assert all(schedule.share(step) == exploring.share(step) for step in range(40))
    assert [schedule.share(step) for step in (45, 65)] == [0.8, 0.8]
    assert schedule.share(50) == schedule.share(70) == pytest.approx(0.2 * (1 - 0.5))
    assert schedule.share(55) == schedule.share(79) == 0


@given(
    explore=st.integers(0, 300),
    cycle=st.integers(2, 300),
    data=st.data(),
    restart=st.floats(0.1, 1),
)
def test_cycles_are_all_alike(
    explore: int, cycle: int, data: st.DataObject, restart: float
) -> None:
    every = data.draw(st.integers(1, (3 * cycle - 1) // 4))
    schedule: CyclicSchedule = CyclicSchedule(explore, cycle, every, restart=restart)
    for step in range(1, explore + cycle + 1):
        assert 0 <= schedule.share(step) <= max(restart, schedule.fraction)
        assert not (schedule.due(step) and schedule.ends_cycle(step))
        assert 0 <= schedule.rate(step) <= 1
    steps = range(explore + 1, explore + cycle + 1)
    for question in (schedule.due, schedule.ends_cycle, schedule.share, schedule.rate):
        assert [question(step) for step in steps] == [question(step + 3 * cycle) for step in steps]
    assert [schedule.ends_cycle(step) for step in steps] == [*[False] * (cycle - 1), True]
    first = next(step for step in steps if schedule.due(step))
    assert schedule.share(first) == restart
    assert schedule.rate(explore) == schedule.rate(explore + cycle) == 1


def test_the_learning_rate_falls_to_0_in_each_phase() -> None:
    schedule = CyclicSchedule(explore=40, cycle=20, every=5)
    rates = [schedule.rate(step) for step in (0, 20, 39, 40, 50, 59)]
    assert rates == pytest.approx([1, 0.5, 0.0015, 1, 0.5, 0.0062], abs=1e-4)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"every": 0}, "every to be a positive int"),
        ({"restart": 0.0}, r"restart in \(0, 1\], got 0.0"),
        ({"fraction": 2.0}, r"fraction in \(0, 1\], got 2.0"),
        ({"cycle": 133}, "cycle to be an int with an exchange"),
        ({"cycle": 1e4}, "cycle to be an int"),
        ({"explore": -1}, "explore to be an int >= 0, got -1"),
    ],
)
def test_cycles_that_make_no_sense(bad: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=f"^CyclicSchedule expects {says}"):
        CyclicSchedule(**{"explore": 0, "cycle": 1000, **bad})
